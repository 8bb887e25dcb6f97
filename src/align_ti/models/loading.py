"""Loads models and processors from folders or the hub: safetensors only, no remote code."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.integrations import deepspeed as hf_deepspeed

from align_ti.errors import ModelError
from align_ti.models.completeness import check_counts, check_pictures, check_tokenizer, has_file, unstated_ends
from align_ti.models.families import backbone
from align_ti.models.placement import check_device, quantization_config

logger = logging.getLogger(__name__)


def load_model(
    path: str,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    quantization: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The vision-language model in a folder or of a hub name, in eval mode.

    Args:
        path: the folder or hub name.
        dtype: precision of the weights; "auto": as they were saved.
        device: the device to load it on; "auto": spread over all accelerators.
        quantization: options of one of transformers' quantization methods, applied while loading.

    Raises:
        ModelError: it cannot be loaded.
    """
    check_device(device)
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization)
    if quantization is not None or str(device) == "auto":
        # Quantised weights cannot be moved later.
        options["device_map"] = "auto" if str(device) == "auto" else {"": str(device)}
    load: Any = AutoModelForImageTextToText.from_pretrained
    try:
        with whole_weights():
            model, info = load(
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # Not taken: check_loaded refuses them by name.
                ignore_mismatched_sizes=True,
                **options,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise not_loaded(path, error) from error
    except (RuntimeError, TypeError, AssertionError) as error:
        if quantization is None:
            raise
        raise not_loaded(f"{path}, quantised by {dict(quantization)}", error) from error
    check_loaded(path, info)
    loaded: PreTrainedModel = model
    if told := unstated_ends(path, loaded)[1]:
        logger.warning("%s: %s; save one beside the model (model.generation_config.save_pretrained).", path, told)
    if not options:
        nn.Module.to(loaded, torch.device(device))
    loaded.eval()
    return loaded


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside the block `from_pretrained` gives every process all weights, whatever engine the process was launched for.

    Under FSDP all processes but the first would get a model without weights, and under ZeRO-3 each a part of them: the teacher
    too, which no engine puts together again.
    """
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref  # there is no public way to ask for it
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            yield
    finally:
        if kept is not None and (config := kept()) is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)


def not_loaded(what: str, error: Exception) -> ModelError:
    """The error for a model that transformers cannot load."""
    return ModelError(
        f"{what}: the model cannot be loaded ({no_folder(what)}{first_line(error)}); a folder or hub name of a vision-language "
        "model of transformers, saved as safetensors, is accepted."
    )


def no_folder(path: str) -> str:
    """Says that a name was looked for on the hub because no folder has it."""
    return "" if Path(path.partition(", quantised")[0]).exists() else "no folder of that name is here; "


def no_vocabulary(path: str) -> str:
    """Says that a folder has no tokenizer.json, which transformers' own message about it does not."""
    return "no tokenizer.json is there; " if Path(path).is_dir() and not has_file(path, "tokenizer.json") else ""


DIGESTED = 64
"""Entries of a weight, about so many, that its digest is made of."""


def weights_digest(model: nn.Module) -> str:
    """A digest of some entries of every weight, which is quick for a model of any size. Integers (of quantised weights) and empty
    (meta) weights have no part in it."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if type(weight) is Tensor and weight.is_floating_point() and not weight.is_meta:
            # An odd step, so that the entries are of many columns.
            some = weight.flatten()[:: weight.numel() // DIGESTED | 1].contiguous().cpu()
            found.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_loaded(path: str, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that leaves weights as they were initialised: a vision tower of random numbers trains happily.

    Raises:
        ModelError: weights are missing or have another shape; the first ones are named.
    """
    wrong = [f"{name} is missing" for name in sorted(info.get("missing_keys") or [])]
    wrong += [
        f"{name} has shape {tuple(saved)} instead of {tuple(wanted)}"
        for name, saved, wanted in sorted(info.get("mismatched_keys") or [])
    ]
    if wrong:
        raise ModelError(
            f"{path}: {len(wrong)} weight(s) cannot be loaded: {'; '.join(wrong[:3])}; a complete checkpoint of the model that its "
            "config.json names is accepted; save it again, or fix the config."
        )


def load_processor(path: str) -> ProcessorMixin:
    """The processor beside a model.

    Raises:
        ModelError: it cannot be loaded, has no chat template, or transformers filled a missing part with a default.
    """
    try:
        processor: ProcessorMixin = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, ImportError) or "torchvision" in str(error):
            # The video part of Qwen-VL's, InternVL's, SmolVLM's and LLaVA-OneVision's processors, even where no video is read.
            raise ModelError(
                f"{path}: the processor needs a package that is not installed ({first_line(error)}); install it: torchvision in the "
                "build of your torch, for processors that can read videos."
            ) from error
        raise ModelError(
            f"{path}: the processor cannot be loaded ({no_folder(path)}{no_vocabulary(path)}{first_line(error)}); save it beside the "
            "model with processor.save_pretrained."
        ) from error
    if getattr(processor, "tokenizer", None) is None or not getattr(processor, "chat_template", None):
        raise ModelError(
            f"{path}: the processor has no chat template, so roles cannot be told apart; save one with it (chat_template.jinja)."
        )
    check_tokenizer(path, processor.tokenizer)
    check_counts(path, processor)
    if getattr(processor, "image_processor", None) is not None:
        check_pictures(path, processor.image_processor)
    return processor


