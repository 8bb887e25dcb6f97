"""Align-TI's own digits: the test or validation split that `align-ti digits` writes, exact match. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from align_ti.data.conversation import IMAGE_TAG
from align_ti.data.records import ImageRoot
from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.answers import check, notes_on, with_kinds
from align_ti.evaluation.benchmarks.base import Benchmark, Item, Report
from align_ti.evaluation.benchmarks.files import Source, field, read_json, refuse_twice, task_folder
from align_ti.evaluation.scoring import is_right

ORIGIN = "align-ti digits --out FOLDER"


class Digits(Benchmark):
    """The digits benchmark: its test split, for results that are reported."""

    name = "digits"
    title = "Digits"
    max_new_tokens = 128
    source: ClassVar[Source] = Source(("test.json",), ORIGIN)

    def items(self, folder: Path) -> list[Item]:
        """The questions of the split's file with the images beside it."""
        folder = task_folder(folder, "digits", self.source)
        path, root = self.source.path(folder), ImageRoot(folder)
        records = read_json(path, ORIGIN)
        if not isinstance(records, list) or not records:
            raise DataError(f"{path}: no list of records; write the file by {ORIGIN}.")
        items = []
        for number, record in enumerate(records, start=1):
            place = f"{path}, record {number}"
            turns = record.get("conversations") if isinstance(record, dict) else None
            if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
                raise DataError(f"{place}: no question and answer; write the file by {ORIGIN}.")
            image = field(record, "image", place)
            items.append(
                Item(
                    id=field(record, "id", place),
                    text=field(turns[0], "value", place).replace(IMAGE_TAG, "").strip(),
                    images=(root.path(image, place),),
                    cluster=image,
                    kind=field(record, "kind", place),
                    reference={"answer": field(turns[1], "value", place)},
                    place=place,
                )
            )
        refuse_twice(items, ORIGIN)
        return items

    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        """Exact match of whole answers, over all questions and by kind. Strictly it is the same."""
        check(items, predictions, self.title)
        right = {
            item.id: float(item.id in predictions and is_right(predictions[item.id], item.reference["answer"]))
            for item in items
        }
        return Report(with_kinds("accuracy", items, right), "accuracy", right, tuple(notes_on(items, predictions, 0)))


class DigitsValidation(Digits):
    """Its validation split, for choosing: no scan of a digit in it stands in the test split."""

    name = "digits_validation"
    title = "Digits, validation"
    source = Source(("validation.json",), ORIGIN)
