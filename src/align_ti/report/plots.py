"""Colours of terms, and the figure of a step's phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align_ti.phases import phase_names
from align_ti.report.drawing import COLOURS, WIDTH, axes, drawn, look

TERMS = {"sft": "#e69f00", "kd": "#56b4e9", "iva": "#cc79a7", "tpa": "#009e73"}
OTHER_TERMS = ("#0072b2", "#d55e00", "#f0e442", "#7f7f7f", "#000000")
CYCLE = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2")


def terms_in(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The terms of a log, known by their weights, or by their names where those are Align-TI's, which come first."""
    weighted = (key.removesuffix("_weight") for line in metrics for key in line if key.endswith("_weight"))
    found = dict.fromkeys([*weighted, *(term for line in metrics for term in TERMS if term in line)])
    return sorted(found, key=lambda term: (term not in TERMS, list(TERMS).index(term) if term in TERMS else 0))


def colours_of(terms: Sequence[str]) -> dict[str, str]:
    """A colour for each term."""
    others = [term for term in terms if term not in TERMS]
    cycle = {term: OTHER_TERMS[place % len(OTHER_TERMS)] for place, term in enumerate(others)}
    return {term: TERMS.get(term) or cycle[term] for term in terms}


def phase_bars(
    phases: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str] | None = None, *, width: float = 10
) -> str:
    """Mean milliseconds of each phase of a step, a bar for each run; phases from top to bottom in the order of a step.

    Args:
        phases: what was counted, by run.
        labels: of runs; by default their names.
        width: of the figure in inches.
    """
    with look():
        names = phase_names(phases.values())
        height = 0.8 / len(phases)
        figure, ax = axes(width, 0.9 + 0.4 * (len(phases) > 1) + len(names) * max(0.28, 0.18 * len(phases)))
        for position, (run, content) in enumerate(phases.items()):
            found = [(place, content["phases"][name]) for place, name in enumerate(names) if name in content["phases"]]
            bars = ax.barh(
                [place + (position - (len(phases) - 1) / 2) * height for place, _ in found],
                [1000 * one["mean_seconds"] for _, one in found],
                height * 0.92,
                color=COLOURS.get(run, CYCLE[position % len(CYCLE)]),
                label=f"{run if labels is None else labels[run]}: {milliseconds(content['step'])} ms",
            )
            shares = [f"{milliseconds(one)}  ({100 * one['share']:.0f} %)" for _, one in found]
            ax.bar_label(bars, shares, padding=3, fontsize=8)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set_xlabel("mean time per step, ms\nin brackets: share of the step")
        ax.margins(x=1.2 / width, y=0.02)
        if len(phases) > 1:
            # Above the bars: where they are short differs from run to run.
            columns = 3 if width > WIDTH else 2
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, title="whole step", alignment="left")
        return drawn(figure, "Step time by phase")


def milliseconds(phase: Mapping[str, float]) -> str:
    """The mean of a phase in milliseconds, to three digits or to the millisecond."""
    value = 1000 * phase["mean_seconds"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
