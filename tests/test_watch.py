"""`align-ti watch`: what it makes of a folder, in the terminal and as a page; run folders are written by hand."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from align_ti.cli.serving import make_server
from align_ti.cli.watching import BLOCKS, sparkline
from align_ti.errors import RunError
from align_ti.report.folder_progress import METHODS, progress
from align_ti.report.progress import Progress, duration, shape
from align_ti.report.progress_page import progress_page
from align_ti.report.run_progress import pace_of, run_progress
from align_ti.runs import RunFolder, owner_lives, read_lines
from tests.command import run as command

NOW = 1_000_000.0


def line(step: int, **more: object) -> dict[str, object]:
    """A line of the log as the trainer writes it: a second a step, 20 steps a line."""
    return {
        "step": step,
        "loss": 4.0 / step,
        "grad_norm": 2.0,
        "learning_rate": 1e-3,
        "kd": 2.0 / step,
        "kd_weight": 2.0,
        "branch_share": 0.25,
        "epoch": step / 50,
        "time": NOW - 100 + step,
        "memory_mib": 700.0,
        **more,
    }


def write_run(root: Path, steps: tuple[int, ...] = (1, 20, 40), max_steps: int = 100, **training: object) -> RunFolder:
    """A run under way, by a process that lives: this one."""
    run = RunFolder(root)
    root.mkdir(parents=True, exist_ok=True)
    recipe = {
        "student": {"path": "/models/student"},
        "teacher": {"path": "/models/teacher"},
        "training": {"max_steps": max_steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        | training,
    }
    run.recipe.write_text(yaml.safe_dump(recipe))
    run.provenance.write_text(json.dumps({"processes": 3}))
    run.lock.write_text(f"{os.getpid()} on {platform.node()}\n")
    for step in steps:
        run.append_metrics(line(step))
    return run


def cells(view: Progress) -> dict[str, tuple[str, ...]]:
    """Every row's cells by its label."""
    return {row.label: row.cells for section in view.sections for row in section.rows}


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_shows_terms_training_and_the_time_left(tmp_path):
    run = write_run(tmp_path / "run")
    run.append_metrics(
        {
            "step": 40,
            "task_own_answers": 50.0,
            "task_own_answers_low": 40.5,
            "task_own_answers_high": 60.0,
            "time": NOW - 60,
        }
    )
    view = progress(run.root, NOW - 50)
    assert (view.state, view.done, view.troubles) == ("student distilled from teacher: training", False, ())
    (bar,) = view.bars
    # 60 steps of a second are left, of which the log has been silent for 10.
    assert (bar.done, bar.total, bar.note) == (40, 100, "1 s / step, 50 s left, last log entry 10 s ago")
    told = cells(view)
    assert told["kd"] == ("0.05", "0.1") and told["loss"] == ("", "0.1")
    # A step has 4 records, twice, on 3 processes.
    assert told["records / s"] == ("24",)
    assert (told["memory, MiB"], told["branch share"]) == (("700",), ("0.25",))
    assert told["own answers"] == ("50", "40.5 to 60", "40")
    assert "kd_weight" not in told and "kd weight" not in told
    assert view.log[0].startswith("step 1 of 100  loss 4  kd 2")
    assert view.log[-1] == "step 40 of 100  task_own_answers 50 (40.5 to 60)"


@pytest.mark.parametrize(
    "half",
    ['{"step": 60, "loss"', "{", '{"step": 60, "kd": "\xc3', "12", '{"loss": 1}', '{"step": "60"}', '{"step": null}'],
)
def test_half_a_line_at_the_end_is_left_out(tmp_path, half):
    run = write_run(tmp_path)
    whole = progress(tmp_path, NOW)
    with run.metrics.open("ab") as file:
        file.write(half.encode("latin-1"))
    assert progress(tmp_path, NOW) == whole


def test_a_character_cut_in_half_or_a_line_separator_in_a_string_breaks_no_line(tmp_path):
    # The whole file was decoded at once: half a character in its last line made every line unreadable, and U+2028 split one.
    path = tmp_path / "skipped.jsonl"
    path.write_bytes('{"reason": "a\u2028b"}\n{"reason": "é'.encode()[:-1])
    assert read_lines(path) == [{"reason": "a\u2028b"}]


