"""Memory options: adapters, frozen parameters, precisions, checkpointing, a quantised or placed teacher, compilation."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, TrainingArguments

from align_ti.config import Evaluation, Iva, Kd, Objective, Recipe, Sft, Student, Teacher, Tpa
from align_ti.data.collator import Collator
from align_ti.data.roles import encode
from align_ti.data.sources import read_conversations
from align_ti.errors import ConfigError, InterruptedRunError, ModelError
from align_ti.models import loading
from align_ti.models.adapters import load_trained, merged, save_trained, trained, unwrapped, wrap_with_lora
from align_ti.models.compilation import compile_tokenwise
from align_ti.models.families import language_model
from align_ti.models.loading import (
    check_precision,
    check_teacher_precision,
    freeze,
    freeze_matching,
    load_model,
    load_processor,
    trained_by_part,
)
from align_ti.models.overrides import same_frozen_tower
from align_ti.models.placement import move, quantization_config, stay
from align_ti.pipeline.measuring import evaluate_model
from align_ti.pipeline.parts import load_parts, load_teacher
from align_ti.pipeline.training import distil
from align_ti.runs import RunFolder
from align_ti.training.objective import distillation_loss
from align_ti.training.trainer import AlignTITrainer
from tests import small, tiny

OBJECTIVE = Objective(iva=Iva(layer=1))
BATCH = tiny.batch(tiny.COMPOSITIONS["several images"])
KINDS = [{}, {"dora": True}, {"rslora": True, "rank": 3}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    return path


def loss(student, teacher, batch=BATCH, objective=OBJECTIVE):
    drawn = tiny.candidates(batch)
    return distillation_loss(student, teacher, batch, objective, drawn).loss


def lora(model, **options):
    torch.manual_seed(0)
    wrapped = wrap_with_lora(model, **{"rank": 4, "alpha": 8, **options})
    # peft makes its matrices in float32, which would be the error of every comparison here.
    return wrapped.double()


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("seed", [0, 1])  # head of its own, tied head
def test_untrained_adapters_change_nothing_and_trained_ones_merge_exactly(options, seed):
    student, teacher = tiny.model(seed), tiny.model(2 + seed)
    freeze(student, ("vision_tower",))
    before = loss(student, teacher)
    wrapped = lora(student, **options)
    inner = unwrapped(wrapped)
    assert isinstance(wrapped, PeftModel) and inner is student
    torch.testing.assert_close(loss(inner, teacher), before, rtol=1e-10, atol=0)

    optimizer = torch.optim.SGD(trained(wrapped).values(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(inner, teacher).backward()
        optimizer.step()
    value = loss(inner, teacher)
    assert value < before
    plain = merged(wrapped)
    assert plain is student and not any("lora" in name for name, _ in plain.named_parameters())
    # One product in place of two; the norms between layers are float32, so a last digit there may turn over.
    torch.testing.assert_close(loss(plain, teacher), value, rtol=1e-8, atol=0)


def test_all_of_the_language_model_is_wrapped_and_other_parts_are_trained_in_full():
    student = tiny.model(0)
    freeze(student, ("vision_tower",))
    counts = trained_by_part(student)
    wrapped = lora(student)
    names = trained(wrapped)
    in_full = {name for name in names if "lora" not in name}
    assert in_full and all("multi_modal_projector" in name for name in in_full)
    linear = [layer for layer in language_model(student).modules() if hasattr(layer, "lora_A")]
    assert len(linear) == 2 * 7
    after = trained_by_part(wrapped)
    assert after.keys() == counts.keys()
    assert after["vision_tower"][0] == 0 and after["lm_head"][0] == 0
    assert after["multi_modal_projector"] == counts["multi_modal_projector"]
    assert 0 < after["language_model"][0] < counts["language_model"][0]
    assert sum(trained for trained, _ in after.values()) == sum(value.numel() for value in names.values())


def test_a_frozen_layer_gets_no_adapter():
    student = tiny.model(0)
    freeze(student, ("vision_tower", "projector", "language_model.layers.0.*"))
    wrapped = lora(student, targets=("q_proj", "language_model.layers.*.down_proj"))
    layers = {name.partition(".lora_")[0].rpartition("language_model.")[2] for name in trained(wrapped)}
    assert layers == {"layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"}


def test_targets_that_name_nothing_or_only_frozen_layers_are_refused():
    student = tiny.model(0)
    with pytest.raises(ModelError, match=r"'query', but no linear layer.*q_proj"):
        wrap_with_lora(student, rank=2, alpha=2, targets=("query",))
    # The head is tied to the embeddings in many models; an adapter there could not be merged into one of them.
    with pytest.raises(ModelError, match="lm_head"):
        wrap_with_lora(student, rank=2, alpha=2, targets=("lm_head",))
    freeze(student, ("language_model",))
    with pytest.raises(ModelError, match=r"student\.freeze keeps all of it"):
        wrap_with_lora(student, rank=2, alpha=2)


class Stop:
    """Sends the process the signal that Ctrl-C sends, at the end of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, step: int, _steps: int) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def recipe(folder: Path, out: Path, student=None, teacher=None, training=None, **sections) -> Recipe:
    base = small.recipe(folder, out=str(out), objective={"iva": {"layer": 1}})
    return Recipe.model_validate(
        {
            **base,
            "student": {**base["student"], **(student or {})},
            "teacher": {**base["teacher"], **(teacher or {})},
            "training": {**base["training"], **(training or {})},
            **sections,
        }
    )


