"""Makes small benchmark folders in the layouts of the published ones, for tests end to end.

Each maker writes a task's own folder below the folder given (the `eval` folder of LLaVA's layout) and gives the right answers by item
id, in the order of the questions, so that a test can change some of them.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from align_ti.digits.files import Sizes, write_benchmark

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
    """Six questions about two images, four open and two binary.

    Args:
        evals: the `eval` folder.
        data: the folder below `gqa` that holds images and answers; empty for Align-TI's scripts, which have none.
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
    """Three splits over two images, for each image as many objects that are there as that are not (three at most)."""
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


def scienceqa_folder(evals: Path) -> dict[str, str]:
    """Four test questions, two with an image, of two to five options; a training question stands in `problems.json` too."""
    folder = evals / "scienceqa"
    asked = [
        ("5", "Which is larger?", ["a sphere", "a cube"], 1, "Figure: two solids.", True),
        ("11", "Which word is a noun?", ["run", "cat", "blue"], 1, "", False),
        ("16", "Which force acts?", ["pull", "push", "none", "both"], 3, "", True),
        ("20", "Pick the fifth.", ["v", "w", "x", "y", "z"], 4, "Count on.", False),
    ]
    records = []
    for id, question, choices, answer, hint, seen in asked:
        options = "\n".join(f"{'ABCDE'[index]}. {choice}" for index, choice in enumerate(choices))
        value = (f"Context: {hint}\n" if hint else "") + f"{question}\n{options}"
        record = {
            "id": id,
            "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "ABCDE"[answer]}],
        }
        if seen:
            record["image"] = f"{id}/image.png"
            record["conversations"][0]["value"] = "<image>\n" + value
            write_picture(folder / "images" / "test" / id / "image.png", int(id))
        records.append(record)
    write_json(folder / "llava_test_CQM-A.json", records)
    problems = {
        id: {"question": text, "choices": choices, "answer": answer} for id, text, choices, answer, _, _ in asked
    }
    write_json(folder / "problems.json", problems | {"1": {"question": "?", "choices": ["a", "b"], "answer": 0}})
    write_json(folder / "pid_splits.json", {"train": ["1"], "test": [id for id, *_ in asked]})
    return {id: "ABCDE"[answer] for id, _, _, answer, _, _ in asked}


def textvqa_folder(evals: Path) -> dict[str, str]:
    """Four questions about three images, two of them about one; one has no OCR tokens at all."""
    folder = evals / "textvqa"
    asked = [
        (
            "003a8ae2ef43b901",
            "What is the brand of this camera?",
            "DAKOTA, DIGITAL",
            ["dakota"] * 6 + ["dakota digital"] * 4,
        ),
        ("003a8ae2ef43b901", "What does the Small text spell?", "DAKOTA, DIGITAL", ["drupalcon"] * 10),
        ("00c359f294f7dcd9", "What time is it?", "", ["10:10"] * 8 + ["ten past ten", "unanswerable"]),
        ("00e8a5a3c2b4d1f0", "How many cans?", "2, CANS", ["2"] * 5 + ["two"] * 4 + ["3"]),
    ]
    write_lines(
        folder / "llava_textvqa_val_v051_ocr.jsonl",
        (
            {
                "question_id": image,
                "image": f"{image}.jpg",
                "text": f"{question}\nReference OCR token: {tokens}\n{SHORT}",
                "category": "default",
            }
            for image, question, tokens, _ in asked
        ),
    )
    rows = [
        {"image_id": image, "question": question, "question_id": 34602 + number, "answers": answers}
        for number, (image, question, _, answers) in enumerate(asked)
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    for number, image in enumerate(dict.fromkeys(image for image, *_ in asked)):
        write_picture(folder / "train_images" / f"{image}.jpg", number)
    return {f"{image} {question.lower()}": answers[0] for image, question, _, answers in asked}


MME_CATEGORIES = {
    "existence": ("000000006040", "jpg"),
    "count": ("000000006471", "jpg"),
    "position": ("000000017029", "jpg"),
    "color": ("000000006212", "jpg"),
    "posters": ("tt0048028", "jpg"),
    "celebrity": ("tt0032138_shirley_temple", "jpg"),
    "scene": ("Places365_val_00000001", "jpg"),
    "landmark": ("006adf999ccc899a", "jpg"),
    "artwork": ("10002", "jpg"),
    "OCR": ("0001", "jpg"),
    "commonsense_reasoning": ("0001", "png"),
    "numerical_calculation": ("0001", "png"),
    "text_translation": ("0001", "png"),
    "code_reasoning": ("0020", "png"),
}
"""Each category with an image and its extension."""


def mme_folder(evals: Path, pictures: int = 1) -> dict[str, str]:
    """Fourteen categories of as many images, a question answered yes and one answered no about each."""
    folder, questions, answers = evals / "MME", [], {}
    for category, (stem, extension) in MME_CATEGORIES.items():
        apart = category in ("artwork", "celebrity", "landmark", "posters", "scene")
        base = folder / "MME_Benchmark_release_version" / category
        for number in range(pictures):
            name = stem if number == 0 else f"{stem}{number}"
            image = f"{category}/{'images/' if apart else ''}{name}.{extension}"
            lines = []
            for asked, answer in (
                (f"Is this {category}, image {number}?", "Yes"),
                (f"Is this something else, {number}?", "No"),
            ):
                # The published files have two spaces in front of the suffix now and then.
                lines.append(f"{asked}{' ' * (1 + (category == 'OCR'))} Please answer yes or no.\t{answer}\n")
                questions.append(
                    {"question_id": image, "image": image, "text": f"{asked}\n{SHORT}", "category": category}
                )
                answers[f"{image} {asked}"] = answer
            write_picture(folder / "MME_Benchmark_release_version" / image, number)
            truth = base / ("questions_answers_YN" if apart else "") / f"{name}.txt"
            truth.parent.mkdir(parents=True, exist_ok=True)
            truth.write_text("".join(lines), encoding="utf-8")
    write_lines(folder / "llava_mme.jsonl", questions)
    return answers


MMBENCH_COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
)


