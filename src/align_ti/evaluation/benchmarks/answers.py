"""What all benchmarks do with predictions before they score them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.base import Item
from align_ti.evaluation.metrics import Metric, mean_of, ratio


def tidy(text: str) -> str:
    """The text without white space around it, each run of white space inside as one space.

    The originals' own scripts strip each answer before they write it; predictions of other tools may come unstripped. Line ends and
    tabs inside an answer are no reason to call it wrong.
    """
    return " ".join(text.split())


def check(items: Sequence[Item], predictions: Mapping[str, str], title: str) -> None:
    """Refuse predictions that are not those of these questions.

    Raises:
        DataError: there are no questions, or none of the predictions belongs to a question.
    """
    if not items:
        raise DataError(f"{title}: no questions to score; at least one is needed.")
    if predictions and not any(item.id in predictions for item in items):
        raise DataError(
            f"{title}: none of the {len(predictions)} predictions belongs to one of the {len(items)} questions (their ids are like "
            f"{next(iter(predictions))!r:.60}, the questions' like {items[0].id!r:.60}); score them by the task they were made for."
        )


def notes_on(items: Sequence[Item], predictions: Mapping[str, str], published: int, strict: str = "") -> list[str]:
    """What a reader has to know about the predictions: missing ones, unknown ones, and questions other in number than published.

    Args:
        items: the questions.
        predictions: the answers.
        published: how many questions the published benchmark has; 0: no such number.
        strict: what the original does with a missing prediction, if it is scored so.
    """
    notes = []
    missing = [item.id for item in items if item.id not in predictions]
    if missing:
        what = strict or "counted as wrong"
        notes.append(f"{len(missing)} of {len(items)} predictions are missing (the first: {missing[0]!r:.80}): {what}.")
    unknown = len(predictions.keys() - {item.id for item in items})
    if unknown:
        notes.append(f"{unknown} predictions belong to no scored question: ignored.")
    if published and len(items) != published:
        notes.append(
            f"{len(items)} questions; the published benchmark has {published}, so the scores are not comparable with published ones."
        )
    return notes


def mean_over(items: Sequence[Item], right: Mapping[str, float]) -> Metric:
    """What the questions are worth on average, in per cent; 0 if there are none."""
    if not items:
        return Metric(np.zeros((1, 2)), ratio, ("none",))
    return mean_of([right[item.id] for item in items], [item.cluster for item in items])


def with_kinds(name: str, items: Sequence[Item], right: Mapping[str, float]) -> dict[str, Metric]:
    """What the questions are worth on average: all of them under the name given, then those of each kind under the kind's."""
    metrics = {name: mean_over(items, right)}
    for kind in kinds(items):
        of = [item for item in items if item.kind == kind]
        metrics[f"kind {kind}" if kind in metrics else kind] = mean_over(of, right)
    return metrics


def zero_note(name: str, of: str) -> str:
    """The note about a denominator of 0."""
    return f"{name} is 0 because there {of} (0 / 0); the original stops there."


def kinds(items: Iterable[Item]) -> tuple[str, ...]:
    """The kinds of the questions in order of first appearance."""
    return tuple(dict.fromkeys(item.kind for item in items if item.kind))
