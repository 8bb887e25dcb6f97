"""Tokens to try in rows: nothing is lost, every row is of one sample, and the width is the cheapest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align_ti.models import branches as layout
from align_ti.models.branches import Branches, best_width

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def made(counts: list[int]) -> Branches:
    sample = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    number = torch.arange(1, len(sample) + 1)
    return Branches.of(sample, 10 * number, number, len(counts))


@given(counts=COUNTS, width=st.integers(1, 10))
def test_every_branch_has_a_slot_in_a_row_of_its_sample(counts, width):
    branches = made(counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "best_width", lambda counts, keys: width)
        rows = branches.in_rows(keys=3)
    assert rows.tokens.shape == rows.replaces.shape == (sum(-(-count // width) for count in counts), width)
    assert rows.counts == tuple(-(-count // width) for count in counts)
    assert torch.equal(rows.flat(rows.tokens[..., None].float()).flatten(), branches.tokens.float())
    assert torch.equal(rows.flat(rows.replaces[..., None].float()).flatten(), branches.replaces.float())
    assert int((rows.tokens != 0).sum()) == len(branches), "a slot left over holds something"
    of_row = rows.by_row(torch.arange(len(counts)))
    assert torch.equal(of_row[rows.slots // width], branches.samples)


@given(counts=COUNTS)
def test_in_a_row_each_every_sample_has_its_own(counts):
    rows = made(counts).a_row_each()
    assert rows.tokens.shape == (len(counts), max(counts))
    assert (rows.tokens != 0).sum(-1).tolist() == counts
    values = torch.randn(len(counts), 2)
    assert rows.by_row(values) is values


def test_samples_without_branches_have_no_row_and_others_several():
    rows = made([0, 5, 0, 2]).in_rows(keys=0)
    assert rows.width in {1, 2, 5}
    assert rows.counts[0] == rows.counts[2] == 0
    values = torch.randn(3, 4, 2, requires_grad=True)
    spread = rows.by_row(values, dim=1)
    known = values.detach()[:, [sample for sample, count in enumerate(rows.counts) for _ in range(count)]]
    assert torch.equal(spread, known)
    spread.sum().backward()
    assert values.grad is not None
    assert values.grad[0, :, 0].tolist() == [float(count) for count in rows.counts]


@given(counts=COUNTS, keys=st.integers(0, 100), longest=st.integers(1, 8))
def test_no_other_width_costs_less(counts, keys, longest):
    def cost(width: int) -> float:
        return sum(-(-count // width) for count in counts) * (width + keys / layout.KEYS_OF_A_SLOT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "LONGEST_ROW", longest)
        found = best_width(tuple(counts), keys)
    widths = range(1, min(longest, max(counts)) + 1)
    assert found in widths
    assert cost(found) == pytest.approx(min(map(cost, widths)))


def test_rows_get_longer_where_keys_are_many_and_never_too_long():
    counts = (3, 30)
    assert best_width(counts, 0) < best_width(counts, 10_000) == 30
    assert best_width((2400, 2400), 10_000) <= layout.LONGEST_ROW
