"""Reads a benchmark's files; what is missing or wrong is told with the place it comes from. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.base import Item

GUIDE = "docs/Evaluation.md of LLaVA"
EVAL_ZIP = f"eval.zip ({GUIDE})"
"""Holds LLaVA's question files of every task."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file of a benchmark: the places where it may lie in the task's folder, and where it comes from."""

    names: tuple[str, ...]
    origin: str

    def path(self, folder: Path) -> Path:
        """The first of the places that exists.

        Raises:
            DataError: none exists.
        """
        found = next((folder / name for name in self.names if (folder / name).exists()), None)
        if found is None:
            others = f" (nor {' or '.join(self.names[1:])} in {folder})" if self.names[1:] else ""
            like = sorted(one.name for one in (folder / self.names[0]).parent.glob(f"*{Path(self.names[0]).suffix}"))
            there = f"; found {', '.join(like[:5])} there" if like else ""
            raise DataError(
                f"{folder / self.names[0]} does not exist{others}{there}; it comes from {self.origin}; put it there."
            )
        return found


def task_folder(folder: Path, name: str, first: Source) -> Path:
    """The task's own folder, given it, the `eval` folder that holds it, or the folder above that.

    Args:
        folder: what the user gave.
        name: the task's folder in LLaVA's layout.
        first: a file by which the folder is known.

    Raises:
        DataError: none of the three holds the file.
    """
    tried = (folder / name, folder, folder / "eval" / name)
    for one in tried:
        if any((one / file).exists() for file in first.names):
            return one
    there = next((one for one in (folder / name, folder / "eval" / name, folder) if one.is_dir()), None)
    if there is None:
        raise DataError(
            f"{folder} is no folder; the {name} folder of LLaVA's layout, or the folder that holds it, is accepted ({GUIDE})."
        )
    first.path(there)
    raise AssertionError("the file was missing above")


def read_json(path: Path, origin: str) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read or is no complete JSON.
    """
    return decoded(read_text(path), str(path), origin)


def decoded(text: str, place: str, origin: str) -> Any:
    """The JSON value of a text.

    Raises:
        DataError: it is no complete JSON, or has numbers or depths that no file of a benchmark has.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: no complete JSON ({error}); the file may be cut off; get it again from {origin}."
        ) from error


def read_lines(path: Path, origin: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSONL file, each with its place; empty lines are passed over.

    Raises:
        DataError: a line is no JSON object, or there is none.
    """
    empty = True
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        empty, place = False, f"{path}, line {number}"
        record = decoded(line, place, origin)
        if not isinstance(record, dict):
            raise DataError(
                f"{place}: {type(record).__name__} instead of an object; the file of {origin} has one per line."
            )
        yield record, place
    if empty:
        raise DataError(f"{path} is empty; get it again from {origin}.")


def read_text(path: Path) -> str:
    """A file's text; line ends of every kind become line feeds.

    Raises:
        DataError: it cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); a text file in UTF-8 is accepted.") from error


def field(record: Mapping[str, Any], name: str, place: str) -> str:
    """A field of a record as text; numbers become text.

    Raises:
        DataError: it is missing, or neither text nor a whole number.
    """
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        found = (
            f"is {value!r:.60}"
            if name in record
            else f"is missing (found {', '.join(map(str, record)) or 'no fields'})"
        )
        raise DataError(
            f"{place}: {name!r} {found}; text is accepted; this is not the file that the task asks for, or it is damaged."
        )
    return str(value)


def refuse_twice(items: Sequence[Item], origin: str) -> None:
    """Refuse two questions of one id.

    Raises:
        DataError: an id stands twice.
    """
    seen: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            raise DataError(
                f"{item.place}: the id {item.id!r:.80} stands in {seen[item.id]} too; ids are unique in the file of {origin}."
            )
        seen[item.id] = item.place
