"""What the benchmarks compare is the same work: the rivals' losses and gradients equal ours."""

from __future__ import annotations

import pytest
import torch
from benchmarks.rivals import interleave, released_design, ribbon_mask, vanilla_kd
from benchmarks.shapes import Decoder, Shape, Tower, make_batch, make_candidates, make_pair

from align_ti.config import Iva, Objective, Tpa
from align_ti.training.objective import distillation_loss

TINY = Shape(
    student=Decoder(hidden=32, layers=2, heads=4, key_heads=2, head_dim=8, intermediate=48),
    teacher=Decoder(hidden=48, layers=3, heads=4, key_heads=2, head_dim=8, intermediate=64),
    tower=Tower(hidden=16, layers=1, heads=2, intermediate=24),
    vocabulary=200,
    side=3,
    instruction=4,
    response=5,
    batch=2,
)
LAYER = 1
KD = Objective(iva=Iva(weight=0.0, layer=LAYER), tpa=Tpa(weight=0.0))
ALIGN_TI = Objective(iva=Iva(layer=LAYER))
# transformers computes norms, eager softmax and its own loss in float32 whatever the model is in.
ROUNDING = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture(scope="module")
def tiny():
    student, teacher = make_pair(TINY, dtype=torch.float64)
    with torch.no_grad():
        for model in (student, teacher):
            # Random weights of the usual size give almost even distributions, where a wrong row goes unseen.
            for name, parameter in model.named_parameters():
                if "vision_tower" not in name:
                    parameter.mul_(2)
    return student, teacher, make_batch(TINY, dtype=torch.float64)


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_same(student, one, other):
    torch.testing.assert_close(one.double(), other.double(), **ROUNDING)
    left, right = gradients(student, one), gradients(student, other)
    assert left.keys() == right.keys()
    for name, grad in left.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(right[name] / scale, grad / scale, rtol=0, atol=1e-5, msg=name)


def test_vanilla_kd_as_people_write_it_is_our_sft_and_kd(tiny):
    student, teacher, batch = tiny
    ours = distillation_loss(student, teacher, batch, KD)
    assert ours.terms["kd"] > 0.1
    assert_same(student, vanilla_kd(student, teacher, batch), ours.loss)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_the_released_design_is_our_whole_loss(tiny, share):
    student, teacher, batch = tiny
    candidates = make_candidates(batch, TINY, 4, share)
    ours = distillation_loss(student, teacher, batch, ALIGN_TI, candidates)
    assert float(ours.branch_share) == pytest.approx(share)
    assert min(ours.terms.values()) > 0.1
    assert_same(student, released_design(student, teacher, batch, candidates, LAYER), ours.loss)


def test_the_released_design_is_our_whole_loss_with_candidates_drawn_twice(tiny):
    student, teacher, batch = tiny
    candidates = make_candidates(batch, TINY, 4, 1.0)
    candidates[..., 1] = candidates[..., 0]
    candidates[..., 3] = batch["input_ids"]
    ours = distillation_loss(student, teacher, batch, ALIGN_TI, candidates)
    assert float(ours.branch_share) == pytest.approx(0.5)
    assert_same(student, released_design(student, teacher, batch, candidates, LAYER), ours.loss)


def test_one_candidate_fewer_or_another_layer_is_another_loss(tiny):
    student, teacher, batch = tiny
    candidates = make_candidates(batch, TINY, 4, 1.0)
    losses = [
        released_design(student, teacher, batch, *chosen).item()
        for chosen in ((candidates, LAYER), (candidates[..., :3], LAYER), (candidates, LAYER + 1))
    ]
    assert len({round(loss, 4) for loss in losses}) == 3


def test_the_ribbon_shows_gold_tokens_before_a_step_and_the_token_itself():
    ids, roles = torch.tensor([[10, 11, 12]]), torch.tensor([[0, 3, 3]])
    ribbon = interleave(ids, roles, torch.tensor([[[20], [21], [22]]]))
    assert ribbon.ids.tolist() == [[10, 11, 21, 12, 22]]
    assert ribbon.source.tolist() == [0, 1, 1, 2, 2]
    seen = ribbon_mask(ribbon, torch.float64)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_samples_with_roles_at_different_places_are_refused():
    with pytest.raises(ValueError, match="different places"):
        interleave(torch.zeros(2, 2, dtype=torch.long), torch.tensor([[0, 3], [3, 0]]), torch.zeros(2, 2, 1).long())
