"""Weighted sums over rows: one projection to the vocabulary for all terms, in chunks, with the gradient taken on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from align_ti.losses.divergence import forward_kl, negative_log_likelihood

CHUNK_LOGITS = 2**23
"""Logits of one model that exist at a time when no chunk size is given: 32 MiB in float32."""


Shared = slice | Int[Tensor, " shared"]
"""Logits that two heads have in common: a slice, or token ids."""

EVERY = slice(None)
"""All logits: two heads of the same tokens."""


@runtime_checkable
class Head(Protocol):
    """What projects rows to the vocabulary: a linear layer, or a model's own way behind its backbone."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """The logits of each row."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """The weights that the projection depends on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWeights:
    """One term: how much each row counts in it, and what its weighted sum is multiplied by in the loss.

    A row of weight 0 is not part of the term. `temperature` None means the negative log-likelihood of the row's label,
    a number the forward KL at that temperature.
    """

    weights: Float[Tensor, " rows"]
    coefficient: Float[Tensor, ""]
    temperature: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows that are compared: hidden states of both models, the functions that project them, and labels.

    `teacher_head` is None when no term compares distributions. Labels are read only where a likelihood has weight.
    `shared` picks the logits of the tokens that both vocabularies hold: distributions are compared over them alone, each
    renormalised there. The likelihood is the student's own, over all of its tokens.
    """

    student: Float[Tensor, "rows student_hidden"]
    student_head: Head
    teacher: Float[Tensor, "rows teacher_hidden"] | None
    teacher_head: Head | None
    labels: Int[Tensor, " rows"]
    shared: Shared = field(default_factory=lambda: EVERY)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLoss:
    """`loss` carries the gradient; `totals` are each term's weighted sum over rows, detached."""

    loss: Float[Tensor, ""]
    totals: Mapping[str, Float[Tensor, ""]]


def weighted_row_loss(rows: Rows, terms: Mapping[str, RowWeights], chunk_rows: int | None = None) -> RowLoss:
    """sum over terms of coefficient * sum over rows of weight * divergence(row).

    The plain formula is `term_values` on all rows at once. Here each chunk of rows is projected, compared, and its gradient
    taken at once, so that the logits of one chunk are all that ever exists, and backward costs nothing but a product.

    Args:
        rows: the rows to compare.
        terms: the weighting of each term, by name.
        chunk_rows: rows projected at a time; by default as many as hold `CHUNK_LOGITS` logits.
    """
    head = rows.student_head
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_LOGITS // vocabulary(head))
    names = list(terms)
    wanted = torch.is_grad_enabled() and (rows.student.requires_grad or bool(parameters))
    loss, totals = _ChunkedRows.apply(  # type: ignore[no-untyped-call]
        rows, [terms[name] for name in names], chunk_rows, wanted, rows.student, *parameters
    )
    return RowLoss(loss=loss, totals=dict(zip(names, totals.unbind(), strict=True)))


def vocabulary(head: Head) -> int:
    """Number of logits that a head gives for a row."""
    features = getattr(head, "out_features", None)
    return features if isinstance(features, int) else int(next(iter(head.parameters())).shape[0])


def term_values(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows teacher_vocab"] | None,
    labels: Int[Tensor, " rows"],
    terms: Sequence[RowWeights],
    shared: Shared = EVERY,
) -> Float[Tensor, " terms"]:
    """Each term's weighted sum over the given rows.

    Rows without weight in a term are left out of its sum rather than multiplied by 0, so that an infinite divergence there
    cannot turn the sum into a not-a-number. Each distinct temperature is computed once, on the rows that need it. `shared` is
    as in `Rows`.
    """
    values: dict[float | None, Tensor] = {}
    for temperature in dict.fromkeys(term.temperature for term in terms):
        needed = torch.stack([term.weights != 0 for term in terms if term.temperature == temperature]).any(0)
        index = needed.nonzero().squeeze(-1)
        if temperature is None:
            computed = negative_log_likelihood(student_logits[index], labels[index])
        else:
            assert teacher_logits is not None, "a term compares distributions, but there are no teacher rows"
            computed = forward_kl(student_logits[index][:, shared], teacher_logits[index][:, shared], temperature)
        values[temperature] = computed.new_zeros(needed.shape).index_put((index,), computed)
    return torch.stack([(term.weights.to(values[term.temperature]) * values[term.temperature]).sum() for term in terms])


class _ChunkedRows(torch.autograd.Function):
    """The loss over all chunks; the gradient into hidden states and head is ready when forward returns.

    Gradients are taken of the loss times a scale that brings its largest coefficient to 1, and kept in float32 or wider: divided by
    a mass of thousands, half precision would lose them before a gradient scaler could help.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Rows,
        terms: Sequence[RowWeights],
        chunk_rows: int,
        wanted: bool,
        hidden: Float[Tensor, "rows hidden"],
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        coefficients = torch.stack([term.coefficient for term in terms])
        largest = coefficients.abs().max()
        unit = torch.where(largest > 0, largest, 1.0)
        totals = torch.zeros_like(coefficients)
        leaves = [hidden, *parameters] if wanted else []
        grads = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
        for start in range(0, len(hidden), chunk_rows):
            part = slice(start, start + chunk_rows)
            chunk = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                values = term_values(
                    rows.student_head(chunk),
                    _teacher_logits(rows, part),
                    rows.labels[part],
                    [_part(term, part) for term in terms],
                    rows.shared,
                )
                objective = ((coefficients / unit).to(values) * values).sum()
            totals += values.detach().to(totals)
            if wanted:
                chunk_grad, *head_grads = torch.autograd.grad(objective, [chunk, *parameters])
                grads[0][part] = chunk_grad
                for total, grad in zip(grads[1:], head_grads, strict=True):
                    total += grad
        ctx.grads, ctx.unit, ctx.dtypes = grads, unit, [leaf.dtype for leaf in leaves]
        ctx.mark_non_differentiable(totals)
        return (coefficients * totals).sum(), totals

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _totals_grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = loss_grad * ctx.unit
        scaled = [(grad * scale.to(grad)).to(dtype) for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)]
        return (None, None, None, None, *scaled)


@torch.no_grad()
def _teacher_logits(rows: Rows, part: slice) -> Tensor | None:
    if rows.teacher is None or rows.teacher_head is None:
        return None
    # A teacher on another device projects there.
    return rows.teacher_head(rows.teacher[part]).to(rows.labels.device)


def _part(term: RowWeights, part: slice) -> RowWeights:
    return RowWeights(weights=term.weights[part], coefficient=term.coefficient, temperature=term.temperature)
