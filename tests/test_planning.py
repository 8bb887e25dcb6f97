"""The plan of a run against what real tensors take: exact where it says so, else within a stated factor."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from benchmarks import plan_scaling
from benchmarks.shapes import Shape, make_config
from benchmarks.tables import RESULTS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlavaConfig, Qwen3Config, SiglipVisionConfig
from typer.testing import CliRunner

from align_ti.cli import app
from align_ti.config import Data, Recipe
from align_ti.errors import AlignTIError, ConfigError
from align_ti.flops import FORMULAS
from align_ti.models.adapters import unwrapped, wrap_with_lora
from align_ti.models.loading import freeze
from align_ti.models.pairing import Pairing
from align_ti.planning.live import GRADIENTS, Live
from align_ti.planning.memory import Layout, memory_of, model_of
from align_ti.planning.plan import (
    FILLED,
    Case,
    Models,
    advise,
    autocast,
    cached_teacher,
    launched_by,
    make_plan,
    together,
)
from align_ti.planning.sizes import bits_of, on_meta, pretend_pair, quantised_bytes, size_of, sizes_of
from align_ti.planning.step import Batch, planned_objective, pretend_batch, recompute, step
from align_ti.planning.steptime import Machine, slowest, step_time
from align_ti.planning.traffic import traffic_of
from align_ti.training.objective import distillation_loss
from align_ti.training.optimizers import MuonAdamW, hidden_matrices, saved_bytes
from tests.family_models import FAMILIES, IDS

FACTOR = 1.05
"""How far a prediction may be from the measured peak: drawn candidates fall unevenly on the records, planned ones do not."""

PICTURE, VISUAL = 56, 16


def config(hidden: int, layers: int) -> LlavaConfig:
    text = Qwen3Config(
        vocab_size=8000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PICTURE,
        patch_size=14,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=VISUAL,
        tie_word_embeddings=True,
    )


CONFIGS = {"student": config(512, 4), "teacher": config(768, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configs alone: a plan needs no weights."""
    made = tmp_path_factory.mktemp("configs")
    for name, one in CONFIGS.items():
        one.save_pretrained(made / name)
    return made


def recipe(folder, student=None, training=None, **sections) -> Recipe:
    return Recipe(
        out="run",
        student={"path": str(folder / "student"), **(student or {})},
        teacher={"path": str(folder / "teacher"), "dtype": "float32"},
        data={"train": "records.json"},
        training=training or {},
        **sections,
    )


def real(name: str):
    torch.manual_seed(len(name))
    return AutoModelForImageTextToText.from_config(CONFIGS[name], dtype=torch.float32).eval()


BATCH = Batch(records=2, tokens=160, visual=VISUAL, response=60)
CASES = {
    "full training": ({"freeze": ()}, {}),
    "frozen tower": ({}, {}),
    "frozen language model": ({"freeze": ("language_model",)}, {}),
    "gradient checkpointing": ({}, {"gradient_checkpointing": True}),
    "LoRA": ({"lora": {"rank": 8}}, {}),
    "bfloat16 autocast": ({}, {"bf16": True}),
    "accumulation": ({}, {"gradient_accumulation_steps": 2}),
}