def test_before_the_first_line_it_waits(tmp_path):
    root = tmp_path / "run"
    assert progress(root, NOW).state == f"waiting: no run has started in {root} yet"
    root.mkdir()
    assert progress(root, NOW).bars == ()
    run = write_run(root, ())
    assert progress(root, NOW).state == "student distilled from teacher: preparing, no step is logged yet"
    run.recipe.write_text("a: [half a rec")
    assert progress(root, NOW).state.startswith("waiting")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="is a file; the folder of a run"):
        progress(file, NOW)


def test_a_finished_run_is_done_and_a_dead_one_has_stopped(tmp_path):
    run = write_run(tmp_path)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    run.lock.write_text(f"{gone.stdout.strip()} on {platform.node()}\n")
    stopped = progress(tmp_path, NOW)
    assert stopped.state == "student distilled from teacher: stopped at step 40" and not stopped.done
    assert "the same command resumes" in stopped.troubles[-1]
    assert stopped.bars[0].note == "stopped"
    run.student.mkdir()
    done = progress(tmp_path, NOW)
    assert done.done and done.bars[0].done == 100 and done.troubles == ()


def test_the_owner_of_a_lock_on_another_machine_is_not_known(tmp_path):
    lock = tmp_path / ".lock"
    assert owner_lives(lock) is None
    for text, lives in ((f"{os.getpid()} on {platform.node()}", True), ("1 on elsewhere", None), ("half", None)):
        lock.write_text(text)
        assert owner_lives(lock) is lives


def test_the_pace_leaves_out_a_stop_and_the_steps_come_from_epochs(tmp_path):
    lines = [line(step) for step in (20, 40, 60)]
    # The run stopped after step 60, went back to 40, and went on a day later.
    again = [line(step, time=NOW + 86400 + step) for step in (60, 80, 100)]
    assert pace_of([*lines, *again]) == pytest.approx(1)
    assert pace_of([*lines, *[{**one, "step": one["step"] + 20} for one in again]]) == pytest.approx(1)
    assert pace_of(lines[:1]) is None
    without = [{key: value for key, value in one.items() if key != "time"} for one in lines]
    assert pace_of(without) is None
    run = write_run(tmp_path, (20, 40), max_steps=-1, num_train_epochs=3.0)
    assert run_progress(run.root, NOW).steps == 150


def test_troubles_are_told_the_newest_last(tmp_path):
    run = write_run(tmp_path)
    bad = {"name": "pixels.teacher", "state": "warn", "measured": "grey", "expected": "colour", "way_out": "mend it"}
    run.check.write_text(json.dumps({"state": "warn", "verdicts": [bad, {**bad, "state": "pass"}]}))
    run.skipped.write_text('{"place": "a.json, record 1", "reason": "a.json, record 1: no image"}\n')
    run.truncated.write_text('{"place": "record 2", "tokens": 90, "kept": 64}\n')
    run.append_metrics(line(60, loss=float("nan")))
    assert progress(tmp_path, NOW).troubles == (
        "check, warn: pixels.teacher: grey; mend it",
        "record 2 was truncated from 90 to 64 tokens",
        "skipped: a.json, record 1: no image",
        "step 60: loss is nan",
    )


def test_phases_are_shown_if_the_run_counted_them(tmp_path):
    run = write_run(tmp_path)
    run.phases.write_text(json.dumps({"phases": {"backward": {"mean_seconds": 0.0125, "share": 0.5}}}))
    assert cells(progress(tmp_path, NOW))["backward"] == ("12.5", "50 %")


def test_shares_in_the_gradient_have_a_table_and_a_line_of_the_log(tmp_path):
    run = write_run(tmp_path)
    assert not any("gradient" in section.title for section in progress(tmp_path, NOW).sections)
    for step, share in ((1, 0.75), (40, 0.125)):
        shares = {"kd_gradient_share": share, "kd_gradient_norm": 3.0, "sft_gradient_share": 1 - share}
        run.append_metrics({"step": step, **shares, "time": NOW - 60})
    view = progress(tmp_path, NOW)
    (table,) = [section for section in view.sections if section.title == "share in the gradient norms"]
    assert [(row.label, row.cells, row.curve) for row in table.rows] == [
        ("kd", ("12.5", "40"), (0.75, 0.125)),
        ("sft", ("87.5", "40"), (0.25, 0.875)),
    ]
    assert "kd gradient norm" not in cells(view)
    assert view.log[-1] == "step 40 of 100  kd_gradient_share 0.125  sft_gradient_share 0.875"


