"""A model's answers to training records: a file of them that is training data itself, joined with the records by place and words.

Each line of the file is an ordinary LLaVA record. Under `generated` it says who answered, how, and which record: the source's name,
the record's place in it, and a digest of its prompt, so that answers to data that changed since are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from align_ti.config import Data, Source
from align_ti.data.conversation import Conversation, Picture, StoredPicture, Turn
from align_ti.data.records import SPEAKERS, ImageRoot, read_turns, with_line_ends
from align_ti.data.sources import Refused, json_rows
from align_ti.errors import DataError, RunError

NAMES = {speaker: name for name, speaker in SPEAKERS.items()}
"""LLaVA's name of each speaker."""


class Key(NamedTuple):
    """What tells which record an answer belongs to. No part of it is a folder, so that data may be moved as a whole."""

    source: str
    """The name of the data file, folder or dataset."""
    record: str
    """The record's place in it, with its id if it has one."""
    prompt: str
    """A digest of the record without its answers."""


def source_name(source: Source) -> str:
    """The last part of the source's path."""
    return Path(source.path).name or source.path


def record_name(conversation: Conversation, source: Source) -> str:
    """The record's place inside its source, such as `record 3, id 7`."""
    return conversation.place.removeprefix(f"{Path(source.path)}, ").removeprefix(f"{source.path}, ")


def prompt_digest(conversation: Conversation) -> str:
    """A digest of what is said to the assistant, and of the images: files by their name, bytes of a table by what they are."""
    told = [[turn.speaker, turn.text] for turn in conversation.turns if turn.speaker != "assistant"]
    content = json.dumps([told, [picture_mark(image) for image in conversation.images]])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def picture_mark(image: Picture) -> str:
    """What tells the image from others, wherever the data lie."""
    if isinstance(image, Path):
        return image.name
    return hashlib.sha256(image.read() if isinstance(image, StoredPicture) else image.tobytes()).hexdigest()[:32]


def key_of(conversation: Conversation, source: Source) -> Key:
    """The key of a record of the source; bytes inside a table are read for it."""
    return Key(source_name(source), record_name(conversation, source), prompt_digest(conversation))


