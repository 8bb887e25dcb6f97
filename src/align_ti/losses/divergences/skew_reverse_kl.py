"""Skew reverse KL: reverse KL against a mixture of teacher and a little of the student, which bounds it."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from align_ti.losses.divergences.base import Divergence, Rows, log_mixture, through_softmax, times


class SkewReverseKl(Divergence):
    """KL(q || alpha q + (1 - alpha) p); at most -log(alpha). Gradient flows through the mixture too.

    DistiLLM-2's released code (arXiv:2503.07067) holds the student inside the mixture fixed, which has the same value and another
    gradient.

    Source: DistiLLM, Ko et al. (arXiv:2402.03898).
    """

    name: ClassVar[str] = "skew_reverse_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """The student's share of the mixture; 0 is reverse KL."""

    def values(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """sum q log(q / m)."""
        return times(log_q.exp(), log_q - log_mixture(log_q, log_p, self.alpha)).sum(-1)

    def with_slope(self, log_p: Rows, log_q: Rows) -> tuple[Float[Tensor, " rows"], Rows]:
        """With g = q (log(q / m) - alpha q / m), up to a multiple of q, the slope is g - q sum(g)."""
        log_m, q = log_mixture(log_q, log_p, self.alpha), log_q.exp()
        log_ratio = log_q - log_m
        terms = times(q, log_ratio)
        derivative = terms - self.alpha * times(q, log_ratio.exp())
        return terms.sum(-1), through_softmax(derivative, q)
