"""Terms on every family, and on pairs that read inputs of their own: equal to their plain twins, or refused by name."""

from __future__ import annotations

import pytest
import torch

from align_ti import Objective, Reads
from align_ti.data.roles import INSTRUCTION, VISUAL
from align_ti.errors import BatchError, ConfigError, ModelError
from align_ti.models.families import full_attention_layers, layer_kinds
from align_ti.terms.base import Term
from align_ti.terms.plain import Sample
from align_ti.training.objective import distillation_loss
from tests.family_models import COMPOSITIONS, FAMILIES
from tests.test_families import finer, pair

TERMS = {
    "kd": {"divergence": {"name": "jensen_shannon", "beta": 0.2}},
    "llava_kd_mdist": {"divergence": "reverse_kl"},
    "llava_kd_rdist": {},
    "align_kd": {},
    "compodistill": {},
    "em_kd_vsd": {},
    "em_kd_vlad": {},
}
CAPPED = {"llava-siglip-gemma2", "gemma4", "paligemma"}
"""Families that may do more than a linear layer behind their head."""


def one_sample(name: str, composition: str, seed: int = 3) -> dict:
    """The first sample of a composition, as the family reads it."""
    return FAMILIES[name].batch(COMPOSITIONS[composition][:1], seed)


def value(objective, student, teacher, batch) -> float:
    return float(distillation_loss(student, teacher, batch, objective).terms[objective.active[0]])


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_term_equals_its_plain_twin_or_is_refused_by_name(name, term):
    composition = "several turns" if "several turns" in FAMILIES[name].compositions else FAMILIES[name].compositions[0]
    _, student, teacher = pair(name)
    batch = one_sample(name, composition)
    objective = Objective.only(**{term: TERMS[term]})
    try:
        found = value(objective, student, teacher, batch)
    except ModelError as refused:
        sentence = str(refused)
        if term == "align_kd":
            # The first layer slides, or is recurrent, so there is no full attention to read.
            assert 0 not in full_attention_layers(student) and "layer 0 of" in sentence
        elif term == "compodistill":
            # Few middle layers have full attention, the teacher's fewer than the student's.
            assert (
                len(full_attention_layers(student)) < len(layer_kinds(student)) and "objective.compodistill" in sentence
            )
        else:
            assert name in CAPPED and "more than one linear layer" in sentence and f"objective.{term}" in sentence
        return
    sample = Sample({"student": student, "teacher": teacher}, dict.fromkeys(("student", "teacher"), batch))
    assert found == pytest.approx(objective.terms[term].plain(sample), rel=2e-5, abs=1e-7)


