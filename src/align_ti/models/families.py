"""What differs between model families, behind a few questions: backbone, head, language model, layers, special tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from align_ti.errors import BatchError, ModelError


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
    projects = (module for module in modules if hasattr(module, "q_proj") or hasattr(module, "qkv_proj"))
    numbered = ((getattr(module, "layer_idx", None), module) for module in projects)
    return {index: module for index, module in numbered if isinstance(index, int)}


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """What mixes tokens in each layer: "full_attention", "sliding_attention", or a family's own word for anything else."""
    config: Any = language_model(model).config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    attention = attention_modules(model)
    return [kind if layer in attention else "recurrent" for layer in range(config.num_hidden_layers)]


def sliding_window(model: PreTrainedModel) -> int:
    """Tokens that a sliding layer sees, its own included."""
    config: Any = language_model(model).config
    return int(config.sliding_window)


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Layers whose attention sees every earlier token: the candidates for IVA."""
    kinds = layer_kinds(model)
    return [layer for layer in sorted(attention_modules(model)) if kinds[layer] == "full_attention"]


def layers_that_cannot_branch(model: PreTrainedModel) -> dict[int, str]:
    """Layers, with their kind, in which a candidate cannot be tried in place of a gold token.

    A recurrent layer (linear attention, convolution, state space) carries one state from token to token: a candidate would change
    what follows it, and the state before each response token is not kept. Neither a cache nor a mask can undo that.
    """
    return {
        layer: kind
        for layer, kind in enumerate(layer_kinds(model))
        if kind not in {"full_attention", "sliding_attention"} or layer not in attention_modules(model)
    }


def cross_attention_layers(model: PreTrainedModel) -> list[int]:
    """Layers that read images by cross-attention (Mllama), which they keep in the cache beside the words."""
    config: Any = language_model(model).config
    return list(getattr(config, "cross_attention_layers", None) or ())


def tower(model: PreTrainedModel) -> nn.Module | None:
    """The vision tower, or None where there is none under a known name."""
    for name in TOWER_NAMES:
        found = getattr(backbone(model), name, None)
        if isinstance(found, nn.Module):
            return found
    return None


TOWER_NAMES = ("vision_tower", "visual", "vision_model")
"""The names that transformers' families give their vision tower."""


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


def position_ids(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Int[Tensor, "*axes batch seq"]:
    """The position of every token, counted over real tokens only, so that padding on either side changes nothing.

    Families with multimodal rotary positions have three axes (time, height, width) in front: [3, batch, seq].
    """
    given = inputs.get("position_ids")
    if given is not None:
        return torch.as_tensor(given)
    counted = (real_tokens(inputs).long().cumsum(-1) - 1).clamp(min=0)
    of_grids: Any = getattr(backbone(model), "get_rope_index", None)
    if of_grids is None:
        return counted
    if inputs.get("image_grid_thw") is None:
        return counted[None].expand(3, -1, -1)
    known = {**inputs, "attention_mask": real_tokens(inputs).long()}
    known.setdefault("mm_token_type_ids", (inputs["input_ids"] == image_token(model)).int())
    # Releases differ in what they ask for.
    asked = inspect.signature(of_grids).parameters
    positions: Tensor = of_grids(**{name: value for name, value in known.items() if name in asked})[0]
    return positions


def widest_float(device: torch.device) -> torch.dtype:
    """The widest float that a device has, for sums of weights: float64, but float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """True where a token is no padding: bool [batch, seq]."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def check_layout(model: PreTrainedModel) -> None:
    """Refuse a language model that cannot be followed exactly.

    Raises:
        ModelError: logits inside attention are capped, but the attention that the model runs on drops the cap.
    """
    config: Any = language_model(model).config
    cap, runs_on = getattr(config, "attn_logit_softcapping", None), config._attn_implementation
    if cap and runs_on not in CAPPING:
        raise ModelError(
            f"{type(model).__name__} caps its attention at {cap:g}, but runs on {runs_on!r}, which drops the cap; accepted: "
            f"{', '.join(CAPPING)}; load it with attn_implementation='eager'."
        )


CAPPING = ("eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""transformers' attention implementations that know a soft cap."""


def visual_tokens_per_picture(model: PreTrainedModel) -> int | None:
    """Visual tokens of one image as the model's own config has it, or None where images vary in size."""
    return visual_tokens(model.config)


def visual_tokens(config: PreTrainedConfig) -> int | None:
    """Visual tokens of one image under a model's config, or None where images vary in size."""
    vision = getattr(config, "vision_config", None)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    tiled = getattr(config, "image_grid_pinpoints", None)
    if strategy is None or tiled or not isinstance(size, int) or not isinstance(patch, int):
        return None
    # "default" drops the first position, whatever it is.
    return (size // patch) ** 2 + class_tokens(vision) - int(strategy == "default")


def class_tokens(vision: PreTrainedConfig | None) -> int:
    """Tokens that a vision tower puts in front of its patches: CLIP has one, SigLIP none."""
    return int(getattr(vision, "model_type", "") == "clip_vision_model")


def tokens_per_tile(model: PreTrainedModel) -> int | None:
    """Visual tokens of one image, or of one of the equal tiles it is cut into; None where they vary."""
    config = model.config
    if getattr(config, "image_grid_pinpoints", None):
        return None
    vision, factor = getattr(config, "vision_config", None), getattr(config, "scale_factor", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if isinstance(factor, int) and isinstance(size, int) and isinstance(patch, int):
        return (size // patch) ** 2 // factor**2
    named = (getattr(config, name, None) for name in ("mm_tokens_per_image", "image_seq_length"))
    return visual_tokens(config) or next((int(count) for count in named if count), None)


def visual_grids(
    model: PreTrainedModel, inputs: Mapping[str, Any], visual: Bool[Tensor, "batch seq"]
) -> list[list[tuple[int, int]]]:
    """Rows and columns of the grid that each image's (or tile's) visual tokens form, for each sample, in reading order.

    Raises:
        BatchError: a run of visual tokens is not made of square grids that the config names.
    """
    given, fixed = inputs.get("image_grid_thw"), tokens_per_tile(model)
    if given is not None:
        merge = int(model.config.vision_config.spatial_merge_size)
        pictures = iter([(height // merge, width // merge) for _, height, width in given.tolist()])
    grids = []
    for sample, row in enumerate(visual):
        found: list[tuple[int, int]] = []
        for count in runs(row):
            if given is not None:
                while count > 0:
                    found.append(next(pictures))
                    count -= found[-1][0] * found[-1][1]
                continue
            side = 0 if fixed is None else math.isqrt(fixed)
            if fixed is None or side * side != fixed or count % fixed:
                raise BatchError(
                    f"sample {sample}: {count} visual tokens of {type(model).__name__} form no square grids that its config names; "
                    "leave IVA out (objective.iva.weight: 0) or choose models with equal visual tokens."
                )
            found += [(side, side)] * (count // fixed)
        grids.append(found)
    return grids


def runs(marked: Bool[Tensor, " seq"]) -> list[int]:
    """The lengths of the runs of adjacent True, in order."""
    edges = torch.diff(torch.nn.functional.pad(marked.int(), (1, 1))).tolist()
    starts = [place for place, edge in enumerate(edges) if edge == 1]
    return [stop - start for start, stop in zip(starts, (p for p, edge in enumerate(edges) if edge == -1), strict=True)]
