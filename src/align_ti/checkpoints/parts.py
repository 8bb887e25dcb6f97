"""What a LLaVA model is made of, loaded and checked: vision tower, image processor, tokenizer with its image token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

from align_ti.errors import ModelError
from align_ti.models.completeness import check_pictures, check_tokenizer
from align_ti.models.llava import IMAGE_TOKEN
from align_ti.models.loading import check_loaded, first_line

TOWERS: dict[str, Any] = {
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
}
"""The vision tower in a checkpoint, by its model type; those of both towers hold one too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A model folder that was written, and what is in it."""

    folder: Path
    parameters: dict[str, int]
    """By part."""
    dtype: str
    image_token: int
    visual_tokens: int
    """Of one image."""
    end_tokens: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """What was left out or decided on the way, as sentences."""


@contextmanager
def loading(path: str, what: str, accepted: str) -> Iterator[None]:
    """Turns what transformers raises while it loads inside the block into one sentence.

    Raises:
        ModelError: it could not be loaded.
    """
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: the {what} cannot be loaded ({first_line(error)}); {accepted} is accepted."
        ) from error


def load_tower(path: str) -> PreTrainedModel:
    """The vision tower in a folder or of a hub name, in the precision that it was saved in.

    Raises:
        ModelError: it is no SigLIP or CLIP checkpoint, or weights are missing.
    """
    accepted = "a folder or hub name of a SigLIP or CLIP checkpoint, saved as safetensors,"
    with loading(path, "vision tower", accepted):
        kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    if kind not in TOWERS:
        raise ModelError(f"{path}: the vision tower is of type {kind!r}; accepted: {', '.join(TOWERS)}.")
    with loading(path, "vision tower", accepted):
        tower, info = TOWERS[kind].from_pretrained(
            # Weights of another shape are not taken: check_loaded refuses them by name.
            path,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_loaded(path, info)
    loaded: PreTrainedModel = tower.eval()
    return loaded


def load_pictures(path: str) -> BaseImageProcessor:
    """The image processor beside a vision tower.

    Raises:
        ModelError: there is none, or it does not say what prepared images look like.
    """
    with loading(path, "image processor", "a preprocessor_config.json beside the vision tower"):
        pictures: BaseImageProcessor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    check_pictures(path, pictures)
    return pictures


def load_tokenizer(path: str, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, with `<image>` as a special token, a padding token, and padding in front.

    Raises:
        ModelError: there is none, transformers made it up, or it cannot hold `<image>` as one token.
    """
    with loading(path, "tokenizer", "a fast tokenizer (tokenizer.json) beside the language model"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    check_tokenizer(path, tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    ids = tokenizer.encode(f"a{IMAGE_TOKEN}b", add_special_tokens=False)
    if ids.count(image_id(tokenizer)) != 1:
        raise ModelError(
            f"{path}: the tokenizer splits {IMAGE_TOKEN}; one that takes added special tokens is accepted."
        )
    if tokenizer.pad_token is None:
        # Padding is masked everywhere, so which token fills it changes nothing.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def image_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<image>`."""
    return int(tokenizer.get_vocab()[IMAGE_TOKEN])


def check_feature_layer(layer: int, vision: PreTrainedConfig, option: str) -> None:
    """Refuse a layer that the tower does not have.

    Raises:
        ModelError: it is out of range.
    """
    layers = int(vision.num_hidden_layers)
    if not -layers - 1 <= layer <= layers:
        raise ModelError(
            f"{option} is {layer}; the tower has {layers} layers, so {-layers - 1} to {layers} are accepted (0: its embeddings, -1: "
            "behind its last layer)."
        )


def empty_model(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """The model without memory for its weights: names and shapes alone."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.tie_weights()
    return model


def count_parameters(config: LlavaConfig) -> dict[str, int]:
    """Parameters by part; a head that is tied to the embeddings counts once, with the language model."""
    model = empty_model(config)
    tower, projector = (
        sum(weight.numel() for weight in part.parameters())
        for part in (model.model.vision_tower, model.model.multi_modal_projector)
    )
    whole = sum(weight.numel() for weight in model.parameters())
    return {"vision tower": tower, "projector": projector, "language model": whole - tower - projector}


def greedy_generation(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> GenerationConfig:
    """Greedy decoding that stops at any of the given tokens."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def set_precision(config: LlavaConfig, dtype: torch.dtype) -> None:
    """One precision for all parts in a model's configs."""
    parts: tuple[Any, ...] = (config, config.text_config, config.vision_config)
    for part in parts:
        part.dtype = dtype


def precision(dtype: torch.dtype) -> str:
    """The name of a precision as configs and options write it."""
    return str(dtype).removeprefix("torch.")
