"""A model of which only the head is there: enough to turn hidden states that are kept into logits, with no backbone in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from align_ti.errors import CacheError, ModelError
from align_ti.models.families import backbone, head

BLOCK = 2**24
"""Bytes of a file that are read at a time."""


def has_head_only(model: PreTrainedModel) -> bool:
    """Whether the model has no backbone in memory, as `load_head` leaves it."""
    weight = next(backbone(model).parameters(), None)
    return weight is not None and weight.is_meta


def save_head(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's config and the weights of its head.

    Raises:
        ModelError: the head has weights of another kind than plain ones (quantised).
    """
    weights = dict(head(model).named_parameters())
    if not all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in weights.values()):
        raise ModelError(
            f"the head of {type(model).__name__} is quantised, which cannot be kept apart from the model; a head of plain weights is "
            "accepted; leave the head out of the quantization (llm_int8_skip_modules, modules_to_not_convert)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    # The draft's name is no other process's, since one of them writes.
    draft = folder / ".draft-head.safetensors"
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, draft)
    draft.replace(folder / "head.safetensors")


def load_head(folder: Path) -> PreTrainedModel:
    """The model that `save_head` wrote, in eval mode: its head on the CPU, everything else without memory.

    Raises:
        CacheError: the folder holds none.
    """
    if not folder.is_dir():
        raise CacheError(
            f"{folder.parent} holds no teacher cache ({folder.name} is missing); a folder that `align-ti cache` wrote is accepted; run "
            "it first, or leave data.teacher_cache out."
        )
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        weights = load_file(folder / "head.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CacheError(
            f"{folder}: the teacher's head cannot be loaded ({str(error).splitlines()[0]}); a folder that `align-ti cache` wrote is "
            "accepted; run it again."
        ) from error
    config.__dict__.pop("quantization_config", None)
    build: Any = AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        # Eager, since no attention runs, and a family whose attention is capped is refused on any other.
        model: PreTrainedModel = build(config, dtype=next(iter(weights.values())).dtype, attn_implementation="eager")
    head(model).load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False).eval()
    return model


def digest_of(path: str, model_config: Any = None) -> str:
    """A digest of a model's config and weights: of the files in a folder, read in full, or of a hub name's commit.

    Raises:
        ModelError: the folder holds no weights, or the hub's copy does not tell its commit.
    """
    folder, digest = Path(path), hashlib.sha256()
    if not folder.is_dir():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False) if model_config is None else model_config
        commit = getattr(config, "_commit_hash", None)
        if not commit:
            raise ModelError(
                f"{path}: neither a folder nor a hub name whose commit is known, so a cache could not tell it from another model; give "
                "a folder."
            )
        return f"commit {commit}"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path}: no weights as safetensors are there; save the model with save_pretrained.")
    for file in [folder / "config.json", *files]:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()[:32]
