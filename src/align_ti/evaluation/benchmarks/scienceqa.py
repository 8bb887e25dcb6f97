"""ScienceQA: school questions of several choices, some with an image; the letter alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align_ti.data.conversation import IMAGE_TAG
from align_ti.data.records import ImageRoot
from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.answers import check, mean_over, notes_on, tidy, zero_note
from align_ti.evaluation.benchmarks.base import Benchmark, Item, Report
from align_ti.evaluation.benchmarks.files import (
    EVAL_ZIP,
    Source,
    field,
    read_json,
    refuse_twice,
    task_folder,
)
from align_ti.evaluation.scoring import scienceqa_choice

REPOSITORY = "data/scienceqa of https://github.com/lupantech/ScienceQA"
QUESTIONS = Source(("llava_test_CQM-A.json",), EVAL_ZIP)
PROBLEMS = Source(("problems.json",), REPOSITORY)
SPLITS = Source(("pid_splits.json",), REPOSITORY)
SPLIT = "test"
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
PUBLISHED = 4241


class ScienceQa(Benchmark):
    """ScienceQA by LLaVA's protocol: all questions are asked, those with an image make the score that tables show."""

    name = "sqa"
    title = "ScienceQA"
    max_new_tokens = 1024

    def items(self, folder: Path) -> list[Item]:
        """The questions of `llava_test_CQM-A.json` with the answers of `problems.json`, for the test split of `pid_splits.json`."""
        folder = task_folder(folder, "scienceqa", QUESTIONS)
        path, problems_path, splits_path = (one.path(folder) for one in (QUESTIONS, PROBLEMS, SPLITS))
        records, problems = read_json(path, QUESTIONS.origin), read_json(problems_path, REPOSITORY)
        splits = read_json(splits_path, REPOSITORY)
        if not isinstance(records, list) or not isinstance(problems, dict):
            raise DataError(
                f"{path} is a list and {problems_path} an object in the published files; found {type(records).__name__} and "
                f"{type(problems).__name__}; get them from {QUESTIONS.origin} and {REPOSITORY}."
            )
        if not isinstance(splits, dict) or not isinstance(splits.get(SPLIT), list):
            raise DataError(f"{splits_path}: no list {SPLIT!r}; get the file from {REPOSITORY}.")
        split = {str(id) for id in splits[SPLIT]}
        root = ImageRoot(folder / "images" / SPLIT)
        items = [
            read_item(record, f"{path}, record {number}", problems, problems_path, split, splits_path, root)
            for number, record in enumerate(records, start=1)
        ]
        refuse_twice(items, QUESTIONS.origin)
        unasked = sorted(split - {item.id for item in items})
        if unasked:
            raise DataError(
                f"{path}: {len(unasked)} of the {len(split)} questions of {splits_path} are not in it (the first: {unasked[0]!r}); the "
                f"two differ in version or the former is cut off; get it again from {QUESTIONS.origin}."
            )
        return items

    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        """Accuracy over the questions with an image, and over all.

        Strictly, a missing prediction leaves the questions with an image, since the original tells them by the answer's prompt; and
        nothing is tidied.
        """
        check(items, predictions, self.title)
        missing = "wrong, and not among those with an image, as by the original" if strict_original else ""
        notes = notes_on(items, predictions, PUBLISHED, missing)
        right = {}
        for item in items:
            said = predictions.get(item.id)
            text = "" if said is None else said if strict_original else tidy(said)
            right[item.id] = float(scienceqa_choice(text, item.reference["choices"]) == item.reference["answer"])
        seen = [item for item in items if item.kind == "image" and (item.id in predictions or not strict_original)]
        if not seen:
            notes.append(zero_note("image", "are no questions with an image"))
            if strict_original:
                raise DataError(
                    f"{self.title}: no answered question has an image, so the original divides by zero; score without strict_original."
                )
        metrics = {name: mean_over(of, right) for name, of in (("image", seen), ("all", items))}
        return Report(metrics, "image", right, tuple(notes))


def read_item(
    record: Any,
    place: str,
    problems: Mapping[str, Any],
    problems_path: Path,
    split: set[str],
    splits_path: Path,
    root: ImageRoot,
) -> Item:
    """One question with its answer.

    Raises:
        DataError: it is damaged, or the other files do not know it.
    """
    if not isinstance(record, dict):
        raise DataError(
            f"{place}: {type(record).__name__} instead of an object; get the file again from {QUESTIONS.origin}."
        )
    id = field(record, "id", place)
    problem = problems.get(id)
    if id not in split or not isinstance(problem, dict):
        raise DataError(
            f"{place}: question {id!r} is not in {splits_path if isinstance(problem, dict) else problems_path}; the files differ in "
            f"version; get the latter from {REPOSITORY}."
        )
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{problems_path}, question {id!r}: choices {choices!r:.60} and answer {answer!r:.20}; a list and an index into it are "
            f"accepted; get the file again from {REPOSITORY}."
        )
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        raise DataError(f"{place}: no 'conversations'; get the file again from {QUESTIONS.origin}.")
    image = field(record, "image", place) if record.get("image") else None
    return Item(
        id=id,
        text=field(turns[0], "value", place).replace(IMAGE_TAG, "").strip() + SUFFIX,
        images=() if image is None else (root.path(image, place),),
        cluster=id,
        kind="text" if image is None else "image",
        reference={"answer": answer, "choices": len(choices)},
        place=place,
    )