def first_line(error: Exception) -> str:
    """The first line of a message, which is what one-line errors have room for."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


PARTS = {
    "vision_tower": ("vision_tower", "visual", "vision_model"),
    "projector": ("multi_modal_projector", "connector"),
    "language_model": ("language_model", "text_model"),
}
"""The names that transformers' families give their parts."""


def freeze(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Switches off the gradient of the named parts, and of parameters whose names a pattern matches.

    A pattern is matched against the whole name of a parameter, with or without `model.` in front.

    Raises:
        ModelError: the model has no such part or parameter, or nothing is left to train.
    """
    inner = backbone(model)
    for name in names:
        if name not in PARTS:
            freeze_matching(model, name)
            continue
        found = [getattr(inner, part) for part in PARTS[name] if hasattr(inner, part)]
        if not found:
            raise ModelError(
                f"student.freeze names {name!r}, but {type(model).__name__} has no such part; leave it out; parts are: "
                f"{', '.join(part for part, _ in inner.named_children())}."
            )
        for module in found:
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"student.freeze ({', '.join(names)}) leaves nothing to train; freeze fewer parts.")


def freeze_matching(model: PreTrainedModel, pattern: str) -> None:
    """Switches off the gradient of every parameter whose name the pattern matches.

    Raises:
        ModelError: there is none; the nearest names are named.
    """
    # Tied weights have several names; either is meant.
    parameters = {name.removeprefix("model."): value for name, value in model.named_parameters(remove_duplicate=False)}
    matching = [
        value
        for name, value in parameters.items()
        if fnmatchcase(name, pattern) or fnmatchcase(f"model.{name}", pattern)
    ]
    if not matching:
        modules = dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in parameters)
        near = difflib.get_close_matches(pattern.removeprefix("model."), [*modules, *parameters], n=3, cutoff=0.3)
        raise ModelError(
            f"student.freeze names {pattern!r}, which matches no parameter of {type(model).__name__}; near it: {', '.join(near)}; a "
            "pattern has to match the whole name, so a module needs .* behind it."
        )
    for value in matching:
        value.requires_grad_(False)


def trained_by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Trained and all parameters of each part of a model, adapters included; parts with none trained are there with 0."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        for wrapper in ("base_model.model.", "model."):
            name = name.removeprefix(wrapper)
        part = name.partition(".")[0]
        trained, total = counts.get(part, (0, 0))
        counts[part] = (trained + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    return counts


def check_precision(model: nn.Module, *, fp16: bool) -> None:
    """Refuse trained weights that no optimizer step survives in the precision they have.

    Args:
        model: the student, frozen as it will be.
        fp16: whether it is trained under float16 autocast with a gradient scaler.

    Raises:
        ModelError: float16 weights are trained (the scaler does not unscale them, and AdamW's epsilon is 0 in float16), or bfloat16
            ones under float16 autocast.
    """
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if torch.float16 in kinds:
        raise ModelError(
            "weights in float16 would be trained, which neither a gradient scaler nor AdamW can do; float16 is accepted for frozen "
            "weights; set student.dtype to float32 (with training.fp16 for float16 autocast) or to bfloat16."
        )
    if fp16 and torch.bfloat16 in kinds:
        raise ModelError(
            "weights in bfloat16 would be trained under float16 autocast, whose gradient scaler is for float32 weights; set "
            "student.dtype to float32, or training.bf16 in place of training.fp16."
        )


def check_teacher_precision(teacher: PreTrainedModel, device: torch.device, *, bf16: bool) -> None:
    """Refuse a float16 teacher under bfloat16 autocast on a CPU, whose layer norm cannot read its weights.

    Raises:
        ModelError: it is so.
    """
    if bf16 and device.type == "cpu" and teacher.dtype == torch.float16:
        raise ModelError(
            "the teacher's weights are float16 and training.bf16 is true, which a CPU cannot compute; set teacher.dtype to bfloat16 or "
            "float32."
        )