@pytest.mark.parametrize("dora", [False, True])
def test_a_stopped_run_with_adapters_goes_on_and_ends_the_same(folder, tmp_path, dora):
    # Beside adapters the projector is trained in full; peft's own checkpoint leaves it out, and a resumed run began it anew.
    options = {"lora": {"rank": 4, "dropout": 0.1, "dora": dora}}
    training = {"gradient_checkpointing": dora}
    whole = distil(recipe(folder, tmp_path / "whole", options, training=training))
    stopped = recipe(folder, tmp_path / "stopped", options, training=training)
    with pytest.raises(InterruptedRunError, match="step 3 of 4"):
        distil(stopped, steps=Stop(3))
    resumed = distil(stopped)
    logs = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in run.read_metrics()] for run in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    one, two = (load_file(run.student / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = load_file(folder / "student" / "model.safetensors")
    assert one.keys() == start.keys()
    moved = {name for name in start if not torch.equal(start[name], one[name])}
    assert any("multi_modal_projector" in name for name in moved) and any("q_proj" in name for name in moved)
    assert not any("embed_tokens" in name or "vision_tower" in name or "norm" in name for name in moved)


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    student = lora(tiny.model(0))
    with pytest.raises(ModelError, match=r"has no trained\.safetensors"):
        load_trained(student, tmp_path)
    save_trained(student, tmp_path)
    with pytest.raises(ModelError, match="trains other weights than this student"):
        load_trained(lora(tiny.model(0), rank=2), tmp_path)
    load_trained(student, tmp_path)


def test_diverged_adapters_are_not_merged():
    student = lora(tiny.model(0))
    with torch.no_grad():
        next(value for name, value in trained(student).items() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ModelError, match="cannot be merged"):
        merged(student)


def test_adapters_of_the_user_train_under_accumulation(folder, tmp_path):
    processor = load_processor(str(folder / "student"))
    student = wrap_with_lora(load_model(str(folder / "student"), "float32"), rank=2, alpha=4)
    run = AlignTITrainer(
        model=student,
        teacher_model=load_model(str(folder / "teacher"), "float32"),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        ),
        objective=OBJECTIVE,
        train_dataset=read_conversations(folder / "train.json"),
        processing_class=processor,
    )
    run.train()
    assert all(line["grad_norm"] > 0 for line in run.state.log_history if "grad_norm" in line)
    assert {"eval_loss", "eval_tpa"} <= run.evaluate(run.train_dataset).keys()


# --- freezing ---------------------------------------------------------------------------------------------------------


def test_patterns_freeze_parameters_by_name():
    student = tiny.model(0)
    freeze(student, ("language_model.layers.0.*", "model.vision_tower.*", "*norm.weight"))
    frozen = {name.removeprefix("model.") for name, value in student.named_parameters() if not value.requires_grad}
    every = {name.removeprefix("model.") for name, _ in student.named_parameters()}
    wanted = {
        name
        for name in every
        if name.startswith(("language_model.layers.0.", "vision_tower.")) or name.endswith("norm.weight")
    }
    assert frozen == wanted and wanted != every


def test_a_tied_head_is_frozen_by_either_of_its_names():
    student = tiny.model(1)
    freeze_matching(student, "lm_head.*")
    assert not language_model(student).embed_tokens.weight.requires_grad


def test_a_pattern_that_matches_nothing_is_refused_with_near_names():
    with pytest.raises(ModelError, match=r"matches no parameter.*language_model\.layers\.0\.mlp"):
        freeze(tiny.model(0), ("language_model.layer.0.mlp.*",))
    with pytest.raises(ConfigError, match="did you mean 'vision_tower'"):
        Student(path="s", freeze=("vision-tower",))


# --- precisions and checkpointing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("autocast", "teacher"), [(False, "bfloat16"), (False, "float16"), (True, "float32"), (True, "bfloat16")]
)
def test_precisions_that_are_accepted_give_nearly_the_same_loss(folder, weights, autocast, teacher):
    exact = precise_loss(folder, "float32", "float32", False)
    value = precise_loss(folder, weights, teacher, autocast)
    assert value == pytest.approx(exact, rel=0.05)


