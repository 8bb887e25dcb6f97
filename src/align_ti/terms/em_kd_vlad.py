"""EM-KD's vision-language affinity distillation (VLAD): the similarity of matched visual tokens to text tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.data.roles import INSTRUCTION, RESPONSE
from align_ti.errors import BatchError
from align_ti.interactions.transitions import Transitions
from align_ti.models.overrides import linear_head
from align_ti.terms.base import Term, wide
from align_ti.terms.em_kd_vsd import matched, matched_plainly
from align_ti.terms.readings import Passed, Readings

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample

TEXT = (INSTRUCTION, RESPONSE)
"""The text tokens that visual ones are related to: words of questions and answers, which both models' sequences hold."""


class EmKdVlad(Term):
    """Smooth L1 between the two models' cosine affinities of matched visual tokens with text tokens, averaged over a sample's
    entries, then over samples.

    Affinities are computed from the hidden states before the head; the threshold of smooth L1 is 1, so entries count half their
    square.

    Source: EM-KD (arXiv:2511.21106), L_vlad.
    """

    name: ClassVar[str] = "em_kd_vlad"
    needs_visual: ClassVar[bool] = True
    weight: float = Field(default=25.0, ge=0, allow_inf_nan=False)
    """The term's factor in the loss; a term with weight 0 is not computed. The paper's is 25."""

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuses heads that are more than a linear layer, whose logits cannot be compared without being made in full.

        Raises:
            ModelError: the model is named.
        """
        for model in (student, teacher):
            linear_head(model, f"{self.where} matches tokens by logits; leave the term out ({self.where}.weight: 0)")

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Samples with an image and text."""
        return (tokens.pictured & (tokens.instruction | tokens.response).any(-1)).sum()

    def total(self, readings: Readings) -> Float[Tensor, ""]:
        """One mean a sample."""
        student, teacher = readings.student, readings.compared
        whole = wide(student.hidden[:, :0]).sum()
        for sample, (ours, theirs) in enumerate(matched(readings)):
            words, other_words = text_of(student, sample), text_of(teacher, sample)
            check_same_text(student, teacher, sample, words, other_words)
            if len(ours) and len(words):
                one = affinities(student.hidden[sample], ours, words)
                other = affinities(teacher.hidden[sample], theirs.to(teacher.hidden.device), other_words)
                whole = whole + torch.nn.functional.smooth_l1_loss(one, other.to(one))
        return whole

    def plain(self, sample: Sample) -> float:
        """From hidden states of the models' own forward passes."""
        ours, theirs = matched_plainly(sample)
        found = []
        for name, visual in (("student", ours), ("teacher", theirs)):
            text = [step for step, role in enumerate(sample.roles(name).tolist()) if role in TEXT]
            if not visual or not text:
                return 0.0
            hidden = sample.hidden(name).double()
            found.append([[float(torch.cosine_similarity(hidden[v], hidden[t], dim=0)) for t in text] for v in visual])
        one, other = (torch.tensor(of, dtype=torch.float64) for of in found)
        gaps = (one - other).abs()
        return float(torch.where(gaps < 1, gaps.square() / 2, gaps - 0.5).mean())


def text_of(passed: Passed, sample: int) -> Int[Tensor, " text"]:
    """The positions of a sample's text tokens in a model's own sequence."""
    roles = passed.view.roles[sample]
    return torch.isin(roles, torch.tensor(TEXT, device=roles.device)).nonzero().flatten()


def check_same_text(student: Passed, teacher: Passed, sample: int, words: Tensor, other_words: Tensor) -> None:
    """Refuse sequences with different text, whose affinities are not of the same words.

    Raises:
        BatchError: the sample is named.
    """
    one, other = (
        of.view.inputs["input_ids"][sample, found].tolist() for of, found in ((student, words), (teacher, other_words))
    )
    if one != other:
        raise BatchError(
            f"sample {sample}: instruction and response are {len(one)} tokens to the student and {len(other)} to the teacher, or other "
            "ones; objective.em_kd_vlad relates visual tokens to the same words; choose models of one tokenizer and template, "
            "or leave the "
            "term out (objective.em_kd_vlad.weight: 0)."
        )


def affinities(
    hidden: Float[Tensor, "seq hidden"], visual: Int[Tensor, " visual"], text: Int[Tensor, " text"]
) -> Float[Tensor, "visual text"]:
    """The cosine of each visual token's hidden state with each text token's."""
    one, other = (torch.nn.functional.normalize(wide(hidden[rows]), dim=-1) for rows in (visual, text))
    return one @ other.mT
