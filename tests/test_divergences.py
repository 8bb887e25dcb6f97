"""Every divergence against its plain twin, autograd, and the rules; recipes that name one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align_ti import Divergence, Iva, Kd, Objective, Tpa
from align_ti.errors import ConfigError
from align_ti.losses.divergences.alpha_beta import AlphaBeta
from align_ti.losses.divergences.base import read_divergence
from align_ti.registry import names
from align_ti.testing import check_divergence
from align_ti.testing.divergences import values_of


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mixed(p, q, share):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def jensen_shannon(beta):
    return lambda p, q: beta * kl(p, mixed(p, q, beta)) + (1 - beta) * kl(q, mixed(p, q, beta))


def adaptive(mu):
    def value(p, q):
        order = sorted(range(len(p)), key=lambda token: -p[token])
        head, held = [], 0.0
        for token in order:
            if held >= mu:
                break
            head, held = [*head, token], held + p[token]
        gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
        share = sum(gaps[token] for token in head) / sum(gaps) if sum(gaps) else 0.5
        return share * kl(p, q) + (1 - share) * kl(q, p)

    return value


def alpha_beta(a, b):
    def value(p, q):
        terms = (
            x**a * y**b - a / (a + b) * x ** (a + b) - b / (a + b) * y ** (a + b) for x, y in zip(p, q, strict=True)
        )
        return -sum(terms) / (a * b)

    return value


TWINS = [
    ("forward_kl", kl),
    ("reverse_kl", lambda p, q: kl(q, p)),
    ("jensen_shannon", jensen_shannon(0.5)),
    ({"name": "jensen_shannon", "beta": 0.1}, jensen_shannon(0.1)),
    ({"name": "jensen_shannon", "beta": 0.9}, jensen_shannon(0.9)),
    ("skew_kl", lambda p, q: kl(p, mixed(p, q, 0.1))),
    ({"name": "skew_kl", "alpha": 0.5}, lambda p, q: kl(p, mixed(p, q, 0.5))),
    ({"name": "skew_kl", "alpha": 0.0}, kl),
    ("skew_reverse_kl", lambda p, q: kl(q, mixed(q, p, 0.1))),
    ({"name": "skew_reverse_kl", "alpha": 0.6}, lambda p, q: kl(q, mixed(q, p, 0.6))),
    ("adaptive_kl", adaptive(0.5)),
    ({"name": "adaptive_kl", "mu": 0.9}, adaptive(0.9)),
    ({"name": "adaptive_kl", "mu": 1.0}, kl),
    ("alpha_beta", alpha_beta(0.2, 0.7)),
    ({"name": "alpha_beta", "alpha": 1.0, "beta": 1.5}, alpha_beta(1.0, 1.5)),
    ({"name": "alpha_beta", "alpha": 1.0, "beta": 0.0}, kl),
    ({"name": "alpha_beta", "alpha": 0.0, "beta": 1.0}, lambda p, q: kl(q, p)),
    ({"name": "alpha_beta", "alpha": 0.5, "beta": 0.0}, alpha_beta(0.5, 1e-9)),
    ({"name": "alpha_beta", "alpha": 0.0, "beta": 0.3}, None),
    ("total_variation", lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2),
]


def lists(twin):
    return None if twin is None else lambda p, q: float(twin(p.tolist(), q.tolist()))


@pytest.mark.parametrize(("divergence", "twin"), TWINS, ids=[str(one) for one, _ in TWINS])
def test_a_divergence_keeps_the_rules_and_equals_its_plain_twin(divergence, twin):
    # Near its limit the plain formula of alpha-beta loses digits to cancellation, so there it is compared apart.
    near_limit = isinstance(divergence, dict) and divergence.get("alpha") == 0.5 and divergence.get("beta") == 0.0
    check_divergence(divergence, None if near_limit else lists(twin))


def test_every_built_in_divergence_has_a_twin():
    named = {one if isinstance(one, str) else one["name"] for one, _ in TWINS}
    assert named == set(names("divergence"))


@given(seed=st.integers(0, 30), power=st.floats(0.2, 2.0))
def test_the_limits_of_alpha_beta_are_those_of_its_formula(seed, power):
    torch.manual_seed(seed)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    for at, near in (
        (AlphaBeta(alpha=power, beta=0.0), AlphaBeta(alpha=power, beta=1e-5)),
        (AlphaBeta(alpha=0.0, beta=power), AlphaBeta(alpha=1e-5, beta=power)),
        (AlphaBeta(alpha=0.0, beta=0.0), AlphaBeta(alpha=1e-4, beta=1e-4)),
    ):
        torch.testing.assert_close(
            values_of(at, student, teacher)[0], values_of(near, student, teacher)[0], rtol=2e-3, atol=1e-6
        )
        ours, others = (values_of(of, student, teacher, slope=True)[1] for of in (at, near))
        torch.testing.assert_close(ours, others, rtol=2e-3, atol=2e-3)


@given(seed=st.integers(0, 30))
def test_divergences_meet_where_they_should(seed):
    torch.manual_seed(seed)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)

    def value(name, **options):
        return values_of(read_divergence({"name": name, **options}), student, teacher)[0]

    forward, reverse = value("forward_kl"), value("reverse_kl")
    torch.testing.assert_close(value("jensen_shannon", beta=1e-6) / 1e-6, forward, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(value("jensen_shannon", beta=1 - 1e-6) / 1e-6, reverse, rtol=1e-3, atol=1e-6)
    between = value("adaptive_kl")
    assert bool((between <= torch.maximum(forward, reverse) + 1e-12).all())
    assert bool((between >= torch.minimum(forward, reverse) - 1e-12).all())
    assert bool((value("total_variation") <= 1).all())
    assert bool((value("skew_kl", alpha=0.1) <= -math.log(0.1)).all())
    # Pinsker: total variation squared is at most half of KL.
    assert bool((value("total_variation") ** 2 <= forward / 2 + 1e-12).all())


PULL = {
    "forward_kl": 1,
    "reverse_kl": 1,
    "jensen_shannon": 0.25,
    "skew_kl": 0.81,
    "skew_reverse_kl": 0.81,
    "adaptive_kl": 1,
}
"""What docs/method.md says a divergence is near p = q, in units of forward KL."""


@pytest.mark.parametrize("name", PULL)
def test_near_the_teacher_a_divergence_is_the_documented_share_of_forward_kl(name):
    torch.manual_seed(0)
    teacher = torch.randn(4, 9, dtype=torch.float64)
    student = teacher + 1e-4 * torch.randn(4, 9, dtype=torch.float64)
    of, unit = (values_of(read_divergence(one), student, teacher)[0] for one in (name, "forward_kl"))
    torch.testing.assert_close(of / unit, torch.full_like(unit, PULL[name]), rtol=2e-3, atol=0)


def test_the_head_of_adaptive_kl_holds_mu_or_more_and_ties_go_by_id():
    teacher = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.2, 0.5]], dtype=torch.float64).log()
    for mu, head in ((0.4, 0.1), (0.5, 0.3), (0.8, 0.3), (0.81, 0.6), (1.0, 0.6)):
        share = read_divergence({"name": "adaptive_kl", "mu": mu}).head_share(teacher, student)
        assert share.item() == pytest.approx(head / 0.6), mu


def test_a_divergence_without_a_slope_written_down_gets_autograds():
    class Squared(Divergence):
        name = "squared"

        def values(self, log_p, log_q):
            return (log_p.exp() - log_q.exp()).square().sum(-1)

    check_divergence(Squared(), lambda p, q: float((p - q).square().sum()))


def test_a_wrong_slope_is_found():
    class Wrong(Divergence):
        name = "wrong"

        def values(self, log_p, log_q):
            return (log_p.exp() - log_q.exp()).square().sum(-1)

        def with_slope(self, log_p, log_q):
            return self.values(log_p, log_q), log_q.exp() - log_p.exp()

    with pytest.raises(AssertionError, match="slope of wrong against autograd"):
        check_divergence(Wrong())


def test_a_negative_divergence_and_one_that_is_not_zero_are_found():
    class Entropy(Divergence):
        name = "cross_entropy"

        def values(self, log_p, log_q):
            return -(log_p.exp() * log_q).sum(-1)

    class Gap(Divergence):
        name = "gap"

        def values(self, log_p, log_q):
            return log_p[:, 0] - log_q[:, 0]

    with pytest.raises(AssertionError, match="where student equals teacher"):
        check_divergence(Entropy())
    with pytest.raises(AssertionError, match="above 0 is expected"):
        check_divergence(Gap())


@pytest.mark.parametrize("term", [Kd, Iva, Tpa])
def test_terms_take_a_divergence_by_name_or_with_options(term):
    by_name = term(divergence="reverse_kl")
    assert by_name.divergence.name == "reverse_kl"
    with_options = term(divergence={"name": "skew_kl", "alpha": 0.3})
    assert with_options.divergence.alpha == 0.3
    assert term().divergence.name == "forward_kl"
    again = Objective.model_validate(Objective(**{term.name: with_options}).model_dump(mode="json"))
    assert getattr(again, term.name).divergence == with_options.divergence


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("skew_lk", "objective.kd.divergence is no known divergence: 'skew_lk'; did you mean 'skew_kl'?"),
        ({"name": "skew_kl", "alhpa": 0.2}, "objective.kd.divergence.alhpa is no known option; did you mean 'alpha'?"),
        ({"name": "skew_kl", "alpha": 1.5}, "objective.kd.divergence.alpha is 1.5; accepted: less than 1"),
        ({"name": "jensen_shannon", "beta": 0.0}, "objective.kd.divergence.beta is 0.0; accepted: greater than 0"),
        ({"alpha": 0.2}, "objective.kd.divergence is {'alpha': 0.2}; accepted: the name of a divergence (forward_kl"),
        (7, "objective.kd.divergence is 7; accepted: the name of a divergence (forward_kl"),
        ({"name": "forward_kl", "alpha": 0.2}, "objective.kd.divergence.alpha is no known option"),
    ],
)
def test_a_wrong_divergence_is_named_with_its_place(given, sentence):
    with pytest.raises(ConfigError) as caught:
        Objective(kd={"divergence": given})
    assert sentence in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        Kd(divergence=given)
    assert sentence in str(caught.value)
