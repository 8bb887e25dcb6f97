"""The check before training: each verdict is seen to fail by breaking exactly what it looks at, and a sound pair passes."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from align_ti.cli import app
from align_ti.config import Recipe, Training
from align_ti.data import batch as tokens
from align_ti.data.conversation import Conversation, Turn
from align_ti.errors import CheckError, ConfigError, RunError
from align_ti.models import attention
from align_ti.models.loading import freeze, load_model, load_processor
from align_ti.models.preservation import preserved
from align_ti.pipeline.training import distil
from align_ti.preflight import checks, cost
from align_ti.preflight import samples as preflight_samples
from align_ti.preflight.checks import run_checks
from align_ti.preflight.cost import Spread, parameter_mib
from align_ti.preflight.page import write_page
from align_ti.preflight.report import report_on
from align_ti.preflight.samples import Sample, rendering, with_other_pictures
from align_ti.preflight.table import sample_text, verdict_table
from align_ti.preflight.verdicts import Verdict, as_json, failed, worst
from align_ti.runs import RunFolder
from align_ti.training import memory, passes
from align_ti.training import objective as loss
from align_ti.training.optimizers import hidden_matrices
from align_ti.training.trainer import AlignTITrainer
from tests import small

LAYER = {"iva": {"layer": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    student, teacher = (load_model(str(folder / name), "float32") for name in ("student", "teacher"))
    freeze(student, ("vision_tower",))
    return student, teacher.requires_grad_(False), load_processor(str(folder / "student"))


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch) -> None:
    """Half of the time of a check of tiny models is a garbage collection before memory is measured."""
    monkeypatch.setattr(memory, "release", lambda: None)


class Setting:
    """A fresh pair with records and recipe, to be broken."""

    def __init__(self, folder: Path, loaded) -> None:
        self.student, self.teacher, self.processor = copy.deepcopy(loaded)
        self.teacher_processor = load_processor(str(folder / "teacher"))
        from align_ti.data.sources import read_conversations

        self.records: list[Conversation] = read_conversations(folder / "train.json")
        self.sections: dict[str, object] = {"objective": LAYER}
        self.folder = folder

    def check(self, **sections: object) -> dict[str, Verdict]:
        verdicts = run_checks(
            self.student,
            self.teacher,
            self.processor,
            self.records,
            Recipe.model_validate(small.recipe(self.folder, **{**self.sections, **sections})),
            teacher_processor=self.teacher_processor,
            records=6,
        )
        assert json.loads(json.dumps(as_json(verdicts)))["state"] == worst(verdicts)
        return {verdict.name: verdict for verdict in verdicts}


@pytest.fixture
def costed(folder, loaded) -> Setting:
    """A setting whose check measures a step too."""
    return Setting(folder, loaded)


@pytest.fixture
def setting(costed, monkeypatch) -> Setting:
    """A setting whose check leaves the cost of a step out, which most breaks have no part in."""
    monkeypatch.setattr(checks, "cost_verdicts", lambda *_, **__: [])
    return costed


def named(verdicts: dict[str, Verdict], state: str = "fail") -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict.state == state}


# --- a sound pair -----------------------------------------------------------------------------------------------------


def test_a_sound_pair_passes_every_check(costed):
    verdicts = costed.check()
    assert not named(verdicts) and not named(verdicts, "warn"), failed(list(verdicts.values()), "")
    terms = {f"{kind}.{term}" for kind in ("fused", "term") for term in ("sft", "kd", "iva", "tpa")}
    models = {
        f"{kind}.{name}"
        for kind in ("weights", "visual_tokens", "pixels", "batch", "projection")
        for name in ("student", "teacher")
    }
    alone = {"vocabularies", "image_tokens", "layout", "parts", "records", "responses", "roles", "memory", "time"}
    assert verdicts.keys() == terms | models | alone
    shares = [verdicts[f"term.{term}"].values["gradient_share"] for term in ("sft", "kd", "iva", "tpa")]
    assert sum(shares) == pytest.approx(1)
    assert sum(
        verdicts["roles"].values[role] for role in ("other", "visual", "instruction", "response")
    ) == pytest.approx(1)
    counts = verdicts["parts"].values["parts"]
    assert sum(part["all"] for part in counts.values()) == costed.student.num_parameters()
    assert counts["vision_tower"]["trained"] == 0 < counts["language_model"]["trained"]
    cost = verdicts["memory"].values
    trained = sum(p.numel() * 4 for p in costed.student.parameters() if p.requires_grad) / 2**20
    assert cost["optimizer_mib"] == pytest.approx(2 * trained)
    assert verdicts["time"].values["steps"] == 4


@pytest.mark.parametrize(
    ("dtype", "sections"),
    [
        (torch.bfloat16, {"training": {"max_steps": 1, "bf16": True, "per_device_train_batch_size": 2}}),
        (
            torch.float32,
            {"training": {"max_steps": 1, "gradient_checkpointing": True, "per_device_train_batch_size": 2}},
        ),
        (
            torch.float64,
            {
                "objective": {
                    "iva": {"layer": 0, "images": "separately", "share": 0.7},
                    "tpa": {"form": "packed"},
                    "kd": {"temperature": 2.0},
                }
            },
        ),
    ],
)
def test_sound_pairs_of_other_precisions_and_options_have_no_failure(costed, dtype, sections):
    costed.student, costed.teacher = (model.to(dtype) for model in (costed.student, costed.teacher))
    verdicts = costed.check(**sections)
    assert not named(verdicts), failed(list(verdicts.values()), "")


def test_sft_alone_needs_no_teacher(setting):
    setting.teacher = setting.teacher_processor = None
    off = {name: {"weight": 0.0} for name in ("kd", "iva", "tpa")}
    verdicts = setting.check(objective=off, teacher=None)
    assert not named(verdicts)
    assert {"term.sft", "fused.sft", "pixels.student"} <= verdicts.keys()
    assert not any("teacher" in name for name in verdicts)


def test_the_check_leaves_no_trace(costed):
    student, teacher = costed.student, costed.teacher
    student.train()
    student.model.vision_tower.eval()
    teacher.eval()
    # transformers hangs hooks of its own on a model when it is first run.
    costed.check()
    marked = next(p for p in student.parameters() if p.requires_grad)
    marked.grad = torch.full_like(marked, 7.0)

    def state() -> list[object]:
        models = [
            ({k: v.clone() for k, v in m.state_dict().items()}, [b.clone() for b in m.buffers()])
            for m in (student, teacher)
        ]
        modules = [
            (x.training, getattr(x, "gradient_checkpointing", None), [str(h) for h in x._forward_hooks.values()])
            for m in (student, teacher)
            for x in m.modules()
        ]
        attention = [m.config.get_text_config()._attn_implementation for m in (student, teacher)]
        wanted = [p.requires_grad for p in student.parameters()]
        grads = [p.grad if p.grad is None else p.grad.clone() for p in student.parameters()]
        return [models, modules, attention, wanted, grads, torch.get_rng_state(), np.random.get_state()[1].copy()]

    before = state()
    costed.check(training={"max_steps": 1, "gradient_checkpointing": True, "per_device_train_batch_size": 2})
    same(before, state())


def test_random_states_come_back(loaded):
    # The check of annotations draws from Python's generator itself, so it is looked at here, around the block alone.
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def with_seed() -> None:
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    with_seed()
    expected = draws()
    with_seed()
    with preserved(loaded[0]):
        draws()
    assert draws() == expected


def same(one: object, two: object) -> None:
    """Equal through lists and dictionaries of tensors."""
    if isinstance(one, (torch.Tensor, np.ndarray)):
        assert np.array_equal(np.asarray(one), np.asarray(two))
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            same(a, b)
    else:
        assert one == two


# --- every check sees its own break -----------------------------------------------------------------------------------


def blind(model) -> None:
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_model_that_sees_nothing_is_named(setting, name):
    blind(getattr(setting, name))
    verdicts = setting.check()
    assert named(verdicts) == {f"pixels.{name}"}
    assert "vision tower" in verdicts[f"pixels.{name}"].sentence


def test_one_picture_alone_is_compared_with_noise(setting):
    setting.records = setting.records[:1]
    assert named(setting.check()) == set()
    blind(setting.teacher)
    assert named(setting.check()) == {"pixels.teacher"}


def test_a_teacher_that_always_gets_the_same_picture_is_named(setting):
    read = setting.teacher.model.get_image_features
    setting.teacher.model.get_image_features = lambda pixel_values, **options: read(
        torch.zeros_like(pixel_values), **options
    )
    assert named(setting.check()) == {"pixels.teacher"}


def test_a_teacher_that_gets_another_records_picture_is_named(setting):
    read = setting.teacher.model.get_image_features
    setting.teacher.model.get_image_features = lambda pixel_values, **options: read(pixel_values.roll(1, 0), **options)
    assert named(setting.check()) == {"batch.teacher"}


def test_a_loss_that_shows_the_teacher_another_picture_is_named(setting, monkeypatch):
    read = passes.read

    def another(model, inputs, *, keep_cache, layers=()):
        pixels = inputs["pixel_values"]
        return read(
            model,
            {**inputs, "pixel_values": -3 * pixels if model is setting.teacher else pixels},
            keep_cache=keep_cache,
        )

    monkeypatch.setattr(passes, "read", another)
    assert named(setting.check()) == {"fused.kd", "fused.iva", "fused.tpa"}


def test_muon_takes_one_state_for_a_matrix(costed):
    saved = sum(matrix.numel() * 4 for matrix in hidden_matrices(costed.student)) / 2**20
    plain, muon = (costed.check(training={"optimizer": name})["memory"] for name in ("adamw", "muon"))
    assert muon.values["optimizer_mib"] == pytest.approx(plain.values["optimizer_mib"] - saved)
    assert saved > 0 and "states of Muon and AdamW" in muon.sentence and "AdamW's two states" in plain.sentence


def test_attention_that_is_not_captured_is_named(costed, monkeypatch):
    monkeypatch.setattr(attention.Watch, "look", lambda *_: None)
    verdicts = costed.check()
    assert named(verdicts) == {"fused.iva", "term.iva", "memory"}
    assert "was not captured" in verdicts["term.iva"].sentence


def test_attention_that_is_captured_wrong_is_named(setting, monkeypatch):
    right = attention.attention_rows

    def even(*tensors):
        found = right(*tensors)
        return dataclasses.replace(found, weights=torch.ones_like(found.weights))

    monkeypatch.setattr(attention, "attention_rows", even)
    assert named(setting.check()) == {"fused.iva"}


def unshift(monkeypatch, function=lambda labels: labels):
    """Rows are taken for those of their own token's label, or right again."""
    for module in (loss, tokens):
        monkeypatch.setattr(module, "next_labels", function)