def measured(settings: Recipe) -> tuple[Live, float]:
    """A real step of real models, with candidates drawn by the loss: what was alive, and the share of candidates with a row."""
    student, teacher = real("student"), real("teacher").requires_grad_(False)
    freeze(student, settings.student.freeze)
    if settings.student.lora is not None:
        student = wrap_with_lora(student, **settings.student.lora.model_dump())
    student.train()
    if settings.training.gradient_checkpointing:
        recompute(student)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if settings.training.gradient_accumulation_steps > 1 else None
    batch, _, _ = pretend_batch(unwrapped(student), BATCH, 0)
    layer = settings.objective.at_layer(1)
    live = Live()
    with live.counting(trained):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.training.bf16):
            out = distillation_loss(
                unwrapped(student),
                teacher,
                batch,
                layer,
                generator=torch.Generator().manual_seed(0),
                pairing=Pairing(),
            )
        with live.place.phase("backward"):
            out.loss.backward()
    assert out.branch_share is not None
    return live, float(out.branch_share)


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_step_is_the_measured_one(folder, case):
    settings = recipe(folder, *CASES[case])
    live, share = measured(settings)
    planned = step(settings, Batch(**{**vars_of(BATCH), "row_share": share}), accelerator=False)
    for counted, truth in ((planned.peak, live.peak), (planned.peak_apart, live.peak_apart)):
        expected, found = sum(truth.values()), sum(counted.values())
        assert expected / FACTOR < found < expected * FACTOR, (case, found / expected)
    for phase, flops in live.flops.items():
        if flops and phase != "candidates":  # nothing is drawn in a plan
            assert planned.flops[phase] == pytest.approx(flops, rel=0.05), (case, phase)
    # The parts too, where they are more than a few per cent of the whole.
    for phase, size in live.peak.items():
        if size > 0.05 * sum(live.peak.values()):
            assert planned.peak[phase] == pytest.approx(size, rel=0.15), (case, phase)


def vars_of(batch: Batch) -> dict[str, object]:
    return {name: getattr(batch, name) for name in Batch.__slots__}


@pytest.mark.parametrize("case", CASES)
def test_weights_gradients_and_optimizer_are_exact(folder, case):
    settings = recipe(folder, *CASES[case])
    student = real("student")
    freeze(student, settings.student.freeze)
    if settings.student.lora is not None:
        student = wrap_with_lora(student, **settings.student.lora.model_dump())
    sizes = sizes_of(pretend_pair(settings).student)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert sizes.weights == sum(map(size_of, student.parameters()))
    assert sizes.trained == sum(size_of(parameter.grad) for parameter in trained)
    assert sizes.optimizer == sum(map(size_of, states))
    if hasattr(torch.optim, "Muon"):
        both = MuonAdamW(trained, matrices=hidden_matrices(student))
        both.step()
        fewer = sum(size_of(value) for state in both.state.values() for value in state.values())
        assert 0 < saved_bytes(student) == sizes.optimizer - fewer
    layers = [sum(map(size_of, layer.parameters())) for layer in unwrapped(student).model.language_model.layers]
    assert sizes.largest == max(layers)
    tower = unwrapped(student).model.vision_tower
    assert sizes.tower == sum(map(size_of, tower.parameters()))


def test_what_is_alive_is_counted_by_hand():
    live = Live()
    weight = torch.nn.Parameter(torch.ones(10, 10))
    with live.counting([weight]):
        with live.place.phase("one"):
            kept = weight * 2  # 400 bytes
            view = kept[:5].T  # none of its own
            (weight * 3).add_(1)  # 400 more, freed at once
        with live.place.phase("two"):
            loss = (kept * kept).sum()  # 400, and 4 of the sum
            del view
        with live.place.phase("back"):
            loss.backward()
    assert live.by_phase["one"] == 400
    assert live.by_phase["two"] == 4
    assert live.by_phase[GRADIENTS] == weight.grad.untyped_storage().nbytes() == 400
    # Kept and loss, and at the product's backward two gradients and their sum.
    assert sum(live.peak.values()) == 400 + 4 + 3 * 400 + 4
    del kept
    assert live.by_phase["one"] == 0


def test_chunks_are_an_accelerators_or_a_cpus_and_the_limits_stay(folder):
    from align_ti.losses import weighted

    before = dict(weighted.BLOCK_LOGITS), dict(weighted.CHUNK_LOGITS)
    settings = recipe(folder)
    wide = Batch(records=2, tokens=600, visual=VISUAL, response=300)
    big, small = (step(settings, wide, accelerator=kind) for kind in (True, False))
    assert big.peak["divergence"] > small.peak["divergence"]
    assert before == (weighted.BLOCK_LOGITS, weighted.CHUNK_LOGITS)


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(folder):
    return model_of(recipe(folder), BATCH, accelerator=False)


