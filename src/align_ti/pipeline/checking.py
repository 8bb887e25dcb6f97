"""The check before training: on its own, or as the first thing that a run does."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from align_ti.config import Recipe
from align_ti.data.conversation import Conversation
from align_ti.errors import CheckError
from align_ti.models.adapters import unwrapped
from align_ti.models.loading import best_device
from align_ti.models.placement import move
from align_ti.pipeline.parts import Parts, load_parts
from align_ti.pipeline.records import TrainingData, first_records, training_data
from align_ti.preflight.checks import run_checks
from align_ti.preflight.report import Report, report_on, write_report
from align_ti.preflight.verdicts import failed
from align_ti.runs import RunFolder

logger = logging.getLogger(__name__)


Seen = Callable[[Report], None]
"""Called with the report of the check before training."""


def log_warnings(report: Report) -> None:
    """Each warning of a check as a line of the log."""
    for verdict in report.verdicts:
        if verdict.state == "warn":
            logger.warning("%s: %s", verdict.name, verdict.sentence)


def check_recipe(recipe: Recipe, processes: int = 1) -> Report:
    """The verdicts on a recipe's models and first records; `check.json` and `check.html` are written to the run folder.

    Args:
        recipe: the run.
        processes: processes of the run, for its expected memory and time; the check itself runs in one.

    Raises:
        AlignTIError: recipe, data or models cannot be read at all.
    """
    # The probes run the teacher, whatever a cache holds of it.
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"teacher_cache": None})})
    parts, device = load_parts(recipe, compare=False), best_device()
    data, _ = training_data(recipe, parts.processor, teacher_processor=parts.own_processor)
    with placed(parts, device):
        return run_and_write(RunFolder(Path(recipe.out)), recipe, parts, first_records(data), processes)


@contextmanager
def placed(parts: Parts, device: torch.device) -> Iterator[None]:
    """Both models on the device inside the block, unless one has a place of its own; where they were after it."""
    models = [unwrapped(model) for model in (parts.student, parts.teacher) if model is not None]
    before = [model.device for model in models]
    for model in models:
        move(model, device)
    try:
        yield
    finally:
        for model, place in zip(models, before, strict=True):
            move(model, place)


def run_and_write(
    run: RunFolder, recipe: Recipe, parts: Parts, conversations: Sequence[Conversation], processes: int
) -> Report:
    """Runs the checks and writes what they found to the run folder."""
    verdicts = run_checks(
        unwrapped(parts.student),
        parts.teacher,
        parts.processor,
        conversations,
        recipe,
        teacher_processor=parts.teacher_processor,
        processes=processes,
        sharded=processes > 1 and (sharding_engine() or (recipe.teacher is not None and recipe.teacher.sharded)),
    )
    report = report_on(verdicts, parts.processor, conversations)
    write_report(run, report)
    return report


def sharding_engine() -> bool:
    """Whether accelerate was launched with an engine that shards weights, gradients or the optimizer's states."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def check_before(
    run: RunFolder, recipe: Recipe, parts: Parts, data: TrainingData, state: PartialState, seen: Seen
) -> None:
    """The check on the main process, of models that no engine has sharded yet; where it fails every process stops.

    Raises:
        CheckError: a verdict is a failure.
    """
    message: list[str | None] = [None]
    if state.is_main_process:
        with placed(parts, state.device):
            found = run_and_write(run, recipe, parts, first_records(data), int(state.num_processes))
        seen(found)
        message[0] = failed(found.verdicts, str(run.check))
    (said,) = broadcast_object_list(message)
    if said is not None:
        raise CheckError(said)
