"""A benchmark of one's own without code: a JSONL file of questions, images and references, and a scorer. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from align_ti.data.conversation import IMAGE_TAG
from align_ti.data.records import ImageRoot
from align_ti.errors import ConfigError, DataError
from align_ti.evaluation.benchmarks.answers import check, notes_on, with_kinds
from align_ti.evaluation.benchmarks.base import Benchmark, Item, Report
from align_ti.evaluation.benchmarks.files import field, read_lines, refuse_twice
from align_ti.evaluation.scoring import SCORERS

FILE = "questions.jsonl"
ORIGIN = "your own questions"
FIELDS = ("id", "question", "image", "images", "answer", "answers", "kind", "scorer")


class Own(Benchmark):
    """One's own questions.

    Args:
        scorer: scores every question that names no scorer of its own.

    Raises:
        ConfigError: there is no scorer of that name.
    """

    name = "own"
    title = "One's own"
    max_new_tokens = 128

    def __init__(self, scorer: str = "exact") -> None:
        if scorer not in SCORERS:
            raise ConfigError(unknown_scorer(scorer))
        self.scorer = scorer

    def items(self, folder: Path) -> list[Item]:
        """The lines of a JSONL file: given itself, or the one named `questions.jsonl` or standing alone in a folder (or its `own`).

        Images are relative to the file's folder.
        """
        path = question_file(folder)
        root = ImageRoot(path.parent)
        items = [self.read_item(record, place, root) for record, place in read_lines(path, ORIGIN)]
        refuse_twice(items, ORIGIN)
        return items

    def read_item(self, record: Mapping[str, Any], place: str, root: ImageRoot) -> Item:
        """One question.

        Raises:
            DataError: a field is missing, unknown or of the wrong type, or the scorer cannot use the references.
        """
        unknown = [name for name in record if name not in FIELDS]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), FIELDS, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(f"{place}: unknown field {unknown[0]!r}; accepted: {', '.join(FIELDS)}{meant}")
        id, text = field(record, "id", place), field(record, "question", place)
        if IMAGE_TAG in text:
            raise DataError(
                f"{place}: {IMAGE_TAG} in the question; images stand in front of it by themselves; take the tag away."
            )
        images = texts(record, "image", "images", place, needed=False)
        answers = texts(record, "answer", "answers", place, needed=True)
        scorer = field(record, "scorer", place) if "scorer" in record else self.scorer
        if scorer not in SCORERS:
            raise DataError(f"{place}: {unknown_scorer(scorer)}")
        try:
            SCORERS[scorer]("", answers)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        return Item(
            id=id,
            text=text,
            images=tuple(root.path(image, place) for image in images),
            cluster="|".join(images) or id,
            kind=field(record, "kind", place) if "kind" in record else "",
            reference={"answers": answers, "scorer": scorer},
            place=place,
        )

    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        """The mean of the scorer's values, over all questions and by kind. There is no original to be strict about."""
        check(items, predictions, self.title)
        right = {
            item.id: SCORERS[item.reference["scorer"]](predictions[item.id], item.reference["answers"])
            if item.id in predictions
            else 0.0
            for item in items
        }
        return Report(with_kinds("score", items, right), "score", right, tuple(notes_on(items, predictions, 0)))


def unknown_scorer(name: str) -> str:
    """The sentence about a scorer that there is none of."""
    close = difflib.get_close_matches(name, SCORERS, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"no scorer is named {name!r}; accepted: {', '.join(SCORERS)}{meant}"


def question_file(folder: Path) -> Path:
    """The file of questions.

    Raises:
        DataError: there is none, or several.
    """
    if folder.is_file():
        return folder
    folder = folder / "own" if (folder / "own").is_dir() else folder
    if (folder / FILE).is_file():
        return folder / FILE
    found = sorted(folder.glob("*.jsonl"))
    if len(found) != 1:
        raise DataError(
            f"{folder}: {len(found)} .jsonl files ({', '.join(one.name for one in found[:5]) or 'none'}); accepted: a file of "
            f"questions, or a folder with one named {FILE} or with one alone; give the file."
        )
    return found[0]


def texts(record: Mapping[str, Any], one: str, several: str, place: str, needed: bool) -> list[str]:
    """The texts of a field that may be one or a list, under one of two names; numbers become text.

    Raises:
        DataError: both are there, or none although one is needed, or one is empty or no text.
    """
    given = [name for name in (one, several) if record.get(name) is not None]
    if len(given) > 1 or (needed and not given):
        raise DataError(
            f"{place}: {' and '.join(given) or 'neither'} of {one!r} and {several!r}; exactly one is accepted."
        )
    if not given:
        return []
    value = record[given[0]]
    values = value if isinstance(value, list) else [value]
    if needed and not values:
        raise DataError(f"{place}: {given[0]!r} is empty; at least one reference is accepted.")
    # A number with decimals is text too, as `numeric` wants it; JSON in Python also has NaN and Infinity.
    plain = [str(one) if isinstance(one, float) and isfinite(one) else one for one in values]
    found = [field({given[0]: text}, given[0], place) for text in plain]
    if not all(text.strip() for text in found):
        raise DataError(f"{place}: {given[0]!r} holds an empty text; a text of at least one character is accepted.")
    return found
