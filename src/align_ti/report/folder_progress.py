"""How far the work in a folder is: one run, the three of a demo, or those of a study; from its files only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from align_ti.errors import RunError
from align_ti.report.progress import Bar, Progress, Row, Section, counted, duration
from align_ti.report.run_progress import (
    TROUBLES,
    RunProgress,
    bar,
    content,
    log_lines,
    mapping,
    run_progress,
    sections,
    words,
)

METHODS = {"sft": "SFT", "kd": "SFT + vanilla KD", "align_ti": "Align-TI"}
"""The runs of a demo by their folders, in the order in which they are trained."""


def progress(root: Path, now: float) -> Progress:
    """How far the work in a folder is; a folder that is not there yet is waited for.

    Args:
        root: the folder of a run, a demo or a study.
        now: the time in seconds since 1970.

    Raises:
        RunError: it is a file.
    """
    if root.exists() and not root.is_dir():
        raise RunError(f"{root} is a file; the folder of a run, a demo or a study is accepted; name that.")
    if (root / "study.yaml").exists():
        return of_study(root, now)
    if (root / "demo.json").exists():
        return of_demo(root, now)
    run = run_progress(root, now)
    bars = () if run.state == "waiting" else (bar(run, "steps"),)
    state, done = words(run, root), run.state == "done"
    return Progress(str(root), state, done, bars, sections(run), run.troubles, tuple(log_lines(run)))


# --- a demo -----------------------------------------------------------------------------------------------------------


def of_demo(root: Path, now: float) -> Progress:
    """A demo: its three runs, and the accuracy of every model that is measured already."""
    runs = {name: run_progress(root / name, now) for name in METHODS}
    begun = [name for name, run in runs.items() if run.state != "waiting"]
    done = (root / "report.html").exists() and all(run.state == "done" for run in runs.values())
    state = "preparing: images are drawn, teacher and student are evaluated, the teacher's layers are scored"
    shown: tuple[Section, ...] = ()
    if begun:
        last = begun[-1]
        trained = runs[last].state == "done"
        state = f"{METHODS[last]}: " + ("trained; evaluation is next" if trained else runs[last].state)
        shown = sections(runs[last], f"{METHODS[last]}: ")
    if done:
        state = f"done; the report is in {root / 'report.html'}"
    return Progress(
        str(root),
        state,
        done,
        tuple(bar(run, METHODS[name]) for name, run in runs.items()),
        (*measured(root), *shown),
        tuple(f"{METHODS[name]}: {one}" for name, run in runs.items() for one in run.troubles)[-TROUBLES:],
        tuple(line for name, run in runs.items() for line in log_lines(run, f"{METHODS[name]}: ")),
    )


def measured(root: Path) -> tuple[Section, ...]:
    """The accuracy of each model of a demo that has been measured."""
    rows = []
    for name, label in {"teacher": "teacher", "start": "student before training", **METHODS}.items():
        score = mapping(mapping(content(root / f"evaluation-{name}.json").get("accuracy")).get("overall"))
        if score:
            rows.append(Row(label, (f"{score['per_cent']:.1f}", f"{score['low']:.1f} to {score['high']:.1f}")))
    return (Section("exact match", ("%", "95 % CI"), tuple(rows)),) if rows else ()


# --- a study ----------------------------------------------------------------------------------------------------------


def of_study(root: Path, now: float) -> Progress:
    """A study: runs done, under way and left, the score of each variant so far, and the runs under way in full."""
    study, costs = content(root / "study.yaml"), content(root / "costs.json")
    labels = {name: mapping(study.get("labels")).get(name, name) for name in mapping(study.get("recipes"))}
    every = [(name, seed) for name in labels for seed in study.get("seeds", ())]
    records = {run: content(root / "records" / run[0] / f"{run[1]}.json") for run in every}
    finished = {run: record for run, record in records.items() if record}
    left = [run for run in every if run not in finished]
    working = {
        run: run_progress(root / "work" / run[0] / str(run[1]) / "run", now)
        for run in left
        if (root / "work" / run[0] / str(run[1]) / "run").exists()
    }
    active = {run: one for run, one in working.items() if one.state not in ("waiting", "stopped")}
    failed = {run: record for run, record in finished.items() if record.get("error")}
    called = {run: f"{labels[run[0]]}, seed {run[1]}" for run in every}
    seconds = [seconds_of(run, active.get(run), study, costs, finished) for run in left]
    known = [one for one in seconds if one is not None]
    note = ""
    if left and len(known) == len(seconds) and active:
        note = f"about {duration(sum(known) / len(active))} left"
    counts = {"done": len(finished) - len(failed), "failed": len(failed), "running": len(active)}
    counts["remaining"] = len(left) - len(active)
    state = f"{counted(len(every), 'run')}: " + ", ".join(
        f"{number} {what}" for what, number in counts.items() if number
    )
    if not left:
        state += f"; the page is {root / 'study.html'}" + ("; --retry goes on with failed runs" if failed else "")
    elif not active:
        state += "; no run is active: the same `align-ti study` command resumes"
    troubles = [f"{called[run]} failed: {record['error']}" for run, record in failed.items()]
    troubles += [f"{called[run]}: {one}" for run, under_way in working.items() for one in under_way.troubles]
    return Progress(
        str(root),
        state,
        not left,
        (Bar("runs", len(finished), len(every), note), *(bar(run, called[key]) for key, run in working.items())),
        (
            variants(study, labels, finished, set(active)),
            *(section for key, run in active.items() for section in sections(run, f"{called[key]}: ")),
        ),
        tuple(troubles[-TROUBLES:]),
        (
            *(f"{called[run]}: {outcome(record, study)}" for run, record in finished.items()),
            *(line for key, run in active.items() for line in log_lines(run, f"{called[key]}: ")),
        ),
    )


Run = tuple[str, int]
"""A run of a study: its variant and its seed."""


def variants(
    study: Mapping[str, Any], labels: Mapping[str, str], finished: Mapping[Run, Mapping[str, Any]], active: set[Run]
) -> Section:
    """Each variant with its runs and their scores."""
    rows, seeds = [], study.get("seeds", ())
    for name, label in labels.items():
        told = [outcome(finished[name, seed], study) for seed in seeds if (name, seed) in finished]
        under_way = sum((name, seed) in active for seed in seeds)
        runs = f"{len(told)} of {len(seeds)}" + (f", {under_way} running" if under_way else "")
        rows.append(Row(label, (runs, "; ".join(told))))
    return Section("variants", ("runs", "scores"), tuple(rows))


def outcome(record: Mapping[str, Any], study: Mapping[str, Any]) -> str:
    """The headline of a finished run in words, or that it failed."""
    if record.get("error"):
        return "failed"
    scores = mapping(record.get("scores"))
    one = mapping(scores.get(study.get("score") or next(iter(scores), "")))
    head = mapping(mapping(one.get("metrics")).get(str(one.get("headline"))))
    return f"{head['value']:.1f} {head.get('unit', '')}".strip() if head else "done"


def seconds_of(
    run: Run,
    active: RunProgress | None,
    study: Mapping[str, Any],
    costs: Mapping[str, Any],
    finished: Mapping[Run, Mapping[str, Any]],
) -> float | None:
    """Seconds that a run will still take; None where nothing tells.

    As long as those of its variant took that are done, loading and measuring included; before the first, as long as its steps.
    """
    took = [one["wall_seconds"] for (name, _), one in finished.items() if name == run[0] and one.get("wall_seconds")]
    if active is not None and active.left is not None:
        beyond = [one["wall_seconds"] - one["seconds"] for one in finished.values() if one.get("seconds")]
        return active.left + max(0.0, median(beyond) if beyond else 0.0)
    return median(took) if took else training_seconds(run[0], study, costs)


def training_seconds(name: str, study: Mapping[str, Any], costs: Mapping[str, Any]) -> float | None:
    """Seconds of a run's training by the measured cost of a step: of its own steps, or of those that the budget comes to."""
    by = {"time": "seconds_per_step", "flops": "flops_per_step"}.get(study.get("equal", ""))
    budget = name if by is None else str(study.get("budget"))
    recipe = mapping(mapping(study.get("recipes")).get(budget))
    steps = mapping(recipe.get("training")).get("max_steps", -1)
    own, theirs = mapping(costs.get(name)), mapping(costs.get(budget))
    if steps < 1 or not own or not theirs:
        return None
    if by is not None:
        steps = steps * theirs[by] / own[by]
    return float(steps * own["seconds_per_step"])
