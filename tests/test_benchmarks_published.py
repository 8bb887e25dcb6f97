"""The command that scores published answers, on small files in the forms of the published ones."""

from __future__ import annotations

import csv
import io
import json
import zipfile

import pytest
from benchmarks import published_answers

from tests import benchmark_folders as folders


def workbook(rows: list[list[str]]) -> bytes:
    """A workbook with texts in its cells and numbers as values; empty cells hold nothing."""
    sheet = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    for number, row in enumerate(rows, start=1):
        sheet += f'<row r="{number}">'
        for letter, text in zip("ABCDEFGHI", row, strict=False):
            if text.isdecimal():
                sheet += f'<c r="{letter}{number}" t="n"><v>{text}</v></c>'
            elif text:
                sheet += f'<c r="{letter}{number}" t="inlineStr"><is><t>{text}</t></is></c>'
            else:
                sheet += f'<c r="{letter}{number}" t="inlineStr" />'
        sheet += "</row>"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", sheet + "</sheetData></worksheet>")
    return stream.getvalue()


@pytest.fixture
def clones(tmp_path, monkeypatch):
    """Files by their paths in the clones, with one wrong answer of ScienceQA and one of MMBench."""
    evals, files = tmp_path / "eval", {}
    made = {name: folders.MAKERS[name](evals) for name in ("pope", "sqa", "mme", "mmbench")}
    for path in evals.rglob("*.json*"):
        files[f"{published_answers.EVAL}/{path.relative_to(evals)}"] = path.read_bytes()
        files[f"output/coco/{path.name}"] = path.read_bytes()

    def answers(folder, rows):
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        files[f"{published_answers.EVAL}/{folder}/answers/{published_answers.MODEL}.jsonl"] = content

    answers("pope", [{"question_id": int(id), "text": text} for id, text in made["pope"].items()])
    asked = {id: id.split(" ", 1) for id in made["mme"]}
    answers(
        "MME",
        [
            {"question_id": asked[id][0], "prompt": f"{asked[id][1]}\n{folders.SHORT}", "text": text}
            for id, text in made["mme"].items()
        ],
    )
    said = made["sqa"] | {"5": "A"}
    questions = json.loads((evals / "scienceqa" / "llava_test_CQM-A.json").read_text())
    results = {"correct": [], "incorrect": []}
    for one in questions:
        truth, text = made["sqa"][one["id"]], one["conversations"][0]["value"]
        part = results["correct" if said[one["id"]] == truth else "incorrect"]
        part.append({"question_id": one["id"], "ground_truth": truth, "question": text, "pred": said[one["id"]]})
    path = f"{published_answers.EVAL}/scienceqa/answers/{published_answers.MODEL}_output.jsonl"
    files[path] = json.dumps(results).encode()
    with (evals / "mmbench" / "mmbench_dev_20230712.tsv").open(newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    columns = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    letters = made["mmbench"] | {"1000241": "Z"}
    sheet = [columns]
    for row in rows:
        of = dict(zip(header, row, strict=True))
        sheet.append([letters[of["index"]] if name == "prediction" else of[name] for name in columns])
    path = f"{published_answers.EVAL}/mmbench/answers_upload/mmbench_dev_20230712/{published_answers.MODEL}.xlsx"
    files[path] = workbook(sheet)
    monkeypatch.setattr(published_answers, "shown", lambda clone, commit, path: files[path])
    tool = tmp_path / "eval_tool.zip"
    with zipfile.ZipFile(tool, "w") as archive:
        archive.writestr("eval_tool/LaVIN/OCR.txt", "another model's answers")
        for category, (stem, extension) in folders.MME_CATEGORIES.items():
            asked = (f"Is this {category}, image 0?", "Yes"), ("Is this something else, 0?", "No")
            text = "".join(
                f"{stem}.{extension}\t{words}  Please answer yes or no.\t{answer}\n" for words, answer in asked
            )
            archive.writestr(f"eval_tool/Your_Results/{category}.txt", text)
    return tool


def test_published_answers(clones, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    given = ["--llava", "x", "--pope", "y", "--mme", str(clones), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["published_answers.py", *given])
    published_answers.main()
    content = json.loads(out.read_text())
    for way in ("ours", "strict"):
        scores = {name: content[name][way]["scores"] for name in published_answers.PUBLISHED}
        assert scores["pope"]["f1"] == 100
        assert scores["sqa"] == {"image": 50, "all": 75}
        assert scores["mme"]["perception"] == 2000 and scores["mme"]["cognition"] == 800
        assert scores["mmbench"]["circular"] == pytest.approx(200 / 3, abs=1e-4)
    assert content["provenance"]
    assert "mme ('perception', 1531.3)" in capsys.readouterr().out
