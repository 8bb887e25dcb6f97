"""Exact-match accuracy, overall and by kind, with intervals that respect that questions share images. Imports no torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from align_ti.evaluation.metrics import mean_of
from align_ti.evaluation.statistics import interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A share of right answers in per cent with its 95 % interval, and the number of questions."""

    per_cent: float
    low: float
    high: float
    questions: int


def normalise(text: str) -> str:
    """The text in lower case with single spaces and without a closing full stop, which is how answers are compared."""
    return " ".join(text.lower().split()).removesuffix(".")


def is_right(answer: str, expected: str) -> bool:
    """Exact match after normalisation."""
    return normalise(answer) == normalise(expected)


def accuracy(right: Sequence[bool], pictures: Sequence[Hashable]) -> Accuracy:
    """The share of right answers, with a bootstrap over images (`statistics.interval`).

    Questions about one image fail together, so whole images are resampled, not questions.

    Raises:
        ValueError: no questions, or the two sequences differ in length.
    """
    if not right or len(right) != len(pictures):
        raise ValueError(f"{len(right)} results and {len(pictures)} images; equal numbers of at least 1 are accepted.")
    found = interval(mean_of([float(hit) for hit in right], pictures))
    return Accuracy(per_cent=found.value, low=found.low, high=found.high, questions=len(right))


def by_kind(right: Sequence[bool], pictures: Sequence[Hashable], kinds: Sequence[str]) -> dict[str, Accuracy]:
    """Accuracy over all questions (`overall`) and over each kind, in order of first appearance."""
    scores = {"overall": accuracy(right, pictures)}
    for kind in dict.fromkeys(kinds):
        if kind:
            chosen = [index for index, value in enumerate(kinds) if value == kind]
            scores[kind] = accuracy([right[i] for i in chosen], [pictures[i] for i in chosen])
    return scores
