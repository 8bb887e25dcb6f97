"""What a study is: a base recipe, variants laid over it, seeds, and how compute is made equal. Read strictly; runs nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from align_ti.config import Recipe, find_recipe, lay_over, put, read_mapping, read_recipe
from align_ti.errors import ConfigError
from align_ti.evaluation.results import EXACT_MATCH
from align_ti.options import Options, explain

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What a variant may be called: it is a folder's name too."""

SEED = "{seed}"
"""Stands for a run's seed in the recipe's words, such as `data.train: digits-{seed}/train.json`."""


class StudyFile(Options):
    """A study as its file tells it."""

    out: str = Field(min_length=1)
    """The study's folder."""
    base: str = Field(min_length=1)
    """The recipe that variants are laid over: a file, or the name of a shipped one."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Options by their full names (training.max_steps: 2400), laid over the base for all variants."""
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    """By name: options by their full names, laid over base and changes; {} is the base itself. Tables and plots keep the order."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Names of variants for people; by default the variants' own."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """The seeds of each variant's runs. In the recipe's words {seed} stands for it."""
    equal: Literal["steps", "time", "flops", "nothing"] = "steps"
    """What is the same for all variants. steps: training.max_steps. time, flops: a variant makes as many steps as take the time, or
    the floating-point operations, of the steps of `budget`. nothing: each variant's own steps."""
    budget: str | None = None
    """The variant whose training.max_steps sets the budget of time or flops; by default the first."""
    cost_after: int = Field(default=0, ge=0)
    """Steps that each variant is trained before the cost of its steps is measured: what a step costs may change in training, and TPA's
    falls as the student learns."""
    score: str | None = None
    """The benchmark whose headline decides; by default the first of evaluation.tasks, or exact match on data.eval."""
    gap_from: str | None = None
    """The variant whose distance to the teacher is the gap to close; by default `sft` where there is one, else the first."""
    compare: tuple[tuple[str, str], ...] = ()
    """Pairs [A, B] of variants, whose difference in score A - B is reported; by default every other variant against `gap_from`."""
    records_from: tuple[str, ...] = ()
    """Folders of other studies: a run that one of them has made, with the same recipe, seed, data and steps, is not made again."""
    keep_students: bool = False
    """Keep the students; by default they are removed once they are measured."""

    @model_validator(mode="before")
    @classmethod
    def _pairs_are_tuples(cls, options: Any) -> Any:
        if not isinstance(options, Mapping) or not isinstance(options.get("compare"), list):
            return options
        return {**options, "compare": tuple(tuple(one) if isinstance(one, list) else one for one in options["compare"])}

    @model_validator(mode="after")
    def _names(self) -> StudyFile:
        wrong = [name for name in self.variants if not NAME.fullmatch(name)]
        if wrong:
            raise ValueError(
                f"variants names {wrong[0]!r}; letters, digits, '_', '-' and '.' are accepted, since it names a folder; rename it"
            )
        known = ", ".join(self.variants)
        named = [("budget", self.budget), ("gap_from", self.gap_from)]
        named += [("compare", name) for pair in self.compare for name in pair]
        named += [("labels", name) for name in self.labels]
        for key, name in named:
            if name is not None and name not in self.variants:
                raise ValueError(f"{key} names {name!r}, which is no variant; accepted: {known}")
        for one, other in self.compare:
            if one == other:
                raise ValueError(f"compare has {one!r} with itself; two variants are accepted; take the pair out")
        if len(set(self.compare)) < len(self.compare):
            raise ValueError("compare has a pair twice; each once is accepted; take the other out")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise ValueError(f"seeds is {list(self.seeds)}; different whole numbers from 0 are accepted; change them")
        if self.budget is not None and self.equal not in ("time", "flops"):
            raise ValueError(
                f"budget is given, but equal is {self.equal!r}; set equal: time or flops, or leave budget out"
            )
        return self


@dataclass(frozen=True, slots=True)
class Study:
    """A study whose recipes are all checked."""

    file: StudyFile
    recipes: Mapping[str, Mapping[int, Recipe]]
    """By variant and seed; `out` and, at equal time or flops, the steps are set when it runs."""
    templates: Mapping[str, Recipe]
    """By variant, with `{seed}` where a seed's number will stand."""

    @property
    def out(self) -> Path:
        return Path(self.file.out)

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(self.recipes)

    @property
    def gap_from(self) -> str:
        """The variant that the gap to the teacher is counted from."""
        return self.file.gap_from or ("sft" if "sft" in self.recipes else self.variants[0])

    @property
    def budget(self) -> str:
        """The variant whose steps set the budget."""
        return self.file.budget or self.variants[0]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of variants that are compared."""
        return self.file.compare or tuple((name, self.gap_from) for name in self.variants if name != self.gap_from)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """All runs, seed by seed, so that a study that is stopped has whole seeds."""
        return [(name, seed) for seed in self.file.seeds for name in self.recipes]

    def label(self, name: str) -> str:
        """A variant's name for people."""
        return self.file.labels.get(name, name)

    def first(self, name: str) -> Recipe:
        """The recipe of a variant's first seed."""
        return self.recipes[name][self.file.seeds[0]]


