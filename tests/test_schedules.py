"""Options that change along training: their course, the objective at each step, and a run that follows it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import model_validator
from transformers import TrainerControl, TrainerState, TrainingArguments

from align_ti.config import Iva, Kd, Objective, OnPolicy, Recipe, Sft, Tpa
from align_ti.data.sources import read_conversations
from align_ti.errors import ConfigError, InterruptedRunError
from align_ti.models.loading import load_model, load_processor
from align_ti.pipeline.training import distil
from align_ti.runs import RunFolder, read_json
from align_ti.studies.costs import mean_over, of_stages
from align_ti.terms.base import Term
from align_ti.terms.schedule import Schedule
from align_ti.training.objective import distillation_loss
from align_ti.training.trainer import AlignTITrainer
from align_ti.training.watch import WARM_UP, RunRecorder
from tests import small

NUMBERS = st.floats(0.0, 3.0)
FRACTIONS = st.floats(0.0, 1.0)


@st.composite
def schedules(draw) -> Schedule:
    begin, end = sorted((draw(FRACTIONS), draw(st.floats(0.01, 1.0))))
    initial = draw(st.none() | NUMBERS)
    shape = draw(st.sampled_from(["linear", "cosine"]))
    return Schedule(initial=initial, final=draw(NUMBERS), begin=begin, end=max(end, 0.01), shape=shape)


@given(schedules(), NUMBERS, FRACTIONS, FRACTIONS)
def test_a_value_goes_from_its_initial_to_its_final_one_and_never_back(schedule, own, one, other):
    initial = own if schedule.initial is None else schedule.initial
    early, late = (schedule.value(progress, own) for progress in sorted((one, other)))
    assert schedule.value(1.0, own) == schedule.final
    assert schedule.value(0.0, own) == initial
    if sorted((one, other))[0] >= schedule.end:
        assert early == schedule.final
    if 0 < sorted((one, other))[1] <= schedule.begin < schedule.end:
        assert late == initial
    assert abs(early - schedule.final) >= abs(late - schedule.final) - 1e-9


def test_the_courses_in_between():
    linear, cosine = (
        Schedule(initial=1.0, final=3.0, begin=0.2, end=0.6, shape=shape) for shape in ("linear", "cosine")
    )
    assert [linear.value(at, 9.0) for at in (0.2, 0.3, 0.4, 0.6)] == pytest.approx([1.0, 1.5, 2.0, 3.0])
    assert [cosine.value(at, 9.0) for at in (0.2, 0.3, 0.4, 0.6)] == pytest.approx([1.0, 2 - 2**0.5 / 2, 2.0, 3.0])
    switched = Schedule(final=0.0, begin=0.5, end=0.5)
    assert [switched.value(at, 2.0) for at in (0.0, 0.49, 0.5, 1.0)] == [2.0, 2.0, 0.0, 0.0]


@given(schedules(), schedules(), FRACTIONS)
def test_stages_are_the_parts_of_training_with_the_same_terms(kd, tpa, progress):
    objective = Objective(kd=Kd(schedule={"weight": kd}), tpa=Tpa(schedule={"weight": tpa}), iva=Iva(weight=0.0))
    stages = objective.stages()
    assert sum(share for share, _ in stages) == pytest.approx(1.0)
    assert not any(stage.scheduled for _, stage in stages)
    sets = [stage.active for _, stage in stages]
    assert len(set(sets)) == len(sets)  # weights alone change no work, unless they are 0
    times = {0.0, 1.0, *(time for one in (kd, tpa) for time in (one.begin, one.end))}
    if progress not in times:
        assert objective.at_progress(progress).active in sets
    counted = [index / 1000 + 0.0005 for index in range(1000)]
    for share, stage in stages:
        seen = sum(objective.at_progress(one).active == stage.active for one in counted) / 1000
        assert seen == pytest.approx(share, abs=0.006)
    every = {objective.at_progress(one).active for one in objective.moments()}
    assert {objective.at_progress(one).active for one in (0.0, progress if progress < 1 else 0.0)} <= every


def test_without_a_schedule_the_objective_is_itself():
    objective = Objective(iva=Iva(layer=1))
    assert objective.at_progress(0.3) is objective
    assert [share for share, _ in objective.stages()] == [1.0]


def test_a_stage_counts_as_much_as_it_lasts():
    objective = Objective(iva=Iva(layer=1), tpa=Tpa(schedule={"weight": {"final": 0.0, "begin": 0.25, "end": 0.25}}))
    recipe = Recipe(**{**small.recipe(Path("nowhere")), "objective": objective})
    costs = {4: 10.0, 3: 2.0}
    of_each = of_stages(recipe, lambda of: costs[len(of.objective.active)])
    assert of_each == [10.0, 2.0] and mean_over(recipe, of_each) == 0.25 * 10 + 0.75 * 2


def test_another_option_than_a_weight_changes_the_work_too():
    jump = {"initial": 0.1, "final": 1.0, "begin": 0.2, "end": 0.2}
    stages = Objective(iva=Iva(layer=1, schedule={"share": jump})).stages()
    assert [(round(share, 9), stage.iva.share) for share, stage in stages] == [(0.2, 0.1), (0.8, 1.0)]


def test_a_weight_that_begins_at_0_changes_the_work_of_the_first_step():
    ramp = Objective(kd=Kd(schedule={"weight": {"initial": 0.0, "final": 1.0}}))
    assert ramp.changes_work
    assert len(ramp.stages()) == 1
    assert not Objective(kd=Kd(schedule={"weight": {"initial": 0.5, "final": 1.0}})).changes_work
    assert not Objective().changes_work


def test_the_cost_of_a_part_without_a_teacher_reads_no_teacher_cache():
    off = {"weight": {"final": 0.0, "begin": 0.5, "end": 0.5}}
    content = small.recipe(Path("nowhere"))
    content["data"] = {**content["data"], "teacher_cache": "cache"}
    recipe = Recipe(**{**content, "objective": Objective.only(sft=Sft(), kd=Kd(schedule=off))})
    caches: dict[tuple[str, ...], str | None] = {}

    def measured(of: Recipe) -> float:
        caches[of.objective.active] = of.data.teacher_cache
        return 1.0

    assert of_stages(recipe, measured) == [1.0, 1.0]
    assert caches == {("sft", "kd"): "cache", ("sft",): None}


def test_terms_with_schedules_are_equal_and_hash_as_their_options():
    one, two = (Kd(schedule={"weight": {"final": 0.5}}) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != Kd()


def test_a_term_of_ones_own_may_have_no_other_schedule():
    with pytest.raises(ConfigError, match="has an option named schedule, which every term has already"):

        class Mine(Term):
            name: ClassVar[str] = "mine_with_schedule"
            schedule: str = "often"


class Between(Term):
    """Two numbers of which one has to be the lower."""

    name: ClassVar[str] = "between"
    low: float = 0.0
    high: float | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _in_order(self) -> Between:
        if self.high != "auto" and self.low >= self.high:
            raise ValueError("low has to be below high")
        return self


def test_the_rules_of_a_term_of_ones_own_hold_for_both_ends():
    with pytest.raises(ConfigError, match=r"schedule\.low\.final is 2; accepted: low has to be below high"):
        Between(high=1.0, schedule={"low": {"final": 2.0}})
    with pytest.raises(ConfigError, match=r"schedule\.high is given, but high is 'auto'; set it to a number"):
        Between(schedule={"high": {"final": 2.0}})


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"schedule": {"heat": {"final": 0}}},
            r"schedule names 'heat'; accepted: the term's own real numbers \(weight, temperature\)",
        ),
        (
            {"schedule": {"divergence": {"final": 0}}},
            r"schedule names 'divergence'; accepted: the term's own real numbers",
        ),
        (
            {"schedule": {"weight": {"final": -1}}},
            r"schedule\.weight\.final is -1; accepted: greater than or equal to 0",
        ),
        (
            {"schedule": {"temperature": {"initial": 0, "final": 1}}},
            r"schedule\.temperature\.initial is 0; accepted: great",
        ),
        (
            {"schedule": {"weight": {"final": 0, "begin": 0.7, "end": 0.5}}},
            r"begin is 0\.7, after end, 0\.5; give a begin",
        ),
        ({"schedule": {"weight": {"begin": 0.5}}}, r"objective\.kd\.schedule\.weight\.final is missing"),
        ({"schedule": {"weight": {"finl": 0.5}}}, r"schedule\.weight\.finl is no known option; did you mean 'final'\?"),
        ({"schedule": {"weight": {"initial": 0, "final": 0}}}, r"by schedule\.weight the weight is 0 throughout; give"),
        ({"weight": 0, "schedule": {"weight": {"final": 1}}}, r"weight is 0, so the term is never computed; to begin"),
    ],
)
def test_what_a_schedule_cannot_be_is_said(term, message):
    with pytest.raises(ConfigError, match=message):
        Objective(kd=term)


def test_the_cutoff_of_a_draw_needs_a_value_of_its_own():
    with pytest.raises(ConfigError, match=r"schedule\.top_p is given, but top_p is None; set it to a number"):
        Objective(tpa={"schedule": {"top_p": {"final": 0.5}}})


def test_something_has_to_be_learned_at_every_step():
    off = {"weight": {"final": 0.0, "begin": 0.5, "end": 0.5}}
    with pytest.raises(ConfigError, match=r"every weight is 0 at 50% of training"):
        Objective.only(kd=Kd(schedule=off))
    with pytest.raises(ConfigError, match=r"every weight is 0 at 0% of training"):
        Objective.only(sft=Sft(schedule={"weight": {"initial": 0.0, "final": 1.0}}))
    assert Objective.only(sft=Sft(), kd=Kd(schedule=off)).at_progress(0.6).active == ("sft",)


def test_answers_of_the_student_need_a_teacher_throughout():
    content = small.recipe(Path("nowhere"))
    content["data"] = {**content["data"], "on_policy": {"probability": 0.5}}
    off = {"weight": {"final": 0.0, "begin": 0.8, "end": 0.8}}
    content["objective"] = Objective.only(sft=Sft(), kd=Kd(schedule=off))
    with pytest.raises(ConfigError, match=r"at 80% of training no term compares with a teacher"):
        Recipe(**content)


# --- in training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    return path


SWITCHED = Objective(
    sft=Sft(schedule={"weight": {"initial": 0.5, "final": 2.0}}),
    kd=Kd(schedule={"temperature": {"initial": 3.0, "final": 1.0, "end": 0.5}}),
    iva=Iva(layer=1, weight=0.5, schedule={"weight": {"initial": 0.0, "final": 0.5, "begin": 0.5, "end": 0.5}}),
    tpa=Tpa(source="gold", candidates=1, schedule={"weight": {"final": 0.0, "begin": 0.75, "end": 0.75}}),
)
"""Over four steps: IVA from the third, no TPA in the fourth; draws nothing."""


class Remembers(AlignTITrainer):
    """Keeps the batch of every call of the loss."""

    def loss_of(self, model, inputs, objective, *, training):
        self.batches = [*getattr(self, "batches", []), dict(inputs)]
        return super().loss_of(model, inputs, objective, training=training)


def run_of(
    folder: Path,
    out: Path,
    objective: Objective,
    accumulate: int = 1,
    *,
    logging_steps: int = 1,
    gradient_shares_every: int = 0,
) -> Remembers:
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=4,
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1e9,
        logging_steps=logging_steps,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        seed=3,
    )
    run = Remembers(
        model=load_model(str(folder / "student"), "float32"),
        teacher_model=load_model(str(folder / "teacher"), "float32"),
        args=args,
        objective=objective,
        train_dataset=read_conversations(folder / "train.json"),
        processing_class=load_processor(str(folder / "student")),
        gradient_shares_every=gradient_shares_every,
    )
    run.train()
    return run


def logged(run: AlignTITrainer) -> list[dict[str, float]]:
    return [line for line in run.state.log_history if "loss" in line]


def test_a_run_is_gradient_descent_on_the_objective_of_each_step(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", SWITCHED)
    student = load_model(str(folder / "student"), "float32").train()
    teacher = load_model(str(folder / "teacher"), "float32").eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    for step, (batch, line) in enumerate(zip(run.batches, logged(run), strict=True)):
        optimizer.zero_grad()
        made = distillation_loss(student, teacher, batch, SWITCHED.at_progress(step / 4), pairing=run.pairing)
        made.loss.backward()
        optimizer.step()
        assert {name: line[name] for name in made.terms} == pytest.approx(
            {name: float(value) for name, value in made.terms.items()}, rel=1e-4
        )
        assert line["loss"] == pytest.approx(float(made.loss), rel=1e-4)
        assert set(line) & {"sft", "kd", "iva", "tpa"} == set(made.terms)
    for name, value in student.state_dict().items():
        assert torch.allclose(value, run.model.state_dict()[name], atol=1e-6), name
    lines = logged(run)
    assert [line["sft_weight"] for line in lines] == pytest.approx([0.5, 0.875, 1.25, 1.625])
    assert [line["iva_weight"] for line in lines] == [0.0, 0.0, 0.5, 0.5]
    assert not run.weights_seen
    assert [line["tpa_weight"] for line in lines] == [1.0, 1.0, 1.0, 0.0]


def test_accumulation_changes_nothing(folder, tmp_path):
    one, two = (logged(run_of(folder, tmp_path / str(parts), SWITCHED, parts)) for parts in (1, 2))
    for whole, divided in zip(one, two, strict=True):
        assert {name: divided[name] for name in ("loss", "sft", "kd")} == pytest.approx(
            {name: whole[name] for name in ("loss", "sft", "kd")}, rel=1e-4
        )
        assert set(whole) == set(divided)


def test_a_constant_schedule_is_no_schedule(folder, tmp_path):
    plain = Objective(iva=Iva(layer=1, weight=0.5))
    still = Objective(iva=Iva(layer=1, weight=0.5, schedule={"weight": {"final": 0.5}}))
    one, other = (run_of(folder, tmp_path / name, of) for name, of in (("plain", plain), ("still", still)))
    assert [line["loss"] for line in logged(one)] == [line["loss"] for line in logged(other)]


def test_the_teacher_is_not_run_where_no_term_compares_with_it(folder, tmp_path):
    off = {"weight": {"final": 0.0, "begin": 0.5, "end": 0.5}}
    run = run_of(folder, tmp_path, Objective.only(sft=Sft(), kd=Kd(schedule=off)))
    calls: list[int] = []
    run.teacher_model.register_forward_hook(lambda *_: calls.append(run.state.global_step))
    run.teacher_model.model.register_forward_hook(lambda *_: calls.append(run.state.global_step))
    run.train()
    assert set(calls) == {0, 1}


def test_a_trainer_refuses_answers_of_the_student_that_nothing_compares(folder):
    off = {"weight": {"final": 0.0, "begin": 0.8, "end": 0.8}}
    student = load_model(str(folder / "student"), "float32")
    with pytest.raises(ConfigError, match=r"at 80% of training no term compares with a teacher"):
        AlignTITrainer(
            model=student,
            teacher_model=student,
            objective=Objective.only(sft=Sft(), kd=Kd(schedule=off)),
            on_policy=OnPolicy(),
        )


def test_between_two_logs_weight_times_value_is_the_part_of_the_loss(folder, tmp_path):
    run = run_of(folder, tmp_path, SWITCHED, logging_steps=4)
    steps = run_of(folder, tmp_path, SWITCHED)
    (line,) = logged(run)
    assert line["iva_weight"] == 0.25
    assert line["tpa_weight"] == 0.75
    every = logged(steps)
    assert line["loss"] == pytest.approx(sum(one["loss"] for one in every) / 4, rel=1e-4)
    for name in ("iva", "tpa"):
        part = sum(one[name] * one[f"{name}_weight"] for one in every if name in one) / 4
        assert line[name] * line[f"{name}_weight"] == pytest.approx(part, rel=0.05)


def test_the_gradient_has_no_share_of_a_term_without_weight(folder, tmp_path):
    run = run_of(folder, tmp_path, SWITCHED, gradient_shares_every=1)
    shares = [line for line in run.state.log_history if "sft_gradient_share" in line]
    assert [line["iva_gradient_share"] > 0 for line in shares] == [False, False, True, True]
    assert [line["tpa_gradient_share"] > 0 for line in shares] == [True, True, True, False]


def test_evaluation_uses_the_options_without_schedules(folder, tmp_path):
    run = run_of(folder, tmp_path, SWITCHED)
    metrics = run.evaluate(read_conversations(folder / "train.json"))
    weights = {"sft": 1.0, "kd": 1.0, "iva": 0.5, "tpa": 1.0}
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{name}"] * by for name, by in weights.items()))


def recipe(folder: Path, out: Path) -> Recipe:
    content = small.recipe(folder)
    training = {**content["training"], "max_steps": 4, "save_steps": 1, "logging_steps": 1}
    return Recipe(**{**content, "out": str(out), "objective": SWITCHED, "training": training})


def test_the_time_of_a_step_is_a_mean_and_unknown_after_a_stop(folder, tmp_path):
    recorder = RunRecorder(RunFolder(tmp_path / "run"))
    recorder.seconds = [9.0] * WARM_UP + [1.0, 1.0, 4.0]
    plain = SimpleNamespace(steps_differ=False, steps_change=False, seconds_before_step=0.0)
    changing = run_of(folder, tmp_path / "trainer", SWITCHED)
    for trainer, steps_before, expected in ((plain, 2, 1.0), (changing, 0, 2.0), (changing, 2, None)):
        recorder.attach(trainer)
        recorder.on_train_begin(changing.args, TrainerState(global_step=steps_before), TrainerControl())
        assert recorder.seconds_per_step == expected


def test_the_check_before_training_accepts_schedules(folder, tmp_path):
    checked = recipe(folder, tmp_path / "run").model_copy(update={"check": True})
    run = distil(checked)
    verdicts = {one["name"]: one["state"] for one in read_json(run.check)["verdicts"]}
    assert "fail" not in verdicts.values(), verdicts
    assert run.student.exists()
    assert "(scheduled, see the recipe)" in (run.student / "README.md").read_text(encoding="utf-8")


def test_a_stopped_run_goes_on_with_its_schedules(folder, tmp_path):
    def stop(step: int, steps: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole = distil(recipe(folder, tmp_path / "whole"))
    with pytest.raises(InterruptedRunError):
        distil(recipe(folder, tmp_path / "stopped"), steps=stop)
    again = distil(recipe(folder, tmp_path / "stopped"))
    names = ("step", "loss", "sft", "kd", "iva", "tpa", "kd_weight", "iva_weight", "tpa_weight")
    told = [
        [{key: line[key] for key in names if key in line} for line in run.read_metrics() if "loss" in line]
        for run in (whole, again)
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 4
    cost = read_json(whole.cost)
    assert cost["flops"] is None
    assert "schedule" in cost["flops_not_counted"]
