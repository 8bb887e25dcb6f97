"""LLaVA-KD's relation distillation (RDist): the similarities between visual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.interactions.transitions import Transitions
from align_ti.models.overrides import linear_head
from align_ti.terms.base import Term, cosine_distance, wide
from align_ti.terms.readings import Passed, Readings

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample


class LlavaKdRdist(Term):
    """1 - cosine of the student's and the teacher's relation matrices R = Y Y^T over a sample's visual tokens, averaged over
    samples.

    Y are the logits at the visual positions: the paper says "visual tokens output by the LLM", its authors and the released
    trainer use logits. They are not centred, so a component that all logits share counts in R and brings the cosine near 1. R
    is computed without materialising them: H (W^T W) H^T, with H the hidden states and W the head.

    Source: LLaVA-KD, Cai et al. (arXiv:2410.16236), L_rel.
    """

    name: ClassVar[str] = "llava_kd_rdist"
    visual: ClassVar[Literal["none", "equal"]] = "equal"
    needs_visual: ClassVar[bool] = True
    weight: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """The term's factor in the loss; a term with weight 0 is not computed. The paper's is 0.5."""
    of: Literal["logits", "hidden"] = "logits"
    """What the matrix is computed from: logits, or the hidden states before the head, for heads that are more than one linear
    layer."""
    resample: bool = False
    """If teacher and student represent an image by different numbers of visual tokens: resample the teacher's to the student's
    grid."""

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuses heads that are more than a linear layer, whose logits cannot be related without being made.

        Raises:
            ModelError: the model is named.
        """
        if self.of == "logits":
            for model in (student, teacher):
                linear_head(
                    model, f"{self.where} takes logits; give of: hidden, or leave the term out ({self.where}.weight: 0)"
                )

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Samples with an image."""
        return tokens.pictured.sum()

    def total(self, readings: Readings) -> Float[Tensor, ""]:
        """One distance a sample with an image."""
        student, teacher = readings.student, readings.compared
        with torch.no_grad():
            metric = self.metric(teacher, readings)
            theirs = teacher.aligned(teacher.hidden).to(readings.device)
            metric = None if metric is None else metric.to(readings.device)
        whole, own = wide(student.hidden[:, :0]).sum(), self.metric(student, readings)
        for sample in readings.tokens.pictured.nonzero().flatten().tolist():
            rows = readings.tokens.visual[sample]
            expected = relations(theirs[sample][rows], metric)
            whole = whole + cosine_distance(relations(student.hidden[sample][rows], own), expected)
        return whole

    def metric(self, passed: Passed, readings: Readings) -> Float[Tensor, "features features"] | None:
        """W^T W over the tokens that both models know, with the bias as one feature more; None for hidden states as they are."""
        if self.of == "hidden":
            return None
        head = linear_head(passed.view.model, self.where)
        weight = head.weight if head.bias is None else torch.cat([head.weight, head.bias[:, None]], dim=1)
        shared = readings.pairing.shared
        chosen = wide(weight[shared if isinstance(shared, slice) else shared.to(weight.device)])
        return chosen.mT @ chosen

    def plain(self, sample: Sample) -> float | None:
        """From whole logits."""
        if self.resample and sample.two_sequences:
            return None
        matrices = []
        for name in ("student", "teacher"):
            rows = [step for step, role in enumerate(sample.roles(name)) if role == sample.VISUAL]
            if not rows:
                return 0.0
            made = (sample.logits(name) if self.of == "logits" else sample.hidden(name))[rows].double()
            matrices.append((made @ made.T).flatten())
        return 1 - float(torch.nn.functional.cosine_similarity(matrices[0], matrices[1], dim=0))


def relations(
    hidden: Float[Tensor, "visual hidden"], metric: Float[Tensor, "features features"] | None
) -> Float[Tensor, "visual visual"]:
    """The inner products of what the hidden states become under the metric, or of themselves without one."""
    rows = wide(hidden)
    if metric is None:
        return rows @ rows.mT
    if metric.shape[0] > rows.shape[1]:
        rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
    return rows @ metric.to(rows) @ rows.mT
