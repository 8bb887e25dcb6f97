"""One training step without weights: the loss itself and its backward, with what they keep alive counted and nothing computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.config import Objective, Recipe
from align_ti.data.roles import INSTRUCTION, NO_LABEL, RESPONSE, TEACHER_ATTENTION, TEACHER_HIDDEN, VISUAL
from align_ti.data.teacher_cache import kept_rows
from align_ti.errors import ConfigError
from align_ti.losses import weighted
from align_ti.models import families
from align_ti.models.adapters import unwrapped
from align_ti.models.overrides import Projection
from align_ti.models.pairing import Pairing
from align_ti.planning.live import Pretended
from align_ti.planning.sizes import PRETENDING, Pair, pretend_pair
from align_ti.terms.base import WeightedRows, per_sample
from align_ti.terms.iva import Iva
from align_ti.terms.readings import Readings
from align_ti.training.objective import distillation_loss
from align_ti.training.passes import candidate_options

FREE_TOKENS = 16
"""Ids looked through for words that are neither image nor end of turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The micro-batch of a plan: records of one length, tokens of each by role; the rest is instruction."""

    records: int
    tokens: int
    visual: int
    response: int
    row_share: float = 1.0
    """Share of the candidates that need a row of their own; 1 is the most that can be."""

    def __post_init__(self) -> None:
        if min(self.records, self.response) < 1 or self.visual < 0 or not 0 <= self.row_share <= 1:
            raise ConfigError(
                f"a plan of {self.records} record(s) with {self.response} response tokens and a row share of {self.row_share:g} is not "
                "possible; accepted: 1 or more records and response tokens, a share from 0 to 1; see --response and --row-share."
            )
        if self.tokens < self.visual + self.response + 1:
            raise ConfigError(
                f"{self.tokens} tokens per record are too few for {self.visual} visual, {self.response} response tokens and one "
                "instruction token; give more with --tokens, or fewer with --visual and --response."
            )


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes alive by phase at a step's peak: all of them, and when most was alive beside the gradients; and the FLOPs of each phase."""

    peak: Mapping[str, int]
    peak_apart: Mapping[str, int]
    flops: Mapping[str, int]
    notes: tuple[str, ...] = ()


class PlannedIva(Iva):
    """IVA with every visual row at equal weight: which ones the teacher looks at is not known without its weights."""

    def total(self, readings: Readings) -> WeightedRows:
        """The attention is read as ever, and all visual rows are compared."""
        focus = readings.compared.attention_at(self.at, (INSTRUCTION,)).mean()
        del focus
        return WeightedRows(per_sample(readings.tokens.visual), self.measure)

    @property
    def at(self) -> int:
        """The layer as a number."""
        assert isinstance(self.layer, int)
        return self.layer


