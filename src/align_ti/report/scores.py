"""Models by tasks: scores with intervals, paired differences, kinds of questions, fidelity; as the tables of a study are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from align_ti.evaluation.results import EXACT_MATCH
from align_ti.evaluation.statistics import compared, paired, told
from align_ti.report import study, study_plots
from align_ti.report.drawing import Drawing, picture_of
from align_ti.report.folders import Model
from align_ti.report.headline import comparison
from align_ti.report.numbers import points, with_interval
from align_ti.report.tables import FIDELITY

Row = dict[str, Any]


def scores_of(models: Sequence[Model]) -> dict[str, Any]:
    """What the part of the page shows: tables and figures; no tables where nothing was measured."""
    rows = rows_of(models)
    heads = [row for row in rows if row["headline"] and row["differences"]]
    differences = together(heads)
    labels = {model.key: model.label for model in models}
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    tables = []
    for benchmark in benchmarks:
        own = [row for row in rows if row["benchmark"] == benchmark]
        pairs = {(one["of"], one["to"]): one for row in own for one in row["differences"]}
        named = {"labels": labels, "metrics": rows, "differences": list(pairs.values())}
        tables.append({**study.table_of(named, benchmark), "notes": notes_of(models, own[0]["of"])})
    return {
        "tables": tables,
        "differences": differences_told(heads, differences, labels),
        "figures": figures_of(heads, differences, rows, labels),
    }


def rows_of(models: Sequence[Model]) -> list[Row]:
    """A row for each metric of each benchmark: the models that have it, and the paired differences; own questions come first."""
    rows: list[Row] = []
    for (benchmark, _), group in groups_of(models).items():
        several = sum(row["of"] == benchmark and row["headline"] for row in rows)
        title = f"{benchmark} ({several + 1})" if several else benchmark
        scored = [model for model in group if benchmark in model.scores]
        pairs: list[tuple[Model, Model]] = []
        if scored and any(model.role == "trained" for model in scored):
            found = comparison(benchmark, scored)
            base = found.base
            pairs = (
                []
                if base is None
                else [(model, base) for model in scored if model.role == "trained" and model is not base]
            )
        for metric, unit, headline in metrics_of(group, benchmark):
            shown = {model.key: one for model in group if (one := value_of(model, benchmark, metric)) is not None}
            rows.append(
                {
                    "of": benchmark,
                    "benchmark": title,
                    "title": title_of(group, benchmark, title),
                    "metric": FIDELITY.get(metric, metric) if benchmark == "fidelity" else metric,
                    "name": metric,
                    "headline": headline,
                    "unit": unit,
                    "variants": shown,
                    "differences": [
                        {"of": of.key, "to": to.key, "mean": one["value"], "low": one["low"], "high": one["high"]}
                        for of, to in pairs
                        if (one := difference_of(of, to, benchmark, metric)) is not None
                    ],
                    "pairs": pairs,
                }
            )
    return rows


def groups_of(models: Sequence[Model]) -> dict[tuple[str, str], list[Model]]:
    """The models by what they were asked: benchmark, and a digest of its questions."""
    groups: dict[tuple[str, str], list[Model]] = {}
    for model in models:
        summary = model.folder.summary
        measured = [*([EXACT_MATCH] if model.name in summary.get("accuracy", {}) else [])]
        measured += [*summary.get("benchmarks", {}).get(model.name, {})]
        measured += ["fidelity"] if model.name in summary.get("fidelity", {}) else []
        for benchmark in dict.fromkeys(measured):
            scores = model.scores.get(benchmark)
            groups.setdefault((benchmark, "" if scores is None else scores.questions), []).append(model)
    order = {EXACT_MATCH: 0, "fidelity": 2}
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0][0], 1)))


def metrics_of(group: Sequence[Model], benchmark: str) -> list[tuple[str, str, bool]]:
    """The metrics of a benchmark that are shown, their units, and whether each is the headline."""
    summary = group[0].folder.summary
    if benchmark == EXACT_MATCH:
        kinds = dict.fromkeys(kind for model in group for kind in model.folder.summary["accuracy"].get(model.name, {}))
        return [(kind, "%", kind == "overall") for kind in kinds]
    if benchmark == "fidelity":
        measures = [model.folder.summary["fidelity"][model.name] for model in group]
        return [
            (name, next(one[name]["unit"] for one in measures if name in one), False)
            for name in FIDELITY
            if any(name in one for one in measures)
        ]
    one = summary["benchmarks"][group[0].name][benchmark]
    return [(one["metric"], one.get("unit", "%"), True)]


def value_of(model: Model, benchmark: str, metric: str) -> Row | None:
    """A model's score with its interval, as the run's summary tells it."""
    summary = model.folder.summary
    if benchmark == EXACT_MATCH:
        value = summary["accuracy"].get(model.name, {}).get(metric)
        low, high = summary["interval_95"][model.name].get(metric, (None, None)) if value is not None else (None, None)
    else:
        one = summary["fidelity" if benchmark == "fidelity" else "benchmarks"][model.name]
        one = one.get(metric if benchmark == "fidelity" else benchmark, {})
        value, low, high = (one.get(name) for name in ("value", "low", "high"))
    return None if value is None else {"mean": value, "low": low, "high": high}


def difference_of(of: Model, to: Model, benchmark: str, metric: str) -> Row | None:
    """What one model's score is above another's, where both have it."""
    both = [model.scores[benchmark].metrics.get(metric) for model in (of, to)]
    return None if both[0] is None or both[1] is None else told(paired(both[0], both[1]))


def together(heads: Sequence[Row]) -> list[Row]:
    """The differences of the headlines, with intervals and p values that hold for all of them together."""
    pairs = [(row, of, to) for row in heads for of, to in row["pairs"] if known(row, of, to)]
    if not pairs:
        return []
    made = compared([partial(paired_at, of, to, row["of"], row["name"]) for row, of, to in pairs])
    found = []
    for (row, of, to), alone, wide in zip(pairs, *made, strict=True):
        one, many = told(alone), told(wide)
        start = row["variants"][to.key]["mean"]
        found.append(
            {
                "benchmark": row["benchmark"],
                "of": of.key,
                "to": to.key,
                "mean": one["value"],
                "low": one["low"],
                "high": one["high"],
                "corrected_low": many["low"],
                "corrected_high": many["high"],
                "corrected_p": many["p"],
                "clusters": one["clusters"],
                "seeds": 1,
                "relative": 100 * one["value"] / start if start else None,
            }
        )
    return found


def known(row: Row, of: Model, to: Model) -> bool:
    """Whether the row has a difference of the two."""
    return any((one["of"], one["to"]) == (of.key, to.key) for one in row["differences"])


def paired_at(of: Model, to: Model, benchmark: str, metric: str, level: float) -> Any:
    """The difference of two models at a level."""
    return paired(of.scores[benchmark].metrics[metric], to.scores[benchmark].metrics[metric], level=level)


def differences_told(heads: Sequence[Row], differences: Sequence[Row], labels: Mapping[str, str]) -> list[Row]:
    """The table of differences, a block for each benchmark."""
    told_rows = []
    for row in heads:
        own = [one for one in differences if one["benchmark"] == row["benchmark"]]
        content = {"differences": own, "labels": labels, "unit": row["unit"]}
        told_rows += [
            {**one, "benchmark": row["title"], "unit": points(row["unit"])} for one in study.difference_rows(content)
        ]
    return told_rows


def figures_of(
    heads: Sequence[Row], differences: Sequence[Row], rows: Sequence[Row], labels: Mapping[str, str]
) -> dict[str, Drawing]:
    """The figures: the differences of the first benchmark, and those by kind of question."""
    if not heads:
        return {}
    head, found = heads[0], {}
    unit, own = points(head["unit"]), [one for one in differences if one["benchmark"] == heads[0]["benchmark"]]
    places = study.decimals_of_differences({"differences": own, "unit": head["unit"]})
    words = [with_interval(one, places) for one in own]
    header = ("of", "to", f"difference, {unit}", "low", "high", "corrected low", "corrected high", "corrected p")
    table = [
        (labels[one["of"]], labels[one["to"]], *(one[key] for key in ("mean", "low", "high", "corrected_low")))
        + (one["corrected_high"], one["corrected_p"])
        for one in own
    ]
    found["differences"] = picture_of("differences", study_plots.forest(own, labels, words, unit), header, table)
    parts = [row for row in rows if row["benchmark"] == head["benchmark"] and row["unit"] == head["unit"]]
    if len(parts) > 1:
        pairs = [(one["of"], one["to"]) for one in own]
        every = [
            (row["metric"], labels[one["of"]], labels[one["to"]], one["mean"], one["low"], one["high"])
            for row in parts
            for one in row["differences"]
        ]
        by_kind = ("kind", "of", "to", f"difference, {unit}", "low", "high")
        found["kinds"] = picture_of("kinds", study_plots.kinds(parts, pairs, labels, unit), by_kind, every)
    return found


def title_of(group: Sequence[Model], benchmark: str, title: str) -> str:
    """The benchmark's name for people, with the number of its questions."""
    summary = group[0].folder.summary
    if benchmark == EXACT_MATCH:
        return f"Exact match on own questions ({summary['questions']:,})"
    if benchmark == "fidelity":
        return title
    one = summary["benchmarks"][group[0].name][benchmark]
    return f"{one['title']} ({one['questions']:,} questions)"


def notes_of(models: Sequence[Model], benchmark: str) -> list[str]:
    """What a reader has to know of single results."""
    notes = []
    for model in models:
        summary = model.folder.summary
        if benchmark == "fidelity":
            found = summary.get("fidelity_notes", {}).get(model.name, [])
        else:
            found = summary.get("benchmarks", {}).get(model.name, {}).get(benchmark, {}).get("notes", [])
        notes += [f"{model.label}: {note}" for note in found]
    return notes
