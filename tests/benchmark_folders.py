"""Makes small benchmark folders in the layouts of the published ones, for tests end to end.

Each maker writes a task's own folder below the folder given (the `eval` folder of LLaVA's layout) and gives the right answers by item
id, in the order of the questions, so that a test can change some of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

SHORT = "Answer the question using a single word or phrase."


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (40 * number % 256, 90, 200)).save(path)


def gqa_folder(evals: Path, data: str = "data") -> dict[str, str]:
    """Six questions about two pictures, four open and two binary.

    Args:
        evals: the `eval` folder.
        data: the folder below `gqa` that holds pictures and answers; empty for Align-TI's scripts, which have none.
    """
    folder = evals / "gqa"
    asked = [
        ("201307251", "n161313", "Is it overcast?", "no", "verify"),
        ("201640614", "n161313", "What is the man wearing?", "shirt", "query"),
        ("201640616", "n161313", "What color is the shirt?", "blue", "query"),
        ("202225914", "n235859", "Is the dog left of the cat?", "yes", "logical"),
        ("202225915", "n235859", "What animal is it?", "cat", "query"),
        ("202225916", "n235859", "What is on the table?", "remote control", "query"),
    ]
    write_lines(
        folder / "llava_gqa_testdev_balanced.jsonl",
        (
            {"question_id": id, "image": f"{image}.jpg", "text": f"{text}\n{SHORT}", "category": "default"}
            for id, image, text, _, _ in asked
        ),
    )
    write_json(
        folder / data / "testdev_balanced_questions.json",
        {
            id: {
                "question": text,
                "answer": answer,
                "isBalanced": True,
                "types": {"structural": structural, "semantic": "attr", "detailed": "x"},
                "groups": {"global": "animal" if answer == "cat" else None},
                "semantic": [{"operation": "select", "argument": "scene"}],
                "imageId": image,
                "entailed": [],
            }
            for id, image, text, answer, structural in asked
        },
    )
    for number, image in enumerate(("n161313", "n235859")):
        write_picture(folder / data / "images" / f"{image}.jpg", number)
    return {id: answer.capitalize() for id, _, _, answer, _ in asked}


def pope_folder(evals: Path, objects: int = 2) -> dict[str, str]:
    """Three splits over two pictures, for each picture as many objects that are there as that are not (three at most)."""
    folder, answers = evals / "pope", {}
    questions, labels = [], {}
    there, absent = ("snowboard", "apple", "dining table"), ("car", "orange", "traffic light")
    for start, split in enumerate(("adversarial", "popular", "random")):
        rows = []
        for image in ("COCO_val2014_000000310196.jpg", "COCO_val2014_000000210789.jpg"):
            for number in range(objects):
                for name, label in ((there[number], "yes"), (absent[number], "no")):
                    id = 10_000_000 * start + len(rows) + 1
                    # The published labels say "imange" behind "an".
                    text = f"Is there {'an' if name[0] in 'ao' else 'a'} {name} in the image?"
                    spelt = text.replace("image", "imange") if " an " in text else text
                    questions.append({"question_id": id, "image": image, "text": f"{text}\n{SHORT}", "category": split})
                    rows.append({"question_id": len(rows) + 1, "image": image, "text": spelt, "label": label})
                    answers[str(id)] = label.capitalize()
        labels[split] = rows
        write_lines(folder / "coco" / f"coco_pope_{split}.json", rows)
    write_lines(folder / "llava_pope_test.jsonl", questions)
    for number, image in enumerate(("COCO_val2014_000000310196.jpg", "COCO_val2014_000000210789.jpg")):
        write_picture(folder / "val2014" / image, number)
    return answers