def test_a_missing_causal_shift_is_named(setting, monkeypatch):
    unshift(monkeypatch)
    assert named(setting.check()) == {"fused.sft", "fused.kd"}


def test_padding_in_the_mean_is_named(setting, monkeypatch):
    right = loss.term_masses

    def with_padding(terms, tokens, plan):
        every = torch.tensor(tokens.labels.numel())
        return {name: every if name in {"sft", "kd"} else mass for name, mass in right(terms, tokens, plan).items()}

    monkeypatch.setattr(loss, "term_masses", with_padding)
    assert named(setting.check()) == {"fused.sft", "fused.kd"}


@pytest.mark.parametrize(("name", "cap"), [("student", 0.3), ("teacher", 5.0)])
def test_logits_that_the_model_caps_and_the_loss_does_not_are_named(setting, name, cap):
    model = getattr(setting, name)
    forward: Callable = model.forward

    def capped(*arguments, **options):
        out = forward(*arguments, **options)
        out.logits = cap * torch.tanh(out.logits / cap)
        return out

    model.forward = capped
    named_now = named(setting.check())
    assert f"projection.{name}" in named_now and "fused.kd" in named_now
    assert ("fused.sft" in named_now) == (name == "student")


def test_different_vocabularies_are_named_and_nothing_is_run(setting):
    setting.processor.tokenizer.add_tokens(["first-extra", "second-extra"])
    setting.teacher_processor.tokenizer.add_tokens(["second-extra", "first-extra"])
    verdicts = setting.check()
    assert named(verdicts) == {"vocabularies"}
    assert "'first-extra' (454 and 455)" in verdicts["vocabularies"].measured
    assert named(verdicts, "warn") == {"not_run"}


