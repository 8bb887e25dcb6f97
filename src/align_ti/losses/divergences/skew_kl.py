"""Skew KL: forward KL against a mixture of student and a little of the teacher, which bounds it."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from align_ti.losses.divergences.base import Divergence, Rows, log_mixture, through_softmax, times


class SkewKl(Divergence):
    """KL(p || alpha p + (1 - alpha) q); at most -log(alpha).

    Near p = q it is (1 - alpha)^2 times forward KL, so at equal weight it is weaker.

    Source: DistiLLM, Ko et al. (arXiv:2402.03898).
    """

    name: ClassVar[str] = "skew_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """The teacher's share of the mixture; 0 is forward KL."""

    def values(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """sum p log(p / m)."""
        return times(log_p.exp(), log_p - log_mixture(log_p, log_q, self.alpha)).sum(-1)

    def with_slope(self, log_p: Rows, log_q: Rows) -> tuple[Float[Tensor, " rows"], Rows]:
        """With h = (1 - alpha)^2 q (q - p) / m the slope is h - q sum(h).

        That is g - q sum(g) for g = -(1 - alpha) q p / m, which differs from h by a multiple of q alone; h is small near p = q, where g
        would cancel.
        """
        log_m, p, q = log_mixture(log_p, log_q, self.alpha), log_p.exp(), log_q.exp()
        derivative = times(q, (log_q - log_m).exp()) - times(p, (log_q - log_m).exp())
        return times(p, log_p - log_m).sum(-1), through_softmax(derivative.mul_((1 - self.alpha) ** 2), q)
