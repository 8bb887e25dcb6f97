"""The verbs as a user meets them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from typer.testing import CliRunner

from align_ti.cli import app
from align_ti.config import read_recipe
from align_ti.errors import InterruptedRunError
from align_ti.pipeline.parts import load_teacher
from align_ti.pipeline.training import distil
from tests import small
from tests.command import run

VERBS = [
    "demo",
    "train",
    "watch",
    "check",
    "plan",
    "score-layers",
    "evaluate",
    "score",
    "generate",
    "cache",
    "chat",
    "report",
    "digits",
    "compose",
    "import",
    "recipes",
]


def test_help_imports_no_torch_and_teaches_every_verb():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from align_ti.cli import app\n"
        f"for verb in [[], *[[name] for name in {VERBS!r}]]:\n"
        "    result = CliRunner().invoke(app, [*verb, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "    assert len(result.output) > 100\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'transformers', 'numpy'}, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_recipes_are_listed_shown_and_copied_once(tmp_path):
    assert "digits" in run("recipes", "list").stdout
    shown = run("recipes", "show", "digits").stdout
    assert yaml.safe_load(shown)["objective"]["tpa"]["candidates"] == 4
    copy = tmp_path / "mine.yaml"
    assert run("recipes", "copy", "digits", copy).returncode == 0
    assert copy.read_text().strip() == shown.strip()
    again = run("recipes", "copy", "digits", copy)
    assert again.returncode == 2 and "nothing was written" in again.stderr
    config = tmp_path / "fsdp2.yaml"
    assert run("recipes", "copy", "fsdp2", config).returncode == 0
    assert load_config_from_file(str(config)).fsdp_config["fsdp_version"] == 2
    missing = run("recipes", "show", "digitz")
    assert missing.returncode == 2 and "shipped: digits" in missing.stderr


def test_a_shipped_recipe_is_found_beside_a_folder_of_its_name(tmp_path):
    # `align-ti digits --out digits` makes such a folder; it was then read as the recipe.
    (tmp_path / "digits").mkdir()
    done = run("train", "digits", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "digits/train.json: the data file does not exist" in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    (path / "recipe.yaml").write_text(yaml.safe_dump(small.recipe(path)))
    return path


def test_an_error_is_one_message_without_a_traceback(folder):
    changes = ["--set", "objective.tpa.candidates=0", "--set", "trainin.max_steps=1"]
    command = [sys.executable, "-m", "align_ti", "train", str(folder / "recipe.yaml"), *changes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "objective.tpa.candidates is 0" in done.stderr
    assert "did you mean 'training'?" in done.stderr


def test_a_dry_run_checks_everything_and_trains_nothing(folder):
    done = run("train", folder / "recipe.yaml", "--dry-run", "--set", f"out={folder / 'dry'}")
    assert done.returncode == 0, done.stderr
    assert "nothing is trained" in done.stdout
    assert "36 visual" in done.stdout
    assert not (folder / "dry").exists()
    broken = run("train", folder / "recipe.yaml", "--dry-run", "--set", "data.train=none.json")
    assert broken.returncode == 2 and "none.json: the data file does not exist" in broken.stderr


def test_train_score_evaluate_and_report_work_together(folder, tmp_path):
    out = tmp_path / "run"
    changes = [
        f"out={out}",
        f"data.eval={folder / 'train.json'}",
        "evaluation.max_new_tokens=4",
        "training.max_steps=2",
    ]
    done = run("train", folder / "recipe.yaml", *[part for change in changes for part in ("--set", change)])
    assert done.returncode == 0, done.stderr
    assert (out / "student" / "model.safetensors").is_file()
    assert "exact match, %, 12 questions" in done.stdout
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert run("report", out).returncode == 0
    assert (out / "report.html").read_text() == page
    scores = run(
        "score-layers", folder / "teacher", folder / "train.json", "--pictures", "2", "--out", tmp_path / "s.json"
    )
    assert scores.returncode == 0, scores.stderr
    assert set(json.loads((tmp_path / "s.json").read_text())["scores"]) == {"0", "1"}
    measured = run(
        "evaluate", out / "student", folder / "train.json", "--max-new-tokens", "4", "--teacher", folder / "teacher"
    )
    assert measured.returncode == 0, measured.stderr
    assert "KL, response tokens" in measured.stdout


@pytest.mark.parametrize(("asked", "dtype"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16")])
def test_a_model_and_its_teacher_are_evaluated_in_one_precision(folder, monkeypatch, asked, dtype):
    loaded = {}

    def load(settings, device):
        loaded[Path(settings.path).name] = settings.dtype
        return load_teacher(settings, device)

    monkeypatch.setattr("align_ti.pipeline.measuring.load_teacher", load)
    command = ["evaluate", folder / "student", folder / "train.json", "--max-new-tokens", "2"]
    done = CliRunner().invoke(app, [str(part) for part in [*command, "--teacher", folder / "teacher", *asked]])
    assert done.exit_code == 0, done.output
    assert loaded == {"student": dtype, "teacher": dtype}


def test_ctrl_c_leaves_a_run_that_goes_on(folder, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "align_ti", "train", str(folder / "recipe.yaml")]
    command += ["--set", f"out={out}", "--set", "training.max_steps=400", "--set", "training.save_steps=400"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "resumes from it" in stderr
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert 1 <= step < 400
    # The recipe's number of steps is part of the run, so it goes on to the very end; here only a little is asked of it.
    stopped_at = len((out / "metrics.jsonl").read_text().splitlines())
    recipe = read_recipe(folder / "recipe.yaml", [part for part in command if "=" in part])
    with pytest.raises(InterruptedRunError):
        distil(recipe, steps=lambda done, _steps: signal.raise_signal(signal.SIGINT) if done > step else None)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[stopped_at] == step + 1


def test_the_demo_refuses_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run("demo", "--out", tmp_path)
    assert done.returncode == 2 and "holds no demo" in done.stderr
    wrong = run("demo", "--out", tmp_path / "x", "--split", "train")
    assert wrong.returncode == 2 and "--split is 'train'" in wrong.stderr


def test_a_dry_run_that_skips_says_what_and_why(folder, tmp_path):
    records = json.loads((folder / "train.json").read_text())
    (folder / "mixed.json").write_text(json.dumps([*records, {**records[0], "image": "gone.png"}]))
    changes = [
        f"out={tmp_path / 'dry'}",
        f"data.train={folder / 'mixed.json'}",
        "data.on_bad_record=skip",
        "data.max_skipped=1",
    ]
    done = run(
        "train", folder / "recipe.yaml", "--dry-run", *[part for change in changes for part in ("--set", change)]
    )
    assert done.returncode == 0, done.stderr
    assert "12 for training" in done.stdout and "1 skipped" in done.stdout and "gone.png" in done.stdout
    assert not (tmp_path / "dry").exists()
    changes[-1] = "data.max_skipped=0"
    done = run(
        "train", folder / "recipe.yaml", "--dry-run", *[part for change in changes for part in ("--set", change)]
    )
    assert done.returncode == 2 and "1 of 13 records cannot be used" in done.stderr
