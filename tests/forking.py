"""Processes of a launch without their start-up: one process imports the libraries once, and forks as many as a test asks for.

Run as a script it reads a request a line, in JSON, and answers each by a line. Each forked process has the variables that torchrun
sets, and its own interpreter state; none has seen a test. It ends with its standard input, so with the tests that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

READY = "ready"
STARTED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Variables that libraries read when they are imported."""


@dataclass
class Request:
    """A script for so many processes; what they print goes to `out` and `err` in its folder."""

    count: int
    script: str
    timeout: float
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def imported() -> None:
    """Imports what the scripts would, without a thread or a process group."""
    import accelerate
    import accelerate.commands.launch
    import datasets
    import torch
    import torch.distributed.fsdp
    import transformers

    import align_ti.pipeline.training  # noqa: F401

    torch.set_num_threads(1)
    assert accelerate.state.PartialState._shared_state == {} and not torch.distributed.is_initialized()
    # These are imported when they are first named.
    _ = transformers.Trainer, transformers.LlavaForConditionalGeneration, transformers.AutoProcessor, datasets.Dataset


def become(request: Request, rank: int) -> None:
    """Turns this forked process into one process of the launch, and runs the script; its end is this process's end."""
    folder = Path(request.script).parent
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request.environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    sys.argv = [request.script, *request.arguments]
    runpy.run_path(request.script, run_name="__main__")
    sys.exit(0)


def forked(request: Request) -> list[int]:
    """The ids of the processes; returns in this process alone."""
    processes = []
    for rank in range(request.count):
        process = os.fork()
        if process == 0:
            become(request, rank)
        processes.append(process)
    return processes


def end_of(processes: list[int], timeout: float) -> int | None:
    """Waits for all: 0, or the exit code of the first that failed, at which the others are ended; None after the timeout (seconds)."""
    running, first, until = set(processes), 0, time.monotonic() + timeout
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            running.remove(process)
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first = code
                signal_all(running, signal.SIGTERM)
                until = min(until, time.monotonic() + 10)
        elif time.monotonic() > until:
            signal_all(running, signal.SIGKILL)
            for process in running:
                os.waitpid(process, 0)
            return first or None
        else:
            time.sleep(0.02)
    return first


def signal_all(processes: set[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def serve() -> None:
    imported()
    print(READY, flush=True)
    while line := sys.stdin.readline():
        request = Request(**json.loads(line))
        print(json.dumps(end_of(forked(request), request.timeout)), flush=True)


if __name__ == "__main__":
    serve()
