"""What the command line and Python both call: distil, evaluate, score layers, summarise."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from pydantic import TypeAdapter
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from align_ti.config import Data, Evaluation, Objective, Recipe, Scores, Source, Teacher
from align_ti.data.cache import SampleCache
from align_ti.data.checking import Checked, Cut, check_records, digest, refuse_too_many
from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.conversation import Conversation, open_picture
from align_ti.data.groups import same_image_groups
from align_ti.data.mixing import Mixture, read_mixture
from align_ti.data.roles import encode
from align_ti.data.sources import Refused, image_root, read_source
from align_ti.data.streaming import StreamedConversations
from align_ti.errors import CheckError, ConfigError, DataError, InterruptedRunError, RunError
from align_ti.evaluation.chat import Chat
from align_ti.evaluation.runner import divergence, evaluate, ignore
from align_ti.interactions.layer_scores import score_layers
from align_ti.models.adapters import merged, unwrapped, wrap_with_lora
from align_ti.models.compilation import compile_tokenwise
from align_ti.models.loading import (
    best_device,
    check_precision,
    freeze,
    load_model,
    load_processor,
    trained_by_part,
)
from align_ti.models.pairing import check_pair, own_processor, shared_tokens
from align_ti.models.placement import stay
from align_ti.preflight.checks import RECORDS, run_checks
from align_ti.preflight.report import Report, report_on, write_report
from align_ti.preflight.verdicts import failed
from align_ti.report.card import write_card
from align_ti.runs import RunFolder, read_json, write_json, write_text
from align_ti.training.memory import peak_memory
from align_ti.training.trainer import AlignTITrainer
from align_ti.training.watch import RunRecorder

logger = logging.getLogger(__name__)

Steps = Callable[[int, int], None]
"""Called with the steps done and all steps, for a progress bar."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a recipe names, loaded and checked against each other."""

    student: PreTrainedModel | PeftModel
    teacher: PreTrainedModel | None
    processor: ProcessorMixin
    teacher_processor: ProcessorMixin | None = None

    @property
    def own_processor(self) -> ProcessorMixin | None:
        """The teacher's processor where it makes other inputs than the student's; None where both read the same."""
        return own_processor(self.processor, self.teacher_processor)

    def trained(self) -> dict[str, tuple[int, int]]:
        """Trained and all parameters of each part of the student, adapters included."""
        return trained_by_part(self.student)


def load_parts(recipe: Recipe, compare: bool = True) -> Parts:
    """Models and processors of a recipe, on the CPU; with `compare` they are refused if they do not fit each other.

    Raises:
        ModelError: one cannot be loaded, or they do not fit each other.
    """
    processor = load_processor(recipe.student.path)
    student = load_model(recipe.student.path, recipe.student.dtype)
    freeze(student, recipe.student.freeze)
    teacher, teacher_processor = None, None
    if recipe.teacher is not None and recipe.objective.needs_teacher:
        teacher_processor = load_processor(recipe.teacher.path)
        teacher = load_teacher(recipe.teacher).requires_grad_(False)
        if compare:
            own = own_processor(processor, teacher_processor)
            shared_tokens(student, teacher, processor, own)
            check_pair(student, teacher, shared_inputs=own is None)
    lora = recipe.student.lora
    wrapped = student if lora is None else wrap_with_lora(student, **lora.model_dump())
    check_precision(wrapped, fp16=recipe.training.fp16)
    return Parts(wrapped, teacher, processor, teacher_processor)


