"""MMBench: questions of several choices, each asked in several orders of its options, right only if all are. Imports no torch."""

from __future__ import annotations

import base64
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from align_ti.data.conversation import StoredPicture
from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.answers import check, notes_on
from align_ti.evaluation.benchmarks.base import Benchmark, Item, Report
from align_ti.evaluation.benchmarks.files import GUIDE, Source, refuse_twice, task_folder
from align_ti.evaluation.metrics import mean_of
from align_ti.evaluation.scoring import mmbench_choice

QUESTIONS = Source(
    ("mmbench_dev_20230712.tsv",),
    "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv",
)
OPTIONS = "ABCD"
COLUMNS = ("index", "question", "A", "B", "answer", "image")
"""Without one of these the file is another one."""
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
CHINESE_SUFFIX = "\n请直接回答选项字母。"
INDEX = re.compile(r"[0-9]{1,18}")
ROTATION = 1_000_000
"""A rotation's index is its base question's plus a multiple of it."""
REFERENCE = 64
"""An image of fewer characters is the index of the row that holds it."""
MISSING = "#N/A,#N/A N/A,#NA,-1.#IND,-1.#QNAN,-NaN,-nan,1.#IND,1.#QNAN,<NA>,N/A,NA,NULL,NaN,None,n/a,nan,null"
"""Cells that pandas, by which the original reads, takes for missing."""
PUBLISHED = 4377


class MmBench(Benchmark):
    """MMBench (dev, English, July 2023) by LLaVA's protocol, scored circularly by exact matching."""

    name = "mmbench"
    title = "MMBench"
    max_new_tokens = 1024

    def items(self, folder: Path) -> list[Item]:
        """The rows of `mmbench_dev_20230712.tsv`, rotations included. Another version's file is taken if it is given itself."""
        path = folder if folder.is_file() else QUESTIONS.path(task_folder(folder, "mmbench", QUESTIONS))
        rows = list(read_rows(path))
        images = {row["index"]: row["image"] for row, _ in rows}
        suffix = CHINESE_SUFFIX if "_cn_" in path.name else SUFFIX
        items = []
        for row, place in rows:
            if row.get("answer") not in set(OPTIONS):
                raise DataError(
                    f"{place}: the answer is {row.get('answer', '')!r:.40}; a letter of {OPTIONS} is accepted (a test split has none, "
                    f"its answers are on a server); get the dev split from {QUESTIONS.origin}."
                )
            if not INDEX.fullmatch(row["index"]):
                raise DataError(
                    f"{place}: the index is {row['index']!r:.40}; a whole number of at most 18 digits is accepted."
                )
            image = row["image"]
            if len(image) <= REFERENCE:
                image = images.get(image, "")
            if len(image) <= REFERENCE:
                raise DataError(
                    f"{place}: no image in column image; base64, or the index of the row that holds it, is accepted; get the file "
                    f"again from {QUESTIONS.origin}."
                )
            base = int(row["index"]) % ROTATION
            items.append(
                Item(
                    id=row["index"],
                    text=prompt(row) + suffix,
                    images=(StoredPicture(f"{place}, column image", partial(bytes_of, image, place)),),
                    cluster=str(base),
                    kind=row.get("l2-category", ""),
                    reference={
                        "answer": row["answer"],
                        "choices": {letter: row[letter] for letter in OPTIONS if row.get(letter)},
                        "category": row.get("category", ""),
                        "file": path.name,
                    },
                    place=place,
                )
            )
        refuse_twice(items, QUESTIONS.origin)
        return items

    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        """Circular accuracy, over all questions and by the categories of the second level. Strictly it is the same."""
        check(items, predictions, self.title)
        notes = notes_on(items, predictions, PUBLISHED)
        file = items[0].reference["file"]
        if file != QUESTIONS.names[0]:
            notes.append(
                f"The questions are those of {file}, not of {QUESTIONS.names[0]}, by which the paper's table is made."
            )
        right = {}
        for item in items:
            said, reference = predictions.get(item.id), item.reference
            choice = None if said is None else mmbench_choice(said, reference["choices"])
            right[item.id] = float(choice == reference["answer"])
        hits: dict[str, float] = {}
        for item in items:
            hits[item.cluster] = min(hits.get(item.cluster, 1.0), right[item.id])
        kind = {item.cluster: item.kind for item in reversed(items)}
        metrics = {"circular": mean_of(list(hits.values()), list(hits))}
        for name in dict.fromkeys(kind[cluster] for cluster in hits if kind[cluster]):
            of = [cluster for cluster in hits if kind[cluster] == name]
            metrics[name] = mean_of([hits[cluster] for cluster in of], of)
        return Report(metrics, "circular", right, tuple(notes))


def read_rows(path: Path) -> Iterator[tuple[dict[str, str], str]]:
    """The rows of the table by column, missing cells empty, each with its place.

    Raises:
        DataError: the file is no such table, or is cut off.
    """
    missing = MISSING.split(",")
    before = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t")
            header = next(lines, [])
            absent = [name for name in COLUMNS if name not in header]
            if absent:
                raise DataError(
                    f"{path}: no column {', '.join(absent)} (found {', '.join(header)[:100] or 'none'}); get the file from "
                    f"{QUESTIONS.origin} ({GUIDE})."
                )
            number = 0
            for number, cells in enumerate(lines, start=1):
                place = f"{path}, row {number}"
                if len(cells) != len(header):
                    raise DataError(
                        f"{place}: {len(cells)} cells under {len(header)} columns; the file is cut off or damaged; get it again from "
                        f"{QUESTIONS.origin}."
                    )
                row = dict(zip(header, ("" if cell in missing else cell for cell in cells), strict=True))
                yield row, f"{place}, index {row['index']}"
            if not number:
                raise DataError(f"{path}: no rows; get the file again from {QUESTIONS.origin}.")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); get the file again from {QUESTIONS.origin}.") from error
    finally:
        csv.field_size_limit(before)


def bytes_of(image: str, place: str) -> bytes:
    """The image's file.

    Raises:
        DataError: it is no base64.
    """
    try:
        return base64.b64decode(image)
    except ValueError as error:
        raise DataError(
            f"{place}: the image in column image cannot be read ({error}); base64 is accepted; get the file again from "
            f"{QUESTIONS.origin}."
        ) from error


def prompt(row: Mapping[str, str]) -> str:
    """The question behind its hint, and the options up to the first that is missing.

    An option that reads "None" is missing too, as for the original: what the published models were asked.
    """
    lines = [row["question"]] if is_none(row.get("hint", "")) else [row["hint"], row["question"]]
    for letter in OPTIONS:
        option = row.get(letter, "")
        if is_none(option):
            break
        lines.append(f"{letter}. {option}")
    return "\n".join(lines)


def is_none(cell: str) -> bool:
    """Whether a cell counts as missing in a prompt."""
    return not cell or cell.lower() in ("nan", "none")
