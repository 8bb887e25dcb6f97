"""A model's answers to the records of a source, written as training data; goes on where an earlier call stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_ti.config import Generation, Source, Teacher
from align_ti.data.answers import Begun, Key, Made, as_line, begun, key_of, picture_name
from align_ti.data.conversation import Conversation, StoredPicture
from align_ti.data.records import ImageRoot
from align_ti.data.sources import Refused, image_root, read_source, stop
from align_ti.errors import ConfigError, DataError, InterruptedRunError, RunError
from align_ti.evaluation.generation import Answered, answer_records, asking_order
from align_ti.evaluation.runner import chunks
from align_ti.models.loading import best_device, load_processor
from align_ti.phases import part
from align_ti.pipeline.parts import load_teacher
from align_ti.pipeline.records import Steps


@dataclass(frozen=True, slots=True)
class Generated:
    """What `generate_answers` left, all calls together."""

    out: Path
    records: int
    """Records of the source, bad ones included."""
    lines: int
    """Records that have a line in the file."""
    cut: int
    """Lines with an answer that was cut at the token limit."""
    left_out: tuple[Refused, ...]
    """Records that got no line in this call, each with the reason."""
    images: Path | None
    """The folder that image names in the file start from; None if no record has one, or if it is the file's own."""


def generate_answers(
    model: str | Teacher,
    source: str | Path | Source,
    out: Path | str,
    settings: Generation | None = None,
    *,
    advance: Steps = lambda done, total: None,
) -> Generated:
    """Writes the model's answers to the records of a source to a file that is training data itself, and says what became of them.

    Called again after a stop, it goes on where the file ends.

    Args:
        model: a folder or hub name, loaded in the precision that it was saved in; or a model with its settings.
        source: the records; a path takes all of it.
        out: the file, in JSONL.
        settings: how to answer; by default greedily.
        advance: called with the records done and all records.

    Raises:
        ConfigError: the file's name does not end in .jsonl.
        DataError: the source or a record cannot be used (a record only if bad ones are not skipped).
        InterruptedRunError: Ctrl-C; the same call goes on.
        ModelError: the model cannot be loaded.
        RunError: the file holds something else, or answers of another model, by other settings or to other data; or another process
            writes to it.
    """
    teacher = Teacher(path=model) if isinstance(model, str) else model
    source = source if isinstance(source, Source) else Source(path=str(source))
    settings, out = settings or Generation(), Path(out)
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out is {str(out)!r}; accepted: a name that ends in .jsonl; give such a name.")
    left_out: list[Refused] = []
    root = image_root(source)
    records = read_source(source, root, left_out.append if settings.on_bad_record == "skip" else stop)
    if settings.on_bad_record == "error":
        # An image that is missing is told at once, not when its turn comes.
        for record in records:
            record.check_files()
    check_pictures(records, source)
    every = len(records) + len(left_out)
    records = [records[index] for index in asking_order(records)]
    keys, made = [key_of(record, source) for record in records], made_by(teacher, settings)
    before = begun(out, keys, made)
    advance(before.position, len(records))
    lines, cut = before.lines, before.cut
    if before.position < len(records):
        found, new = continued(teacher, records, keys, before, settings, Writer(out, root, made, size_of(out)), advance)
        left_out += found
        lines, cut = lines + new.lines, cut + new.cut
    named = any(isinstance(image, Path) for record in records for image in record.images)
    elsewhere = named and root.resolved != out.parent.resolve()
    return Generated(out, every, lines, cut, tuple(left_out), root.folder if elsewhere else None)


def made_by(teacher: Teacher, settings: Generation) -> Made:
    """Who answers, and every setting that answers depend on; those without effect are left out."""
    told: dict[str, Any] = {"dtype": teacher.dtype, "max_new_tokens": settings.max_new_tokens}
    if teacher.quantization is not None:
        told["quantization"] = teacher.quantization
    told["temperature"] = settings.temperature
    if settings.temperature > 0:
        told |= {"seed": settings.seed}
        told |= {name: value for name in ("top_k", "top_p") if (value := getattr(settings, name)) is not None}
    return Made(teacher.path, told)


def check_pictures(records: Sequence[Conversation], source: Source) -> None:
    """Refuse a source with images in files and others in tables, whose names would start from two folders.

    Raises:
        DataError: both are there; the first record of each kind is named.
    """
    first = {
        kind: next((one.place for one in records if any(isinstance(image, kind) for image in one.images)), None)
        for kind in (Path, StoredPicture)
    }
    if all(first.values()):
        raise DataError(
            f"{source.path}: {first[Path]} names a file as its image, {first[StoredPicture]} holds the bytes of one; one of the two "
            "is accepted where answers are written, since image names start from one folder; split the source, or save all images "
            "as files."
        )


@dataclass(slots=True)
class Writer:
    """Adds lines to a file of answers, a batch at a time."""

    out: Path
    root: ImageRoot
    made: Made
    size: int
    """Bytes of the file as this call left it."""
    lines: int = 0
    cut: int = 0

    def add(self, answers: Sequence[tuple[Key, Answered]]) -> None:
        """Append the lines of one batch; they are on their way to the disk when this returns.

        Raises:
            RunError: another process writes to the file.
        """
        text = ""
        for key, answer in answers:
            conversation = answer.conversation
            pictures = [picture_name(image, self.root, self.out, conversation.place) for image in conversation.images]
            text += as_line(conversation, key, pictures, answer.cut, self.made)
            self.lines, self.cut = self.lines + 1, self.cut + answer.cut
        if size_of(self.out) != self.size:
            raise RunError(
                f"{self.out} has changed since this command wrote to it; one process may write to it at a time; end the other one, and "
                "run the command again."
            )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("ab") as file:
            self.size += file.write(text.encode())


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0


def continued(
    teacher: Teacher,
    records: Sequence[Conversation],
    keys: Sequence[Key],
    before: Begun,
    settings: Generation,
    writer: Writer,
    advance: Steps,
) -> tuple[list[Refused], Writer]:
    """The records that got no line in this call; the lines of all others are written.

    Batches are the same wherever a call begins. One of which some lines are there already is asked as a whole again, so that the
    others are what they would have been even where rounding depends on the batch.
    """
    with part("load models"):
        model, processor = load_teacher(teacher, best_device()), load_processor(teacher.path)
    left_out: list[Refused] = []
    done = before.position
    try:
        for indices in chunks(range(len(records)), settings.batch_size):
            if indices[-1] < done:
                continue
            batch = [[of[index] for index in indices] for of in (records, keys)]
            answers = answer_records(model, processor, batch[0], batch[1], settings)
            new = [(keys[index], one) for index, one in zip(indices, answers, strict=True) if index >= done]
            left_out += [one for _, one in new if isinstance(one, Refused)]
            writer.add([(key, one) for key, one in new if isinstance(one, Answered)])
            done = indices[-1] + 1
            advance(done, len(records))
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"stopped after {done} of {len(records)} records; their answers are in {writer.out}: the same command resumes from there."
        ) from None
    return left_out, writer
