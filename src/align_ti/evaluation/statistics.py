"""Intervals of scores, paired differences between models, over seeds too, and corrections for many comparisons. Imports no torch.

Everything works on `Metric`: sums over clusters, and a score as a function of them. Clusters are resampled whole, and two models on the
same clusters. The kinds of intervals and tests, and what simulations said about them, are in docs/evaluation.md, "Uncertainty".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isnan, nan, prod
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import gammaln, ndtr, ndtri, stdtr, stdtrit

from align_ti.errors import DataError
from align_ti.evaluation.metrics import Metric, Value, ratio

LEVEL = 0.95
"""The share of intervals that hold the true score."""

RESAMPLES = 10_000
"""Bootstrap resamples of an interval, and random signs of a test: the ends of a 95 % interval and a p value of 0.05 are then known to
about 2 % of the interval's width, and to 0.004."""

CELLS = 2**22
"""Numbers that resampling holds at a time."""

OUTCOMES = 2**17
"""Up to so many distinct exchanges of the two models' results a test goes through all of them; above, through a sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A score with its interval, and the number of clusters that it was estimated from."""

    value: float
    low: float
    """NaN where a single cluster, or clusters that are all alike, leave the interval unknown; so is `high`."""
    high: float
    clusters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What one model's score is above another's, with its interval and the two-sided p value of there being no difference."""

    value: float
    low: float
    high: float
    p: float
    clusters: int
    seeds: int = 1
    """Pairs of runs that it was averaged over."""


def told(of: Interval | Difference) -> dict[str, Any]:
    """The numbers for a JSON file; what is unknown (NaN) is null."""
    return {name: None if isinstance(value, float) and isnan(value) else value for name, value in asdict(of).items()}


# --- one score --------------------------------------------------------------------------------------------------------


def interval(metric: Metric, *, level: float = LEVEL, resamples: int = RESAMPLES) -> Interval:
    """The score with an interval that holds the true one with the given probability, by a bootstrap over clusters.

    The interval is BCa (bias-corrected and accelerated; Efron 1987), expanded for few clusters by Student's t (Hesterberg 2015). A
    share that is the same in all clusters, whose resamples are all alike, has the interval of `unlike`: for none and for all right
    the exact one of so many clusters (Clopper and Pearson 1934). Any other score of clusters that are all alike has none. The
    resamples are the same each time, and do not depend on the clusters' order: an interval is a fact about given results.

    Args:
        metric: the score.
        level: the probability.
        resamples: how often clusters are drawn.
    """
    low, high = bounds(metric.sums, metric.value, level, resamples)
    if isnan(low) and is_share(metric):
        low, high = unlike(metric.score, len(counting(metric.sums)), 0.0, 100.0, level)
    return Interval(value=metric.score, low=low, high=high, clusters=len(metric.clusters))


def bounds(
    sums: Float[np.ndarray, "clusters statistics"], value: Value, level: float, resamples: int
) -> tuple[float, float]:
    """The ends of the expanded BCa interval of a function of sums; NaN for a single cluster, and where all resamples are alike."""
    sums = counting(sums)
    number, whole = len(sums), sums.sum(0)
    if number < 2:
        return nan, nan
    score = float(value(whole))
    drawn = np.sort(value(resampled(sums, resamples)))
    near = 1e-9 * max(1.0, abs(score))
    if drawn[-1] - drawn[0] <= near:
        return nan, nan
    below, at_most = (np.searchsorted(drawn, score + step) / resamples for step in (-near, near))
    # Of equal scores, which discrete ones have many of, half are below.
    bias = ndtri(np.clip((below + at_most) / 2, 0.5 / resamples, 1 - 0.5 / resamples))
    left_out = value(whole - sums)
    apart = left_out.mean() - left_out
    spread = (apart**2).sum()
    # Without spread the score is a constant of single clusters, and nothing is skewed.
    acceleration = (apart**3).sum() / (6 * spread**1.5) if spread > near**2 else 0.0
    reach = np.sqrt(number / (number - 1)) * stdtrit(number - 1, (1 + level) / 2)
    ends = []
    for sign in (-1, 1):
        step = bias + sign * reach
        shrink = 1 - acceleration * step
        share = ndtr(bias + step / shrink) if shrink > 0 else float(sign > 0)
        ends.append(float(np.quantile(drawn, share)))
    return ends[0], ends[1]


def resampled(sums: Float[np.ndarray, "clusters statistics"], resamples: int) -> Float[np.ndarray, "draws statistics"]:
    """The sums over clusters drawn with replacement, as many as there are, that many times; always the same draws.

    Clusters with equal sums are told apart by nothing, so where they are many their numbers are drawn (multinomial), not they.
    """
    random = np.random.default_rng(0)
    kinds, counts = np.unique(sums, axis=0, return_counts=True)
    number = len(sums)
    few = 5 * len(kinds) < number
    rows = kinds if few else np.repeat(kinds, counts, axis=0)
    drawn = np.empty((resamples, sums.shape[1]))
    size = max(1, CELLS // len(rows))
    for start in range(0, resamples, size):
        chunk = drawn[start : start + size]
        if few:
            times = random.multinomial(number, counts / number, size=len(chunk))
        else:
            picked = random.integers(number, size=(len(chunk), number))
            picked += number * np.arange(len(chunk))[:, None]
            times = np.bincount(picked.ravel(), minlength=picked.size).reshape(picked.shape)
        chunk[:] = times.astype(float) @ rows
    return drawn


def counting(sums: Float[np.ndarray, "clusters statistics"]) -> Float[np.ndarray, "some statistics"]:
    """The clusters that add something; resamples of others would be scores of nothing."""
    return np.asarray(sums[(sums != 0).any(1)])


def is_share(metric: Metric) -> bool:
    """Whether the score is a share in per cent, of clusters that each have between none and all."""
    return metric.value is ratio and bool(((metric.sums[:, 0] >= 0) & (metric.sums[:, 0] <= metric.sums[:, 1])).all())


def unlike(value: float, clusters: int, least: float, most: float, level: float) -> tuple[float, float]:
    """The interval of a mean whose clusters all have the same value, if each could have from the least to the most.

    Clusters that are not like these may be as frequent as `unseen` says, and may have the least or the most. Whatever the values'
    distribution, each end misses the true mean with a probability of at most (1 - level) / 2: the lower one does only if every cluster
    is farther from the least than the mean is by the factor 1 / (1 - `unseen`), and by Markov's inequality one is with a probability
    of at most 1 - `unseen`, all of them with that to the power of their number, which is (1 - level) / 2.

    Args:
        value: what all clusters have.
        clusters: their number.
        least: the smallest value that a cluster can have.
        most: the largest.
        level: the interval's probability.
    """
    share = unseen(max(1, clusters), level)
    return value + share * (least - value), value + share * (most - value)


def unseen(clusters: int, level: float) -> float:
    """How frequent something may be that none of so many clusters showed: the upper end of its exact two-sided interval."""
    return float(1 - ((1 - level) / 2) ** (1 / clusters))


# --- two models -------------------------------------------------------------------------------------------------------


def paired(of: Metric, to: Metric, *, level: float = LEVEL, resamples: int = RESAMPLES) -> Difference:
    """What the score of one model is above another's on the same clusters.

    The interval is that of `interval`, with the same clusters drawn for both. The p value is that of a permutation test: if the models
    do not differ, their results on a cluster may be exchanged (for a mean: the difference changes its sign). Where the different
    results of all exchanges are few, it is exact (for one question a cluster that is McNemar's exact test); else it is estimated from
    random ones.

    Args:
        of: the score of the one.
        to: the score that it is compared with.
        level: the interval's probability.
        resamples: how often clusters are drawn, and signs.

    Raises:
        DataError: a cluster has a score of one model only.
    """
    of, to = on_same_clusters([of, to])
    difference = value_of_difference(of, to)
    both = np.concatenate([of.sums, to.sums], axis=1)
    low, high = bounds(both, difference, level, resamples)
    if isnan(low) and is_share(of) and is_share(to):
        low, high = unlike(of.score - to.score, len(counting(both)), -100.0, 100.0, level)
    return Difference(
        value=of.score - to.score, low=low, high=high, p=permuted(of, to, resamples), clusters=len(of.clusters)
    )


def value_of_difference(of: Metric, to: Metric) -> Value:
    """The difference of two scores as a function of both models' sums, one behind the other."""
    own = of.sums.shape[1]

    def difference(sums: Float[np.ndarray, "*draws both"]) -> Float[np.ndarray, "*draws"]:
        return np.asarray(of.value(sums[..., :own]) - to.value(sums[..., own:]))

    return difference


def on_same_clusters(metrics: Sequence[Metric]) -> list[Metric]:
    """The metrics with the clusters of the first, in its order.

    Raises:
        DataError: a cluster has a score of one model only; how many, and the first ones, are named.
    """
    order, found = metrics[0].clusters, []
    known = set(order)
    for metric in metrics:
        place = {name: index for index, name in enumerate(metric.clusters)}
        alone = [name for name in order if name not in place], [name for name in place if name not in known]
        if any(alone):
            told_alone = " and ".join(
                f"{len(names)} only in the {whose} (the first: {', '.join(map(repr, names[:3]))})"
                for names, whose in zip(alone, ("first", "second"), strict=True)
                if names
            )
            raise DataError(
                f"the two results are not of the same questions: of {len(known | set(place))} clusters, {told_alone}; only results "
                "on the same questions are compared; evaluate both models on the same files."
            )
        if len(place) != len(metric.clusters) or len(known) != len(order):
            raise DataError("a result names a cluster twice; every cluster has one row of sums.")
        found.append(replace(metric, sums=metric.sums[[place[name] for name in order]], clusters=order))
    return found


def permuted(of: Metric, to: Metric, resamples: int) -> float:
    """The share of exchanges of the two models' results within clusters that give as large a difference as the one seen."""
    if of.sums.shape != to.sums.shape:
        raise DataError("the two results count different things; scores of one benchmark and one version are compared.")
    whole, apart = of.sums.sum(0) + to.sums.sum(0), of.sums - to.sums
    apart = apart[(apart != 0).any(1)]
    if not len(apart):
        return 1.0
    # A cluster counts with either sign, so the two directions are one kind.
    first = np.take_along_axis(apart, (apart != 0).argmax(1)[:, None], 1)
    kinds, counts = np.unique(apart * np.sign(first), axis=0, return_counts=True)

    def difference(signed: Float[np.ndarray, "*draws statistics"]) -> Float[np.ndarray, "*draws"]:
        return np.asarray(of.value((whole + signed) / 2) - to.value((whole - signed) / 2))

    seen = abs(of.score - to.score)
    seen -= 1e-9 * max(1.0, seen)
    if prod((int(count) + 1 for count in counts), start=1) <= OUTCOMES:
        signed, probability = all_signs(kinds, counts)
        return min(1.0, float(probability[np.abs(difference(signed)) >= seen].sum()))
    hits = sum(int((np.abs(difference(signed)) >= seen).sum()) for signed in random_signs(kinds, counts, resamples))
    # The results as they are is one of the exchanges, so a p value is never 0.
    return (1 + hits) / (1 + resamples)


def all_signs(
    kinds: Float[np.ndarray, "kinds statistics"], counts: np.ndarray
) -> tuple[Float[np.ndarray, "outcomes statistics"], Float[np.ndarray, " outcomes"]]:
    """Every sum of the clusters' differences under a choice of signs, and its probability."""
    sums, logs = np.zeros((1, kinds.shape[1])), np.zeros(1)
    for row, count in zip(kinds, counts, strict=True):
        heads = np.arange(count + 1)
        chance = gammaln(count + 1) - gammaln(heads + 1) - gammaln(count - heads + 1) - count * np.log(2)
        sums = (sums[:, None] + (2 * heads - count)[None, :, None] * row).reshape(-1, len(row))
        logs = (logs[:, None] + chance).ravel()
    return sums, np.exp(logs)


def random_signs(
    kinds: Float[np.ndarray, "kinds statistics"], counts: np.ndarray, resamples: int
) -> list[Float[np.ndarray, "draws statistics"]]:
    """Sums of the clusters' differences under random signs, in chunks; always the same draws."""
    random, made = np.random.default_rng(0), []
    few = 5 * len(kinds) < counts.sum()
    rows = kinds if few else np.repeat(kinds, counts, axis=0)
    size = max(1, CELLS // len(rows))
    for start in range(0, resamples, size):
        draws = min(size, resamples - start)
        if few:
            signs = 2.0 * random.binomial(counts, 0.5, size=(draws, len(counts))) - counts
        else:
            bits = np.frombuffer(random.bytes(draws * (len(rows) // 8 + 1)), dtype=np.uint8).reshape(draws, -1)
            signs = 2.0 * np.unpackbits(bits, axis=1, count=len(rows)) - 1
        made.append(signs @ rows)
    return made


# --- over seeds -------------------------------------------------------------------------------------------------------


def hierarchical(of: Sequence[Metric], to: Sequence[Metric], *, level: float = LEVEL) -> Difference:
    """The mean difference of two ways of making a model, each run with several seeds, all runs on the same clusters.

    It holds for other seeds and other questions: its variance is that of two crossed samples, runs and clusters, and its interval and
    test are Student's, with degrees of freedom by Satterthwaite (1946). The hierarchical bootstrap, which draws seeds and then
    clusters, does not hold its level: it knows nothing of how little a few seeds tell, so with 5 seeds that differ its 95 % intervals
    miss the true difference more than twice as often as they should; and what belongs to a run on a cluster it counts twice, so where
    that is most of the noise they are too wide (tests/test_statistics.py measures both). A score that is no mean enters by its
    jackknife values over clusters.

    Args:
        of: the scores of the one, a metric for each seed.
        to: the scores of the other in the same order of seeds; a single one is a model without seeds, such as a teacher.
        level: the interval's probability.

    Raises:
        DataError: fewer than 2 seeds or clusters, different numbers of seeds, or a cluster that one run alone has.
    """
    seeds = len(of)
    if seeds < 2 or len(to) not in (1, seeds):
        raise DataError(
            f"{seeds} seeds of the one and {len(to)} of the other; the same number of at least 2 is accepted, or a single model to "
            "compare with; one run is compared with another by `paired`."
        )
    runs = on_same_clusters([*of, *to])
    pairs = list(zip(runs[:seeds], runs[seeds:] * (seeds if len(to) == 1 else 1), strict=True))
    clusters = len(runs[0].clusters)
    if clusters < 2:
        raise DataError("one cluster; at least 2 are needed to know how far questions differ.")
    effects = np.array([one.score - other.score for one, other in pairs])
    found = crossed(effects, np.stack([pseudo_values(one) - pseudo_values(other) for one, other in pairs]), level)
    # All runs alike tell no more than one of them.
    return replace(paired(*pairs[0], level=level), seeds=seeds) if found is None else found


def over_seeds(of: Sequence[Metric], *, level: float = LEVEL) -> Difference:
    """The mean score of one way of making a model, with an interval that holds for other seeds and other questions (`hierarchical`).

    The p value is that of a mean of 0. Of a single seed it is the score alone, with the interval of its questions (`interval`).
    A share's interval ends at 0 and 100 %: Student's may reach beyond, where no true value is.

    Raises:
        DataError: a cluster that one run alone has.
    """
    if len(of) == 1:
        alone = interval(of[0], level=level)
        return Difference(value=alone.value, low=alone.low, high=alone.high, p=nan, clusters=alone.clusters)
    runs = on_same_clusters(of)
    values = np.array([one.score for one in runs])
    if len(runs[0].clusters) < 2:
        return Difference(value=float(values.mean()), low=nan, high=nan, p=nan, clusters=1, seeds=len(runs))
    found = crossed(values, np.stack([pseudo_values(one) for one in runs]), level)
    if found is not None:
        if runs[0].unit != "%":
            return found
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 100.0))
    alone = interval(runs[0], level=level)
    return Difference(
        value=alone.value, low=alone.low, high=alone.high, p=nan, clusters=alone.clusters, seeds=len(runs)
    )


def gap_closed(
    of: Sequence[Metric], start: Sequence[Metric], goal: Metric, *, level: float = LEVEL
) -> Difference | None:
    """How much of the way from one score to another a third has gone, in per cent, over seeds; None where there is no way to go.

    100 (of - start) / (goal - start), all means over the same seeds and questions. The interval is that of the ratio's linear part
    (delta method), so it is good where the way is long beside its own uncertainty. Of a single seed it is that of its questions alone,
    by the bootstrap of `interval` with the same clusters drawn for all three.

    Args:
        of: a metric for each seed.
        start: likewise, such as those of students trained by SFT.
        goal: one model's, such as the teacher's.

    Raises:
        DataError: as `hierarchical`.
    """
    *runs, last = on_same_clusters([*of, *start, goal])
    number = len(of)
    ours, theirs = runs[:number], runs[number:]
    way = last.score - float(np.mean([one.score for one in theirs]))
    if abs(way) < 1e-9:
        return None
    share = float(np.mean([one.score - other.score for one, other in zip(ours, theirs, strict=True)])) / way
    if number == 1:
        low, high = bounds(
            np.concatenate([one.sums for one in runs + [last]], axis=1),
            part_of_the_way(ours[0], theirs[0], last),
            level,
            RESAMPLES,
        )
        return Difference(value=100 * share, low=low, high=high, p=nan, clusters=len(last.clusters))
    # Of - start - share (goal - start) is 0 on average; its spread over the way is the share's.
    scores = np.array([[one.score, other.score] for one, other in zip(ours, theirs, strict=True)])
    effects = scores[:, 0] - scores[:, 1] - share * (last.score - scores[:, 1])
    towards = pseudo_values(last)
    pseudo = np.stack(
        [
            pseudo_values(one) - pseudo_values(other) - share * (towards - pseudo_values(other))
            for one, other in zip(ours, theirs, strict=True)
        ]
    )
    left = crossed(effects, pseudo, level) if len(towards) > 1 else None
    if left is None:
        return Difference(value=100 * share, low=nan, high=nan, p=nan, clusters=len(towards), seeds=number)
    reach = 100 * (left.high - left.low) / 2 / abs(way)
    return Difference(
        value=100 * share,
        low=100 * share - reach,
        high=100 * share + reach,
        p=nan,
        clusters=left.clusters,
        seeds=number,
    )


def part_of_the_way(of: Metric, start: Metric, goal: Metric) -> Value:
    """100 (of - start) / (goal - start) as a function of the three metrics' sums, one behind the other; 0 where there is no way."""
    first, second = of.sums.shape[1], of.sums.shape[1] + start.sums.shape[1]

    def share(sums: Float[np.ndarray, "*draws three"]) -> Float[np.ndarray, "*draws"]:
        begin = start.value(sums[..., first:second])
        return ratio(np.stack([of.value(sums[..., :first]) - begin, goal.value(sums[..., second:]) - begin], axis=-1))

    return share


def crossed(
    effects: Float[np.ndarray, " runs"], pseudo: Float[np.ndarray, "runs clusters"], level: float
) -> Difference | None:
    """The mean effect over runs, with the interval and test of two crossed samples, runs and clusters; None if nothing varies.

    Args:
        effects: each run's.
        pseudo: what each cluster says of it by itself (`pseudo_values`).
        level: the interval's probability.
    """
    seeds, clusters = pseudo.shape
    by_run, by_cluster = pseudo.mean(1, keepdims=True), pseudo.mean(0, keepdims=True)
    rest = pseudo - by_run - by_cluster + pseudo.mean()
    # How far runs differ holds what belongs to a run on a cluster, so from the clusters' own part it is taken out.
    from_seeds = float(effects.var(ddof=1)) / seeds
    together = float((rest**2).sum()) / ((seeds - 1) * (clusters - 1)) / seeds
    from_clusters = max(0.0, float(by_cluster.var(ddof=1)) - together) / clusters
    variance = from_seeds + from_clusters
    mean = float(effects.mean())
    if variance <= (1e-9 * max(1.0, abs(mean))) ** 2:
        return None
    freedom = variance**2 / (from_seeds**2 / (seeds - 1) + from_clusters**2 / (clusters - 1))
    error = variance**0.5
    reach = float(stdtrit(freedom, (1 + level) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error))
    return Difference(value=mean, low=mean - reach, high=mean + reach, p=p, clusters=clusters, seeds=seeds)


def pseudo_values(metric: Metric) -> Float[np.ndarray, " clusters"]:
    """What each cluster says of the score by itself: the jackknife's pseudo-values, whose mean is the score if it is a mean."""
    number = len(metric.clusters)
    found: Float[np.ndarray, " clusters"] = number * metric.score - (number - 1) * metric.value(
        metric.sums.sum(0) - metric.sums
    )
    return found


# --- many comparisons -------------------------------------------------------------------------------------------------


def holm(ps: Sequence[float]) -> list[float]:
    """The p values corrected for there being several: at most 5 % of families have a true null hypothesis below 0.05 (Holm 1979)."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


def simultaneous(comparisons: int, level: float = LEVEL) -> float:
    """The level of each of several intervals at which all of them hold together with the given probability (Bonferroni)."""
    return 1 - (1 - level) / max(1, comparisons)


def compared(
    pairs: Sequence[Callable[[float], Difference]], level: float = LEVEL
) -> tuple[list[Difference], list[Difference]]:
    """Several differences, each at the level, and with simultaneous intervals and Holm's p values.

    Args:
        pairs: each makes its difference at a level, such as `lambda level: paired(of, to, level=level)`.
        level: the probability.
    """
    alone = [make(level) for make in pairs]
    wide = simultaneous(len(pairs), level)
    together = alone if len(pairs) == 1 else [make(wide) for make in pairs]
    return alone, [replace(one, p=p) for one, p in zip(together, holm([one.p for one in alone]), strict=True)]


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names whose (cost, score) no other one beats in score at the same or a lower cost, cheapest first."""
    best, chosen = -float("inf"), []
    for name, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1], item[0])):
        if score > best:
            best = score
            chosen.append(name)
    return chosen
