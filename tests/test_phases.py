"""Where time goes: exclusive times add up, nothing happens without a stopwatch, and a run tells every phase of its objective."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from align_ti.cli.tables import show_phases, show_spent
from align_ti.config import Recipe
from align_ti.models.families import tower
from align_ti.phases import OTHER, Stopwatch, part, phase, settled_clock
from align_ti.pipeline.training import distil
from align_ti.report.page import write_report
from align_ti.runs import RunFolder
from align_ti.training.watch import STEP, WARM_UP, StepPhases
from tests import small
from tests.test_report import run_folder


class Clock:
    """Tells what it was set to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_an_outer_phase_does_not_count_what_is_inside_it():
    clock = Clock()
    stopwatch = Stopwatch(clock)
    with stopwatch.running():
        clock.work(1)
        with phase("outer"):
            clock.work(2)
            with phase("inner"):
                clock.work(4)
                with phase("outer"):
                    clock.work(8)
            clock.work(16)
        clock.work(32)
    assert stopwatch.seconds == {OTHER: 33, "outer": 26, "inner": 4}
    lap = stopwatch.lap()
    assert lap.seconds == sum(lap.phases.values()) == 63
    assert stopwatch.seconds == {}


def test_a_lap_taken_inside_a_phase_cuts_it_in_two():
    clock = Clock()
    stopwatch = Stopwatch(clock)
    with stopwatch.phase("long"):
        clock.work(3)
        assert stopwatch.lap().phases == {"long": 3}
        clock.work(5)
        assert stopwatch.so_far() == {"long": 5}
    assert stopwatch.lap().seconds == 5


def test_without_a_stopwatch_nothing_is_recorded_and_nothing_fails():
    clock = Clock()
    stopwatch = Stopwatch(clock)
    with stopwatch.running():
        clock.work(1)
    with phase("a"), part("b"):
        clock.work(2)
    assert stopwatch.seconds == {OTHER: 1}
    # One object for all, so that a phase costs no more than looking for a stopwatch.
    assert phase("a") is part("b")


def test_steps_and_runs_are_told_apart():
    clock = Clock()
    run, step = Stopwatch(clock, of="run"), Stopwatch(clock)
    with run.running(), part("train"):
        with phase("forward"):
            clock.work(1)
        with step.running(), phase("forward"), part("load models"):
            clock.work(2)
        clock.work(4)
    assert run.seconds == {OTHER: 0, "train": 7}
    assert step.seconds == {OTHER: 0, "forward": 2}


def test_an_error_ends_the_phases_that_it_leaves():
    clock = Clock()
    stopwatch = Stopwatch(clock)

    def fails() -> None:
        with phase("outer"):
            clock.work(1)
            # As the trainer does between two callbacks: nothing closes it when a step stops half-way.
            stopwatch.enter("left open")
            with phase("inner"):
                clock.work(2)
                raise KeyError

    with stopwatch.running():
        with pytest.raises(KeyError):
            fails()
        clock.work(4)
    assert stopwatch.seconds == {OTHER: 4, "outer": 1, "left open": 0, "inner": 2}
    with phase("later"):
        clock.work(8)
    assert "later" not in stopwatch.seconds


def test_another_thread_has_no_part_in_it():
    clock = Clock()
    stopwatch = Stopwatch(clock)

    def elsewhere() -> None:
        with phase("elsewhere"):
            clock.work(1)

    with stopwatch.running():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert stopwatch.seconds == {OTHER: 1}


