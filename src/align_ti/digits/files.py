"""Writes the benchmark to disk as images and LLaVA-format JSON, with the shipped models beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from align_ti.digits.questions import KINDS, Question, ask
from align_ti.digits.scans import Split, load_scans
from align_ti.digits.scenes import Scene, draw_scene
from align_ti.errors import RunError
from align_ti.runs import new_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Number of images of each split.

    Every validation and test image has one question of each type that it can answer (eight at most). Every training image has
    `questions` types, drawn at random for each image; by default all eight.
    """

    train: int = 3200
    validation: int = 100
    test: int = 150
    questions: int = 8


def write_benchmark(
    out: Path, seed: int = 0, sizes: Sizes | None = None, advance: Callable[[int], None] = lambda done: None
) -> None:
    """Images, `train.json`, `validation.json`, `test.json`, and the folders `teacher` and `student`.

    Everything follows from the seed. Splits use disjoint scans, whatever the seed.

    Raises:
        RunError: the folder holds something else.
    """
    sizes = Sizes() if sizes is None else sizes
    with new_folder(out) as draft:
        (draft / "images").mkdir()
        splits: tuple[Split, ...] = ("train", "validation", "test")
        for number, split in enumerate(splits):
            random = np.random.default_rng([seed, number])
            asked = sizes.questions if split == "train" else len(KINDS)
            records = []
            for index in range(getattr(sizes, split)):
                scene = draw_scene(load_scans(split), random)
                name = f"images/{split}-{index:05d}.png"
                scene.picture.save(draft / name)
                questions = ask(scene, random, some_kinds(asked, random))
                records += [record(split, index, name, scene, question) for question in questions]
                advance(1)
            (draft / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        for part in ("teacher", "student"):
            copy_model(part, draft / part)


def some_kinds(count: int, random: np.random.Generator) -> tuple[str, ...]:
    """`count` types of questions, drawn without replacement, in their usual order; all types, without drawing, from eight on."""
    if count >= len(KINDS):
        return tuple(KINDS)
    drawn = set(random.choice(len(KINDS), count, replace=False).tolist())
    return tuple(kind for index, kind in enumerate(KINDS) if index in drawn)


def record(split: Split, index: int, picture: str, scene: Scene, question: Question) -> dict[str, object]:
    """One LLaVA record; `kind` and `scans` are extras that other readers pass over."""
    return {
        "id": f"{split}-{index:05d}-{question.kind}",
        "image": picture,
        "kind": question.kind,
        "scans": [int(load_scans(split).index[figure.scan]) for figure in scene.figures],
        "conversations": [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
    }


def copy_model(part: str, out: Path) -> None:
    """A shipped model as an ordinary model folder."""
    with as_file(files("align_ti.digits") / "assets" / part) as folder:
        if not folder.is_dir():
            raise RunError(
                f"the package holds no {part} model ({folder}); install a wheel or checkout that has its assets."
            )
        shutil.copytree(folder, out, dirs_exist_ok=True)