def read_study(path: Path, changes: Iterable[str] = (), *, allow_extensions: bool = False) -> Study:
    """The study in a YAML file.

    Args:
        path: the file.
        changes: `section.key=value` for the base recipe of all variants, over the file's own changes.
        allow_extensions: run the Python files that the base recipe names.

    Raises:
        ConfigError: one message with every error of the file and of all its recipes.
    """
    path = Path(path)
    content = read_mapping(path, "study", "base, variants and seeds")
    try:
        file = StudyFile.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(StudyFile, error)}") from None
    base = find_recipe(Path(file.base))
    # Its own errors first: a variant may mend what is missing, but not what is misspelt.
    raw = read_mapping(base, "recipe", "sections such as student and data")
    read_recipe(base, [], allow_extensions=allow_extensions)
    given = list(changes)
    recipes: dict[str, dict[int, Recipe]] = {}
    templates: dict[str, Recipe] = {}
    errors: list[str] = []
    for name, own in file.variants.items():
        try:
            content = content_of(raw, file, own, given)
            templates[name] = recipe_of(content, file)
            recipes[name] = {seed: recipe_of(content, file, seed) for seed in file.seeds}
        except ConfigError as error:
            errors.append(f"variants.{name}: {error}")
    study = Study(file, recipes, templates)
    errors += [] if errors else complaints(study)
    if errors:
        raise ConfigError(f"{path}:\n" + "\n".join(errors))
    return study


def content_of(
    raw: Mapping[str, Any], file: StudyFile, own: Mapping[str, Any], changes: Iterable[str]
) -> dict[str, Any]:
    """The content of a variant's recipe: the base, the study's changes, the command's, the variant's own.

    Raises:
        ConfigError: a change names no option.
    """
    content = copy.deepcopy(dict(raw))
    for key, value in file.changes.items():
        put(content, key, copy.deepcopy(value), f"changes.{key}")
    for change in changes:
        lay_over(content, change)
    for key, value in own.items():
        put(content, key, copy.deepcopy(value), key)
    return content


def recipe_of(content: Mapping[str, Any], file: StudyFile, seed: int | None = None) -> Recipe:
    """The recipe of a variant's run with a seed, or with `{seed}` where it will stand.

    Raises:
        ConfigError: every error of the recipe.
    """
    made = content if seed is None else with_seed(content, seed)
    try:
        return Recipe.model_validate({**made, "seed": seed or 0, "out": file.out})
    except ValidationError as error:
        raise ConfigError(explain(Recipe, error)) from None


def with_seed(content: Any, seed: int) -> Any:
    """The content with the seed in place of `{seed}`, in words only."""
    if isinstance(content, dict):
        return {key: with_seed(value, seed) for key, value in content.items()}
    if isinstance(content, list):
        return [with_seed(value, seed) for value in content]
    return content.replace(SEED, str(seed)) if isinstance(content, str) else content


def complaints(study: Study) -> list[str]:
    """What is wrong with recipes that are right by themselves but make no study."""
    found = []
    first = study.first(study.variants[0])
    measured = measured_on(first)
    if not measured:
        found.append("nothing is measured; give the base recipe evaluation.tasks with evaluation.data, or data.eval.")
    elif study.file.score is not None and study.file.score not in measured:
        found.append(f"score is {study.file.score!r}; accepted: {', '.join(measured)}; name one that is measured.")
    for name in study.variants:
        for seed, recipe in study.recipes[name].items():
            where = f"variants.{name}, seed {seed}"
            if measured_on(recipe) != measured or asked_of(recipe) != asked_of(first):
                found.append(
                    f"{where} is measured on other questions, or with shorter answers (evaluation.tasks, data, limit, max_new_tokens, "
                    "task_max_new_tokens, fidelity_records, or data.eval), than the first run; all runs of a study answer the same "
                    "ones in the same way; take the change out."
                )
            if recipe.training.max_steps < 1:
                found.append(f"{where}: training.max_steps is {recipe.training.max_steps}; give the number of steps.")
    steps = {name: study.first(name).training.max_steps for name in study.variants}
    if study.file.equal == "steps" and len(set(steps.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in steps.items())
        found.append(
            f"equal is 'steps', but training.max_steps differs ({told}); give all the same, or set equal: time, flops or nothing."
        )
    return list(dict.fromkeys(found))


def measured_on(recipe: Recipe) -> list[str]:
    """The benchmarks that decide, by name, in the order in which they count."""
    own = [EXACT_MATCH] if recipe.data.eval is not None else []
    return [*recipe.evaluation.tasks, *own]


def asked_of(recipe: Recipe) -> tuple[Any, ...]:
    """What decides which questions are asked, and how long answers may be."""
    asked = recipe.evaluation.model_dump(
        include={"data", "limit", "task_max_new_tokens", "max_new_tokens", "fidelity_records"}
    )
    return *asked.items(), recipe.data.eval, recipe.data.eval_split
