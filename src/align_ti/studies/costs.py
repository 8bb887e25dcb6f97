"""What a step of each variant costs, measured before a study starts, and the steps that make compute equal."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from align_ti.config import Evaluation, Objective, Recipe
from align_ti.errors import RunError
from align_ti.flops import FlopCount
from align_ti.pipeline.training import distil
from align_ti.runs import RunFolder, read_json, write_json
from align_ti.studies.design import Study
from align_ti.studies.folder import StudyFolder

TIMED = 25
"""Steps of a run that is timed; the first five are left out."""

ROUNDS = 5
"""Timed runs of each variant, in turn with the others', so that a machine that slows down slows all of them. One such run may be a
third off: the median of five is what counts."""

COUNTED = (2, 10)
"""Steps of the two short runs whose difference in operations is that of the steps between them."""

Advance = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and all there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a step costs, and how many a run makes."""

    seconds_per_step: float
    flops_per_step: float
    steps: int


def measured_costs(study: Study, folder: StudyFolder, advance: Advance) -> dict[str, Cost]:
    """Each variant's cost and steps; what the folder knows already is not measured again.

    Variants that are new to the folder are timed in turn with one that it knows, and told in the time that this one took then: the
    machine may be another one, or busier.

    Raises:
        RunError: the budget is less than one step of a variant.
    """
    known, missing = known_costs(folder), unmeasured(study, folder)
    timed = to_time(study, folder)
    yardstick = timed[len(missing)] if len(timed) > len(missing) else None
    after = study.file.cost_after
    seconds: dict[str, list[list[float]]] = {name: [] for name in timed}
    done, total = 0, len(timed) * (ROUNDS + bool(after)) + len(missing)
    with ExitStack() as stack:
        recipes = {name: study.first(name) for name in timed}
        for name in timed if after else ():
            advance(f"train before measuring: {study.label(name)}", done, total)
            recipes[name] = stack.enter_context(begun(recipes[name], after, folder))
            done += 1
        for _ in range(ROUNDS):
            for name in timed:
                advance(f"time a step: {study.label(name)}", done, total)
                seconds[name].append(of_stages(recipes[name], lambda recipe: seconds_of_a_step(recipe, folder)))
                done += 1
        medians = {name: [median(one) for one in zip(*rounds, strict=True)] for name, rounds in seconds.items()}
        pace = 1.0
        if yardstick is not None:
            pace = known[yardstick]["seconds_per_step"] / mean_over(recipes[yardstick], medians[yardstick])
        for name in missing:
            advance(f"count FLOPs: {study.label(name)}", done, total)
            flops = of_stages(recipes[name], lambda recipe: flops_of_a_step(recipe, folder))
            times = [pace * one for one in medians[name]]
            known[name] = {
                "of": measured_as(study, name),
                "seconds_per_step": mean_over(recipes[name], times),
                "flops_per_step": mean_over(recipes[name], flops),
                "stages": [
                    {"seconds_per_step": one, "flops_per_step": other} for one, other in zip(times, flops, strict=True)
                ],
            }
            done += 1
            advance(f"count FLOPs: {study.label(name)}", done, total)
    if missing:
        write_json(folder.costs, known)
    steps = equal_steps(study, known)
    return {
        name: Cost(
            seconds_per_step=known[name]["seconds_per_step"],
            flops_per_step=known[name]["flops_per_step"],
            steps=steps[name],
        )
        for name in study.variants
    }


def to_time(study: Study, folder: StudyFolder) -> list[str]:
    """The variants that are timed: those whose cost the folder does not hold, and behind them one whose cost it does."""
    missing = unmeasured(study, folder)
    known = [name for name in (study.budget, *study.variants) if name in known_costs(folder) and name not in missing]
    return [*missing, *known[:1]] if missing else []


def unmeasured(study: Study, folder: StudyFolder) -> list[str]:
    """The variants whose cost the folder does not hold yet."""
    known = known_costs(folder)
    return [name for name in study.variants if known.get(name, {}).get("of") != measured_as(study, name)]


def steps_to_measure(study: Study, name: str) -> int:
    """The steps that a variant is trained for until its cost is known: `cost_after`, then those that are timed or counted, for each
    part of training in which schedules change the work of a step."""
    stages = len(study.templates[name].objective.stages())
    return study.file.cost_after + stages * (ROUNDS * TIMED + sum(COUNTED))