@pytest.mark.parametrize(
    ("training", "told"),
    [
        (
            {"optimizer": "muon"},
            r"muon under zero2, and DeepSpeed flattens .*: adamw, or another engine \(fsdp2, ddp\)",
        ),
        (
            {"bf16": True},
            r"training\.bf16 is true under zero2, and DeepSpeed would make .*: training\.bf16: false, or",
        ),
    ],
)
def test_what_deepspeed_cannot_train_is_not_planned_under_it_nor_is_that_advised(folder, training, told):
    refused = recipe(folder, training=training)
    with pytest.raises(ConfigError, match=told):
        make_plan(refused, Layout(engine="zero2", devices=2))
    data = Data(train="records.json", on_policy={"probability": 0.5})
    sharded = recipe(folder).model_copy(update={"data": data})
    with pytest.raises(
        ConfigError, match=r"data\.on_policy is given under zero3, and the student's weights are sharded"
    ):
        make_plan(sharded, Layout(engine="zero3", devices=2))
    cases = [Case(recipe=one, batch=BATCH, layout=Layout(engine="ddp", devices=2)) for one in (refused, recipe(folder))]
    assert [launched_by("zero2")(case) is None for case in cases] == [True, False]
    assert launched_by("fsdp2")(cases[0]) is not None
    assert [
        autocast(replace(cases[1], layout=Layout(engine=engine, devices=2))) is None for engine in ("zero2", "ddp")
    ] == [
        True,
        False,
    ]


def test_engines_keep_what_they_say(model):
    student, teacher = model.student, model.teacher.weights
    one = memory_of(model, Layout()).parts
    assert one["student's weights"] == student.weights and one["teacher's weights"] == teacher
    assert one["optimizer"] == student.optimizer
    assert memory_of(replace(model, saved=1000), Layout()).parts == {**one, "optimizer": student.optimizer - 1000}
    ddp = memory_of(model, Layout(engine="ddp", devices=4)).parts
    assert ddp["exchange"] == student.trained
    assert {name: size for name, size in ddp.items() if name != "exchange"} == one
    fsdp = memory_of(model, Layout(engine="fsdp2", devices=4)).parts
    assert fsdp["student's weights"] == student.weights // 4
    assert fsdp["gradients"] == student.trained // 4
    assert fsdp["optimizer"] == student.optimizer // 4
    assert fsdp["teacher's weights"] == teacher
    assert fsdp["gathered"] == 2 * student.largest + student.root
    both = memory_of(model, Layout(engine="fsdp2", devices=4, shard_teacher=True)).parts
    assert both["teacher's weights"] == teacher // 4
    assert both["gathered"] == fsdp["gathered"] + min(2 * model.teacher.largest + model.teacher.root, teacher)
    zero2 = memory_of(model, Layout(engine="zero2", devices=4)).parts
    assert zero2["student's weights"] == student.weights
    assert zero2["gradients"] == student.trained_numel * 4 // 4
    assert zero2["optimizer"] == 12 * student.trained_numel // 4
    zero3 = memory_of(model, Layout(engine="zero3", devices=4)).parts
    assert zero3["student's weights"] == student.weights // 4


def test_more_devices_take_less_each_where_something_is_sharded(model):
    for engine in ("fsdp2", "zero2", "zero3"):
        totals = [memory_of(model, Layout(engine=engine, devices=count)).total for count in (2, 4, 8, 64)]
        assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]
    assert len({memory_of(model, Layout(engine="ddp", devices=count)).total for count in (2, 8)}) == 1


