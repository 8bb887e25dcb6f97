"""`align-ti evaluate --tasks` and `align-ti score` end to end: a tiny model, small folders in the published layouts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import Result
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from align_ti.cli import app
from align_ti.config import Evaluation, Recipe, Teacher
from align_ti.errors import ConfigError, DataError, InterruptedRunError, RunError
from align_ti.evaluation.benchmarks import PAPER, benchmark
from align_ti.evaluation.predictions import conversation_of, part_paths
from align_ti.evaluation.results import read_scores
from align_ti.evaluation.runner import said_to
from align_ti.evaluation.scored import score_file
from align_ti.models.loading import load_model, load_processor
from align_ti.pipeline import asking
from align_ti.pipeline.asking import Task, batches, model_digest, predict, read_task, score_tasks
from align_ti.pipeline.measuring import train_and_measure
from align_ti.report.card import write_card
from align_ti.report.page import write_report
from align_ti.runs import RunFolder, read_json
from tests import benchmark_folders, small
from tests.launching import ROOT

TASKS = (*PAPER, "digits")
MAKERS = {
    "gqa": benchmark_folders.gqa_folder,
    "sqa": benchmark_folders.scienceqa_folder,
    "textvqa": benchmark_folders.textvqa_folder,
    "pope": benchmark_folders.pope_folder,
    "mme": benchmark_folders.mme_folder,
    "mmbench": benchmark_folders.mmbench_folder,
    "digits": benchmark_folders.digits_folder,
    "own": benchmark_folders.own_folder,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The shipped `student` and `teacher` and, below `eval`, every benchmark; the right answers in `right.json`."""
    path = tmp_path_factory.mktemp("tasks")
    right = {name: make(path / "eval") for name, make in MAKERS.items()}
    for name in ("teacher", "student"):
        (path / "eval" / "digits" / name).rename(path / name)
    (path / "right.json").write_text(json.dumps(right))
    return path


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """Predictions of the teacher on POPE and the digits, made in one go."""
    predict(str(folder / "teacher"), some(folder), folder / "whole", batch_size=4, max_new_tokens=4)
    return folder / "whole"


def some(folder: Path) -> list[Task]:
    return [read_task(benchmark(name), folder / "eval") for name in ("pope", "digits")]


def environment() -> dict[str, str]:
    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1", "COLUMNS": "250"}
    return {**os.environ, **own}


def run_command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align_ti", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment())


def test_the_answers_are_what_the_model_says_to_each_question_alone(folder, whole):
    model, processor = load_model(str(folder / "teacher")), load_processor(str(folder / "teacher"))
    for task in some(folder):
        lines = [json.loads(line) for line in (whole / f"{task.benchmark.name}.jsonl").read_text().splitlines()[1:]]
        assert [line["id"] for line in lines] == [item.id for item in task.items]
        for item, line in zip(task.items, lines, strict=True):
            [(text, cut)] = said_to(model, processor, [conversation_of(item)], 4)
            assert (line["text"], line["cut"], line["prompt"]) == (text, cut, item.text)
    assert len({line["text"] for line in lines}) > 1


