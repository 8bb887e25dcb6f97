"""How far one run is, from the files of its folder: recipe, provenance, metrics, and what went wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from pathlib import Path, PureWindowsPath
from statistics import fmean, median
from typing import Any, Literal

import yaml

from align_ti.report.progress import Bar, Row, Section, counted, duration, number
from align_ti.runs import GRADIENT_SHARE, RunFolder, owner_lives, read_lines

State = Literal["waiting", "preparing", "training", "stopped", "done"]

TROUBLES = 5
"""Lines of trouble that are shown."""

RECENT = 20
"""Lines of the log that the pace is taken from."""

PAUSE = 10
"""How many times longer than usual the time between two lines is where a run stood still in between."""

NOT_AMONG_OTHERS = {"step", "epoch", "loss", "time"}
"""Numbers of a line of training that have no row of their own, or one elsewhere."""

Line = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a run is.

    `lines` are the log's in the order in which they were written, numbers only; `pace` is the seconds that a step takes, measuring
    on the way included, and `left` the seconds to the last step; None where they are not known.
    """

    state: State
    lines: list[Line]
    recipe: Mapping[str, Any]
    records: int
    """Records of a step."""
    steps: int | None
    pace: float | None
    left: float | None
    age: float | None
    """Seconds since the last line of the log."""
    troubles: tuple[str, ...]
    phases: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The last step of the log."""
        return int(self.lines[-1]["step"]) if self.lines else 0


def run_progress(root: Path, now: float) -> RunProgress:
    """How far the run in a folder is. Files that are missing, or only begun, are as if nothing had been written yet.

    Args:
        root: the run folder.
        now: the time in seconds since 1970.
    """
    run = RunFolder(root)
    recipe, lines = content(run.recipe), numbers(read_lines(run.metrics))
    training = mapping(recipe.get("training"))
    processes = content(run.provenance).get("processes", 1)
    records = (
        processes * training.get("per_device_train_batch_size", 1) * training.get("gradient_accumulation_steps", 1)
    )
    state = state_of(run, recipe, lines)
    steps, pace = steps_of(training, lines), pace_of(lines)
    age = max(0.0, now - lines[-1]["time"]) if lines and "time" in lines[-1] else None
    left = None
    if steps is not None and pace is not None and age is not None and state == "training":
        left = max(0.0, pace * (steps - lines[-1]["step"]) - age)
    troubles = troubles_of(run, lines, state)
    return RunProgress(state, lines, recipe, records, steps, pace, left, age, troubles, content(run.phases))


def state_of(run: RunFolder, recipe: Mapping[str, Any], lines: Sequence[Line]) -> State:
    """What the run is doing."""
    if run.student.exists():
        return "done"
    if not recipe:
        return "waiting"
    if owner_lives(run.lock) is False:
        return "stopped"
    return "training" if lines else "preparing"


def steps_of(training: Mapping[str, Any], lines: Sequence[Line]) -> int | None:
    """The steps of the whole run; where the recipe counts passes over the data, those that the log's own say they make."""
    if training.get("max_steps", -1) > 0:
        return int(training["max_steps"])
    if not lines or not lines[-1].get("epoch"):
        return None
    passes: float = training.get("num_train_epochs", 1.0)
    return round(passes * lines[-1]["step"] / lines[-1]["epoch"])


def pace_of(lines: Sequence[Line]) -> float | None:
    """Seconds of a step over the last lines, measuring on the way included; the time in which a run stood still is left out."""
    found = [seconds for _, seconds in paces(lines)][-RECENT:]
    return fmean([one for one in found if one <= PAUSE * median(found)]) if found else None


def paces(lines: Sequence[Line]) -> list[tuple[int, float]]:
    """Seconds of a step between each two lines of training, with the step of the later one; a resumed run goes back in steps."""
    trained = [line for line in lines if "loss" in line and "time" in line]
    return [
        (int(later["step"]), (later["time"] - line["time"]) / (later["step"] - line["step"]))
        for line, later in pairwise(trained)
        if later["step"] > line["step"] and later["time"] > line["time"]
    ]


