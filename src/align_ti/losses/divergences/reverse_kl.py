"""Reverse KL: the student should not give probability to tokens that the teacher finds improbable."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from align_ti.losses.divergences.base import Divergence, Rows, times


class ReverseKl(Divergence):
    """KL(q || p), which is mode-seeking: the student may cover a part of the teacher's distribution; infinite if q > 0 at a token with
    p = 0.

    Source: MiniLLM, Gu et al. (arXiv:2306.08543), its exact value at one step; GKD, Agarwal et al. (arXiv:2306.13649).
    """

    name: ClassVar[str] = "reverse_kl"

    def values(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """sum q log(q / p)."""
        return times(log_q.exp(), log_q - log_p).sum(-1)

    def with_slope(self, log_p: Rows, log_q: Rows) -> tuple[Float[Tensor, " rows"], Rows]:
        """The slope is q (log(q / p) - D)."""
        q = log_q.exp()
        terms = times(q, log_q.sub_(log_p))
        values = terms.sum(-1)
        return values, terms.addcmul_(q, values[:, None], value=-1)
