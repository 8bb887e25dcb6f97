"""The rules of a divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from align_ti.losses.divergences.base import Divergence, read_divergence
from align_ti.losses.measures import Softened
from align_ti.losses.weighted import Rows, RowWeights, weighted_row_loss
from align_ti.registry import names
from align_ti.testing.rules import close, holds

Plain = Callable[[Float[Tensor, " vocab"], Float[Tensor, " vocab"]], float]
"""A divergence of two distributions p and q, written down once more: the plain twin."""

TEMPERATURES = (1.0, 2.5)
"""Temperatures that every rule is tried at."""

HALF = {torch.bfloat16: 1e-4, torch.float16: 1e-4}
"""How far the value of half-precision logits may be from float64's of the same logits, relative to the largest value: softmaxes run in
float32 whatever the logits are."""


def check_divergence(divergence: Divergence | str | dict[str, Any], plain: Plain | None = None) -> None:
    """Holds a divergence to the rules.

    Values are 0 where both distributions are equal and never below 0; the slope is autograd's, and finite wherever the value is; values
    with and without a slope are equal; a token that the teacher rules out gives no NaN; logits in half precision
    give float64's values to a stated error; and the chunked rows equal autograd over all rows, for vocabularies that differ too.

    Args:
        divergence: made already, or its name, with options or without.
        plain: its plain twin over two distributions, which values are to equal.

    Raises:
        AssertionError: the first rule that does not hold, with the numbers.
    """
    between = read_divergence(divergence)
    for seed in range(8):
        torch.manual_seed(seed)
        student, teacher = 2 * torch.randn(2, 6, 9, dtype=torch.float64)
        for temperature in TEMPERATURES:
            check_values(between, student, teacher, temperature, plain)
            check_slope(between, student, teacher, temperature)
        check_ruled_out(between, student, teacher)
        check_half_precision(between, student, teacher)
        check_rows(between, seed)
    check_description(between)


def values_of(
    between: Divergence, student: Tensor, teacher: Tensor, temperature: float = 1.0, *, slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Values, and slope if asked for, as the row loss asks for them."""
    labels = torch.zeros(len(student), dtype=torch.long)
    return Softened(between, temperature)(student, teacher, labels, slice(None), slope=slope)


def check_values(
    between: Divergence, student: Tensor, teacher: Tensor, temperature: float, plain: Plain | None
) -> None:
    """0 where equal, above 0 elsewhere, and equal to the plain twin."""
    values, _ = values_of(between, student, teacher, temperature)
    holds(
        bool((values > 0).all()),
        f"{between.name} is {values.tolist()} for different distributions; above 0 is expected",
    )
    equal, _ = values_of(between, student, student, temperature)
    holds(
        bool((equal.abs() < 1e-12).all()),
        f"{between.name} is {equal.tolist()} where student equals teacher; 0 is expected",
    )
    # A constant added to all logits changes no distribution.
    shifted, _ = values_of(between, student + 3, teacher - 2, temperature)
    close(shifted, values, 1e-9, f"{between.name} of logits with a constant added")
    if plain is not None:
        p, q = ((of / temperature).softmax(-1) for of in (teacher, student))
        expected = [temperature**2 * plain(one, other) for one, other in zip(p, q, strict=True)]
        close(values, torch.tensor(expected, dtype=values.dtype), 1e-9, f"{between.name} against its plain twin")


def check_slope(between: Divergence, student: Tensor, teacher: Tensor, temperature: float) -> None:
    """Values with a slope are those without, and the slope is autograd's, and sums to 0."""
    leaf = student.clone().requires_grad_()
    values, _ = values_of(between, leaf, teacher, temperature)
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    found, slope = values_of(between, student, teacher, temperature, slope=True)
    assert slope is not None
    close(found, values.detach(), 1e-12, f"{between.name} with a slope against without")
    close(temperature * slope, expected, 1e-10, f"the slope of {between.name} against autograd's")
    close(slope.sum(-1), torch.zeros(len(slope), dtype=slope.dtype), 1e-10, f"the sum of the slope of {between.name}")


def check_ruled_out(between: Divergence, student: Tensor, teacher: Tensor) -> None:
    """A token that the teacher rules out gives no NaN, and no infinite slope where the value is finite."""
    barred = teacher.clone()
    barred[:, 3] = float("-inf")
    values, _ = values_of(between, student, barred)
    found, slope = values_of(between, student, barred, slope=True)
    assert slope is not None
    holds(not bool(values.isnan().any()), f"{between.name} is not a number where the teacher rules a token out")
    holds(
        torch.equal(found.isfinite(), values.isfinite()),
        f"{between.name} with a slope is infinite where it is not without",
    )
    usable = slope[found.isfinite()]
    holds(bool(usable.isfinite().all()), f"the slope of {between.name} is not finite where its value is")


def check_half_precision(between: Divergence, student: Tensor, teacher: Tensor) -> None:
    """Half-precision logits give float64's values of the same logits."""
    for dtype, limit in HALF.items():
        low = student.to(dtype), teacher.to(dtype)
        exact, _ = values_of(between, low[0].double(), low[1].double())
        rough, slope = values_of(between, *low, slope=True)
        assert slope is not None
        apart = float((rough.double() - exact).abs().max() / exact.abs().max())
        holds(
            apart <= limit,
            f"{between.name} of {dtype} logits is {apart:.2g} from float64's; at most {limit:g} is expected",
        )
        holds(
            slope.dtype == torch.float32,
            f"the slope of {between.name} for {dtype} logits is {slope.dtype}; float32 is expected",
        )


def check_rows(between: Divergence, seed: int) -> None:
    """The row loss in chunks equals autograd over all rows at once, for shared vocabularies too."""
    torch.manual_seed(seed)
    for shared in (slice(None), slice(0, 7), torch.tensor([1, 2, 6, 8])):
        rows = Rows(
            student=torch.randn(11, 6, dtype=torch.float64, requires_grad=True),
            student_head=nn.Linear(6, 9).double(),
            teacher=torch.randn(11, 4, dtype=torch.float64),
            teacher_head=nn.Linear(4, 9).double(),
            labels=torch.zeros(11, dtype=torch.long),
            shared=shared,
        )
        weights = torch.rand(11, dtype=torch.float64).masked_fill(torch.rand(11) < 0.4, 0.0)
        term = RowWeights(
            weights=weights, coefficient=torch.tensor(0.7, dtype=torch.float64), measure=Softened(between, 1.5)
        )
        head: Any = rows.student_head
        leaves = [rows.student, *head.parameters()]
        found = torch.autograd.grad(weighted_row_loss(rows, {"term": term}, 3).loss, leaves)
        logits, other = head(rows.student)[:, shared], rows.teacher_head(rows.teacher)[:, shared]  # type: ignore[misc, arg-type]
        values, _ = values_of(between, logits, other.detach(), 1.5)
        expected = torch.autograd.grad(0.7 * (weights * values).sum(), leaves)
        for one, right in zip(found, expected, strict=True):
            close(one, right, 1e-9, f"the gradient of rows in chunks by {between.name}")
        none = replace(term, weights=torch.zeros_like(weights))
        holds(
            float(weighted_row_loss(rows, {"term": none}, 3).loss.detach()) == 0,
            f"{between.name} of rows without weight is not 0",
        )


def check_description(between: Divergence) -> None:
    """Name and options read back as the same divergence, if recipes know its name."""
    if between.name in names("divergence"):
        again = read_divergence(between.described())
        holds(again == between, f"{between.described()} reads back as {again!r}, not {between!r}")
    holds(hash(between) == hash(between.model_copy()), f"{between.name} has another hash than its copy")
