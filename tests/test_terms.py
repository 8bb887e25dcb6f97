"""Every term against the rules, its plain twin and a gradient; what they read, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from align_ti import Objective, Term, register, registry
from align_ti.registry import lookup, names
from align_ti.testing import check_term
from align_ti.training.objective import distillation_loss
from tests import tiny

OPTIONS = [
    ("sft", {}),
    ("kd", {"temperature": 2.0}),
    ("kd", {"divergence": {"name": "jensen_shannon", "beta": 0.3}}),
    ("iva", {"layer": 1}),
    ("iva", {"layer": 0, "images": "separately", "share": 0.6, "divergence": "reverse_kl"}),
    ("tpa", {}),
    ("tpa", {"form": "packed", "divergence": {"name": "skew_kl", "alpha": 0.2}}),
    ("kd", {"divergence": "adaptive_kl"}),
    ("llava_kd_mdist", {}),
    ("llava_kd_mdist", {"visual_weight": 0.3, "divergence": "total_variation"}),
    ("llava_kd_rdist", {}),
    ("llava_kd_rdist", {"of": "hidden"}),
    ("align_kd", {}),
    ("compodistill", {}),
    ("compodistill", {"form": "code"}),
    ("compodistill", {"student_layers": [0, 1], "teacher_layers": [0, 1]}),
    ("em_kd_vsd", {}),
    ("em_kd_vlad", {}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_a_term_keeps_the_rules_and_equals_its_plain_twin(name, options):
    check_term(Objective.only(**{name: options}).terms[name], fixed_parts=options.get("divergence") == "adaptive_kl")


def test_a_term_that_loses_a_part_of_its_gradient_is_found(monkeypatch):
    # Along its own gradient such a term changes as it says; along others it does not.
    monkeypatch.setattr(registry, "_REGISTERED", {"divergence": {}, "term": {}})

    @register
    class Torn(Term):
        name = "torn"
        needs_teacher = False

        def mass(self, tokens, plan):
            return tokens.response.sum()

        def total(self, readings):
            hidden = readings.student.hidden[readings.tokens.response]
            half = hidden.shape[-1] // 2
            return hidden[:, :half].sin().sum() + hidden[:, half:].detach().sin().sum()

    with pytest.raises(AssertionError, match="along a random direction by finite differences"):
        check_term(Torn())


def test_every_term_is_held_to_the_rules():
    assert {name for name, _ in OPTIONS} == set(names("term"))
    assert all(lookup("term", name).name == name for name in names("term"))


def test_sft_leaves_out_what_the_student_wrote_itself():
    student, teacher = tiny.model(1), tiny.model(2, hidden=48, layers=3)
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"], seed=3)
    written = torch.zeros_like(batch["roles"])
    last = (batch["roles"][0] == tiny.RESPONSE).nonzero().flatten()[-2:]
    written[0, last] = 1
    objective = Objective.only(sft={}, kd={})
    plainly, own = (
        distillation_loss(student, teacher, of, objective) for of in (batch, {**batch, "student_written": written})
    )
    assert int(plainly.masses["sft"] - own.masses["sft"]) == 2
    assert own.masses["kd"] == plainly.masses["kd"]
    assert own.terms["kd"].item() == pytest.approx(plainly.terms["kd"].item(), rel=1e-12)
    with torch.no_grad():
        logits = student(**{k: v for k, v in batch.items() if k not in {"roles", "labels"}}).logits.log_softmax(-1)
    kept = (batch["labels"] != -100) & (written == 0)
    rows = kept.nonzero()
    expected = -torch.stack([logits[b, t - 1, batch["input_ids"][b, t]] for b, t in rows.tolist()]).mean()
    assert own.terms["sft"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_batch_that_the_student_wrote_alone_has_no_sft_and_no_mass():
    student, teacher = tiny.model(1), tiny.model(2, hidden=48, layers=3)
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"], seed=3)
    batch["student_written"] = (batch["roles"] == tiny.RESPONSE).long()
    out = distillation_loss(student, teacher, batch, Objective.only(sft={}, kd={}))
    assert out.masses["sft"] == 0 and out.terms["sft"] == 0 and out.terms["kd"] > 0


def test_attention_is_read_with_its_gradient_in_the_packed_form_too():
    # The packed form draws from a pass without gradient first; attention read there would have none.
    student, teacher = tiny.model(1), tiny.model(2, hidden=48, layers=3)
    batch = tiny.batch(tiny.COMPOSITIONS["several images"], seed=3)
    found = []
    for form in ("reuse", "packed"):
        objective = Objective.only(compodistill={}, align_kd={"weight": 10.0}, tpa={"form": form, "weight": 1e-9})
        student.zero_grad(set_to_none=True)
        out = distillation_loss(student, teacher, batch, objective, generator=torch.Generator().manual_seed(0))
        out.loss.backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
        assert out.terms["compodistill"] > 0
    for name, gradient in found[0].items():
        assert float((gradient - found[1][name]).norm()) <= 1e-5 * float(gradient.norm()) + 1e-9, name
    assert float(sum(gradient.norm() for gradient in found[0].values())) > 1e-3
