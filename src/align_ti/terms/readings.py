"""The inputs of terms: a batch as each model reads it, and the outputs of both models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.data.roles import model_inputs
from align_ti.interactions.correspondence import Correspondence
from align_ti.interactions.transitions import Transitions
from align_ti.models import families
from align_ti.models.attention import Attention, AttentionRows
from align_ti.models.pairing import Pairing


@dataclass(frozen=True, slots=True)
class View:
    """What one model reads: its inputs, positions among them, and the role of each of its tokens."""

    model: PreTrainedModel
    inputs: dict[str, Any]
    roles: Int[Tensor, "batch seq"]

    @property
    def real(self) -> Bool[Tensor, "batch seq"]:
        """Where tokens are no padding."""
        return families.real_tokens(self.inputs)


def view(model: PreTrainedModel, batch: Mapping[str, Any]) -> View:
    """A batch as the model reads it, on the model's device."""
    moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    inputs = model_inputs(moved)
    return View(model, {**inputs, "position_ids": families.position_ids(model, inputs)}, moved["roles"])


@dataclass(frozen=True, slots=True)
class Reads:
    """What a term reads of one model in addition to its last hidden states.

    `layers` are layers whose hidden states are needed, by index from 0; `attention` names the attention rows that are needed.
    What several terms need is computed once.
    """

    layers: frozenset[int] = frozenset()
    attention: frozenset[AttentionRows] = frozenset()

    def __or__(self, other: Reads) -> Reads:
        return Reads(self.layers | other.layers, self.attention | other.attention)

    @classmethod
    def of(cls, *, layers: Collection[int] = (), attention: Collection[tuple[int, tuple[int, ...]]] = ()) -> Reads:
        """From layers, and from pairs of a layer and the roles of its queries."""
        return cls(frozenset(layers), frozenset(AttentionRows(layer, roles) for layer, roles in attention))


@dataclass(frozen=True, slots=True)
class Passed:
    """What one model made of a batch, in its own sequence and on its own device.

    `hidden` is what the head reads. Of the teacher nothing has a gradient. `correspondence` says where the student's positions stand in
    this sequence, if it is another than the student's.
    """

    view: View
    hidden: Float[Tensor, "batch seq hidden"]
    branches: Float[Tensor, "branches hidden"] | None = None
    layers: Mapping[int, Float[Tensor, "batch seq hidden"]] = field(default_factory=dict)
    attention: Mapping[AttentionRows, Attention] = field(default_factory=dict)
    correspondence: Correspondence | None = None

    def attention_at(self, layer: int, roles: tuple[int, ...]) -> Attention:
        """The attention that a term said it reads, over the sequence's own keys."""
        return self.attention[AttentionRows(layer, roles)]

    def aligned(
        self, values: Shaped[Tensor, "batch seq ..."], *, sums: bool = False
    ) -> Shaped[Tensor, "batch student_seq ..."]:
        """Values at this model's positions, laid out as the student's sequence: each response token and the row before it, and each
        visual token, finds its own. With `sums`, visual tokens that are resampled share a total instead of averaging."""
        return values if self.correspondence is None else self.correspondence.to_student(values, sums=sums)


Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Readings:
    """All that a term may use: the batch's tokens, both models' passes, the plan of candidates, and properties of the pair."""

    tokens: Tokens
    student: Passed
    teacher: Passed | None
    plan: Transitions | None
    pairing: Pairing
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The student's device, on which terms are added up."""
        return self.tokens.roles.device

    @property
    def compared(self) -> Passed:
        """The teacher's pass, for terms that compare with it."""
        assert self.teacher is not None, "a term compares with a teacher, but none was read"
        return self.teacher

    def once(self, name: str, make: Callable[[], Found]) -> Found:
        """A value that several terms share, computed by the first that needs it."""
        if name not in self.memory:
            self.memory[name] = make()
        found: Found = self.memory[name]
        return found