def test_a_tokenizer_without_a_pad_token_is_named(setting):
    setting.processor.tokenizer.pad_token = None
    assert "pad token" in setting.check()["vocabularies"].measured


def test_heads_may_be_padded_but_not_too_small(setting):
    setting.teacher.resize_token_embeddings(512)
    assert named(setting.check()) == set()
    setting.student.resize_token_embeddings(300)
    assert "300 rows, but the tokenizer has 454 tokens" in setting.check()["vocabularies"].measured


def test_different_image_tokens_are_named(setting):
    setting.teacher.config.image_token_id = 2
    verdicts = setting.check()
    assert named(verdicts) == {"image_tokens"}
    assert "2 in the teacher" in verdicts["image_tokens"].measured


def test_a_tower_that_gives_another_number_of_vectors_is_named(setting):
    setting.teacher.config.vision_feature_select_strategy = "default"
    verdicts = setting.check()
    assert named(verdicts) == {"visual_tokens.teacher"}
    assert "70 feature vectors for 72" in verdicts["visual_tokens.teacher"].measured


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_weights_that_are_no_numbers_are_named(setting, name):
    with torch.no_grad():
        getattr(setting, name).model.language_model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    verdicts = setting.check()
    assert named(verdicts) == {f"weights.{name}"}
    assert "up_proj" in verdicts[f"weights.{name}"].measured