def test_a_curve_keeps_its_shape(tmp_path):
    assert shape([], 8) == [] and shape([3.0], 8) == [0.5] and shape([2.0, 2.0], 8) == [0.5, 0.5]
    assert shape([0.0, 5.0, float("inf"), 10.0], 8) == [0, 0.5, 1]
    # A fall of a hundredfold is seen as two equal falls of tenfold.
    assert shape([100.0, 10.0, 1.0], 8) == pytest.approx([1, 0.5, 0])
    assert len(shape(list(range(1000)), 8)) == 8
    assert sparkline((1.0, 2.0, 3.0), 8) == BLOCKS[0] + BLOCKS[4] + BLOCKS[7]
    assert [duration(seconds) for seconds in (5.4, 65, 3725)] == ["5 s", "1 min 05 s", "1 h 02 min"]


# --- a demo, a study --------------------------------------------------------------------------------------------------


def test_a_demo_shows_its_three_runs_and_what_is_measured(tmp_path):
    (tmp_path / "demo.json").write_text("{}")
    assert progress(tmp_path, NOW).state.startswith("preparing")
    (write_run(tmp_path / "sft").student).mkdir()
    overall = {"per_cent": 41.25, "low": 38.0, "high": 44.5, "questions": 100}
    (tmp_path / "evaluation-sft.json").write_text(json.dumps({"accuracy": {"overall": overall}, "answers": []}))
    write_run(tmp_path / "kd")
    view = progress(tmp_path, NOW - 60)
    assert [(bar.label, bar.done, bar.note[:7]) for bar in view.bars] == [
        ("SFT", 100, "done"),
        ("SFT + vanilla KD", 40, "1 s / s"),
        ("Align-TI", 0, "waiting"),
    ]
    assert view.state == "SFT + vanilla KD: training" and not view.done
    assert cells(view)["SFT"] == ("41.2", "38.0 to 44.5")
    for name in METHODS:
        write_run(tmp_path / name).student.mkdir(exist_ok=True)
    assert progress(tmp_path, NOW).state == "Align-TI: trained; evaluation is next"
    (tmp_path / "report.html").write_text("")
    assert progress(tmp_path, NOW).done


def write_study(root: Path, **more: object) -> None:
    """A study of two variants and two seeds: one run done, one failed, one under way, one left."""
    recipe = {"training": {"max_steps": 100}}
    study = {"recipes": {"kd": recipe, "ours": recipe}, "labels": {"ours": "Ours"}, "seeds": [0, 1], "equal": "steps"}
    root.mkdir(exist_ok=True)
    (root / "study.yaml").write_text(yaml.safe_dump({**study, **more}))
    cost = {"seconds_per_step": 1.0, "flops_per_step": 1e9}
    (root / "costs.json").write_text(json.dumps({"kd": cost, "ours": {**cost, "seconds_per_step": 2.0}}))
    scores = {"own": {"headline": "right", "metrics": {"right": {"value": 61.25, "unit": "%"}}}}
    done = {"error": None, "scores": scores, "seconds": 100.0, "wall_seconds": 130.0}
    for seed, record in enumerate((done, {"error": "ModelError: no head", "wall_seconds": 1.0})):
        path = root / "records" / "kd" / f"{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    write_run(root / "work" / "ours" / "0" / "run")


def test_a_study_tells_runs_done_under_way_and_left(tmp_path):
    write_study(tmp_path)
    view = progress(tmp_path, NOW - 60)
    assert view.state == "4 runs: 1 done, 1 failed, 1 running, 1 remaining" and not view.done
    assert [(bar.label, bar.done, bar.total) for bar in view.bars] == [("runs", 2, 4), ("Ours, seed 0", 40, 100)]
    # 60 s of training and 30 s around it; then 100 steps of 2 s.
    assert view.bars[0].note == "about 4 min 50 s left"
    (variants, *rest) = view.sections
    assert [row.cells for row in variants.rows] == [("2 of 2", "61.2 %; failed"), ("0 of 2, 1 running", "")]
    assert rest[0].title == "Ours, seed 0: loss terms"
    assert view.troubles == ("kd, seed 1 failed: ModelError: no head",)
    assert view.log[:2] == ("kd, seed 0: 61.2 %", "kd, seed 1: failed")


@pytest.mark.parametrize(("equal", "seconds"), [("time", 100), ("flops", 200), ("nothing", 200)])
def test_the_time_of_a_run_that_nobody_has_made_comes_from_the_cost_of_a_step(tmp_path, equal, seconds):
    write_study(tmp_path, equal=equal, budget="kd")
    left = progress(tmp_path, NOW - 60).bars[0].note
    assert left == f"about {duration(90 + seconds)} left"