def load_teacher(settings: Teacher, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The teacher in the form and at the place that its settings say; by default on the given device.

    Quantised weights cannot be moved, so they go to this process's accelerator at once.

    Raises:
        ModelError: it cannot be loaded.
    """
    if settings.device is not None:
        device = settings.device
    elif settings.quantization is not None:
        device = PartialState().device
    teacher = load_model(settings.path, settings.dtype, device, settings.quantization)
    if settings.device is not None:
        stay(teacher)
    return teacher


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
    teacher_processor: ProcessorMixin | None = None,
) -> tuple[TrainingData, dict[str, Any]]:
    """The recipe's training data, checked where the recipe asks for it, and what became of them.

    Args:
        recipe: the run.
        processor: the student's processor.
        run: where skipped and cut records are listed, and the findings of the check kept; None writes nothing.
        advance: progress of the check.
        mixture: the records, if they are read already.
        teacher_processor: the teacher's processor, where it makes other inputs than the student's.

    Raises:
        DataError: a source or record cannot be used, or more records than data.max_skipped allows.
        RunError: the data have changed since the run began.
    """
    settings = recipe.data
    if settings.stream:
        stream = StreamedConversations(settings, processor, recipe.seed, teacher_processor)
        return stream, {"stream": settings.sources[0].path}
    mixture = read_mixture(settings, recipe.seed) if mixture is None else mixture
    records = sum(source.records for source in mixture.sources)
    refuse_too_many(mixture.refused, records, settings.max_skipped)
    data = encoded_mixture(mixture, settings, processor)
    if teacher_processor is not None:
        data.teacher = encoded_mixture(mixture, settings, teacher_processor)
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
    """The recipe's training section as transformers' arguments.

    Raises:
        ConfigError: float16 autocast on a machine without an accelerator.
    """
    options = recipe.training.model_dump()
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and recipe.training.fp16:
        raise ConfigError(
            "training.fp16 is true, but this machine has no accelerator, and gradient scaling needs one; accepted on a CPU: "
            "training.bf16, or neither."
        )
    if not options["gradient_checkpointing"]:
        # Newer releases call it activation_checkpointing and warn about the name that all of them know.
        del options["gradient_checkpointing"]
    # Ours compiles parts of the models in place; theirs would wrap the student.
    del options["torch_compile"]
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
        use_cpu=on_cpu,
        **options,
    )


Seen = Callable[[Report], None]
"""Called with the report of the check before training."""


def log_warnings(report: Report) -> None:
    """Each warning of a check as a line of the log."""
    for verdict in report.verdicts:
        if verdict.state == "warn":
            logger.warning("%s: %s", verdict.name, verdict.sentence)


def check_recipe(recipe: Recipe) -> Report:
    """The verdicts on a recipe's models and first records; `check.json` and `check.html` are written to the run folder.

    Raises:
        AlignTIError: recipe, data or models cannot be read at all.
    """
    parts, device = load_parts(recipe, compare=False), best_device()
    data, _ = training_data(recipe, parts.processor, teacher_processor=parts.own_processor)
    for model in (parts.student, parts.teacher):
        if model is not None:
            nn.Module.to(model, device)
    return run_and_write(RunFolder(Path(recipe.out)), recipe, parts, first_records(data))


def first_records(data: TrainingData) -> Sequence[Conversation]:
    """The records that are checked: all, of which the first are read, or the first of a stream."""
    return data.conversations if isinstance(data, EncodedConversations) else data.first(RECORDS)


def run_and_write(
    run: RunFolder,
    recipe: Recipe,
    parts: Parts,
    conversations: Sequence[Conversation],
    objective: Objective | None = None,
    processes: int = 1,
) -> Report:
    """Runs the checks and writes what they found to the run folder."""
    verdicts = run_checks(
        unwrapped(parts.student),
        parts.teacher,
        parts.processor,
        conversations,
        recipe,
        objective=objective,
        teacher_processor=parts.teacher_processor,
        processes=processes,
    )
    report = report_on(verdicts, parts.processor, conversations)
    write_report(run, report)
    return report


def check_before(
    run: RunFolder, recipe: Recipe, parts: Parts, trainer: AlignTITrainer, data: TrainingData, seen: Seen
) -> None:
    """The check on the main process; where it fails every process stops.

    Raises:
        CheckError: a verdict is a failure.
    """
    message: list[str | None] = [None]
    if trainer.is_world_process_zero():
        found = run_and_write(run, recipe, parts, first_records(data), trainer.objective, int(trainer.args.world_size))
        seen(found)
        message[0] = failed(found.verdicts, str(run.check))
    (said,) = broadcast_object_list(message)
    if said is not None:
        raise CheckError(said)


def distil(
    recipe: Recipe,
    data: EncodedConversations | None = None,
    steps: Steps | None = None,
    checks: Steps | None = None,
    check: bool = True,
    seen: Seen = log_warnings,
) -> RunFolder:
    """Trains the recipe's student and leaves it in the run folder; goes on where an earlier run of the same recipe stopped.

    Args:
        recipe: the run.
        data: the encoded training data, if they are there already.
        steps: called after every step.
        checks: called after every record of the pass over the data, if the recipe asks for one.
        check: check models and first records before training, if the recipe says so too; a run that goes on is not checked again.
        seen: called with what that check found; by default its warnings are logged.

    Raises:
        CheckError: a check failed; nothing was trained.
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
            train, _ = training_data(recipe, parts.processor, run, checks, teacher_processor=parts.own_processor)
    if recipe.training.torch_compile:
        for model in filter(None, (parts.student, parts.teacher)):
            compile_tokenwise(unwrapped(model))
    parameters = parts.trained()
    recorder = RunRecorder(run, steps)
    trainer = AlignTITrainer(
        model=parts.student,
        teacher_model=parts.teacher,
        args=training_arguments(recipe),
        objective=recipe.objective,
        train_dataset=train,
        processing_class=parts.processor,
        teacher_processing_class=parts.teacher_processor,
        scores=recipe.layer_scores,
        callbacks=[recorder],
    )
    # The recorder keeps the log; transformers would print each line over the progress bar.
    trainer.remove_callback(PrinterCallback)
    trainer.resolve_layer()
    checkpoint = last_checkpoint(run.root)
    if check and recipe.check and checkpoint is None:
        check_before(run, recipe, parts, trainer, train, seen)
    with peak_memory() as peak, recorder.interruptible(), errors_of_workers():
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        raise InterruptedRunError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is in {run.root}: the same "
            "command goes on from it."
        )
    draft = run.root / ".student"
    if isinstance(parts.student, PeftModel):
        if trainer.is_world_process_zero():
            merged(parts.student).save_pretrained(draft)
            parts.processor.save_pretrained(draft)
    else:
        trainer.save_model(str(draft))
    if trainer.is_world_process_zero():
        # A pickle, which nobody needs to use the student.
        (draft / "training_args.bin").unlink(missing_ok=True)
        write_json(
            run.cost, {"seconds_per_step": recorder.seconds_per_step, "peak_memory_mib": peak.mib, "memory": peak.of}
        )
        records = len(train) if isinstance(train, Sized) else None
        steps_done = trainer.state.global_step
        write_json(run.training, {"steps": steps_done, "records": records, "parameters": parameters})
        write_card(run, draft)
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
    path: str | Teacher,
    conversations: Sequence[Conversation],
    settings: Evaluation,
    *,
    teacher: str | Teacher | None = None,
    dtype: str = "float32",
    teacher_dtype: str = "float32",
    advance: Callable[[int], None] = ignore,
) -> dict[str, Any]:
    """Accuracy of the model in a folder on the records, and its divergence from a teacher if one is named.

    A model given as `Teacher` is loaded as its settings say (precision, quantization, device), one given by name in the dtype given.

    Raises:
        ModelError: a model cannot be loaded, or the two cannot be compared.
    """
    first = Teacher(path=path, dtype=dtype) if isinstance(path, str) else path  # type: ignore[arg-type]
    model, processor = load_teacher(first, best_device()), load_processor(first.path)
    other, own = None, None
    if teacher is not None:
        second = Teacher(path=teacher, dtype=teacher_dtype) if isinstance(teacher, str) else teacher  # type: ignore[arg-type]
        own = own_processor(processor, load_processor(second.path))
        other = load_teacher(second, best_device())
        shared_tokens(model, other, processor, own)
        check_pair(model, other, shared_inputs=own is None)
    result = evaluate(model, processor, conversations, settings, advance)
    if other is not None:
        result["divergence"] = divergence(model, other, processor, conversations, settings, teacher_processor=own)
    return result


