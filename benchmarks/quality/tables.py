"""The tables of docs/quality.md and docs/quality-studies.md, from `results/quality/STUDY/study.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent.parent / "results" / "quality"

SUMMARY = (
    ("AdamW, 1,200 steps", "ablation", ""),
    ("AdamW, 10,000 images", "images", ""),
    ("AdamW, 1,600 steps", "demo", ""),
    ("AdamW, 4,800 steps", "long", ""),
    ("AdamW, equal time", "equal-time", ""),
    ("Muon, 1,200 steps", "muon", ""),
    ("Muon, 250 images", "labels", "_few"),
    ("Muon, 4,800 steps", "muon-long", ""),
    ("Muon, 250 images, equal time", "equal-time-few", ""),
    ("Muon, 250 images, 4,800 steps", "few-long", ""),
)
"""Each training that SFT, vanilla KD and Align-TI were studied in: what it is called, its study, and the end of the variants'
names there."""


def shown() -> tuple[tuple[str, str, str], ...]:
    """The lines of `SUMMARY` whose study has results."""
    return tuple(line for line in SUMMARY if (RESULTS / line[1] / "study.json").exists())


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


def variants(name: str, chosen: Sequence[str] | None = None, *, seconds: bool = False, gap: bool = False) -> str:
    """Accuracy, steps and operations, a row for each variant, or for the chosen ones.

    Args:
        name: of the study.
        chosen: keys of variants; by default all.
        seconds: with the time of training. Times of different studies were measured on different machines.
        gap: with the share of the gap between the study's base and the teacher that is closed.
    """
    content = study(name)
    base = content["labels"].get(content["gap_from"], "")
    head = ["", "accuracy, %", "seeds", "steps", *["s"] * seconds, "TFLOP", *[f"gap from {base} closed, %"] * gap]
    body = []
    for key, one in content["variants"].items():
        if chosen is not None and key not in chosen:
            continue
        accuracy, ends = one["accuracy"], one["gap_closed_interval"]
        closed = "-" if ends is None or key == content["gap_from"] else between(one["gap_closed"], ends[0], ends[1])
        body.append(
            [
                content["labels"][key],
                between(accuracy["mean"], accuracy["low"], accuracy["high"]),
                str(len(one["per_seed"])),
                f"{one['steps']:,}",
                *[f"{one['seconds']:,.0f}"] * seconds,
                f"{one['flops'] / 1e12:.1f}",
                *[closed] * gap,
            ]
        )
    return rows(head, body)


def differences(name: str) -> str:
    """The pairs' differences with both intervals."""
    content = study(name)
    return rows(
        ["", "points", "corrected interval", "relative, %", "corrected p"],
        [
            [
                f"{content['labels'][one['of']]} vs. {content['labels'][one['to']]}",
                between(one["mean"], one["low"], one["high"], "+.1f"),
                corrected(one),
                "-" if one["relative"] is None else f"{one['relative']:+.1f}",
                f"{one['corrected_p']:.2g}",
            ]
            for one in content["differences"]
        ],
    )


def corrected(one: dict[str, Any]) -> str:
    """The interval of a difference that holds simultaneously for all of its study."""
    return "-" if one["corrected_low"] is None else f"{one['corrected_low']:+.1f} to {one['corrected_high']:+.1f}"


def summary(trainings: Sequence[tuple[str, str, str]]) -> str:
    """SFT, vanilla KD and Align-TI in each training that all three were studied in, and Align-TI's differences to both.

    Args:
        trainings: what each line is called, its study, and the end of the variants' names there.
    """
    body = []
    for label, name, end in trainings:
        content = study(name)
        means = [f"{content['variants'][method + end]['accuracy']['mean']:.1f}" for method in ("sft", "kd", "align_ti")]
        pairs = {(one["of"], one["to"]): one for one in content["differences"]}
        found = [pairs["align_ti" + end, other + end] for other in ("kd", "sft")]
        body.append([label, *means, *(f"{one['mean']:+.1f} ({corrected(one)})" for one in found)])
    return rows(
        ["", "SFT, %", "vanilla KD, %", "Align-TI, %", "Align-TI vs. vanilla KD, points", "Align-TI vs. SFT, points"],
        body,
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
