"""What a study will take: runs, time, disk. Nothing is trained but the steps that measure costs, after `cost_after` others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from align_ti.config import Student
from align_ti.runs import read_json
from align_ti.studies.costs import Advance, Cost, measured_costs, steps_to_measure, unmeasured
from align_ti.studies.design import Study
from align_ti.studies.folder import StudyFolder

COPIES = 3
"""A checkpoint beside a student's weights: AdamW's two moments and the weights, in 32 bits."""

RECORD = 60_000
"""Bytes of a record, about: scores of a few hundred clusters, curve and versions."""


@dataclass(frozen=True, slots=True)
class PlannedVariant:
    """One variant of a plan."""

    runs: int
    done: int
    """Runs that have a record, failed ones among them, and those that a folder of `records_from` has made."""
    cost: Cost


@dataclass(frozen=True, slots=True)
class Planned:
    """What a study will take."""

    rows: Mapping[str, PlannedVariant]
    left: int
    seconds: float
    """Of training, one run after the other."""
    cost_steps: int
    """Steps that each variant is trained for to measure its cost, at most, those of `cost_after` among them."""
    cost_seconds: float
    """Seconds of these steps for all variants; they are spent once per study, by the first plan or run."""
    around: float | None
    """Seconds of loading and measuring a run takes beside training, from the records that are there; None before the first."""
    working: int
    """Bytes of one run under way."""
    kept: int
    """Bytes at the end."""

    @property
    def measuring(self) -> str:
        """What comes on top of training, in words."""
        if self.around is None:
            return ", without loading and evaluation"
        return f", and about {self.around * self.left / 60:.0f} min of loading and evaluation"


def planned(study: Study, advance: Advance) -> Planned:
    """The study's runs with what they will take; costs that are not known are measured, and kept in the folder.

    Raises:
        RunError: the folder holds another study, the budget is less than one step of a variant, or a record is damaged.
    """
    folder = StudyFolder(study.out)
    folder.checked(study)
    if unmeasured(study, folder):
        with folder.alone("study", waiting=lambda: advance("wait: another process measures costs", 0, 1)):
            costs = measured_costs(study, folder, advance)
    else:
        costs = measured_costs(study, folder, advance)
    records = folder.records(study)
    made = {
        name: sum(
            seed in records[name] or folder.made_elsewhere(study, name, seed, costs[name].steps) is not None
            for seed in study.file.seeds
        )
        for name in study.variants
    }
    rows = {name: PlannedVariant(len(study.file.seeds), made[name], costs[name]) for name in study.variants}
    left = {name: row.runs - row.done for name, row in rows.items()}
    done = [read_json(folder.record(name, seed)) for name in records for seed in records[name]]
    # A run that was stopped has the time on the clock since it went on.
    around = [max(0.0, one["wall_seconds"] - one["seconds"]) for one in done if not one["error"]]
    weights = {name: student_bytes(study.first(name).student) for name in study.variants}
    copies = {name: 1 + COPIES * (1 + study.first(name).training.save_total_limit) for name in study.variants}
    return Planned(
        rows=rows,
        left=sum(left.values()),
        seconds=sum(left[name] * row.cost.steps * row.cost.seconds_per_step for name, row in rows.items()),
        cost_steps=max(steps_to_measure(study, name) for name in costs),
        cost_seconds=sum(steps_to_measure(study, name) * cost.seconds_per_step for name, cost in costs.items()),
        around=sum(around) / len(around) if around else None,
        working=max(weights[name] * copies[name] for name in study.variants),
        kept=RECORD * sum(row.runs for row in rows.values())
        + (sum(weights[name] * row.runs for name, row in rows.items()) if study.file.keep_students else 0),
    )


def student_bytes(student: Student) -> int:
    """Bytes of a student's weights in the precision in which it is trained and saved; 0 if its folder is not at hand."""
    files = list(Path(student.path).glob("*.safetensors"))
    each = {"float32": 4, "bfloat16": 2, "float16": 2}.get(student.dtype)
    if each is None:
        return sum(file.stat().st_size for file in files)
    total = 0
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                names = weights.keys()  # an iterator of names; it is no mapping
                total += sum(each * prod(weights.get_slice(name).get_shape()) for name in names)
        except SafetensorError:
            continue  # no weights, such as the pointer of a file that was not fetched; the run says so
    return total