def own_generator(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on seed and names alone: numpy's default one, seeded with both (the names' SHA-256 as eight words)."""
    words = np.frombuffer(hashlib.sha256("\n".join(names).encode()).digest(), dtype="<u4")
    return np.random.default_rng(np.random.SeedSequence([seed, *words.tolist()]))


# --- written ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Made:
    """Who answered, and every setting that answers depend on."""

    model: str
    settings: Mapping[str, Any]


def head(made: Made) -> str:
    """How every line of a file begins."""
    return f'{{"generated": {json.dumps({"model": made.model, "settings": dict(made.settings)}, ensure_ascii=False)[:-1]}, '


def as_line(answered: Conversation, key: Key, pictures: Sequence[str], cut: bool, made: Made) -> str:
    """One line of a file of answers: an ordinary record of LLaVA's format.

    Args:
        answered: the record with the model's answers.
        key: which record it is.
        pictures: the names of its images.
        cut: whether one of its answers was cut at the token limit.
        made: who answered, and how.
    """
    record: dict[str, Any] = {"id": f"{key.source}, {key.record}"}
    if pictures:
        record["image"] = pictures[0] if len(pictures) == 1 else list(pictures)
    if answered.kind:
        record["kind"] = answered.kind
    record["conversations"] = [
        {"from": NAMES[turn.speaker], "value": with_line_ends(turn.text) if turn.speaker == "user" else turn.text}
        for turn in answered.turns
    ]
    about = json.dumps({**key._asdict(), "cut": cut}, ensure_ascii=False)[1:]
    return f"{head(made)}{about}, {json.dumps(record, ensure_ascii=False)[1:]}\n"


def picture_name(image: Picture, root: ImageRoot, out: Path, place: str) -> str:
    """The name that a record of the file gives an image: from the image root, or beside the file for bytes of a table.

    Such bytes are written there as they are, named by their digest.

    Raises:
        DataError: an image that is no file and lies in no table.
    """
    if isinstance(image, Path):
        assert root.folder is not None and root.resolved is not None
        if image.is_relative_to(root.folder) and ".." not in image.relative_to(root.folder).parts:
            return image.relative_to(root.folder).as_posix()
        # The record names it by an absolute path, or by a way round; it lies inside the root all the same.
        return image.resolve().relative_to(root.resolved).as_posix()
    if not isinstance(image, StoredPicture):
        raise DataError(
            f"{place}: an image is in memory only, so no line of {out.name} can name it; images in files or in tables are accepted; "
            "save it to a file."
        )
    content = image.read()
    with Image.open(io.BytesIO(content)) as opened:
        suffix = (opened.format or "bin").lower()
    name = f"{out.stem}-pictures/{picture_mark(image)}.{suffix}"
    path = out.parent / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        draft.write_bytes(content)
        draft.replace(path)
    return name


@dataclass(frozen=True, slots=True)
class Begun:
    """How far a file of answers came."""

    position: int = 0
    """Records, in the order in which they are asked, that are dealt with."""
    lines: int = 0
    """Of them, those with a line; the others had no usable answer."""
    cut: int = 0
    """Lines with a cut answer."""


def begun(path: Path, order: Sequence[Key], made: Made) -> Begun:
    """How far an earlier call came; half of a last line, which a kill can leave behind, is removed from the file.

    Args:
        path: the file; it may be missing.
        order: the records in the order in which they are asked.
        made: who answers now, and how.

    Raises:
        RunError: the file holds something else, or answers of another model, by other settings or to other data. It is left as it is.
    """
    if not path.exists():
        return Begun()
    positions, position, lines, cut, stop = {key: index for index, key in enumerate(order)}, 0, 0, 0, 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if not raw.endswith(b"\n"):
                start = head(made).encode()
                if not (raw.startswith(start) or start.startswith(raw)):
                    raise not_ours(place, path)
                break
            told = generated_in(parsed(raw))
            if told is None:
                raise not_ours(place, path)
            differ = [
                f"{name} is {was!r} there and {now!r} here"
                for name, was, now in differences({"model": told.get("model"), **settings_in(told)}, made)
            ]
            if differ:
                raise RunError(
                    f"{place}: the file has answers with other settings ({'; '.join(differ)}); it can be resumed only with the "
                    "same model and settings; choose another file (--out), or remove this one."
                )
            key = Key(*(str(told.get(name)) for name in Key._fields))
            at = positions.get(key, -1)
            if at < position:
                raise RunError(
                    f"{place}: this answer belongs to {key.record} of {key.source}, but that record is missing, changed or in another "
                    "order, so the data changed after generation; restore them, choose another file (--out), or remove this one."
                )
            position, lines, cut, stop = at + 1, lines + 1, cut + bool(told.get("cut")), stop + len(raw)
    if stop < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(stop)
    return Begun(position, lines, cut)


def parsed(line: bytes) -> Any:
    """The JSON value of a line, or None if it is none."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def generated_in(record: Any) -> Mapping[str, Any] | None:
    """What a line says about its making, or None if it is no line of `align-ti generate`."""
    told = record.get("generated") if isinstance(record, dict) else None
    return told if isinstance(told, dict) else None


