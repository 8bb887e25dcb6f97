"""Alpha-beta divergence: two exponents weight differences at likely tokens and differences in ratios."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from align_ti.losses.divergences.base import Divergence, Rows, through_softmax


class AlphaBeta(Divergence):
    """-1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], and its limits at a = 0 or b = 0.

    With a for `alpha` and b for `beta`, (1, 0) is forward KL and (0, 1) reverse KL. Exponents below 0 are not accepted: a token
    of probability 0 would make them infinite. The limits are those of the formula; the paper's released code has other factors
    there unless a or b is 1.

    Source: ABKD, Wang et al. (arXiv:2505.04560); Cichocki et al. (2011), the family.
    """

    name: ClassVar[str] = "alpha_beta"
    alpha: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """Exponent of the teacher's probability."""
    beta: float = Field(default=0.7, ge=0, allow_inf_nan=False)
    """Exponent of the student's probability."""

    def values(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """The formula, or its limit."""
        a, b = self.alpha, self.beta
        if a and b:
            both, first, second = power(log_p, a) * power(log_q, b), power(log_p, a + b), power(log_q, a + b)
            return (a / (a + b) * first + b / (a + b) * second - both).sum(-1) / (a * b)
        if a:
            return limit(log_p, log_q, a)
        if b:
            return limit(log_q, log_p, b)
        # Two tokens that are ruled out are equal.
        return torch.where(log_p == log_q, 0.0, log_q - log_p).square().sum(-1) / 2

    def with_slope(self, log_p: Rows, log_q: Rows) -> tuple[Float[Tensor, " rows"], Rows]:
        """With g = (q^(a+b) - p^a q^b) / a, for a = 0 its limit q^b log(q / p), the slope is g - q sum(g)."""
        a, b = self.alpha, self.beta
        values = self.values(log_p, log_q)
        if a:
            derivative = (power(log_q, a + b) - power(log_p, a) * power(log_q, b)) / a
        else:
            derivative = torch.where(log_p == log_q, 0.0, power(log_q, b) * (log_q - log_p))
        return values, through_softmax(derivative, log_q.exp())


def power(log_p: Rows, exponent: float) -> Rows:
    """p^exponent, by logs: a small probability to a small power does not underflow. To the power of 0 it is 1, for p = 0 too."""
    return torch.ones_like(log_p) if exponent == 0 else (exponent * log_p).exp()


def limit(log_x: Rows, log_y: Rows, exponent: float) -> Float[Tensor, " rows"]:
    """The limit as the power of y goes to 0: sum [x^c log(x^c / y^c) - x^c + y^c] / c^2."""
    x, y = power(log_x, exponent), power(log_y, exponent)
    ratio = torch.where(x == 0, 0.0, x * exponent * (log_x - log_y))
    return (ratio - x + y).sum(-1) / exponent**2