def troubles_of(run: RunFolder, lines: Sequence[Line], state: State) -> tuple[str, ...]:
    """The last things that went wrong: verdicts of the check, records that were skipped or cut, losses that are no numbers."""
    verdicts = content(run.check).get("verdicts", ())
    found = [
        f"check, {one['state']}: {one['name']}: {one['measured']}; {one['way_out']}"
        for one in verdicts
        if one["state"] != "pass"
    ]
    found += [
        f"{one.get('place')} was truncated from {one.get('tokens')} to {one.get('kept')} tokens"
        for one in read_lines(run.truncated)[-TROUBLES:]
    ]
    found += [f"skipped: {one.get('reason')}" for one in read_lines(run.skipped)[-TROUBLES:]]
    found += [
        f"step {line['step']}: {name} is {value}"
        for line in lines
        for name, value in line.items()
        if not isfinite(value)
    ]
    if state == "stopped":
        found.append(
            "the training process ended without a finished student; the same command resumes from the last checkpoint"
        )
    return tuple(found[-TROUBLES:])


# --- what is shown of it ----------------------------------------------------------------------------------------------


def bar(of: RunProgress, label: str) -> Bar:
    """The run's steps, with the pace and the time left."""
    note = [] if of.pace is None else [f"{of.pace:.3g} s / step"]
    note += [] if of.left is None else [f"{duration(of.left)} left"]
    note += [] if of.age is None else [f"last log entry {duration(of.age)} ago"]
    if of.state != "training":
        note = [of.state]
    done = of.steps if of.state == "done" and of.steps is not None else of.step
    return Bar(label, done, of.steps, ", ".join(note))


def sections(of: RunProgress, prefix: str = "") -> tuple[Section, ...]:
    """The tables of a run: terms, their shares in the gradient, training, held-out questions, phases; those of which nothing is known
    are left out."""
    trained = [line for line in of.lines if "loss" in line]
    found = [
        Section(f"{prefix}loss terms", ("unweighted", "weighted"), term_rows(trained)),
        Section(f"{prefix}share in the gradient norms", ("%", "step"), share_rows(of.lines)),
        Section(f"{prefix}training", ("last",), training_rows(of, trained)),
        Section(f"{prefix}held-out questions", ("last", "95 % CI", "step"), held_out_rows(of.lines)),
        Section(f"{prefix}step time", ("ms", "share"), phase_rows(of.phases)),
    ]
    return tuple(one for one in found if one.rows)


def term_names(lines: Sequence[Line]) -> list[str]:
    """The terms of a log: what has a weight beside it."""
    return list(dict.fromkeys(key.removesuffix("_weight") for line in lines for key in line if key.endswith("_weight")))


def term_rows(trained: Sequence[Line]) -> tuple[Row, ...]:
    """Each term, unweighted and weighted, with its unweighted values; the loss, which is the sum of the weighted ones."""
    if not trained:
        return ()
    last, rows = trained[-1], []
    for name in term_names(trained):
        value, weight = last.get(name), last.get(f"{name}_weight")
        weighted = None if value is None or weight is None else value * weight
        rows.append(Row(name, (number(value), number(weighted)), curve(trained, name)))
    return (*rows, Row("loss", ("", number(last["loss"])), curve(trained, "loss")))


def share_rows(lines: Sequence[Line]) -> tuple[Row, ...]:
    """Each term's share in the gradient at the last step that it was measured at."""
    rows = []
    for key in dict.fromkeys(key for line in lines for key in line if key.endswith(GRADIENT_SHARE)):
        last = next(line for line in reversed(lines) if key in line)
        rows.append(
            Row(key.removesuffix(GRADIENT_SHARE), (f"{100 * last[key]:.1f}", f"{last['step']:,}"), curve(lines, key))
        )
    return tuple(rows)


def training_rows(of: RunProgress, trained: Sequence[Line]) -> tuple[Row, ...]:
    """Learning rate, gradient norm, throughput, memory, and all else that the log has of training."""
    if not trained:
        return ()
    terms = term_names(trained)
    shown = {"learning_rate": "learning rate", "grad_norm": "gradient norm", "memory_mib": "memory, MiB"}
    named = {*shown, *terms, *(f"{term}_weight" for term in terms), *NOT_AMONG_OTHERS}
    others = dict.fromkeys(key for line in trained for key in line if key not in named)
    shown |= {key: key.replace("_", " ") for key in others}
    rows = [
        Row(title, (number(trained[-1].get(key)),), curve(trained, key))
        for key, title in shown.items()
        if any(key in line for line in trained)
    ]
    speed = [of.records / seconds for _, seconds in paces(of.lines)]
    return (*rows, *([Row("records / s", (number(speed[-1]),), tuple(speed))] if speed else []))