def known_costs(folder: StudyFolder) -> dict[str, Any]:
    """The costs that the folder holds, by variant."""
    return read_json(folder.costs) if folder.costs.exists() else {}


def measured_as(study: Study, name: str) -> str:
    """What a variant's cost depends on, as a digest of its recipe and the steps of training before the measurement."""
    after = study.file.cost_after
    return digest_of(study.templates[name]) + (f" after {after}" if after else "")


def equal_steps(study: Study, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The steps of each variant: the recipe's own, or as many as cost what the budget's variant costs.

    Raises:
        RunError: the budget is less than one step of a variant.
    """
    own = {name: study.first(name).training.max_steps for name in study.variants}
    by = {"time": "seconds_per_step", "flops": "flops_per_step"}.get(study.file.equal)
    if by is None:
        return own
    budget = own[study.budget] * costs[study.budget][by]
    found = {name: int(budget / costs[name][by] + 1e-9) for name in study.variants}
    short = [name for name, count in found.items() if count < 1]
    if short:
        raise RunError(
            f"the budget ({own[study.budget]} steps of {study.budget}) is less than one step of {', '.join(short)}; raise "
            f"variants.{study.budget}'s training.max_steps, or name another budget."
        )
    return found


def digest_of(recipe: Recipe) -> str:
    """A digest of all of a recipe that a step's cost depends on: how long it runs and how it is measured have no part in it."""
    # Without defaults: an option that is newer than a folder changes nothing in it.
    content = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"evaluation", "out", "seed"})
    content["training"] = {key: value for key, value in content.get("training", {}).items() if key != "max_steps"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def begun(recipe: Recipe, steps: int, folder: StudyFolder) -> Iterator[Recipe]:
    """The recipe with the student that its own first steps make as the start; that student goes with the block."""
    with short_run(recipe, steps, folder) as run:
        student = recipe.student.model_copy(update={"path": str(run.student)})
        yield recipe.model_copy(update={"student": student})


def of_stages(recipe: Recipe, measured: Callable[[Recipe], float]) -> list[float]:
    """What is measured of each stage of training: where schedules change the work of a step, there are several."""
    return [measured(at_stage(recipe, objective)) for _, objective in recipe.objective.stages()]


def mean_over(recipe: Recipe, of_stage: Sequence[float]) -> float:
    """The mean over training of what its stages have."""
    return sum(share * one for (share, _), one in zip(recipe.objective.stages(), of_stage, strict=True))


def at_stage(recipe: Recipe, objective: Objective) -> Recipe:
    """The recipe with a stage's objective all along; what is stored of a teacher that the stage does not need is left out."""
    data = recipe.data if objective.needs_teacher else recipe.data.model_copy(update={"teacher_cache": None})
    return recipe.model_copy(update={"objective": objective, "data": data})


def seconds_of_a_step(recipe: Recipe, folder: StudyFolder) -> float:
    """The time of a step, the first few left out (`RunRecorder.seconds_per_step`)."""
    with short_run(recipe, TIMED, folder) as run:
        return float(read_json(run.cost)["seconds_per_step"])


def flops_of_a_step(recipe: Recipe, folder: StudyFolder) -> float:
    """The floating-point operations of a step, counted in the first few: those of matrix products, convolutions and attention."""
    counted = []
    for steps in COUNTED:
        with FlopCount() as count, short_run(recipe, steps, folder):
            pass
        counted.append(count.total)
    return float(counted[1] - counted[0]) / (COUNTED[1] - COUNTED[0])


@contextmanager
def short_run(recipe: Recipe, steps: int, folder: StudyFolder) -> Iterator[RunFolder]:
    """The recipe trained for a few steps in a folder that goes with the block; nothing is measured or checked."""
    work = folder.root / "work"
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="cost-") as out:
        alone = {"flops": False, "gradient_shares_every": 0}
        training = recipe.training.model_copy(update={"max_steps": steps, "save_steps": steps + 1, **alone})
        data = recipe.data.model_copy(update={"eval": None})
        changed = {"out": str(Path(out) / "run"), "training": training, "data": data, "evaluation": Evaluation()}
        yield distil(recipe.model_copy(update=changed), check=False)
