"""Exact-match accuracy, overall and by kind, with intervals that respect that questions share pictures. Imports no torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
"""Bootstrap resamples of an interval."""


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
    """The share of right answers, with a percentile bootstrap over pictures.

    Questions about one picture fail together, so whole pictures are resampled, not questions.

    Raises:
        ValueError: no questions, or the two sequences differ in length.
    """
    if not right or len(right) != len(pictures):
        raise ValueError(
            f"{len(right)} results and {len(pictures)} pictures; equal numbers of at least 1 are accepted."
        )
    number = {picture: index for index, picture in enumerate(dict.fromkeys(pictures))}
    cluster = np.array([number[picture] for picture in pictures])
    hits = np.bincount(cluster, weights=np.array(right, dtype=float), minlength=len(number))
    sizes = np.bincount(cluster, minlength=len(number))
    # A fixed seed: the interval of given results is a fact about them, not about the run's seed.
    drawn = np.random.default_rng(0).integers(len(number), size=(RESAMPLES, len(number)))
    shares = hits[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.percentile(shares, [2.5, 97.5])
    return Accuracy(per_cent=100 * float(np.mean(right)), low=100 * low, high=100 * high, questions=len(right))


def by_kind(right: Sequence[bool], pictures: Sequence[Hashable], kinds: Sequence[str]) -> dict[str, Accuracy]:
    """Accuracy over all questions (`overall`) and over each kind, in order of first appearance."""
    scores = {"overall": accuracy(right, pictures)}
    for kind in dict.fromkeys(kinds):
        if kind:
            chosen = [index for index, value in enumerate(kinds) if value == kind]
            scores[kind] = accuracy([right[i] for i in chosen], [pictures[i] for i in chosen])
    return scores