def precise_loss(folder: Path, weights: str, teacher: str, autocast: bool) -> float:
    student, processor = load_model(str(folder / "student"), weights), load_processor(str(folder / "student"))
    batch = Collator(0)([encode(one, processor) for one in read_conversations(folder / "train.json")[:3]])
    objective = Objective(iva=Iva(layer=1), tpa=Tpa(source="gold"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = distillation_loss(student, load_model(str(folder / "teacher"), teacher), batch, objective).loss
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    return value.item()


def test_trained_float16_weights_are_refused(folder, tmp_path):
    # A gradient scaler fails on them only after the first backward, with a message about neither dtype nor option.
    for fp16 in (False, True):
        with pytest.raises(ModelError, match=r"float16 would be trained.*student\.dtype"):
            check_precision(load_model(str(folder / "student"), "float16"), fp16=fp16)
    with pytest.raises(ModelError, match=r"training\.bf16 in place of training\.fp16"):
        check_precision(load_model(str(folder / "student"), "bfloat16"), fp16=True)
    with pytest.raises(ModelError, match="float16 would be trained"):
        load_parts(recipe(folder, tmp_path / "run", {"dtype": "float16"}))
    if not torch.accelerator.is_available():
        # transformers spoke of `use_cpu` and of devices, neither of which a recipe has.
        with pytest.raises(ConfigError, match=r"training\.fp16 is true, but this machine has no accelerator"):
            distil(recipe(folder, tmp_path / "scaled", training={"fp16": True}))
        line = distil(recipe(folder, tmp_path / "mixed", training={"bf16": True, "max_steps": 1})).read_metrics()[0]
        assert line["loss"] > 0
    # The CPU's layer norm cannot read float16 weights under bfloat16 autocast, and says so in its own words.
    teacher = load_model(str(folder / "teacher"), "float16")
    with pytest.raises(ModelError, match=r"teacher.*float16.*teacher\.dtype"):
        check_teacher_precision(teacher, torch.device("cpu"), bf16=True)
    check_teacher_precision(teacher, torch.device("cuda"), bf16=True)
    # Frozen weights may be: peft keeps its matrices in float32.
    frozen = {"dtype": "float16", "freeze": ["vision_tower", "projector"], "lora": {}}
    kinds = {value.dtype for value in trained(load_parts(recipe(folder, tmp_path / "run", frozen)).student).values()}
    assert kinds == {torch.float32}


@pytest.mark.parametrize("frozen", [("vision_tower",), ("vision_tower", "language_model.embed_tokens.*")])
def test_checkpointing_with_adapters_and_frozen_embeddings_gives_the_same_gradients(frozen):
    gradients = []
    for checkpointing in (False, True):
        student, teacher = tiny.model(0), tiny.model(2)
        freeze(student, frozen)
        wrapped = lora(student)
        if checkpointing:
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped.train()
        with torch.no_grad():
            for name, value in trained(wrapped).items():
                if "lora_B" in name:
                    value.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        loss(student, teacher).backward()
        gradients.append({name: value.grad for name, value in trained(wrapped).items()})
    for name, value in gradients[0].items():
        assert value is not None and value.norm() > 0, name
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-7)


# --- the teacher's form and place -------------------------------------------------------------------------------------


def test_quantization_options_reach_transformers_as_they_are(folder, monkeypatch):
    seen = {}

    def load(path, **options):
        seen.update(options)
        raise ImportError("bitsandbytes is not installed\nand more")

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", load)
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    with pytest.raises(ModelError, match="bitsandbytes is not installed"):
        load_teacher(Teacher(path=str(folder / "teacher"), quantization=four_bit))
    given = seen["quantization_config"]
    assert isinstance(given, BitsAndBytesConfig) and given.load_in_4bit and given.bnb_4bit_quant_type == "nf4"
    assert given.bnb_4bit_compute_dtype == torch.bfloat16
    assert seen["device_map"] == {"": str(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))}


