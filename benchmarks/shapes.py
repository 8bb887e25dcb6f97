"""Pairs of models with random weights and batches of a given shape: what the benchmarks of time and memory run on.

Nothing is loaded: time and memory depend on shapes, not on what the weights have learnt. What depends on it, the share of candidates
that need a row of their own, is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel, Qwen3Config, SiglipVisionConfig

from align_ti.data.roles import INSTRUCTION, NO_LABEL, RESPONSE, VISUAL

PATCH = 14
"""Pixels of a patch's side, as in SigLIP-so400m/14."""

IMAGE_TOKEN = 3
"""The id that stands for a visual token."""

FIRST_WORD = 10
"""Ids below this one stand for nothing that a text holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The language model's size."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    tied: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """The vision tower's size."""

    hidden: int
    layers: int
    heads: int
    intermediate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A pair of models over one frozen vision tower, and a batch: tokens of each role in every sample."""

    student: Decoder
    teacher: Decoder
    tower: Tower
    vocabulary: int
    side: int
    """Patches along an image's side; the visual tokens are its square."""
    instruction: int
    response: int
    batch: int

    @property
    def visual(self) -> int:
        """Visual tokens of a sample."""
        return self.side**2


CPU = Shape(
    student=Decoder(hidden=256, layers=6, heads=4, key_heads=2, head_dim=64, intermediate=1024),
    teacher=Decoder(hidden=512, layers=8, heads=8, key_heads=4, head_dim=64, intermediate=2304),
    tower=Tower(hidden=128, layers=2, heads=2, intermediate=512),
    vocabulary=32_000,
    side=27,
    instruction=60,
    response=150,
    batch=2,
)
"""A student of 15 M and a teacher of 52 M parameters, 729 visual + 60 + 150 tokens."""

ACCELERATOR = Shape(
    student=Decoder(hidden=1024, layers=28, heads=16, key_heads=8, head_dim=128, intermediate=3072),
    teacher=Decoder(hidden=4096, layers=36, heads=32, key_heads=8, head_dim=128, intermediate=12_288, tied=False),
    tower=Tower(hidden=1152, layers=27, heads=16, intermediate=4304),
    vocabulary=151_936,
    side=27,
    instruction=60,
    response=150,
    batch=8,
)
"""SigLIP-so400m + Qwen3-0.6B from SigLIP-so400m + Qwen3-8B."""


def make_config(decoder: Decoder, shape: Shape) -> LlavaConfig:
    """The config of a LLaVA model of this size."""
    return LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=shape.tower.hidden,
            intermediate_size=shape.tower.intermediate,
            num_hidden_layers=shape.tower.layers,
            num_attention_heads=shape.tower.heads,
            image_size=shape.side * PATCH,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=Qwen3Config(
            hidden_size=decoder.hidden,
            intermediate_size=decoder.intermediate,
            num_hidden_layers=decoder.layers,
            num_attention_heads=decoder.heads,
            num_key_value_heads=decoder.key_heads,
            head_dim=decoder.head_dim,
            vocab_size=shape.vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=decoder.tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=decoder.tied,
    )


def make_model(decoder: Decoder, shape: Shape, seed: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A LLaVA model of this size with random weights and a frozen vision tower, the same for all models of one shape."""
    config = make_config(decoder, shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = 1
    tower = model.model.vision_tower
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.02, generator=generator)
    tower.requires_grad_(False)
    return model


def make_pair(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student, in training mode, and frozen teacher."""
    student = make_model(shape.student, shape, 1, dtype, device)
    teacher = make_model(shape.teacher, shape, 2, teacher_dtype or dtype, device)
    return student.train(), teacher.requires_grad_(False).eval()


def make_batch(
    shape: Shape, seed: int = 0, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    """A full batch: an image, the instruction, the response; no padding, so that every rival has the same work."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (1, shape.visual, shape.instruction, shape.response)
    ids = torch.randint(FIRST_WORD, shape.vocabulary, (shape.batch, sum(lengths)), generator=generator)
    roles = torch.cat(
        [torch.full((count,), role) for count, role in zip(lengths, (0, VISUAL, INSTRUCTION, RESPONSE), strict=True)]
    )
    roles = roles.expand(shape.batch, -1).clone()
    ids[:, 0], ids[roles == VISUAL] = 0, IMAGE_TOKEN
    pixels = torch.randn(shape.batch, 3, shape.side * PATCH, shape.side * PATCH, generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(dtype),
        "labels": torch.where(roles == RESPONSE, ids, NO_LABEL),
        "roles": roles,
    }
    return {name: value.to(device) for name, value in batch.items()}


def make_candidates(batch: dict[str, Any], shape: Shape, count: int, share: float, seed: int = 0) -> Tensor:
    """Candidates of which the given share needs a row of its own; the others are the gold token.

    [batch, seq, count]; those with a row are distinct at their position and stand scattered over the response.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = batch["input_ids"].cpu()
    gold = ids[..., None].expand(-1, -1, count)
    # Steps from the gold token around the circle of words: distinct from it and from each other.
    words = shape.vocabulary - FIRST_WORD
    other = (gold - FIRST_WORD + 1 + torch.arange(count)) % words + FIRST_WORD
    places = (batch["roles"].cpu() == RESPONSE)[..., None].expand_as(gold).nonzero()
    chosen = places[torch.randperm(len(places), generator=generator)[: round(share * len(places))]]
    candidates = gold.clone()
    candidates[tuple(chosen.T)] = other[tuple(chosen.T)]
    return candidates.to(batch["input_ids"].device)


def parameters(model: PreTrainedModel) -> int:
    """Number of weights, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
