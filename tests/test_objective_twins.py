"""Every term and its gradient equal a loop of full forwards written from the definitions."""

from __future__ import annotations

import pytest
from torch import Tensor

from align_ti.config import Iva, Kd, Objective, Sft, Tpa
from align_ti.training.objective import distillation_loss
from tests import plain, tiny

STUDENT, TEACHER = 1, 2
CASES = [(name, side) for name in tiny.COMPOSITIONS for side in ("right", "left")]


def only(**terms) -> Objective:
    """An objective of the named terms alone."""
    off = {"sft": Sft(weight=0.0), "kd": Kd(weight=0.0), "iva": Iva(weight=0.0), "tpa": Tpa(weight=0.0)}
    return Objective(**{**off, **terms})


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }


EAGER = 1e-6
"""Relative tolerance where the twin takes its weights from transformers' eager attention, whose softmax is float32 always."""

GRADIENT = 1e-6
"""Relative tolerance of gradients: Qwen3's RMSNorm computes in float32 whatever the model's precision, so that the same row in a
batch of another shape can differ in float32's last digit there."""


def assert_same(student, ours: Tensor, plain_value: Tensor, rtol: float = 1e-8) -> None:
    """Equal values, and equal gradients in every parameter of the student."""
    assert ours.item() == pytest.approx(plain_value.item(), rel=rtol, abs=1e-12)
    if not plain_value.requires_grad:
        return
    got, expected = gradients(student, ours), gradients(student, plain_value)
    assert got.keys() == expected.keys()
    whole = sum(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 10 * GRADIENT * gradient.norm() + 0.01 * GRADIENT * whole, name


@pytest.fixture(scope="module")
def pair():
    return tiny.model(STUDENT, hidden=32), tiny.model(TEACHER, hidden=48, layers=3)


@pytest.mark.parametrize(("name", "side"), CASES)
def test_sft_equals_its_definition(pair, name, side):
    student, _ = pair
    batch = tiny.batch(tiny.COMPOSITIONS[name], seed=3, side=side)
    out = distillation_loss(student, None, batch, only(sft=Sft()))
    assert_same(student, out.loss, plain.sft(student, batch))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("name", "side"), CASES)
def test_kd_equals_its_definition(pair, name, side, temperature):
    student, teacher = pair
    batch = tiny.batch(tiny.COMPOSITIONS[name], seed=4, side=side)
    out = distillation_loss(student, teacher, batch, only(kd=Kd(temperature=temperature)))
    assert_same(student, out.loss, plain.kd(student, teacher, batch, temperature))


@pytest.mark.parametrize("images", ["together", "separately"])
@pytest.mark.parametrize(("name", "side"), CASES)
def test_iva_equals_its_definition(pair, name, side, images):
    student, teacher = pair
    batch = tiny.batch(tiny.COMPOSITIONS[name], seed=5, side=side)
    out = distillation_loss(student, teacher, batch, only(iva=Iva(layer=1, images=images)))
    assert_same(student, out.loss, plain.iva(student, teacher, batch, 1, images == "separately"), EAGER)
    fewer = distillation_loss(student, teacher, batch, only(iva=Iva(layer=1, images=images, share=0.6)))
    assert_same(student, fewer.loss, plain.iva(student, teacher, batch, 1, images == "separately", 0.6), EAGER)


@pytest.mark.parametrize("form", ["reuse", "packed"])
@pytest.mark.parametrize(("name", "side"), CASES)
def test_tpa_equals_its_definition_in_both_forms(pair, name, side, form):
    student, teacher = pair
    batch = tiny.batch(tiny.COMPOSITIONS[name], seed=6, side=side)
    candidates = tiny.candidates(batch, seed=7)
    out = distillation_loss(student, teacher, batch, only(tpa=Tpa(form=form)), candidates=candidates)
    assert_same(student, out.loss, plain.tpa(student, teacher, batch, candidates))


@pytest.mark.parametrize("form", ["reuse", "packed"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_terms_together_are_the_weighted_sum(pair, seed, form):
    student, teacher = pair
    batch = tiny.batch(tiny.COMPOSITIONS[list(tiny.COMPOSITIONS)[seed]], seed=seed)
    candidates = tiny.candidates(batch, seed=seed)
    objective = Objective(
        sft=Sft(weight=0.5), kd=Kd(weight=2.0), iva=Iva(weight=0.3, layer=2), tpa=Tpa(weight=1.5, form=form)
    )
    out = distillation_loss(student, teacher, batch, objective, candidates=candidates)
    terms = {
        "sft": plain.sft(student, batch),
        "kd": plain.kd(student, teacher, batch),
        "iva": plain.iva(student, teacher, batch, 2),
        "tpa": plain.tpa(student, teacher, batch, candidates),
    }
    for name, value in terms.items():
        assert out.terms[name].item() == pytest.approx(value.item(), rel=EAGER)
        assert not out.terms[name].requires_grad
    assert_same(
        student, out.loss, 0.5 * terms["sft"] + 2 * terms["kd"] + 0.3 * terms["iva"] + 1.5 * terms["tpa"], EAGER
    )