def test_a_layout_that_is_not_followed_is_named(setting):
    setting.student.config.text_config.attn_logit_softcapping = 5.0
    verdicts = setting.check()
    assert "layout" in named(verdicts) and "drops the cap" in verdicts["layout"].measured


def test_terms_without_gradient_are_named(setting):
    setting.student.requires_grad_(False)
    # The tower's features are taken before this norm, so nothing that any term reads depends on it.
    setting.student.model.vision_tower.post_layernorm.requires_grad_(True)
    verdicts = setting.check()
    assert named(verdicts) == {"term.sft", "term.kd", "term.iva", "term.tpa"}
    assert "gradient of norm 0" in verdicts["term.iva"].measured
    setting.student.requires_grad_(False)
    assert named(setting.check()) == {"parts"}


def test_terms_that_compare_equal_models_are_named(setting):
    setting.teacher = copy.deepcopy(setting.student).requires_grad_(False)
    assert {"term.kd", "term.tpa", "term.iva"} <= named(setting.check())


def test_a_term_that_moves_nothing_is_warned_of(setting):
    verdicts = setting.check(objective={**LAYER, "kd": {"weight": 1e-6}})
    assert not named(verdicts)
    assert named(verdicts, "warn") == {"term.kd"}


def test_responses_that_are_too_long_are_named(setting):
    lengths = [len(preflight_samples.encode(record, setting.processor)["roles"]) for record in setting.records[:6]]
    longest = max(lengths)
    verdicts = setting.check(data={"train": "train.json", "max_length": longest - 1})
    assert named(verdicts) == {"responses"}
    assert verdicts["responses"].values["too_long"] == lengths.count(longest) < 6
    assert f"{longest} tokens, but max_length is {longest - 1}" in verdicts["responses"].sentence


def test_responses_that_lose_words_are_named(setting, monkeypatch):
    whole = preflight_samples.encode

    def cut(*arguments, **options):
        return {name: value[:-3] if value.dim() == 1 else value for name, value in whole(*arguments, **options).items()}

    monkeypatch.setattr(preflight_samples, "encode", cut)
    verdicts = setting.check()
    assert named(verdicts) == {"responses"}
    assert verdicts["responses"].values["cut"] == 6
    assert "record 1" in verdicts["responses"].measured


def test_records_that_cannot_be_read_are_named(setting):
    setting.records[2] = Conversation(setting.records[2].turns, (Path("gone.png"),), "train.json, record 3")
    verdicts = setting.check()
    assert named(verdicts) == {"records"}
    assert "train.json, record 3: image gone.png does not exist" in verdicts["records"].measured


def test_records_without_pictures_are_warned_of(setting):
    turns = (Turn("user", "Which digit is at the middle?"), Turn("assistant", "It is a nine."))
    setting.records = [Conversation(turns)] * 3
    verdicts = setting.check()
    assert named(verdicts, "warn") == {"roles", "pixels", "term.iva"}
    assert not named(verdicts)


def test_a_step_that_does_not_fit_is_named(costed, monkeypatch):
    monkeypatch.setattr(cost, "device_mib", lambda device: 1.0)
    verdicts = costed.check()
    assert named(verdicts) == {"memory"}
    assert "batch_size" in verdicts["memory"].sentence


# --- what people see --------------------------------------------------------------------------------------------------


