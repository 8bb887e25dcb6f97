"""What differs between model families, behind a few questions: backbone, head, language model, layers, special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from align_ti.errors import ModelError


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: gives hidden states and a cache."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no `.model` backbone; a conditional-generation model of transformers is accepted; "
            "load it with AutoModelForImageTextToText."
        )
    return inner


def head(model: PreTrainedModel) -> nn.Module:
    """The projection from hidden states to logits."""
    found: nn.Module | None = model.get_output_embeddings()
    if found is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings; load it with AutoModelForImageTextToText.")
    return found


def language_model(model: PreTrainedModel) -> nn.Module:
    """The decoder that reads visual and text tokens."""
    decoder: nn.Module = model.get_decoder()
    return decoder


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The language model's softmax attention modules by layer index; layers with another kind of mixing are absent."""
    modules = language_model(model).modules()
    numbered = ((getattr(module, "layer_idx", None), module) for module in modules if hasattr(module, "q_proj"))
    return {index: module for index, module in numbered if isinstance(index, int)}


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Layers whose attention sees every earlier token: the candidates for IVA."""
    kinds = getattr(language_model(model).config, "layer_types", None)
    layers = sorted(attention_modules(model))
    return [layer for layer in layers if kinds is None or kinds[layer] == "full_attention"]


def image_token(model: PreTrainedModel) -> int | None:
    """The token id that stands for one visual token, or None in a text-only model."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(model.config, name, None)
        if value is not None:
            return int(value)
    return None


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The token ids that end a turn, from the generation config, else from the model's configs."""
    for config in (model.generation_config, model.config, model.config.get_text_config(decoder=True)):
        value = getattr(config, "eos_token_id", None)
        if value is not None:
            return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
    return ()


def position_ids(inputs: Mapping[str, Any]) -> Int[Tensor, "batch seq"]:
    """The position of every token, counted over real tokens only, so that padding on either side changes nothing."""
    given = inputs.get("position_ids")
    if given is not None:
        return torch.as_tensor(given)
    return (real_tokens(inputs).long().cumsum(-1) - 1).clamp(min=0)


def widest_float(device: torch.device) -> torch.dtype:
    """The widest float that a device has, for sums of weights: float64, but float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """True where a token is no padding: bool [batch, seq]."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def check_layout(model: PreTrainedModel) -> None:
    """Refuse a language model whose masks, positions or logits this version does not follow exactly.

    Raises:
        ModelError: layers other than full attention, several position axes, or logits that are capped or scaled after the head.
    """
    config = language_model(model).config
    rope = getattr(config, "rope_parameters", None) or {}
    special = {
        "layer_types": [kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"],
        "mrope_section": rope.get("mrope_section") if isinstance(rope, dict) else None,
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "logit_scale": getattr(config, "logit_scale", None),
        "logits_scaling": getattr(config, "logits_scaling", None),
    }
    found = {name: value for name, value in special.items() if value}
    if found:
        named = ", ".join(f"{name}: {value}" for name, value in found.items())
        raise ModelError(
            f"the language model of {type(model).__name__} has {named}, which this version does not follow exactly; full attention, "
            "one position axis and plain logits are accepted (such as Llama, Qwen2 and Qwen3 text in LLaVA)."
        )


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a pair that cannot be compared token by token.

    Raises:
        ModelError: heads of different size, different image tokens, or a teacher in training mode.
    """
    for model in (student, teacher):
        check_layout(model)
    if teacher.training:
        raise ModelError(
            "the teacher is in training mode, where dropout changes its distributions; a teacher in eval mode is "
            "accepted; call teacher.eval().requires_grad_(False)."
        )
    sizes = [int(next(head(model).parameters()).shape[0]) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the student's head has {sizes[0]} tokens, the teacher's {sizes[1]}; equal vocabularies are accepted; choose "
            "models of one tokenizer and head size."
        )
    images = [image_token(model) for model in (student, teacher)]
    if images[0] != images[1]:
        raise ModelError(
            f"the student's image token is {images[0]}, the teacher's {images[1]}; one id is accepted, since both read the "
            "same sequence; choose models of one processor."
        )
    counts = [visual_tokens_per_picture(model) for model in (student, teacher)]
    if None not in counts and counts[0] != counts[1]:
        raise ModelError(
            f"the student's tower gives {counts[0]} visual tokens a picture, the teacher's {counts[1]}; equal counts are "
            "accepted, since both read the same sequence; choose towers of one picture and patch size."
        )


def visual_tokens_per_picture(model: PreTrainedModel) -> int | None:
    """Visual tokens of one picture as the model's own config has it, or None where pictures vary in size."""
    return visual_tokens(model.config)


def visual_tokens(config: PreTrainedConfig) -> int | None:
    """Visual tokens of one picture under a model's config, or None where pictures vary in size."""
    vision = getattr(config, "vision_config", None)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if strategy is None or not isinstance(size, int) or not isinstance(patch, int):
        return None
    # "default" drops the first position, whatever it is.
    return (size // patch) ** 2 + class_tokens(vision) - int(strategy == "default")


def class_tokens(vision: PreTrainedConfig | None) -> int:
    """Tokens that a vision tower puts in front of its patches: CLIP has one, SigLIP none."""
    return int(getattr(vision, "model_type", "") == "clip_vision_model")
