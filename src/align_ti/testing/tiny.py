"""Tiny random LLaVA models in float64, and batches of every composition, made without a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    SiglipVisionConfig,
)

VOCABULARY, IMAGE, END, PAD = 40, 39, 38, 37
VISUAL_TOKENS = 4
RESPONSE = 3


def model(
    seed: int, hidden: int = 32, layers: int = 2, attention: str = "sdpa", tower: str = "siglip"
) -> LlavaForConditionalGeneration:
    """A random model in float64 and eval mode. Weights are large enough that distributions differ clearly from uniform."""
    torch.manual_seed(seed)
    vision = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}[tower](
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=None,
        tie_word_embeddings=bool(seed % 2),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        vision_feature_layer=-1,
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=bool(seed % 2),
    )
    built: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config).double().eval()
    built.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.6 if "embed" in name or "lm_head" in name else 0.25)
    built.set_attn_implementation(attention)
    return built


@dataclass(frozen=True)
class Turn:
    """One turn: images, instruction words, response words (the end-of-turn token is added)."""

    images: int
    instruction: int
    response: int
    image_last: bool = False


Composition = tuple[tuple[Turn, ...], ...]

COMPOSITIONS: dict[str, Composition] = {
    "one turn": ((Turn(1, 3, 4),), (Turn(1, 2, 6),)),
    "several turns": ((Turn(1, 2, 3), Turn(0, 3, 2)), (Turn(1, 4, 2),)),
    "several images": ((Turn(2, 2, 3),), (Turn(1, 1, 2), Turn(1, 2, 3))),
    "text only in the batch": ((Turn(1, 3, 3),), (Turn(0, 4, 5),), (Turn(1, 2, 2),)),
    "text only": ((Turn(0, 3, 3),), (Turn(0, 1, 5),)),
    "image last": ((Turn(1, 3, 3, image_last=True),), (Turn(1, 2, 2), Turn(1, 3, 2, image_last=True))),
    "empty instruction": ((Turn(1, 0, 4),), (Turn(1, 3, 2),)),
}


def batch(composition: Composition, seed: int = 0, side: str = "right", extra_padding: int = 0) -> dict[str, Tensor]:
    """The batch with random words and images, padded on the given side."""
    random = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        drawn: list[int] = torch.randint(0, PAD, (count,), generator=random).tolist()
        return drawn

    samples = []
    for turns in composition:
        ids, roles = words(1), [0]
        for turn in turns:
            pictures: list[tuple[list[int], list[int]]] = []
            asked = (words(turn.instruction), [2] * turn.instruction)
            for _ in range(turn.images):
                pictures += [([IMAGE] * VISUAL_TOKENS, [1] * VISUAL_TOKENS), (words(1), [0])]
            for part in [asked, *pictures] if turn.image_last else [*pictures, asked]:
                ids, roles = ids + part[0], roles + part[1]
            ids, roles = ids + words(1), roles + [0]
            ids, roles = ids + words(turn.response) + [END], roles + [3] * (turn.response + 1)
        samples.append((ids, roles))
    length = max(len(ids) for ids, _ in samples) + extra_padding
    out: dict[str, list[list[int]]] = {"input_ids": [], "roles": [], "attention_mask": []}
    for ids, roles in samples:
        room = length - len(ids)
        for name, values, fill in (("input_ids", ids, PAD), ("roles", roles, 0), ("attention_mask", [1] * len(ids), 0)):
            out[name].append([fill] * room + values if side == "left" else values + [fill] * room)
    tensors = {name: torch.tensor(values) for name, values in out.items()}
    tensors["labels"] = torch.where(tensors["roles"] == 3, tensors["input_ids"], -100)
    shown = sum(turn.images for turns in composition for turn in turns)
    if shown:
        tensors["pixel_values"] = torch.randn(shown, 3, 8, 8, generator=random, dtype=torch.float64)
    return tensors


def candidates(of: dict[str, Tensor], seed: int = 0, count: int = 3) -> Tensor:
    """Random candidates with duplicates, gold tokens and ends of turn among them."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 6, (*of["input_ids"].shape, count), generator=random)
    fate = torch.rand(drawn.shape, generator=random)
    drawn = torch.where(fate < 0.25, of["input_ids"][..., None], drawn)
    return torch.where(fate > 0.8, END, drawn)
