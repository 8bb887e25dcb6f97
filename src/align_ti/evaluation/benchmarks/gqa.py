"""GQA: questions about scenes, test-dev balanced, one word or phrase, exact match. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from align_ti.data.records import ImageRoot
from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.answers import check, mean_over, notes_on, tidy
from align_ti.evaluation.benchmarks.base import Benchmark, Item, Report
from align_ti.evaluation.benchmarks.files import (
    EVAL_ZIP,
    Source,
    field,
    read_json,
    read_lines,
    refuse_twice,
    task_folder,
)
from align_ti.evaluation.scoring import gqa_normalize

QUESTIONS = Source(("llava_gqa_testdev_balanced.jsonl",), EVAL_ZIP)
ANSWERS = Source(
    (
        "data/testdev_balanced_questions.json",
        "testdev_balanced_questions.json",
        "data/questions1.2/testdev_balanced_questions.json",
        "data/questions/testdev_balanced_questions.json",
    ),
    "questions1.2.zip of GQA (https://cs.stanford.edu/people/dorarad/gqa/download.html)",
)
PICTURES = ("data/images", "images")
PUBLISHED = 12578


class Gqa(Benchmark):
    """GQA by LLaVA's protocol."""

    name = "gqa"
    title = "GQA"
    max_new_tokens = 128

    def items(self, folder: Path) -> list[Item]:
        """The questions of `llava_gqa_testdev_balanced.jsonl` with the answers of `testdev_balanced_questions.json`."""
        folder = task_folder(folder, "gqa", QUESTIONS)
        path, answers_path = QUESTIONS.path(folder), ANSWERS.path(folder)
        answers = read_json(answers_path, ANSWERS.origin)
        if not isinstance(answers, dict):
            raise DataError(
                f"{answers_path}: {type(answers).__name__} instead of questions by id; get the file from {ANSWERS.origin}."
            )
        root = ImageRoot(next((folder / name for name in PICTURES if (folder / name).is_dir()), folder / PICTURES[0]))
        items = []
        for record, place in read_lines(path, QUESTIONS.origin):
            id, image = field(record, "question_id", place), field(record, "image", place)
            if id not in answers:
                raise DataError(
                    f"{place}: question {id!r} is not in {answers_path} ({len(answers)} questions); the two differ in version or "
                    f"one is cut off; get the latter from {ANSWERS.origin}."
                )
            truth, of = answers[id], f"{answers_path}, question {id!r}"
            if not isinstance(truth, dict) or not isinstance(truth.get("types"), dict):
                raise DataError(f"{of}: no object with 'types'; get the file again from {ANSWERS.origin}.")
            groups = truth.get("groups") or {}
            if not isinstance(groups, dict):
                raise DataError(
                    f"{of}: 'groups' is {groups!r:.60}; an object is accepted; get the file again from {ANSWERS.origin}."
                )
            structural = field(truth["types"], "structural", of)
            items.append(
                Item(
                    id=id,
                    text=field(record, "text", place),
                    images=(root.path(image, place),),
                    cluster=image,
                    kind="open" if structural == "query" else "binary",
                    reference={
                        "answer": field(truth, "answer", of),
                        "balanced": bool(truth.get("isBalanced", True)),
                        "group": groups.get("global"),
                    },
                    place=place,
                )
            )
        refuse_twice(items, QUESTIONS.origin)
        return items

    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        """Accuracy over the balanced questions: all of them, binary ones and open ones.

        Strictly, missing predictions leave the denominator, nothing is stripped, and predictions without a question that has a
        global group stop the script.
        """
        check(items, predictions, self.title)
        scored = [item for item in items if item.reference["balanced"]]
        notes = notes_on(
            items, predictions, PUBLISHED, "left out of the denominator, as by the original" if strict_original else ""
        )
        if len(scored) < len(items):
            notes.append(f"{len(items) - len(scored)} questions are not of the balanced set and are not scored.")
        if strict_original:
            scored = [item for item in scored if item.id in predictions]
            if not any(item.reference["group"] is not None for item in scored):
                raise DataError(
                    f"{self.title}: no scored question has a global group, so the original divides by zero (its distribution score); "
                    "score without strict_original."
                )
        elif not scored:
            raise DataError(
                f"{self.title}: none of the {len(items)} questions is of the balanced set; at least one is needed."
            )
        right = {}
        for item in scored:
            said = predictions.get(item.id)
            answer = None if said is None else gqa_normalize(said if strict_original else tidy(said))
            right[item.id] = float(answer == item.reference["answer"])
        metrics = {}
        for name in ("accuracy", "binary", "open"):
            of = [item for item in scored if name in ("accuracy", item.kind)]
            if of:
                metrics[name] = mean_over(of, right)
            else:
                notes.append(f"No {name} questions, so no score of theirs.")
        return Report(metrics, "accuracy", right, tuple(notes))
