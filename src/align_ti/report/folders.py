"""What lies in run folders, as the page needs it: models, their scores and answers, how they were trained. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from align_ti.errors import RunError
from align_ti.evaluation.results import Scores, read_scores, score_files
from align_ti.runs import RunFolder, read_json

Role = Literal["teacher", "start", "trained"]

ROLES: Mapping[str, Role] = {"teacher": "teacher", "start": "start", "before": "start"}
"""By their names in a run folder; every other model was trained."""

STUDY = "study.json"

Told = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Folder:
    """A run folder, or a demo's, which holds several runs."""

    run: RunFolder
    summary: Told
    name: str
    """Its last part, by which people tell it from others."""

    @property
    def demo(self) -> Told | None:
        """The choices that a demo was made with."""
        told: Told = content(self.run.root / "demo.json")
        return told or None


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the page shows it: one that was measured, or trained, or both."""

    key: str
    """Its name on the page, which no other model has."""
    label: str
    role: Role
    name: str
    """Its name in its folder."""
    folder: Folder
    scores: Mapping[str, Scores] = field(default_factory=dict)
    """By benchmark, with the sums that differences are made of."""
    answers: Sequence[Told] = ()

    @property
    def run(self) -> RunFolder:
        """Where it was trained: its own folder below a demo, the run folder itself otherwise."""
        below = RunFolder(self.folder.run.root / self.name)
        return below if below.metrics.exists() else self.folder.run

    @property
    def log(self) -> list[dict[str, Any]]:
        """Its training log; none of a model that was not trained here."""
        return self.run.read_metrics() if self.role == "trained" else []

    @property
    def recipe(self) -> Told:
        """The recipe that it was trained by."""
        if self.role != "trained" or not self.run.recipe.exists():
            return {}
        told: Told = yaml.safe_load(self.run.recipe.read_text(encoding="utf-8"))
        return told

    @property
    def terms(self) -> dict[str, float]:
        """The terms that it was trained by, with their weights."""
        return weights_of(self.recipe.get("objective", {}))

    @property
    def scheduled(self) -> frozenset[str]:
        """The terms with options that change along training."""
        return scheduled_in(self.recipe.get("objective", {}))

    @property
    def trained_on(self) -> Told:
        """Steps, records, and parameters by part."""
        told: Told = content(self.run.training) if self.role == "trained" else {}
        return told

    @property
    def seconds_per_step(self) -> float | None:
        """The time of a step, where one is known."""
        return of_model(self.folder.summary, "seconds_per_step", self.name)

    @property
    def peak_memory_mib(self) -> float | None:
        """The most memory that training held, where it is known."""
        return of_model(self.folder.summary, "peak_memory_mib", self.name)

    @property
    def spent(self) -> Told:
        """What its training left in `cost.json`: tokens and FLOPs among it, where they were counted."""
        told: Told = content(self.run.cost) if self.role == "trained" else {}
        return told

    @property
    def flops(self) -> float | None:
        """The FLOPs of all steps, where they were counted."""
        return self.spent.get("flops")

    @property
    def seconds(self) -> float | None:
        """The time of all steps: that of one, times their number."""
        steps = self.trained_on.get("steps", self.folder.summary.get("steps"))
        return None if self.seconds_per_step is None or steps is None else self.seconds_per_step * steps


def weights_of(objective: Mapping[str, Any]) -> dict[str, float]:
    """The weight of each term that has one: a term is a section with a weight."""
    sections = {name: options for name, options in objective.items() if isinstance(options, dict)}
    return {name: options["weight"] for name, options in sections.items() if options.get("weight")}


def scheduled_in(objective: Mapping[str, Any]) -> frozenset[str]:
    """The terms with options that change along training."""
    sections = {name: options for name, options in objective.items() if isinstance(options, dict)}
    return frozenset(name for name, options in sections.items() if options.get("schedule"))


def of_model(summary: Told, what: str, name: str) -> float | None:
    """A number that the summary has for a model."""
    value = summary.get(what, {}).get(name)
    return None if value is None else float(value)


def content(path: Path) -> Any:
    """The content of a file of a run; nothing if it is not there."""
    return read_json(path) if path.exists() else {}


def shown_picture(folder: Folder, name: object) -> Path | None:
    """An image that was kept for the report, by a name that a file tells; nothing outside its folder can be shown."""
    return None if name is None else folder.run.shown / str(name).replace("\\", "/").rpartition("/")[2]


def is_study(path: Path) -> bool:
    """Whether a folder is a study's."""
    return (path / STUDY).exists()


