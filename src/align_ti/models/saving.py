"""Saves a model under the names of weights that every reader knows: older transformers, vLLM."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

from transformers import CLIPVisionModel, PreTrainedModel, SiglipVisionModel

TOWER = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")
"""The start of a tower's weight as recent versions of transformers write it."""

LENGTH = struct.Struct("<Q")
"""How a safetensors file begins: the bytes of its header."""


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes the model to a folder; a SigLIP or CLIP tower's weights as `vision_tower.vision_model.*`.

    transformers writes them without `vision_model` since a version between 5.5 and 5.23. Older ones leave such a tower at random
    numbers with a warning, and vLLM (0.33) has no such weights. Every version reads the names with it, which published checkpoints
    have.
    """
    model.save_pretrained(folder)
    tower = next((module for name, module in model.named_modules() if name.endswith("vision_tower")), None)
    if isinstance(tower, (SiglipVisionModel, CLIPVisionModel)):
        for path in sorted(folder.glob("*.safetensors")):
            rename_weights(path)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text(encoding="utf-8"))
            content["weight_map"] = {portable(name): file for name, file in content["weight_map"].items()}
            index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def portable(name: str) -> str:
    """A weight's name as every reader knows it."""
    return TOWER.sub(r"\1vision_model.", name)


def rename_weights(path: Path) -> None:
    """Renames the weights of a safetensors file; only its header is read, the numbers are copied as they are."""
    draft = path.with_name(f".{path.name}.draft")
    with path.open("rb") as old, draft.open("wb") as new:
        (length,) = LENGTH.unpack(old.read(LENGTH.size))
        header = {portable(name): told for name, told in json.loads(old.read(length)).items()}
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        # Numbers begin at a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        new.write(LENGTH.pack(len(text)) + text)
        shutil.copyfileobj(old, new, 1 << 24)
    draft.replace(path)
