"""A score as a function of sums over clusters of questions: the one form that intervals and paired tests resample. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Value = Callable[[Float[np.ndarray, "*draws statistics"]], Float[np.ndarray, "*draws"]]
"""Gives the score of sums of statistics; a ratio whose denominator is 0 is worth 0."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One score of one model: what each cluster of questions adds to the statistics, and how their sums make the score.

    A cluster is what fails together and so is resampled together: the questions of one image, a pair of questions of MME, the
    rotations of one question of MMBench. Accuracy is hits over questions; an F1 is a function of the counts of the confusion table;
    MME's total is a sum over categories. All of these are functions of sums.
    """

    sums: Float[np.ndarray, "clusters statistics"]
    value: Value
    clusters: tuple[str, ...]
    """The names of the clusters, by which two models' metrics are paired."""
    unit: str = "%"

    @property
    def score(self) -> float:
        """The score over all clusters."""
        return float(self.value(self.sums.sum(0)))


def quotient(sums: Float[np.ndarray, "*draws two"]) -> Float[np.ndarray, "*draws"]:
    """The first statistic over the second; 0 where the second is 0."""
    over = np.zeros(sums.shape[:-1])
    np.divide(sums[..., 0], sums[..., 1], out=over, where=sums[..., 1] != 0)
    return over


def ratio(sums: Float[np.ndarray, "*draws two"]) -> Float[np.ndarray, "*draws"]:
    """100 times the first statistic over the second; 0 where the second is 0."""
    # A product of no dimensions would be a plain number.
    return np.asarray(100 * quotient(sums))


def mean_of(values: Sequence[float], clusters: Sequence[Hashable]) -> Metric:
    """The mean of the questions' values (each 0 to 1) in per cent.

    Raises:
        ValueError: no values, or the two sequences differ in length.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(
            f"{len(values)} values and {len(clusters)} clusters; equal numbers of at least 1 are accepted."
        )
    names = tuple(dict.fromkeys(str(cluster) for cluster in clusters))
    number = {name: index for index, name in enumerate(names)}
    where = np.array([number[str(cluster)] for cluster in clusters])
    sums = np.stack(
        [
            np.bincount(where, weights=np.asarray(values, dtype=float), minlength=len(names)),
            np.bincount(where, minlength=len(names)).astype(float),
        ],
        axis=-1,
    )
    return Metric(sums, ratio, names)