def test_other_pictures_have_the_records_own_size(setting):
    encoded = [Sample(record, preflight_samples.encode(record, setting.processor)) for record in setting.records[:6]]
    changed = with_other_pictures(encoded, 0)
    assert changed.images[0].size == setting.records[0].pictures()[0].size
    assert changed.images[0].tobytes() != setting.records[0].pictures()[0].tobytes()
    # The next records show the same image, which would change nothing.
    assert changed.images[0].tobytes() == setting.records[4].pictures()[0].tobytes()


def test_samples_and_verdicts_are_shown_as_text_and_not_obeyed(setting, tmp_path):
    turns = (Turn("user", "<image>[red]<script>alert(1)</script>\x1b[2J"), Turn("assistant", "A & B"))
    record = Conversation(turns, setting.records[0].images, "<b>place</b>")
    verdict = Verdict(name="roles", state="warn", measured="[bold]<i>x</i>", expected="y", way_out="z", values={})
    report = report_on([verdict], setting.processor, [record])
    spans = report.renderings[0].spans
    assert [span.role for span in spans] == ["other", "visual", "instruction", "other", "response"]
    assert spans[1].text == "[36 visual tokens]"
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(verdict_table([verdict]))
        console.print(sample_text(report.renderings[0]))
    shown = capture.get()
    assert "[bold]<i>x</i>; expected: y; z." in shown and "[red]<script>" in shown
    assert "\x1b[2J" not in shown
    write_page(tmp_path / "check.html", [], report.renderings)
    page = (tmp_path / "check.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page and "<b>place" not in page
    assert "\x1b" not in page and re.search(r"data:image/(png|jpeg);base64,", page)


def test_a_rendering_holds_every_word_of_the_record(setting):
    record = setting.records[0]
    text = rendering(Sample(record, preflight_samples.encode(record, setting.processor)), setting.processor)
    assert "".join(p.text for p in text.spans if p.role == "response").startswith(record.turns[1].text)


def test_weights_on_another_device_take_no_memory_of_this_one():
    # A bug: a teacher on another device counted, and runs that fit were refused.
    model = torch.nn.ModuleList([torch.nn.Linear(256, 256, bias=False), torch.nn.Linear(256, 512, device="meta")])
    model[0].requires_grad_(False)
    assert parameter_mib(model, on=torch.device("cpu")) == 0.25
    assert parameter_mib(model, trained=True, on=torch.device("cpu")) == 0
    assert parameter_mib(model) > 0.75


def measured_step(mib: float = 100.0) -> cost.Measured:
    return cost.Measured(seconds=1.0, mib=mib, of="resident", records=1, tokens=10)


def test_what_a_process_holds_in_part_counts_in_part(setting):
    models, training = {"student": setting.student, "teacher": setting.teacher}, Training(per_device_train_batch_size=1)
    student, teacher = parameter_mib(setting.student), parameter_mib(setting.teacher)
    trained = parameter_mib(setting.student, trained=True)

    def held(**spread: object) -> float:
        values = cost.memory(models, measured_step(trained + 3), training, Spread(**spread)).values
        return values["total_mib"] - 3

    assert held() == pytest.approx(student + teacher + 3 * trained)
    assert held(processes=2) == pytest.approx(student + teacher + 4 * trained)
    assert held(processes=4, teacher=True) == pytest.approx(student + teacher / 4 + 4 * trained)
    assert held(processes=4, engine="zero2") == pytest.approx(student + teacher + 3 * trained / 4)
    for engine in ("fsdp2", "zero3"):
        assert held(processes=4, engine=engine) == pytest.approx(student / 4 + teacher + 3 * trained / 4)


@pytest.mark.parametrize("where", ["placing", "probing"])
def test_where_memory_runs_out_the_check_says_that_and_nothing_else(folder, tmp_path, monkeypatch, where):
    # A bug: what ran out of memory was told as a fault of what was checked at that moment.
    def full(*_arguments: object, **_options: object) -> None:
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    if where == "placing":
        monkeypatch.setattr("align_ti.pipeline.checking.move", full)
    else:
        monkeypatch.setattr("align_ti.preflight.terms.distillation_loss", full)
    with pytest.raises(CheckError, match=r"memory.*out of memory.*Tried to allocate 9 GiB"):
        distil(run_recipe(folder, tmp_path / "run"), seen=lambda _: None)
    if where == "probing":
        told = json.loads((tmp_path / "run" / "check.json").read_text())["verdicts"]
        assert [one["name"] for one in told if one["state"] == "fail"] == ["memory"]


def test_a_warning_needs_a_way_out():
    with pytest.raises(ValueError, match="without a way out"):
        Verdict(name="x", state="fail", measured="a", expected="b")
    assert worst([]) == "pass" and failed([], "x") is None


# --- in a run ---------------------------------------------------------------------------------------------------------


def run_recipe(folder: Path, out: Path, **sections: object) -> Recipe:
    content = small.recipe(folder, out=str(out), check=True, objective=LAYER, **sections)
    content["training"] = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1}
    return Recipe.model_validate(content)


