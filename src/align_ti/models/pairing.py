"""What is found once about a student and a teacher: the tokens they share, whether they read the same inputs, and their tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.errors import ModelError
from align_ti.models.families import check_layout, image_token, visual_tokens_per_picture
from align_ti.models.overrides import Projection, same_frozen_tower


@dataclass(frozen=True, slots=True)
class Pairing:
    """How a student and a teacher are compared.

    `shared` selects the logits of the tokens that both models have. `shared_tower`: both have the same frozen vision tower, whose
    features are computed once. `teacher_image_tokens`: the teacher's image token, which is never a candidate.
    """

    shared: slice | Int[Tensor, " shared"] = field(default_factory=lambda: slice(None))
    shared_tower: bool = False
    teacher_image_tokens: tuple[int, ...] = ()

    def unshared(self, tokens: int) -> tuple[int, ...]:
        """The token ids below `tokens` that only one of the two knows."""
        alone = torch.ones(tokens, dtype=torch.bool)
        alone[self.shared if isinstance(self.shared, slice) else self.shared.cpu()] = False
        return tuple(alone.nonzero().squeeze(-1).tolist())


def pair_up(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processor: ProcessorMixin | None = None,
    teacher_processor: ProcessorMixin | None = None,
) -> Pairing:
    """How two models are compared: their shared tokens, their inputs, a shared vision tower.

    Args:
        student: the model to train.
        teacher: the model to imitate.
        processor: the student's processor.
        teacher_processor: the teacher's, if the teacher has its own inputs.

    Raises:
        ModelError: a token has different ids in the two tokenizers, or heads differ in size and no tokenizer identifies the
            tokens.
    """
    shared = shared_tokens(student, teacher, processor, teacher_processor)
    image = image_token(teacher)
    return Pairing(
        shared,
        shared_tower=teacher_processor is None and same_frozen_tower(student, teacher),
        teacher_image_tokens=() if image is None else (image,),
    )


def shared_tokens(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processor: ProcessorMixin | None = None,
    teacher_processor: ProcessorMixin | None = None,
) -> slice | Int[Tensor, " shared"]:
    """The logits of the tokens that both models know: padding of either head is no token.

    Without processors, heads of one size are taken to have the same tokens.

    Raises:
        ModelError: a token has different ids in the two tokenizers, or heads differ in size and no tokenizer tells the tokens.
    """
    sizes = (Projection(student).out_features, Projection(teacher).out_features)
    if processor is None:
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"the student's head has {sizes[0]} tokens, the teacher's {sizes[1]}, and no tokenizer tells which are shared; pass "
                "pairing=pair_up(student, teacher, processor)."
            )
        return slice(None)
    ours = processor.tokenizer.get_vocab()
    theirs = ours if teacher_processor is None else teacher_processor.tokenizer.get_vocab()
    ids = shared_ids(ours, theirs, min(sizes))
    return slice(len(ids)) if ids == list(range(len(ids))) else torch.tensor(ids, device=student.device)


def shared_ids(ours: Mapping[str, int], theirs: Mapping[str, int], size: int) -> list[int]:
    """The ids below `size` of the tokens that both tokenizers know, in ascending order.

    Raises:
        ModelError: a token has different ids in the two; the first ones are named. Or no token is shared.
    """
    differing = [token for token in sorted(ours) if token in theirs and ours[token] != theirs[token]]
    if differing:
        named = ", ".join(f"{token!r} ({ours[token]} and {theirs[token]})" for token in differing[:5])
        raise ModelError(
            f"student and teacher have different tokenizers: {len(differing)} token(s) have different ids, first {named}; equal ids "
            "are accepted; choose models of one tokenizer."
        )
    ids = sorted({number for token, number in ours.items() if token in theirs and number < size})
    if not ids:
        raise ModelError("student and teacher share no token; choose models of one tokenizer.")
    return ids


def reads_the_same(student: ProcessorMixin, teacher: ProcessorMixin) -> bool:
    """Whether both processors make the same inputs of a record, so that one batch serves both models."""
    return (
        type(student) is type(teacher)
        and student.chat_template == teacher.chat_template
        and student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
        and options_of(student) == options_of(teacher)
    )


def own_processor(processor: Any, teacher_processor: ProcessorMixin | None) -> ProcessorMixin | None:
    """The teacher's processor if it makes other inputs of a record than the student's, else None: both read the same."""
    if teacher_processor is None or not isinstance(processor, ProcessorMixin):
        return None
    return None if reads_the_same(processor, teacher_processor) else teacher_processor


def options_of(processor: ProcessorMixin) -> dict[str, Any]:
    """A processor's own options and those of its image processor, as they are saved; paths and versions left out."""
    prepared = getattr(processor, "image_processor", None)
    own = {name: value for name, value in vars(processor).items() if isinstance(value, (bool, int, float, str))}
    told = {**own, **({} if prepared is None else prepared.to_dict())}
    passing = {"name_or_path", "_name_or_path", "transformers_version", "chat_template"}
    # Lists and tuples of the same numbers are the same option.
    return {name: tuple(v) if isinstance(v, list) else v for name, v in told.items() if name not in passing}


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, *, shared_inputs: bool = True) -> None:
    """Refuse a pair that cannot be compared.

    Args:
        student: the model to train.
        teacher: the model to imitate.
        shared_inputs: whether both read the same batch; a teacher with a processor of its own reads its own.

    Raises:
        ModelError: a teacher in training mode, or, of shared inputs, different image tokens or numbers of them.
    """
    for model in (student, teacher):
        check_layout(model)
    if teacher.training:
        raise ModelError(
            "the teacher is in training mode, where dropout changes its distributions; a teacher in eval mode is "
            "accepted; call teacher.eval().requires_grad_(False)."
        )
    if not shared_inputs:
        return
    images = [image_token(model) for model in (student, teacher)]
    if images[0] != images[1]:
        raise ModelError(
            f"the student's image token is {images[0]}, the teacher's {images[1]}, but both read the same sequence; give the "
            "teacher's own processor (teacher_processing_class), so that each reads its own."
        )
    counts = [visual_tokens_per_picture(model) for model in (student, teacher)]
    if None not in counts and counts[0] != counts[1]:
        raise ModelError(
            f"the student's tower gives {counts[0]} visual tokens an image, the teacher's {counts[1]}, but both read the same "
            "sequence; give the teacher's own processor (teacher_processing_class), so that each reads its own."
        )
