"""Forward KL: the divergence that vanilla knowledge distillation minimises."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from align_ti.losses.divergences.base import Divergence, Rows, times


class ForwardKl(Divergence):
    """KL(p || q), which is mode-covering: the student has to cover all that the teacher finds probable.

    Source: Hinton et al. (arXiv:1503.02531); Align-TI (arXiv:2602.09483), every divergence of its objective.
    """

    name: ClassVar[str] = "forward_kl"

    def values(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """sum p log(p / q)."""
        return times(log_p.exp(), log_p - log_q).sum(-1)

    def with_slope(self, log_p: Rows, log_q: Rows) -> tuple[Float[Tensor, " rows"], Rows]:
        """The slope is q - p."""
        p = log_p.exp()
        # The log probabilities are spent here, so that their memory holds what is made of them.
        terms = log_p.sub_(log_q).mul_(p)
        values = terms.sum(-1)
        # 0 * inf, at a token that is ruled out, is to be 0. It is rare and the mask costs two passes, but asking an accelerator
        # costs more.
        if terms.device.type != "cpu" or not bool(values.isfinite().all()):
            values = terms.masked_fill_(p == 0, 0.0).sum(-1)
        return values, log_q.exp_().sub_(p)
