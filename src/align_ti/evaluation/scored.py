"""Predictions in a file -> scores with intervals: the second step of an evaluation, whoever made the predictions. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from align_ti.evaluation.benchmarks import PAPER
from align_ti.evaluation.benchmarks.base import Benchmark, Item, Report
from align_ti.evaluation.predictions import questions_digest, read_predictions
from align_ti.evaluation.results import scored


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of one file of predictions."""

    benchmark: Benchmark
    report: Report
    content: Mapping[str, Any]
    """What a file of scores holds (`align_ti.evaluation.results.scored`)."""
    questions: int

    @property
    def told(self) -> dict[str, Any]:
        """What a table says of it: `title`, `metric`, `value`, `low`, `high` (None where unknown), `unit`, `questions`, `notes`."""
        about = {"title": self.benchmark.title, "metric": self.report.headline, "questions": self.questions}
        ends = {name: self.headline[name] for name in ("value", "low", "high", "unit")}
        return {**about, **ends, "notes": list(self.report.notes)}

    @property
    def headline(self) -> Mapping[str, Any]:
        """The score that tables show: value, low, high, unit; an end that is unknown is None."""
        told: Mapping[str, Any] = self.content["metrics"][self.report.headline]
        return told


def score_file(path: Path, benchmark: Benchmark, items: Sequence[Item], *, strict_original: bool = False) -> Scored:
    """The scores of the predictions in a file.

    Args:
        path: predictions of ours or of another tool (`align_ti.evaluation.predictions.read_predictions`).
        benchmark: the benchmark that they are on.
        items: all of its questions.
        strict_original: score as the original script does, defects included.

    Raises:
        DataError: the file does not fit the benchmark.
    """
    read = read_predictions(path, items, benchmark.name)
    report = benchmark.score(read.items, read.texts, strict_original=strict_original)
    notes = list(report.notes)
    if strict_original:
        notes.append("Scored strictly as the original script does, its defects included.")
    if len(read.items) < len(items):
        notes.append(f"{len(read.items)} of {len(items)} questions were used (--limit).")
    if read.cut:
        notes.append(f"{read.cut} answers were truncated at the token limit.")
    report = Report(report.metrics, report.headline, report.right, tuple(notes))
    model = path.stem if read.about is None else read.about.model
    content = scored(benchmark.name, report, model, asked_and_scored(read.items, strict_original), benchmark.title)
    return Scored(benchmark, report, content, len(read.items))


def asked_and_scored(items: Sequence[Item], strict_original: bool) -> str:
    """A digest of what was asked, of the right answers, and of the way of scoring: only scores that share it are compared."""
    told = [questions_digest(items), [item.reference for item in items], strict_original]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def mean_of_six(found: Mapping[str, Mapping[str, Any]]) -> tuple[float, float, float] | None:
    """The mean of the paper's six columns with its 95 % interval, from what `Scored.told` says; None unless all six are there.

    The benchmarks' questions are different ones, so the distances from the scores to their intervals' ends add up in squares. An end
    that is unknown leaves the mean's unknown (NaN).
    """
    if any(name not in found for name in PAPER):
        return None
    told = [found[name] for name in PAPER]
    mean = sum(one["value"] for one in told) / len(PAPER)
    ends = []
    for end in ("low", "high"):
        apart = [float("nan") if one[end] is None else one[end] - one["value"] for one in told]
        ends.append(sqrt(sum(one**2 for one in apart)) / len(PAPER))
    return mean, mean - ends[0], mean + ends[1]
