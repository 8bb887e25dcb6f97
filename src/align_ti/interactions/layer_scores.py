"""IRS: how far each layer's visual focus moves with the instruction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation
from align_ti.data.groups import same_image_groups
from align_ti.data.roles import INSTRUCTION, VISUAL, encode, model_inputs
from align_ti.errors import BatchError
from align_ti.interactions.visual import aligned_samples
from align_ti.models.attention import watching
from align_ti.models.continuation import read
from align_ti.models.families import full_attention_layers


@torch.no_grad()
def score_layers(model: PreTrainedModel, groups: Iterable[Mapping[str, Tensor]]) -> dict[int, float]:
    """The instruction-relevance score of every full-attention layer: 1 - mean cosine of the visual attention of pairs.

    Args:
        model: the model whose layers are scored, usually the teacher.
        groups: batches with `roles`, each one image under two or more instructions; every pair of a group counts once.

    Returns:
        The score of each layer, between 0 (the instruction changes nothing) and 1. The highest one is IVA's layer.

    Raises:
        BatchError: no groups, a group of one sample, or samples of a group that have no instruction or differ in their number of
            visual tokens, so that they cannot share an image.

    Source: Align-TI (arXiv:2602.09483), IRS(l) = 1 - E[cos(alpha(x1), alpha(x2))]; the cosine is our reading of it.
    """
    layers = tuple(full_attention_layers(model))
    was_training = model.training
    model.eval()
    similarities: list[Tensor] = []
    try:
        for number, group in enumerate(groups, start=1):
            similarities.append(pair_similarities(model, group, layers, f"group {number}"))
    finally:
        model.train(was_training)
    if not similarities:
        raise BatchError("no groups to score layers on; give batches of one image under two or more instructions each.")
    mean = torch.cat(similarities, dim=1).mean(1)
    return {layer: 1.0 - float(value) for layer, value in zip(layers, mean, strict=True)}


def score_on_records(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    *,
    images: int,
    instructions: int,
    seed: int = 0,
    device: torch.device | None = None,
) -> dict[int, float]:
    """`score_layers` on a sample of records: up to `images` images under 2 to `instructions` instructions each.

    The questions are moved to the device, by default the model's.

    Raises:
        DataError: no image has two instructions.
        BatchError: as `score_layers`.
    """
    # Not a training collator, which may ask more of a sample than a question has.
    collate, place = Collator(processor.tokenizer.pad_token_id), model.device if device is None else device
    groups = same_image_groups(conversations, images, instructions, seed)
    batches = (collate([encode(one, processor, train=False) for one in group]) for group in groups)
    return score_layers(model, ({name: value.to(place) for name, value in batch.items()} for batch in batches))


def best_layer(scores: Mapping[int, float]) -> int:
    """The layer with the highest score, which is IVA's; the first of several."""
    return max(scores, key=lambda layer: scores[layer])


def pair_similarities(
    model: PreTrainedModel, group: Mapping[str, Tensor], layers: tuple[int, ...], name: str
) -> Tensor:
    """The cosine of visual attention for each layer and each pair of the group: [layers, pairs]."""
    return similarities_of(visual_focus(model, group, layers, name))


def visual_focus(
    model: PreTrainedModel, group: Mapping[str, Tensor], layers: tuple[int, ...], name: str
) -> Float[Tensor, "layers samples visual"]:
    """The attention that each sample's instruction pays to its visual tokens, averaged over heads and instruction tokens.

    Raises:
        BatchError: as `score_layers`.
    """
    roles = group["roles"]
    visual, instruction = roles == VISUAL, roles == INSTRUCTION
    counts = visual.sum(-1)
    if (
        len(roles) < 2
        or counts.min() == 0
        or counts.min() != counts.max()
        or not aligned_samples(visual, instruction).all()
    ):
        raise BatchError(
            f"{name} holds {len(roles)} sample(s) with {counts.tolist()} visual and {instruction.sum(-1).tolist()} instruction "
            "tokens; accepted: one image under two or more instructions, so equal visual counts and an instruction behind the image."
        )
    with watching(model, instruction, layers) as watch:
        read(model, model_inputs(group), keep_cache=False)
    return torch.stack([watch.means[layer][visual].view(len(roles), -1) for layer in layers])


def similarities_of(focus: Float[Tensor, "layers samples visual"]) -> Float[Tensor, "layers pairs"]:
    """The cosine of the focus of each pair of samples."""
    unit = torch.nn.functional.normalize(focus.double(), dim=-1)
    one, two = torch.triu_indices(focus.shape[1], focus.shape[1], offset=1)
    return (unit[:, one] * unit[:, two]).sum(-1)
