"""The study's folder: whose it is, the record of each run, and who is at which run. Imports no torch.

study.yaml                  the study, with the recipes of all variants
costs.json                  what a step of each variant costs, and how many steps it makes
teacher.json                the teacher's scores
records/VARIANT/SEED.json   one finished or failed run: cost, curve, scores
study.json, study.html      what it comes to
work/                       runs under way; nothing in it is needed once all are finished
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align_ti.config import Recipe
from align_ti.errors import RunError
from align_ti.runs import differing, digest, locked, read_json, write_text
from align_ti.studies.design import Study

WAIT = 2.0
"""Seconds between two looks at what another process is doing."""

SAMPLED = 1 << 12
"""Bytes of each tensor that are read to tell a model from another."""


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Paths inside a study's folder."""

    root: Path

    @property
    def study(self) -> Path:
        return self.root / "study.yaml"

    @property
    def costs(self) -> Path:
        return self.root / "costs.json"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher.json"

    @property
    def summary(self) -> Path:
        return self.root / "study.json"

    def record(self, variant: str, seed: int) -> Path:
        """The record of a run."""
        return self.root / "records" / variant / f"{seed}.json"

    def work(self, variant: str, seed: int) -> Path:
        """The run's folder while it is under way."""
        return self.root / "work" / variant / str(seed)

    def student(self, variant: str, seed: int) -> Path:
        """Where its student is kept, if students are."""
        return self.root / "students" / variant / str(seed)

    @contextmanager
    def held(self, what: str) -> Iterator[str | None]:
        """Locks a part of the study for the block and gives None, or gives the process that holds it."""
        with locked(self.root / "work" / f".{what}.lock") as owner:
            yield owner

    @contextmanager
    def alone(self, what: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Locks a part of the study for the block, once no other process holds it; `waiting` is called after each look."""
        while True:
            with self.held(what) as owner:
                if owner is None:
                    yield
                    return
            waiting()
            time.sleep(WAIT)

    def succeeded(self, variant: str) -> bool:
        """Whether any run of a variant has a record without an error."""
        return any(not read_json(path)["error"] for path in self.record(variant, 0).parent.glob("*.json"))

    def claim(self, study: Study) -> None:
        """Make the folder this study's own, or go on in it.

        Variants and seeds may be added; a variant that is there stays as it is, and so does what all runs have in common.

        Raises:
            RunError: the folder holds a study of other settings, or something else.
        """
        write_text(self.study, yaml.safe_dump(self.checked(study), sort_keys=False, allow_unicode=True))

    def checked(self, study: Study) -> dict[str, Any]:
        """What the folder is to keep of the study, if it may be this study's own; nothing is written.

        Raises:
            RunError: the folder holds a study of other settings, or something else.
        """
        content = told(study)
        if self.study.exists():
            before = yaml.safe_load(self.study.read_text(encoding="utf-8"))
            now = content["recipes"]
            kept = {name: with_newer_defaults(recipe) for name, recipe in before["recipes"].items()}
            changed = [
                f"variants.{name}: {option}"
                for name in kept
                if name in now
                for option in differing(kept[name], now[name])
            ]
            gone = [name for name in kept if name not in now and any((self.root / "records" / name).glob("*.json"))]
            changed += [f"variant {name} is gone" for name in gone]
            changed += [key for key in ("equal", "budget") if before.get(key) != content.get(key)]
            data = before.get("data", {})
            changed += [f"the content of {path}" for path, was in data.items() if content["data"].get(path, was) != was]
            if changed:
                raise RunError(
                    f"{self.root} holds a study with other settings ({'; '.join(changed[:8])}); variants and seeds may be added, "
                    "others stay; choose another folder (out), or remove this one."
                )
        elif self.root.exists() and (not self.root.is_dir() or any(self.foreign())):
            raise RunError(f"{self.root} is not empty and holds no study; choose a new or empty folder (out).")
        return content

    def foreign(self) -> list[Path]:
        """What lies in the folder that a study that has not begun would not have written."""
        return [path for path in self.root.iterdir() if path not in (self.costs, self.root / "work")]

    def made_elsewhere(self, study: Study, variant: str, seed: int, steps: int) -> dict[str, Any] | None:
        """This run's record as another study's folder of `records_from` has it, or None.

        It counts if the other's run had the same recipe, seed and steps, on data and models of the same content, and did not fail.
        The record then names that folder as `taken_from`.

        Raises:
            RunError: a folder of `records_from` holds no study.
        """
        if not study.file.records_from:
            return None
        wanted, mine = without_steps(plain(study.templates[variant])), digests(study)
        recipe = study.recipes[variant][seed]
        for root in study.file.records_from:
            other = StudyFolder(Path(root))
            if not other.study.exists():
                raise RunError(
                    f"records_from names {root}, which holds no study ({other.study.name}); name a study's folder."
                )
            theirs = yaml.safe_load(other.study.read_text(encoding="utf-8"))
            kept = theirs["data"]
            if any(kept.get(path) != mine.get(path) for path in data_paths(recipe)):
                continue
            if any(kept.get(path, mine.get(path)) != mine.get(path) for path in code_and_model_paths(recipe)):
                continue
            for name, content in theirs["recipes"].items():
                path = other.record(name, seed)
                if without_steps(with_newer_defaults(content)) == wanted and path.exists():
                    record = read_json(path)
                    if not record["error"] and record["steps"] == steps:
                        return {**record, "variant": variant, "taken_from": record.get("taken_from", root)}
        return None

    def records(self, study: Study) -> dict[str, dict[int, dict[str, Any]]]:
        """The records that are there, by variant and seed.

        Raises:
            RunError: one is damaged, or is of another variant than its folder says.
        """
        found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in study.variants}
        for name, seed in study.runs:
            path = self.record(name, seed)
            if path.exists():
                content = read_json(path)
                if (content.get("variant"), content.get("seed")) != (name, seed):
                    raise RunError(
                        f"{path} is the record of {content.get('variant')!r}, seed {content.get('seed')!r}; a record stands in its "
                        "variant's folder under its seed; put it there, or remove it."
                    )
                found[name][seed] = content
        return found


def told(study: Study) -> dict[str, Any]:
    """What the folder keeps of a study: what all runs have in common, and the recipes without seeds and folders."""
    content: dict[str, Any] = study.file.model_dump(
        mode="json", exclude={"variants", "changes", "base", "records_from"}
    )
    return content | {
        "budget": study.budget if study.file.equal in ("time", "flops") else None,
        "data": digests(study),
        "recipes": {name: plain(study.templates[name]) for name in study.variants},
    }


def with_newer_defaults(kept: dict[str, Any]) -> dict[str, Any]:
    """A kept recipe with the defaults of options that are newer than it; as it is if it is no recipe any more."""
    try:
        return plain(Recipe.model_validate({**kept, "out": "study"}))
    except ValueError:
        return kept


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe's content without seed and folder."""
    return {key: value for key, value in recipe.model_dump(mode="json").items() if key not in ("out", "seed")}


def without_steps(recipe: dict[str, Any]) -> dict[str, Any]:
    """The content without its number of steps, which equal time or operations may replace."""
    return {**recipe, "training": {key: value for key, value in recipe["training"].items() if key != "max_steps"}}


def data_paths(recipe: Recipe) -> list[str]:
    """The data files that a run reads."""
    named = recipe.data
    return [*(source.path for source in named.sources), *(named.answers or ()), *([named.eval] if named.eval else [])]


def code_and_model_paths(recipe: Recipe) -> list[str]:
    """The models that a run starts from and compares with, and the extensions that it runs."""
    models = [recipe.student.path, *([] if recipe.teacher is None else [recipe.teacher.path])]
    return [*models, *recipe.extensions]


def digests(study: Study) -> dict[str, str]:
    """A digest of each data file or folder, model and extension that runs read, by which a study notices that it would go on with
    others. What is read from the hub has none."""
    every = [recipe for recipes in study.recipes.values() for recipe in recipes.values()]
    data = dict.fromkeys(path for recipe in every for path in data_paths(recipe))
    others = dict.fromkeys(path for recipe in every for path in code_and_model_paths(recipe))
    found = {path: content_digest(Path(path)) for path in data if Path(path).exists()}
    return found | {
        path: model_digest(Path(path)) if Path(path).is_dir() else content_digest(Path(path))
        for path in others
        if Path(path).exists()
    }


def content_digest(path: Path) -> str:
    """A digest of a file, or of the names and sizes of a folder's files, which may be too large to be read each time. Names that
    begin with a dot or an underscore are no data."""
    if path.is_file():
        return digest(path)[:32]
    files = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    told = {str(one): (path / one).stat().st_size for one in files if not any(part[0] in "._" for part in one.parts)}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def model_digest(path: Path) -> str:
    """A digest of a model's configs, and of the first bytes of each of its weights: training changes many of them, and whole files may
    take minutes to read."""
    found = hashlib.sha256()
    for file in sorted([*path.glob("*.json"), *path.glob("*.jinja"), *path.glob("*.safetensors")]):
        found.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as content:
            if file.suffix != ".safetensors":
                found.update(content.read())
                continue
            # The format: 8 bytes with the header's length, the header, the tensors at offsets that it tells.
            length = int.from_bytes(content.read(8), "little")
            header = content.read(length)
            found.update(header)
            try:
                tensors = [one["data_offsets"][0] for key, one in json.loads(header).items() if key != "__metadata__"]
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # no weights, such as the pointer of a file that was not fetched; the run says so
            for offset in tensors:
                content.seek(8 + length + offset)
                found.update(content.read(SAMPLED))
    return found.hexdigest()[:32]