def test_batches_have_every_question_once_those_of_a_kind_together(folder):
    conversations = [conversation_of(item) for item in read_task(benchmark("digits"), folder / "eval").items]
    found = list(batches(conversations, 3))
    flat = [index for batch in found for index in batch]
    assert sorted(flat) == list(range(len(conversations))) and max(map(len, found)) == 3
    kinds = [conversations[index].kind for index in flat]
    assert sum(one != two for one, two in pairwise(kinds)) == len(set(kinds)) - 1
    # The largest first: what does not fit fails at once.
    lengths = [len(one.turns[0].text) for one in conversations]
    assert lengths[flat[0]] == max(lengths)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stop_and_the_rest_give_the_files_of_one_go(folder, whole, tmp_path, monkeypatch, stop):
    calls = [0]

    def stopped(*arguments, **options):
        calls[0] += 1
        if calls[0] > stop:
            raise KeyboardInterrupt
        return said_to(*arguments, **options)

    out, teacher = tmp_path / "out", str(folder / "teacher")
    monkeypatch.setattr(asking, "said_to", stopped)
    with pytest.raises(InterruptedRunError, match="resumes from there"):
        predict(teacher, some(folder), out, batch_size=4, max_new_tokens=4)
    assert not (out / "pope.jsonl").exists()
    (part,) = part_paths(out / "pope.jsonl")
    assert len(part.read_text().splitlines()) == 1 + 4 * stop
    # A kill may leave half of a line too; the batch that has lost it is asked once more.
    part.write_bytes(part.read_bytes()[:-7])
    asked = []
    monkeypatch.setattr(asking, "said_to", lambda *given: (asked.append(len(given[2])), said_to(*given))[1])
    predict(teacher, some(folder), out, batch_size=4, max_new_tokens=4)
    assert sum(asked) == 24 - 4 * stop + 4 + len(some(folder)[1].items)
    for name in ("pope", "digits"):
        assert (out / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes()
    assert part_paths(out / "pope.jsonl") == []
    # Nothing is left to ask, so no model is loaded.
    monkeypatch.setattr(asking, "load_teacher", lambda *_: pytest.fail("a model was loaded"))
    predict(teacher, some(folder), out, batch_size=4, max_new_tokens=4)


def test_a_kill_and_the_rest_give_the_files_of_one_go(folder, whole, tmp_path):
    arguments = ["evaluate", folder / "teacher", "--tasks", "pope,digits", "--data", folder / "eval", "--out", tmp_path]
    arguments += ["--max-new-tokens", 4, "--batch-size", 4]
    process = subprocess.Popen([sys.executable, "-m", "align_ti", *map(str, arguments)], env=environment())
    part, until = tmp_path / "pope.part-0.jsonl", time.monotonic() + 120
    while not part.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "digits.jsonl").exists()
    predict(str(folder / "teacher"), some(folder), tmp_path, batch_size=4, max_new_tokens=4)
    for name in ("pope", "digits"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes()


def test_predictions_of_another_model_or_by_other_settings_are_refused(folder, whole):
    before = (whole / "pope.jsonl").read_bytes()
    for model, tokens, told in (
        ("student", 4, "weights is"),
        ("teacher", 5, "max_new_tokens is 4 there and 5 here"),
        (Teacher(path=str(folder / "teacher"), dtype="bfloat16"), 4, "dtype is 'auto' there and 'bfloat16' here"),
    ):
        named = str(folder / model) if isinstance(model, str) else model
        with pytest.raises(RunError, match=told):
            predict(named, some(folder), whole, max_new_tokens=tokens)
    limited = [read_task(benchmark("pope"), folder / "eval", 5)]
    with pytest.raises(RunError, match="limit is None there and 5 here"):
        predict(str(folder / "teacher"), limited, whole, max_new_tokens=4)
    assert (whole / "pope.jsonl").read_bytes() == before


def test_a_models_digest_follows_all_that_its_answers_depend_on(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (folder / "teacher").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_digest(str(copy)) == model_digest(str(folder / "teacher")) != model_digest(str(folder / "student"))
    (copy / "README.md").write_text("a card")
    assert model_digest(str(copy)) == model_digest(str(folder / "teacher"))
    (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text() + " ")
    assert model_digest(str(copy)) != model_digest(str(folder / "teacher"))


def test_two_processes_give_the_files_of_one_and_finish_what_one_has_begun(folder, whole, tmp_path):
    tasks = ["--tasks", "pope,digits", "--data", folder / "eval", "--max-new-tokens", "4", "--batch-size", "4"]
    out = tmp_path / "two"
    out.mkdir()
    # What a single process, or one of three, has left is not asked again.
    lines = (whole / "pope.jsonl").read_bytes().splitlines(keepends=True)
    (out / "pope.part-2.jsonl").write_bytes(b"".join([lines[0], *lines[5:9], lines[9][:20]]))
    done = run_command("evaluate", folder / "teacher", *tasks, "--out", out, "--launch", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predictions and scores") == 1
    for name in ("pope", "digits"):
        assert (out / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes()
        assert part_paths(out / f"{name}.jsonl") == []


def called(*arguments: object) -> Result:
    """The command in this process."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_all_benchmarks_and_the_mean_of_six_by_one_command(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    # By default the folder of predictions is named after the model.
    monkeypatch.chdir(tmp_path)
    tasks = ["--tasks", ",".join(TASKS), "--data", folder / "eval", "--max-new-tokens", "2"]
    done = called("evaluate", folder / "teacher", *tasks)
    (out,) = (tmp_path / "evaluations").iterdir()
    assert out.name.startswith("teacher-")
    found = read_scores(out)
    assert set(found) == set(TASKS)
    mean = sum(found[name].metrics[found[name].headline].score for name in PAPER) / 6
    row = next(line for line in done.stdout.splitlines() if "mean of six" in line)
    assert f" {mean:.1f} " in row
    assert "the published benchmark has 8910" in done.stdout
    again = called("evaluate", folder / "teacher", *tasks, "--dry-run")
    assert "no model is run" in again.stdout


def test_score_equals_evaluate_and_needs_no_torch(folder, whole, tmp_path):
    score_tasks(some(folder), whole)
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from align_ti.cli import app\n"
        "for name in ('pope', 'digits'):\n"
        f"    result = CliRunner().invoke(app, ['score', {str(whole)!r} + '/' + name + '.jsonl', '--task', name, '--data',"
        f" {str(folder / 'eval')!r}, '--out', {str(tmp_path)!r} + '/' + name + '.scores.json'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("pope", "digits"):
        assert (tmp_path / f"{name}.scores.json").read_bytes() == (whole / f"{name}.scores.json").read_bytes()


@pytest.mark.parametrize("name", list(MAKERS))
def test_right_answers_by_another_tool_are_right(folder, tmp_path, name):
    right = json.loads((folder / "right.json").read_text())[name]
    (tmp_path / "answers.json").write_text(json.dumps([{"id": key, "prediction": text} for key, text in right.items()]))
    chosen = benchmark(name)
    items = read_task(chosen, folder / "eval" / ("own" if name == "own" else "")).items
    found = score_file(tmp_path / "answers.json", chosen, items)
    nothing = score_file_of({next(iter(right)): "zzz"}, tmp_path, name, items)
    assert found.headline["value"] > nothing.headline["value"]
    assert any("are missing" in note for note in nothing.report.notes)
    strict = score_file(tmp_path / "answers.json", chosen, items, strict_original=True)
    assert any("strictly" in note for note in strict.report.notes)


def score_file_of(texts: dict[str, str], folder: Path, name: str, items: list):
    (folder / "few.json").write_text(json.dumps(texts))
    return score_file(folder / "few.json", benchmark(name), items)


def test_ones_own_benchmark_by_the_command(folder, tmp_path):
    questions = folder / "eval" / "own" / "questions.jsonl"
    tasks = ["--tasks", "own", "--questions", questions, "--scorer", "contains", "--max-new-tokens", "2"]
    called("evaluate", folder / "teacher", *tasks, "--out", tmp_path / "own")
    scored = [
        "score",
        tmp_path / "own" / "own.jsonl",
        "--task",
        "own",
        "--questions",
        questions,
        "--scorer",
        "contains",
    ]
    called(*scored, "--out", tmp_path / "again.scores.json")
    assert (tmp_path / "again.scores.json").read_bytes() == (tmp_path / "own" / "own.scores.json").read_bytes()


def test_a_missing_picture_is_told_before_a_model_is_loaded(folder, tmp_path):
    benchmark_folders.pope_folder(tmp_path)
    picture = next((tmp_path / "pope" / "val2014").iterdir())
    picture.unlink()
    with pytest.raises(DataError, match=picture.name):
        read_task(benchmark("pope"), tmp_path)


WRONG = [
    (["evaluate", "m"], "one of the two; give one"),
    (["evaluate", "m", "d.json", "--tasks", "pope"], "leave the other out"),
    (
        ["evaluate", "m", "d.json", "--limit", "3", "--strict-original"],
        "--limit, --strict-original can be used only with --tasks",
    ),
    (["evaluate", "m", "--tasks", "pope", "--teacher", "t"], "can be used only with a file of records"),
    (["evaluate", "m", "--tasks", "pop", "--data", "."], "no benchmark is named 'pop'"),
    (["evaluate", "m", "--tasks", "pope,pope", "--data", "."], "each once"),
    (["evaluate", "m", "--tasks", "own:anls,own", "--data", "."], "each once"),
    (["evaluate", "m", "--tasks", "pope"], "--data is missing"),
    (["evaluate", "m", "--tasks", "own"], "the file of questions with --questions"),
    (["score", "p.jsonl", "--task", "own", "--scorer", "exat", "--questions", "q"], "no scorer is named 'exat'"),
    (["score", "p.jsonl", "--task", "pope", "--out", "x.json"], "ends in .scores.json"),
]


def test_wrong_options_are_told_in_a_sentence():
    for arguments, told in WRONG:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1 and told in str(result.exception), (arguments, result.exception)


# --- in recipes -------------------------------------------------------------------------------------------------------


def recipe(folder: Path, out: Path, **evaluation: object) -> dict[str, object]:
    """Four steps on records of the benchmark."""
    small.write_records(folder)
    sections = small.recipe(folder, out=str(out), evaluation={"batch_size": 4, **evaluation})
    sections["objective"] = {"iva": {"weight": 0}, "tpa": {"weight": 0}}
    return sections


def logged(run: RunFolder) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if "task_digits" in line]


def test_a_recipe_measures_before_during_and_after_training(folder, tmp_path):
    evaluation = {"tasks": "digits,gqa", "data": str(folder / "eval"), "task_max_new_tokens": 6, "limit": 6}
    watched = recipe(folder, tmp_path / "watched", **evaluation, every=2, sample=5)
    run = train_and_measure(Recipe.model_validate(watched))
    told = read_json(run.benchmarks)
    assert list(told["benchmarks"]) == ["teacher", "before", "student"]
    for name, model in (("teacher", folder / "teacher"), ("before", folder / "student"), ("student", run.student)):
        scores = read_scores(run.tasks(name))
        for task in ("digits", "gqa"):
            assert told["benchmarks"][name][task]["value"] == scores[task].metrics[scores[task].headline].score
        dtype = "float32"
        alone = predict(
            Teacher(path=str(model), dtype=dtype),
            [read_task(benchmark("digits"), folder / "eval", 6)],
            tmp_path / name,
            batch_size=4,
            max_new_tokens=6,
        )
        one, other = (path.read_text().splitlines()[1:] for path in (alone["digits"], run.tasks(name) / "digits.jsonl"))
        assert one == other
    assert told["benchmarks"]["teacher"]["digits"]["value"] > told["benchmarks"]["before"]["digits"]["value"]
    # Once while it was trained; the last step is left to the measurement of the finished student.
    (line,) = logged(run)
    assert line["step"] == 2 and line["task_digits_low"] <= line["task_digits"] <= line["task_digits_high"]
    # The student is trained as if nobody had asked.
    quiet = train_and_measure(Recipe.model_validate(recipe(folder, tmp_path / "quiet")))
    assert (quiet.student / "model.safetensors").read_bytes() == (run.student / "model.safetensors").read_bytes()
    losses = [[line["loss"] for line in of.read_metrics()] for of in (run, quiet)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(watched))
    assert "Digits: 8 questions" in called("train", path, "--dry-run").stdout


def test_benchmarks_alone_make_card_page_and_summary(folder, tmp_path):
    # Without data.eval they ended in benchmarks.json and a table; one whose interval is unknown stood in neither card nor page.
    evaluation = {"tasks": "digits,pope", "data": str(folder / "eval"), "task_max_new_tokens": 4, "limit": 1}
    run = train_and_measure(Recipe.model_validate(recipe(folder, tmp_path / "run", **evaluation)))
    told = read_json(run.benchmarks)["benchmarks"]
    summary = read_json(run.summary)
    assert summary["benchmarks"] == told and not summary["accuracy"] and summary["questions"] == 0
    assert set(summary["labels"]) == {"teacher", "before", "student"}
    card, page = (run.student / "README.md").read_text(), write_report(run.root).read_text()
    results = {one.dataset_type: one for one in ModelCard(card).data.eval_results}
    for name in ("digits", "pope"):
        scores = {model: told[model][name] for model in told}
        student = scores["student"]
        known = [one for one in scores.values() if one["low"] is not None]
        assert (results[name].metric_value, results[name].metric_type) == (student["value"], student["metric"])
        for one in known:
            ends = f"{one['low']:.1f} to {one['high']:.1f}"
            assert f"{one['value']:.1f} ({ends})" in card and ends in page
        if len(known) < len(scores):
            assert "(interval unknown)" in card and "interval unknown" in page
        assert f"{student['title']}" in page
    # One image's questions leave an F1 without an interval, and a share with nearly none.
    assert told["student"]["pope"]["low"] is None and told["student"]["digits"]["low"] is not None
    assert results["pope"].metric_name == f"{told['student']['pope']['metric']}, 95 % interval unknown"
    assert "Nothing" not in card and "held-out questions" not in page and "<h2>Examples" not in page
    # A stop before one's own questions are answered loses no benchmark, and says what is missing.
    kept = run.recipe.read_text()
    run.recipe.write_text(kept.replace("eval: null", "eval: held-out.json"))
    text = write_card(run, tmp_path).read_text()
    assert "Evaluation on `held-out.json` is not finished" in text and "Benchmarks, each by its own protocol" in text


def test_the_command_writes_the_page_of_benchmarks(folder, tmp_path):
    evaluation = {"tasks": "digits", "data": str(folder / "eval"), "task_max_new_tokens": 4, "limit": 6}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe(folder, tmp_path / "run", **evaluation)))
    printed = called("train", path, "--no-check").stdout
    assert "report: " in printed and (tmp_path / "run" / "report.html").is_file()
    assert "exact match, %, 0 questions" not in printed


def test_tasks_of_a_recipe_are_checked_before_anything_is_trained(folder, tmp_path):
    for evaluation, told in (
        ({"tasks": "pope"}, "tasks is given but data is missing"),
        ({"tasks": ["pope", "pope"], "data": "x"}, "each benchmark once"),
        ({"tasks": "own:anls,own:exact", "data": "x"}, "each benchmark once"),
        ({"every": 3}, "every is given but tasks is missing"),
    ):
        with pytest.raises(ConfigError, match=told):
            Evaluation(**evaluation)
    assert Evaluation(tasks="gqa, pope", data="x").tasks == ("gqa", "pope")
    for name, error, told in (
        ("popr", ConfigError, "did you mean 'pope'"),
        ("pope", DataError, "llava_pope_test.jsonl"),
    ):
        (tmp_path / "empty" / "pope").mkdir(parents=True, exist_ok=True)
        sections = recipe(folder, tmp_path / "run", tasks=name, data=str(tmp_path / "empty"))
        with pytest.raises(error, match=told):
            train_and_measure(Recipe.model_validate(sections))
        assert not (tmp_path / "run").exists()
