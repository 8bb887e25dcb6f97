"""What models are worth: layer scores, accuracy, divergence, answers, and the summary of a run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from align_ti.config import Evaluation, Recipe, Scores, Teacher
from align_ti.data.conversation import Conversation, open_picture
from align_ti.errors import DataError
from align_ti.evaluation.benchmarks import benchmark
from align_ti.evaluation.chat import Chat
from align_ti.evaluation.runner import evaluate, ignore
from align_ti.interactions.layer_scores import score_on_records
from align_ti.models.loading import best_device, load_model, load_processor
from align_ti.models.pairing import check_pair, own_processor, shared_tokens
from align_ti.phases import part
from align_ti.pipeline.asking import Task, predict, read_task, score_tasks
from align_ti.pipeline.checking import Seen, log_warnings
from align_ti.pipeline.fidelity import fidelity
from align_ti.pipeline.parts import load_teacher
from align_ti.pipeline.records import Steps, read_questions
from align_ti.pipeline.showing import show_inside
from align_ti.pipeline.training import distil
from align_ti.processes import part_in_order
from align_ti.report.card import write_card
from align_ti.runs import RunFolder, read_json, write_json


def score_teacher(
    path: str, conversations: Sequence[Conversation], settings: Scores, seed: int = 0, dtype: str = "auto"
) -> dict[int, float]:
    """The instruction-relevance score (IRS) of each layer of a model, on a sample of the records."""
    with part("load models"):
        model, processor = load_model(path, dtype, best_device()), load_processor(path)
    sample = settings.model_dump()
    return score_on_records(model, processor, conversations, **sample, seed=seed)


def evaluate_model(
    path: str | Teacher,
    conversations: Sequence[Conversation],
    settings: Evaluation,
    *,
    teacher: str | Teacher | None = None,
    dtype: str = "float32",
    teacher_dtype: str = "float32",
    layer: int | None = None,
    advance: Callable[[int], None] = ignore,
) -> dict[str, Any]:
    """Accuracy of the model in a folder on the records, and its fidelity to a teacher if one is named (`divergence` in nats, and all
    of `align_ti.pipeline.fidelity.fidelity`).

    A model given as `Teacher` is loaded as its settings say (precision, quantization, device), one given by name in the dtype given.
    `layer` is the teacher's layer that weighs visual tokens; by default it is chosen by IRS on the records.

    Raises:
        ModelError: a model cannot be loaded, or the two cannot be compared.
    """
    first = Teacher(path=path, dtype=dtype) if isinstance(path, str) else path  # type: ignore[arg-type]
    with part("load models"):
        model, processor = load_teacher(first, best_device()), load_processor(first.path)
        other, own = None, None
        if teacher is not None:
            second = Teacher(path=teacher, dtype=teacher_dtype) if isinstance(teacher, str) else teacher  # type: ignore[arg-type]
            own = own_processor(processor, load_processor(second.path))
            other = load_teacher(second, best_device())
            shared_tokens(model, other, processor, own)
            check_pair(model, other, shared_inputs=own is None)
    with part("measure: answers"):
        result = evaluate(model, processor, conversations, settings, advance)
    if other is not None:
        with part("measure: divergence"):
            result["fidelity"] = fidelity(
                model,
                other,
                processor,
                conversations,
                [(one["answer"], one["cut"]) for one in result["answers"]],
                settings,
                teacher_processor=own,
                layer=layer,
                called=(Path(first.path).name, Path(second.path).name),
            )
            result["divergence"] = result["fidelity"]["response_kl"]["value"]
    return result


def open_chats(models: Sequence[str], images: Sequence[Path], max_new_tokens: int) -> list[Chat]:
    """A chat with each of the models about the same images.

    Raises:
        DataError: an image cannot be read.
        ModelError: a model cannot be loaded.
    """
    for image in images:
        if not image.is_file():
            raise DataError(f"--image {image}: no such file; give the path of an image.")
        open_picture(image, "the chat")
    return [
        Chat(load_model(path, "auto", best_device()), load_processor(path), tuple(images), max_new_tokens)
        for path in models
    ]


def summarise(
    title: str,
    seed: int,
    results: Mapping[str, dict[str, Any]],
    labels: Mapping[str, str],
    runs: Mapping[str, RunFolder],
    benchmarks: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`: what was measured, by model.

    Args:
        title: what the run was.
        seed: its seed.
        results: what `evaluate_model` gave for each model, in the order they are shown; none without questions of one's own.
        labels: each model's name for people.
        runs: the run folders of the models that were trained here.
        benchmarks: the scores by model and benchmark (`measure_tasks`), if there are any.
    """
    by_kind: Mapping[str, Any] = next(iter(results.values()))["accuracy"] if results else {}
    costs = {name: read_json(run.cost) for name, run in runs.items()}
    return {
        "title": title,
        "seed": seed,
        "labels": labels,
        "questions": by_kind["overall"]["questions"] if by_kind else 0,
        "accuracy": {
            name: {kind: round(score["per_cent"], 2) for kind, score in result["accuracy"].items()}
            for name, result in results.items()
        },
        "interval_95": {
            name: {
                kind: [round(score["low"], 2), round(score["high"], 2)] for kind, score in result["accuracy"].items()
            }
            for name, result in results.items()
        },
        "questions_by_kind": {kind: score["questions"] for kind, score in by_kind.items()},
        "cut_answers": {name: result["cut"] for name, result in results.items()},
        "divergence_nats": {name: result["divergence"] for name, result in results.items() if "divergence" in result},
        "fidelity": {
            name: {
                measure: {key: told[key] for key in ("value", "low", "high", "unit")}
                for measure, told in result["fidelity"]["scores"]["metrics"].items()
            }
            for name, result in results.items()
            if "fidelity" in result
        },
        "fidelity_notes": {
            name: result["fidelity"]["notes"]
            for name, result in results.items()
            if result.get("fidelity", {}).get("notes")
        },
        "seconds_per_step": {name: cost["seconds_per_step"] for name, cost in costs.items()},
        "peak_memory_mib": {name: cost["peak_memory_mib"] for name, cost in costs.items()},
        "memory": next((cost["memory"] for cost in costs.values()), ""),
        **({"benchmarks": benchmarks} if benchmarks else {}),
    }