def test_most_families_take_every_term():
    # What the test above lets pass as a refusal must stay the exception.
    for term in TERMS:
        refused = []
        for name in FAMILIES:
            _, student, teacher = pair(name)
            composition = FAMILIES[name].compositions[0]
            try:
                value(Objective.only(**{term: TERMS[term]}), student, teacher, one_sample(name, composition))
            except ModelError:
                refused.append(name)
        assert len(refused) <= len(FAMILIES) / 3, (term, refused)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_behind_layers_are_the_models_own(name):
    class Layered(Term):
        name = "layered"

        def reads_of_student(self, model):
            return Reads.of(layers=[0, last])

        def mass(self, tokens, plan):
            return tokens.predicts.sum()

        def total(self, readings):
            seen.append(readings.student)
            return readings.student.layers[0].float().sum()

    seen: list = []
    _, student, teacher = pair(name)
    last = len(layer_kinds(student)) - 1
    batch = one_sample(name, FAMILIES[name].compositions[0])
    objective = Objective.only(kd={}).model_copy(update={"layered": Layered()})
    distillation_loss(student, teacher, batch, objective)
    own = {key: part for key, part in batch.items() if key not in {"labels", "roles"}}
    with torch.no_grad():
        states = student(**own, output_hidden_states=True, return_dict=True).hidden_states
    for layer in (0, last):
        torch.testing.assert_close(seen[0].layers[layer], states[layer + 1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen[0].layers[last], seen[0].hidden, rtol=1e-6, atol=1e-6)


def test_a_layer_that_is_not_there_is_named():
    class Deep(Term):
        name = "deep"

        def reads_of_teacher(self, model):
            return Reads.of(layers=[7])

        def mass(self, tokens, plan):
            return tokens.predicts.sum()

        def total(self, readings):
            return readings.student.hidden.sum()

    _, student, teacher = pair("llava-clip-llama")
    with pytest.raises(ModelError, match="has no layer 7; layers 0 to 2 are accepted"):
        distillation_loss(
            student,
            teacher,
            one_sample("llava-clip-llama", "one turn"),
            Objective.only(kd={}).model_copy(update={"deep": Deep()}),
        )


# --- pairs that read inputs of their own ------------------------------------------------------------------------------


def crossed(student_family: str, teacher_family: str) -> tuple:
    """Models of two families and one sample in both layouts."""
    (_, student, _), (_, _, teacher) = pair(student_family), pair(teacher_family)
    ours, theirs = (one_sample(name, "one turn") for name in (student_family, teacher_family))
    return student, teacher, {**ours, "teacher": {name: part for name, part in theirs.items() if name != "labels"}}


def plain_value(term, student, teacher, batch) -> float | None:
    inputs = {"student": batch, "teacher": batch["teacher"]}
    return term.plain(Sample({"student": student, "teacher": teacher}, inputs))


@pytest.mark.parametrize("term", ["kd", "llava_kd_mdist", "llava_kd_rdist", "em_kd_vsd", "em_kd_vlad"])
def test_a_term_over_responses_or_visual_tokens_is_defined_across_families(term):
    student, teacher, batch = crossed("llava-clip-llama", "internvl")
    objective = Objective.only(**{term: TERMS[term]})
    found = value(objective, student, teacher, batch)
    assert found == pytest.approx(plain_value(objective.terms[term], student, teacher, batch), rel=1e-6)
    assert found > 0


@pytest.mark.parametrize("term", ["align_kd", "compodistill"])
def test_a_term_over_the_whole_sequence_is_refused_by_name_across_families(term):
    student, teacher, batch = crossed("llava-clip-llama", "internvl")
    with pytest.raises(BatchError, match=f"objective.{term} compares the two models token by token"):
        value(Objective.only(**{term: {}}), student, teacher, batch)


def finer_pair() -> tuple:
    """A student that sees an image as 4 visual tokens, a teacher that sees it as 9."""
    _, student, _ = pair("llava-siglip-qwen3")
    maker, teacher = finer(2)
    ours = one_sample("llava-siglip-qwen3", "one turn")
    theirs = maker.batch(COMPOSITIONS["one turn"][:1], 3)
    return student, teacher, {**ours, "teacher": {name: part for name, part in theirs.items() if name != "labels"}}


@pytest.mark.parametrize("term", ["em_kd_vsd", "em_kd_vlad"])
def test_visual_tokens_of_different_number_are_matched(term):
    student, teacher, batch = finer_pair()
    visual = [int((batch[key]["roles"] if key else batch["roles"]).eq(VISUAL).sum()) for key in ("", "teacher")]
    assert visual == [4, 9]
    objective = Objective.only(**{term: {}})
    out = distillation_loss(student, teacher, batch, objective)
    found = float(out.terms[term])
    assert found == pytest.approx(plain_value(objective.terms[term], student, teacher, batch), rel=1e-6)
    out.loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    student.zero_grad(set_to_none=True)


@pytest.mark.parametrize("term", ["llava_kd_mdist", "llava_kd_rdist"])
def test_visual_tokens_of_different_number_are_resampled_or_refused(term):
    student, teacher, batch = finer_pair()
    with pytest.raises(BatchError, match=f"objective.{term}.resample: true"):
        value(Objective.only(**{term: {}}), student, teacher, batch)
    objective = Objective.only(**{term: {"resample": True}})
    assert value(objective, student, teacher, batch) > 0
    assert plain_value(objective.terms[term], student, teacher, batch) is None


def test_other_words_are_refused_where_they_are_compared():
    student, teacher, batch = crossed("llava-clip-llama", "internvl")
    roles, ids = batch["teacher"]["roles"], batch["teacher"]["input_ids"]
    place = (roles == INSTRUCTION).nonzero()[0]
    ids[tuple(place)] = (ids[tuple(place)] + 1) % 30
    with pytest.raises(BatchError, match=r"objective\.em_kd_vlad relates visual tokens to the same words"):
        value(Objective.only(em_kd_vlad={}), student, teacher, batch)


# --- what cannot be -------------------------------------------------------------------------------------------------


def test_groups_of_layers_need_as_many_of_the_teachers():
    _, student, teacher = pair("llava-siglip-qwen3")
    objective = Objective.only(compodistill={"student_layers": [0, 1], "teacher_layers": [2]})
    with pytest.raises(ModelError, match="2 layer\\(s\\) of the student with groups of the teacher's 1"):
        value(objective, student, teacher, one_sample("llava-siglip-qwen3", "one turn"))


def test_two_terms_that_draw_candidates_are_refused(monkeypatch):
    from align_ti import Tpa, register, registry

    monkeypatch.setattr(registry, "_REGISTERED", {"divergence": {}, "term": {}})

    @register
    class Another(Tpa):
        name = "another"

    _, student, teacher = pair("llava-siglip-qwen3")
    with pytest.raises(ConfigError, match="tpa and another each draw candidates"):
        distillation_loss(
            student, teacher, one_sample("llava-siglip-qwen3", "one turn"), Objective.only(tpa={}, another={})
        )
    assert Objective.only(another={}).terms["another"].candidate_options is not None


@pytest.mark.parametrize(("depth", "first", "last"), [(24, 7, 16), (28, 8, 19), (36, 10, 25), (2, 0, 1)])
def test_middle_layers_are_those_from_30_to_70_per_cent_of_the_depth(monkeypatch, depth, first, last):
    from align_ti.terms import compodistill

    monkeypatch.setattr(compodistill, "layer_kinds", lambda model: ["full_attention"] * depth)
    monkeypatch.setattr(compodistill, "full_attention_layers", lambda model: list(range(depth)))
    term, (_, student, _) = Objective.only(compodistill={}).terms["compodistill"], pair("llava-siglip-qwen3")
    assert term.layers_of(student, None) == list(range(first, last + 1))
