"""Generalised Jensen-Shannon divergence: between forward and reverse KL, and always finite."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from align_ti.losses.divergences.base import Divergence, Rows, log_mixture, through_softmax, times


class JensenShannon(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Divided by beta it tends to forward KL as beta goes to 0, divided by 1 - beta to reverse KL as beta goes to 1; at the ends
    themselves it is 0, so they are not accepted (some released code switches to the KL there).

    Source: GKD, Agarwal et al. (arXiv:2306.13649).
    """

    name: ClassVar[str] = "jensen_shannon"
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share of the mixture."""

    def values(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """Both halves against the mixture."""
        log_m = log_mixture(log_p, log_q, self.beta)
        forward, reverse = (times(of.exp(), of - log_m).sum(-1) for of in (log_p, log_q))
        return self.beta * forward + (1 - self.beta) * reverse

    def with_slope(self, log_p: Rows, log_q: Rows) -> tuple[Float[Tensor, " rows"], Rows]:
        """The slope is (1 - beta) q (log(q / m) - KL(q || m))."""
        log_m, q = log_mixture(log_p, log_q, self.beta), log_q.exp()
        derivative = times(q, log_q - log_m).mul_(1 - self.beta)
        values = self.beta * times(log_p.exp(), log_p - log_m).sum(-1) + derivative.sum(-1)
        return values, through_softmax(derivative, q)
