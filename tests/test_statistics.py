"""Intervals and tests against closed forms, and by simulation: how often they are wrong is what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from align_ti.errors import DataError
from align_ti.evaluation.metrics import Metric, mean_of, ratio
from align_ti.evaluation.statistics import (
    bounds,
    compared,
    hierarchical,
    holm,
    interval,
    paired,
    permuted,
    random_signs,
    resampled,
    simultaneous,
    told,
    unseen,
)


def names(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def shares(hits, sizes) -> Metric:
    sums = np.stack([np.asarray(hits, dtype=float), np.broadcast_to(sizes, np.shape(hits)).astype(float)], axis=-1)
    return Metric(sums, ratio, names(len(sums)))


def f1(sums):
    true, false, missed = sums[..., 0], sums[..., 1], sums[..., 2]
    return np.asarray(100 * 2 * true / np.maximum(2 * true + false + missed, 1))


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).random(3000)
    found = interval(mean_of(values.tolist(), range(3000)))
    half = 1.96 * 100 * values.std() / 3000**0.5
    assert found.value == pytest.approx(100 * values.mean())
    assert (found.value - found.low, found.high - found.value) == (pytest.approx(half, rel=0.04),) * 2
    wide = interval(mean_of(values.tolist(), range(3000)), level=0.99)
    assert wide.high - wide.low == pytest.approx(2 * half * 2.576 / 1.96, rel=0.05)


def test_the_interval_of_few_clusters_is_students():
    values = np.random.default_rng(1).normal(0.5, 0.1, 12)
    found = interval(mean_of(values.tolist(), range(12)))
    half = 100 * stats.t.ppf(0.975, 11) * values.std(ddof=1) / 12**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.12)


@pytest.mark.parametrize("clusters", [1, 3, 30])
def test_the_interval_of_none_and_of_all_is_the_exact_one(clusters):
    none, every = (interval(mean_of([worth] * clusters, range(clusters))) for worth in (0.0, 1.0))
    upper = 100 * stats.beta.ppf(0.975, 1, clusters)
    assert (none.low, none.high) == (0, pytest.approx(upper))
    assert (every.low, every.high) == (pytest.approx(100 - upper), 100)


def test_one_cluster_tells_next_to_nothing():
    half = interval(mean_of([0.5], ["a"]))
    assert (half.low, half.high) == pytest.approx((1.25, 98.75))
    nats = interval(Metric(np.array([[3.0, 4.0]]), lambda sums: np.asarray(sums[..., 0] / sums[..., 1]), ("a",)))
    assert nats.value == 0.75
    assert np.isnan([nats.low, nats.high]).all()
    assert told(nats) == {"value": 0.75, "low": None, "high": None, "clusters": 1}


def mcnemar(only_of: int, only_to: int, both: int = 5, neither: int = 4) -> tuple[Metric, Metric]:
    of = [1] * only_of + [0] * only_to + [1] * both + [0] * neither
    to = [0] * only_of + [1] * only_to + [1] * both + [0] * neither
    return shares(of, 1), shares(to, 1)


@pytest.mark.parametrize(("only_of", "only_to"), [(9, 2), (5, 5), (0, 7), (60, 35), (0, 0), (1, 0)])
def test_one_question_a_cluster_is_mcnemars_exact_test(only_of, only_to):
    of, to = mcnemar(only_of, only_to)
    expected = stats.binomtest(only_of, only_of + only_to).pvalue if only_of + only_to else 1.0
    assert paired(of, to).p == pytest.approx(expected)


def test_the_paired_interval_of_a_mean_is_the_normal_one_of_the_differences():
    random = np.random.default_rng(2)
    shared = random.normal(0.5, 0.2, 2000)
    of, to = (shared + random.normal(shift, 0.05, 2000) for shift in (0.004, 0))
    found = paired(mean_of(of.tolist(), range(2000)), mean_of(to.tolist(), range(2000)))
    half = 1.96 * 100 * (of - to).std() / 2000**0.5
    assert found.value == pytest.approx(100 * (of - to).mean())
    assert (found.value - found.low, found.high - found.value) == (pytest.approx(half, rel=0.05),) * 2
    assert found.p == pytest.approx(stats.ttest_rel(of, to).pvalue, abs=0.01)


def test_a_few_clusters_go_through_every_exchange():
    random = np.random.default_rng(3)
    of, to = (mean_of(random.random(8).tolist(), range(8)) for _ in range(2))
    apart = of.sums[:, 0] - to.sums[:, 0]
    every = [apart @ [1 if code >> bit & 1 else -1 for bit in range(8)] for code in range(256)]
    assert paired(of, to).p == pytest.approx(np.mean(np.abs(every) >= abs(apart.sum()) - 1e-12))


def test_a_score_that_is_no_mean_is_exchanged_as_a_whole():
    random = np.random.default_rng(4)
    of, to = (Metric(random.integers(0, 4, (6, 3)).astype(float), f1, names(6)) for _ in range(2))
    every = []
    for code in range(64):
        swapped = np.array([bool(code >> bit & 1) for bit in range(6)])[:, None]
        one, other = np.where(swapped, to.sums, of.sums), np.where(swapped, of.sums, to.sums)
        every.append(float(f1(one.sum(0)) - f1(other.sum(0))))
    assert paired(of, to).p == pytest.approx(np.mean(np.abs(every) >= abs(of.score - to.score) - 1e-9))


def test_random_exchanges_come_near_to_all_of_them(monkeypatch):
    of, to = mcnemar(60, 38)
    exact = permuted(of, to, 10_000)
    spread = Metric(of.sums + np.arange(107)[:, None] * [1e-13, 0], ratio, of.clusters)
    monkeypatch.setattr("align_ti.evaluation.statistics.OUTCOMES", 0)
    assert permuted(of, to, 20_000) == pytest.approx(exact, abs=0.01)
    # Every cluster of a kind of its own: signs are drawn bit by bit.
    assert permuted(spread, to, 20_000) == pytest.approx(exact, abs=0.01)
    (signed,) = random_signs(np.eye(40), np.ones(40, dtype=int), 4000)
    assert set(np.unique(signed)) == {-1.0, 1.0}
    assert np.abs(signed.mean(0)).max() < 0.08


def test_resampled_sums_have_the_moments_of_the_bootstrap():
    random = np.random.default_rng(5)
    many, few = random.random((50, 2)), random.integers(0, 2, (50, 2)).astype(float)
    for sums in (many, few):
        drawn = resampled(sums, 20_000)
        assert drawn.mean(0) == pytest.approx(sums.sum(0), rel=0.01)
        assert np.cov(drawn.T) == pytest.approx(50 * np.cov(sums.T, bias=True), rel=0.1, abs=0.3)


def test_the_mean_over_seeds_is_students_where_clusters_are_many():
    effects, clusters = np.array([0.02, 0.05, 0.03, 0.06, 0.01]), 400
    of = [mean_of([0.5 + effect] * clusters, range(clusters)) for effect in effects]
    found = hierarchical(of, [mean_of([0.5] * clusters, range(clusters))])
    expected = stats.ttest_1samp(100 * effects, 0)
    assert (found.value, found.p, found.seeds) == (pytest.approx(3.4), pytest.approx(expected.pvalue), 5)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_runs_that_are_alike_leave_the_clusters_noise():
    values = np.random.default_rng(6).normal(0.05, 0.3, 60)
    of = [mean_of((0.5 + values).tolist(), range(60))] * 3
    to = [mean_of([0.5] * 60, range(60))] * 3
    expected = stats.ttest_1samp(100 * values, 0)
    found = hierarchical(of, to)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    nothing, alike = hierarchical(to, to), 100 * unseen(60, 0.95)
    assert (nothing.value, nothing.low, nothing.high, nothing.p) == (0, pytest.approx(-alike), pytest.approx(alike), 1)
    # Runs whose clusters all differ by the same were once certain: an interval of no width, and p = 0.
    always = hierarchical([mean_of([0.75] * 60, range(60))] * 3, to)
    assert always.low < always.value == 25 < always.high and 0 < always.p < 1e-10


def test_holm_and_bonferroni():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert simultaneous(5) == pytest.approx(0.99)
    assert simultaneous(1) == pytest.approx(0.95)
    pairs = [mcnemar(30, 10), mcnemar(20, 18)]
    alone, together = compared([lambda level, p=pair: paired(*p, level=level) for pair in pairs])
    assert [one.p for one in together] == holm([one.p for one in alone])
    assert all(wide.low < one.low < one.high < wide.high for one, wide in zip(alone, together, strict=True))


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30), st.randoms())
def test_neither_order_nor_sides_matter(rows, random):
    of, to = (shares([row[side] for row in rows], 5) for side in (0, 1))
    found = paired(of, to, resamples=500)
    assert -100 <= found.low <= found.value <= found.high <= 100
    assert 0 < found.p <= 1
    order = list(range(len(rows)))
    random.shuffle(order)
    moved = Metric(to.sums[order], ratio, tuple(to.clusters[index] for index in order))
    again = paired(of, moved, resamples=500)
    assert (again.value, again.low, again.high, again.p) == pytest.approx((found.value, found.low, found.high, found.p))
    mixed = [Metric(one.sums[order], ratio, names(len(rows))) for one in (of, to)]
    assert interval(mixed[0], resamples=500) == interval(of, resamples=500)
    assert paired(*mixed, resamples=500).p == pytest.approx(found.p)
    assert paired(to, of, resamples=500).value == -found.value


def test_results_on_other_questions_are_refused_by_name():
    of, to = shares([1, 0, 1], 1), Metric(np.ones((2, 2)), ratio, ("1", "x"))
    with pytest.raises(
        DataError, match=r"of 4 clusters, 2 only in the first \(the first: '0', '2'\) and 1 only in the second"
    ):
        paired(of, to)
    with pytest.raises(DataError, match="names a cluster twice"):
        paired(of, Metric(np.ones((4, 2)), ratio, ("0", "1", "2", "2")))
    with pytest.raises(DataError, match="count different things"):
        paired(of, Metric(np.ones((3, 3)), f1, names(3)))
    with pytest.raises(DataError, match="3 seeds of the one and 2 of the other"):
        hierarchical([of] * 3, [of] * 2)
    with pytest.raises(DataError, match="1 seeds of the one"):
        hierarchical([of], [of])
    with pytest.raises(DataError, match="one cluster"):
        hierarchical([shares([1], 1)] * 2, [shares([0], 1)])


def test_two_models_that_answer_alike_may_still_differ_on_other_questions():
    of = shares([1, 0] * 50, 1)
    found = paired(of, of)
    assert (found.value, found.p) == (0, 1)
    assert (found.low, found.high) == pytest.approx((-100 * unseen(100, 0.95), 100 * unseen(100, 0.95)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 6), st.integers(1, 6), st.integers(0, 5))
def test_clusters_that_are_all_alike_leave_room_for_others(clusters, hits, more, empty):
    # Two clusters with half of their questions right had the interval from 50 to 50 %.
    size = hits + more
    of = Metric(np.array([[hits, size]] * clusters + [[0, 0]] * empty, dtype=float), ratio, names(clusters + empty))
    found, share = interval(of, resamples=200), hits / size
    # The ends are the means if clusters as frequent as nobody would have missed had none right, or all.
    rest = 0.025 ** (1 / clusters)
    assert (found.low, found.high) == pytest.approx((100 * share * rest, 100 * (1 - (1 - share) * rest)))
    assert found.low <= found.value <= found.high and found.high - found.low == pytest.approx(100 * (1 - rest))
    to = Metric(of.sums * [0, 1], ratio, of.clusters)
    apart = paired(of, to, resamples=200)
    assert (apart.low, apart.high) == pytest.approx((100 * (share * rest - 1 + rest), 100 * (share * rest + 1 - rest)))
    if share == 1:
        # A difference as large as can be excludes 0 exactly if the test does.
        assert (apart.low > 0) == (apart.p < 0.05)


def test_a_score_that_is_no_share_has_no_interval_where_all_clusters_are_alike():
    alike = Metric(np.array([[2.0, 1.0, 1.0]] * 5), f1, names(5))
    assert told(interval(alike)) == {"value": alike.score, "low": None, "high": None, "clusters": 5}
    assert np.isnan([paired(alike, alike).low, paired(alike, alike).high]).all() and paired(alike, alike).p == 1


# --- simulations ------------------------------------------------------------------------------------------------------


def draw(random, clusters, chance, alike, questions=4):
    """Hits of clusters whose chances differ, by a beta distribution with this correlation of the questions of one."""
    scale = 1 / alike - 1
    return random.binomial(questions, random.beta(chance * scale, (1 - chance) * scale, clusters))


@pytest.mark.parametrize(("clusters", "chance"), [(12, 0.6), (40, 0.85), (100, 0.5)])
def test_about_95_of_100_intervals_hold_the_truth(clusters, chance):
    random, missed, simple, runs = np.random.default_rng(7), 0, 0, 400
    for _ in range(runs):
        metric = shares(draw(random, clusters, chance, 0.25), 4)
        low, high = bounds(metric.sums, ratio, 0.95, 1000)
        missed += not low <= 100 * chance <= high
        ends = np.percentile(ratio(resampled(metric.sums, 1000)), [2.5, 97.5])
        simple += not ends[0] <= 100 * chance <= ends[1]
    # Three standard errors of a share of 400 are 3.3 points.
    assert 0.017 <= missed / runs <= 0.083
    # The plain percentile interval, which is why it is not used: too narrow for few clusters.
    assert simple >= missed


@pytest.mark.parametrize(("clusters", "questions", "chance"), [(2, 2, 0.5), (2, 4, 0.85), (3, 1, 0.5), (4, 2, 0.9)])
def test_where_few_clusters_are_alike_the_truth_is_missed_as_seldom_as_promised(clusters, questions, chance):
    random, alike, missed, runs = np.random.default_rng(12), 0, 0, 2000
    for hits in random.binomial(questions, random.beta(4 * chance, 4 * (1 - chance), (runs, clusters))):
        if (hits == hits[0]).all():
            alike += 1
            found = interval(shares(hits, questions), resamples=20)
            missed += not found.low <= 100 * chance <= found.high
    # Cases in which an interval of no width would miss it nearly always are not rare; the bound of 5 % is of all runs.
    assert alike / runs > 0.1
    assert missed / runs <= 0.05


def test_of_few_clusters_intervals_miss_the_truth_in_at_most_15_of_100():
    random, runs = np.random.default_rng(13), 300
    for clusters, chance in ((2, 0.5), (4, 0.5), (7, 0.85)):
        missed = 0
        for _ in range(runs):
            found = interval(shares(draw(random, clusters, chance, 0.25), 4), resamples=500)
            missed += not found.low <= 100 * chance <= found.high
        # Two standard errors of a share of 300 are 4 points.
        assert missed / runs <= 0.19


def test_the_interval_of_an_f1_holds_the_truth():
    random, missed, runs = np.random.default_rng(8), 0, 300
    for _ in range(runs):
        sums = random.multinomial(6, [0.5, 0.1, 0.15, 0.25], size=30)[:, :3].astype(float)
        low, high = bounds(sums, f1, 0.95, 1000)
        missed += not low <= 100 * 2 * 0.5 / (2 * 0.5 + 0.1 + 0.15) <= high
    assert 0.012 <= missed / runs <= 0.088


def test_without_an_effect_the_interval_excludes_0_and_p_is_small_in_about_5_of_100():
    random, excluded, significant, runs = np.random.default_rng(9), 0, 0, 400
    for _ in range(runs):
        chances = random.beta(2, 1, 40)
        of, to = (shares(random.binomial(4, chances), 4) for _ in range(2))
        found = paired(of, to, resamples=1000)
        excluded += not found.low <= 0 <= found.high
        significant += found.p <= 0.05
    assert 0.017 <= excluded / runs <= 0.083
    assert 0.017 <= significant / runs <= 0.083


def study(random, seeds, clusters, by_seed, by_run_and_cluster):
    """Two variants that differ by chance alone: runs differ as a whole, and on each cluster."""
    easy = random.normal(0.5, 0.1, clusters)
    return [
        [
            shares(easy + random.normal(0, by_seed) + random.normal(0, by_run_and_cluster, clusters), 1)
            for _ in range(seeds)
        ]
        for _ in range(2)
    ]


def bootstrapped(of, to, random, draws=200):
    """The plain hierarchical bootstrap: seeds are drawn, then clusters, the same for all runs."""
    apart = np.stack([one.sums[:, 0] - other.sums[:, 0] for one, other in zip(of, to, strict=True)])
    seeds, clusters = apart.shape
    drawn_seeds = random.multinomial(seeds, [1 / seeds] * seeds, draws) / seeds
    drawn_clusters = random.multinomial(clusters, [1 / clusters] * clusters, draws) / clusters
    means = np.einsum("ds,sc,dc->d", drawn_seeds, apart, drawn_clusters)
    return np.percentile(100 * means, [2.5, 97.5])


@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_run_and_cluster", "plain"),
    [
        # With 5 seeds the plain bootstrap excludes 0 in about 15 of 100, with 3 in 25.
        (5, 0.1, 0.05, (0.10, 0.22)),
        (3, 0.1, 0.05, (0.17, 0.36)),
        # And where runs differ on single clusters alone, it hardly ever does.
        (5, 0.0, 0.3, (0.0, 0.03)),
    ],
)
def test_over_seeds_without_an_effect_the_interval_excludes_0_in_about_5_of_100(
    seeds, by_seed, by_run_and_cluster, plain
):
    random, excluded, by_bootstrap, runs = np.random.default_rng(10), 0, 0, 400
    for _ in range(runs):
        of, to = study(random, seeds, 60, by_seed, by_run_and_cluster)
        found = hierarchical(of, to)
        excluded += not found.low <= 0 <= found.high
        low, high = bootstrapped(of, to, random)
        by_bootstrap += not low <= 0 <= high
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
    assert 0.017 <= excluded / runs <= 0.083
    assert plain[0] <= by_bootstrap / runs <= plain[1]


def test_clusters_that_variants_share_their_favour_of_count_as_noise_of_questions():
    random, excluded, runs = np.random.default_rng(11), 0, 400
    for _ in range(runs):
        of, to = study(random, 4, 30, 0.02, 0.1)
        favour = random.normal(0, 0.2, 30)
        of = [Metric(one.sums + favour[:, None] * [1, 0], ratio, one.clusters) for one in of]
        found = hierarchical(of, to)
        excluded += not found.low <= 0 <= found.high
    assert 0.017 <= excluded / runs <= 0.083
