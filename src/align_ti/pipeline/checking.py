"""The check before training: on its own, or as the first thing that a run does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from align_ti.config import Engine, Recipe, refused_by
from align_ti.data.conversation import Conversation
from align_ti.errors import CheckError, ConfigError
from align_ti.models.adapters import unwrapped
from align_ti.models.loading import best_device, first_line
from align_ti.models.placement import move
from align_ti.pipeline.parts import Parts, load_parts
from align_ti.pipeline.records import TrainingData, first_records, training_data
from align_ti.preflight.checks import run_checks
from align_ti.preflight.cost import UNCHECKED, Spread
from align_ti.preflight.report import Report, report_on, write_report
from align_ti.preflight.verdicts import failed
from align_ti.runs import RunFolder
from align_ti.training.engines import engine_of
from align_ti.training.trainer import AlignTITrainer

logger = logging.getLogger(__name__)


Seen = Callable[[Report], None]
"""Called with the report of the check before training."""


def log_warnings(report: Report) -> None:
    """Each warning of a check as a line of the log."""
    for verdict in report.verdicts:
        if verdict.state == "warn":
            logger.warning("%s: %s", verdict.name, verdict.sentence)


def check_recipe(recipe: Recipe, processes: int = 1, engine: Engine = "ddp") -> Report:
    """The verdicts on a recipe's models and first records; `check.json` and `check.html` are written to the run folder.

    Args:
        recipe: the run.
        processes: processes of the run, for its expected memory and time; the check itself runs in one.
        engine: what spreads the run over them.

    Raises:
        AlignTIError: recipe, data or models cannot be read at all, the models do not fit on one device, or the engine cannot train
            with an option of the recipe.
    """
    if processes > 1:
        for refusal in refused_by(engine, recipe):
            raise ConfigError(str(refusal))
    # The probes run the teacher, whatever a cache holds of it.
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"teacher_cache": None})})
    parts = load_parts(recipe, compare=False)
    data, _ = training_data(recipe, parts.processor, teacher_processor=parts.own_processor)
    with placed(parts, best_device()):
        return run_and_write(
            RunFolder(Path(recipe.out)), recipe, parts, first_records(data), spread_of(recipe, processes, engine)
        )


def spread_of(recipe: Recipe, processes: int, engine: Engine) -> Spread:
    """How a run is spread over processes."""
    return Spread(
        processes=processes,
        engine=engine,
        teacher=recipe.teacher is not None and recipe.teacher.sharded,
    )


@contextmanager
def placed(parts: Parts, device: torch.device) -> Iterator[None]:
    """Both models on the device inside the block, unless one has a place of its own; where they were after it.

    Raises:
        CheckError: they do not fit there.
    """
    models = [unwrapped(model) for model in (parts.student, parts.teacher) if model is not None]
    before = [model.device for model in models]
    try:
        for model in models:
            move(model, device)
        yield
    except torch.OutOfMemoryError as error:
        raise CheckError(
            f"the check needs both models whole on {device}, whose memory does not suffice ({first_line(error)}); {UNCHECKED}."
        ) from error
    finally:
        for model, place in zip(models, before, strict=True):
            move(model, place)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_and_write(
    run: RunFolder, recipe: Recipe, parts: Parts, conversations: Sequence[Conversation], spread: Spread
) -> Report:
    """Runs the checks and writes what they found to the run folder."""
    verdicts = run_checks(
        unwrapped(parts.student),
        parts.teacher,
        parts.processor,
        conversations,
        recipe,
        teacher_processor=parts.teacher_processor,
        spread=spread,
    )
    report = report_on(verdicts, parts.processor, conversations)
    write_report(run, report)
    return report


def check_before(
    run: RunFolder, recipe: Recipe, parts: Parts, trainer: AlignTITrainer, data: TrainingData, seen: Seen
) -> None:
    """The check on the main process, of models that nothing has sharded yet; where it fails every process stops.

    Raises:
        CheckError: a verdict is a failure, or the models do not fit on one device.
    """
    message: list[str | None] = [None]
    if trainer.is_world_process_zero():
        spread = spread_of(recipe, int(trainer.args.world_size), engine_of(trainer))
        resolved = recipe.model_copy(update={"objective": trainer.current(training=False)})
        try:
            with placed(parts, trainer.args.device):
                found = run_and_write(run, resolved, parts, first_records(data), spread)
        except CheckError as error:
            message[0] = str(error)
        else:
            seen(found)
            message[0] = failed(found.verdicts, str(run.check))
    (said,) = broadcast_object_list(message)
    if said is not None:
        raise CheckError(said)
