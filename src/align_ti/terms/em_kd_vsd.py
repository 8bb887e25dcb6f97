"""EM-KD's vision semantic distillation (VSD): visual rows matched by their logits, whatever their number."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Shaped
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.data.roles import VISUAL
from align_ti.interactions.matching import match_rows
from align_ti.interactions.transitions import Transitions
from align_ti.losses.divergences.base import AnyDivergence
from align_ti.losses.divergences.reverse_kl import ReverseKl
from align_ti.models.overrides import linear_head
from align_ti.terms.base import Compares, WeightedRows
from align_ti.terms.readings import Readings

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample

Pairs = list[tuple[Tensor, Tensor]]
"""For each sample, positions of visual tokens in the student's sequence and of their partners in the teacher's."""


class EmKdVsd(Compares):
    """A divergence at matched visual rows, KL(student || teacher) by default, averaged over a sample's pairs, then over
    samples.

    Each of the student's visual tokens is matched with one of the teacher's so that the sum of L1 distances between their
    logits is minimal; if the numbers differ, tokens of the larger side remain unmatched. No gradient flows through the
    matching.

    Source: EM-KD (arXiv:2511.21106), L_vsd.
    """

    name: ClassVar[str] = "em_kd_vsd"
    needs_visual: ClassVar[bool] = True
    weight: float = Field(default=0.25, ge=0, allow_inf_nan=False)
    """The term's factor in the loss; a term with weight 0 is not computed. The paper's is 0.25."""
    divergence: AnyDivergence = ReverseKl()
    """The divergence of the student's distribution from the teacher's; the paper's is reverse KL."""

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuses heads that are more than a linear layer, whose logits cannot be compared without being made in full.

        Raises:
            ModelError: the model is named.
        """
        for model in (student, teacher):
            linear_head(model, f"{self.where} matches tokens by logits; leave the term out ({self.where}.weight: 0)")

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Samples with an image."""
        return tokens.pictured.sum()

    def total(self, readings: Readings) -> WeightedRows:
        """The matched rows of a sample count 1 together."""
        tokens = readings.tokens
        weights = torch.zeros(tokens.roles.shape, device=readings.device)
        partners = torch.zeros_like(tokens.roles)
        for sample, (ours, theirs) in enumerate(matched(readings)):
            weights[sample, ours] = 1 / max(1, len(ours))
            partners[sample, ours] = theirs
        return WeightedRows(weights, self.measure, teacher_rows=partners)

    def plain(self, sample: Sample) -> float:
        """From whole logits, the best matching by the same solver."""
        ours, theirs = matched_plainly(sample)
        if not ours:
            return 0.0
        return float(sample.divergence(self.divergence, ("teacher", theirs), ("student", ours)).mean())


def matched(readings: Readings) -> Pairs:
    """The pairs of each sample, found once for all terms that ask."""

    def find() -> Pairs:
        student, teacher = readings.student, readings.compared
        heads = [linear_head(of.view.model, "EM-KD matches tokens by logits") for of in (student, teacher)]
        pairs = []
        for sample in range(len(readings.tokens.roles)):
            ours, theirs = (of.view.roles[sample].eq(VISUAL).nonzero().flatten() for of in (student, teacher))
            if len(ours) and len(theirs):
                one, other = match_rows(
                    student.hidden[sample, ours],
                    heads[0],
                    teacher.hidden[sample, theirs],
                    heads[1],
                    readings.pairing.shared,
                )
                pairs.append((ours[one], theirs.to(readings.device)[other]))
            else:
                pairs.append((ours[:0], ours[:0]))
        return pairs

    return readings.once("EM-KD's pairs of visual tokens", find)


def matched_plainly(sample: Sample) -> tuple[list[int], list[int]]:
    """The pairs of one sample from logits in full: positions in the student's sequence and in the teacher's."""
    steps = {
        name: [step for step, role in enumerate(sample.roles(name)) if role == sample.VISUAL]
        for name in ("student", "teacher")
    }
    if not steps["student"] or not steps["teacher"]:
        return [], []
    logits = {name: sample.logits(name)[found].double() for name, found in steps.items()}
    cost = [[float((one - other).abs().sum()) for other in logits["teacher"]] for one in logits["student"]]
    rows, others = linear_sum_assignment(cost)
    return [steps["student"][row] for row in rows], [steps["teacher"][other] for other in others]