def test_what_is_sent_is_what_a_ring_sends(model):
    student = model.student

    def sent(engine, devices, micro=1, draws=True, **more):
        return traffic_of(model, Layout(engine=engine, devices=devices, **more), micro, draws=draws, terms=4).parts

    assert traffic_of(model, Layout(), 1, draws=True, terms=4).total == 0
    assert sent("ddp", 4)["gradients"] == 2 * 3 * student.trained // 4
    # Gradients are exchanged once a step, however many micro-batches it has; sharded ones after each.
    assert sent("ddp", 4, micro=8) == sent("ddp", 4)
    assert sent("fsdp2", 4, micro=8)["gradients"] == 8 * sent("fsdp2", 4)["gradients"]
    assert sent("fsdp2", 2)["gradients"] == student.trained // 2
    # A pass forward and one back, and with candidates two of each; the tower is read once.
    language = student.weights - student.tower
    assert sent("fsdp2", 2, draws=False)["weights"] == pytest.approx((2 * language + student.tower) / 2, abs=1)
    assert sent("fsdp2", 2)["weights"] == pytest.approx((4 * language + student.tower) / 2, abs=1)
    assert sent("fsdp2", 2, micro=2)["weights"] == pytest.approx((5 * language + 2 * student.tower) * 2 / 2, abs=1)
    assert sent("fsdp2", 2, shard_teacher=True)["teacher's weights"] == model.teacher_bytes
    assert sent("zero2", 2)["weights"] == student.trained_numel * 4 // 2
    assert sent("ddp", 2)["masses"] == 8 * 4


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"engine": "horovod", "devices": 2}, "one, ddp, fsdp2, zero2, zero3"),
        ({"engine": "ddp", "devices": 1}, "one for 1 device"),
        ({"engine": "one", "devices": 2}, "one for 1 device"),
        ({"engine": "one", "devices": 1, "shard_teacher": True}, "--devices 2 or more"),
    ],
)
def test_layouts_that_are_none_are_refused(layout, said):
    with pytest.raises(ConfigError, match=said):
        Layout(**layout)


@pytest.mark.parametrize("wrong", [{"tokens": 50}, {"response": 0}, {"row_share": 1.5}, {"records": 0}])
def test_batches_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match="--"):
        Batch(**{**vars_of(BATCH), **wrong})


def test_a_quantised_teacher_counts_its_linear_layers_in_fewer_bits(folder):
    pair = pretend_pair(recipe(folder))
    plain = recipe(folder).teacher
    linear = sum(layer.weight.numel() for layer in pair.teacher.model.modules() if isinstance(layer, torch.nn.Linear))
    for options, bits in (({"load_in_4bit": True}, 4), ({"load_in_8bit": True}, 8)):
        settings = plain.model_copy(update={"quantization": options})
        saved = quantised_bytes(pair.teacher, plain) - quantised_bytes(pair.teacher, settings)
        assert saved == pytest.approx(linear * (4 - bits / 8 * 17 / 16), rel=1e-3)
    assert bits_of({"quant_method": "quanto", "weights": "int4"}) == 4
    assert bits_of({"quant_method": "quanto", "weights": "int8"}) == 8


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_teacher_is_sharded_whatever_trains_the_student(model, engine):
    whole, parts = (
        memory_of(model, Layout(engine=engine, devices=4, shard_teacher=sharded)).parts for sharded in (False, True)
    )
    teacher = model.teacher
    assert parts.pop("teacher's weights") == teacher.weights // 4
    assert parts.pop("gathered") == min(2 * teacher.largest + teacher.root, teacher.weights)
    assert whole.pop("teacher's weights") == teacher.weights
    assert parts == whole
    sent = traffic_of(model, Layout(engine=engine, devices=2, shard_teacher=True), 1, draws=True, terms=4).parts
    assert sent["teacher's weights"] == model.teacher_bytes


CACHEABLE = {"tpa": {"weight": 0}}


@pytest.mark.parametrize("objective", [CACHEABLE, {**CACHEABLE, "iva": {"weight": 0}}])
def test_with_a_teacher_cache_the_head_alone_is_there_and_no_pass(folder, objective):
    online = model_of(recipe(folder, objective=objective), BATCH, accelerator=False)
    settings = recipe(folder, objective=objective)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"teacher_cache": "kept"})})
    cached = model_of(settings, BATCH, accelerator=False)
    head = real("teacher").lm_head
    assert cached.teacher_bytes == sum(map(size_of, head.parameters())) < online.teacher_bytes
    assert online.counted.flops["teacher forward"] > 0
    assert not any(cached.counted.flops.get(phase) for phase in ("teacher forward", "teacher second pass"))
    # The student's work, and the comparison of as many rows, stay.
    for phase in ("student forward", "divergence"):
        assert cached.counted.flops[phase] == online.counted.flops[phase]
    for layout in (Layout(), Layout(engine="ddp", devices=2), Layout(engine="ddp", devices=2, shard_teacher=True)):
        assert memory_of(cached, layout).parts["teacher's weights"] == cached.teacher_bytes
        assert "teacher's weights" not in traffic_of(cached, layout, 1, draws=False, terms=2).parts