def open_chats(models: Sequence[str], images: Sequence[Path], max_new_tokens: int) -> list[Chat]:
    """A chat with each of the models about the same pictures.

    Raises:
        DataError: a picture cannot be read.
        ModelError: a model cannot be loaded.
    """
    for image in images:
        open_picture(image, "the chat")
    return [
        Chat(load_model(path, "auto", best_device()), load_processor(path), tuple(images), max_new_tokens)
        for path in models
    ]


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
    check: bool = True,
    seen: Seen = log_warnings,
) -> RunFolder:
    """`distil`, then, if the recipe names evaluation data, the student before and after and the teacher on them."""
    checks = partial(advance, "check the records")
    run = distil(recipe, steps=steps, checks=checks, check=check, seen=seen)
    if recipe.data.eval is None or not PartialState().is_main_process:
        return run
    conversations = read_questions(recipe.data)
    labels = {"teacher": "teacher", "before": "student before", "student": "student"}
    models = {"teacher": recipe.teacher, "before": recipe.student.path, "student": str(run.student)}
    results = {}
    for name, model in models.items():
        if model is not None:
            done = [0]

            def answered(count: int, name: str = name, done: list[int] = done) -> None:
                done[0] += count
                advance(labels[name], done[0], len(conversations))

            result = evaluate_model(
                model,
                conversations,
                recipe.evaluation,
                teacher=None if name == "teacher" else recipe.teacher,
                dtype=recipe.student.dtype,
                advance=answered,
            )
            write_json(run.evaluation(name), result)
            results[name] = result
    title = f"Distillation of {Path(recipe.student.path).name}"
    write_json(
        run.summary, summarise(title, recipe.seed, results, {name: labels[name] for name in results}, {"student": run})
    )
    write_card(run, run.student)
    return run
