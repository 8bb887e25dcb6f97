"""One run: from a recipe to a student in a folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sized
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from align_ti.config import Recipe
from align_ti.data.collator import EncodedConversations
from align_ti.errors import ConfigError, InterruptedRunError, RequeueError, RunError
from align_ti.models.adapters import merged, unwrapped
from align_ti.models.compilation import compile_tokenwise
from align_ti.models.placement import is_quantized
from align_ti.models.saving import save_model
from align_ti.phases import part
from align_ti.pipeline.caching import use_cache
from align_ti.pipeline.checking import Seen, check_before, log_warnings
from align_ti.pipeline.parts import Parts, launched, load_parts, load_student
from align_ti.pipeline.records import Steps, TrainingData, errors_of_workers, training_data
from align_ti.pipeline.watching import TaskWatch
from align_ti.processes import first_process_first, wait_for_all
from align_ti.report.card import write_card
from align_ti.runs import RunFolder, write_json
from align_ti.training.memory import peak_memory
from align_ti.training.optimizers import optimizer_of
from align_ti.training.trainer import AlignTITrainer
from align_ti.training.watch import REQUEUE, WARM_UP, RunRecorder, StepPhases
from align_ti.training.work import TrainingWork

logger = logging.getLogger(__name__)

COUNTED_ATTENTION = {"eager", "sdpa"}
"""The implementations of attention whose FLOPs are known from shapes."""


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
    for ours in ("phases", "flops", "gradient_shares_every", "optimizer"):
        del options[ours]
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


def distil(
    recipe: Recipe,
    data: EncodedConversations | None = None,
    steps: Steps | None = None,
    checks: Steps | None = None,
    check: bool = True,
    seen: Seen = log_warnings,
    before: Callable[[RunFolder], None] = lambda run: None,
) -> RunFolder:
    """Trains the recipe's student and saves it in the run folder; resumes where an earlier run of the same recipe stopped.

    Args:
        recipe: the run.
        data: the encoded training data, if already available.
        steps: called after every step.
        checks: called after every record of the pass over the data, if the recipe asks for one.
        check: check models and first records before training, if the recipe enables it too; a resumed run is not checked again.
        seen: called with the results of that check; by default its warnings are logged.
        before: called by all processes after the folder is claimed and before anything is loaded, unless the student exists.

    Raises:
        CheckError: a check failed; nothing was trained.
        InterruptedRunError: Ctrl-C; a checkpoint is saved and the same call resumes from it.
        RequeueError: SIGTERM or SIGUSR1; likewise.
        RunError: another process is training in the folder.
        AlignTIError: any other error in recipe, data or models.
    """
    run, state = RunFolder(Path(recipe.out)), launched()
    # One process holds the folder for all of its launch.
    with run.held() if state.is_main_process else contextlib.nullcontext():
        return distil_into(run, recipe, state, data, steps, checks, check, seen, before)


def distil_into(
    run: RunFolder,
    recipe: Recipe,
    state: PartialState,
    data: EncodedConversations | None,
    steps: Steps | None,
    checks: Steps | None,
    check: bool,
    seen: Seen,
    before: Callable[[RunFolder], None],
) -> RunFolder:
    """`distil` in a folder that is held."""
    with first_process_first():
        run.claim(recipe, state.num_processes)
    if run.student.exists():
        return run
    before(run)
    set_seed(recipe.seed)
    with part("load models"):
        parts = load_parts(recipe)
    train: TrainingData
    if data is not None:
        train = data
    else:
        # The first process checks; the others read what it found.
        with first_process_first():
            train, _ = training_data(recipe, parts.processor, run, checks, teacher_processor=parts.own_processor)
    objective = recipe.objective if recipe.data.teacher_cache is None else use_cache(recipe, parts, train)
    if recipe.training.torch_compile:
        for model in filter(None, (parts.student, parts.teacher)):
            compile_tokenwise(unwrapped(model))
    parameters = parts.trained()
    recorder, phases = RunRecorder(run, steps), StepPhases() if recipe.training.phases else None
    work = TrainingWork(run)
    watch = TaskWatch(recipe.evaluation, parts.processor) if recipe.evaluation.every is not None else None
    trainer = AlignTITrainer(
        model=parts.student,
        teacher_model=parts.teacher,
        args=training_arguments(recipe),
        objective=objective,
        train_dataset=train,
        processing_class=parts.processor,
        teacher_processing_class=parts.teacher_processor,
        scores=recipe.layer_scores,
        on_policy=recipe.data.on_policy,
        callbacks=[recorder, *filter(None, [watch])],
        phases=phases,
        work=work,
        gradient_shares_every=recipe.training.gradient_shares_every,
        optimizer_cls_and_kwargs=optimizer_of(recipe.training, parts.student),
    )
    # The recorder keeps the log; transformers would print each line over the progress bar.
    trainer.remove_callback(PrinterCallback)
    recorder.attach(trainer)
    if watch is not None:
        watch.attach(trainer)
    uncounted = why_uncounted(recipe, parts, trainer)
    work.flops = not uncounted
    trainer.resolve_layer()
    checkpoint = run.last_checkpoint()
    if checkpoint is not None:
        check_checkpoint_engine(checkpoint, trainer)
        work.go_on(checkpoint)
    # Its probes run the teacher, which a cache leaves out, and whole models, so before the teacher is sharded.
    if check and recipe.check and checkpoint is None and recipe.data.teacher_cache is None:
        check_before(run, recipe, parts, trainer, train, seen)
    if recipe.teacher is not None and recipe.teacher.sharded:
        trainer.shard_teacher()
    with peak_memory() as peak, recorder.interruptible(), errors_of_workers():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.global_step < trainer.state.max_steps:
        # The first process writes the checkpoint; the launch is over only when it has.
        wait_for_all()
        stopped = RequeueError if recorder.stopped == REQUEUE else InterruptedRunError
        raise stopped(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is in {run.root}: the same "
            "command resumes from it."
        )
    save_student(run, recipe, parts, trainer)
    worked = work.summary(trainer.args, trainer.state.global_step)
    if trainer.is_world_process_zero():
        cost = {"seconds_per_step": recorder.seconds_per_step, "peak_memory_mib": peak.mib, "memory": peak.of, **worked}
        if worked["flops"] is None:
            cost["flops_not_counted"] = uncounted or "the run went on from a checkpoint that holds no count"
        write_json(run.cost, cost)
        records = len(train) if isinstance(train, Sized) else None
        write_json(run.training, {"steps": trainer.state.global_step, "records": records, "parameters": parameters})
        if phases is not None:
            write_phases(run, phases)
        write_card(run, run.draft)
        run.draft.rename(run.student)
    wait_for_all()
    return run


def why_uncounted(recipe: Recipe, parts: Parts, trainer: AlignTITrainer) -> str:
    """Why the run's FLOPs are not counted, for people; empty if they are."""
    models = [unwrapped(model) for model in (parts.student, parts.teacher) if model is not None]
    attention = sorted({one for model in models for one in attention_of(model)} - COUNTED_ATTENTION)
    reasons = {
        "training.flops is false": not recipe.training.flops,
        "training.torch_compile: compiled parts cannot be looked into": recipe.training.torch_compile,
        "data.on_policy: which of the first steps the student answers is chance": recipe.data.on_policy is not None,
        "schedules change the work of a step, so the first ones are not like the others": recipe.objective.changes_work,
        "products of quantised weights are no operations of PyTorch's own": any(map(is_quantized, models)),
        f"attention by {', '.join(attention)} is no operation of PyTorch's own": bool(attention),
        "under DeepSpeed it was not tried": bool(trainer.is_deepspeed_enabled),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def attention_of(model: nn.Module) -> set[str]:
    """The implementations of attention that the parts of a model run on."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return {str(kind) for config in configs if (kind := getattr(config, "_attn_implementation", None)) is not None}


def check_checkpoint_engine(checkpoint: Path, trainer: AlignTITrainer) -> None:
    """Refuses a checkpoint that this engine cannot read.

    Raises:
        RunError: another engine wrote it, or DeepSpeed did with another number of processes, whose parts it cannot divide anew.
    """
    parts = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    wrote = "DeepSpeed" if parts else "FSDP" if any(checkpoint.glob("pytorch_model_fsdp*")) else "DDP or one process"
    reads = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP" if trainer.is_fsdp_enabled else "DDP or one process"
    if wrote != reads:
        raise RunError(
            f"{checkpoint} was written by {wrote}, and this run is trained by {reads}; a run resumes only with the engine "
            "that it began with; launch it with that engine, or choose another folder (out)."
        )
    if parts and parts != trainer.args.world_size:
        raise RunError(
            f"{checkpoint} was written by DeepSpeed with {parts} processes, and {trainer.args.world_size} are to read it, which "
            f"DeepSpeed cannot; resume with {parts}, or train by FSDP 2, whose checkpoints any number of processes reads."
        )


def save_student(run: RunFolder, recipe: Recipe, parts: Parts, trainer: AlignTITrainer) -> None:
    """Writes the trained student, adapters merged, with its processor to the run's draft folder: the same files from every engine."""
    student = parts.student
    if trainer.shards_weights:
        # On the first process alone; all take part in gathering.
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            student = load_student(recipe)
            student.load_state_dict(weights)
    if trainer.is_world_process_zero():
        save_model(merged(student), run.draft)
        parts.processor.save_pretrained(run.draft)


def write_phases(run: RunFolder, phases: StepPhases) -> None:
    """Writes where the time of a step went, or says why there is nothing to tell."""
    summary = phases.summary()
    if summary is None:
        logger.warning(
            "training.phases is true, but only %d step(s) were made in this call, and the first %d are left out as warm-up; %s was not "
            "written; train for more steps.",
            len(phases.steps),
            WARM_UP,
            run.phases,
        )
    else:
        write_json(run.phases, summary)
