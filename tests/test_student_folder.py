"""What a run leaves behind: a folder that plain transformers loads, and a card that tells the truth about it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from align_ti.config import Recipe
from align_ti.errors import RunError
from align_ti.evaluation.chat import Chat
from align_ti.models.adapters import unwrapped
from align_ti.pipeline.measuring import train_and_measure
from align_ti.report.card import block, code, is_local, name_only, one_line, write_card
from align_ti.report.tables import FIDELITY, with_interval
from align_ti.runs import RunFolder, write_json
from align_ti.training.trainer import AlignTITrainer
from tests import small

QUESTION = "What is in the image?"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[RunFolder, Path, str]:
    """A measured run with adapters, its image, and what the student in memory answered at the end of training."""
    folder = tmp_path_factory.mktemp("somewhere-private")
    small.write_pair(folder)
    small.write_records(folder)
    small.write_records(folder, "held-out.json", pictures=2, seed=1)
    recipe = small.recipe(
        folder,
        data={"train": str(folder / "train.json"), "eval": str(folder / "held-out.json")},
        objective={"iva": {"layer": 1, "weight": 0.5}},
        evaluation={"max_new_tokens": 4, "batch_size": 3},
    )
    recipe["student"] = {"path": str(folder / "student"), "lora": {"rank": 4}}
    recipe["training"] = {**recipe["training"], "learning_rate": 3e-2}
    picture, said = folder / "train-0.png", []
    train = AlignTITrainer.train

    def train_and_ask(self, *arguments, **options):
        out = train(self, *arguments, **options)
        model = unwrapped(self.model)
        said.append(Chat(model, self.processing_class, (picture,), 128).ask(QUESTION)[0])
        model.train()
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignTITrainer, "train", train_and_ask)
        run = train_and_measure(Recipe.model_validate(recipe))
    return run, picture, said[0]


def card(run: RunFolder) -> str:
    return (run.student / "README.md").read_text(encoding="utf-8")


def test_the_card_s_snippet_runs_alone_and_says_what_the_student_said_in_training(finished, tmp_path):
    run, picture, said = finished
    (snippet,) = re.findall(r"```python\n(.*?)```", card(run), re.DOTALL)
    snippet = snippet.replace("path/to/this/folder", str(run.student)).replace("image.png", str(picture))
    assert QUESTION in snippet
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nsys.modules['align_ti'] = sys.modules['peft'] = None\n" + snippet],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Merged weights round otherwise than adapters beside them, and among 128 greedy tokens two can be nearly as likely.
    assert len(said) > 40 and done.stdout.strip()[:40] == said[:40]


def test_the_folder_is_whole_and_names_no_place_of_the_machine(finished):
    run, _, _ = finished
    names = {path.name for path in run.student.iterdir()}
    needed = {"model.safetensors", "config.json", "generation_config.json", "processor_config.json", "README.md"}
    assert needed | {"chat_template.jinja", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) or "adapter" in name for name in names)
    for path in run.student.iterdir():
        assert b"somewhere-private" not in path.read_bytes(), path.name


def test_the_card_has_metadata_objective_data_versions_and_measurements(finished):
    run, _, _ = finished
    text = card(run)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-text-to-text"
    assert front["align_ti"]["student"] == "student" and front["align_ti"]["teacher"] == "teacher"
    assert "base_model" not in front
    assert "| iva | 0.5 |" in text and "`train.json` (12 records)" in text and "8 questions of `held-out.json`" in text
    trained = json.loads(run.training.read_text())["parameters"]["language_model"]
    assert f"| `language_model` | {trained[0]:,} | {trained[1]:,} |" in text
    summary = json.loads(run.summary.read_text())
    header = next(line for line in text.splitlines() if "student before" in line)
    assert header == "| | teacher | student before training | student |"
    row = next(line for line in text.splitlines() if line.startswith("| `overall` (8) |"))
    assert [float(value) for value in re.findall(r"\| (\d+\.\d) \(", row)] == pytest.approx(
        [summary["accuracy"][name]["overall"] for name in ("teacher", "before", "student")], abs=0.05
    )
    # Every measure of the fidelity with its interval; only the KL on right answers stood there, without one.
    assert {"response_kl", "top1_agreement", "own_kl"} <= summary["fidelity"]["student"].keys()
    assert summary["fidelity"]["student"]["response_kl"]["value"] == summary["divergence_nats"]["student"]
    for key, title in FIDELITY.items():
        measured = [summary["fidelity"][name].get(key) for name in ("before", "student")]
        if any(measured):
            unit = next(filter(None, measured))["unit"]
            row = next(line for line in text.splitlines() if line.startswith(f"| {title} ({unit}) |"))
            shown = ["" if one is None else "{} ({})".format(*with_interval(one, unit)) for one in measured]
            assert row.split(" | ")[1:] == [shown[0], f"{shown[1]} |"]
    assert summary.get("fidelity_notes", {}).keys() <= {"before", "student"}
    assert all(one_line(note) in text for notes in summary["fidelity_notes"].values() for note in notes)
    assert f"transformers {json.loads(run.provenance.read_text())['versions']['transformers']}" in text
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert recipe["student"]["path"] == "student" and recipe["data"]["eval"] == "held-out.json"


def test_a_hub_s_base_model_is_named_and_nothing_leaves_its_place_in_the_card(tmp_path):
    run = RunFolder(tmp_path / "run")
    evil = "evil ```\n---\n# heading | cell ` <script>"
    recipe = small.recipe(tmp_path, out=str(run.root), data={"train": evil})
    recipe["student"], recipe["teacher"] = {"path": "some-lab/small: model"}, {"path": "/secret/place/teacher`s"}
    run.claim(Recipe.model_validate(recipe))
    with pytest.raises(RunError, match="training"):
        write_card(run, tmp_path)
    write_json(run.training, {"steps": 1, "records": None, "parameters": {"a|b": [1, 2]}})
    text = write_card(run, tmp_path).read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "some-lab/small: model" and front["align_ti"]["teacher"] == "teacher`s"
    assert "/secret" not in text and str(tmp_path) not in text
    assert "`` teacher`s ``" in text and "| `a\\|b` | 1 | 2 |" in text
    assert "Nothing: the recipe names no evaluation data" in text and "model-index" not in front
    shown = run.recipe.read_text()
    run.recipe.write_text(shown.replace("eval: null", "eval: /secret/held-out.json"))
    assert "Nothing yet: evaluation on `held-out.json`" in write_card(run, tmp_path).read_text()
    # The fence around the recipe is longer than any in it, and the name of the file stays on its line.
    assert "````yaml\n" in text and "\n# heading" not in text
    assert text.split("````yaml\n")[1].count("````") == 1


def test_a_hub_reads_the_measurements_from_the_card(finished):
    run, _, _ = finished
    read = ModelCard(card(run)).data
    summary = json.loads(run.summary.read_text())
    assert read.model_name == "student, distilled"
    assert {result.dataset_name for result in read.eval_results} == {"held-out.json"}
    assert {result.dataset_type for result in read.eval_results} == {"held-out-json"}
    assert {result.task_type for result in read.eval_results} == {"image-text-to-text"}
    assert [result.metric_value for result in read.eval_results] == list(summary["accuracy"]["student"].values())
    for result, (kind, ends) in zip(read.eval_results, summary["interval_95"]["student"].items(), strict=True):
        low, high = ends
        assert result.metric_type == "exact_match"
        assert result.metric_name == f"exact match ({kind}), 95 % interval {low:.1f} to {high:.1f}"
        assert result.metric_args == {"interval_95": ends, "questions": summary["questions_by_kind"][kind]}


def test_benchmarks_stand_in_the_card_and_its_metadata(finished, tmp_path):
    run, _, _ = finished
    summary = json.loads(run.summary.read_text())

    def scores(value: float) -> dict[str, object]:
        return {
            "pope": {"title": "POPE: a | b", "metric": "f1", "value": value, "low": value - 1, "high": value + 1},
            "mme": {"title": "MME", "metric": "perception", "value": 1302.8, "low": 1250.0, "high": 1350.0},
            "own": {
                "title": "own",
                "metric": "anls",
                "value": 50.0,
                "low": None,
                "high": None,
                "notes": ["<i>2</i> cut"],
            },
        }

    benchmarks = {"teacher": {"pope": scores(86.0)["pope"]}, "student": scores(81.25)}
    try:
        write_json(run.summary, {**summary, "benchmarks": benchmarks})
        text = write_card(run, tmp_path).read_text()
    finally:
        write_json(run.summary, summary)
    results = ModelCard(text).data.eval_results
    own = len(summary["questions_by_kind"])
    pope, mme, unknown = results[own:]
    assert (pope.dataset_type, pope.dataset_name, pope.metric_type, pope.metric_value) == (
        "pope",
        "POPE: a | b",
        "f1",
        81.25,
    )
    assert mme.metric_name == "perception, 95 % interval 1250.0 to 1350.0"
    assert mme.metric_args == {"interval_95": [1250.0, 1350.0]}
    assert "| | teacher | student |\n|---|---|---|\n" in text
    assert "| `POPE: a \\| b`, `f1` | 86.0 (85.0 to 87.0) | 81.2 (80.2 to 82.2) |" in text
    assert "| `MME`, `perception` |  | 1302.8 (1250.0 to 1350.0) |" in text
    # A benchmark whose interval is unknown was left out without a word.
    assert "| `own`, `anls` |  | 50.0 (interval unknown) |" in text
    assert (unknown.metric_name, unknown.metric_value) == ("anls, 95 % interval unknown", 50.0)
    assert "student, `own`: \\<i\\>2\\</i\\> cut" in text


def test_names_are_told_from_paths():
    assert is_local("/a/b") and is_local("C:\\models\\b") and is_local("~/b") and is_local("./b")
    assert not is_local("lab/model") and not is_local("x" * 5000) and not is_local("nul\0")
    assert name_only({"a": ["/x/y.json", "lab/model", 3], "b": "C:\\models\\b", "c": None}) == {
        "a": ["y.json", "lab/model", 3],
        "b": "b",
        "c": None,
    }
    assert code("a") == "`a`" and code("a``b") == "``` a``b ```" and one_line("a\n# [b](c)") == r"a \# \[b\](c)"
    assert block("x\n", "yaml") == "```yaml\nx\n```"
