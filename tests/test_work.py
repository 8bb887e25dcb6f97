"""The work of a step is counted, so that a slower step fails here whatever machine runs the tests."""

from __future__ import annotations

import pytest
import torch
from benchmarks.shapes import Decoder, Shape, Tower
from benchmarks.variants import make_variants
from benchmarks.work import Work, count, floors, phases, whole

from align_ti.losses.measures import NegativeLogLikelihood
from align_ti.losses.weighted import Rows, RowWeights, weighted_row_loss

SMALL = Shape(
    student=Decoder(hidden=64, layers=2, heads=2, key_heads=1, head_dim=32, intermediate=256),
    teacher=Decoder(hidden=128, layers=3, heads=4, key_heads=2, head_dim=32, intermediate=512),
    tower=Tower(hidden=128, layers=4, heads=2, intermediate=512),
    vocabulary=2000,
    side=9,
    instruction=10,
    response=30,
    batch=2,
)
NAMES = ("vanilla_kd", "ours_kd", "align_ti_0.25", "align_ti_0.25_two_towers")

KNOWN = {
    ("ours_kd", "flops"): 0.658,
    ("ours_kd", "bytes"): 0.766,
    ("align_ti_0.25", "flops"): 0.956,
    ("align_ti_0.25", "bytes"): 1.232,
}
"""What these ratios to vanilla KD were when they were last looked at; lower them when the step gets cheaper."""

MARGIN = 1.1
"""Counts repeat exactly; other versions of torch and transformers move them a little."""


@pytest.fixture(scope="module")
def variants():
    return {variant.name: variant for variant in make_variants(NAMES, SMALL)}


@pytest.fixture(scope="module")
def work(variants):
    return {name: whole(phases(variant)) for name, variant in variants.items()}


def ratio(work: Work, of: str, baseline: Work) -> float:
    return getattr(work, of) / getattr(baseline, of)


@pytest.mark.parametrize(("name", "of"), KNOWN)
def test_a_step_does_no_more_work_than_it_did(work, name, of):
    assert ratio(work[name], of, work["vanilla_kd"]) < KNOWN[name, of] * MARGIN


@pytest.mark.parametrize(("name", "of"), KNOWN)
def test_the_known_ratios_are_not_far_too_high(work, name, of):
    # Below a bound that a saving has left too high, a regression of that size would hide.
    found = ratio(work[name], of, work["vanilla_kd"])
    assert found > KNOWN[name, of] / 1.2, f"the step got cheaper: lower KNOWN of {name}, {of} to {found:.3f}"


@pytest.mark.parametrize("name", ["ours_kd", "align_ti_0.25"])
def test_one_more_pass_of_the_student_would_be_seen(variants, work, name):
    bench = variants[name].bench
    inputs = {key: bench.batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        _, extra = count(lambda: bench.student(**inputs, use_cache=False))
    more = whole({"step": work[name], "extra": extra})
    assert ratio(more, "flops", work["vanilla_kd"]) > KNOWN[name, "flops"] * MARGIN


def test_a_second_pass_of_the_tower_would_be_seen(work):
    seen = ratio(work["align_ti_0.25_two_towers"], "flops", work["vanilla_kd"])
    assert seen > KNOWN["align_ti_0.25", "flops"] * MARGIN


def test_the_heads_products_are_all_counted():
    # A product that adds to a sum in place counted for nothing, and flattered us.
    rows, hidden, vocabulary = 40, 8, 50
    given = Rows(
        student=torch.randn(rows, hidden, requires_grad=True),
        student_head=torch.nn.Linear(hidden, vocabulary, bias=False),
        teacher=None,
        teacher_head=None,
        labels=torch.zeros(rows, dtype=torch.long),
    )
    terms = {
        "sft": RowWeights(weights=torch.ones(rows), coefficient=torch.tensor(1.0), measure=NegativeLogLikelihood())
    }
    _, found = count(lambda: weighted_row_loss(given, terms, 7).loss.backward())
    assert found.flops == 3 * 2 * rows * hidden * vocabulary


def test_logits_of_every_token_would_be_seen(variants, work):
    bench = variants["ours_kd"].bench
    hidden = torch.zeros(SMALL.batch, bench.batch["input_ids"].shape[1], SMALL.teacher.hidden)
    _, extra = count(lambda: bench.teacher.lm_head(hidden))
    more = whole({"step": work["ours_kd"], "extra": extra})
    assert ratio(more, "flops", work["vanilla_kd"]) > KNOWN["ours_kd", "flops"] * MARGIN


def test_a_product_counts_its_flops_and_bytes():
    left, right = torch.ones(8, 16), torch.ones(16, 4)
    out, work = count(lambda: left @ right)
    assert out.shape == (8, 4)
    assert work == Work(flops=2 * 8 * 16 * 4, product_bytes=4 * (8 * 16 + 16 * 4 + 8 * 4), operations=1)
    assert (work + work).bytes_by_operation == {"aten.mm": 2 * work.bytes}


def test_views_cost_nothing_and_repeated_elements_are_read_once():
    ones = torch.ones(4, 6)
    assert count(lambda: ones.T[1:].expand(3, 5, 4))[1] == Work()
    weights = torch.ones(2, 6)
    _, rows = count(lambda: torch.nn.functional.linear(ones[None], weights))
    assert rows.bytes == 4 * (4 * 6 + 2 * 6 + 4 * 2)
    _, work = count(lambda: ones[:1].expand(100, 6) * 2)
    assert work == Work(other_bytes=4 * (4 * 6 + 100 * 6), operations=1)


def test_looking_up_rows_does_not_read_the_whole_table():
    table = torch.ones(1000, 8)
    _, work = count(lambda: torch.nn.functional.embedding(torch.tensor([1, 2, 3]), table))
    assert work == Work(other_bytes=4 * 8 * 3 * 2 + 8 * 3, operations=1)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_counts_two_products_and_backward_five(masked):
    query = torch.ones(1, 2, 16, 8, requires_grad=True)
    mask = torch.ones(16, 16, dtype=torch.bool).tril() if masked else None
    attend = torch.nn.functional.scaled_dot_product_attention
    out, forward = count(lambda: attend(query, query, query, attn_mask=mask, is_causal=not masked))
    _, backward = count(out.sum().backward)
    product = 2 * 2 * 16 * 16 * 8
    assert forward.flops == 2 * product
    assert backward.flops == 5 * product


def test_the_floor_is_the_work_at_the_ceilings():
    floor = floors(Work(flops=300, product_bytes=50, other_bytes=20), {"flops_per_second": 100, "bytes_per_second": 10})
    assert floor == {"products": 3, "other_bytes": 2, "sum": 5, "overlapped": 3}