def read_runs(paths: Sequence[Path]) -> list[Model]:
    """The models of several run folders, teachers first, then starts, then what was trained.

    A teacher or a start that several folders have measured with the same answers is one model. Of several folders, models are called
    by their folder's name, and in a demo's also by their own.

    Raises:
        RunError: a folder holds no finished run.
        DataError: a file of scores is damaged.
    """
    roots = dict(zip(paths, distinct_names(paths), strict=True))
    found: list[Model] = []
    for path, name in roots.items():
        for model in models_in(Folder(RunFolder(path), summary_of(RunFolder(path)), name), several=len(roots) > 1):
            if not any(same(model, other) for other in found):
                found.append(model)
    order: dict[str, int] = {"teacher": 0, "start": 1, "trained": 2}
    ordered = sorted(found, key=lambda model: order[model.role])
    return [replace(model, key=f"m{number}") for number, model in enumerate(named_apart(ordered))]


def summary_of(run: RunFolder) -> Told:
    """The summary of a run; of one that has trained a student and measured nothing, what is known without.

    Raises:
        RunError: there is neither.
    """
    if run.summary.exists() or not run.student.exists():
        return dict(read_json(run.summary))
    cost = content(run.cost)
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8")) if run.recipe.exists() else {}
    return {
        "title": "A training run without measurements",
        "seed": recipe.get("seed", 0),
        "labels": {"student": "student"},
        "questions": 0,
        "accuracy": {},
        "seconds_per_step": {"student": cost.get("seconds_per_step")},
        "peak_memory_mib": {"student": cost.get("peak_memory_mib")},
        "memory": cost.get("memory", ""),
    }


def models_in(folder: Folder, *, several: bool) -> Iterator[Model]:
    """The models of one folder, in its order.

    Raises:
        RunError: the folder's summary names no model.
    """
    summary = folder.summary
    measured = {
        name for part in ("accuracy", "benchmarks", "fidelity", "seconds_per_step") for name in summary.get(part, {})
    }
    names = [name for name in summary["labels"] if name in measured]
    if not names:
        raise RunError(f"{folder.run.summary} names no model; finish the run first, or name the right run folder.")
    trained = [name for name in names if name not in ROLES]
    for name in names:
        label = summary["labels"][name]
        if several and name not in ROLES:
            label = f"{folder.name}: {label}" if len(trained) > 1 else folder.name
        file = folder.run.evaluation(name)
        scores: dict[str, Scores] = read_scores(file) if file.exists() else {}
        if folder.run.tasks(name).is_dir() and score_files(folder.run.tasks(name)):
            scores |= read_scores(folder.run.tasks(name))
        yield Model(
            key="",
            label=label,
            role=ROLES.get(name, "trained"),
            name=name,
            folder=folder,
            scores=scores,
            answers=read_json(file)["answers"] if file.exists() else (),
        )


def same(one: Model, other: Model) -> bool:
    """Whether two teachers, or two starts, said the same to the same questions."""
    if one.role == "trained" or one.role != other.role or one.scores.keys() != other.scores.keys():
        return False
    said = [[(answer["question"], answer["answer"]) for answer in model.answers] for model in (one, other)]
    asked = [{name: scores.questions for name, scores in model.scores.items()} for model in (one, other)]
    return said[0] == said[1] and asked[0] == asked[1] and bool(one.scores)


def named_apart(models: Sequence[Model]) -> list[Model]:
    """The models, those of equal names with their folder's name."""
    labels = [model.label for model in models]
    return [
        model if labels.count(model.label) == 1 else replace(model, label=f"{model.label} ({model.folder.name})")
        for model in models
    ]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell all of them apart."""
    whole = [path.resolve() for path in paths]
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [path.name for path in whole]


def folders_of(models: Sequence[Model]) -> list[Folder]:
    """The folders of the models, each once."""
    return list({model.folder.run.root: model.folder for model in models}.values())


def names_in_colour(models: Sequence[Model]) -> dict[str, str]:
    """By key the name that a model's colour goes by: its own in its folder where no other model is called so, else its key."""
    own = [model.name for model in models]
    return {model.key: model.name if own.count(model.name) == 1 else model.key for model in models}
