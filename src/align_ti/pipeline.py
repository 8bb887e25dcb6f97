"""What the command line and Python both call: distil, evaluate, score layers, summarise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from pydantic import TypeAdapter
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from align_ti.config import Data, Evaluation, Recipe, Scores, Source
from align_ti.data.cache import SampleCache
from align_ti.data.checking import Checked, Cut, check_records, digest, refuse_too_many
from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.conversation import Conversation
from align_ti.data.groups import same_image_groups
from align_ti.data.mixing import Mixture, read_mixture
from align_ti.data.roles import encode
from align_ti.data.sources import Refused, image_root, read_source
from align_ti.data.streaming import StreamedConversations
from align_ti.errors import DataError, InterruptedRunError, RunError
from align_ti.evaluation.runner import divergence, evaluate, ignore
from align_ti.interactions.layer_scores import score_layers
from align_ti.models.families import check_pair
from align_ti.models.loading import best_device, check_processors, freeze, load_model, load_processor
from align_ti.runs import RunFolder, read_json, write_json, write_text
from align_ti.training.memory import peak_memory
from align_ti.training.trainer import AlignTITrainer
from align_ti.training.watch import RunRecorder

Steps = Callable[[int, int], None]
"""Called with the steps done and all steps, for a progress bar."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a recipe names, loaded and checked against each other."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    processor: ProcessorMixin


def load_parts(recipe: Recipe) -> Parts:
    """Models and processor of a recipe.

    Raises:
        ModelError: one cannot be loaded, or they do not fit each other.
    """
    processor = load_processor(recipe.student.path)
    student = load_model(recipe.student.path, recipe.student.dtype)
    freeze(student, recipe.student.freeze)
    teacher = None
    if recipe.teacher is not None and recipe.objective.needs_teacher:
        check_processors(processor, load_processor(recipe.teacher.path))
        teacher = load_model(recipe.teacher.path, recipe.teacher.dtype).requires_grad_(False)
        check_pair(student, teacher)
    return Parts(student, teacher, processor)


def read_questions(data: Data) -> list[Conversation]:
    """The records that a recipe evaluates on; none if it names none."""
    if data.eval is None:
        return []
    source = Source(path=data.eval, split=data.eval_split)
    return read_source(source, image_root(source, data.images))


TrainingData = EncodedConversations | StreamedConversations


def training_data(
    recipe: Recipe,
    processor: ProcessorMixin,
    run: RunFolder | None = None,
    advance: Steps | None = None,
    mixture: Mixture | None = None,
) -> tuple[TrainingData, dict[str, Any]]:
    """The recipe's training data, checked where the recipe asks for it, and what became of them.

    Args:
        recipe: the run.
        processor: the student's processor.
        run: where skipped and cut records are listed, and the findings of the check kept; None writes nothing.
        advance: progress of the check.
        mixture: the records, if they are read already.

    Raises:
        DataError: a source or record cannot be used, or more records than data.max_skipped allows.
        RunError: the data have changed since the run began.
    """
    settings = recipe.data
    if settings.stream:
        return StreamedConversations(settings, processor, recipe.seed), {"stream": settings.sources[0].path}
    mixture = read_mixture(settings, recipe.seed) if mixture is None else mixture
    records = sum(source.records for source in mixture.sources)
    refuse_too_many(mixture.refused, records, settings.max_skipped)
    data = encoded_mixture(mixture, settings, processor)
    refused, cut = list(mixture.refused), []
    if needs_check(recipe):
        found = checked(data, recipe, run, advance)
        refused, cut = refused + found.refused, found.cut
        refuse_too_many(refused, records, settings.max_skipped)
        if not found.usable:
            raise DataError(
                f"every training record was skipped; at least one is needed; the first: {refused[0].reason}"
            )
        data.keep_only(found.usable, found.lengths)
    story = {
        "sources": [asdict(source) for source in mixture.sources],
        "records": records,
        "used": len(data),
        "skipped": len(refused),
        "truncated": len(cut),
        "first_reasons": [one.reason for one in refused[:5]],
    }
    if run is not None and PartialState().is_main_process:
        write_lines(run.skipped, refused)
        write_lines(run.truncated, cut)
        write_json(run.data, story)
    return data, story


def encoded_mixture(mixture: Mixture, settings: Data, processor: ProcessorMixin) -> EncodedConversations:
    """The records as samples, cached as the recipe says."""
    return EncodedConversations(
        mixture.conversations,
        processor,
        settings.max_length,
        cache=settings.cache == "memory",
        disk=None if settings.cache_dir is None else SampleCache(Path(settings.cache_dir), processor),
        too_long=settings.too_long,
    )


