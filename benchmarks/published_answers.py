"""Scores LLaVA-1.5-13B's published answers by our benchmarks, ours and strictly, beside the published numbers, as JSON.

    python benchmarks/published_answers.py --llava LLaVA --pope POPE --mme eval_tool.zip --out results/published-answers.json

Needs clones of haotian-liu/LLaVA and AoiDragon/POPE (any kind that holds the commits named below) and MME's `tools/eval_tool.zip`
from the branch Evaluation of BradyFU/Awesome-Multimodal-Large-Language-Models. Right answers of ScienceQA and MMBench are those that
LLaVA's own files of results hold; GQA's and TextVQA's are not there, so these two are not scored.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from align_ti.evaluation.benchmarks import benchmark
from align_ti.evaluation.benchmarks.base import Report
from align_ti.evaluation.benchmarks.mme import question_of
from align_ti.runs import provenance, write_json

LLAVA, POPE = "32cebc3809441cc40d8ac7b2855d148308741f2a", "e3e39262c85a6a83f26cf5094022a782cb0df58d"
EVAL, MODEL = "playground/data/eval", "llava-v1.5-13b"

PUBLISHED = {
    "pope": {"f1": 85.9},
    "sqa": {"image": 71.6},
    "mme": {"perception": 1531.3},
    "mmbench": {"circular": 67.7},
}
"""What LLaVA-1.5's table says of the model."""

Answers = dict[str, str]


def shown(clone: Path, commit: str, path: str) -> bytes:
    """A file of a commit."""
    return subprocess.run(["git", "-C", str(clone), "show", f"{commit}:{path}"], check=True, capture_output=True).stdout


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode().splitlines()]


def pope(folder: Path, llava: Path, clone: Path) -> Answers:
    put(folder / "llava_pope_test.jsonl", shown(llava, LLAVA, f"{EVAL}/pope/llava_pope_test.jsonl"))
    for split in ("adversarial", "popular", "random"):
        name = f"coco_pope_{split}.json"
        put(folder / "coco" / name, shown(clone, POPE, f"output/coco/{name}"))
    answers = lines(shown(llava, LLAVA, f"{EVAL}/pope/answers/{MODEL}.jsonl"))
    return {str(line["question_id"]): line["text"] for line in answers}


def scienceqa(folder: Path, llava: Path) -> Answers:
    for name in ("llava_test_CQM-A.json", "pid_splits.json"):
        put(folder / name, shown(llava, LLAVA, f"{EVAL}/scienceqa/{name}"))
    results = json.loads(shown(llava, LLAVA, f"{EVAL}/scienceqa/answers/{MODEL}_output.jsonl"))
    answers, problems = {}, {}
    for one in results["correct"] + results["incorrect"]:
        right = "ABCDE".index(one["ground_truth"])
        offered = re.findall(r"^[A-E]\. ", one["question"], re.MULTILINE)
        problems[one["question_id"]] = {"choices": offered, "answer": right}
        answers[one["question_id"]] = one["pred"]
    put(folder / "problems.json", json.dumps(problems).encode())
    return answers


def mme(folder: Path, llava: Path, tool: Path) -> Answers:
    put(folder / "llava_mme.jsonl", shown(llava, LLAVA, f"{EVAL}/MME/llava_mme.jsonl"))
    with zipfile.ZipFile(tool) as archive:
        for name in archive.namelist():
            if not re.fullmatch(r"eval_tool/Your_Results/\w+\.txt", name):
                continue
            truths: dict[str, list[str]] = {}
            for line in archive.read(name).decode().splitlines():
                image, asked, answer, *_ = line.split("\t")
                truths.setdefault(image.split(".")[0], []).append(f"{asked}\t{answer}\n")
            for stem, asked in truths.items():
                path = folder / "MME_Benchmark_release_version" / Path(name).stem / f"{stem}.txt"
                put(path, "".join(asked).encode())
    answers = lines(shown(llava, LLAVA, f"{EVAL}/MME/answers/{MODEL}.jsonl"))
    return {f"{line['question_id']} {question_of(line['prompt'])}": line["text"] for line in answers}


def mmbench(folder: Path, llava: Path) -> Answers:
    version = "mmbench_dev_20230712"
    sheet = shown(llava, LLAVA, f"{EVAL}/mmbench/answers_upload/{version}/{MODEL}.xlsx")
    header, *rows = cells(sheet)
    columns = ("index", "question", "A", "B", "C", "D", "answer", "image")
    # No image is opened.
    image = base64.b64encode(bytes(99)).decode()
    folder.mkdir(parents=True)
    with (folder / f"{version}.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(columns)
        for row in rows:
            of = dict(zip(header, row, strict=True)) | {"image": image}
            table.writerow([of[name] for name in columns])
    return {row[header.index("index")]: row[header.index("prediction")] for row in rows}


def cells(book: bytes) -> list[list[str]]:
    """The first sheet of a workbook whose texts stand in their cells."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(io.BytesIO(book)) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    table = []
    for row in sheet.iter(f"{space}row"):
        found = {}
        for cell in row:
            text = cell.find(f"{space}is/{space}t")
            value = cell.find(f"{space}v") if text is None else text
            found[(cell.get("r") or "").rstrip("0123456789")] = (value.text if value is not None else "") or ""
        table.append(found)
    letters = list(table[0])
    return [[row.get(letter, "") for letter in letters] for row in table]


def told(report: Report) -> dict[str, Any]:
    return {
        "scores": {name: round(metric.score, 4) for name, metric in report.metrics.items()},
        "notes": list(report.notes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava", type=Path, required=True)
    parser.add_argument("--pope", type=Path, required=True)
    parser.add_argument("--mme", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    content: dict[str, Any] = {"model": MODEL, "answers": f"haotian-liu/LLaVA at {LLAVA}"}
    with tempfile.TemporaryDirectory() as made:
        evals = Path(made)
        answers: Mapping[str, Answers] = {
            "pope": pope(evals / "pope", chosen.llava, chosen.pope),
            "sqa": scienceqa(evals / "scienceqa", chosen.llava),
            "mme": mme(evals / "MME", chosen.llava, chosen.mme),
            "mmbench": mmbench(evals / "mmbench", chosen.llava),
        }
        for name, predictions in answers.items():
            task = benchmark(name)
            items = task.items(evals)
            ours, strict = (task.score(items, predictions, strict_original=way) for way in (False, True))
            content[name] = {"published": PUBLISHED[name], "ours": told(ours), "strict": told(strict)}
            print(name, *PUBLISHED[name].items(), {one: round(ours.metrics[one].score, 3) for one in PUBLISHED[name]})
    write_json(chosen.out, content | {"provenance": provenance()})


if __name__ == "__main__":
    main()
