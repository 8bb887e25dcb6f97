"""Writes the benchmark to disk as images and LLaVA-format JSON, with the shipped models beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from align_ti.digits.questions import KINDS, Question, ask
from align_ti.digits.scans import Split, load_scans
from align_ti.digits.scenes import Scene, draw_scene
from align_ti.errors import ConfigError, RunError
from align_ti.runs import new_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Number of images of each split.

    Every validation and test image has one question of each type that it can answer (eight at most). Every training image has
    `questions` types, drawn at random for each image; by default all eight. With `mix` it has `questions` questions whose types are
    drawn independently of each other, with these relative frequencies (1 for a type that it does not name); a question that was drawn
    twice for an image is asked once.
    """

    train: int = 2500
    validation: int = 100
    test: int = 150
    questions: int = 8
    mix: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.mix if kind not in KINDS]
        if unknown or any(weight < 0 for weight in self.mix.values()) or self.questions < 1:
            raise ConfigError(
                f"sizes of the digits benchmark: questions is {self.questions}, mix is {dict(self.mix)}; accepted: 1 question or more, "
                f"and frequencies of 0 or more for {', '.join(KINDS)}; change them."
            )


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
            asked = partial(training_kinds, sizes, random) if split == "train" else partial(tuple, KINDS)
            records = []
            for index in range(getattr(sizes, split)):
                scene = draw_scene(load_scans(split), random)
                name = f"images/{split}-{index:05d}.png"
                scene.picture.save(draft / name)
                questions = dict.fromkeys(ask(scene, random, asked()))
                records += records_of(split, index, name, scene, list(questions))
                advance(1)
            (draft / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        for part in ("teacher", "student"):
            copy_model(part, draft / part)


def training_kinds(sizes: Sizes, random: np.random.Generator) -> tuple[str, ...]:
    """The types of questions about one training image, in their usual order; all types, without drawing, from eight on."""
    kinds = list(KINDS)
    if sizes.mix:
        weights = np.array([sizes.mix.get(kind, 1.0) for kind in kinds])
        drawn = random.choice(len(kinds), sizes.questions, p=weights / weights.sum())
    elif sizes.questions < len(kinds):
        drawn = random.choice(len(kinds), sizes.questions, replace=False)
    else:
        return tuple(kinds)
    return tuple(kinds[index] for index in sorted(drawn.tolist()))


def records_of(
    split: Split, index: int, picture: str, scene: Scene, questions: Sequence[Question]
) -> list[dict[str, object]]:
    """LLaVA records about one image; `kind` and `scans` are extras that other readers pass over."""
    made: list[dict[str, object]] = []
    scans = [int(load_scans(split).index[figure.scan]) for figure in scene.figures]
    for number, question in enumerate(questions):
        before = sum(other.kind == question.kind for other in questions[:number])
        turns = [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ]
        made.append(
            {
                "id": f"{split}-{index:05d}-{question.kind}" + (f"-{before + 1}" if before else ""),
                "image": picture,
                "kind": question.kind,
                "scans": scans,
                "conversations": turns,
            }
        )
    return made


def copy_model(part: str, out: Path) -> None:
    """A shipped model as an ordinary model folder."""
    with as_file(files("align_ti.digits") / "assets" / part) as folder:
        if not folder.is_dir():
            raise RunError(
                f"the package holds no {part} model ({folder}); install a wheel or checkout that has its assets."
            )
        shutil.copytree(folder, out, dirs_exist_ok=True)
