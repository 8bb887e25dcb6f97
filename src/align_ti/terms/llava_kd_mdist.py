"""LLaVA-KD's multimodal distillation (MDist): response rows and visual rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Shaped
from pydantic import Field
from torch import Tensor

from align_ti.data.batch import Tokens
from align_ti.interactions.transitions import Transitions
from align_ti.terms.base import Compares, WeightedRows, per_sample
from align_ti.terms.readings import Readings

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample


class LlavaKdMdist(Compares):
    """A divergence at the response positions and at every visual position, each averaged over the sample's rows, then over
    samples.

    Visual rows are compared at the visual tokens' own positions, unshifted. The paper sums over tokens; the released trainer
    averages over all rows of a batch (docs/method.md).

    Source: LLaVA-KD, Cai et al. (arXiv:2410.16236), L_res + L_vis.
    """

    name: ClassVar[str] = "llava_kd_mdist"
    visual: ClassVar[Literal["none", "equal"]] = "equal"
    needs_visual: ClassVar[bool] = True
    visual_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the mean over visual rows, relative to the mean over response rows."""
    resample: bool = False
    """If teacher and student represent an image by different numbers of visual tokens: resample the teacher's rows to the
    student's grid."""

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Samples with a response."""
        return tokens.predicts.any(-1).sum()

    def total(self, readings: Readings) -> WeightedRows:
        """Response rows of a sample count 1 together, its visual rows `visual_weight`; a sample without a response does not count."""
        predicts, visual = readings.tokens.predicts, readings.tokens.visual
        weights = per_sample(predicts) + self.visual_weight * per_sample(visual) * predicts.any(-1, keepdim=True)
        return WeightedRows(weights, self.measure)

    def plain(self, sample: Sample) -> float | None:
        """Both means."""
        if self.resample and sample.two_sequences:
            return None
        whole = 0.0
        for weight, role, back in ((1.0, sample.RESPONSE, 1), (self.visual_weight, sample.VISUAL, 0)):
            ours, theirs = (
                [step - back for step, found in enumerate(sample.roles(name)) if found == role]
                for name in ("student", "teacher")
            )
            if ours:
                values = sample.divergence(self.divergence, ("teacher", theirs), ("student", ours))
                whole += weight * float(values.mean())
        return whole
