"""Reads data files into conversations: LLaVA-format JSON and JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align_ti.data.conversation import IMAGE_TAG, Conversation, Speaker, Turn
from align_ti.errors import DataError

SPEAKERS: Mapping[str, Speaker] = {"human": "user", "gpt": "assistant", "system": "system"}


def read_conversations(path: Path, images: Path | None = None) -> list[Conversation]:
    """All records of a LLaVA-format file (`.json`: one list; `.jsonl`: one object a line), in file order.

    Args:
        path: the data file.
        images: the folder that picture names are relative to; the data file's own folder if it is not given.

    Raises:
        DataError: the file or one of its records cannot be used; the message names the record.
    """
    path = Path(path)
    root = Path(images) if images is not None else path.parent
    if not root.is_dir():
        raise DataError(
            f"{path}: the image root {root} is not a folder; give the folder that picture names start from."
        )
    conversations = [read_record(record, place, root) for place, record in records(path)]
    if not conversations:
        raise DataError(f"{path}: no records found; at least one is needed; check that this is the right file.")
    return conversations


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each raw record of the file with its place."""
    if path.suffix not in {".json", ".jsonl"}:
        raise DataError(
            f"{path}: unknown kind of data file {path.suffix!r}; .json and .jsonl are accepted; convert it."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: the data file does not exist; check data.train and data.eval.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a readable file is accepted.") from error
    if path.suffix == ".jsonl":
        # Not `splitlines`: JSON strings may hold U+2028 and the like, which are no line ends in JSONL.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}, line {number}", parse(line, f"{path}, line {number}")
        return
    content = parse(text, str(path))
    if not isinstance(content, list):
        raise DataError(
            f"{path}: the top level is {type(content).__name__}; a list of records is accepted in .json (one object a "
            "line: name the file .jsonl)."
        )
    for number, record in enumerate(content, start=1):
        yield f"{path}, record {number}", record


def parse(text: str, place: str) -> Any:
    """The JSON value of the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; mend or remove it."
        ) from error


def read_record(record: Any, place: str, root: Path) -> Conversation:
    """One LLaVA record (`image`, `conversations`) as a conversation.

    An `image` of null or "" is a text-only record, as such files have them. A record whose text holds no `<image>` tag
    but which names exactly one picture is refused like every other mismatch: the picture's place is not guessed.
    """
    if not isinstance(record, dict):
        raise DataError(f"{place}: a record is {type(record).__name__}; an object is accepted.")
    if "id" in record:
        place = f"{place}, id {record['id']!r}"
    turns = record.get("conversations")
    if not isinstance(turns, list):
        raise DataError(
            f"{place}: 'conversations' is {type(turns).__name__}; a list of {{'from', 'value'}} objects is accepted."
        )
    return Conversation(
        turns=tuple(read_turn(turn, place, number) for number, turn in enumerate(turns, start=1)),
        images=tuple(image_path(name, place, root) for name in image_names(record.get("image"), place)),
        place=place,
        kind=str(record.get("kind") or record.get("category") or ""),
    )


def read_turn(turn: Any, place: str, number: int) -> Turn:
    """One `{"from", "value"}` object as a turn; line ends beside an image tag go with it, as in LLaVA's own reader."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(
            f"{place}: turn {number} is {turn!r:.80}; an object with 'from' and a text 'value' is accepted."
        )
    if turn.get("from") not in SPEAKERS:
        raise DataError(
            f"{place}: turn {number} is from unknown role {turn.get('from')!r}; accepted: {', '.join(SPEAKERS)}; "
            "rename the role."
        )
    text = turn["value"].replace(f"{IMAGE_TAG}\n", IMAGE_TAG).replace(f"\n{IMAGE_TAG}", IMAGE_TAG)
    return Turn(SPEAKERS[turn["from"]], text)


def image_names(value: Any, place: str) -> list[str]:
    """The record's picture names: none, one, or a list."""
    names = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise DataError(f"{place}: 'image' is {value!r:.80}; a file name or a list of file names is accepted.")
    return names


def image_path(name: str, place: str, root: Path) -> Path:
    """The picture's path, which must lie inside the image root."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"{place}: picture {name!r} lies outside the image root {root}; only pictures inside it are read; move the "
            "picture or choose a higher root."
        )
    return path
