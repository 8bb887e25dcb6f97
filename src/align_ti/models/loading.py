"""Loads models and processors from folders or the hub: safetensors only, no remote code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from align_ti.errors import ModelError
from align_ti.models.families import backbone


def load_model(path: str, dtype: str = "auto", device: torch.device | str = "cpu") -> PreTrainedModel:
    """The vision-language model in a folder or of a hub name, in eval mode.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        load: Any = AutoModelForImageTextToText.from_pretrained
        model, info = load(path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: the model cannot be loaded ({first_line(error)}); a folder or hub name of a vision-language model of "
            "transformers, saved as safetensors, is accepted."
        ) from error
    check_loaded(path, info)
    loaded: PreTrainedModel = model
    nn.Module.to(loaded, torch.device(device))
    loaded.eval()
    return loaded


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_loaded(path: str, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that leaves weights as they were initialised: a vision tower of random numbers trains happily.

    Raises:
        ModelError: weights are missing or have another shape; the first ones are named.
    """
    wrong = [f"{name} is missing" for name in sorted(info.get("missing_keys") or [])]
    wrong += [f"{entry} has another shape" for entry in map(str, info.get("mismatched_keys") or [])]
    if wrong:
        raise ModelError(
            f"{path}: {len(wrong)} weight(s) cannot be loaded: {'; '.join(wrong[:3])}; a complete checkpoint of the model that its "
            "config.json names is accepted; save it again, or mend the config."
        )


def load_processor(path: str) -> ProcessorMixin:
    """The processor beside a model.

    Raises:
        ModelError: it cannot be loaded, or has no chat template.
    """
    try:
        processor: ProcessorMixin = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path}: the processor cannot be loaded ({first_line(error)}); save it beside the model with "
            "processor.save_pretrained."
        ) from error
    if getattr(processor, "tokenizer", None) is None or not getattr(processor, "chat_template", None):
        raise ModelError(
            f"{path}: the processor has no chat template, so roles cannot be told apart; save one with it (chat_template.jinja)."
        )
    return processor


def first_line(error: Exception) -> str:
    """The first line of a message, which is what one-line errors have room for."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def check_processors(student: ProcessorMixin, teacher: ProcessorMixin) -> None:
    """Refuse two processors that would not make the same tokens.

    Raises:
        ModelError: a token has different ids in the two tokenizers; the first ones are named.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    differing = [token for token in sorted({*ours, *theirs}) if ours.get(token) != theirs.get(token)]
    if differing:
        named = ", ".join(f"{token!r} ({ours.get(token)} and {theirs.get(token)})" for token in differing[:5])
        raise ModelError(
            f"student and teacher have different tokenizers: {len(differing)} token(s) differ, first {named}; equal token ids are "
            "accepted; choose models of one tokenizer."
        )
    mine, its = (picture_options(processor) for processor in (student, teacher))
    changed = [f"{name} ({mine[name]} and {its[name]})" for name in mine if mine[name] != its[name]]
    if changed:
        raise ModelError(
            f"student and teacher prepare pictures differently: {', '.join(changed)}; both read the same pixels, so equal options are "
            "accepted; choose models of one image processor."
        )


PICTURE_OPTIONS = (
    "size",
    "crop_size",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "resample",
    "do_pad",
    "do_convert_rgb",
)


def picture_options(processor: ProcessorMixin) -> dict[str, Any]:
    """The options of an image processor that change pixels."""
    prepared = getattr(processor, "image_processor", None)
    options = {} if prepared is None else prepared.to_dict()
    # Lists and tuples of the same numbers are the same option.
    return {name: tuple(value) if isinstance(value := options.get(name), list) else value for name in PICTURE_OPTIONS}


PARTS = {
    "vision_tower": ("vision_tower", "visual", "vision_model"),
    "projector": ("multi_modal_projector", "connector"),
    "language_model": ("language_model", "text_model"),
}
"""The names that transformers' families give their parts."""


def freeze(model: PreTrainedModel, parts: tuple[str, ...]) -> None:
    """Switches off the gradient of the named parts.

    Raises:
        ModelError: the model has no such part, or nothing is left to train.
    """
    inner = backbone(model)
    for part in parts:
        found = [getattr(inner, name) for name in PARTS[part] if hasattr(inner, name)]
        if not found:
            raise ModelError(
                f"student.freeze names {part!r}, but {type(model).__name__} has no such part; leave it out; parts are: "
                f"{', '.join(name for name, _ in inner.named_children())}."
            )
        for module in found:
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"student.freeze ({', '.join(parts)}) leaves nothing to train; freeze fewer parts.")
