"""How training went: each term, weighted and not, its share in the gradient, learning rate, throughput, memory, scores on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean, median
from typing import Any

from matplotlib.ticker import LogLocator

from align_ti.report import study_plots
from align_ti.report.cost import records_per_step
from align_ti.report.drawing import INK, WIDTH, Drawing, axes, drawn, look, looks, picture_of, short
from align_ti.report.folders import Model, content, names_in_colour
from align_ti.report.numbers import DASH, capital, number
from align_ti.report.plots import colours_of, terms_in
from align_ti.report.run_progress import PAUSE, numbers, paces
from align_ti.runs import GRADIENT_SHARE, read_lines

Log = Sequence[Mapping[str, Any]]

LINES = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "throughput": "throughput, records / s (including evaluation during training)",
    "memory_mib": "peak memory so far, MiB (including what was allocated before training)",
    "branch_share": "share of TPA's candidates computed in their own row",
    "on_policy_share": "share of on-policy batches (responses by the student)",
}
"""What is drawn with a line for each model, by its name in the log; throughput is not in it (`with_throughput`)."""


def curves_of(models: Sequence[Model]) -> dict[str, Any] | None:
    """What the part of the page shows; None if no log is kept."""
    logs = {model.key: with_throughput(model, log) for model in models if (log := model.log)}
    if not logs:
        return None
    labels = {model.key: model.label for model in models}
    names = names_in_colour(models)
    return {
        "terms": [
            {"label": labels[key], "figures": term_figures(log, key, labels[key]), "same": all_ones(log)}
            for key, log in logs.items()
        ],
        "shares": [found for model in models if model.key in logs and (found := shares(model)) is not None],
        "lines": [
            lines(logs, labels, names, name, words)
            for name, words in LINES.items()
            if any(line.get(name) is not None for log in logs.values() for line in log)
        ],
        "tasks": task_figures([model for model in models if model.key in logs], labels),
    }


def with_throughput(model: Model, log: Log) -> Log:
    """The log, with each line's records per second since the line before: evaluation in between is included, pauses are not."""
    found, records = paces(numbers(read_lines(model.run.metrics))), records_per_step(model)
    if not found or records is None:
        return log
    longest = PAUSE * median(seconds for _, seconds in found)
    speed = {step: records / seconds for step, seconds in found if seconds <= longest}
    return [{**line, "throughput": speed.get(line["step"])} for line in log]


def all_ones(log: Log) -> bool:
    """Whether every term's weight is 1, so that weighted and unweighted values are the same."""
    return all(line.get(f"{term}_weight", 1) == 1 for line in log for term in terms_in(log))


def term_figures(log: Log, key: str, label: str) -> list[Drawing]:
    """Each term along training, unweighted and, where a weight is not 1, weighted."""
    figures = [terms(log, key, f"{label}: terms, unweighted", weighted=False)]
    if not all_ones(log):
        figures.append(terms(log, key, f"{label}: weighted terms and the loss", weighted=True))
    return figures


