"""CompoDistill's visual attention alignment, over groups of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.data.roles import INSTRUCTION, OTHER, RESPONSE, VISUAL
from align_ti.errors import ModelError
from align_ti.interactions.transitions import Transitions
from align_ti.models.attention import Attention
from align_ti.models.families import full_attention_layers, layer_kinds
from align_ti.terms.base import Term, cosine_distance
from align_ti.terms.readings import Readings, Reads

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample

EVERY = (OTHER, VISUAL, INSTRUCTION, RESPONSE)
"""All roles: every token that is no padding."""

Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
"""Layers by index from 0."""


class CompoDistill(Term):
    """1 - cosine of the student's attention to visual tokens and that of a group of the teacher's layers, averaged over layers
    and samples.

    The student's layers are k consecutive ones in the middle; the teacher's m middle layers form k overlapping groups of n = m
    - k + 1, and each group's attention is averaged. Heads are averaged. `form` chooses between the paper's equation and the
    released code, which differ. The paper's other part, a teacher's adapter used by the student, changes the student and is not
    included.

    Source: CompoDistill, Kim et al. (arXiv:2510.12184), L_ADL.
    """

    name: ClassVar[str] = "compodistill"
    one_sequence: ClassVar[bool] = True
    needs_visual: ClassVar[bool] = True
    form: Literal["paper", "code"] = "paper"
    """paper: the attention of every token to visual ones, as one vector. code: of visual tokens to visual ones; entries above mean +
    one standard deviation in either model left out as sinks; then averaged over queries (the release sums over its 7 layers: weight
    7)."""
    student_layers: Layers | None = None
    """The student's layers; by default those from 30 to 70 per cent of its depth."""
    teacher_layers: Layers | None = None
    """The teacher's layers, as many as the student's or more; by default those from 30 to 70 per cent of its depth."""

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuses a pair whose layers form no groups.

        Raises:
            ModelError: no middle layer with full attention, or more of the student's than of the teacher's.
        """
        ours, theirs = self.layers_of(student, self.student_layers), self.layers_of(teacher, self.teacher_layers)
        if not ours or len(theirs) < len(ours):
            raise ModelError(
                f"{self.where} compares {len(ours)} layer(s) of the student with groups of the teacher's {len(theirs)}; one "
                "layer at least, "
                "and no fewer of the teacher's, are accepted; give student_layers and teacher_layers."
            )

    def layers_of(self, model: PreTrainedModel, given: tuple[int, ...] | None) -> list[int]:
        """The layers of a model that are compared: the given ones, or the middle ones whose attention is full."""
        if given is not None:
            return list(given)
        depth = len(layer_kinds(model))
        middle = range(math.floor(0.3 * depth), math.ceil(0.7 * depth))
        return [layer for layer in full_attention_layers(model) if layer in middle]

    @property
    def queries(self) -> tuple[int, ...]:
        """The roles whose attention is read."""
        return EVERY if self.form == "paper" else (VISUAL,)

    def reads_of_student(self, model: PreTrainedModel) -> Reads:
        """The attention at its layers."""
        return Reads.of(attention=[(layer, self.queries) for layer in self.layers_of(model, self.student_layers)])

    def reads_of_teacher(self, model: PreTrainedModel) -> Reads:
        """The attention at its layers."""
        return Reads.of(attention=[(layer, self.queries) for layer in self.layers_of(model, self.teacher_layers)])

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Samples with an image."""
        return tokens.pictured.sum()

    def total(self, readings: Readings) -> Float[Tensor, ""]:
        """One mean over layers for each sample with an image."""
        student, teacher, visual = readings.student, readings.compared, readings.tokens.visual
        ours = [
            student.attention_at(layer, self.queries)
            for layer in self.layers_of(student.view.model, self.student_layers)
        ]
        theirs = [
            teacher.attention_at(layer, self.queries)
            for layer in self.layers_of(teacher.view.model, self.teacher_layers)
        ]
        whole = ours[0].weights[:, :0].sum()
        for sample in readings.tokens.pictured.nonzero().flatten().tolist():
            blocks = [to_visual(of, sample, visual[sample]) for of in ours]
            others = [to_visual(of, sample, visual[sample].to(of.weights.device)).to(blocks[0]) for of in theirs]
            distances = [
                self.distance(one, other) for one, other in zip(blocks, grouped(others, len(blocks)), strict=True)
            ]
            whole = whole + torch.stack(distances).mean()
        return whole

    def distance(
        self, student: Float[Tensor, "queries visual"], teacher: Float[Tensor, "queries visual"]
    ) -> Float[Tensor, ""]:
        """How far two maps are apart."""
        if self.form == "paper":
            return cosine_distance(student, teacher)
        kept = ~(sinks(student) | sinks(teacher)) & (teacher != 0)
        count = kept.sum(0).clamp(min=1)
        return cosine_distance((student * kept).sum(0) / count, (teacher * kept).sum(0) / count)

    def plain(self, sample: Sample) -> float:
        """From whole matrices of eager attention."""
        roles = sample.roles("student").tolist()
        visual = [step for step, role in enumerate(roles) if role == sample.VISUAL]
        if not visual:
            return 0.0
        rows = sample.real("student") if self.form == "paper" else visual
        layers = {
            "student": self.layers_of(sample.models["student"], self.student_layers),
            "teacher": self.layers_of(sample.models["teacher"], self.teacher_layers),
        }
        maps = {
            name: [sample.attention(name, layer).mean(0)[rows][:, visual].double() for layer in found]
            for name, found in layers.items()
        }
        size, values = len(maps["teacher"]) - len(maps["student"]) + 1, []
        for place, one in enumerate(maps["student"]):
            other = torch.stack(maps["teacher"][place : place + size]).mean(0)
            if self.form == "code":
                # Entries above mean + one standard deviation in either map are sinks; what is left of each column is averaged.
                limits = [of.mean() + (of.std() if of.numel() > 1 else 0) for of in (one, other)]
                kept = (one <= limits[0]) & (other <= limits[1]) & (other != 0)
                one, other = (
                    torch.stack(
                        [of[kept[:, key], key].sum() / max(1, int(kept[:, key].sum())) for key in range(of.shape[1])]
                    )
                    for of in (one, other)
                )
            values.append(1 - torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))
        return float(torch.stack(values).mean())


def to_visual(attention: Attention, sample: int, visual: Shaped[Tensor, " seq"]) -> Float[Tensor, "queries visual"]:
    """The attention of a sample's queries to its visual tokens."""
    return attention.weights[sample][attention.marked[sample]][:, visual]


def grouped(maps: Sequence[Float[Tensor, "queries visual"]], groups: int) -> list[Float[Tensor, "queries visual"]]:
    """The means of consecutive maps, in as many groups as are asked for, each one further along."""
    size = len(maps) - groups + 1
    return [torch.stack(list(maps[start : start + size])).mean(0) for start in range(groups)]


def sinks(attention: Float[Tensor, "queries visual"]) -> Shaped[Tensor, "queries visual"]:
    """Entries above the mean of all by more than their standard deviation."""
    with torch.no_grad():
        spread = attention.std() if attention.numel() > 1 else 0.0
        return attention > attention.mean() + spread