def held_out_rows(lines: Sequence[Line]) -> tuple[Row, ...]:
    """The learning curve on each benchmark that the student is asked on the way."""
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("task_"))
    rows = []
    for key in keys:
        if key.endswith(("_low", "_high")):
            continue
        last = next(line for line in reversed(lines) if key in line)
        low, high = last.get(f"{key}_low"), last.get(f"{key}_high")
        ends = "" if low is None or high is None else f"{number(low)} to {number(high)}"
        told = (number(last[key]), ends, f"{last['step']:,}")
        rows.append(Row(key.removeprefix("task_").replace("_", " "), told, curve(lines, key)))
    return tuple(rows)


def phase_rows(phases: Mapping[str, Any]) -> tuple[Row, ...]:
    """Where the time of a step went, if the run counted it; it is written at the end."""
    return tuple(
        Row(name, (f"{1000 * one['mean_seconds']:.1f}", f"{100 * one['share']:.0f} %"))
        for name, one in mapping(phases.get("phases")).items()
    )


def log_lines(of: RunProgress, prefix: str = "") -> list[str]:
    """One line for each line of the run's log."""
    speed = dict(paces(of.lines))
    terms = term_names(of.lines)
    told = []
    for line in of.lines:
        parts = [f"{prefix}step {line['step']:,}" + (f" of {of.steps:,}" if of.steps else "")]
        parts += [f"{key} {number(line[key])}" for key in ("loss", *terms, "learning_rate", "grad_norm") if key in line]
        if "loss" in line and int(line["step"]) in speed:
            parts.append(f"{of.records / speed[int(line['step'])]:.3g} records/s")
        parts += [
            f"{key} {number(value)}" + interval(line, key)
            for key, value in line.items()
            if key.startswith("task_") and not key.endswith(("_low", "_high"))
        ]
        parts += [f"{key} {number(value)}" for key, value in line.items() if key.endswith(GRADIENT_SHARE)]
        if len(parts) > 1:
            told.append("  ".join(parts))
    return told


def interval(line: Line, key: str) -> str:
    """The ends of a score's interval in brackets, if the line has them."""
    low, high = line.get(f"{key}_low"), line.get(f"{key}_high")
    return "" if low is None or high is None else f" ({number(low)} to {number(high)})"


def pair(recipe: Mapping[str, Any]) -> str:
    """Student and teacher by the last part of their paths."""
    names = [mapping(recipe.get(role)).get("path") for role in ("student", "teacher")]
    return " distilled from ".join(PureWindowsPath(str(name)).name for name in names if name)


def words(of: RunProgress, root: Path) -> str:
    """What the run is doing, in a sentence."""
    if of.state == "waiting":
        return f"waiting: no run has started in {root} yet"
    who = pair(of.recipe)
    if of.state == "done":
        return f"{who}: done after {counted(of.step, 'step')}; the student is in {RunFolder(root).student}"
    if of.state == "stopped" and of.lines:
        return f"{who}: stopped at step {of.step:,}"
    return f"{who}: {of.state}" + ("" if of.lines else ", no step is logged yet")


# --- files ------------------------------------------------------------------------------------------------------------


def curve(lines: Iterable[Line], key: str) -> tuple[float, ...]:
    """The values of a name by step; of a step logged twice the later one."""
    return tuple(value for _, value in sorted({line["step"]: line[key] for line in lines if key in line}.items()))


def numbers(lines: Iterable[Mapping[str, Any]]) -> list[Line]:
    """The numbers of each line that has a step."""
    kept = [
        {key: value for key, value in line.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        for line in lines
    ]
    return [line for line in kept if isinstance(line.get("step"), int)]


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, otherwise an empty one."""
    return value if isinstance(value, Mapping) else {}


def content(path: Path) -> Mapping[str, Any]:
    """What a JSON or YAML file holds; empty if it is missing, only begun, or no mapping. Read again only when it has changed."""
    try:
        stamp = path.stat()
    except OSError:
        return {}
    return read(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=512)
def read(path: Path, _changed: int, _size: int) -> Mapping[str, Any]:
    """`content` of a file as it was at a time."""
    try:
        # JSON is YAML too, but slow to read as such.
        text = path.read_text(encoding="utf-8")
        return mapping(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