def planned_objective(objective: Objective, teacher: PreTrainedModel | None) -> Objective:
    """The objective with what depends on weights replaced by its size: the layer that scoring would choose, and IVA's weights.

    Raises:
        ConfigError: a term needs a layer of full attention, and the teacher has none.
    """
    if teacher is not None and objective.needs_layer:
        layers = families.full_attention_layers(teacher)
        if not layers:
            name = objective.needs_layer[0]
            raise ConfigError(
                f"objective.{name}.layer is 'auto', but {type(teacher).__name__} has no layer with full attention, so none can be "
                f"chosen; leave the term out (objective.{name}.weight: 0)."
            )
        objective = objective.at_layer(layers[len(layers) // 2])
    if "iva" in objective.active:
        objective = objective.model_copy(update={"iva": PlannedIva(**objective.iva.model_dump())})
    return objective


def pretend_batch(
    student: PreTrainedModel, batch: Batch, candidates: int
) -> tuple[dict[str, Any], Tensor | None, tuple[str, ...]]:
    """Tokens, roles and images of the batch, and candidates of which the given share needs a row; then what was left out.

    With several records the first is one token shorter, so that the masks of a padded batch are there.
    """
    image = families.image_token(student)
    special = {image, *families.end_tokens(student), getattr(student.config, "pad_token_id", None)}
    size = Projection(student).out_features
    words = [token for token in range(size - 1, -1, -1) if token not in special][: max(FREE_TOKENS, candidates + 1)]
    pixels, notes = pictures(student, batch)
    ids = torch.full((batch.records, batch.tokens), words[0])
    roles = torch.full_like(ids, INSTRUCTION)
    roles[:, : batch.visual], roles[:, batch.tokens - batch.response :] = VISUAL, RESPONSE
    if image is not None and pixels:
        ids[:, : batch.visual].fill_(image)
    mask = torch.ones_like(ids)
    if batch.records > 1 and batch.response > 1:
        mask[0, -1], roles[0, -1] = 0, 0
    tried = None
    if candidates:
        tried = torch.tensor(words[1 : candidates + 1]).expand(*ids.shape, -1).clone()
        number = torch.arange(tried.numel()).view_as(tried)
        own_row = ((number + 1) * batch.row_share).floor() > (number * batch.row_share).floor()
        tried = torch.where(own_row, tried, words[0])
    labels = torch.where(roles == RESPONSE, ids, NO_LABEL)
    return {"input_ids": ids, "attention_mask": mask, "roles": roles, "labels": labels, **pixels}, tried, notes


def pictures(model: PreTrainedModel, batch: Batch) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The images that give each record its visual tokens, or none and a note where the config does not tell their shape."""
    if not batch.visual:
        return {}, ()
    config = model.config
    vision: Any = getattr(config, "vision_config", None)
    a_picture = families.visual_tokens(config)
    if a_picture and batch.visual % a_picture == 0:
        shown = batch.records * batch.visual // a_picture
        return {
            "pixel_values": torch.zeros(shown, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        }, ()
    return {}, (
        f"the vision tower's forward pass is not included: by the config of {config.model_type}, "
        f"{batch.visual} visual tokens are not a whole number of images",
    )


def step(recipe: Recipe, batch: Batch, *, accelerator: bool = True, pair: Pair | None = None) -> Counted:
    """What one micro-batch's loss and backward keep alive.

    Args:
        recipe: the run.
        batch: the micro-batch.
        accelerator: chunks of rows as on an accelerator; else as on a CPU.
        pair: the recipe's models without memory, if they are there already; gradients are left on them.
    """
    pair = pretend_pair(recipe) if pair is None else pair
    student, teacher = unwrapped(pair.student), pair.teacher
    objective = planned_objective(recipe.objective, teacher)
    options = candidate_options(objective.terms)
    tensors, candidates, notes = pretend_batch(student, batch, 0 if options is None else options.candidates)
    training = recipe.training
    trained = [parameter for parameter in pair.student.parameters() if parameter.requires_grad]
    for parameter in trained:
        # Under accumulation all micro-batches but the first find the gradients of those before.
        parameter.grad = torch.zeros_like(parameter) if training.gradient_accumulation_steps > 1 else None
    pair.student.train()
    if training.gradient_checkpointing:
        recompute(pair.student)
    half = torch.bfloat16 if training.bf16 else torch.float16
    autocast = torch.autocast("cpu", dtype=half) if training.bf16 or training.fp16 else nullcontext()
    live = Pretended()
    with chunks_of("accelerator" if accelerator else "cpu"), live.counting(trained):
        if recipe.data.teacher_cache is not None and teacher is not None:
            with live.place.phase("teacher forward"):
                tensors |= pretend_kept(teacher, tensors, visual="iva" in objective.active)
        with autocast:
            out = distillation_loss(
                student, teacher, tensors, objective, candidates, pairing=planned_pairing(student, teacher)
            )
        with live.place.phase("backward"):
            out.loss.backward()
    return Counted(positive(live.peak), positive(live.peak_apart), positive(live.flops), notes)


def pretend_kept(teacher: PreTrainedModel, tensors: Mapping[str, Any], *, visual: bool) -> dict[str, Tensor]:
    """What a teacher cache adds to the batch, in the precision of the teacher's weights: it takes the place of the teacher's pass."""
    weight = next(families.head(teacher).parameters())
    rows = int(kept_rows(tensors["labels"], tensors["roles"], visual=visual).sum())
    seen = int((tensors["roles"] == VISUAL).sum())
    with PRETENDING:
        kept = {TEACHER_HIDDEN: torch.zeros(rows, weight.shape[-1], dtype=weight.dtype)}
        return kept | {TEACHER_ATTENTION: torch.zeros(seen)} if visual else kept


def recompute(student: PreTrainedModel | PeftModel) -> None:
    """Switches gradient checkpointing on, under the name that the release has for it."""
    inner: Any = student
    name = "activation_checkpointing" if hasattr(inner, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(inner, f"{name}_enable")()


def planned_pairing(student: PreTrainedModel, teacher: PreTrainedModel | None) -> Pairing:
    """Heads of two sizes are taken to share the tokens of the smaller one; towers are counted as two."""
    if teacher is None:
        return Pairing()
    return Pairing(slice(min(Projection(student).out_features, Projection(teacher).out_features)))


@contextmanager
def chunks_of(kind: str) -> Iterator[None]:
    """Inside the block rows go through the vocabulary in chunks as large as on this kind of device."""
    limits = (weighted.CHUNK_LOGITS, weighted.BLOCK_LOGITS)
    kept = [limit["cpu"] for limit in limits]
    try:
        for limit in limits:
            limit["cpu"] = limit[kind]
        yield
    finally:
        for limit, value in zip(limits, kept, strict=True):
            limit["cpu"] = value


def positive(counted: Counter[str]) -> dict[str, int]:
    """The phases that have any."""
    return {phase: size for phase, size in counted.items() if size > 0}
