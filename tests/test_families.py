"""Every family: terms and gradients equal loops of full forwards of the model's own, in float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import ProcessorMixin

from align_ti.config import Iva, Kd, Sft, Tpa
from align_ti.errors import BatchError, ModelError
from align_ti.interactions.correspondence import check_grids, correspond, resampled
from align_ti.models import attention, branches
from align_ti.models.families import full_attention_layers, tower, visual_grids
from align_ti.models.overrides import Projection, same_frozen_tower, tower_once
from align_ti.models.pairing import Pairing, pair_up, shared_ids
from align_ti.models.recomputation import recomputed_layers
from align_ti.training.objective import distillation_loss
from tests import family_plain as plain
from tests.family_models import COMPOSITIONS, FAMILIES, IMAGE, VOCABULARY, candidates
from tests.test_objective_twins import only

RECURRENT = {"qwen3.5"}
WITH_IVA = [name for name in FAMILIES if name != "llava-siglip-mistral"]
"""Mistral's layers all slide, so there is none to read."""
BRANCHING = [name for name in FAMILIES if name not in RECURRENT]
MIXED = "text only in the batch"

EXACT, SINGLE, KERNEL, SHIFTED = 1e-9, 1e-6, 2e-6, 1e-6
"""Relative tolerances. SINGLE: where transformers computes in float32 whatever the model's precision (the softmax of eager attention,
from which the twin takes IVA's weights). KERNEL: Qwen3.5's linear attention, which is float32 throughout.
SHIFTED: PaliGemma counts positions from 1 where we count from 0; only their differences matter, but rotations are float32."""

PRODUCT = 1e-12
"""Tolerance, relative and absolute, of one product in float64 that is taken in two shapes: kernels choose the order of a sum by the
shape, and differently on each processor. 48 terms of order 1 move by 1e-14 at most."""

_PAIRS: dict[str, tuple] = {}


def pair(name: str) -> tuple:
    """Student and teacher of a family, made once."""
    if name not in _PAIRS:
        family = FAMILIES[name]
        _PAIRS[name] = family, family.model(1), family.model(2, hidden=48, layers=3)
    return _PAIRS[name]


def case(name: str, composition: str, seed: int = 3) -> tuple:
    """A batch and its samples alone; the padding is left for one seed in two."""
    family = FAMILIES[name]
    batch = family.batch(COMPOSITIONS[composition], seed, side=("left", "right")[seed % 2])
    return batch, plain.samples(batch, family.pictures(COMPOSITIONS[composition], seed))


def cases(names=tuple(FAMILIES)) -> list[tuple[str, str]]:
    """All compositions for the families that an image, a mask or a position makes special, a few for the LLaVA variants."""
    few = ("several turns", "several images", MIXED)
    return [
        (name, composition)
        for name in names
        for composition in FAMILIES[name].compositions
        if not name.startswith("llava-") or composition in (*few, "alone")
    ]


def exact(name: str) -> float:
    return {"qwen3.5": KERNEL, "paligemma": SHIFTED, "llava-siglip-gemma2": SINGLE}.get(name, EXACT)


@pytest.mark.parametrize(("name", "composition"), cases())
def test_sft_kd_and_iva_equal_their_definitions(name, composition):
    family, student, teacher = pair(name)
    ours, theirs = plain.Twin(family, student), plain.Twin(family, teacher)
    batch, parts = case(name, composition)
    iva = {"iva": Iva(layer=1)} if name in WITH_IVA else {}
    out = distillation_loss(student, teacher, batch, only(sft=Sft(), kd=Kd(temperature=1.5), **iva))
    with torch.no_grad():
        assert out.terms["sft"].item() == pytest.approx(plain.sft(ours, parts).item(), rel=exact(name))
        assert out.terms["kd"].item() == pytest.approx(plain.kd(ours, theirs, parts, 1.5).item(), rel=exact(name))
        if iva:
            focused = plain.iva(ours, theirs, parts, 1).item()
            assert out.terms["iva"].item() == pytest.approx(focused, rel=max(SINGLE, exact(name)), abs=1e-12)


