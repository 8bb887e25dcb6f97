"""What is measured on one row, one position whose next-token distribution is compared: a likelihood, or a divergence at a
temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align_ti.losses.divergences.base import Divergence

Shared = slice | Int[Tensor, " shared"]
"""Logits that two heads have in common: a slice, or token ids."""

Measured = tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"] | None]
"""The value of each row and, if asked for, its slope."""


@runtime_checkable
class Measure(Protocol):
    """A number of each row, and its slope: the gradient at the student's logits divided by `temperature`.

    It is hashable: rows with the same measure are compared together.
    """

    @property
    def reads_teacher(self) -> bool:
        """Whether rows of the teacher are compared."""
        ...

    @property
    def temperature(self) -> float:
        """What a slope is still to be multiplied by."""
        ...

    def __call__(
        self,
        student: Float[Tensor, "rows vocab"],
        teacher: Float[Tensor, "rows teacher_vocab"] | None,
        labels: Int[Tensor, " rows"],
        shared: Shared,
        *,
        slope: bool,
    ) -> Measured:
        """The values of some rows, and their slope over all of the student's logits if asked for."""
        ...


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """-log q(label) in nats, over all of the student's own tokens.

    Source: Align-TI (arXiv:2602.09483), the SFT term.
    """

    reads_teacher: ClassVar[bool] = False
    temperature: ClassVar[float] = 1.0

    def __call__(
        self,
        student: Float[Tensor, "rows vocab"],
        teacher: Float[Tensor, "rows teacher_vocab"] | None,
        labels: Int[Tensor, " rows"],
        shared: Shared,
        *,
        slope: bool,
    ) -> Measured:
        """The slope is the distribution less 1 at the label."""
        log_q, index = softened(student), labels[:, None]
        values = -log_q.gather(-1, index).squeeze(-1)
        return values, log_q.exp_().scatter_add_(-1, index, log_q.new_full(index.shape, -1.0)) if slope else None


@dataclass(frozen=True, slots=True)
class Softened:
    """A divergence between both distributions softened by a temperature, times its square, which keeps the gradient's size.

    Both are renormalised over the tokens that the two models share.
    """

    divergence: Divergence
    temperature: float = 1.0
    reads_teacher: ClassVar[bool] = True

    def __call__(
        self,
        student: Float[Tensor, "rows vocab"],
        teacher: Float[Tensor, "rows teacher_vocab"] | None,
        labels: Int[Tensor, " rows"],
        shared: Shared,
        *,
        slope: bool,
    ) -> Measured:
        """The divergence's own values and slope, at the logits that both models have."""
        assert teacher is not None, "a term compares distributions, but there are no teacher rows"
        log_p, log_q = (softened(of[:, shared], self.temperature) for of in (teacher, student))
        wide = torch.promote_types(log_p.dtype, log_q.dtype)
        log_p, log_q = log_p.to(wide), log_q.to(wide)
        if not slope:
            return self.divergence.values(log_p, log_q) * self.temperature**2, None
        values, found = self.divergence.with_slope(log_p, log_q)
        values = values * self.temperature**2
        if isinstance(shared, slice) and found.shape == student.shape:
            return values, found
        whole = found.new_zeros(student.shape)
        whole[:, shared] = found
        return values, whole


def at_least_float32(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    """Logits in float32, or in float64 if they are: a softmax in half precision loses the tail of the vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def softened(logits: Float[Tensor, "rows vocab"], temperature: float = 1.0) -> Float[Tensor, "rows vocab"]:
    """Log probabilities at this temperature, in new memory, in float32 or wider."""
    wide = at_least_float32(logits)
    return (wide if temperature == 1 else wide / temperature).log_softmax(-1)
