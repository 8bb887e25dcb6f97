"""Attention read on the way past equals the matrices that an eager model returns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align_ti.data.roles import model_inputs
from align_ti.errors import BatchError, ModelError
from align_ti.interactions.layer_scores import score_layers
from align_ti.interactions.visual import visual_weights
from align_ti.models.attention import mean_attention, own_attention, watching
from align_ti.models.continuation import read
from tests import plain, tiny


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "name", ["one turn", "several turns", "several images", "text only in the batch", "image last"]
)
def test_captured_attention_equals_eager_attention_at_every_layer(name, side, attention):
    model = tiny.model(2, layers=3, attention=attention)
    batch = tiny.batch(tiny.COMPOSITIONS[name], side=side, extra_padding=2)
    with torch.no_grad(), watching(model, batch["roles"] == 2, (0, 1, 2)) as watch:
        read(model, model_inputs(batch), keep_cache=False)
    for index, sample in enumerate(plain.samples(batch)):
        for layer in range(3):
            expected = plain.eager_focus(model, sample, layer)
            if expected is not None:
                got = watch.means[layer][index][batch["roles"][index] == 1]
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert model.config.get_text_config()._attn_implementation == attention


@given(
    seed=st.integers(0, 100),
    batch=st.integers(1, 3),
    seq=st.integers(1, 6),
    groups=st.integers(1, 3),
    kind=st.integers(0, 2),
)
def test_mean_attention_equals_softmax_written_out(seed, batch, seq, groups, kind):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 2 * groups, seq, 4, generator=random, dtype=torch.float64)
    key = torch.randn(batch, 2, seq, 4, generator=random, dtype=torch.float64)
    queries = torch.rand(batch, seq, generator=random) < 0.5
    causal = torch.ones(seq, seq, dtype=torch.bool).tril()
    additive = torch.zeros(1, 1, seq, seq, dtype=torch.float64).masked_fill(~causal, torch.finfo(torch.float64).min)
    mask = [None, causal[None, None], additive][kind]
    got = mean_attention(query, key, mask, queries)
    for b in range(batch):
        rows = []
        for j in queries[b].nonzero().flatten():
            for h in range(2 * groups):
                scores = (query[b, h, j] @ key[b, h // groups, : j + 1].T) / 2
                rows.append(torch.nn.functional.pad(scores.softmax(-1), (0, seq - 1 - int(j))))
        expected = torch.stack(rows).mean(0) if rows else torch.zeros(seq, dtype=torch.float64)
        torch.testing.assert_close(got[b], expected, rtol=1e-9, atol=1e-12)


def fail_inside(model):
    assert model.config.get_text_config()._attn_implementation != "sdpa"
    raise RuntimeError("inside")


def test_our_attention_entry_leaves_no_trace_even_after_an_error():
    model = tiny.model(1)
    with pytest.raises(RuntimeError, match="inside"), own_attention(model):
        fail_inside(model)
    assert {m.config._attn_implementation for m in model.get_decoder().modules() if hasattr(m, "config")} == {"sdpa"}


def test_attention_that_is_not_captured_is_an_error_not_a_zero():
    model = tiny.model(1)
    queries = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ModelError, match="not captured"), watching(model, queries, (0,)):
        pass  # no forward pass: the layer was never reached


def test_layer_scores_equal_their_formula():
    model = tiny.model(2, layers=3)
    groups = []
    for seed, size in ((0, 2), (1, 3)):
        batch = tiny.batch(tuple((tiny.Turn(1, 2 + index, 1),) for index in range(size)), seed=seed)
        batch["pixel_values"] = batch["pixel_values"][:1].expand(size, -1, -1, -1).clone()
        groups.append(batch)
    got = score_layers(model, groups)
    expected = plain.irs(model, groups, 3)
    assert got.keys() == expected.keys()
    for layer, score in expected.items():
        assert got[layer] == pytest.approx(score, abs=1e-6)


def test_equal_instructions_score_zero():
    model = tiny.model(2)
    batch = tiny.batch(((tiny.Turn(1, 3, 1),),))
    double = {name: torch.cat([value, value]) for name, value in batch.items()}
    assert all(abs(score) < 1e-9 for score in score_layers(model, [double]).values())


@pytest.mark.parametrize("name", ["text only", "text only in the batch", "empty instruction", "image last"])
def test_groups_that_share_no_image_are_refused(name):
    with pytest.raises(BatchError, match="one image under two or more"):
        score_layers(tiny.model(2), [tiny.batch(tiny.COMPOSITIONS[name])])
    with pytest.raises(BatchError, match="no groups"):
        score_layers(tiny.model(2), [])


@given(seed=st.integers(0, 200), images=st.sampled_from(["together", "separately"]))
def test_visual_weights_of_a_sample_sum_to_one_or_to_nothing(seed, images):
    random = torch.Generator().manual_seed(seed)
    attention = torch.rand(4, 9, generator=random, dtype=torch.float64) + 1e-6
    visual = torch.rand(4, 9, generator=random) < 0.5
    instruction = (torch.rand(4, 9, generator=random) < 0.15) & ~visual
    weights = visual_weights(attention, visual, instruction, images)
    counted = torch.tensor(
        [any(v and bool(i[n:].any()) for n, v in enumerate(vs)) for vs, i in zip(visual, instruction, strict=True)]
    )
    torch.testing.assert_close(weights.sum(-1), counted.double())
    assert bool((weights[~visual] == 0).all())


@given(
    seed=st.integers(0, 200),
    share=st.floats(0.05, 1.0, exclude_max=True),
    images=st.sampled_from(["together", "separately"]),
)
def test_a_share_of_the_attention_keeps_the_fewest_tokens_that_hold_it(seed, share, images):
    random = torch.Generator().manual_seed(seed)
    attention = torch.rand(4, 9, generator=random, dtype=torch.float64) + 1e-6
    visual = torch.rand(4, 9, generator=random) < 0.6
    instruction = (torch.rand(4, 9, generator=random) < 0.15) & ~visual
    whole = visual_weights(attention, visual, instruction, images)
    part = visual_weights(attention, visual, instruction, images, share=share)
    for all_of_it, kept in zip(whole, part, strict=True):
        if not all_of_it.any():
            assert not kept.any()
            continue
        held = all_of_it[kept > 0]
        assert float(held.sum()) >= share - 1e-12
        assert float(held.sum() - held.min()) < share
        assert held.min() >= all_of_it[kept == 0].max() if bool((kept == 0).any()) else True
        torch.testing.assert_close(kept[kept > 0], held / held.sum())


def test_a_share_of_the_attention_of_one_is_all_of_it():
    attention = torch.rand(2, 7, dtype=torch.float64)
    visual = torch.tensor([[True] * 5 + [False] * 2] * 2)
    instruction = ~visual
    whole = visual_weights(attention, visual, instruction)
    assert torch.equal(visual_weights(attention, visual, instruction, share=1.0), whole)


def test_attention_is_read_in_float32_under_autocast():
    # Autocast turned the product of float32 queries and keys back into bfloat16, which put weights off by per cents.
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 5, 8)
    queries = torch.ones(1, 5, dtype=torch.bool)
    expected = mean_attention(query, key, None, queries)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mean_attention(query, key, None, queries), expected)