# --- advice and the verb ----------------------------------------------------------------------------------------------


def test_the_first_option_that_makes_it_fit_is_named(tmp_path):
    folder = tmp_path
    for name in CONFIGS:
        config(128, 1).save_pretrained(folder / name)
    plain = {"iva": {"weight": 0}, "tpa": {"weight": 0}}  # fewer passes to count
    sizes = {"tokens": 100, "visual": VISUAL, "response": 30, "counted": Models(accelerator=False)}
    settings = recipe(folder, training={"per_device_train_batch_size": 4}, objective=plain)
    free = make_plan(settings, Layout(), limit=10**12, **sizes)
    assert free.first is None and not free.advice
    tight = int(0.98 * free.memory.total / FILLED)
    plan = make_plan(settings, Layout(), limit=tight, **sizes)
    alone = {one.change: one for one in plan.advice}
    assert plan.first == next(one.change for one in plan.advice if one.fits) == "training.gradient_checkpointing: true"
    # It says what a plan of that recipe says.
    again = make_plan(
        recipe(folder, training={"per_device_train_batch_size": 4, "gradient_checkpointing": True}, objective=plain),
        Layout(),
        **sizes,
    )
    assert alone["training.gradient_checkpointing: true"].total == again.memory.total
    assert "student.lora: {rank: 16}" in alone and not any("--engine" in name for name in alone)
    least = min(one.total for one in plan.advice)
    several = make_plan(settings, Layout(), limit=int(0.9 * least / FILLED), **sizes)
    assert not any(one.fits for one in several.advice)
    assert several.first is not None and " and " in several.first
    none = make_plan(settings, Layout(), limit=10**6, **sizes)
    assert none.first is None and none.advice


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    made = tmp_path_factory.mktemp("little")
    for name in CONFIGS:
        config(128, 1).save_pretrained(made / name)
    return made


LITTLE = {"tokens": 100, "visual": VISUAL, "response": 30}


class Told(Models):
    """Bytes by a rule in place of a count: fsdp2 takes less than zero2, a sharded teacher less than a quantised one."""

    def bytes_of(self, case):
        layout, teacher, data = case.layout, case.recipe.teacher, case.recipe.data
        engine = {"one": 0, "ddp": 0, "zero2": 1, "fsdp2": 2}[layout.engine]
        form = 4 if data.teacher_cache else 3 if layout.shard_teacher else 2 if teacher.quantization else 0
        return 100 - engine - form


def case_of(folder, layout, objective=None, **teacher) -> Case:
    settings = recipe(folder, objective={"iva": {"weight": 0}} if objective is None else objective)
    settings = settings.model_copy(update={"teacher": settings.teacher.model_copy(update=teacher)})
    return Case(recipe=settings, batch=Batch(records=1, tokens=100, visual=VISUAL, response=30), layout=layout)


def offered(case: Case) -> list[str]:
    advice, _ = advise(case, Told(accelerator=False), 0, 100)
    return [one.change for one in advice]


def test_a_teacher_cache_is_advised_where_the_objective_allows_it(little):
    cacheable = case_of(little, Layout(), {"iva": {"weight": 0}, "tpa": {"weight": 0}})
    assert any("data.teacher_cache" in one and "`align-ti cache RECIPE" in one for one in offered(cacheable))
    assert not any("teacher_cache" in one for one in offered(case_of(little, Layout())))
    # It makes the other forms needless, and is not asked for twice.
    assert "data.teacher_cache" in together(cacheable, Told(accelerator=False), 96, 100)
    made = cached_teacher(cacheable)[1]
    assert not any("teacher" in one for one in offered(made))


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_options_say_what_training_takes(little, form):
    layout = Layout(engine="ddp", devices=4, shard_teacher=form == "sharded")
    options = offered(case_of(little, layout))
    engine = next(one for one in options if "fsdp2" in one)
    assert "accelerate launch --config_file fsdp2.yaml" in engine
    assert "align-ti recipes copy fsdp2 fsdp2.yaml" in engine
    assert ("teacher.sharded: true (--shard-teacher)" in options) == (form == "whole")
    quantised = next(one for one in options if "quantization" in one)
    assert ("teacher.sharded: false" in quantised) == (form == "sharded")
    for own in ({"quantization": {"load_in_4bit": True}}, {"device": "cpu"}):
        assert not any(
            "teacher.sharded: true" in one for one in offered(case_of(little, Layout(engine="ddp", devices=4), **own))
        )


