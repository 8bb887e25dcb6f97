"""Vanilla knowledge distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Shaped
from pydantic import Field
from torch import Tensor

from align_ti.data.batch import Tokens
from align_ti.interactions.transitions import Transitions
from align_ti.losses.measures import Softened
from align_ti.terms.base import Compares, WeightedRows
from align_ti.terms.readings import Readings

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample


class Kd(Compares):
    """Vanilla knowledge distillation: a divergence at the response positions, KL(teacher || student) by default.

    Source: Hinton et al. (arXiv:1503.02531); Align-TI (arXiv:2602.09483), L_kd.
    """

    name: ClassVar[str] = "kd"
    cacheable: ClassVar[bool] = True
    fix: ClassVar[str] = (
        "check that the teacher differs from the student, and that parameters which influence the responses are trained (parts)"
    )
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Both models' logits are divided by it, and the term is multiplied by its square."""

    @property
    def measure(self) -> Softened:
        """The divergence at the term's temperature."""
        return Softened(self.divergence, self.temperature)

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Response tokens."""
        return tokens.predicts.sum()

    def total(self, readings: Readings) -> WeightedRows:
        """The row before each response token has weight 1."""
        return WeightedRows(readings.tokens.predicts.float(), self.measure)

    def plain(self, sample: Sample) -> float:
        """Mean divergence at the rows before the response tokens."""
        ours, theirs = (
            [step - 1 for step, role in enumerate(sample.roles(name)) if role == sample.RESPONSE]
            for name in ("student", "teacher")
        )
        values = sample.divergence(self.divergence, ("teacher", theirs), ("student", ours), self.temperature)
        return float(values.mean())
