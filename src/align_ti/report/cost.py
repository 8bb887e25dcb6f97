"""What training cost: parameters, tokens, steps, time, memory, FLOPs; where a step's time goes; accuracy against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align_ti.evaluation.statistics import interval, pareto, told
from align_ti.phases import phase_names
from align_ti.report import plots, study_plots
from align_ti.report.drawing import WIDTH, Drawing, picture_of
from align_ti.report.folders import Model, content, folders_of, names_in_colour
from align_ti.report.headline import comparison_of, title_of
from align_ti.report.numbers import DASH, OPERATIONS, TIMES, aligned, digits, scaled
from align_ti.report.tables import PARTS

Row = dict[str, Any]

AXES = {
    "seconds": (TIMES, "accuracy-and-cost", "training time"),
    "flops": (OPERATIONS, "accuracy-and-flops", "FLOPs of training"),
}
"""What accuracy is drawn against: units, the figure's name, and what the axis is called."""

REPORT = "write the report"
"""The part of a demo whose time is not known yet while its page is written."""


def cost_of(models: Sequence[Model]) -> dict[str, Any]:
    """What the part of the page shows."""
    trained = [model for model in models if model.role == "trained"]
    phases = {model.key: found for model in trained if (found := content(model.run.phases))}
    labels = {model.key: model.label for model in models}
    units = {
        by: scaled(of, [cost for model in trained if (cost := getattr(model, by))]) for by, (of, *_) in AXES.items()
    }
    columns = {by: column([getattr(model, by) for model in trained], units[by][0]) for by in AXES}
    return {
        "rows": [{**cost_row(model), **{by: columns[by][place] for by in AXES}} for place, model in enumerate(trained)],
        # Without a number there is no unit.
        "units": {by: "" if set(columns[by]) <= {DASH} else f", {name}" for by, (_, name) in units.items()},
        "memory": next((of for model in trained if (of := model.folder.summary.get("memory"))), ""),
        "uncounted": {model.label: why for model in trained if (why := model.spent.get("flops_not_counted"))},
        "frontiers": [one for by in AXES if (one := frontier(trained, models, by)) is not None],
        "phases": phases,
        "phase_names": phase_names(phases.values()),
        "phase_figure": phase_figure(phases, models) if phases else None,
        "labels": labels,
        "spent": [spent for folder in folders_of(models) if (spent := spent_in(folder.summary)) is not None],
    }


def column(costs: Sequence[float | None], scale: float) -> list[str]:
    """The costs of all lines of the table in one unit, with equal decimals; a dash for one that is not known."""
    told = iter(aligned([cost / scale for cost in costs if cost is not None]))
    return [DASH if cost is None else next(told) for cost in costs]


def cost_row(model: Model) -> Row:
    """A line of the table, without time and FLOPs, which share a unit with the other lines (`column`)."""
    parameters = model.trained_on.get("parameters", {})
    learnt, every = (sum(of[place] for of in parameters.values()) for place in (0, 1))
    records = records_per_step(model)
    second, tokens = model.seconds_per_step, model.spent.get("tokens")
    return {
        "label": model.label,
        "terms": ", ".join(
            (f"{name} x {weight:g}" if weight != 1 else name) + (" (scheduled)" if name in model.scheduled else "")
            for name, weight in model.terms.items()
        )
        or DASH,
        "parameters": f"{learnt:,} of {every:,}" if every else DASH,
        "steps": f"{model.trained_on['steps']:,}" if "steps" in model.trained_on else DASH,
        "records": DASH if records is None else f"{records:,}",
        "tokens": DASH if tokens is None else f"{tokens:,}",
        "responses": DASH if tokens is None else f"{model.spent['response_tokens']:,}",
        "second": DASH if second is None else f"{second:.3f}",
        "throughput": DASH if records is None or not second else digits(records / second),
        "memory": DASH if model.peak_memory_mib is None else f"{model.peak_memory_mib:,.0f}",
    }


def records_per_step(model: Model) -> int | None:
    """Records of an optimizer step, over all processes; None where the recipe is not kept."""
    training = model.recipe.get("training")
    if training is None:
        return None
    processes = content(model.run.provenance).get("processes", 1)
    return int(training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * processes)


def frontier(trained: Sequence[Model], models: Sequence[Model], by: str) -> Drawing | None:
    """Accuracy against a cost of the students that were asked the same questions; None for fewer than two whose cost is known.

    Args:
        trained: the students.
        models: all models on the page.
        by: `seconds` or `flops`.
    """
    found, (units, name, words) = comparison_of(models), AXES[by]
    costs = {model.key: cost for model in trained if (cost := getattr(model, by))}
    known = [] if found is None else [model for model in found.models if model.key in costs]
    if found is None or len(known) < 2:
        return None
    scale, unit = scaled(units, list(costs.values()))
    variants: dict[str, Row] = {}
    names = names_in_colour(models)
    for model in known:
        one = told(interval(found.metric(model)))
        accuracy = {"mean": one["value"], "low": one["low"], "high": one["high"]}
        variants[names[model.key]] = {"accuracy": accuracy, by: costs[model.key]}
    labels = {names[model.key]: model.label for model in known}
    title, of = title_of(found.scores[known[0].key]), found.metric(known[0]).unit
    text = study_plots.frontier(
        variants,
        labels,
        pareto({name: (row[by], row["accuracy"]["mean"]) for name, row in variants.items()}),
        by,
        scale,
        (f"{words}, {unit}", f"{title}, {of}"),
    )
    rows = [(labels[key], one[by], *one["accuracy"].values()) for key, one in variants.items()]
    caption = "Bars: 95 % intervals. Dashed: the Pareto frontier (students that no other one beats at the same or a lower cost)."
    return picture_of(name, text, ("model", by, f"{title}, {of}", "low", "high"), rows, caption)


def phase_figure(phases: Mapping[str, Row], models: Sequence[Model]) -> Drawing:
    """Mean milliseconds of each phase of a step."""
    by_key = {model.key: model for model in models}
    names = names_in_colour(models)
    renamed = {names[key]: found for key, found in phases.items()}
    labels = {names[key]: by_key[key].label for key in phases}
    rows = [
        (by_key[key].label, name, 1000 * one["mean_seconds"], 1000 * one["median_seconds"], one["share"])
        for key, found in phases.items()
        for name, one in found["phases"].items()
    ]
    return picture_of(
        "phases",
        plots.phase_bars(renamed, labels, width=WIDTH),
        ("model", "phase", "mean ms", "median ms", "share"),
        rows,
    )


def spent_in(summary: Mapping[str, Any]) -> Row | None:
    """What a demo spent its time on; None for other runs."""
    spent = {
        PARTS.get(name, name): seconds for name, seconds in summary.get("spent_seconds", {}).items() if name != REPORT
    }
    if not spent:
        return None
    whole = sum(spent.values())
    return {"title": summary["title"], "parts": spent, "whole": whole}
