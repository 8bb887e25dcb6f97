"""Tokens to try in place of gold tokens, and the rows in which a model reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

LONGEST_ROW = 256
"""Branches of one row at most. Each row's mask holds the square of its width, so a limit keeps time and memory linear in the number of
branches."""

KEYS_OF_A_SLOT = 2
"""Gold keys whose copies, which a row needs in every layer, count as much as one slot more. The slots of a tiny model are cheaper, so
for it this is too high (docs/performance.md, rows of candidates)."""


@dataclass(frozen=True, slots=True)
class Branches:
    """Tokens to try, sample by sample.

    `replaces` is the sequence index of the gold token that a branch replaces; `counts` how many branches each sample has.
    """

    tokens: Int[Tensor, " branches"]
    replaces: Int[Tensor, " branches"]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, sample: Int[Tensor, " branches"], tokens: Tensor, replaces: Tensor, batch: int) -> Branches:
        """Branches whose samples are given one by one, in ascending order."""
        return cls(tokens, replaces, tuple(torch.bincount(sample, minlength=batch).tolist()))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def samples(self) -> Int[Tensor, " branches"]:
        """The sample of each branch."""
        counts = torch.tensor(self.counts)
        return torch.arange(len(counts)).repeat_interleave(counts).to(self.tokens.device)

    def in_rows(self, keys: int) -> Layout:
        """In as many rows as are cheapest: a sample may take several, so that one with many branches does not widen all others' rows.

        Args:
            keys: gold keys of a sample, which every row needs a copy of.
        """
        return self._laid_out(best_width(self.counts, keys), least=0)

    def a_row_each(self) -> Layout:
        """In one row for each sample, whether it has branches or not."""
        return self._laid_out(max(self.counts), least=1)

    def _laid_out(self, width: int, least: int) -> Layout:
        counts = torch.tensor(self.counts)
        rows = (counts + width - 1).div(max(width, 1), rounding_mode="floor").clamp(min=least)
        # Branches of a sample stand side by side from its first row on; what is left of its last row stays empty.
        shift = (rows.cumsum(0) - rows) * width - (counts.cumsum(0) - counts)
        slots = (torch.arange(len(self)) + shift.repeat_interleave(counts)).to(self.tokens.device)
        number = int(rows.sum())

        def spread(values: Int[Tensor, " branches"]) -> Int[Tensor, "rows width"]:
            return values.new_zeros(number * width).index_copy_(0, slots, values).view(number, width)

        return Layout(spread(self.tokens), spread(self.replaces), slots, tuple(rows.tolist()))


@dataclass(frozen=True, slots=True)
class Layout:
    """Branches in rows of one width, each row of one sample, sample by sample. Slots left over hold token 0 at index 0.

    `slots` is where each branch stands among the slots of all rows; `counts` is how many rows each sample has.
    """

    tokens: Int[Tensor, "rows width"]
    replaces: Int[Tensor, "rows width"]
    slots: Int[Tensor, " branches"]
    counts: tuple[int, ...]

    @property
    def width(self) -> int:
        """Slots of a row."""
        return self.tokens.shape[1]

    def by_row(self, values: Tensor, dim: int = 0) -> Tensor:
        """What is given for each sample, for each row.

        The gradient of a sample is one sum over its rows: picking rows by index would add them up one after the other, on an
        accelerator in any order.
        """
        if all(count == 1 for count in self.counts):
            return values
        parts = zip(values.split(1, dim), self.counts, strict=True)
        return torch.cat([expanded(part, dim, count) for part, count in parts if count], dim)

    def flat(self, hidden: Float[Tensor, "rows width hidden"]) -> Float[Tensor, "branches hidden"]:
        """What the model made of each branch."""
        return hidden.flatten(0, 1).index_select(0, self.slots.to(hidden.device))


def expanded(values: Tensor, dim: int, count: int) -> Tensor:
    """Values of size 1 along a dimension, seen this often along it."""
    sizes = [-1] * values.dim()
    sizes[dim] = count
    return values.expand(sizes)


def best_width(counts: tuple[int, ...], keys: int) -> int:
    """The width of rows at which slots, used or not, and the copies of gold keys that rows need cost least together.

    One of `counts` at least is not 0.
    """
    widths = torch.arange(1, min(max(counts), LONGEST_ROW) + 1)
    rows = (torch.tensor(counts)[:, None] + widths - 1).div(widths, rounding_mode="floor").sum(0)
    # Of equal ones the widest, which has fewest rows.
    cost = (rows * (widths + keys / KEYS_OF_A_SLOT)).flip(0)
    return int(widths.flip(0)[cost.argmin()])
