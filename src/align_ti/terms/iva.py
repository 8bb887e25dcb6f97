"""IVA, instruction-aware vision alignment: visual rows are weighted by the teacher's attention from the instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from jaxtyping import Shaped
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.data.roles import INSTRUCTION
from align_ti.interactions.transitions import Transitions
from align_ti.interactions.visual import aligned_samples, visual_weights
from align_ti.terms.base import Compares, WeightedRows
from align_ti.terms.readings import Readings, Reads

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample


class Iva(Compares):
    """Instruction-aware vision alignment: a divergence at the visual positions, weighted by the teacher's attention from the
    instruction.

    Source: Align-TI (arXiv:2602.09483), L_iva.
    """

    name: ClassVar[str] = "iva"
    cacheable: ClassVar[bool] = True
    visual: ClassVar[Literal["none", "equal"]] = "equal"
    needs_visual: ClassVar[bool] = True
    fix: ClassVar[str] = (
        "check that an instruction follows an image (roles), choose another objective.iva.layer, or set objective.iva.weight: 0"
    )
    layer: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """The teacher's layer whose attention gives the weights. auto: the layer with the highest instruction-relevance score (IRS)
    on a sample of the training data."""
    images: Literal["together", "separately"] = "together"
    """Whether the visual tokens of several images are normalised together, or each image has the same total weight."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Compare only the visual tokens with the most attention, as many as together hold this share of it; 1: all. Fewer rows are
    projected to the vocabulary. Below 1 the term is different: its weights are renormalised over the remaining tokens."""
    resample: bool = False
    """If teacher and student represent an image by different numbers of visual tokens: resample the teacher's rows and weights
    to the student's grid. Otherwise different numbers are an error."""

    def reads_of_teacher(self, model: PreTrainedModel) -> Reads:
        """The attention of instruction tokens at the layer."""
        assert isinstance(self.layer, int), "the layer has to be chosen first"
        return Reads.of(attention=[(self.layer, (INSTRUCTION,))])

    @property
    def needs_layer(self) -> bool:
        """Whether the layer is still auto."""
        return self.layer == "auto"

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Samples in which an instruction token attends to a visual one."""
        return aligned_samples(tokens.visual, tokens.instruction).sum()

    def total(self, readings: Readings) -> WeightedRows:
        """The rows of each sample's visual tokens have weights that sum to 1, each its share of the attention."""
        tokens, teacher = readings.tokens, readings.compared
        assert isinstance(self.layer, int)
        focus = teacher.attention_at(self.layer, (INSTRUCTION,)).mean()
        attention = teacher.aligned(focus, sums=True).to(readings.device)
        weights = visual_weights(attention, tokens.visual, tokens.instruction, self.images, tokens.pictures, self.share)
        return WeightedRows(weights, self.measure)

    def plain(self, sample: Sample) -> float | None:
        """The divergence at the visual rows, unshifted, each weighted by its share of the attention that the instruction pays; for
        resampled rows there is no plain computation here."""
        if self.resample and sample.two_sequences:
            return None
        assert isinstance(self.layer, int)
        ours, theirs = (
            [step for step, role in enumerate(sample.roles(name)) if role == sample.VISUAL]
            for name in ("student", "teacher")
        )
        if not ours:
            return 0.0
        values = sample.divergence(self.divergence, ("teacher", theirs), ("student", ours))
        matrix, asked = sample.attention("teacher", self.layer), sample.roles("teacher") == sample.INSTRUCTION
        weights = matrix.mean(0)[asked].mean(0)[theirs]
        runs = sample.pictures() if self.images == "separately" else [ours]
        ranks = [[ours.index(step) for step in run] for run in runs]
        seen = [run for run in ranks if float(weights[run].sum()) > 0]
        counted = {rank: float(weights[rank] / weights[run].sum()) / len(seen) for run in seen for rank in run}
        kept, reached = 0.0, 0.0
        for rank in sorted(counted, key=lambda rank: -counted[rank]):
            # The most looked-at tokens that together hold the share; those behind them count nothing.
            if self.share < 1 and reached >= self.share:
                break
            kept, reached = kept + counted[rank] * float(values[rank]), reached + counted[rank]
        return kept / reached if counted else 0.0