def test_quantization_that_transformers_does_not_know_is_refused():
    with pytest.raises(ModelError, match=r"quant_method 'int3'; accepted: .*quanto.*torchao"):
        quantization_config({"quant_method": "int3"})
    with pytest.raises(ModelError, match="quant_method None"):
        quantization_config({"weights": "int8"})
    # transformers passes over an option it does not know.
    with pytest.raises(ModelError, match="did you mean 'bnb_4bit_quant_type'"):
        quantization_config({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"})
    with pytest.raises(ModelError, match="quanto refuses its options"):
        quantization_config({"quant_method": "quanto", "weights": "int3"})
    assert quantization_config({"quant_method": "quanto", "weights": "int8"}).weights == "int8"


INT8 = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
}


def test_a_quantised_tower_is_not_compared(folder):
    # torch.equal has no meaning for quantised weights, so a pair with one tower failed with a traceback.
    pytest.importorskip("torchao")
    made = recipe(folder, folder / "none", teacher={"path": str(folder / "student"), "quantization": INT8})
    student, teacher = load_parts(made).student, load_parts(made).teacher
    assert not same_frozen_tower(student, teacher)
    assert same_frozen_tower(
        student, load_parts(recipe(folder, folder / "none", teacher={"path": str(folder / "student")})).teacher
    )


def test_a_quantised_teacher_trains_a_student(folder, tmp_path):
    pytest.importorskip("torchao")
    made = recipe(folder, tmp_path / "run", teacher={"quantization": INT8}, training={"max_steps": 2})
    teacher = load_parts(made).teacher
    layer = language_model(teacher).layers[0].mlp.up_proj.weight
    assert type(layer).__name__ == "Int8Tensor"
    line = distil(made).read_metrics()[0]
    exact = distil(recipe(folder, tmp_path / "exact", training={"max_steps": 2})).read_metrics()[0]
    for term in ("sft", "kd", "iva", "tpa"):
        assert line[term] == pytest.approx(exact[term], rel=0.05), term


def test_a_teacher_with_a_place_of_its_own_gives_the_same_loss():
    student, teacher = tiny.model(0), tiny.model(1)
    before = loss(student, teacher)
    stay(teacher)
    stay(teacher)
    assert torch.equal(loss(student, teacher), before)
    drawn = Objective(iva=Iva(layer=1), tpa=Tpa(source="teacher"))
    distillation_loss(student, teacher, BATCH, drawn, generator=torch.Generator().manual_seed(0))
    # It is not moved; a model without a place is.
    move(teacher, "meta")
    assert teacher.device.type == "cpu"
    move(student, "meta")
    assert student.device.type == "meta"


def test_a_run_with_a_placed_teacher_is_the_same_run(folder, tmp_path):
    device = "cpu" if torch.cuda.is_available() else "auto"
    logs = [
        distil(recipe(folder, tmp_path / name, teacher=teacher, training={"max_steps": 2})).read_metrics()
        for name, teacher in (("plain", {}), ("placed", {"device": device}))
    ]
    for one, two in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3 if torch.cuda.is_available() else 0)
    teacher = Teacher(path=str(folder / "teacher"), device=device)
    records = read_conversations(folder / "train.json")[:2]
    result = evaluate_model(str(folder / "student"), records, Evaluation(max_new_tokens=2), teacher=teacher)
    assert result["divergence"] > 0


