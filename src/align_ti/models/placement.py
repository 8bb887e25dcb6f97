"""Where a model lies and in what form: quantised weights, a device of its own, several devices."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

from align_ti.errors import ModelError
from align_ti.models.families import backbone, head
from align_ti.models.headonly import has_head_only


def quantization_config(options: Mapping[str, Any]) -> Any:
    """The options of a quantization method as transformers' own object.

    Raises:
        ModelError: an unknown method, an option it does not have (transformers itself passes over it), or a value it refuses.
    """
    # The method's name has a suffix inside transformers only.
    named = options.get("quant_method")
    bits = next((key for key in ("load_in_4bit", "load_in_8bit") if options.get(key)), None)
    key = f"bitsandbytes_{bits.removeprefix('load_in_')}" if bits is not None else str(named)
    if key not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"teacher.quantization has quant_method {named!r}; accepted: load_in_4bit: true, load_in_8bit: true, or quant_method with "
            f"one of {', '.join(name for name in AUTO_QUANTIZATION_CONFIG_MAPPING if not name.startswith('bitsandbytes'))}."
        )
    known = [name for name in inspect.signature(AUTO_QUANTIZATION_CONFIG_MAPPING[key]).parameters if name != "self"]
    for name in options:
        if name not in {*known, "quant_method"}:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
            raise ModelError(f"teacher.quantization.{name} is no option of {key}; {hint}")
    try:
        return AutoQuantizationConfig.from_dict(dict(options))
    except Exception as error:  # each method checks its options in its own way
        raise ModelError(
            f"teacher.quantization: {key} refuses its options ({type(error).__name__}: {error}); the options of transformers' "
            f"{AUTO_QUANTIZATION_CONFIG_MAPPING[key].__name__} are accepted."
        ) from error


def check_device(device: torch.device | str) -> None:
    """Refuse a device that this machine does not have; "auto" is accepted.

    Raises:
        ModelError: it has not.
    """
    if str(device) == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ModelError(f"the device {str(device)!r} cannot be used here; found: {', '.join(found)}.") from error


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether its weights are quantised, so that it stays where it was loaded."""
    return getattr(model, "hf_quantizer", None) is not None


def move(model: PreTrainedModel, device: torch.device | str) -> None:
    """Moves a model to a device, unless it has a place of its own.

    One that cannot be moved, since it is quantised or accelerate spread it over devices, is made to take its inputs from there instead.
    """
    if has_head_only(model):
        nn.Module.to(head(model), torch.device(device))
        return
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if spread or (is_quantized(model) and model.device != torch.device(device)):
        stay(model)
    if not is_quantized(model) and not stays(model):
        nn.Module.to(model, torch.device(device))


def stays(model: PreTrainedModel) -> bool:
    """Whether the model has a place of its own (see `stay`)."""
    return hasattr(head(model), "_hf_hook")


def stay(model: PreTrainedModel) -> None:
    """The model stays where it is, and its backbone and head give results on the device of their inputs.

    Inputs move to the model and hidden states and logits move back, by accelerate's hooks; a cache stays with the model.
    """
    if stays(model):
        return
    first = model.get_input_embeddings().weight.device
    for module, device in ((backbone(model), first), (head(model), next(head(model).parameters()).device)):
        add_hook_to_module(module, AlignDevicesHook(execution_device=device, io_same_device=True), append=True)
