"""A pair of tiny LLaVA folders with a real processor, and records of the benchmark, for tests of the whole path."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from align_ti.data.conversation import Conversation
from align_ti.data.sources import read_conversations
from align_ti.digits.models import LanguageSize, build_model, build_processor
from align_ti.digits.questions import ask
from align_ti.digits.scans import load_scans
from align_ti.digits.scenes import draw_scene
from align_ti.models.saving import save_model


def write_pair(folder: Path) -> None:
    """`student` and `teacher` with random weights and one processor."""
    processor = build_processor()
    for name, seed in (("student", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        model = build_model(LanguageSize(hidden=32, layers=2, heads=2, feed_forward=32), processor.tokenizer)
        if name == "teacher":
            # Sharper than initialisation, so that terms are clearly not zero.
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(20)
        save_model(model, folder / name)
        processor.save_pretrained(folder / name)


def write_records(folder: Path, name: str = "train.json", pictures: int = 3, seed: int = 0) -> list[Conversation]:
    """A data file with images beside it."""
    random, records = np.random.default_rng(seed), []
    for index in range(pictures):
        scene = draw_scene(load_scans("train"), random)
        picture = f"{Path(name).stem}-{index}.png"
        scene.picture.save(folder / picture)
        for question in ask(scene, random, ("digit", "colour", "count", "add")):
            turns = [{"from": "human", "value": f"<image>{question.text}"}, {"from": "gpt", "value": question.answer}]
            records.append({"id": len(records), "image": picture, "kind": question.kind, "conversations": turns})
    (folder / name).write_text(json.dumps(records))
    return read_conversations(folder / name)


def recipe(folder: Path, **sections: object) -> dict[str, object]:
    """A recipe of a few steps over those files."""
    return {
        "out": str(folder / "run"),
        "check": False,
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher"), "dtype": "float32"},
        "data": {"train": str(folder / "train.json")},
        "training": {
            "max_steps": 4,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_steps": 2,
        },
        "layer_scores": {"images": 2, "instructions": 2},
        **sections,
    }