def test_a_study_without_runs_left_is_done_and_one_that_nobody_works_at_says_so(tmp_path):
    write_study(tmp_path)
    (tmp_path / "work" / "ours" / "0" / "run" / "recipe.yaml").unlink()
    assert progress(tmp_path, NOW).state.endswith("the same `align-ti study` command resumes")
    write_study(tmp_path, recipes={"kd": {}})
    done = progress(tmp_path, NOW)
    assert done.done and "--retry" in done.state


# --- the command ------------------------------------------------------------------------------------------------------


def test_once_fits_into_eighty_columns(tmp_path):
    write_study(tmp_path / "study")
    write_run(tmp_path / "study" / "work" / "ours" / "1" / "run", tuple(range(1, 60)))
    text = command("watch", tmp_path / "study", "--once", width=80).stdout
    assert "Ours, seed 0" in text and "records / s" in text and "no head" in text
    assert BLOCKS[-1] in text
    assert max(map(len, text.splitlines())) <= 80


def test_without_a_terminal_it_prints_a_line_for_every_entry_until_the_run_is_done(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", tuple(range(1, 30)))
    waits = iter([lambda: run.append_metrics(line(60)), lambda: None, run.student.mkdir])
    monkeypatch.setattr("align_ti.cli.watching.time.sleep", lambda _: next(waits)())
    said = command("watch", run.root).stdout.splitlines()
    assert [one.split("  ")[0] for one in said[:10]] == [f"step {step} of 100" for step in range(20, 30)]
    assert said[10] == "student distilled from teacher: training"
    assert [one.split("  ")[0] for one in said[11:]] == [
        "step 60 of 100",
        f"student distilled from teacher: done after 60 steps; the student is in {run.student}",
    ]


def test_it_imports_no_torch_and_ends_cleanly_on_ctrl_c(tmp_path):
    code = (
        "import sys\n"
        "sys.argv = ['align-ti', 'watch', sys.argv[1]]\n"
        "from align_ti.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    # A shell starts commands in the background with Ctrl-C ignored, and tests may run there.
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("waiting: no run has started")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")


def test_in_a_terminal_it_is_drawn_in_place_and_ends_with_the_run(tmp_path, monkeypatch):
    from align_ti.cli.terminal import console

    run = write_run(tmp_path / "run")
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr("align_ti.cli.watching.time.sleep", lambda _: run.student.mkdir())
    said = command("watch", run.root).stdout
    assert "\x1b[" in said and "done after 40 steps" in said and "training" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "80"], "--port is given without --serve"),
        (["--serve", "--once"], "--serve and --once are both given"),
    ],
)
def test_options_that_exclude_each_other_are_refused(tmp_path, options, words):
    done = command("watch", tmp_path, *options)
    assert done.returncode == 2 and words in done.stderr


# --- the page ---------------------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """The page's server on a free port."""
    server = make_server(folder, 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(port: int, path: str = "/", **headers: str) -> tuple[int, str]:
    """The answer to a request."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_page_is_served_to_this_machine_alone_and_nothing_else_is(tmp_path):
    run = write_run(tmp_path / "run")
    with served(run.root) as port:
        status, page = get(port)
        assert status == 200 and "records / s" in page and 'http-equiv="refresh"' in page
        for path in (
            "/recipe.yaml",
            "/../run/recipe.yaml",
            "//etc/passwd",
            "/?a=b",
            "/%2e%2e/",
            "/favicon.ico",
            "/<b>",
        ):
            status, text = get(port, path)
            assert status == 404 and "models" not in text and "<b>" not in text
        # A name of another site that was made to lead here.
        assert get(port, Host="evil.example")[0] == 404
        assert get(port, Host=f"localhost:{port}")[0] == 200
        run.append_metrics(line(60))
        assert "60 of 100" in get(port)[1]
        taken = command("watch", run.root, "--serve", "--port", str(port))
        assert taken.returncode == 2 and f"--port {port} cannot be served on" in taken.stderr
        assert make_server(run.root, 0).server_address[0] == "127.0.0.1"


def test_the_page_is_escaped_and_asks_for_nothing(tmp_path):
    run = write_run(tmp_path / "<script>alert(1)</script>")
    run.append_metrics({"step": 41, "task_<img src=x>": 1.0})
    run.skipped.write_text(json.dumps({"reason": "<script>x</script>"}) + "\n")
    page = progress_page(progress(run.root, NOW))
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;alert(1)" in page
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page
    run.student.mkdir()
    assert "http-equiv" not in progress_page(progress(run.root, time.time()))