def settings_in(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a line says, none if they are not told."""
    settings = told.get("settings")
    return settings if isinstance(settings, dict) else {}


def differences(before: Mapping[str, Any], made: Made) -> Iterable[tuple[str, Any, Any]]:
    """What differs between the making of a line and a making now: name, then, now."""
    now = {"model": made.model, **made.settings}
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            yield name, before.get(name), now.get(name)


def not_ours(place: str, path: Path) -> RunError:
    """The error for a file that holds something else."""
    return RunError(
        f"{place}: no line of `align-ti generate`; nothing is written over; choose another file than {path.name} (--out), or remove it."
    )


# --- joined -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What a file says in answer to one record, turn by turn."""

    place: str
    turns: tuple[str, ...]
    cut: bool


class Answers:
    """The answers in one or several files, found by the records that they answer.

    Args:
        paths: the files.

    Raises:
        DataError: a file cannot be read, holds another kind of records, or two answers to one record.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = tuple(map(str, paths))
        self.found: dict[tuple[str, str], dict[str, Answer]] = {}
        for path in map(Path, self.paths):
            if path.suffix != ".jsonl":
                raise DataError(
                    f"{path}: data.answers accepts what `align-ti generate` wrote (.jsonl); give that file."
                )
            for place, raw in json_rows(path):
                self.add(place, raw)

    def add(self, place: str, raw: Any) -> None:
        """Take one line in.

        Raises:
            DataError: it is none of `align-ti generate`, or answers a record again in other words.
        """
        if isinstance(raw, DataError):
            raise DataError(f"{raw} The same `align-ti generate` command resumes an unfinished file.") from raw
        told = generated_in(raw) or {}
        names, cut = [told.get(name) for name in Key._fields], told.get("cut")
        if not all(isinstance(name, str) for name in names) or not isinstance(cut, bool):
            raise DataError(
                f"{place}: the record does not say what it answers; lines of `align-ti generate` are accepted ('source', 'record', "
                "'prompt' and 'cut' under 'generated'); give that file, or use this one as data.train."
            )
        key = Key(*map(str, names))
        texts = tuple(turn.text for turn in read_turns(raw.get("conversations"), place) if turn.speaker == "assistant")
        known = self.found.setdefault((key.source, key.record), {})
        before = known.setdefault(key.prompt, Answer(place, texts, cut))
        if before.turns != texts:
            raise DataError(
                f"{place}: another answer to {key.record} of {key.source} than in {before.place}; one answer to a record is accepted; "
                "remove one of them, or name one file for each source in data.answers."
            )

    def to(self, conversation: Conversation, source: Source) -> Answer:
        """The answer to a record of the source.

        Raises:
            DataError: there is none, it is to other words, or it was cut.
        """
        key, files = key_of(conversation, source), ", ".join(self.paths)
        known = self.found.get((key.source, key.record), {})
        if key.prompt in known:
            answer = known[key.prompt]
            if answer.cut:
                raise DataError(
                    f"{conversation.place}: the answer in {answer.place} was cut at the token limit, so it has no end to learn; whole "
                    "answers are accepted; generate with a larger --max-new-tokens, or set data.on_bad_record: skip to leave such "
                    "records out."
                )
            return answer
        if known:
            (place, *_) = (answer.place for answer in known.values())
            raise DataError(
                f"{conversation.place}: the answer in {place} is to other text or images than this record has now; answers to the "
                f"same are accepted; restore the data, or run `align-ti generate` on {source.path} again."
            )
        has = sum(name == key.source for name, _ in self.found)
        raise DataError(
            f"{conversation.place}: no answer in {files}, which has {has} answer(s) to records of {key.source}; one to each record is "
            f"needed; run `align-ti generate` on {source.path} (again if it was stopped; a record to which the model said nothing gets "
            "none), or set data.on_bad_record: skip to leave such records out."
        )


def takes_teacher(conversation: Conversation, source: Source, seed: int, share: float) -> bool:
    """Whether a record takes the teacher's answers: decided by seed, source and place alone, so the same in every process and call.

    A record that does so at one share does so at every larger one.
    """
    return bool(own_generator(seed, source_name(source), record_name(conversation, source)).random() < share)


def with_responses(
    conversations: Sequence[Conversation],
    source: Source,
    data: Data,
    seed: int,
    answers: Answers,
    refuse: Callable[[Refused], None],
) -> list[Conversation]:
    """The records of a source with the responses that the recipe asks for.

    Args:
        conversations: the records as they were read.
        source: where they came from.
        data: says whose responses are learned.
        seed: decides who answers which record, where responses are mixed.
        answers: the teacher's answers.
        refuse: called with each record that should have a teacher's answer and has no usable one.
    """
    result = []
    for conversation in conversations:
        if data.responses == "mixed" and not takes_teacher(conversation, source, seed, data.teacher_share):
            result.append(conversation)
            continue
        try:
            result.append(answered(conversation, answers.to(conversation, source)))
        except DataError as error:
            refuse(Refused(conversation.place, str(error)))
    return result


def answered(conversation: Conversation, answer: Answer) -> Conversation:
    """The record with the answer's turns in place of its own, behind each user turn one.

    Raises:
        DataError: there are more or fewer of them than user turns, or one cannot be a response.
    """
    asked = sum(turn.speaker == "user" for turn in conversation.turns)
    place = f"{conversation.place}, answered in {answer.place}"
    if asked != len(answer.turns):
        raise DataError(
            f"{place}: {len(answer.turns)} answer(s) to {asked} user turn(s); one to each is accepted; generate the file again."
        )
    said, turns = iter(answer.turns), list[Turn]()
    for turn in conversation.turns:
        if turn.speaker != "assistant":
            turns.append(turn)
        if turn.speaker == "user":
            turns.append(Turn("assistant", next(said)))
    return replace(conversation, turns=tuple(turns), place=place, responses="teacher")
