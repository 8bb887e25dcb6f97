"""Total variation distance: the probability mass that differs between the two distributions."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from align_ti.losses.divergences.base import Divergence, Rows, through_softmax


class TotalVariation(Divergence):
    """1/2 sum |p - q|, between 0 and 1; a probability, not nats.

    It is not quadratic near p = q: its gradient does not vanish as the student approaches the teacher, and the squared
    temperature does not keep the gradient's size.

    Source: f-distill, Wen et al. (arXiv:2307.15190).
    """

    name: ClassVar[str] = "total_variation"

    def values(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """Half the sum of |p - q|."""
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2

    def with_slope(self, log_p: Rows, log_q: Rows) -> tuple[Float[Tensor, " rows"], Rows]:
        """With g = 1/2 q sign(q - p) the slope is g - q sum(g)."""
        q = log_q.exp_()
        gap = q - log_p.exp_()
        values = gap.abs().sum(-1) / 2
        return values, through_softmax(gap.sign_().mul_(q).div_(2), q)