def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(ModelError, match="'cuda:99' cannot be used here; found: auto, cpu"):
        load_teacher(Teacher(path=str(folder / "teacher"), device="cuda:99"))
    with pytest.raises(ConfigError, match=r"teacher\.device is 'gpu'"):
        Teacher(path="t", device="gpu")
    with pytest.raises((ConfigError, ValidationError)):
        Teacher(path="t", quantization={})


# --- compilation ------------------------------------------------------------------------------------------------------


def test_a_compiled_pair_gives_the_same_loss_and_gradients(tmp_path):
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        # More layers than dynamo compiles one function for.
        student, teacher = tiny.model(0, layers=9), tiny.model(1)
        wrapped = lora(student)
        names = set(student.state_dict())
        if compiled:
            assert compile_tokenwise(student, "aot_eager") == 3 * 9
            compile_tokenwise(teacher, "aot_eager")
        torch._dynamo.utils.counters.clear()
        values = []
        for name in ("one turn",):
            values.append(loss(student, teacher, tiny.batch(tiny.COMPOSITIONS[name])))
            values[-1].backward()
        results.append((values, [value.grad for value in trained(wrapped).values()]))
        assert set(student.state_dict()) == names
    # Truly compiled, and each kind of module once for all layers, not once for each.
    frames = torch._dynamo.utils.counters["frames"]
    assert 0 < frames["ok"] == frames["total"] <= 12
    for one, two in zip(*([*values, *gradients] for values, gradients in results), strict=True):
        # Compiled operations may sum in another order, and the norms are float32.
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_the_recipe_compiles_both_models_and_the_arguments_of_transformers_do_not(folder, tmp_path, monkeypatch):
    from align_ti.pipeline import training

    compiled = []
    monkeypatch.setattr(training, "compile_tokenwise", compiled.append)
    run = distil(recipe(folder, tmp_path / "run", {"lora": {}}, training={"torch_compile": True, "max_steps": 1}))
    assert len(compiled) == 2 and run.student.exists()
    student, processor = load_model(str(folder / "student")), load_processor(str(folder / "student"))
    args = TrainingArguments(output_dir=str(tmp_path / "other"), report_to="none", use_cpu=True)
    args.torch_compile = True
    off = Objective(sft=Sft(), kd=Kd(weight=0.0), iva=Iva(weight=0.0), tpa=Tpa(weight=0.0))
    with pytest.raises(ConfigError, match="compile_tokenwise"):
        AlignTITrainer(model=student, args=args, objective=off, processing_class=processor)
    assert RunFolder(tmp_path / "run").read_metrics()