def test_a_later_choice_takes_the_place_of_an_earlier_one(little):
    told = together(case_of(little, Layout(engine="ddp", devices=4)), Told(accelerator=False), 95, 100)
    assert told is not None
    assert "--engine fsdp2" in told and "teacher.sharded: true" in told
    assert "zero2" not in told and "quantization" not in told


def test_a_quantised_teacher_is_not_planned_as_sharded(little):
    settings = recipe(little, objective={"iva": {"weight": 0}})
    quantised = settings.teacher.model_copy(update={"quantization": {"load_in_4bit": True}})
    with pytest.raises(ConfigError, match="leave out one of the two"):
        make_plan(
            settings.model_copy(update={"teacher": quantised}),
            Layout(engine="ddp", devices=2, shard_teacher=True),
            **LITTLE,
        )


def test_the_verb_plans_a_sharded_teacher_of_the_recipe(little, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"out: {tmp_path}/run\nstudent: {{path: {little}/student}}\n"
        f"teacher: {{path: {little}/teacher, dtype: float32, sharded: true}}\n"
        "data: {train: records.json, max_length: 100}\nobjective: {tpa: {weight: 0}, iva: {weight: 0}}\n"
    )
    for devices, sharded in ((1, False), (2, True)):
        result = CliRunner().invoke(app, ["plan", str(file), "--devices", str(devices), "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["layout"]["shard_teacher"] == sharded


def test_the_verb_tells_the_plan(folder, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"out: {tmp_path}/run\nstudent: {{path: {folder}/student}}\nteacher: {{path: {folder}/teacher, dtype: float32}}\n"
        "data: {train: records.json, max_length: 160}\ntraining: {per_device_train_batch_size: 2}\n"
    )
    given = [str(file), "--devices", "2", "--engine", "fsdp2", "--response", "60", "--cpu"]
    result = CliRunner().invoke(app, ["plan", *given, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    expected = make_plan(
        recipe(folder, training={"per_device_train_batch_size": 2}),
        Layout(engine="fsdp2", devices=2),
        accelerator=False,
        tokens=160,
        response=60,
    )
    assert told["memory_bytes"] == {**expected.memory.parts, "total": expected.memory.total}
    assert told["sent_bytes_per_step"] == {**expected.traffic.parts, "total": expected.traffic.total}
    assert told["batch"] == {"records": 2, "tokens": 160, "visual": VISUAL, "response": 60, "row_share": 1.0}
    assert "data.max_length" in told["assumed"][0] and "--row-share" in told["assumed"][-1]
    shown = CliRunner().invoke(app, ["plan", *given, "--memory", "100"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    for said in ("activations", "optimizer", "gathered", "sent", "assumed", "fits in 90% of 100 GB"):
        assert said in shown.output
    wrong = CliRunner().invoke(app, ["plan", str(file), "--engine", "ddp"])
    assert isinstance(wrong.exception, AlignTIError)


@pytest.mark.parametrize("family", ["llava-clip-llama", "llava-onevision", "qwen2.5-vl", "gemma3"])
def test_every_familys_step_is_counted(family, tmp_path):
    for name, hidden in (("student", 32), ("teacher", 64)):
        FAMILIES[family].build(hidden, 2, IDS).config.save_pretrained(tmp_path / name)
    plan = make_plan(recipe(tmp_path), Layout(), tokens=60, visual=16, response=10, row_share=0.5)
    assert {"student's weights", "teacher's weights", "activations"} <= set(plan.memory.parts)
    whole_pictures = family.startswith("llava-clip")
    assert any("tower's forward pass is not included" in told for told in plan.assumed) != whole_pictures


def test_a_teacher_without_a_layer_for_iva_is_refused(tmp_path):
    for name in ("student", "teacher"):
        FAMILIES["llava-siglip-mistral"].build(32, 2, IDS).config.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match=r"objective\.iva\.weight: 0"):
        make_plan(recipe(tmp_path), Layout(), tokens=60, visual=16, response=10)


# --- the simulation ---------------------------------------------------------------------------------------------------


def test_counted_work_is_that_of_pytorchs_counter(folder):
    """The formulas by phase add up to what FlopCounterMode finds in the same step."""
    student, teacher = real("student"), real("teacher").requires_grad_(False)
    freeze(student, ("vision_tower",))
    batch, tried, _ = pretend_batch(student, BATCH, 4)
    objective = planned_objective(recipe(folder).objective, teacher)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter:
        distillation_loss(student.train(), teacher, batch, objective, tried, pairing=Pairing()).loss.backward()
    planned = step(recipe(folder), BATCH, accelerator=False)
    assert sum(planned.flops.values()) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_simulated_step_adds_up(model):
    machine = Machine(flops=1e12, utilisation=0.5, unevenness=0.0, hop_seconds=0.0, overlap=0.0, link_share=1.0)
    flops = model.counted.flops
    theirs = flops["teacher forward"] + flops["teacher second pass"]
    alone = step_time(model, Layout(), machine)
    assert alone.teacher == pytest.approx(theirs / 0.5e12)
    assert alone.total == pytest.approx(sum(flops.values()) / 0.5e12)
    assert alone.exchange == alone.waiting == 0
    # Nothing hides the exchange here: bytes over the slowest link.
    for devices, rate in ((8, machine.node_bytes), (16, machine.net_bytes)):
        layout = Layout(engine="ddp", devices=devices)
        sent = traffic_of(model, layout, 1, draws=True, terms=4).total
        assert step_time(model, layout, machine).exchange == pytest.approx(sent / rate)
    cached = step_time(model, Layout(), machine, cached_teacher=True)
    assert cached.teacher == 0 and cached.student == alone.student
    # Several micro-batches: all of the work as often, and a pass that draws candidates for each.
    several = step_time(model, Layout(), machine, 3)
    assert several.student == pytest.approx(3 * (alone.student + flops["student forward"] / 0.5e12))
    hidden = Machine(flops=1e12, overlap=1.0, unevenness=0.0)
    assert step_time(model, Layout(engine="ddp", devices=16), hidden).exchange == 0


def test_the_slowest_of_many_waits_longer_and_is_as_expected():
    assert slowest(1) == 0
    draws = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)).max(dim=1).values.mean()
    assert slowest(64) == pytest.approx(float(draws), rel=0.02)
    assert slowest(1024) > slowest(64)


def test_the_file_of_the_simulation_is_what_the_command_makes():
    kept = json.loads((RESULTS / "plan-scaling.json").read_text(encoding="utf-8"))
    for name, student in plan_scaling.STUDENTS.items():
        model = plan_scaling.model_from(kept["models"][name])
        for engine, steps in kept["growth"][name].items():
            assert tuple(one["devices"] for one in steps) == plan_scaling.DEVICES
            for one in steps:
                layout = plan_scaling.layout_of(engine, one["devices"])
                assert plan_scaling.row(model, layout, Machine(), student.layers) == one
    # The sizes in the file are those of the models; their work is counted as in the tests above.
    shape = Shape(
        student=student,
        teacher=student,
        tower=plan_scaling.TOWER,
        vocabulary=151_936,
        side=27,
        instruction=1,
        response=1,
        batch=1,
    )
    found = on_meta(make_config(student, shape))
    found.model.vision_tower.requires_grad_(False)
    assert asdict(sizes_of(found)) == kept["models"]["2B"]["student"]
    assert kept["machine"] == {name: getattr(Machine(), name) for name in Machine.__slots__}
