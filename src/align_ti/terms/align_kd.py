"""Align-KD's attention term: attention from text to visual tokens in the first layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.data.roles import INSTRUCTION, RESPONSE
from align_ti.interactions.transitions import Transitions
from align_ti.terms.base import Term
from align_ti.terms.readings import Readings, Reads

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample

TEXT = (INSTRUCTION, RESPONSE)
"""The text tokens whose attention is compared: words of questions and answers, not the template's."""


class AlignKd(Term):
    """The squared difference of student's and teacher's first-layer attention from text to visual tokens, averaged over heads.

    Summed over a sample's visual tokens, averaged over its text tokens that come after one, then over samples. This is a
    reconstruction: the paper draws the block without specifying the reduction, and the released mask selects entries that
    causal attention leaves at 0, so the released loss never trained it (docs/method.md). Averaging over heads replaces the
    released adapter between head counts, which no optimizer updated.

    Source: Align-KD, Feng et al. (arXiv:2412.01282), the attention term of its first layer.
    """

    name: ClassVar[str] = "align_kd"
    one_sequence: ClassVar[bool] = True
    needs_visual: ClassVar[bool] = True
    fix: ClassVar[str] = (
        "check that text follows an image (roles), and that the first layer of the language model is trained (parts)"
    )

    def reads_of_student(self, model: PreTrainedModel) -> Reads:
        """The first layer's attention of text tokens."""
        return Reads.of(attention=[(0, TEXT)])

    def reads_of_teacher(self, model: PreTrainedModel) -> Reads:
        """The same."""
        return self.reads_of_student(model)

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Samples in which a text token comes after a visual one."""
        return (behind_visual(tokens) & (tokens.instruction | tokens.response)).any(-1).sum()

    def total(self, readings: Readings) -> Float[Tensor, ""]:
        """One mean a sample."""
        ours = readings.student.attention_at(0, TEXT)
        theirs = readings.compared.attention_at(0, TEXT).weights.to(readings.device)
        apart = (ours.weights - theirs.to(ours.weights)).square() * readings.tokens.visual[:, None, :]
        counted = ours.marked & behind_visual(readings.tokens).gather(1, ours.index)
        values = apart.sum(-1) * counted
        return (values.sum(-1) / counted.sum(-1).clamp(min=1)).sum()

    def plain(self, sample: Sample) -> float:
        """From the whole matrix of eager attention."""
        roles = sample.roles("student").tolist()
        visual = [step for step, role in enumerate(roles) if role == sample.VISUAL]
        text = [step for step, role in enumerate(roles) if role in TEXT and visual and step > visual[0]]
        if not text:
            return 0.0
        one, other = (sample.attention(name, 0).mean(0)[text][:, visual] for name in ("student", "teacher"))
        return float(torch.stack([(row - its).square().sum() for row, its in zip(one, other, strict=True)]).mean())


def behind_visual(tokens: Tokens) -> Bool[Tensor, "batch seq"]:
    """Where a visual token stands before, or at, a position."""
    return tokens.visual.long().cumsum(-1) > 0
