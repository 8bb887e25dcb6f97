"""TPA, transition probability alignment: the teacher's and the student's next-token distributions after candidate tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Shaped
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.interactions.candidates import CandidateOptions
from align_ti.interactions.transitions import Transitions
from align_ti.models.continuation import check_branching
from align_ti.terms.base import Compares, WeightedRows
from align_ti.terms.readings import Readings

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample


class Tpa(Compares, CandidateOptions):
    """Transition probability alignment: a divergence one token further, after candidate tokens tried in place of the gold
    token.

    Source: Align-TI (arXiv:2602.09483), L_tpa.
    """

    name: ClassVar[str] = "tpa"
    fix: ClassVar[str] = (
        "check that not all candidates are excluded (objective.tpa.left_out), or set objective.tpa.weight: 0"
    )

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuses models in which a token cannot be replaced by a candidate.

        Raises:
            ModelError: recurrent layers, or layers with cross-attention; the message names them.
        """
        check_branching(student)
        check_branching(teacher)

    @property
    def candidate_options(self) -> CandidateOptions:
        """The term's own options."""
        return self

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Response positions that keep a candidate."""
        assert plan is not None, "tpa's mass is known once there are candidates"
        return plan.mass

    def total(self, readings: Readings) -> WeightedRows:
        """The rows of candidates, and gold rows for candidates that equal the gold token."""
        assert readings.plan is not None
        return WeightedRows(readings.plan.gold_weights, self.measure, readings.plan.branch_weights)

    def plain(self, sample: Sample) -> float:
        """Mean over positions, and over the candidates of each, of the divergence behind a candidate: one full forward for
        every one."""
        positions = []
        for step, tried in sample.candidates.items():
            values = []
            for token in tried:
                after = sample.with_token(step, token)
                rows = {name: [after.response_steps(name)[sample.rank(step)]] for name in ("teacher", "student")}
                values.append(
                    float(after.divergence(self.divergence, ("teacher", rows["teacher"]), ("student", rows["student"])))
                )
            positions.append(sum(values) / len(values))
        return sum(positions) / len(positions)