LABELS = {"teacher": "teacher", "before": "student before training", "student": "student"}
"""The models of a run by name, and what they are called in tables."""


def read_tasks(recipe: Recipe) -> list[Task]:
    """The benchmarks that a recipe measures on, with their questions; none if it names none.

    Raises:
        ConfigError: there is no benchmark of a name.
        DataError: a file of a benchmark is missing or of another version.
    """
    settings = recipe.evaluation
    return [read_task(benchmark(name), Path(settings.data or ""), settings.limit) for name in settings.tasks]


def measure_tasks(
    run: RunFolder,
    recipe: Recipe,
    tasks: Sequence[Task],
    names: Sequence[str],
    advance: Callable[[str, int, int], None],
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The scores of the run's models on benchmarks, by model and benchmark; predictions and scores are in `tasks/MODEL`.

    All processes call it; what an earlier call has left is not asked again. The first process scores, the others get nothing.

    Args:
        run: the run.
        recipe: its recipe.
        tasks: the benchmarks.
        names: the models, of `LABELS`; a teacher that the recipe does not name is left out.
        advance: called with what is asked of whom, the questions that are done, and those of this process.
    """
    models = models_of(run, recipe)
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name in names:
        model = models[name]
        if model is None:
            continue

        def asked(task: str, done: int, total: int, name: str = name) -> None:
            advance(f"{LABELS[name]}, {task}", done, total)

        with part("measure: benchmarks"):
            predict(
                model,
                tasks,
                run.tasks(name),
                batch_size=recipe.evaluation.batch_size,
                max_new_tokens=recipe.evaluation.task_max_new_tokens,
                advance=asked,
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the training, which comes next
        if PartialState().is_main_process:
            found[name] = {task: one.told for task, one in score_tasks(tasks, run.tasks(name)).items()}
    return found


def train_and_measure(
    recipe: Recipe,
    steps: Steps | None = None,
    advance: Callable[[str, int, int], None] = lambda name, done, total: None,
    check: bool = True,
    seen: Seen = log_warnings,
) -> RunFolder:
    """`distil`, and then student before and after and teacher measured on the recipe's questions (data.eval) and benchmarks
    (evaluation.tasks); the summary and the student's card hold the results. Without either nothing is measured.

    On the benchmarks teacher and untouched student are measured before training, the student after it, by all processes together.
    """
    checks = partial(advance, "check the records")
    tasks = read_tasks(recipe)
    # What is missing shows now, and not when the student is finished.
    for question in read_questions(recipe.data):
        question.check_files()

    def before(run: RunFolder) -> None:
        if tasks:
            measure_tasks(run, recipe, tasks, ("teacher", "before"), advance)

    run = distil(recipe, steps=steps, checks=checks, check=check, seen=seen, before=before)
    benchmarks = measure_tasks(run, recipe, tasks, tuple(LABELS), advance) if tasks else {}
    first = PartialState().is_main_process
    # The rest is the first process's alone and takes long; others that waited for it in the group would give up and fail.
    part_in_order()
    if not first:
        return run

    def tell(results: Mapping[str, dict[str, Any]]) -> None:
        title = f"Distillation of {Path(recipe.student.path).name}"
        named = {name: label for name, label in LABELS.items() if name in results or name in benchmarks}
        write_json(run.summary, summarise(title, recipe.seed, results, named, {"student": run}, benchmarks))
        write_card(run, run.student)

    if benchmarks:
        write_json(run.benchmarks, {"labels": LABELS, "benchmarks": benchmarks})
        # One's own questions may take long, and a stop must not lose these from the card.
        if recipe.data.eval is None or not run.summary.exists():
            tell({})
    if recipe.data.eval is not None:
        results = measure_questions(run, recipe, advance)
        tell(results)
        show_run(run, recipe, results, advance)
    return run


def measure_questions(
    run: RunFolder, recipe: Recipe, advance: Callable[[str, int, int], None]
) -> dict[str, dict[str, Any]]:
    """What `evaluate_model` finds for each of the run's models on the recipe's own questions; each is written to the run folder too.

    Args:
        run: the run, whose student is there.
        recipe: its recipe; a teacher that it does not name is left out.
        advance: called with the model's name, the questions that are done, and all of them.
    """
    conversations = read_questions(recipe.data)
    results = {}
    for name, model in models_of(run, recipe).items():
        if model is not None:
            done = [0]

            def answered(count: int, name: str = name, done: list[int] = done) -> None:
                done[0] += count
                advance(LABELS[name], done[0], len(conversations))

            results[name] = evaluate_model(
                model,
                conversations,
                recipe.evaluation,
                teacher=None if name == "teacher" else recipe.teacher,
                layer=layer_of(recipe),
                advance=answered,
            )
            write_json(run.evaluation(name), results[name])
    return results


def show_run(
    run: RunFolder, recipe: Recipe, results: Mapping[str, dict[str, Any]], advance: Callable[[str, int, int], None]
) -> None:
    """Writes what the report shows of the inside of the run's models.

    Args:
        run: the run, whose student is there.
        recipe: its recipe.
        results: what `measure_questions` found.
        advance: called with what is done, how much of it, and all there is.
    """
    scored = read_json(run.layer_scores)["layer"] if run.layer_scores.exists() else layer_of(recipe)
    show_inside(
        run,
        {name: model for name, model in models_of(run, recipe).items() if model is not None},
        read_questions(recipe.data),
        {name: [one["right"] for one in result["answers"]] for name, result in results.items()},
        recipe.evaluation.shown,
        scored,
        advance=partial(advance, "inside the models"),
    )


def models_of(run: RunFolder, recipe: Recipe) -> dict[str, Teacher | None]:
    """The run's models by their names in `LABELS`; None for a teacher that the recipe does not name."""
    dtype = recipe.student.dtype
    return {
        "teacher": recipe.teacher,
        "before": Teacher(path=recipe.student.path, dtype=dtype),
        "student": Teacher(path=str(run.student), dtype=dtype),
    }


def layer_of(recipe: Recipe) -> int | None:
    """The layer that the recipe names for IVA; None where it is chosen by IRS."""
    return recipe.objective.iva.layer if isinstance(recipe.objective.iva.layer, int) else None