def test_training_checks_first_and_changes_nothing_by_it(folder, tmp_path):
    reports = []
    checked = distil(run_recipe(folder, tmp_path / "checked"), seen=reports.append)
    plain = distil(run_recipe(folder, tmp_path / "plain"), check=False)
    assert len(reports) == 1 and worst(reports[0].verdicts) == "pass"
    assert json.loads(checked.check.read_text())["state"] == "pass" and checked.check_page.exists()
    assert not plain.check.exists()
    same([line["loss"] for line in checked.read_metrics()], [line["loss"] for line in plain.read_metrics()])


def test_a_failed_check_stops_the_run_and_another_recipe_may_follow(folder, tmp_path, monkeypatch):
    right = loss.next_labels
    unshift(monkeypatch)
    with pytest.raises(CheckError, match=r"fused\.sft: sft on one sample"):
        distil(run_recipe(folder, tmp_path / "run"))
    run = RunFolder(tmp_path / "run")
    assert json.loads(run.check.read_text())["state"] == "fail"
    assert not run.metrics.exists()
    unshift(monkeypatch, right)
    finished = distil(run_recipe(folder, tmp_path / "run", seed=3), seen=lambda _: None)
    assert yaml.safe_load(finished.recipe.read_text())["seed"] == 3
    with pytest.raises(RunError, match="seed"):
        distil(run_recipe(folder, tmp_path / "run", seed=4))


def test_only_the_main_process_checks(folder, tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr(AlignTITrainer, "is_world_process_zero", lambda _: False)
    distil(run_recipe(folder, tmp_path / "run"), seen=reports.append)
    assert not reports and not (tmp_path / "run" / "check.json").exists()


def test_a_run_that_goes_on_is_not_checked_again(folder, tmp_path):
    from align_ti.errors import InterruptedRunError
    from tests.test_trainer import Stop

    reports = []
    with pytest.raises(InterruptedRunError):
        distil(run_recipe(folder, tmp_path / "run"), steps=Stop(1), seen=reports.append)
    distil(run_recipe(folder, tmp_path / "run"), seen=reports.append)
    assert len(reports) == 1


def test_the_command_prints_a_table_or_json_and_fails_where_a_check_does(folder, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small.recipe(folder, out=str(tmp_path / "run"))))
    command = ["check", str(tmp_path / "recipe.yaml")]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "pixels.student" in shown.output and "27 pass, 0 warn, 0 fail" in shown.output
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"check.json", "check.html"}
    exchange, shared = {}, ["--engine", "fsdp2"]
    for devices, more in (("1", []), ("2", []), ("4", shared)):
        options = ["--json", "--devices", devices, *more]
        told = json.loads(CliRunner().invoke(app, [*command, *options]).stdout)["verdicts"]
        exchange[devices] = next(one for one in told if one["name"] == "memory")["values"]["exchange_mib"]
    assert exchange["2"] > exchange["1"] == exchange["4"] == 0
    wrong = CliRunner().invoke(app, [*command, "--engine", "fsdp"])
    assert isinstance(wrong.exception, ConfigError) and "ddp, fsdp2, zero2, zero3" in str(wrong.exception)
    # What the trainer would refuse on those devices is said before models are loaded.
    for change in ("data.on_policy={probability: 0.5}", "training.gradient_shares_every=5"):
        refused = CliRunner().invoke(app, [*command, "--devices", "4", *shared, "--set", change])
        assert isinstance(refused.exception, ConfigError) and "under fsdp2" in str(refused.exception), change
    unshift(monkeypatch)
    printed = CliRunner().invoke(app, [*command, "--json"])
    assert isinstance(printed.exception, CheckError) and "fused.kd" in str(printed.exception)
    content = json.loads(printed.stdout)
    assert content == json.loads((tmp_path / "run" / "check.json").read_text())
    assert [v["name"] for v in content["verdicts"] if v["state"] == "fail"] == ["fused.sft", "fused.kd"]