@pytest.mark.parametrize("form", ["reuse", "packed"])
@pytest.mark.parametrize(("name", "composition"), cases(BRANCHING))
def test_tpa_equals_one_full_forward_for_every_candidate(name, composition, form):
    family, student, teacher = pair(name)
    batch, parts = case(name, composition, seed=4)
    tried = candidates(batch)
    out = distillation_loss(student, teacher, batch, only(tpa=Tpa(form=form)), tried)
    with torch.no_grad():
        expected = plain.tpa(plain.Twin(family, student), plain.Twin(family, teacher), batch, parts, tried)
    assert out.loss.item() == pytest.approx(expected.item(), rel=exact(name))


@pytest.mark.parametrize("form", ["reuse", "packed"])
@pytest.mark.parametrize("name", BRANCHING)
def test_gradients_equal_those_of_the_definitions(name, form):
    family, student, teacher = pair(name)
    batch, parts = case(name, MIXED if MIXED in family.compositions else "alone", seed=5)
    tried = candidates(batch)
    ours, theirs = plain.Twin(family, student), plain.Twin(family, teacher)
    iva = {"iva": Iva(layer=1)} if name in WITH_IVA else {}
    objective = only(sft=Sft(), kd=Kd(), tpa=Tpa(form=form), **iva)
    expected = plain.sft(ours, parts) + plain.kd(ours, theirs, parts) + plain.tpa(ours, theirs, batch, parts, tried)
    if iva:
        expected = expected + plain.iva(ours, theirs, parts, 1)
    got = gradients(student, distillation_loss(student, teacher, batch, objective, tried).loss)
    known = gradients(student, expected)
    assert got.keys() == known.keys()
    whole = sum(gradient.norm() for gradient in known.values())
    for parameter, gradient in known.items():
        assert (got[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, parameter


@pytest.mark.parametrize("name", BRANCHING)
def test_candidates_are_the_same_in_rows_of_any_width(name, monkeypatch):
    family, student, teacher = pair(name)
    batch, _ = case(name, MIXED if MIXED in family.compositions else "alone", seed=5)
    tried, objective = candidates(batch), only(tpa=Tpa(form="reuse"))
    expected = gradients(student, distillation_loss(student, teacher, batch, only(tpa=Tpa(form="packed")), tried).loss)
    whole = sum(gradient.norm() for gradient in expected.values())
    for width in (1, 2, 3, 10_000):
        monkeypatch.setattr(branches, "best_width", lambda counts, keys, width=width: min(width, max(counts)))
        got = gradients(student, distillation_loss(student, teacher, batch, objective, tried).loss)
        assert got.keys() == expected.keys()
        for parameter, gradient in expected.items():
            assert (got[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, parameter


@pytest.mark.parametrize("name", ["llava-siglip-qwen3", "qwen2.5-vl", "gemma3"])
def test_a_sample_without_candidates_beside_one_with_several_rows(name, monkeypatch):
    family, student, teacher = pair(name)
    batch, _ = case(name, MIXED if MIXED in family.compositions else "alone", seed=5)
    assert len(batch["input_ids"]) > 1
    tried = candidates(batch)
    for silent in range(len(batch["input_ids"])):
        # Its candidates are its gold tokens, which need no row.
        some = tried.clone()
        some[silent] = batch["input_ids"][silent][:, None]
        expected = distillation_loss(student, teacher, batch, only(tpa=Tpa(form="packed")), some).loss.item()
        for width in (1, 2, 10_000):
            monkeypatch.setattr(branches, "best_width", lambda counts, keys, width=width: min(width, max(counts)))
            got = distillation_loss(student, teacher, batch, only(tpa=Tpa(form="reuse")), some).loss.item()
            assert got == pytest.approx(expected, rel=exact(name))


def test_no_mask_holds_the_square_of_the_number_of_candidates(monkeypatch):
    _family, student, teacher = pair("llava-siglip-qwen3")
    batch, _ = case("llava-siglip-qwen3", "several turns", seed=5)
    seen = []
    forward = attention.sdpa_attention_forward

    def noted(module, query, key, value, mask, **options):
        if mask is not None and query.shape[2] != key.shape[2]:
            seen.append((query.shape[2], mask.shape[-1] - batch["input_ids"].shape[1]))
        return forward(module, query, key, value, mask, **options)

    monkeypatch.setattr(branches, "LONGEST_ROW", 2)
    monkeypatch.setattr(attention, "sdpa_attention_forward", noted)
    distillation_loss(student, teacher, batch, only(tpa=Tpa(form="reuse")), candidates(batch))
    assert len(seen) == 5, "one call for each layer of student and teacher"
    assert set(seen) == {(2, 2)}


@pytest.mark.parametrize("name", BRANCHING)
def test_layers_that_backward_recomputes_keep_the_cache(name, monkeypatch):
    family, student, teacher = pair(name)
    # The samples' keys are picked anew when a layer is recomputed.
    monkeypatch.setattr(branches, "LONGEST_ROW", 2)
    batch, _ = case(name, MIXED if MIXED in family.compositions else "alone", seed=5)
    tried, objective = candidates(batch), only(sft=Sft(), tpa=Tpa(form="reuse"))
    known = gradients(student, distillation_loss(student, teacher, batch, objective, tried).loss)
    checkpointed = copy.deepcopy(student)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.train()
    assert recomputed_layers(checkpointed)
    got = gradients(checkpointed, distillation_loss(checkpointed, teacher, batch, objective, tried).loss)
    assert got.keys() == known.keys()
    whole = sum(gradient.norm() for gradient in known.values())
    for parameter, gradient in known.items():
        assert (got[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, parameter


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_a_recurrent_layer_is_named_as_the_reason_why_tpa_cannot_be():
    _, student, teacher = pair("qwen3.5")
    batch, _ = case("qwen3.5", "one turn")
    for form in ("auto", "reuse", "packed"):
        with pytest.raises(
            ModelError, match=r"layer\(s\) 0, 2 \(linear_attention\) carry one state.*objective.tpa.weight: 0"
        ):
            distillation_loss(student, teacher, batch, only(tpa=Tpa(form=form)))


def test_a_layer_with_cross_attention_is_named_as_the_reason_why_tpa_cannot_be(monkeypatch):
    _, student, teacher = pair("llava-siglip-qwen3")
    batch, _ = case("llava-siglip-qwen3", "one turn")
    monkeypatch.setattr(teacher.config.get_text_config(), "cross_attention_layers", [1], raising=False)
    with pytest.raises(ModelError, match=r"layer\(s\) 1 read the image by cross-attention.*objective.tpa.weight: 0"):
        distillation_loss(student, teacher, batch, only(tpa=Tpa()))
    distillation_loss(student, teacher, batch, only(kd=Kd()))


def test_iva_reads_full_attention_layers_only():
    _, student, teacher = pair("qwen3.5")
    assert full_attention_layers(teacher) == [1, 3, 4]
    assert full_attention_layers(pair("gemma3")[2]) == [1, 3]
    assert full_attention_layers(pair("llava-siglip-mistral")[2]) == []
    batch, _ = case("qwen3.5", "one turn")
    with pytest.raises(ModelError, match=r"layer 0 of .* has no full attention to read; layers with it: 1, 3, 4"):
        distillation_loss(student, teacher, batch, only(iva=Iva(layer=0)))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_projection_is_the_models_own(name):
    # The same bits were asked of rows projected apart and in a batch, which some processors' kernels do not give.
    _, student, _ = pair(name)
    batch, _ = case(name, "one turn")
    inputs = {key: value for key, value in batch.items() if key not in {"roles", "labels"}}
    with torch.no_grad():
        hidden = student.model(**inputs).last_hidden_state[0]
        own = student(**inputs).logits[0]
        torch.testing.assert_close(Projection(student)(hidden), own, rtol=PRODUCT, atol=PRODUCT)
        linear = Projection(student).linear
        # A family that does anything beside one product is not taken for a product.
        assert (linear is None) == (name in {"paligemma", "gemma4"})
        if linear is not None:
            torch.testing.assert_close(linear(hidden), own, rtol=PRODUCT, atol=PRODUCT)


@pytest.mark.parametrize("cap", [16.0, 30.0, 32.0, 64.0])
def test_a_cap_is_seen_in_half_precision_too(cap):
    # On logits between -1 and 1 a cap that is a power of two is the identity of bfloat16.
    _, student, _ = pair("paligemma")
    low = copy.deepcopy(student).to(torch.bfloat16)
    assert Projection(low).linear is None
    low.config.get_text_config().final_logit_softcapping = cap
    for config in {id(part.config): part.config for part in low.modules() if hasattr(part, "config")}.values():
        if getattr(config, "final_logit_softcapping", None) is not None:
            config.final_logit_softcapping = cap
    assert Projection(low).linear is None


def test_a_cap_behind_the_head_is_part_of_the_distribution():
    # A fused path that ignored a soft cap trained on another distribution than the model's.
    _, student, _ = pair("paligemma")
    hidden = torch.full((3, 32), 50.0, dtype=torch.float64)
    capped, raw = Projection(student)(hidden), student.get_output_embeddings()(hidden)
    torch.testing.assert_close(capped, torch.tanh(raw / 5) * 5)
    assert raw.abs().max() > 5


def test_a_model_on_an_attention_that_drops_its_cap_is_refused():
    _, student, teacher = pair("llava-siglip-gemma2")
    batch, _ = case("llava-siglip-gemma2", "alone")
    config = student.get_decoder().config
    config._attn_implementation = "sdpa"
    try:
        with pytest.raises(ModelError, match="caps its attention at 3, but runs on 'sdpa'"):
            distillation_loss(student, teacher, batch, only(kd=Kd()))
    finally:
        config._attn_implementation = "eager"


# --- pairs of different families ----------------------------------------------------------------------------------


def two_sided(student_family: str, teacher_family: str, composition: str, seed: int = 3) -> tuple:
    """One batch in both families' own layouts, and the samples of each."""
    ours, parts = case(student_family, composition, seed)
    theirs, others = case(teacher_family, composition, seed)
    teacher = {name: value for name, value in theirs.items() if name != "labels"}
    return {**ours, "teacher": teacher}, parts, others


CROSSED = [
    ("internvl", "llava-siglip-qwen3"),
    ("llava-clip-llama", "gemma3"),
    ("smolvlm", "qwen3-vl"),
    ("qwen2-vl", "internvl"),
]


@pytest.mark.parametrize("composition", ["one turn", "several turns", MIXED])
@pytest.mark.parametrize(("student_family", "teacher_family"), CROSSED)
def test_kd_and_tpa_compare_the_same_responses_across_families(student_family, teacher_family, composition):
    (one, student, _), (other, _, teacher) = pair(student_family), pair(teacher_family)
    batch, parts, others = two_sided(student_family, teacher_family, composition)
    tried, twins = candidates(batch), (plain.Twin(one, student), plain.Twin(other, teacher))
    with torch.no_grad():
        kd = plain.kd(*twins, parts, others=others).item()
        tpa = plain.tpa(*twins, batch, parts, tried, others=others).item()
    for form in ("reuse", "packed"):
        out = distillation_loss(student, teacher, batch, only(kd=Kd(), tpa=Tpa(form=form)), tried)
        assert out.terms["kd"].item() == pytest.approx(kd, rel=EXACT)
        assert out.terms["tpa"].item() == pytest.approx(tpa, rel=EXACT)


@pytest.mark.parametrize("composition", ["one turn", "several images", MIXED])
def test_iva_compares_equal_numbers_of_visual_tokens_across_families(composition):
    (one, student, _), (other, _, teacher) = pair("llava-clip-llama"), pair("internvl")
    batch, parts, others = two_sided("llava-clip-llama", "internvl", composition)
    out = distillation_loss(student, teacher, batch, only(iva=Iva(layer=1)))
    with torch.no_grad():
        expected = plain.iva(plain.Twin(one, student), plain.Twin(other, teacher), parts, 1, others=others)
    assert out.loss.item() == pytest.approx(expected.item(), rel=SINGLE)


def test_draws_from_either_side_of_a_crossed_pair_are_in_the_students_layout():
    (_, student, _), (_, _, teacher) = pair("internvl"), pair("llava-siglip-qwen3")
    batch, _, _ = two_sided("internvl", "llava-siglip-qwen3", MIXED)
    for source in ("student", "teacher", "gold"):
        out = distillation_loss(
            student, teacher, batch, only(tpa=Tpa(source=source)), generator=torch.Generator().manual_seed(0)
        )
        assert torch.isfinite(out.loss) and out.loss.item() > 0


def test_different_responses_are_refused():
    (_, student, _), (_, _, teacher) = pair("internvl"), pair("llava-siglip-qwen3")
    batch, _, _ = two_sided("internvl", "llava-siglip-qwen3", "one turn")
    ids = batch["teacher"]["input_ids"]
    place = (batch["teacher"]["roles"][1] == 3).nonzero()[0]
    ids[1, place] = (ids[1, place] + 1) % 30
    with pytest.raises(BatchError, match="sample 1: the response is"):
        distillation_loss(student, teacher, batch, only(kd=Kd()))


# --- resampling ---------------------------------------------------------------------------------------------------


def finer(seed: int):
    """A LLaVA teacher whose tower sees the image as 3 x 3 patches, and the family that makes its batches."""
    import dataclasses

    from transformers import Qwen3Config

    from tests.family_models import fixed_picture, llava, siglip

    family = dataclasses.replace(
        FAMILIES["llava-siglip-qwen3"],
        build=llava(lambda: siglip(image_size=12), Qwen3Config, tied=True),
        picture=fixed_picture(9, 12),
        count=lambda picture: 9,
    )
    return family, family.model(seed, hidden=48, layers=3)


def pooled(values: Tensor) -> Tensor:
    """3 x 3 cells averaged into 2 x 2, each over the area that it covers: through a grid of 6 x 6."""
    fine = values.view(3, 3, -1).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return fine.view(2, 3, 2, 3, -1).mean((1, 3)).reshape(4, -1)


@pytest.mark.parametrize("composition", ["one turn", MIXED])
def test_a_teacher_with_a_finer_grid_is_resampled(composition):
    (one, student, _), (other, teacher) = pair("llava-siglip-qwen3"), finer(2)
    batch, parts = case("llava-siglip-qwen3", composition)
    wide = other.batch(COMPOSITIONS[composition], 3, "right")
    others = plain.samples(wide, other.pictures(COMPOSITIONS[composition], 3))
    batch["teacher"] = {name: value for name, value in wide.items() if name != "labels"}
    with pytest.raises(
        BatchError, match=r"4 visual tokens for the student, 9 for the teacher.*objective.iva.resample: true"
    ):
        distillation_loss(student, teacher, batch, only(iva=Iva(layer=1)))
    out = distillation_loss(student, teacher, batch, only(iva=Iva(layer=1, resample=True)))
    with torch.no_grad():
        expected = resampled_iva(plain.Twin(one, student), plain.Twin(other, teacher), parts, others)
    assert out.loss.item() == pytest.approx(expected.item(), rel=SINGLE)


def resampled_iva(student, teacher, parts, others) -> Tensor:
    """IVA with the teacher's hidden states and weights averaged over the area of the student's tokens, from the definition."""
    values = []
    for sample, other in zip(parts, others, strict=True):
        alpha = teacher.focus(other, 1)
        if alpha is None:
            continue
        rows, places = ((part["roles"][0] == 1).nonzero().flatten() for part in (sample, other))
        hidden = teacher.model.model(**teacher.inputs(other, other["input_ids"])).last_hidden_state[0, places]
        theirs, weights = teacher.model.lm_head(pooled(hidden)), pooled(alpha[:, None])[:, 0]
        values.append((weights / weights.sum() * plain.kl(theirs, student.logits(sample)[rows])).sum())
    return torch.stack(values).mean()


def test_grids_are_read_from_the_inputs_the_config_or_the_run():
    _, student, _ = pair("qwen2-vl")
    batch, _ = case("qwen2-vl", "several images")
    grids = visual_grids(student, batch, batch["roles"] == 1)
    assert [sum(rows * columns for rows, columns in sample) for sample in grids] == (batch["roles"] == 1).sum(
        -1
    ).tolist()
    _, llava, _ = pair("llava-clip-llama")
    adjacent = torch.ones(1, 8, dtype=torch.bool)
    assert visual_grids(llava, {}, adjacent) == [[(2, 2), (2, 2)]]
    # Four tiles of 2 x 2 in one run were read as one image of 4 x 4.
    assert visual_grids(pair("internvl")[1], {}, torch.ones(1, 16, dtype=torch.bool)) == [[(2, 2)] * 4]
    assert visual_grids(pair("smolvlm")[1], {}, adjacent) == [[(2, 2), (2, 2)]]
    assert visual_grids(pair("gemma3")[1], {}, adjacent) == [[(2, 2), (2, 2)]]
    with pytest.raises(BatchError, match="form no square grid"):
        visual_grids(pair("llava-onevision")[1], {}, torch.ones(1, 16, dtype=torch.bool))


def test_resampled_attention_keeps_each_pictures_total():
    # Attention was averaged like hidden states, so that an image of many teacher tokens lost weight to one of few.
    ids, roles = torch.zeros(1, 13, dtype=torch.long), torch.tensor([[0, *[1] * 8, 2, 2, 3, 3]])
    theirs = torch.tensor([[*[1] * 25, 0, 1, 1, 1, 1, 2, 0, 3, 3]])
    found = resampled(
        correspond(ids, roles, torch.zeros_like(theirs), theirs, with_visual=True),
        [[(2, 2), (2, 2)]],
        [[(5, 5), (2, 2)]],
    )
    attention = torch.rand(1, theirs.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared = found.to_student(attention, sums=True)
    assert shared[0, 1:5].sum().item() == pytest.approx(attention[0, :25].sum().item())
    torch.testing.assert_close(shared[0, 5:9], attention[0, 26:30])
    constant = found.to_student(torch.full((1, theirs.shape[1], 3), 2.0, dtype=torch.float64))
    torch.testing.assert_close(constant[0, 1:9], torch.full((8, 3), 2.0, dtype=torch.float64))


def test_equal_numbers_on_different_grids_are_refused():
    # An image of 2 x 6 tokens and one of 3 x 4 have as many, and were compared token by token.
    check_grids([[(2, 6)]], [[(2, 6)]])
    with pytest.raises(BatchError, match=r"grids \[\(2, 6\)\] .*teacher's \[\(3, 4\)\].*resample: true"):
        check_grids([[(2, 6)]], [[(3, 4)]])


# --- vocabularies -------------------------------------------------------------------------------------------------


class Named(ProcessorMixin):
    """A processor that knows the tokens of a vocabulary and nothing else."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self.tokenizer = SimpleNamespace(get_vocab=lambda: tokens)


def padded_head(model, tokens: int):
    """The same model with a head of more rows than it has tokens."""
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCABULARY:] = 3.0
    return model


def test_padded_heads_are_compared_on_the_real_tokens():
    family = FAMILIES["llava-clip-llama"]
    student, teacher = family.model(1), padded_head(family.model(2, hidden=48, layers=3), 64)
    batch, parts = case("llava-clip-llama", MIXED)
    with pytest.raises(ModelError, match="head has 48 tokens, the teacher's 64"):
        distillation_loss(student, teacher, batch, only(kd=Kd()))
    real = 45
    pairing = pair_up(student, teacher, Named({f"t{number}": number for number in range(real)}))
    assert pairing.shared == slice(real)
    tried, twins = candidates(batch), (plain.Twin(family, student), plain.Twin(family, teacher))
    out = distillation_loss(student, teacher, batch, only(kd=Kd(), tpa=Tpa()), tried, pairing=pairing)
    with torch.no_grad():
        kd = plain.kd(*twins, parts, tokens=slice(real))
        tpa = plain.tpa(*twins, batch, parts, tried, tokens=slice(real))
    assert out.terms["kd"].item() == pytest.approx(kd.item(), rel=EXACT)
    assert out.terms["tpa"].item() == pytest.approx(tpa.item(), rel=EXACT)


def test_ids_that_only_the_teachers_padding_has_are_no_candidates():
    # Drawn from a teacher whose head is padded further, they were looked up in the student's embeddings, which have no such row.
    family = FAMILIES["llava-clip-llama"]
    student, teacher = family.model(1), padded_head(family.model(2, hidden=48, layers=3), 64)
    pairing = pair_up(student, teacher, Named({f"t{number}": number for number in range(45)}))
    batch, _ = case("llava-clip-llama", MIXED)
    for kind in ("with_replacement", "stratified"):
        objective = only(tpa=Tpa(source="teacher", candidates=8, temperature=5.0, draw=kind))
        for seed in range(3):
            random = torch.Generator().manual_seed(seed)
            out = distillation_loss(student, teacher, batch, objective, generator=random, pairing=pairing)
            assert out.loss.isfinite() and out.masses["tpa"] > 0


def test_tokens_of_one_side_alone_are_no_candidates_and_no_labels():
    family, student, teacher = pair("llava-clip-llama")
    ours = {f"t{number}": number for number in range(VOCABULARY)}
    theirs = {name: number for name, number in ours.items() if name != "t3"}
    pairing = pair_up(student, teacher, Named(ours), Named(theirs))
    assert pairing.unshared(VOCABULARY) == (3,)
    batch, parts = case("llava-clip-llama", "one turn")
    kept = torch.tensor([number for number in range(VOCABULARY) if number != 3])
    words = batch["roles"] == 3
    batch["input_ids"][words & (batch["input_ids"] == 3)] = 4
    batch["labels"][batch["labels"] == 3] = 4
    parts = plain.samples(batch, family.pictures(COMPOSITIONS["one turn"], 3))
    tried, twins = candidates(batch), (plain.Twin(family, student), plain.Twin(family, teacher))
    tried[..., 0] = 3
    out = distillation_loss(student, teacher, batch, only(kd=Kd(), tpa=Tpa()), tried, pairing=pairing)
    with torch.no_grad():
        tpa = plain.tpa(*twins, batch, parts, tried, left_out=(38, IMAGE, 3), tokens=kept)
        assert out.terms["kd"].item() == pytest.approx(plain.kd(*twins, parts, tokens=kept).item(), rel=EXACT)
    assert out.terms["tpa"].item() == pytest.approx(tpa.item(), rel=EXACT)
    sample, step = words.nonzero()[0]
    batch["input_ids"][sample, step] = batch["labels"][sample, step] = 3
    with pytest.raises(BatchError, match="the response holds token 3, which the two models do not share"):
        distillation_loss(student, teacher, batch, only(kd=Kd()), pairing=pairing)


def test_tokenizers_that_disagree_are_refused_by_name():
    ours = {"a": 0, "b": 1, "c": 2, "<pad>": 3}
    with pytest.raises(ModelError, match=r"2 token\(s\) have different ids, first 'b' \(1 and 2\), 'c' \(2 and 1\)"):
        shared_ids(ours, {"a": 0, "b": 2, "c": 1}, 10)
    assert shared_ids(ours, {"a": 0, "b": 1, "<extra>": 3}, 10) == [0, 1]
    with pytest.raises(ModelError, match="share no token"):
        shared_ids({"a": 0}, {"b": 0}, 10)


# --- one tower ----------------------------------------------------------------------------------------------------


def shared_tower(name: str) -> tuple:
    family = FAMILIES[name]
    student, teacher = family.model(1), family.model(2, hidden=32, layers=3)
    tower(student).load_state_dict(tower(teacher).state_dict())
    tower(student).requires_grad_(False)
    return student, teacher


@pytest.mark.parametrize("form", ["reuse", "packed"])
@pytest.mark.parametrize(
    "name", ["llava-siglip-qwen3", "llava-onevision", "qwen2-vl", "qwen3-vl", "smolvlm", "internvl", "gemma3"]
)
def test_one_frozen_tower_is_computed_once_and_changes_nothing(name, form):
    student, teacher = shared_tower(name)
    assert same_frozen_tower(student, teacher)
    batch, _ = case(name, MIXED)
    objective = only(kd=Kd(), iva=Iva(layer=1), tpa=Tpa(form=form))
    calls, tried = [], candidates(batch)
    for model in (student, teacher):
        first_block = next(part for part in tower(model).modules() if isinstance(part, torch.nn.ModuleList))[0]
        first_block.register_forward_hook(lambda *_: calls.append(1))
    found = {}
    for shared in (False, True):
        calls.clear()
        loss = distillation_loss(student, teacher, batch, objective, tried, pairing=Pairing(shared_tower=shared)).loss
        found[shared] = loss.item(), gradients(student, loss), len(calls)
    assert found[True][0] == found[False][0]
    assert found[True][1].keys() == found[False][1].keys()
    for parameter, gradient in found[False][1].items():
        torch.testing.assert_close(found[True][1][parameter], gradient)
    assert found[True][2] == 1 < found[False][2]


def test_towers_that_differ_are_not_shared():
    student, teacher = shared_tower("llava-siglip-qwen3")
    tower(student).requires_grad_(True)
    assert not same_frozen_tower(student, teacher)
    tower(student).requires_grad_(False)
    with torch.no_grad():
        next(tower(student).parameters()).add_(1e-3)
    assert not same_frozen_tower(student, teacher)
    assert not same_frozen_tower(student, pair("qwen2-vl")[2])
    student, teacher = shared_tower("llava-siglip-qwen3")
    tower(student).config.attention_dropout = 0.1
    assert not same_frozen_tower(student, teacher)


def test_other_pixels_are_computed_anew():
    student, teacher = shared_tower("llava-siglip-qwen3")
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with tower_once(student, teacher):
        one, again = tower(student)(pixels[:1]), tower(teacher)(pixels[:1])
        other = tower(teacher)(pixels[1:])
    assert again is not one and torch.equal(again.last_hidden_state, one.last_hidden_state)
    assert not torch.equal(other.last_hidden_state, one.last_hidden_state)


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_table_in_the_docs_is_what_the_models_say():
    from tests.family_table import PAGE, page

    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run: python -m tests.family_table"