def terms(log: Log, key: str, title: str, *, weighted: bool) -> Drawing:
    """A line for each term, on a logarithmic axis; with weights also the loss."""
    rows: list[tuple[Any, ...]] = []
    with look():
        figure, ax = axes(WIDTH, 3.0)
        named = terms_in(log)
        styles = looks(named)
        for term, colour in colours_of(named).items():
            points = [
                (line["step"], line[term] * (line.get(f"{term}_weight", 1) if weighted else 1))
                for line in log
                if line.get(term) is not None
            ]
            rows += [(term, *point) for point in points]
            seen = [point for point in points if point[1] > 0]
            if seen:
                every = max(1, len(seen) // 6)
                style = styles[term]
                ax.plot(
                    *zip(*seen, strict=True),
                    color=colour,
                    linestyle=style.dash,
                    marker=style.marker,
                    markersize=4,
                    markevery=every,
                    label=short(term, 22),
                )
        if weighted:
            loss = [(line["step"], line["loss"]) for line in log if line["loss"] > 0]
            rows += [("loss", *point) for point in loss]
            if loss:
                ax.plot(*zip(*loss, strict=True), color=INK, linewidth=1.0, label="loss")
        if rows:
            ax.set_yscale("log")
            # Numbers as they are, in place of formulas of powers.
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            ax.yaxis.set_minor_formatter("{x:g}")
            ax.legend(frameon=False, fontsize=9, ncols=2)
        ax.set_xlabel("step")
        ax.set_ylabel("loss, weighted" if weighted else "loss, unweighted")
        text = drawn(figure, title)
    return picture_of(
        f"terms-{key}-{'weighted' if weighted else 'unweighted'}", text, ("term", "step", "value"), rows, title
    )


def shares(model: Model) -> dict[str, Any] | None:
    """Each term's share in the gradient: before the first step, as the check found it, and along training; None if neither is known."""
    verdicts = content(model.run.check).get("verdicts", ())
    found = {one["name"].removeprefix("term."): one["values"] for one in verdicts if one["name"].startswith("term.")}
    before = {name: 100 * of["gradient_share"] for name, of in found.items() if "gradient_share" in of}
    along: dict[str, dict[int, float]] = {}
    # In the order in which they were written: of a step that a resumed run repeats the later line counts.
    for line in read_lines(model.run.metrics):
        for key, value in line.items():
            if key.endswith(GRADIENT_SHARE) and value is not None and isfinite(value):
                along.setdefault(key.removesuffix(GRADIENT_SHARE), {})[line["step"]] = 100 * value
    names = list(dict.fromkeys([*along, *before]))
    if not names:
        return None
    curves = {name: sorted(along.get(name, {}).items()) for name in names}
    rows = [
        {
            "term": name,
            "before": shown(before.get(name)),
            "first": shown(points[0][1] if points else None),
            "last": shown(points[-1][1] if points else None),
            "mean": shown(fmean(value for _, value in points) if points else None),
        }
        for name, points in curves.items()
    ]
    steps = sorted({step for points in along.values() for step in points})
    return {
        "label": model.label,
        "rows": rows,
        "steps": (f"{steps[0]:,}", f"{steps[-1]:,}", f"{len(steps):,}") if steps else None,
        "figure": share_figure(curves, model) if len(steps) > 1 else None,
    }


def shown(share: float | None) -> str:
    """A share in per cent, or a dash."""
    return DASH if share is None else number(share, 1)


def share_figure(curves: Mapping[str, Sequence[tuple[int, float]]], model: Model) -> Drawing:
    """A line for each term, in per cent."""
    rows = [(term, *point) for term, points in curves.items() for point in points]
    title = f"{model.label}: share of each term in the gradient norms"
    with look():
        figure, ax = axes(WIDTH, 2.7)
        styles = looks(list(curves))
        for term, colour in colours_of(list(curves)).items():
            points, style = curves[term], styles[term]
            if points:
                ax.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    linestyle=style.dash,
                    marker=style.marker,
                    markersize=4,
                    markevery=max(1, len(points) // 6),
                    label=short(term, 22),
                )
        ax.set_ylim(0, 100)
        ax.set_xlabel("step")
        ax.set_ylabel("share, %")
        ax.legend(frameon=False, fontsize=9, ncols=2)
        text = drawn(figure, title)
    return picture_of(f"gradient-shares-{model.key}", text, ("term", "step", "share, %"), rows, title)


def lines(
    logs: Mapping[str, Log], labels: Mapping[str, str], names: Mapping[str, str], name: str, words: str
) -> Drawing:
    """One number of the log along training, a line for each model."""
    rows: list[tuple[Any, ...]] = []
    with look():
        figure, ax = axes(WIDTH, 2.7)
        styles = looks([names[key] for key in logs])
        for key in logs:
            style = styles[names[key]]
            points = [(line["step"], line[name]) for line in logs[key] if line.get(name) is not None]
            rows += [(labels[key], *point) for point in points]
            if points:
                every = max(1, len(points) // 6)
                ax.plot(
                    *zip(*points, strict=True),
                    color=style.colour,
                    linestyle=style.dash,
                    marker=style.marker,
                    markersize=4,
                    markevery=every,
                    label=short(labels[key], 24),
                )
        ax.set_ylim(0, 1.08 * max((value for *_, value in rows if isfinite(value)), default=0) or 1)
        ax.set_xlabel("step")
        ax.set_ylabel("share" if name.endswith("_share") else words.partition(" (")[0])
        if len(logs) > 1:
            ax.legend(frameon=False, fontsize=9)
        text = drawn(figure, words)
    return picture_of(name.replace("_", "-"), text, ("model", "step", words), rows, capital(words))


def task_figures(models: Sequence[Model], labels: Mapping[str, str]) -> list[Drawing]:
    """The scores on benchmarks that students were asked while they were trained."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for model in models:
        for line in read_lines(model.run.metrics):
            for name, value in line.items():
                if name.startswith("task_") and not name.endswith(("_low", "_high")) and value is not None:
                    point = {
                        "step": line["step"],
                        "mean": value,
                        "low": line.get(f"{name}_low"),
                        "high": line.get(f"{name}_high"),
                        "per_seed": {"": value},
                    }
                    found.setdefault(name.removeprefix("task_"), {}).setdefault(model.key, []).append(point)
    figures = []
    for name, curves in found.items():
        shown = {key: label for key, label in labels.items() if key in curves}
        text = study_plots.learning(curves, shown, "step", 1.0, ("step", f"score on {name}"))
        rows = [
            (labels[key], *(point[part] for part in ("step", "mean", "low", "high")))
            for key, points in curves.items()
            for point in points
        ]
        header = ("model", "step", name, "low", "high")
        figures.append(
            picture_of(f"learning-{name}", text, header, rows, f"{name} during training; bands: 95 % intervals")
        )
    return figures
