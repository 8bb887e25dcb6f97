"""The tables of docs/quality.md, from `results/quality/STUDY/study.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent.parent / "results" / "quality"


def study(name: str) -> Any:
    """What a study came to."""
    return json.loads((RESULTS / name / "study.json").read_text(encoding="utf-8"))


def between(value: float | None, low: float | None, high: float | None, form: str = ".1f") -> str:
    """A number with its interval; no number stands without one."""
    if value is None or low is None or high is None:
        return "-"
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def rows(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body])


def variants(name: str, chosen: Sequence[str] | None = None) -> str:
    """Accuracy, cost and the gap closed, a row for each variant, or for the chosen ones."""
    content = study(name)
    body = []
    for key, one in content["variants"].items():
        if chosen is not None and key not in chosen:
            continue
        accuracy, gap = one["accuracy"], one["gap_closed_interval"]
        closed = "-" if gap is None or key == content["gap_from"] else between(one["gap_closed"], gap[0], gap[1])
        body.append(
            [
                content["labels"][key],
                between(accuracy["mean"], accuracy["low"], accuracy["high"]),
                str(len(one["per_seed"])),
                f"{one['steps']:,}",
                f"{one['seconds']:,.0f}",
                f"{one['flops'] / 1e12:.1f}",
                closed,
            ]
        )
    return rows(["", "accuracy, %", "seeds", "steps", "s", "TFLOP", "gap closed, %"], body)


def differences(name: str) -> str:
    """The pairs' differences with both intervals."""
    content = study(name)
    return rows(
        ["", "points", "corrected interval", "relative, %", "corrected p"],
        [
            [
                f"{content['labels'][one['of']]} - {content['labels'][one['to']]}",
                between(one["mean"], one["low"], one["high"], "+.1f"),
                "-" if one["corrected_low"] is None else f"{one['corrected_low']:+.1f} to {one['corrected_high']:+.1f}",
                "-" if one["relative"] is None else f"{one['relative']:+.1f}",
                f"{one['corrected_p']:.2g}",
            ]
            for one in content["differences"]
        ],
    )


def metrics(name: str, benchmark: str, chosen: Sequence[str] | None = None) -> str:
    """Every metric of a benchmark: the mean of each variant, or of the chosen ones, with its interval, which is not corrected."""
    content = study(name)
    names = list(content["variants"] if chosen is None else chosen)
    found = [row for row in content["metrics"] if row["benchmark"] == benchmark]
    body = []
    for row in found:
        form = ".1f" if row["unit"] == "%" else ".3f"
        cells = [row["variants"].get(key) for key in names]
        told = ["-" if one is None else between(one["mean"], one["low"], one["high"], form) for one in cells]
        body.append([f"{row['metric']}, {row['unit']}", *told])
    return rows(["", *(content["labels"][key] for key in names)], body)


def times(name: str) -> str:
    """Time to quality, a row for each pair."""
    content = study(name)
    return rows(
        ["", "seeds that reached it", "share of the other's time"],
        [
            [
                f"{content['labels'][one['of']]} to the best of {content['labels'][one['to']]}",
                f"{one['reached']} of {one['seeds']}",
                between(one["share"], one["share_low"], one["share_high"], ".2f"),
            ]
            for one in content["time_to_quality"]
        ],
    )
