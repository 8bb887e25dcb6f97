"""Adaptive KL: mostly forward KL if the student is wrong about likely tokens, mostly reverse KL if about unlikely ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from align_ti.losses.divergences.base import Divergence, Rows
from align_ti.losses.divergences.forward_kl import ForwardKl
from align_ti.losses.divergences.reverse_kl import ReverseKl


class AdaptiveKl(Divergence):
    """w KL(p || q) + (1 - w) KL(q || p), where w is the share of sum |p - q| on the head of the teacher's distribution.

    The head is the smallest set of the teacher's most probable tokens with probability `mu` or more; of equally probable tokens
    the one with the lower id comes first. No gradient flows through w. At p = q, w is 1/2 and the value 0. The released code of
    the paper leaves the token that reaches `mu` in the tail unless it is the first; others count it to the head, as here.

    Source: AKL, Wu et al. (arXiv:2404.02657).
    """

    name: ClassVar[str] = "adaptive_kl"
    mu: float = Field(default=0.5, gt=0, le=1)
    """Probability mass of the head of the teacher's distribution."""

    def values(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """Both divergences, weighed."""
        share = self.head_share(log_p, log_q)
        forward, reverse = ForwardKl().values(log_p, log_q), ReverseKl().values(log_p, log_q)
        return part(share, forward) + part(1 - share, reverse)

    def with_slope(self, log_p: Rows, log_q: Rows) -> tuple[Float[Tensor, " rows"], Rows]:
        """Both slopes, weighed."""
        share = self.head_share(log_p, log_q)
        forward, slope = ForwardKl().with_slope(log_p.clone(), log_q.clone())
        reverse, other = ReverseKl().with_slope(log_p, log_q)
        mixed = part(share[:, None], slope) + part(1 - share[:, None], other)
        return part(share, forward) + part(1 - share, reverse), mixed

    @torch.no_grad()
    def head_share(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """w of each row."""
        p = log_p.exp()
        gap = (p - log_q.exp()).abs_()
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        # A token is in the head unless those before it hold mu already.
        in_head = ranked.cumsum(-1) - ranked < self.mu
        head, whole = (gap.gather(-1, order) * in_head).sum(-1), gap.sum(-1)
        # Two sums in different orders: a head that holds all of it is not to hold more.
        return torch.where(whole == 0, 0.5, (head / whole).clamp(max=1))


def part(weight: Float[Tensor, "..."], values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """weight * values, and 0 where the weight is 0: a divergence without weight may be infinite."""
    return torch.where(weight == 0, 0.0, weight * values)
