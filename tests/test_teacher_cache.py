"""A cache of the teacher: the loss from it is the loss with the teacher, and what does not belong to it is refused."""

from __future__ import annotations

import pytest
import torch

from align_ti.config import Iva, Kd, Objective, Sft
from align_ti.data.roles import TEACHER_ATTENTION, TEACHER_HIDDEN
from align_ti.errors import BatchError
from align_ti.models.families import backbone
from align_ti.models.headonly import has_head_only, load_head, save_head
from align_ti.models.placement import move
from align_ti.training.objective import distillation_loss
from align_ti.training.recall import keep
from tests import family_models, tiny

OBJECTIVE = Objective.only(
    sft=Sft(weight=0.5), kd=Kd(temperature=2.0), iva=Iva(layer=1, weight=0.7, images="separately")
)


def with_kept(teacher, batch, layer=1):
    kept = keep(teacher, batch, layer)
    return {**batch, **{name: torch.cat([one[name] for one in kept]) for name in kept[0]}}


def head_of(teacher, folder):
    save_head(teacher, folder)
    return load_head(folder)


def loss_and_gradients(student, teacher, batch, objective=OBJECTIVE):
    student.zero_grad()
    out = distillation_loss(student, teacher, batch, objective)
    out.loss.backward()
    gradients = {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}
    return out, gradients


def check_equal(one, other):
    (online, theirs), (cached, ours) = one, other
    assert torch.equal(online.loss, cached.loss)
    assert online.terms.keys() == cached.terms.keys()
    for name, value in online.terms.items():
        assert torch.equal(value, cached.terms[name]), name
        assert value > 0 or name == "iva", name
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize("composition", tiny.COMPOSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_terms_and_gradients_are_the_teachers_own(composition, side, tmp_path):
    student, teacher = tiny.model(0), tiny.model(1, hidden=48)
    batch = tiny.batch(tiny.COMPOSITIONS[composition], side=side, extra_padding=2)
    light = head_of(teacher, tmp_path)
    online = loss_and_gradients(student, teacher, batch)
    check_equal(online, loss_and_gradients(student, light, with_kept(teacher, batch)))


@pytest.mark.parametrize("family", family_models.FAMILIES)
def test_every_family_is_cached_exactly(family, tmp_path):
    made = family_models.FAMILIES[family]
    student, teacher = made.model(0), made.model(1)
    layer = family_models_layer(teacher)
    batch = made.batch(family_models.COMPOSITIONS["one turn"])
    objective = Objective.only(sft=Sft(), kd=Kd(), iva=Iva(layer=layer))
    light = head_of(teacher, tmp_path)
    assert type(light) is type(teacher)
    online = loss_and_gradients(student, teacher, batch, objective)
    check_equal(online, loss_and_gradients(student, light, with_kept(teacher, batch, layer), objective))


def family_models_layer(teacher):
    from align_ti.models.families import full_attention_layers

    return full_attention_layers(teacher)[-1]


def test_the_head_alone_has_no_backbone_in_memory_and_moves(tmp_path):
    light = head_of(tiny.model(1), tmp_path)
    assert has_head_only(light)
    assert all(weight.is_meta for weight in backbone(light).parameters())
    move(light, "cpu")
    assert not has_head_only(tiny.model(1))


def test_a_batch_that_holds_too_little_is_refused(tmp_path):
    student, teacher = tiny.model(0), tiny.model(1)
    batch, light = tiny.batch(tiny.COMPOSITIONS["one turn"]), head_of(teacher, tmp_path)
    with pytest.raises(BatchError, match="head alone"):
        distillation_loss(student, light, batch, OBJECTIVE)
    with pytest.raises(BatchError, match="response rows alone"):
        distillation_loss(student, light, with_kept(teacher, batch, None), OBJECTIVE)
    whole = with_kept(teacher, batch)
    with pytest.raises(BatchError, match="for .* that are weighed"):
        distillation_loss(student, light, {**whole, TEACHER_HIDDEN: whole[TEACHER_HIDDEN][1:]}, OBJECTIVE)
    with pytest.raises(BatchError, match="objective.tpa asks the teacher more"):
        distillation_loss(student, light, whole, Objective(iva=Iva(layer=1)))
    # KD alone needs no attention.
    only = Objective.only(kd=Kd())
    online = loss_and_gradients(student, teacher, batch, only)
    check_equal(online, loss_and_gradients(student, light, with_kept(teacher, batch, None), only))
    check_equal(online, loss_and_gradients(student, light, whole, only))
    assert TEACHER_ATTENTION in whole
