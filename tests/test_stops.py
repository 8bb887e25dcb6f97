"""Runs that are stopped, killed or started twice: what they say, what they leave, and how they go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from align_ti.config import Recipe
from align_ti.errors import RequeueError, RunError
from align_ti.pipeline.training import distil
from align_ti.runs import WHOLE, RunFolder, write_json
from align_ti.training.watch import REQUEUE, RunRecorder
from tests import small
from tests.launching import ROOT, torchrun

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small.write_pair(folder)
    small.write_records(folder)
    return folder


def recipe(folder: Path, out: Path) -> Recipe:
    return Recipe.model_validate(small.recipe(folder, out=str(out)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_saves_a_checkpoint_and_asks_for_a_requeue(folder, tmp_path, number):
    def send(step: int, _steps: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a scheduler and a launcher may both send it

    with pytest.raises(RequeueError, match="step 3 of 4"):
        distil(recipe(folder, tmp_path / "run"), steps=send)
    assert (tmp_path / "run" / "checkpoint-3" / WHOLE).exists()
    assert signal.getsignal(number) == signal.SIG_DFL
    whole, resumed = distil(recipe(folder, tmp_path / "whole")), distil(recipe(folder, tmp_path / "run"))
    one, two = (load_file(run.student / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


HOLD = """
import sys, time
from pathlib import Path
from align_ti.runs import RunFolder
with RunFolder(Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(folder, tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"another run \(process {first.pid} on .*\) is training"):
            distil(recipe(folder, tmp_path / "run"))
        first.kill()
        first.wait()
        assert distil(recipe(folder, tmp_path / "run")).student.exists()
    finally:
        first.kill()
        first.wait()
        first.stdout.close()


def test_a_folder_that_a_kill_left_half_claimed_is_claimed_again(folder, tmp_path):
    # A kill between the two files of a claim left a folder that every later call refused.
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    (run.root / ".recipe.yaml.123").write_text("out: ")
    run.lock.touch()
    write_json(run.provenance, {})
    assert run.claim(recipe(folder, run.root)) is False
    run.recipe.unlink()
    (run.root / "notes.txt").touch()
    with pytest.raises(RunError, match="is no run folder"):
        run.claim(recipe(folder, run.root))


def test_half_a_checkpoint_is_passed_over(tmp_path):
    run = RunFolder(tmp_path)
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        write_json(folder / WHOLE, {"trainer_state.json": 2})
    assert run.last_checkpoint() == tmp_path / "checkpoint-10"
    # The state's file was taken for the sign of a whole checkpoint, though a kill can leave half of it.
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    assert run.last_checkpoint() == tmp_path / "checkpoint-2"
    # One of a version that wrote no list.
    (tmp_path / "checkpoint-2" / WHOLE).unlink()
    assert run.last_checkpoint() == tmp_path / "checkpoint-2"


def test_half_a_line_of_metrics_does_not_swallow_the_next(tmp_path):
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1, "loss": 1.0})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    run.append_metrics({"step": 2, "loss": 2.0})
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_each_line_of_metrics_tells_when_it_was_written_and_the_memory_so_far(tmp_path):
    run = RunFolder(tmp_path)
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    before = time.time()
    RunRecorder(run).on_log(arguments, TrainerState(global_step=3), TrainerControl(), {"loss": 1.0})
    (line,) = run.read_metrics()
    assert line["step"] == 3 and before - 0.001 <= line["time"] <= time.time() + 0.001
    # More than the interpreter with torch in it, where the system tells.
    assert line["memory_mib"] is None or line["memory_mib"] > 50


WORKER = """
import os, signal, sys
import yaml
from align_ti.config import Recipe
from align_ti.errors import RequeueError
from align_ti.pipeline.training import distil
from align_ti.processes import part_in_order

def send(step, steps):
    if step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)

try:
    distil(Recipe.model_validate(yaml.safe_load(open(sys.argv[1]))), steps=send)
except RequeueError as error:
    # In one piece: two processes write to one pipe.
    sys.stdout.write(f"stopped {os.environ['RANK']} {str(error).split(';')[0]}\\n")
part_in_order()
"""


def test_a_signal_to_one_process_stops_all_at_the_same_step(folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small.recipe(folder, out=str(tmp_path / "run"))))
    done = torchrun(2, WORKER, tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.splitlines())[-2:] == [f"stopped {rank} stopped at step 1 of 4" for rank in (0, 1)]
    assert RunFolder(tmp_path / "run").last_checkpoint() == tmp_path / "run" / "checkpoint-1"


def test_a_signal_that_comes_while_processes_tell_each_other_is_not_lost(tmp_path, monkeypatch):
    # The result of the exchange was written over what the signal had just asked for.
    recorder, state, control = RunRecorder(RunFolder(tmp_path)), TrainerState(), TrainerControl()
    state.global_step, state.max_steps = 1, 9
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)

    def exchange(flag: torch.Tensor, _how: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(torch.distributed, "all_reduce", exchange)
    with recorder.interruptible():
        recorder.on_step_end(args, state, control)
        assert not control.should_training_stop
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda _flag, _how: None)
        recorder.on_step_end(args, state, control)
    assert control.should_training_stop and control.should_save
    assert recorder.stopped == REQUEUE
