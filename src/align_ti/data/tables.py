"""Parquet files, saved datasets and hub datasets, read through Hugging Face datasets; images stay where they are until asked for."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetsError

from align_ti.config import Source
from align_ti.data.conversation import StoredPicture
from align_ti.errors import DataError

PICTURES = ("image", "images")
"""Columns whose bytes are left in the table."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

FILES = frozenset({".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".yaml", ".gz", ".zip", ".tar"})
"""Endings of files, so that a file that is missing is not looked for on the hub."""

BATCH = 256
"""Rows read at a time."""


def on_hub(path: str) -> bool:
    """Whether the path can be a hub name: owner/name, and nothing of that name is here."""
    return bool(HUB_NAME.fullmatch(path)) and not Path(path).exists() and Path(path).suffix.lower() not in FILES


def table_rows(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row of the source with its place; images are named, not read.

    Raises:
        DataError: the source cannot be loaded, or its split is not told.
    """
    table = load(source, stream=False)
    number = 0
    for batch in table.with_format("arrow").iter(batch_size=BATCH):
        for index in range(batch.num_rows):
            place = f"{source.path}, row {number + 1}"
            row = {
                name: held(batch[name][index], table, number, name, place)
                if name in PICTURES
                else batch[name][index].as_py()
                for name in batch.column_names
            }
            yield place, row
            number += 1


def streamed_rows(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row of the source with its place, read as it is needed; images come as the bytes of their files."""
    # By `iter`: datasets' own iterator gives each worker of a loader its share of the files, and a stream has shares of its own.
    rows = load(source, stream=True).decode(False).iter(batch_size=1)
    for number, row in enumerate(rows, start=1):
        yield f"{source.path}, row {number}", {name: values[0] for name, values in row.items()}


def load(source: Source, stream: bool) -> Any:
    """The one split of the source as a dataset, or as an iterable one."""
    path = Path(source.path)
    try:
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(source.path)
        elif path.is_dir() or path.suffix == ".parquet":
            # datasets reads names as patterns.
            named = glob.escape(source.path)
            files = {"data_dir": named} if path.is_dir() else {"data_files": named}
            if path.is_dir():
                check_every_file(path, datasets.load_dataset_builder("parquet", **files).config.data_files)
            found = datasets.load_dataset("parquet", **files, streaming=stream)
        else:
            found = datasets.load_dataset(source.path, source.subset, streaming=stream)
    except (DatasetsError, OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{source.path}: cannot be loaded as a dataset ({shortened(error)}); accepted: a .parquet file, a folder of save_to_disk "
            "or of parquet files, or the name of a dataset on the hub (owner/name); check path, subset and connection."
        ) from error
    one = the_split(found, source)
    return one.to_iterable_dataset() if stream and isinstance(one, datasets.Dataset) else one


def check_every_file(folder: Path, taken: Any) -> None:
    """Refuse a folder of which datasets leaves files out: where one file is named after a split, it passes over those that are not.

    Raises:
        DataError: the first files that would be left out are named.
    """
    read = {Path(str(file)).resolve() for files in (taken or {}).values() for file in files}
    hidden = (file for file in folder.rglob("*.parquet") if not file.name.startswith((".", "_")))
    left = sorted(str(file.relative_to(folder)) for file in hidden if file.resolve() not in read)
    if left:
        raise DataError(
            f"{folder}: {len(left)} of the parquet files belong to no split ({', '.join(left[:3])}), since others are named after one "
            "(train, test, ...) and these are not; name all of them after splits, or none, or name one file as the source."
        )


def the_split(found: Any, source: Source) -> Any:
    """The split that the source names, or the only one."""
    if not isinstance(found, dict):
        if source.split is not None:
            raise DataError(
                f"{source.path}: split is {source.split!r}, but the dataset has no splits; leave split out."
            )
        return found
    if source.split is None and len(found) == 1:
        return next(iter(found.values()))
    if source.split not in found:
        raise DataError(
            f"{source.path}: split is {source.split!r}; accepted: {', '.join(map(repr, found))}; name one of them (split of a source, "
            "or data.eval_split)."
        )
    return found[source.split]


def shortened(error: BaseException) -> str:
    """The first line of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def held(scalar: Any, table: Any, row: int, column: str, place: str) -> Any:
    """The value of a column of images: names as they are, bytes as images that are read when asked for."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pyarrow.ListScalar | pyarrow.LargeListScalar):
        return [
            stored(one, table, row, column, number, f"{place}, {column}[{number}]")
            for number, one in enumerate(scalar.values)
        ]
    return stored(scalar, table, row, column, None, f"{place}, {column}")


def stored(scalar: Any, table: Any, row: int, column: str, number: int | None, name: str) -> Any:
    """One image of a table: its bytes where they are, or what the table holds instead of them."""
    inside = isinstance(scalar, pyarrow.StructScalar) and "bytes" in scalar and scalar["bytes"].is_valid
    if inside or (
        isinstance(scalar, pyarrow.BinaryScalar | pyarrow.LargeBinaryScalar)
        and not isinstance(scalar, pyarrow.StringScalar)
    ):
        return StoredPicture(name, partial(cell, table, row, column, number))
    return scalar.as_py()


def cell(table: Any, row: int, column: str, number: int | None) -> bytes:
    """The bytes of one image of a table."""
    scalar = table.with_format("arrow")[row][column][0]
    if number is not None:
        scalar = scalar.values[number]
    content: bytes = (scalar["bytes"] if isinstance(scalar, pyarrow.StructScalar) else scalar).as_py()
    return content
