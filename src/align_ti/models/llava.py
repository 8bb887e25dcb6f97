"""The LLaVA layout of transformers, put together from parts: a tower, a projector of two layers, a language model, one processor."""

from __future__ import annotations

from typing import Literal

from transformers import (
    BaseImageProcessor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from align_ti.errors import ModelError
from align_ti.models.families import class_tokens, visual_tokens

IMAGE_TOKEN = "<image>"
"""The token that a processor repeats for an image."""

Strategy = Literal["full", "default"]
"""Which positions of the tower's output become visual tokens: all of them, or all but the first."""


def build_config(
    vision: PreTrainedConfig, text: PreTrainedConfig, *, image_token: int, feature_layer: int, strategy: Strategy
) -> LlavaConfig:
    """The config of a LLaVA model; its projector is Linear, GELU, Linear.

    Raises:
        ModelError: the tower reads images of any size, so they have no fixed number of visual tokens.
    """
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=feature_layer,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    count = visual_tokens(config)
    if count is None:
        raise ModelError(
            f"{type(vision).__name__} names no one image and patch size; a tower of fixed images is accepted."
        )
    config.image_seq_length = count
    return config


def build_processor(
    pictures: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision: PreTrainedConfig,
    strategy: Strategy,
    chat_template: str,
) -> LlavaProcessor:
    """Tokenizer, image preparation and chat template as one processor that counts visual tokens as the config does."""
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=class_tokens(vision),
        chat_template=chat_template,
    )
