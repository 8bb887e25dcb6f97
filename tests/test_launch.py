"""`align-ti train --launch N`: one command, N processes, one message and one exit code, whatever becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from align_ti.processes import ended
from align_ti.runs import RunFolder
from tests import small
from tests.launching import ROOT, on_processes

BROKEN = """
import os
from align_ti import Divergence, register
from align_ti.errors import DataError

@register
class Broken(Divergence):
    \"\"\"Forward KL, but on the second process.\"\"\"

    name = "broken"

    def values(self, log_p, log_q):
        if os.environ["RANK"] == "1":
            raise DataError("the second process cannot read its disk; mend it.")
        return (log_p.exp() * (log_p - log_q)).sum(-1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("launch")
    small.write_pair(path)
    small.write_records(path)
    return path


def start(folder: Path, out: Path, *more: str, **sections: object) -> subprocess.Popen[str]:
    """The command on two processes, with two records each in a step."""
    recipe = small.recipe(folder, out=str(out), **sections)
    recipe["training"] = {**recipe["training"], "per_device_train_batch_size": 2, **sections.get("training", {})}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "align_ti", "train", str(path), "--launch", "2", *more]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of a launch, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found[next(int(one.partition(b"=")[2]) for one in variables if one.startswith(b"RANK="))] = int(child)
    return [found[rank] for rank in sorted(found)]


def wait_for_step(run: RunFolder, step: int) -> None:
    """Returns when the log has the step."""
    until = time.monotonic() + 120
    while not any(line["step"] >= step for line in run.read_metrics()):
        assert time.monotonic() < until, "no step was made"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("codes", "blamed"),
    [
        # Exit codes, or pairs of an exit code and the seconds until it comes.
        ([0, 0], None),
        ([(75, 0.5), 75], 0),  # One reason, told by the first process, whichever ends earlier.
        ([(75, 6), 75], 0),  # It has more to write; a stop is no failure, which ends the others after five seconds.
        ([1, (2, 0.5)], 1),  # A lost connection, and then the reason for it.
        ([(-9, 0.5), 1], 0),  # A lost connection to a process that was killed.
    ],
)
def test_the_process_to_blame(codes, blamed):
    processes = []
    for one in codes:
        code, after = one if isinstance(one, tuple) else (one, 0)
        way = f"sys.exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
        processes.append(subprocess.Popen([sys.executable, "-c", f"import os, sys, time; time.sleep({after}); {way}"]))
    assert ended(processes) == blamed


def test_a_stop_by_a_scheduler_is_told_once_and_the_same_command_ends_the_run(folder, tmp_path):
    # That the weights are those of one go is tested where processes are cheap to start (test_stops, test_engine_runs).
    steps = {"training": {"max_steps": 40, "save_steps": 50}}
    stopped = start(folder, tmp_path / "run", **steps)
    wait_for_step(RunFolder(tmp_path / "run"), 1)
    stopped.send_signal(signal.SIGTERM)
    _, err = stopped.communicate(timeout=240)
    assert stopped.returncode == 75, err
    assert err.count("stopped at step") == 1
    assert RunFolder(tmp_path / "run").last_checkpoint() is not None
    run = start(folder, tmp_path / "run", **steps)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert out.count("student: ") == 1
    # Every ten steps and the first, which was made once.
    logged = [line["step"] for line in RunFolder(tmp_path / "run").read_metrics() if "loss" in line]
    assert logged == [1, 10, 20, 30, 40]


PATIENT = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as distributed
from align_ti.processes import first_process_first, part_in_order
distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
found = Path(sys.argv[1])
with first_process_first():
    if distributed.get_rank() == 0:
        time.sleep(5)
        found.write_text("checked")
    else:
        assert found.read_text() == "checked"
part_in_order()
"""


def test_processes_wait_for_the_first_one_longer_than_for_a_step(tmp_path):
    # Under NCCL a check of the records that took more than ten minutes ended the run.
    on_processes(2, PATIENT, tmp_path / "found")


def test_a_process_that_is_killed_ends_the_run_with_its_name(folder, tmp_path):
    run = start(folder, tmp_path / "run", training={"max_steps": 1000, "save_steps": 1000})
    wait_for_step(RunFolder(tmp_path / "run"), 1)
    processes = ranks_of(run)
    os.kill(processes[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = run.communicate(timeout=240)
    assert time.monotonic() - began < 30
    assert run.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was ended by SIGKILL" in err
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_a_process_that_raises_alone_ends_the_run_with_its_error(folder, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    run = start(
        folder,
        tmp_path / "run",
        "--allow-extensions",
        extensions=[str(tmp_path / "broken.py")],
        objective={"kd": {"divergence": "broken"}},
        training={"max_steps": 1000},
    )
    _, err = run.communicate(timeout=400)
    assert run.returncode == 2
    assert "the second process cannot read its disk" in err