def needs_check(recipe: Recipe) -> bool:
    """Whether every record is processed before training: to skip or cut some, or to fill a memory that workers share."""
    data = recipe.data
    shared = data.cache == "memory" and recipe.training.dataloader_num_workers > 0
    return data.on_bad_record == "skip" or data.too_long == "truncate" or shared


def checked(data: EncodedConversations, recipe: Recipe, run: RunFolder | None, advance: Steps | None) -> Checked:
    """The findings of the pass over the records; those that the run folder keeps are used again.

    Raises:
        DataError: a record cannot be used and bad ones are not skipped.
        RunError: the kept findings are of other records.
    """
    if run is not None and run.checked.exists() and data.kept is None:
        kept = TypeAdapter(Checked).validate_python(read_json(run.checked))
        if kept.of != digest(data.conversations):
            raise RunError(
                f"{run.root}: the training data have changed since this run began, so its order cannot be gone on with; restore them, "
                "or choose another folder (out)."
            )
        return kept
    skip = recipe.data.on_bad_record == "skip"
    found = check_records(data, recipe.training.dataloader_num_workers, advance, skip=skip)
    if run is not None and PartialState().is_main_process:
        write_json(run.checked, asdict(found))
    return found


def write_lines(path: Path, entries: Sequence[Refused | Cut]) -> None:
    """One JSON object a line, or no file if there is nothing to list."""
    if entries:
        write_text(path, "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries))


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's training section as transformers' arguments."""
    options = recipe.training.model_dump()
    if not options["gradient_checkpointing"]:
        # Newer releases call it activation_checkpointing and warn about the name that all of them know.
        del options["gradient_checkpointing"]
    if options.pop("group_by_length"):
        # transformers 5.0 knows the option under its older name.
        newer = "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}
        options |= {"train_sampling_strategy": "group_by_length"} if newer else {"group_by_length": True}
    return TrainingArguments(
        output_dir=recipe.out,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_first_step=True,
        save_strategy="steps",
        disable_tqdm=True,
        **options,
    )


def distil(
    recipe: Recipe,
    data: EncodedConversations | None = None,
    steps: Steps | None = None,
    checks: Steps | None = None,
) -> RunFolder:
    """Trains the recipe's student and leaves it in the run folder; goes on where an earlier run of the same recipe stopped.

    Args:
        recipe: the run.
        data: the encoded training data, if they are there already.
        steps: called after every step.
        checks: called after every record of the pass over the data, if the recipe asks for one.

    Raises:
        InterruptedRunError: Ctrl-C; a checkpoint is saved and the same call goes on from it.
        AlignTIError: whatever is wrong with recipe, data or models.
    """
    run, state = RunFolder(Path(recipe.out)), PartialState()
    with state.main_process_first():
        run.claim(recipe)
    if run.student.exists():
        return run
    set_seed(recipe.seed)
    parts = load_parts(recipe)
    train: TrainingData
    if data is not None:
        train = data
    else:
        # The first process checks; the others read what it found.
        with state.main_process_first():
            train, _ = training_data(recipe, parts.processor, run, checks)
    recorder = RunRecorder(run, steps)
    trainer = AlignTITrainer(
        model=parts.student,
        teacher_model=parts.teacher,
        args=training_arguments(recipe),
        objective=recipe.objective,
        train_dataset=train,
        processing_class=parts.processor,
        scores=recipe.layer_scores,
        callbacks=[recorder],
    )
    # The recorder keeps the log; transformers would print each line over the progress bar.
    trainer.remove_callback(PrinterCallback)
    trainer.resolve_layer()
    with peak_memory() as peak, recorder.interruptible(), errors_of_workers():
        trainer.train(resume_from_checkpoint=last_checkpoint(run.root))
    if trainer.state.global_step < trainer.state.max_steps:
        raise InterruptedRunError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is in {run.root}: the same "
            "command goes on from it."
        )
    draft = run.root / ".student"
    trainer.save_model(str(draft))
    if trainer.is_world_process_zero():
        # A pickle, which nobody needs to use the student.
        (draft / "training_args.bin").unlink(missing_ok=True)
        write_json(
            run.cost, {"seconds_per_step": recorder.seconds_per_step, "peak_memory_mib": peak.mib, "memory": peak.of}
        )
        draft.rename(run.student)
    state.wait_for_everyone()
    return run


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Inside the block, a bad record found in a worker gives the message it gives elsewhere, not the worker's traceback."""
    try:
        yield
    except DataError as error:
        _, marker, message = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")
        if not marker:
            raise
        raise DataError(message.strip()) from error


def last_checkpoint(root: Path) -> str | None:
    """The newest whole checkpoint of a run; a kill while one is saved leaves it without its state, which is written last."""
    whole = [path.parent for path in root.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def score_teacher(
    path: str, conversations: Sequence[Conversation], settings: Scores, seed: int = 0, dtype: str = "auto"
) -> dict[int, float]:
    """The instruction-relevance score (IRS) of each layer of a model, on a sample of the records."""
    model, processor = load_model(path, dtype, best_device()), load_processor(path)
    collate = Collator(processor.tokenizer.pad_token_id)
    groups = same_image_groups(conversations, settings.images, settings.instructions, seed)
    batches = (collate([encode(one, processor, train=False) for one in group]) for group in groups)
    return score_layers(model, ({name: value.to(model.device) for name, value in batch.items()} for batch in batches))


def evaluate_model(
    path: str,
    conversations: Sequence[Conversation],
    settings: Evaluation,
    *,
    teacher: str | None = None,
    dtype: str = "float32",
    teacher_dtype: str = "float32",
    advance: Callable[[int], None] = ignore,
) -> dict[str, Any]:
    """Accuracy of the model in a folder on the records, and its divergence from a teacher if one is named.

    Raises:
        ModelError: a model cannot be loaded, or the two cannot be compared.
    """
    model, processor = load_model(path, dtype, best_device()), load_processor(path)
    other = None
    if teacher is not None:
        check_processors(processor, load_processor(teacher))
        other = load_model(teacher, teacher_dtype, best_device())
        check_pair(model, other)
    result = evaluate(model, processor, conversations, settings, advance)
    if other is not None:
        result["divergence"] = divergence(model, other, processor, conversations, settings)
    return result


def summarise(
    title: str, seed: int, results: dict[str, dict[str, Any]], labels: dict[str, str], runs: dict[str, RunFolder]
) -> dict[str, Any]:
    """The content of `summary.json`: what was measured, by model.

    Args:
        title: what the run was.
        seed: its seed.
        results: what `evaluate_model` gave for each model, in the order they are shown.
        labels: each model's name for people.
        runs: the run folders of the models that were trained here.
    """
    overall = {name: result["accuracy"]["overall"] for name, result in results.items()}
    costs = {name: read_json(run.cost) for name, run in runs.items()}
    return {
        "title": title,
        "seed": seed,
        "labels": labels,
        "questions": next(iter(overall.values()))["questions"],
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
        "questions_by_kind": {
            kind: score["questions"] for kind, score in next(iter(results.values()))["accuracy"].items()
        },
        "cut_answers": {name: result["cut"] for name, result in results.items()},
        "divergence_nats": {name: result["divergence"] for name, result in results.items() if "divergence" in result},
        "seconds_per_step": {name: cost["seconds_per_step"] for name, cost in costs.items()},
        "peak_memory_mib": {name: cost["peak_memory_mib"] for name, cost in costs.items()},
        "memory": next((cost["memory"] for cost in costs.values()), ""),
    }


def train_and_measure(
    recipe: Recipe,
    steps: Steps | None = None,
    advance: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> RunFolder:
    """`distil`, then, if the recipe names evaluation data, the student before and after and the teacher on them."""
    run = distil(recipe, steps=steps, checks=lambda done, total: advance("check the records", done, total))
    if recipe.data.eval is None or not PartialState().is_main_process:
        return run
    conversations = read_questions(recipe.data)
    teacher = None if recipe.teacher is None else recipe.teacher.path
    labels = {"teacher": "teacher", "before": "student before", "student": "student"}
    paths = {"teacher": teacher, "before": recipe.student.path, "student": str(run.student)}
    results = {}
    for name, path in paths.items():
        if path is not None:
            done = [0]

            def answered(count: int, name: str = name, done: list[int] = done) -> None:
                done[0] += count
                advance(labels[name], done[0], len(conversations))

            theirs = "auto" if recipe.teacher is None else recipe.teacher.dtype
            result = evaluate_model(
                path,
                conversations,
                recipe.evaluation,
                teacher=None if name == "teacher" else teacher,
                dtype=theirs if name == "teacher" else recipe.student.dtype,
                teacher_dtype=theirs,
                advance=answered,
            )
            write_json(run.evaluation(name), result)
            results[name] = result
    title = f"Distillation of {Path(recipe.student.path).name}"
    write_json(
        run.summary, summarise(title, recipe.seed, results, {name: labels[name] for name in results}, {"student": run})
    )
    return run
