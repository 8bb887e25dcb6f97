"""What must not change the loss: padding, chunks, duplicates, accumulation; and what must not be changed by it."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align_ti.config import Iva, Kd, Objective, Sft, Tpa
from align_ti.data.roles import model_inputs
from align_ti.errors import BatchError, ConfigError, ModelError
from align_ti.interactions.transitions import plan_transitions
from align_ti.models import caches, recomputation
from align_ti.models.continuation import continue_branches, read
from align_ti.models.recomputation import recomputed_layers
from align_ti.training.objective import distillation_loss
from tests import tiny
from tests.test_objective_twins import gradients, only

OBJECTIVE = Objective(iva=Iva(layer=1))
STUDENT, TEACHER = tiny.model(1), tiny.model(2, hidden=48, layers=3)


def loss_and_gradient(batch, objective=OBJECTIVE, candidates=None, student=STUDENT, teacher=TEACHER, **options):
    out = distillation_loss(student, teacher, batch, objective, candidates, **options)
    return out, gradients(student, out.loss)


def assert_equal(one, two, rtol=1e-6):
    (first, first_gradient), (second, second_gradient) = one, two
    assert first.loss.item() == pytest.approx(second.loss.item(), rel=rtol)
    assert first_gradient.keys() == second_gradient.keys()
    for name, gradient in first_gradient.items():
        assert (gradient - second_gradient[name]).norm() <= 10 * rtol * gradient.norm() + rtol, name


@pytest.mark.parametrize("name", list(tiny.COMPOSITIONS))
@pytest.mark.parametrize("form", ["reuse", "packed"])
def test_padding_on_either_side_changes_nothing(name, form):
    objective = Objective(iva=Iva(layer=1), tpa=Tpa(form=form))
    results = []
    for side, extra in (("right", 0), ("right", 5), ("left", 0), ("left", 7)):
        batch = tiny.batch(tiny.COMPOSITIONS[name], seed=1, side=side, extra_padding=extra)
        tried = tiny.candidates(batch, seed=2)
        # The same candidates at the same tokens, wherever padding has moved them.
        real = batch["attention_mask"].bool()
        reference = tiny.batch(tiny.COMPOSITIONS[name], seed=1)
        moved = tiny.candidates(reference, seed=2)[reference["attention_mask"].bool()]
        tried[real] = moved
        results.append(loss_and_gradient(batch, objective, tried))
    for other in results[1:]:
        assert_equal(results[0], other)


@given(chunk=st.integers(1, 60), seed=st.integers(0, 5))
def test_the_size_of_a_chunk_changes_nothing(chunk, seed):
    batch = tiny.batch(tiny.COMPOSITIONS["several images"], seed=seed)
    tried = tiny.candidates(batch, seed=seed)
    whole = Objective(iva=Iva(layer=0), chunk_rows=10_000)
    chunked = Objective(iva=Iva(layer=0), chunk_rows=chunk)
    # Products of other shapes differ in float64's last digit, and gradients pass norms in float32, where one digit is 1e-7 of a row.
    assert_equal(loss_and_gradient(batch, whole, tried), loss_and_gradient(batch, chunked, tried), rtol=1e-8)


@given(seed=st.integers(0, 20))
def test_order_and_repetition_of_candidates_change_nothing(seed):
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"], seed=seed)
    tried = tiny.candidates(batch, seed=seed)
    objective = only(tpa=Tpa())
    shuffled = tried[..., torch.randperm(3, generator=torch.Generator().manual_seed(seed))]
    expected = loss_and_gradient(batch, objective, tried)
    assert_equal(expected, loss_and_gradient(batch, objective, shuffled))
    assert_equal(expected, loss_and_gradient(batch, objective, torch.cat([tried, tried], dim=-1)))


def test_duplicates_and_gold_tokens_cost_no_row():
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    response, ids = batch["roles"] == 3, batch["input_ids"]
    same = torch.full((*ids.shape, 4), 5)
    expected = (response & (ids != 5)).sum(-1)
    assert plan_transitions(same, response & (ids != 5), ids, (tiny.END,)).branches.counts == tuple(expected.tolist())
    gold = plan_transitions(ids[..., None].expand(-1, -1, 4), response, ids, (tiny.END,))
    assert len(gold.branches) == 0
    assert gold.gold_weights.sum() == gold.mass == int((response & (ids != tiny.END)).sum())


@given(seed=st.integers(0, 30), count=st.integers(1, 5))
def test_the_weights_of_a_plan_sum_to_its_mass(seed, count):
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"], seed=seed)
    plan = plan_transitions(
        tiny.candidates(batch, seed, count), batch["roles"] == 3, batch["input_ids"], (tiny.END, tiny.IMAGE)
    )
    assert float(plan.gold_weights.sum() + plan.branch_weights.sum()) == pytest.approx(float(plan.mass))
    assert bool((plan.branch_weights > 0).all())
    assert bool((plan.branches.tokens != tiny.END).all())


def split(batch, tried):
    """The batch as batches of one sample each, padding kept."""
    counts = [int((ids == tiny.IMAGE).sum()) // tiny.VISUAL_TOKENS for ids in batch["input_ids"]]
    start = 0
    for index, count in enumerate(counts):
        one = {name: batch[name][index : index + 1] for name in ("input_ids", "roles", "labels", "attention_mask")}
        if count:
            one["pixel_values"] = batch["pixel_values"][start : start + count]
        start += count
        yield one, tried[index : index + 1]


@pytest.mark.parametrize("name", list(tiny.COMPOSITIONS))
def test_one_batch_equals_its_samples_accumulated(name):
    composition = tiny.COMPOSITIONS[name] * 2
    batch = tiny.batch(composition, seed=9)
    tried = tiny.candidates(batch, seed=9)
    whole, expected = loss_and_gradient(batch, candidates=tried)
    STUDENT.zero_grad(set_to_none=True)
    total = 0.0
    for one, its in split(batch, tried):
        out = distillation_loss(STUDENT, TEACHER, one, OBJECTIVE, its, step_masses=lambda _: whole.masses)
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-8)
    for name, gradient in expected.items():
        got = dict(STUDENT.named_parameters())[name].grad
        assert (got - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("form", ["reuse", "packed"])
@pytest.mark.parametrize("name", ["one turn", "several images", "text only in the batch"])
def test_a_student_equal_to_the_teacher_has_nothing_to_align(name, form):
    twin = copy.deepcopy(STUDENT)
    batch = tiny.batch(tiny.COMPOSITIONS[name], seed=3)
    out = distillation_loss(
        STUDENT, twin, batch, Objective(iva=Iva(layer=1), tpa=Tpa(form=form)), tiny.candidates(batch, seed=3)
    )
    for term in ("kd", "iva", "tpa"):
        assert abs(out.terms[term].item()) < 1e-9, term
    assert out.terms["sft"].item() > 0.1


def test_the_same_seed_draws_the_same_candidates_and_another_draws_others():
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"], seed=1)

    def loss(seed):
        return distillation_loss(
            STUDENT, TEACHER, batch, OBJECTIVE, generator=torch.Generator().manual_seed(seed)
        ).loss.item()

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in range(5)}) == 5


@pytest.mark.parametrize("form", ["reuse", "packed"])
@pytest.mark.parametrize("source", ["student", "teacher", "gold"])
def test_every_source_and_form_draws_the_same_candidates(source, form):
    """The packed form draws from a pass of its own; the draw must not depend on that."""
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"], seed=1)

    def loss(chosen):
        objective = Objective(iva=Iva(layer=1), tpa=Tpa(source=source, form=chosen))
        return distillation_loss(
            STUDENT, TEACHER, batch, objective, generator=torch.Generator().manual_seed(4)
        ).loss.item()

    assert loss(form) == pytest.approx(loss("reuse"), rel=1e-8)


def test_gold_candidates_need_no_second_pass_and_equal_kd_one_step_later():
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"], seed=1)
    out = distillation_loss(STUDENT, TEACHER, batch, only(tpa=Tpa(source="gold")))
    assert out.branch_share.item() == 0
    # Rows behind every response token but the last are KD's rows but the first.
    with torch.no_grad():
        s, t = (m(**model_inputs(batch)).logits.log_softmax(-1) for m in (STUDENT, TEACHER))
    rows = (batch["roles"] == 3) & (batch["input_ids"] != tiny.END)
    total = (t.exp() * (t - s)).sum(-1)[rows].mean()
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-7)


def test_gradient_reaches_the_student_only_and_the_models_come_back_unchanged():
    student, teacher = tiny.model(1), tiny.model(2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    batch = tiny.batch(tiny.COMPOSITIONS["several images"])
    out = distillation_loss(student, teacher, batch, OBJECTIVE, tiny.candidates(batch))
    out.loss.backward()
    assert out.loss.dim() == 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # SigLIP's closing norm is not read by LLaVA, so it alone has no gradient.
    silent = {n for n, p in student.named_parameters() if p.requires_grad and p.grad is None}
    assert all("vision_tower" in name and ("post_layernorm" in name or ".head." in name) for name in silent)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    for model in (student, teacher):
        assert model.config.get_text_config()._attn_implementation == "sdpa"
        assert not model.training


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_cache_of_the_first_pass_is_left_as_it_was(attention):
    model = tiny.model(3, attention=attention)
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    inputs = model_inputs(batch)
    first = read(model, inputs, keep_cache=True)
    kept = [(layer.keys, layer.keys.clone(), layer.values, layer.values.clone()) for layer in first.cache.layers]
    plan = plan_transitions(tiny.candidates(batch), batch["roles"] == 3, batch["input_ids"], (tiny.END,))
    continue_branches(model, inputs, first, plan.branches)
    for layer, (keys, keys_before, values, values_before) in zip(first.cache.layers, kept, strict=True):
        assert layer.keys is keys and layer.values is values
        assert torch.equal(keys, keys_before) and torch.equal(values, values_before)


def test_the_loss_is_the_same_whatever_attention_the_student_runs_on():
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    tried = tiny.candidates(batch)
    losses = [
        distillation_loss(tiny.model(1, attention=kind), TEACHER, batch, OBJECTIVE, tried).loss.item()
        for kind in ("sdpa", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # eager's softmax is float32


def test_a_clip_tower_works_as_a_siglip_tower_does():
    student, teacher = tiny.model(1, tower="clip"), tiny.model(2, tower="clip")
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    out = distillation_loss(student, teacher, batch, OBJECTIVE, tiny.candidates(batch))
    assert all(value.item() > 0 for value in out.terms.values())


def checkpointed(attention="sdpa", **options):
    student = tiny.model(1, attention=attention)
    student.gradient_checkpointing_enable(options)
    return student.train()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["auto", "reuse", "packed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient_in_every_form(attention, form, reentrant):
    # Backward once recomputed the layers on the model's own kernel, with a mask that it read otherwise: wrong gradients, no error.
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"])
    tried = tiny.candidates(batch)
    objective = Objective(iva=Iva(layer=1), tpa=Tpa(form=form))
    expected = loss_and_gradient(batch, objective, tried, student=tiny.model(1, attention=attention))
    student = checkpointed(attention, use_reentrant=reentrant)
    assert_equal(expected, loss_and_gradient(batch, objective, tried, student=student))
    layers = recomputed_layers(student)
    assert len(layers) == 2 and not any("forward" in vars(layer) for layer in layers)


def test_under_checkpointing_no_token_is_read_a_third_time():
    # Drawing and trying candidates took a forward pass, a pass over both, and its recomputation.
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"])
    student = checkpointed(use_reentrant=False)
    read: list[int] = []
    for layer in recomputed_layers(student):
        layer.mlp.register_forward_pre_hook(lambda _layer, given: read.append(given[0].shape[1]))
    out = distillation_loss(student, TEACHER, batch, OBJECTIVE, generator=torch.Generator().manual_seed(0))
    gold, branches = read[0], read[2]
    assert read == [gold, gold, branches, branches] and gold == batch["input_ids"].shape[1]
    out.loss.backward()
    assert sorted(read) == sorted([gold] * 4 + [branches] * 4)


def test_under_checkpointing_backward_holds_one_layer_at_a_time():
    # What the layers compute on the way is not kept: fewer numbers are saved for backward than without checkpointing.
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"])
    sizes = []
    for student in (tiny.model(1).train(), checkpointed(use_reentrant=False)):
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.setdefault(id(tensor), tensor.numel()) and tensor, lambda tensor: tensor
        ):
            distillation_loss(student, TEACHER, batch, OBJECTIVE, tiny.candidates(batch))
        sizes.append(sum(saved.values()))
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize(("model", "layers"), [("student under checkpointing", 2), ("teacher", 3)])
def test_keys_with_candidates_behind_them_are_let_go(monkeypatch, model, layers):
    # Rows of candidates have a copy of their sample's keys each, so a cache that kept them would grow with the rows.
    batch, held = tiny.batch(tiny.COMPOSITIONS["several turns"]), []
    update = caches.ReadOnlyLayer.update

    def noted(layer, *states):
        keys, values = update(layer, *states)
        if keys.requires_grad == model.startswith("student"):
            held.append(weakref.ref(keys))
        return keys, values

    monkeypatch.setattr(caches.ReadOnlyLayer, "update", noted)
    out = distillation_loss(checkpointed(use_reentrant=False), TEACHER, batch, OBJECTIVE, tiny.candidates(batch))
    assert len(held) == layers
    assert not any(keys() is not None for keys in held)
    out.loss.backward()


def test_under_checkpointing_a_layer_of_candidates_holds_no_other_layers_keys(monkeypatch):
    # Backward frees what each layer was called with; if that held every layer's keys, all would stay until the last layer is done.
    batch, kept = tiny.batch(tiny.COMPOSITIONS["several turns"]), []

    def noted(cache, indices):
        caches.keep_only(cache, indices)
        kept.append([index for index, layer in enumerate(cache.layers) if layer.is_initialized])

    monkeypatch.setattr(recomputation, "keep_only", noted)
    student = checkpointed(use_reentrant=False)
    distillation_loss(student, TEACHER, batch, OBJECTIVE, tiny.candidates(batch)).loss.backward()
    # In the gold pass nothing is there before a layer writes.
    assert kept == [[], [], [0], [1]]


def test_half_precision_is_as_close_to_float64_as_the_plain_loss_in_half_precision():
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    exact = distillation_loss(STUDENT, TEACHER, batch, only(kd=Kd())).loss.item()
    student, teacher = (copy.deepcopy(model).to(torch.bfloat16) for model in (STUDENT, TEACHER))
    low = {**batch, "pixel_values": batch["pixel_values"].to(torch.bfloat16)}
    ours = distillation_loss(student, teacher, low, only(kd=Kd())).loss.item()
    with torch.no_grad():
        s, t = (m(**model_inputs(low)).logits.float().log_softmax(-1) for m in (student, teacher))
    rows = (low["labels"] != -100).roll(-1, dims=1)
    plain = (t.exp() * (t - s)).sum(-1)[rows].mean().item()
    assert abs(ours - exact) <= 1.5 * abs(plain - exact) + 0.01 * exact


# --- refusals ---------------------------------------------------------------------------------------------------------


def broken(change):
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    change(batch)
    return batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(labels=b["labels"][:, 1:]), "equal shapes"),
        (lambda b: b["roles"].__setitem__((0, 0), 7), "other than 0 other"),
        (lambda b: b["labels"].__setitem__((0, 0), 3), "disagree"),
        (lambda b: b["labels"].__setitem__(b["labels"] != -100, 1), "differs from the token"),
        (lambda b: b.update(attention_mask=torch.zeros_like(b["attention_mask"])), "padding"),
        (lambda b: (b["labels"].fill_(-100), b["roles"].fill_(0)), "no response token"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(BatchError, match=message):
        distillation_loss(STUDENT, TEACHER, broken(change), OBJECTIVE)


@pytest.mark.parametrize(
    "change",
    [lambda c: c[:, 1:], lambda c: c.clamp(min=99), lambda c: c - 100, lambda c: c[..., :0]],
)
def test_candidates_that_do_not_fit_are_refused(change):
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    with pytest.raises(BatchError, match="accepted"):
        distillation_loss(STUDENT, TEACHER, batch, OBJECTIVE, change(tiny.candidates(batch)))


def test_an_unresolved_layer_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="score_layers"):
        distillation_loss(STUDENT, TEACHER, tiny.batch(tiny.COMPOSITIONS["one turn"]), Objective())


def test_a_layer_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ModelError, match="0, 1, 2"):
        distillation_loss(STUDENT, TEACHER, tiny.batch(tiny.COMPOSITIONS["one turn"]), Objective(iva=Iva(layer=3)))


def test_a_missing_teacher_and_a_teacher_in_training_mode_are_refused():
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    with pytest.raises(ConfigError, match="no teacher"):
        distillation_loss(STUDENT, None, batch, OBJECTIVE)
    teacher = tiny.model(2).train()
    with pytest.raises(ModelError, match=r"teacher\.eval\(\)"):
        distillation_loss(STUDENT, teacher, batch, OBJECTIVE)


def test_models_that_do_not_fit_each_other_are_refused():
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    wide = tiny.model(2)
    wide.resize_token_embeddings(48)
    with pytest.raises(ModelError, match=r"40 tokens, the teacher's 48"):
        distillation_loss(STUDENT, wide, batch, OBJECTIVE)
    other = tiny.model(2)
    other.config.image_token_id = 5
    with pytest.raises(ModelError, match="image token"):
        distillation_loss(STUDENT, other, batch, OBJECTIVE)
    fine = tiny.model(2)
    fine.config.vision_config.patch_size = 2
    with pytest.raises(ModelError, match="visual tokens an image"):
        distillation_loss(STUDENT, fine, batch, OBJECTIVE)


def test_one_wrong_option_is_an_error_when_it_is_given():
    for wrong in (
        lambda: Tpa(candidates=0),
        lambda: Kd(temperature=0.0),
        lambda: Sft(wieght=1.0),
        lambda: Iva(layer=-1),
    ):
        with pytest.raises(ConfigError):
            wrong()