def mmbench_folder(evals: Path, name: str = "mmbench_dev_20230712.tsv") -> dict[str, str]:
    """Three questions with every rotation (four, three and two options), one with a hint, in the order of the published file."""
    folder = evals / "mmbench"
    folder.mkdir(parents=True, exist_ok=True)
    asked = [
        (241, "Which animal is it?", "", ["a cat", "a dog", "a bird", "a fish"], 1, "object", "perception"),
        (252, "Which is right?", 'The hint says "yes",\tmaybe.', ["red", "green", "blue"], 0, "logic", "reasoning"),
        (263, "Is it heavy?", "NA", ["heavy", "light"], 1, "physics", "reasoning"),
    ]
    rows, answers = [], {}
    for round in range(4):
        for index, question, hint, options, right, category, second in asked:
            if round >= len(options):
                continue
            turned = options[round:] + options[:round]
            letter = "ABCD"[(right - round) % len(options)]
            cells = [*turned, *[""] * (4 - len(options))]
            id = index + round * 1_000_000
            rows.append([id, question, hint, *cells, letter, category, png_base64(index), "x", second, "", "dev"])
            answers[str(id)] = letter
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(MMBENCH_COLUMNS)
        writer.writerows(rows)
    return answers


def png_base64(number: int) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (number % 256, 120, 30)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def digits_folder(evals: Path, split: str = "test") -> dict[str, str]:
    """Two images of the digits benchmark with their questions, as `align-ti digits` writes them."""
    folder = evals / "digits"
    if not folder.exists():
        write_benchmark(folder, sizes=Sizes(train=1, validation=2, test=2))
    records = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    return {record["id"]: record["conversations"][1]["value"] for record in records}


def own_folder(evals: Path) -> dict[str, str]:
    """Four questions of one's own: without an image, with one, with two; each with another scorer."""
    folder = evals / "own"
    records = [
        {"id": "a", "question": "What is it?", "image": "pictures/0.png", "answer": "a red kite", "kind": "thing"},
        {
            "id": "b",
            "question": "Spell it.",
            "image": "pictures/0.png",
            "answer": ["kite", "the kite"],
            "scorer": "anls",
        },
        {
            "id": "c",
            "question": "Same?",
            "images": ["pictures/0.png", "pictures/1.png"],
            "answer": "no",
            "scorer": "yes_no",
        },
        {"id": 4, "question": "Two and two?", "answers": ["4"], "scorer": "numeric", "kind": "sum"},
    ]
    write_lines(folder / "questions.jsonl", records)
    for number in range(2):
        write_picture(folder / "pictures" / f"{number}.png", number)
    return {"a": "A red kite.", "b": "kite", "c": "No", "4": "It is 4."}


MAKERS: Mapping[str, Callable[[Path], dict[str, str]]] = {
    "gqa": gqa_folder,
    "sqa": scienceqa_folder,
    "textvqa": textvqa_folder,
    "pope": pope_folder,
    "mme": mme_folder,
    "mmbench": mmbench_folder,
    "digits": digits_folder,
    "digits_validation": partial(digits_folder, split="validation"),
    "own": own_folder,
}
"""By the benchmarks' names."""
