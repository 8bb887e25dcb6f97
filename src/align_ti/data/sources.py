"""Reads sources of any kind into conversations: LLaVA JSON and JSONL, parquet, saved datasets, hub datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_ti.config import Source
from align_ti.data.conversation import Conversation
from align_ti.data.records import ImageRoot, read_record
from align_ti.errors import DataError


@dataclass(frozen=True, slots=True)
class Refused:
    """A record that cannot be used, and why."""

    place: str
    reason: str


def stop(refused: Refused) -> None:
    """The way a refused record is taken by default: as an error."""
    raise DataError(refused.reason)


def read_conversations(path: Path | str, images: Path | str | None = None) -> list[Conversation]:
    """All records of a source, in order; formats are recognised by content.

    Args:
        path: a file (.json, .jsonl, .parquet), a folder of datasets, or a hub name.
        images: the folder that image names are relative to; by default the data file's own folder.

    Raises:
        DataError: the source or one of its records cannot be used; the message names the record.
    """
    source = Source(path=str(path), images=None if images is None else str(images))
    return read_source(source, image_root(source))


def read_source(source: Source, root: ImageRoot, refuse: Callable[[Refused], None] = stop) -> list[Conversation]:
    """All records of a source, in order.

    Args:
        source: what to read and how.
        root: where its images lie; it counts those found under another extension.
        refuse: called with each record that cannot be used; by default an error.

    Raises:
        DataError: the source cannot be used, or holds no usable record.
    """
    refused: list[Refused] = []

    def noted(one: Refused) -> None:
        refused.append(one)
        refuse(one)

    conversations = list(iterate(source, root, noted))
    if not conversations and refused:
        raise DataError(
            f"{source.path}: all {len(refused)} records cannot be used; at least one is needed; the first: {refused[0].reason}"
        )
    if not conversations:
        raise DataError(f"{source.path}: no records found; at least one is needed; check that this is the right file.")
    return conversations


def iterate(
    source: Source, root: ImageRoot, refuse: Callable[[Refused], None] = stop, *, stream: bool = False
) -> Iterator[Conversation]:
    """The source's records one by one."""
    for place, raw in rows(source, stream):
        try:
            if isinstance(raw, DataError):
                raise raw
            conversation = read_record(raw, place, root, source.format)
        except DataError as error:
            refuse(Refused(place, str(error)))
        else:
            yield conversation


def image_root(source: Source, otherwise: str | None = None) -> ImageRoot:
    """The source's image root: its own, the one given for all, or where the data file lies.

    Raises:
        DataError: it is no folder.
    """
    path, named = Path(source.path), source.images or otherwise
    if named is not None:
        folder = Path(named)
    elif path.suffix in {".json", ".jsonl", ".parquet"}:
        folder = path.parent
    elif path.is_dir():
        folder = path
    else:
        return ImageRoot(None, source.find_extension)
    if named is None and path.suffix in {".json", ".jsonl"} and not folder.is_dir():
        raise DataError(f"{path}: the data file does not exist; check data.train and data.eval.")
    if not folder.is_dir():
        raise DataError(
            f"{path}: the image root {folder} is not a folder; give the folder that image names start from."
        )
    return ImageRoot(folder, source.find_extension)


def rows(source: Source, stream: bool = False) -> Iterator[tuple[str, Any]]:
    """Each raw record of the source with its place; an error in place of a line that is no JSON."""
    path = Path(source.path)
    if path.suffix in {".json", ".jsonl"}:
        if source.split is not None or source.subset is not None:
            raise DataError(
                f"{path}: split and subset are accepted for datasets only; a {path.suffix} file has neither."
            )
        yield from json_rows(path)
        return
    # Imported where it is needed: it takes longer than everything else here.
    from align_ti.data.tables import on_hub, streamed_rows, table_rows

    if not path.exists() and not on_hub(source.path):
        if path.suffix and path.suffix != ".parquet":
            raise unknown_kind(path)
        raise DataError(f"{path}: the data file does not exist; check data.train and data.eval.")
    if path.is_file() and path.suffix != ".parquet":
        raise unknown_kind(path)
    yield from streamed_rows(source) if stream else table_rows(source)


def unknown_kind(path: Path) -> DataError:
    """The error for a file of another kind."""
    return DataError(
        f"{path}: unknown kind of data file {path.suffix!r}; accepted: .json, .jsonl, .parquet, folders of datasets, and hub names "
        "(owner/name); convert it."
    )


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a JSON or JSONL file."""
    try:
        yield from json_lines(path) if path.suffix == ".jsonl" else json_list(path)
    except FileNotFoundError:
        raise DataError(f"{path}: the data file does not exist; check data.train and data.eval.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a readable file is accepted.") from error


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """One record a line."""
    # Only "\n" ends a line: JSON strings may hold U+2028 and the like, which are no line ends in JSONL.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if line.strip():
                try:
                    yield place, parse(line, place)
                except DataError as error:
                    yield place, error


def json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of the one list in the file."""
    content = parse(path.read_text(encoding="utf-8-sig"), str(path))
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
        hint = "; one object a line: name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{place}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; fix or remove it{hint}."
        ) from error
    except ValueError as error:
        raise DataError(f"{place}: not usable JSON: {error}; fix or remove it.") from error
    except RecursionError:
        raise DataError(f"{place}: not usable JSON: nested too deeply; a list of flat records is accepted.") from None
