"""Weighted sums over rows: one projection to the vocabulary for all terms, in chunks, with the gradient taken on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from align_ti.losses.measures import Measure, Shared

CHUNK_LOGITS = {"cpu": 2**24, "accelerator": 2**27}
"""Logits of one model that exist at a time when no chunk size is given: 64 MiB in float32 on a CPU, 256 MiB in bfloat16 elsewhere. Each
chunk reads and writes the gradient of the whole head, so an accelerator needs more rows for its products to be what takes the time."""

BLOCK_LOGITS = {"cpu": 2**18, "accelerator": 2**25}
"""Logits compared at a time: on a CPU 1 MiB in float32, so that the passes over them stay in a core's cache; on
accelerators 128 MiB, of which comparing takes about four."""


EVERY = slice(None)
"""All logits: two heads of the same tokens."""


@runtime_checkable
class Head(Protocol):
    """What projects rows to the vocabulary: a linear layer, or a model's own way behind its backbone.

    A head may have a property `linear`: the linear layer that it is no more than, or None. Its products then need no autograd.
    """

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """The logits of each row."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """The weights that the projection depends on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWeights:
    """One term: how much each row counts in it, and what its weighted sum is multiplied by in the loss.

    A row of weight 0 is not part of the term.
    """

    weights: Float[Tensor, " rows"]
    coefficient: Float[Tensor, ""]
    measure: Measure


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
    """sum over terms of coefficient * sum over rows of weight * measure(row).

    Here each chunk of rows is projected, compared, and its gradient taken at once, so that the logits of one chunk are all that ever
    exists, and backward costs nothing but a product. The gradient at the logits comes from the measure, where built-in ones have it
    written down. A row without weight in a term is left out of it rather than multiplied by 0, so that an infinite divergence there
    cannot turn the sum into NaN; a row without weight in any term is not projected.

    Args:
        rows: the rows to compare.
        terms: the weighting of each term, by name.
        chunk_rows: rows projected at a time; by default as many as hold `CHUNK_LOGITS` logits.
    """
    head = rows.student_head
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if chunk_rows is None:
        chunk_rows = rows_at_a_time(CHUNK_LOGITS, vocabulary(head), rows.student.device)
    names = list(terms)
    wanted = torch.is_grad_enabled() and (rows.student.requires_grad or bool(parameters))
    loss, totals = _ChunkedRows.apply(  # type: ignore[no-untyped-call]
        rows, [terms[name] for name in names], chunk_rows, wanted, rows.student, *parameters
    )
    return RowLoss(loss=loss, totals=dict(zip(names, totals.unbind(), strict=True)))


