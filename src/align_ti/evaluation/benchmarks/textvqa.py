"""TextVQA: questions about the words in an image, with OCR tokens in the prompt, scored by what ten people say. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from align_ti.data.records import ImageRoot
from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.answers import check, mean_over, notes_on
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
from align_ti.evaluation.scoring import vqa_accuracy
from align_ti.evaluation.scoring.vqa import ANSWERS as PEOPLE

QUESTIONS = Source(("llava_textvqa_val_v051_ocr.jsonl",), EVAL_ZIP)
ANNOTATIONS = Source(("TextVQA_0.5.1_val.json",), "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json")
OCR = "Reference OCR token: "
PUBLISHED = 5000


class TextVqa(Benchmark):
    """TextVQA by LLaVA's protocol."""

    name = "textvqa"
    title = "TextVQA"
    max_new_tokens = 128

    def items(self, folder: Path) -> list[Item]:
        """The questions of `llava_textvqa_val_v051_ocr.jsonl` with the answers of `TextVQA_0.5.1_val.json`.

        A question's id is its image's and its words in lower case, since the file's own ids are those of images.
        """
        folder = task_folder(folder, "textvqa", QUESTIONS)
        path, annotations_path = QUESTIONS.path(folder), ANNOTATIONS.path(folder)
        annotations = read_annotations(annotations_path)
        root = ImageRoot(folder / "train_images")
        items = []
        for record, place in read_lines(path, QUESTIONS.origin):
            image_id, text, image = (field(record, name, place) for name in ("question_id", "text", "image"))
            asked = question_of(text, place)
            if (image_id, asked) not in annotations:
                raise DataError(
                    f"{place}: {asked!r} about image {image_id!r} is not in {annotations_path} ({len(annotations)} questions); the "
                    f"two differ in version; get the latter from {ANNOTATIONS.origin}."
                )
            items.append(
                Item(
                    id=f"{image_id} {asked}",
                    text=text,
                    images=(root.path(image, place),),
                    cluster=image_id,
                    reference={"answers": annotations[image_id, asked]},
                    place=place,
                )
            )
        refuse_twice(items, QUESTIONS.origin)
        return items

    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        """Consensus accuracy. Strictly, missing predictions leave the denominator."""
        check(items, predictions, self.title)
        left_out = "left out of the denominator, as by the original" if strict_original else ""
        notes = notes_on(items, predictions, PUBLISHED, left_out)
        without = sum(OCR not in item.text for item in items)
        if without:
            notes.append(
                f"{without} of {len(items)} prompts hold no OCR tokens; the published protocol gives them to the model."
            )
        scored = [item for item in items if item.id in predictions] if strict_original else items
        if not scored:
            raise DataError(
                f"{self.title}: no predictions, so the original divides by zero; score without strict_original."
            )
        right = {
            item.id: vqa_accuracy(predictions[item.id], item.reference["answers"]) if item.id in predictions else 0.0
            for item in scored
        }
        return Report({"accuracy": mean_over(scored, right)}, "accuracy", right, tuple(notes))


def question_of(prompt: str, place: str) -> str:
    """The question in a prompt, in lower case, as the original finds it.

    Raises:
        DataError: the prompt has none of the three forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        question = found[1] if found else None
    elif OCR in prompt and len(lines) == 3:
        question = lines[1] if prompt.startswith(OCR.strip()) else lines[0]
    else:
        question = lines[0] if len(lines) == 2 else None
    if question is None:
        raise DataError(
            f"{place}: the prompt {prompt!r:.80} has none of the forms that tell the question (two lines; three with {OCR.strip()!r}; "
            f"'OCR tokens: ... Question: ... Short answer:'); get the file from {QUESTIONS.origin}."
        )
    return question.lower()


def read_annotations(path: Path) -> dict[tuple[str, str], list[str]]:
    """People's answers by image and question in lower case.

    Raises:
        DataError: the file is damaged or of a split without answers.
    """
    content = read_json(path, ANNOTATIONS.origin)
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path}: no list 'data'; get the file from {ANNOTATIONS.origin}.")
    found = {}
    for number, row in enumerate(rows, start=1):
        place = f"{path}, question {number}"
        if not isinstance(row, dict):
            raise DataError(
                f"{place}: {type(row).__name__} instead of an object; get the file from {ANNOTATIONS.origin}."
            )
        answers = row.get("answers")
        if not isinstance(answers, list) or len(answers) != PEOPLE or not all(isinstance(one, str) for one in answers):
            count = f"{len(answers)} answers" if isinstance(answers, list) else "no answers"
            raise DataError(
                f"{place}: {count}; {PEOPLE} texts are accepted (the test split has none); get the file from {ANNOTATIONS.origin}."
            )
        found[field(row, "image_id", place), field(row, "question", place).lower()] = answers
    return found
