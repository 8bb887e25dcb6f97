"""Models beside each other on the same questions: their scores, and what each is above the first. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from align_ti.errors import DataError
from align_ti.evaluation.metrics import Metric
from align_ti.evaluation.results import Scores, evaluations, name_of, read_scores
from align_ti.evaluation.statistics import Difference, compared, interval, paired, told

Model = tuple[str, Mapping[str, Scores]]
"""A model's name for people, and its scores by benchmark."""


def read_models(paths: Sequence[Path]) -> list[Model]:
    """The models whose scores lie at the paths, a file or a folder each; a run folder given alone holds several.

    Models are called by the names that their files say, or by the paths where these do not tell them apart.

    Raises:
        DataError: fewer than two models, or scores that cannot be read.
    """
    if len(paths) == 1 and paths[0].is_dir() and len(found := evaluations(paths[0])) > 1:
        paths = found
    if len(paths) < 2:
        raise DataError(
            f"{', '.join(map(str, paths)) or 'nothing'}: {len(paths)} result(s) to compare; at least 2 files or folders are accepted, "
            "or one run folder with several evaluation-*.json."
        )
    if len(set(paths)) < len(paths):
        raise DataError(f"{', '.join(map(str, paths))}: one path is there twice; name each result once.")
    scores = [read_scores(path) for path in paths]
    called = [next(iter(one.values())).model for one in scores]
    distinct = len(set(called)) == len(called) and all(called)
    return list(zip(called if distinct else map(str, paths), scores, strict=True))


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of a benchmark, for those models that have it."""

    benchmark: str
    title: str
    name: str
    metrics: Mapping[str, Metric]
    """By model."""


def compare(models: Sequence[Model], all_metrics: bool = False) -> dict[str, Any]:
    """Each model's scores with their 95 % intervals, and the difference of each model to the first.

    A difference has its interval and p value alone, and `corrected_low`, `corrected_high` (all intervals hold together with 95 %,
    Bonferroni) and `corrected_p` (Holm), over all differences that are there.

    Args:
        models: the models.
        all_metrics: every metric, not only each benchmark's headline.

    Raises:
        DataError: the models were asked or scored differently, or the first shares no benchmark with another.
    """
    rows, alone = rows_of(models, all_metrics), []
    first, *others = (name for name, _ in models)
    pairs = [(row, name) for row in rows for name in others if {name, first} <= row.metrics.keys()]
    if not pairs:
        has = "; ".join(f"{name}: {', '.join(scores)}" for name, scores in models)
        raise DataError(
            f"no other model has a benchmark of {first} ({has}); results on the same benchmark are compared; evaluate both on it."
        )
    made = compared([partial(difference_of, row, name, first) for row, name in pairs])
    differences = {(row.benchmark, row.name, name): both for (row, name), *both in zip(pairs, *made, strict=True)}
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        lacking = [name for name, scores in models if benchmark not in scores]
        if lacking:
            alone.append(f"{benchmark}: no scores of {', '.join(lacking)}.")
    for row in rows:
        lacking = [name for name, scores in models if row.benchmark in scores and name not in row.metrics]
        if lacking:
            alone.append(f"{row.benchmark}: no {row.name} of {', '.join(lacking)}.")
    return {
        "models": [first, *others],
        "files": {name: {title: str(one.path) for title, one in scores.items()} for name, scores in models},
        "comparisons": len(pairs),
        "rows": [
            {
                "benchmark": row.benchmark,
                "title": row.title,
                "metric": row.name,
                "unit": next(iter(row.metrics.values())).unit,
                "scores": {name: told(interval(metric)) for name, metric in row.metrics.items()},
                "differences": [
                    {"of": name, "to": first, **told_difference(*differences[row.benchmark, row.name, name])}
                    for name in others
                    if (row.benchmark, row.name, name) in differences
                ],
            }
            for row in rows
        ],
        "notes": [*alone, *notes_of(models)],
    }


def difference_of(row: Row, of: str, to: str, level: float) -> Difference:
    """The difference of two models in a row, at a level."""
    return paired(row.metrics[of], row.metrics[to], level=level)


def told_difference(alone: Difference, together: Difference) -> dict[str, Any]:
    """The numbers of a difference, alone and corrected for there being several."""
    wide = told(together)
    return {
        **{name: value for name, value in told(alone).items() if name != "seeds"},
        "corrected_low": wide["low"],
        "corrected_high": wide["high"],
        "corrected_p": wide["p"],
    }


def rows_of(models: Sequence[Model], all_metrics: bool) -> list[Row]:
    """What is compared: each benchmark's headline, or all its metrics, in the order of the files.

    Raises:
        DataError: two models were asked or scored differently.
    """
    rows = []
    for benchmark in dict.fromkeys(name for _, scores in models for name in scores):
        having = {name: scores[benchmark] for name, scores in models if benchmark in scores}
        one = next(iter(having.values()))
        for other in having.values():
            check_alike(one, other)
        every = dict.fromkeys(name for scores in having.values() for name in scores.metrics)
        for name in every if all_metrics else [one.headline]:
            found = {model: scores.metrics[name] for model, scores in having.items() if name in scores.metrics}
            rows.append(Row(benchmark, one.title, name, found))
    return rows


def check_alike(one: Scores, other: Scores) -> None:
    """Refuse scores of different questions, or that count different things.

    Raises:
        DataError: both files are named.
    """
    if one.questions != other.questions:
        raise DataError(
            f"{one.path} and {other.path}: different questions of {one.benchmark!r} ({one.questions} and {other.questions}), right "
            "answers, or ways of scoring (--scorer, --strict-original); a difference between models is measured on the same alone; "
            "evaluate both on the same files, with the same options."
        )
    ways = [
        {name: [name_of(metric.value), metric.unit, metric.sums.shape[1]] for name, metric in scores.metrics.items()}
        for scores in (one, other)
    ]
    # A metric that only one of them has is shown without a difference.
    differing = [name for name in ways[0] if name in ways[1] and ways[0][name] != ways[1][name]]
    if one.headline != other.headline:
        differing.append("the headline")
    if differing:
        raise DataError(
            f"{one.path} and {other.path}: {', '.join(differing)} of {one.benchmark!r} are counted in different ways; score both by "
            "one version and with the same options (`align-ti score`)."
        )


def notes_of(models: Sequence[Model]) -> list[str]:
    """What a reader has to know of single results."""
    return [
        f"{name}, {title}: {note}" for name, scores in models for title, one in scores.items() for note in one.notes
    ]
