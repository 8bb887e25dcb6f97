"""The plug-in for lmms-eval: found by it, and with the same answers as ours."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from align_ti.config import Evaluation, Generation
from align_ti.data.sources import read_conversations
from align_ti.digits.files import copy_model
from align_ti.errors import DataError
from align_ti.evaluation.lmms import answers, generation, stopped, stops
from align_ti.evaluation.runner import evaluate
from align_ti.models.loading import load_model, load_processor
from align_ti.runs import read_json
from tests import small

ROOT = Path(__file__).parent.parent
LIMIT = 12

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed for this Python; `make lmms-eval` makes an environment that has it and runs this test",
)


@dataclass(frozen=True)
class Asking:
    """What lmms-eval hands to a model, as far as it is read."""

    args: tuple[str, dict[str, Any], Callable[[Any], Any] | None, int, str, str]


def open_picture(document: dict[str, str]) -> list[Image.Image]:
    return [Image.open(document["image"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The shipped teacher, which gives different answers to different questions, and records."""
    folder = tmp_path_factory.mktemp("plug-in")
    copy_model("teacher", folder / "teacher")
    small.write_records(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(folder):
    return load_model(str(folder / "teacher"), "float32"), load_processor(str(folder / "teacher"))


@pytest.fixture(scope="module")
def ours(folder, teacher) -> list[str]:
    """What `align-ti evaluate` answers."""
    settings = Evaluation(batch_size=5, max_new_tokens=LIMIT)
    given = evaluate(*teacher, read_conversations(folder / "train.json"), settings)["answers"]
    found = [one["answer"] for one in given]
    assert len(set(found)) > 3
    return found


def documents(folder: Path) -> list[dict[str, str]]:
    """The records as documents of a task."""
    return [
        {
            "image": str(folder / record["image"]),
            "question": record["conversations"][0]["value"].removeprefix("<image>"),
            "answer": record["conversations"][1]["value"],
        }
        for record in json.loads((folder / "train.json").read_text())
    ]


def requests(folder: Path, words: str = "{}", **options: object) -> tuple[list[Asking], dict[str, Any]]:
    """A request for every document, and the documents by task and split."""
    every = documents(folder)
    asked = [
        Asking((words.format(one["question"]), dict(options), open_picture, number, "digits", "test"))
        for number, one in enumerate(every)
    ]
    return asked, {"digits": {"test": every}}


@pytest.mark.parametrize("words", ["{}", "<image>\n{}", "<image>{}"])
def test_requests_are_answered_as_our_own_questions_are(folder, teacher, ours, words):
    asked, about = requests(folder, words, max_new_tokens=LIMIT, temperature=0, do_sample=False, top_p=None)
    assert answers(*teacher, asked, about, Generation(batch_size=5)) == ours


def test_each_task_has_its_own_limit_and_stop(folder, teacher, ours):
    asked, about = requests(folder, max_new_tokens=LIMIT)
    stop = ours[0][2]
    several = [
        Asking((one.args[0], {"max_new_tokens": LIMIT, **more}, *one.args[2:]))
        for one, more in zip(asked, [{"until": ["\n\n", stop]}, {"max_new_tokens": 3}, {}] * 4, strict=True)
    ]
    seen: list[int] = []
    given = answers(*teacher, several, about, Generation(batch_size=4), seen.append)
    assert sum(seen) == len(asked)
    for index, (text, whole) in enumerate(zip(given, ours, strict=True)):
        if index % 3 == 0:
            assert text == whole.partition(stop)[0].strip()
        elif index % 3 == 1:
            assert whole.startswith(text) and len(text) < len(whole)
        else:
            assert text == whole
    assert stops({"until": "."}) == (".",) and stops({"until": ["", "a"]}) == ("a",) and stops({}) == ()
    assert stopped("one two\n\nthree. four", ("\n\n", "two")) == "one"


def test_draws_are_each_document_s_own_and_repeats_differ(folder, teacher, ours):
    asked, about = requests(folder, max_new_tokens=LIMIT, temperature=8.0, top_p=1.0, top_k=0)
    first = answers(*teacher, asked, about, Generation(batch_size=5))
    other = answers(*teacher, list(reversed(asked)), about, Generation(batch_size=3))
    assert first == list(reversed(other)) and first != ours
    assert first != answers(*teacher, asked, about, Generation(batch_size=5, seed=1))
    twice = answers(*teacher, [asked[0]] * 3, about, Generation(batch_size=5))
    assert twice[0] == first[0] and len(set(twice)) > 1


def test_options_of_tasks_become_ours():
    def options(**given: object) -> Generation:
        return generation(given, Generation(max_new_tokens=7), "here")

    assert options() == Generation(max_new_tokens=7)
    assert options(do_sample=False, temperature=0.7, top_p=0.9, num_beams=1) == Generation(max_new_tokens=7)
    assert options(do_sample=True) == Generation(max_new_tokens=7, temperature=1.0)
    assert options(temperature=0.5, top_k=3, top_p=0.9, max_new_tokens=9) == Generation(
        max_new_tokens=9, temperature=0.5, top_k=3, top_p=0.9
    )
    with pytest.raises(DataError, match="here: the task asks for 3 beams"):
        options(num_beams=3)


def test_what_is_no_picture_is_refused_with_its_place(folder, teacher):
    asked, about = requests(folder)
    video = Asking((*asked[0].args[:2], lambda document: ["clip.mp4"], *asked[0].args[3:]))
    with pytest.raises(DataError, match="task digits, split test, document 0: a visual is of type 'str'"):
        answers(*teacher, [video], about, Generation())
    two = Asking(("<image> and <image>?", *asked[0].args[1:]))
    with pytest.raises(DataError, match=r"document 0: 2 <image> tag\(s\) in the text but 1 image"):
        answers(*teacher, [two], about, Generation())


def test_the_entry_point_is_declared_and_loads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lmms_eval.models"].items()
    assert name == "align_ti" and callable(EntryPoint(name, value, "lmms_eval.models").load())
    assert any(one.startswith("lmms-eval") for one in project["optional-dependencies"]["lmms-eval"])
    assert not any("lmms" in one for one in project["dependencies"])


# --- with lmms-eval itself --------------------------------------------------------------------------------------------


def write_task(folder: Path) -> None:
    """The records as a local task of lmms-eval."""
    (folder / "data.json").write_text(json.dumps(documents(folder)))
    (folder / "utils.py").write_text(
        "from PIL import Image\n\n\ndef pictures(doc):\n    return [Image.open(doc['image'])]\n"
    )
    (folder / "digits.yaml").write_text(
        f"""task: align_ti_digits
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "data.json"}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: {LIMIT}, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
    )


@needs_lmms_eval
def test_lmms_eval_gets_our_answers(folder, ours, tmp_path):
    write_task(folder)
    arguments = [
        "--model",
        "align_ti",
        "--model_args",
        f"pretrained={folder / 'teacher'}",
        "--tasks",
        "align_ti_digits",
    ]
    arguments += ["--include_path", str(folder), "--batch_size", "5", "--device", "cpu", "--log_samples"]
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "eval", *arguments, "--output_path", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    # lmms-eval ends with 0 after an error too.
    found = list(tmp_path.rglob("*_samples_align_ti_digits.jsonl"))
    assert len(found) == 1, done.stderr[-3000:]
    (samples,) = found
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    assert [line["filtered_resps"] for line in lines] == ours
    (results,) = tmp_path.rglob("*_results.json")
    right = [text == one["answer"] for text, one in zip(ours, documents(folder), strict=True)]
    (score,) = [
        value
        for name, value in read_json(results)["results"]["align_ti_digits"].items()
        if name.startswith("exact_match,")
    ]
    assert score == pytest.approx(sum(right) / len(right))
