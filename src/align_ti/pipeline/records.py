"""Records of a recipe: those to learn from, checked and cached as it says, and those to be measured on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from pydantic import TypeAdapter
from transformers import ProcessorMixin

from align_ti.config import Data, Recipe, Source
from align_ti.data.cache import SampleCache
from align_ti.data.checking import Checked, Cut, check_records, digest, refuse_too_many
from align_ti.data.collator import EncodedConversations
from align_ti.data.conversation import Conversation
from align_ti.data.mixing import Mixture, read_mixture
from align_ti.data.sources import Refused, image_root, read_source
from align_ti.data.streaming import StreamedConversations
from align_ti.errors import CacheError, DataError, RunError
from align_ti.preflight.checks import RECORDS
from align_ti.runs import RunFolder, read_json, write_json, write_text

Steps = Callable[[int, int], None]
"""Called with the steps done and all steps, for a progress bar."""


TrainingData = EncodedConversations | StreamedConversations


def read_questions(data: Data) -> list[Conversation]:
    """The records that a recipe evaluates on; none if it names none."""
    if data.eval is None:
        return []
    source = Source(path=data.eval, split=data.eval_split)
    return read_source(source, image_root(source, data.images))


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
    refuse_too_many(mixture.unanswered, len(mixture.conversations) + len(mixture.unanswered), settings.max_skipped)
    data = encoded_mixture(mixture, settings, processor)
    if teacher_processor is not None:
        data.teacher = encoded_mixture(mixture, settings, teacher_processor)
    refused, cut = [*mixture.refused, *mixture.unanswered], []
    if needs_check(recipe):
        found = checked(data, recipe, run, advance)
        refused, cut = refused + found.refused, found.cut
        refuse_too_many(refused, records, settings.max_skipped)
        # Of the records that were drawn too: a large source of which a few are taken must not raise the limit.
        refuse_too_many(found.refused, len(mixture.conversations), settings.max_skipped)
        if not found.usable:
            raise DataError(
                f"every training record was skipped; at least one is needed; the first: {refused[0].reason}"
            )
        data.keep_only(found.usable, found.lengths)
    of = digest(data.conversations)
    # Runs of earlier versions kept none.
    if run is not None and run.last_checkpoint() is not None and kept_digest(run) not in (None, of):
        raise changed_data(run)
    story = {
        "of": of,
        "sources": [asdict(source) for source in mixture.sources],
        "records": records,
        "used": len(data),
        "skipped": len(refused),
        "truncated": len(cut),
        "responses": told_responses(data.conversations, mixture),
        "first_reasons": [one.reason for one in refused[:5]],
    }
    if run is not None and PartialState().is_main_process:
        write_lines(run.skipped, refused)
        write_lines(run.truncated, cut)
        write_json(run.data, story)
    return data, story


def told_responses(used: Sequence[Conversation], mixture: Mixture) -> dict[str, int]:
    """How many of the records that are used have responses of their own, and how many the teacher's; how many were left out for want
    of an answer."""
    teacher = sum(one.responses == "teacher" for one in used)
    return {"gold": len(used) - teacher, "teacher": teacher, "without_answer": len(mixture.unanswered)}


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


def kept_digest(run: RunFolder) -> str | None:
    """The digest of the records that the run began with, if it kept one."""
    told: dict[str, str] = read_json(run.data) if run.data.exists() else {}
    return told.get("of")


def changed_data(run: RunFolder) -> RunError:
    """The error for a run that would resume with other records."""
    return RunError(
        f"{run.root}: the training data have changed since this run began, so it cannot resume in the same order; restore them, or "
        "choose another folder (out)."
    )


def checked(data: EncodedConversations, recipe: Recipe, run: RunFolder | None, advance: Steps | None) -> Checked:
    """The findings of the pass over the records; those that the run folder keeps are used again.

    Raises:
        DataError: a record cannot be used and bad ones are not skipped.
        RunError: the kept findings are of other records.
    """
    if run is not None and run.checked.exists() and data.kept is None:
        kept = TypeAdapter(Checked).validate_python(read_json(run.checked))
        if kept.of != digest(data.conversations):
            raise changed_data(run)
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


def first_records(data: TrainingData) -> Sequence[Conversation]:
    """The records that are checked: all, of which the first are read, or the first of a stream."""
    return data.conversations if isinstance(data, EncodedConversations) else data.first(RECORDS)


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Inside the block, an error found in a worker gives the message it gives elsewhere, not the worker's traceback."""
    try:
        yield
    except (DataError, CacheError) as error:
        kind = type(error)
        _, marker, message = str(error).rpartition(f"{kind.__module__}.{kind.__name__}: ")
        if not marker:
            raise
        raise kind(message.strip()) from error