def rows_at_a_time(logits: Mapping[str, int], tokens: int, device: torch.device) -> int:
    """Rows that hold as many logits as the device's limit says."""
    return max(1, logits["cpu" if device.type == "cpu" else "accelerator"] // tokens)


def vocabulary(head: Head) -> int:
    """Number of logits that a head gives for a row."""
    features = getattr(head, "out_features", None)
    return features if isinstance(features, int) else int(next(iter(head.parameters())).shape[0])


def chunks_alike(
    terms: Sequence[RowWeights], chunk_rows: int
) -> Iterator[tuple[Int[Tensor, " chunk"], tuple[Measure, ...]]]:
    """The rows that have weight, in chunks in which every row needs the same measures, with these measures.

    Rows that need the same are brought together once, so that no chunk computes what some of its rows do not need.
    """
    measures = list(dict.fromkeys(term.measure for term in terms))
    needs = sum(
        torch.stack([term.weights != 0 for term in terms if term.measure == measure]).any(0) * 2**bit
        for bit, measure in enumerate(measures)
    )
    assert isinstance(needs, Tensor)
    order = needs.argsort(stable=True)
    # The one wait for the device: everything after it is known on the host.
    counts = torch.bincount(needs, minlength=2 ** len(measures)).tolist()
    start = 0
    for need, count in enumerate(counts):
        if need and count:
            needed = tuple(measure for bit, measure in enumerate(measures) if need >> bit & 1)
            for chunk in order[start : start + count].split(chunk_rows):
                yield chunk, needed
        start += count


class _Linear:
    """A projection that is one matrix product: its gradient is two more, into memory that is there already."""

    owns_logits = True

    def __init__(self, linear: nn.Linear, parameters: Sequence[nn.Parameter], rows: int) -> None:
        self.weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self.trained = [parameter is linear.weight for parameter in parameters]
        self.memory = self.weight.new_empty(rows, len(self.weight))

    def forward(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """The logits, in memory that the next call uses again: fresh memory has to be cleared by the system each time."""
        logits = torch.mm(hidden, self.weight.T, out=self.memory[: len(hidden)])
        return logits if self.bias is None else logits.add_(self.bias)

    def backward(
        self,
        hidden: Float[Tensor, "rows hidden"],
        gradient: Float[Tensor, "rows vocab"],
        sums: Sequence[Tensor],
    ) -> Float[Tensor, "rows hidden"]:
        """The gradient at the hidden states; that of the weights is added to the sums."""
        for total, is_weight in zip(sums, self.trained, strict=True):
            if not is_weight:
                total += gradient.sum(0)
            elif total.dtype == gradient.dtype:
                total.addmm_(gradient.T, hidden)
            else:
                total += gradient.T @ hidden
        return gradient @ self.weight


class _ThroughAutograd:
    """Any other projection, by autograd."""

    owns_logits = False

    def __init__(self, head: Head, parameters: Sequence[nn.Parameter], wanted: bool) -> None:
        self.head, self.parameters, self.wanted = head, parameters, wanted
        self.kept: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """The logits."""
        with torch.set_grad_enabled(self.wanted):
            chunk = hidden.detach().requires_grad_(self.wanted)
            logits = self.head(chunk)
        self.kept = (chunk, logits) if self.wanted else None
        return logits.detach()

    def backward(
        self,
        _hidden: Float[Tensor, "rows hidden"],
        gradient: Float[Tensor, "rows vocab"],
        sums: Sequence[Tensor],
    ) -> Float[Tensor, "rows hidden"]:
        """The gradient at the hidden states; that of the weights is added to the sums."""
        assert self.kept is not None, "forward was not called"
        (chunk, logits), self.kept = self.kept, None
        result, *found = torch.autograd.grad(logits, [chunk, *self.parameters], gradient)
        for total, grad in zip(sums, found, strict=True):
            total += grad
        return result


def projected(
    head: Head, hidden: Tensor, parameters: Sequence[nn.Parameter], chunk_rows: int, wanted: bool
) -> _Linear | _ThroughAutograd:
    """How rows are projected and the gradient comes back."""
    linear = head if isinstance(head, nn.Linear) else getattr(head, "linear", None)
    if linear is None or not is_plain(linear, hidden):
        return _ThroughAutograd(head, parameters, wanted)
    return _Linear(linear, parameters, min(chunk_rows, len(hidden)))


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps what is to be called around it."""


PLAIN = (nn.Parameter, FakeTensor)
"""Types of weights that a product may take as they are; a fake one has the shape of a plain one and no memory (planning)."""


def is_plain(linear: nn.Linear, hidden: Tensor) -> bool:
    """Whether the layer's product is that of its weights as they are: no hook, no quantised or sharded weights, no autocast."""
    own = [linear.weight, *([] if linear.bias is None else [linear.bias])]
    return (
        # FSDP 2 gives a layer a class of its own, with the forward that it had.
        type(linear).forward is nn.Linear.forward
        and not any(getattr(linear, hooks) for hooks in HOOKS)
        and "forward" not in vars(linear)
        and all(type(weight) in PLAIN and weight.dtype == hidden.dtype for weight in own)
        and not torch.is_autocast_enabled(hidden.device.type)
    )


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
        ours, theirs = (
            projected(rows.student_head, hidden, parameters, chunk_rows, wanted),
            None
            if rows.teacher is None or rows.teacher_head is None
            else projected(rows.teacher_head, rows.teacher, (), chunk_rows, False),
        )
        for index, measures in chunks_alike(terms, chunk_rows):
            given = hidden[index].detach()
            logits, teacher = ours.forward(given), None
            if theirs is not None and rows.teacher is not None and any(one.reads_teacher for one in measures):
                # A teacher on another device projects there.
                teacher = theirs.forward(rows.teacher[index.to(rows.teacher.device)]).to(logits.device)
            scales = {
                measure: sum(
                    (coefficient / unit * term.weights[index])
                    for term, coefficient in zip(terms, coefficients, strict=True)
                    if term.measure == measure
                )
                for measure in measures
            }
            # What autograd keeps of a projection may be the logits themselves; else the gradient takes their memory.
            gradient = (logits if ours.owns_logits else torch.empty_like(logits)) if wanted else None
            values = compare(logits, teacher, rows.labels[index], scales, rows.shared, gradient)
            for place, term in enumerate(terms):
                if term.measure in values:
                    found = values[term.measure]
                    totals[place] += (term.weights[index].to(found) * found).sum().to(totals)
            if gradient is not None:
                grads[0][index] = ours.backward(given, gradient, grads[1:]).to(grads[0])
        ctx.grads, ctx.unit, ctx.dtypes = grads, unit, [leaf.dtype for leaf in leaves]
        ctx.mark_non_differentiable(totals)
        return (coefficients * totals).sum(), totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, _totals_grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = loss_grad * ctx.unit
        scaled = [(grad * scale.to(grad)).to(dtype) for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)]
        return (None, None, None, None, *scaled)


def compare(
    logits: Float[Tensor, "rows vocab"],
    teacher: Float[Tensor, "rows teacher_vocab"] | None,
    labels: Int[Tensor, " rows"],
    scales: Mapping[Measure, Float[Tensor, " rows"]],
    shared: Shared,
    gradient: Float[Tensor, "rows vocab"] | None,
) -> dict[Measure, Float[Tensor, " rows"]]:
    """The value of each row by each measure that has a scale.

    `gradient`, which may be the memory of the logits, is filled with the gradient of the sum of scale * value. A few rows are done
    at a time, so that the passes over them stay in a CPU's cache.
    """
    step = rows_at_a_time(BLOCK_LOGITS, logits.shape[-1], logits.device)
    found: dict[Measure, list[Tensor]] = {measure: [] for measure in scales}
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        mine, its = logits[part], None if teacher is None else teacher[part]
        slopes: list[tuple[Tensor, Tensor]] = []
        for measure, scale in scales.items():
            values, slope = measure(mine, its, labels[part], shared, slope=gradient is not None)
            found[measure].append(values)
            if slope is not None:
                slopes.append((slope, (measure.temperature * scale[part]).to(slope)[:, None]))
        if gradient is not None:
            # Only now, for the logits may be what it is written over.
            (slope, scale), *others = slopes
            torch.mul(slope, scale, out=gradient[part])
            for slope, scale in others:
                gradient[part].add_(slope.mul_(scale))
    return {measure: torch.cat(values) for measure, values in found.items()}
