"""A study's runs: what is missing is trained, measured and written down; each run once, whoever else works in the folder."""

from __future__ import annotations

import gc
import json
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align_ti.config import Recipe, Teacher
from align_ti.errors import InterruptedRunError, RunError
from align_ti.evaluation.benchmarks.base import Report
from align_ti.evaluation.results import EXACT_MATCH, of_answers, scored
from align_ti.pipeline.asking import predict, score_tasks
from align_ti.pipeline.measuring import evaluate_model, read_tasks
from align_ti.pipeline.records import read_questions
from align_ti.pipeline.training import distil
from align_ti.runs import RunFolder, provenance, read_json, read_lines, write_text
from align_ti.studies.costs import Advance, Cost, measured_costs
from align_ti.studies.design import Study
from align_ti.studies.folder import StudyFolder
from align_ti.studies.results import write_summary

FULL = 1 << 26
"""Free bytes of a disk below which a failed run keeps nothing."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a study's runs: number `index` of `count`, from 1."""

    index: int = 1
    count: int = 1

    def has(self, number: int) -> bool:
        """Whether the run with this number, from 0, is of this part."""
        return number % self.count == self.index - 1


def run_study(
    study: Study,
    *,
    shard: Shard = Shard(),
    retry: bool = False,
    advance: Advance = lambda what, done, total: None,
    said: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains and measures the study's missing runs of this part, and gives what `study.json` then holds.

    Several processes may work in one folder, in parts or all on all: a run that another is at is passed over. A run that fails is
    written down with its error, and the next one is begun; what it left in `work/` stays, and `retry` goes on from there. Only on a
    full disk nothing of it is kept.

    Args:
        study: the study.
        shard: the part.
        retry: go on with what has failed before.
        advance: progress.
        said: is told what happened, a line a run.

    Raises:
        InterruptedRunError: Ctrl-C or a scheduler's signal; the same call goes on.
        RunError: the folder holds another study, or something else.
    """
    folder = StudyFolder(study.out)
    costs = prepare(study, folder, advance)
    check_steps(study, folder, costs)
    mine = [run for number, run in enumerate(study.runs) if shard.has(number)]
    for number, (name, seed) in enumerate(mine):
        advance("runs", number, len(mine))
        if settled(folder.record(name, seed), retry):
            continue
        with folder.held(f"{name}-{seed}") as owner:
            # Another process may have finished it between the look and the lock.
            if owner is not None or settled(folder.record(name, seed), retry):
                continue
            made = folder.made_elsewhere(study, name, seed, costs[name].steps)
            if made is not None:
                write_record(folder.record(name, seed), made)
                said(f"{study.label(name)}, seed {seed}: taken from {made['taken_from']}, {told_headline(made)}")
            else:
                said(do_run(study, folder, name, seed, costs[name], advance))
    advance("runs", len(mine), len(mine))
    # One at a time, or the slower of two processes would write what it read before the other's last run.
    with folder.alone("summary"):
        return write_summary(study, folder)


def settled(record: Path, retry: bool) -> bool:
    """Whether nothing is left to do for a run: it has a record, and not one of a failure that is to be tried again."""
    return record.exists() and not (retry and read_json(record)["error"])


def prepare(study: Study, folder: StudyFolder, advance: Advance) -> dict[str, Cost]:
    """Claims the folder, measures what a step costs and what the teacher is worth; one process does, others wait.

    Raises:
        RunError: the folder holds another study, or something else.
    """
    with folder.alone("study", waiting=lambda: advance("wait: another process measures costs", 0, 1)):
        folder.claim(study)
        costs = measured_costs(study, folder, advance)
        recipe = study.first(study.variants[0])
        if not folder.teacher.exists() and recipe.teacher is not None:
            advance("evaluate the teacher", 0, 1)
            out = folder.root / "work" / "teacher"
            # KL to itself would say nothing.
            scores = scores_of(recipe.teacher, recipe, out, compared_with=None)[0]
            write_record(folder.teacher, {"path": Path(recipe.teacher.path).name, "scores": scores})
            advance("evaluate the teacher", 1, 1)
    return costs


def check_steps(study: Study, folder: StudyFolder, costs: Mapping[str, Cost]) -> None:
    """A variant's runs must all have made the steps that its cost gives now, or their mean would be of nothing.

    Raises:
        RunError: one made another number.
    """
    for name, runs in folder.records(study).items():
        for seed, one in runs.items():
            if not one["error"] and one["steps"] != costs[name].steps:
                raise RunError(
                    f"{folder.record(name, seed)} has {one['steps']} steps, and {folder.costs} gives {name} {costs[name].steps}: costs "
                    "were measured again after these runs, or files of two studies are mixed; restore the costs that the runs used, "
                    "or remove the records."
                )


def do_run(study: Study, folder: StudyFolder, name: str, seed: int, cost: Cost, advance: Advance) -> str:
    """One run, from its recipe to its record; says in a line what became of it."""
    label = f"{study.label(name)}, seed {seed}"
    recipe, work = study.recipes[name][seed], folder.work(name, seed)
    training = recipe.training.model_copy(update={"max_steps": cost.steps})
    recipe = recipe.model_copy(update={"out": str(work / "run"), "training": training})
    begun = time.monotonic()
    full = False
    record: dict[str, Any] = {"variant": name, "seed": seed, "error": None, "steps": cost.steps}
    try:
        # Seeds differ by a number: once one has passed the check, the others do.
        run = distil(
            recipe,
            steps=lambda step, steps: advance(f"train: {label}", step, steps),
            check=not folder.succeeded(name),
        )
        spent = read_json(run.cost)
        # Too few steps to tell a median: the time measured beforehand.
        a_step = spent["seconds_per_step"] or cost.seconds_per_step
        record |= {
            "seconds_per_step": a_step,
            "seconds": round(a_step * cost.steps, 3),
            "flops": cost.flops_per_step * cost.steps,
            "peak_memory_mib": spent["peak_memory_mib"],
            "curve": curve_of(run),
            "terms": last_terms(run),
        }
        advance(f"evaluate: {label}", 0, 1)
        student = Teacher(path=str(run.student), dtype=recipe.student.dtype)
        layer = study.first(study.variants[0]).objective.iva.layer
        record["scores"], record["by_position"] = scores_of(student, recipe, work / "tasks", recipe.teacher, layer)
        advance(f"evaluate: {label}", 1, 1)
        if study.file.keep_students:
            kept = folder.student(name, seed)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(run.student, kept)
    except (InterruptedRunError, KeyboardInterrupt):
        raise
    except Exception as error:
        # One run that fails must not cost the others; the table tells it.
        record["error"] = f"{type(error).__name__}: {error}"
        # What a run leaves on a full disk would make all others fail too.
        full = shutil.disk_usage(folder.root).free < FULL
        record["trace"] = traceback.format_exc(limit=-8)
    record["wall_seconds"] = round(time.monotonic() - begun, 1)
    record["provenance"] = provenance()
    write_record(folder.record(name, seed), record)
    if not record["error"] or full:
        shutil.rmtree(work, ignore_errors=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return f"{label}: {'failed: ' + record['error'] if record['error'] else told_headline(record)}"


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a record whole, without blanks and with rounded numbers."""
    write_text(path, json.dumps(rounded(content), separators=(",", ":")) + "\n")


def rounded(content: Any) -> Any:
    """The content with numbers to nine digits; single precision has seven."""
    if isinstance(content, Mapping):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    return float(f"{content:.9g}") if isinstance(content, float) else content


def told_headline(record: Mapping[str, Any]) -> str:
    """The headlines of a record's benchmarks in words."""
    heads = ((content["title"], content["metrics"][content["headline"]]) for content in record["scores"].values())
    return ", ".join(f"{title} {head['value']:.1f} {head['unit']}" for title, head in heads)


def scores_of(
    model: Teacher, recipe: Recipe, out: Path, compared_with: Teacher | None, layer: int | str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What files of scores hold of a model, by benchmark; and its fidelity to the teacher by position, if the recipe has data.eval.

    Args:
        model: the model.
        recipe: says what is asked.
        out: where predictions are written.
        compared_with: the teacher.
        layer: the teacher's layer whose attention IVA's fidelity measure takes; one for the whole study, since values at different
            layers are no measure of the same. Without a number, the one with the highest IRS on the questions.
    """
    found: dict[str, Any] = {}
    tasks = read_tasks(recipe)
    if tasks:
        predict(
            model,
            tasks,
            out,
            batch_size=recipe.evaluation.batch_size,
            max_new_tokens=recipe.evaluation.task_max_new_tokens,
        )
        found = {name: dict(one.content) for name, one in score_tasks(tasks, out).items()}
    questions = read_questions(recipe.data)
    by_position: dict[str, Any] = {}
    if questions:
        told = evaluate_model(
            model,
            questions,
            recipe.evaluation,
            teacher=compared_with,
            layer=layer if isinstance(layer, int) else None,
        )
        answers = of_answers(out / "answers", told["answers"])
        report = Report(answers.metrics, answers.headline, {}, ())
        found[EXACT_MATCH] = scored(EXACT_MATCH, report, Path(model.path).name, answers.questions, answers.title)
        if "fidelity" in told:
            found["fidelity"] = told["fidelity"]["scores"]
            by_position = told["fidelity"]["by_position"]
    return found, by_position


def curve_of(run: RunFolder) -> list[dict[str, float]]:
    """What the log says of held-out questions, by step: {"step", "task_NAME", ...}; of a step logged twice the later line."""
    lines: dict[int, dict[str, float]] = {}
    for line in read_lines(run.metrics):
        found = {key: value for key, value in line.items() if key.startswith("task_")}
        if found:
            lines[line["step"]] = {"step": line["step"], **found}
    return [lines[step] for step in sorted(lines)]


def last_terms(run: RunFolder) -> dict[str, float]:
    """The numbers of the last line of the training log; time and memory apart, of which a record has its own."""
    last = (run.read_metrics() or [{}])[-1]
    return {
        key: value
        for key, value in last.items()
        if isinstance(value, int | float) and key not in ("time", "memory_mib")
    }
