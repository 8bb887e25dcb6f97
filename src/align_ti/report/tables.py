"""What the tables of page, card and console have in common: names of measures, and numbers with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIDELITY = {
    "response_kl": "KL, response tokens",
    "top1_agreement": "top-1 agreement, response tokens",
    "visual_kl": "KL, visual tokens, weighted as in IVA",
    "transition_kl": "KL, next tokens after candidates, as in TPA",
    "own_kl": "KL, self-generated answers",
    "own_agreement": "top-1 agreement, self-generated answers",
}
"""The measures of fidelity to a teacher (docs/evaluation.md), in the order of tables, and what they are called there."""

PARTS = {
    "measure: answers": "evaluate: answers",
    "measure: divergence": "evaluate: divergence",
    "measure: benchmarks": "evaluate: benchmarks",
    "measure: inside": "evaluate: attention and next tokens",
}
"""The parts of a demo's wall time whose names in the summary are not those of tables."""


def figure(value: float, unit: str) -> str:
    """A score: per cent to a tenth, others to four decimals."""
    return f"{value:.1f}" if unit == "%" else f"{value:.4f}"


def bounds(of: Mapping[str, Any], unit: str) -> str:
    """The ends of an interval, or that it is unknown."""
    if of["low"] is None or of["high"] is None:
        return "unknown"
    return f"{figure(of['low'], unit)} to {figure(of['high'], unit)}"


def with_interval(of: Mapping[str, Any], unit: str) -> tuple[str, str]:
    """A score, and its interval as it stands beside it."""
    ends = bounds(of, unit)
    return figure(of["value"], unit), "interval unknown" if ends == "unknown" else ends


Cells = dict[str, tuple[str, str] | None]
"""A row's score and interval by model; None for a model that has no such score."""


def fidelity_rows(summary: Mapping[str, Any]) -> dict[str, Cells]:
    """The measures of fidelity that a run has, by their names for people with the unit."""
    measured: Mapping[str, Mapping[str, Mapping[str, Any]]] = summary.get("fidelity", {})
    rows: dict[str, Cells] = {}
    for key, title in FIDELITY.items():
        found = {name: measures[key] for name, measures in measured.items() if key in measures}
        if found:
            unit = next(iter(found.values()))["unit"]
            cells = {name: with_interval(one, unit) for name, one in found.items()}
            rows[f"{title} ({unit})"] = {name: cells.get(name) for name in measured}
    return rows


def benchmark_rows(benchmarks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[Mapping[str, Any], Cells]]:
    """The benchmarks that any model was measured on: what the first says of each (`title`, `metric`), and all scores to a tenth."""
    rows: list[tuple[Mapping[str, Any], Cells]] = []
    for task in dict.fromkeys(task for scores in benchmarks.values() for task in scores):
        found = {name: scores[task] for name, scores in benchmarks.items() if task in scores}
        cells = {name: with_interval(one, "%") for name, one in found.items()}
        rows.append((next(iter(found.values())), {name: cells.get(name) for name in benchmarks}))
    return rows