def test_the_clock_waits_for_accelerators_alone(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    devices = [torch.device(name) for name in ("cpu", "cuda:0", "meta", "cuda:1", "cuda:0")]
    clock = settled_clock(devices)
    assert clock() <= clock()
    assert sorted(map(str, waited)) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    waited.clear()
    settled_clock([torch.device("cpu")])()
    assert not waited


# --- a run ------------------------------------------------------------------------------------------------------------

STEPS = WARM_UP + 2
EVERY = {"data", "vision", "student forward", "divergence", "backward", "optimizer", "other"}
NO_TPA = {"iva": {"weight": 0.0}, "tpa": {"weight": 0.0}}
OBJECTIVES = {
    "sft": ({"kd": {"weight": 0.0}, **NO_TPA}, EVERY),
    "kd": (NO_TPA, EVERY | {"teacher forward"}),
    "reuse": (
        {"iva": {"layer": 1}, "tpa": {"form": "reuse"}},
        EVERY | {"teacher forward", "capture", "candidates", "student second pass", "teacher second pass"},
    ),
    # Gold tokens and candidates are read in one pass.
    "packed": (
        {"iva": {"layer": 1}, "tpa": {"form": "packed"}},
        EVERY | {"teacher forward", "capture", "candidates"},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    return path


def trained(folder: Path, out: Path, objective: str, accumulate: int, *, phases: bool, steps: int = STEPS) -> RunFolder:
    training = {
        "max_steps": steps,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulate,
        "logging_steps": 1,
        "save_steps": 3,
        "phases": phases,
    }
    content = small.recipe(folder, out=str(out), training=training, objective=OBJECTIVES[objective][0])
    return distil(Recipe.model_validate(content))


@pytest.mark.parametrize(
    ("objective", "accumulate"), [("sft", 1), ("kd", 1), ("reuse", 1), ("reuse", 2), ("packed", 1), ("packed", 2)]
)
def test_a_run_tells_every_phase_of_its_objective(folder, tmp_path, objective, accumulate):
    watched = trained(folder, tmp_path / "watched", objective, accumulate, phases=True)
    told = json.loads(watched.phases.read_text())
    assert (told["steps"], told["steps_left_out"]) == (STEPS - WARM_UP, WARM_UP)
    assert told["phases"].keys() == OBJECTIVES[objective][1]
    assert list(told["phases"]) == [name for name in STEP if name in told["phases"]]
    rounding = 1e-6 * len(STEP)
    mean = sum(one["mean_seconds"] for one in told["phases"].values())
    assert mean == pytest.approx(told["step"]["mean_seconds"], abs=rounding)
    assert sum(one["share"] for one in told["phases"].values()) == pytest.approx(1, abs=rounding)
    assert all(one["mean_seconds"] > 0 for one in told["phases"].values())

    plain = trained(folder, tmp_path / "plain", objective, accumulate, phases=False)
    assert not plain.phases.exists()
    of_the_machine = {"time", "memory_mib"}
    logs = [
        [{name: value for name, value in line.items() if name not in of_the_machine} for line in run.read_metrics()]
        for run in (watched, plain)
    ]
    assert len(logs[0]) == STEPS
    # To the last digit, gradient norms included.
    assert logs[0] == logs[1]


def test_too_few_steps_are_told_and_nothing_is_written(folder, tmp_path, caplog):
    run = trained(folder, tmp_path / "run", "sft", 1, phases=True, steps=WARM_UP)
    assert not run.phases.exists()
    assert f"only {WARM_UP} step(s)" in caplog.text


def test_models_are_left_as_they_were(folder):
    from align_ti.models.loading import load_model

    model = load_model(str(folder / "student"), "float32")
    vision = tower(model)
    assert vision is not None
    phases = StepPhases()
    with phases.running([model, model]):
        assert "forward" in vision.__dict__
    assert "forward" not in vision.__dict__
    with phase("data"):
        pass
    assert phases.stopwatch.seconds.keys() == {OTHER}


def test_what_lies_between_two_steps_belongs_to_none(folder, tmp_path):
    from align_ti.models.loading import load_model

    clock = Clock()
    phases = StepPhases(clock)
    ignored = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    with phases.running([load_model(str(folder / "student"), "float32")]):
        for _ in range(WARM_UP + 3):
            clock.work(1000)  # the log, a checkpoint, an evaluation
            phases.begin_step()
            with phase("data"):
                clock.work(1)
            phases.on_step_begin(*ignored)
            with phase("backward"):
                clock.work(2)
                with phase(OTHER):
                    clock.work(4)
            clock.work(8)
            phases.on_step_end(*ignored)
    told = phases.summary()
    assert told["steps"] == 3
    assert told["step"] == {"median_seconds": 15, "mean_seconds": 15}
    seconds = {name: one["median_seconds"] for name, one in told["phases"].items()}
    assert seconds == {"data": 1, "backward": 2, "optimizer": 8, OTHER: 4}
    assert told["phases"]["optimizer"]["share"] == pytest.approx(8 / 15, abs=1e-6)


# --- the page ---------------------------------------------------------------------------------------------------------


def told(*names: str) -> dict[str, object]:
    each = {"median_seconds": 0.0215, "mean_seconds": 0.0225, "share": 1 / len(names)}
    return {
        "steps": 17,
        "steps_left_out": 5,
        "step": {"median_seconds": 0.1, "mean_seconds": 0.0225 * len(names)},
        "phases": dict.fromkeys(names, each),
    }


def test_the_page_shows_phases_escaped_as_table_and_chart(tmp_path):
    root = run_folder(tmp_path)
    before = write_report(root).read_text()
    assert "Step time by phase" not in before
    (root / "align_ti" / "phases.json").write_text(json.dumps(told("data", "<b>vision</b>", "a&b")))
    page = write_report(root).read_text()
    assert page.count("<svg") == before.count("<svg") + 1
    assert "Step time by phase" in page
    assert "&lt;b&gt;vision&lt;/b&gt;" in page and "<b>" not in page
    assert "<td>21.50</td><td>22.50</td><td>33.3&nbsp;%</td>" in page
    assert "<td>100.00</td><td>67.50</td><td>100&nbsp;%</td>" in page
    assert "Align-TI &lt;b&gt; 17, excluding the first 5" in page


def test_the_page_shows_what_a_demo_spent(tmp_path):
    spent = {"draw the <i>": 3.0, "write the report": 5.0, "other": 1.0}
    page = write_report(run_folder(tmp_path, spent_seconds=spent)).read_text()
    assert "<td>draw the &lt;i&gt;</td><td>3.0</td><td>75.0&nbsp;%</td>" in page
    assert "write the report" not in page
    assert "Wall time of the demo" not in write_report(run_folder(tmp_path)).read_text()


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_prints_phases_in_the_order_of_the_fullest_run(tmp_path, capsys):
    runs = {"SFT [b]": ("data", "other"), "Align-TI": ("data", "capture", "other"), "none": ()}
    for name, names in runs.items():
        (tmp_path / name).mkdir()
        if names:
            (tmp_path / name / "phases.json").write_text(json.dumps(told(*names)))
    show_phases({name: RunFolder(tmp_path / name) for name in runs})
    lines = capsys.readouterr().out.splitlines()
    assert "mean of 17 steps" in lines[-1]
    assert any("SFT [b]" in line and "Align-TI" in line for line in lines)
    rows = [line.strip("│ ").split() for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == ["data", "capture", "other", "step"]
    assert [cell for cell in rows[1] if cell != "│"] == ["capture", "-", "-", "22.50", "33.3"]
    assert [cell for cell in rows[3] if cell != "│"] == ["step", "45.00", "100.0", "67.50", "100.0"]


def test_the_command_line_prints_nothing_where_no_phases_were_counted(tmp_path, capsys):
    show_phases({"student": RunFolder(tmp_path)})
    assert capsys.readouterr().out == ""


def test_the_command_line_adds_up_what_a_demo_spent(capsys):
    show_spent({"train: SFT": 30.0, "other": 10.0})
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("train: SFT", "30.0", "75.0", "40.0"))
