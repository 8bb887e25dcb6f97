"""A saved model has the names of weights that every reader knows."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, CLIPVisionModel, SiglipVisionModel

from align_ti.models.families import tower
from align_ti.models.saving import portable, save_model
from tests.family_models import FAMILIES


def names(folder: Path) -> dict[str, str]:
    """The weights in the files of a folder, and the file of each."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), path.name)
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shard", [None, 30_000])
def test_what_is_saved_is_loaded_and_towers_have_the_names_of_published_checkpoints(name, shard, tmp_path, monkeypatch):
    # Bug: transformers 5.23 writes a SigLIP or CLIP tower without `vision_model`; 5.5 then leaves it at random numbers.
    model = FAMILIES[name].model(1)
    if shard is not None:
        monkeypatch.setattr(model, "save_pretrained", functools.partial(model.save_pretrained, max_shard_size=shard))
    save_model(model, tmp_path)
    saved = names(tmp_path)
    towers = {one for one in saved if one.startswith(("vision_tower.", "model.vision_tower."))}
    if isinstance(tower(model), (SiglipVisionModel, CLIPVisionModel)):
        assert towers and all("vision_tower.vision_model." in one for one in towers)
        assert not any("vision_model.vision_model" in one for one in towers)
    else:
        assert not any("vision_tower.vision_model." in one for one in towers)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shard is not None)
    if shard is not None:
        assert json.loads(index.read_text())["weight_map"] == saved
    again, told = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    for key, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_only_towers_are_renamed_and_only_once():
    assert portable("vision_tower.encoder.layers.0.x") == "vision_tower.vision_model.encoder.layers.0.x"
    for name in ("vision_tower.vision_model.a", "language_model.vision_tower.a", "visual.blocks.0.a", "__metadata__"):
        assert portable(name) == name
