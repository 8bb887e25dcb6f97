"""The report's pictures, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl

from align_ti.phases import phase_names
from align_ti.report.drawing import COLOURS, STYLE, axes, svg

TERMS = {"sft": "#e69f00", "kd": "#56b4e9", "iva": "#cc79a7", "tpa": "#009e73"}
OTHER_TERMS = ("#0072b2", "#d55e00", "#f0e442", "#7f7f7f", "#000000")
CYCLE = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2")


def accuracy_bars(summary: Mapping[str, Any]) -> str:
    """Accuracy by kind of question and model, with 95 % intervals."""
    with mpl.rc_context(STYLE):
        names, kinds = list(summary["accuracy"]), list(summary["questions_by_kind"])
        figure, ax = axes(10, 3.6)
        width = 0.8 / len(names)
        for position, name in enumerate(names):
            values = [summary["accuracy"][name][kind] for kind in kinds]
            bounds = [summary["interval_95"][name][kind] for kind in kinds]
            errors = [
                [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
                [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
            ]
            places = [index + (position - (len(names) - 1) / 2) * width for index in range(len(kinds))]
            ax.bar(
                places,
                values,
                width * 0.92,
                yerr=errors,
                color=COLOURS.get(name, "#0072b2"),
                label=summary["labels"][name],
                error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
            )
        ax.set_xticks(range(len(kinds)), [f"{kind}\n({summary['questions_by_kind'][kind]})" for kind in kinds])
        ax.set_ylabel("exact match, per cent")
        ax.set_ylim(0, 100)
        ax.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        return svg(figure, "Accuracy by kind of question")


def layer_curve(scores: Mapping[str, float], chosen: int) -> str:
    """The instruction-relevance score of every layer."""
    with mpl.rc_context(STYLE):
        figure, ax = axes(4.6, 2.8)
        layers = [int(layer) for layer in scores]
        ax.bar(layers, list(scores.values()), color=["#009e73" if layer == chosen else "#c4c4c4" for layer in layers])
        ax.set_xticks(layers)
        ax.set_xlabel("teacher's layer")
        ax.set_ylabel("IRS")
        return svg(figure, "Instruction-relevance score by layer")


def term_curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Each unweighted term along training."""
    with mpl.rc_context(STYLE):
        figure, ax = axes(4.6, 2.8)
        for term, colour in colours_of(terms_in(metrics)).items():
            points = [(line["step"], line[term]) for line in metrics if line.get(term) is not None and line[term] > 0]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, label=term.upper())
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.set_ylabel("value, unweighted")
        ax.legend(frameon=False, ncols=2)
        return svg(figure, "Terms along training")


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


def share_curve(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The share of candidates that needed a row of their own, along training."""
    with mpl.rc_context(STYLE):
        figure, ax = axes(4.6, 2.8)
        points = [
            (line["step"], 100 * line["branch_share"]) for line in metrics if line.get("branch_share") is not None
        ]
        ax.plot(*zip(*points, strict=True), color="#009e73")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("step")
        ax.set_ylabel("candidates with a row, %")
        return svg(figure, "Share of candidates that needed a row")


def cost_bars(values: Mapping[str, float], labels: Mapping[str, str], unit: str, title: str) -> str:
    """One bar a method."""
    with mpl.rc_context(STYLE):
        figure, ax = axes(4.6, 0.6 + 0.45 * len(values))
        names = list(values)[::-1]
        bars = ax.barh(
            [labels[name] for name in names], [values[name] for name in names], color=[COLOURS[n] for n in names]
        )
        ax.bar_label(bars, fmt="%.3g", padding=3)
        ax.set_xlabel(unit)
        ax.margins(x=0.15)
        return svg(figure, title)


def phase_bars(phases: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str] | None = None) -> str:
    """Mean milliseconds of each phase of a step, a bar for each run; phases from top to bottom in the order of a step."""
    with mpl.rc_context(STYLE):
        names = phase_names(phases.values())
        height = 0.8 / len(phases)
        figure, ax = axes(10, 0.9 + len(names) * max(0.28, 0.16 * len(phases)))
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
        ax.set_xlabel("milliseconds of a step (mean), share of the step in brackets")
        ax.margins(x=0.12, y=0.02)
        if len(phases) > 1:
            ax.legend(frameon=False, loc="lower right", title="whole step")
        return svg(figure, "Where a step's time goes")


def milliseconds(phase: Mapping[str, float]) -> str:
    """The mean of a phase in milliseconds, to three digits or to the millisecond."""
    value = 1000 * phase["mean_seconds"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
