"""The estimators of TPA: what is expected of each is the exhaustive sum, whatever is left out; and their weights reach the loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align_ti.config import Iva, Objective, Tpa
from align_ti.errors import BatchError, ConfigError
from align_ti.interactions.estimators import draw_weighted, set_weights, without_replacement
from align_ti.interactions.transitions import Candidates, draw, plan_transitions, sampling_distribution
from align_ti.training.objective import distillation_loss
from align_ti.training.passes import candidates_for
from tests import plain, tiny
from tests.test_objective_properties import STUDENT, TEACHER, loss_and_gradient, split
from tests.test_objective_twins import assert_same, only

DRAWS = 40_000
WAYS = [("without_replacement", 0), ("top_and_tail", 0), ("top_and_tail", 2), ("stratified", 0)]
LOGITS = torch.tensor([2.0, -1.0, 0.3, 1.1, -3.0, 0.0, 1.4, -0.5])
VALUES = torch.tensor([0.2, 5.0, 1.0, 3.0, 40.0, 0.7, 2.0, 9.0], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighted(probability, gold, count, left_out, way, rows=DRAWS, seed=0):
    """Tokens and weights of many independent draws from one distribution."""
    name, enumerated = way
    return draw_weighted(
        probability.expand(rows, -1),
        torch.full((rows,), gold),
        count,
        left_out,
        name,
        enumerated=min(enumerated, count - 1),
        generator=seeded(seed),
    )


def expected(probability, values, count, left_out):
    """What plain draws come to: P(some candidate is kept), and its product with the mean value of kept tokens."""
    probability = probability[0].double()
    kept = torch.ones_like(probability)
    kept[list(left_out)] = 0
    share = float((probability * kept).sum())
    counts = 1 - (1 - min(share, 1.0)) ** count
    return counts, counts * float((probability * kept * values).sum()) / share


def within_five_errors(sample, value):
    error = float(sample.std()) / len(sample) ** 0.5
    assert abs(float(sample.mean()) - value) <= 5 * error + 1e-6, (float(sample.mean()), value, error)


@pytest.mark.parametrize("left_out", [(), (0,), (3, 6)])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_expectation_is_the_exhaustive_sum(way, count, left_out):
    for seed, options in enumerate(({}, {"top_k": 5}, {"temperature": 2.0, "top_p": 0.9})):
        probability = sampling_distribution(LOGITS[None], **options)
        gold = (3, 4, 5)[seed]
        tokens, weights = weighted(probability, gold, count, left_out, way, seed=seed)
        counts, mean = expected(probability, VALUES, count, left_out)
        within_five_errors((weights.double() * VALUES[tokens]).sum(-1), mean)
        within_five_errors((weights.sum(-1) > 0).double(), counts)
        assert not torch.isin(tokens[weights > 0], torch.tensor(left_out)).any()


def test_plain_draws_have_the_expectation_that_the_others_keep():
    """Exact: all 36 outcomes of two draws from six tokens."""
    probability = sampling_distribution(LOGITS[None, :6])
    outcomes = torch.tensor(list(itertools.product(range(6), repeat=2)))
    chance = probability[0][outcomes].prod(-1).double()
    plan = [
        plan_transitions(o[None, None], torch.ones(1, 1, dtype=bool), torch.tensor([[5]]), (0, 2)) for o in outcomes
    ]
    values = VALUES[:6]
    total = sum(
        c * ((p.branch_weights * values[p.branches.tokens]).sum() + p.gold_weights.sum() * values[5])
        for c, p in zip(chance, plan, strict=True)
    )
    counts, mean = expected(probability, values, 2, (0, 2))
    assert float(total) == pytest.approx(mean, rel=1e-6)
    assert float(sum(c * p.mass for c, p in zip(chance, plan, strict=True))) == pytest.approx(counts, rel=1e-6)


def test_set_weights_are_the_mean_over_orders_and_their_expectation_is_exact():
    """All sets of three of six tokens, each weighed by going through its orders."""
    q = LOGITS[:6].double().softmax(-1)
    total = torch.zeros(6, dtype=torch.float64)
    for chosen in itertools.combinations(range(6), 3):
        orders = list(itertools.permutations(chosen))
        chances = [q[a] * q[b] / (1 - q[a]) * q[c] / (1 - q[a] - q[b]) for a, b, c in orders]
        mean = torch.zeros(6, dtype=torch.float64)
        for (a, b, c), chance in zip(orders, chances, strict=True):
            # All but the last token exactly, the last with what is left.
            mean += (
                chance
                / sum(chances)
                * torch.zeros(6, dtype=torch.float64).index_put(
                    (torch.tensor([a, b, c]),), torch.stack([q[a], q[b], 1 - q[a] - q[b]])
                )
            )
        weights = set_weights(q[list(chosen)][None], 1 - q[list(chosen)].sum()[None])[0]
        assert torch.allclose(weights, mean[list(chosen)], rtol=1e-9)
        total[list(chosen)] += sum(chances) * weights
    assert torch.allclose(total, q, rtol=1e-9)


def test_draws_without_replacement_are_distinct_and_as_probable_as_one_after_the_other():
    q = LOGITS.softmax(-1).expand(DRAWS, -1)
    tokens, _ = without_replacement(q, 3, seeded())
    assert bool((tokens.sort(-1).values.diff(dim=-1) > 0).all())
    for a, b in ((0, 6), (6, 0), (3, 4)):
        chance = float(q[0, a] * q[0, b] / (1 - q[0, a]))
        within_five_errors(((tokens[:, 0] == a) & (tokens[:, 1] == b)).double(), chance)


@pytest.mark.parametrize("count", [5, 8])
def test_as_many_draws_as_tokens_give_the_exact_value_without_variance(count):
    probability = sampling_distribution(LOGITS[None], top_k=5)
    tokens, weights = weighted(probability, 0, count, (), ("without_replacement", 0), rows=200)
    estimates = (weights.double() * VALUES[tokens]).sum(-1)
    assert torch.allclose(estimates, torch.full_like(estimates, expected(probability, VALUES, count, ())[1]), rtol=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gold_and_top_count_exactly_and_a_constant_has_no_variance(way):
    probability = sampling_distribution(LOGITS[None])
    tokens, weights = weighted(probability, 2, 4, (), way, rows=500)
    assert torch.allclose(weights.sum(-1), torch.ones(500), atol=1e-5)
    if way[0] != "without_replacement":
        assert torch.allclose(torch.where(tokens == 2, weights, 0.0).sum(-1), probability[0, 2].expand(500), atol=1e-6)
    if way == ("top_and_tail", 2):
        for top in (0, 6):
            of = torch.where(tokens == top, weights, 0.0).sum(-1)
            assert torch.allclose(of, probability[0, top].expand(500), atol=1e-6)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_variance_is_no_larger_than_that_of_as_many_plain_draws(way):
    probability = sampling_distribution(LOGITS[None])
    values = VALUES.clamp(max=5)
    drawn = draw(LOGITS.expand(DRAWS, -1), 6, generator=seeded())
    tokens, weights = weighted(probability, 0, 6, (), way)
    ours = (weights.double() * values[tokens]).sum(-1).var()
    assert float(ours) < 1.03 * float(values[drawn].mean(-1).var())


@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
    count=st.integers(1, 6),
    way=st.sampled_from(WAYS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    left=st.integers(0, 7),
)
def test_weights_are_finite_and_sum_to_one_or_nothing(seed, spread, count, way, dtype, left):
    """Flat and sure distributions, every precision, tokens of probability 0, all tokens left out."""
    logits = (spread * torch.randn(5, 7, generator=seeded(seed))).to(dtype)
    probability = sampling_distribution(logits, top_k=4 if seed % 2 else None)
    gold = torch.randint(0, 7, (5,), generator=seeded(seed))
    left_out = (*range(left), 99)
    tokens, weights = draw_weighted(
        probability, gold, count, left_out, way[0], enumerated=min(way[1], count - 1), generator=seeded(seed)
    )
    assert tokens.shape == weights.shape == (5, count + 1)
    assert bool(((tokens >= 0) & (tokens < 7)).all())
    assert bool(((weights >= 0) & weights.isfinite()).all())
    total = weights.sum(-1)
    assert bool((((total - 1).abs() < 1e-5) | (total == 0)).all())
    assert not torch.isin(tokens[weights > 0], torch.tensor(left_out)).any()
    if left == 0:
        assert bool((total > 0).all())
    if left == 7:
        assert bool((total == 0).all())


# --- in the loss ------------------------------------------------------------------------------------------------------


def options(way) -> dict:
    return {"draw": way[0], "enumerated": way[1]}


@pytest.mark.parametrize("form", ["reuse", "packed"])
@pytest.mark.parametrize("source", ["student", "teacher"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_loss_equals_its_definition_with_the_weights_of_the_draw(way, source, form):
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"], seed=6)
    tpa = Tpa(form=form, source=source, **options(way))
    drawn = candidates_for(STUDENT, TEACHER, batch, tpa, seeded(3))
    assert drawn.weights is not None and bool((drawn.weights > 0).any())
    given_draws = distillation_loss(STUDENT, TEACHER, batch, only(tpa=tpa), candidates=drawn)
    assert_same(STUDENT, given_draws.loss, plain.weighted_tpa(STUDENT, TEACHER, batch, drawn.tokens, drawn.weights))
    own = distillation_loss(STUDENT, TEACHER, batch, only(tpa=tpa), generator=seeded(3))
    assert own.loss.item() == pytest.approx(given_draws.loss.item(), rel=1e-8)
    assert own.masses["tpa"] == given_draws.masses["tpa"]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_one_batch_equals_its_samples_accumulated_with_the_same_draws(way):
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"] * 2, seed=9)
    objective = Objective(iva=Iva(layer=1), tpa=Tpa(**options(way)))
    drawn = candidates_for(STUDENT, TEACHER, batch, objective.tpa, seeded(1))
    whole, gradient = loss_and_gradient(batch, objective, drawn)
    STUDENT.zero_grad(set_to_none=True)
    total = 0.0
    for index, (one, tokens) in enumerate(split(batch, drawn.tokens)):
        its = Candidates(tokens, drawn.weights[index : index + 1])
        out = distillation_loss(STUDENT, TEACHER, one, objective, its, step_masses=lambda _: whole.masses)
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-8)
    for name, expected_gradient in gradient.items():
        got = dict(STUDENT.named_parameters())[name].grad
        assert (got - expected_gradient).norm() <= 1e-5 * expected_gradient.norm() + 1e-6, name


def test_a_first_copy_without_weight_does_not_lose_the_token():
    tokens, weights = torch.tensor([[[7, 7, 9]]]), torch.tensor([[[0.0, 0.25, 0.75]]])
    plan = plan_transitions(Candidates(tokens, weights), torch.ones(1, 1, dtype=bool), torch.tensor([[9]]), ())
    assert plan.branches.tokens.tolist() == [7]
    assert plan.branch_weights.tolist() == [0.25]
    assert plan.gold_weights.tolist() == [[0.75]]
    assert (int(plan.mass), int(plan.kept)) == (1, 2)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"draw": "stratified", "source": "gold"}, "nothing is drawn"),
        ({"enumerated": 1}, "give draw: top_and_tail"),
        ({"draw": "top_and_tail", "enumerated": 4}, "biased"),
        ({"draw": "without_replacement", "candidates": 9}, "8 at most"),
        ({"draw": "systematic"}, "with_replacement"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_way_out(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Tpa(**wrong)


def test_weights_that_do_not_fit_are_refused():
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    tokens = tiny.candidates(batch)
    with pytest.raises(BatchError, match="equal shapes"):
        Candidates(tokens, torch.ones(*tokens.shape[:2], 2))
    with pytest.raises(BatchError, match="0 or more"):
        distillation_loss(STUDENT, TEACHER, batch, only(tpa=Tpa()), Candidates(tokens, -torch.ones(tokens.shape)))
