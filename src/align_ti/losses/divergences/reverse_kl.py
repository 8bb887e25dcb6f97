"""Reverse KL: the student is to say nothing that the teacher would not."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from align_ti.losses.divergences.base import Divergence, Rows, times


class ReverseKl(Divergence):
    """KL(q || p): the student may settle on a part of what the teacher says; infinite where it says what the teacher rules out.

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
