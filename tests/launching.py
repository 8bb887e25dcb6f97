"""Scripts of tests on several processes of this machine."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from align_ti.processes import meeting_place
from tests.forking import READY, STARTED, Request

ROOT = Path(__file__).parent.parent
PATHS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}


def on_processes(
    count: int, script: str, *arguments: object, environment: dict[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs a script on several processes that find each other through gloo; all must end well.

    The script ends with `align_ti.processes.part_in_order()`.
    """
    done = launched(count, script, *arguments, environment=environment, timeout=timeout)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def launched(
    count: int, script: str, *arguments: object, environment: dict[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """As `on_processes`, however they end. The processes are forked from one that has imported the libraries already."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "worker.py"
        file.write_text(script, encoding="utf-8")
        variables = {**meeting_place(count), **(environment or {})}
        request = Request(count, str(file), timeout, [str(one) for one in arguments], variables)
        code = asked(request)
        out, err = (
            path.read_text("utf-8") if path.exists() else "" for path in (file.with_name("out"), file.with_name("err"))
        )
    if code is None:
        raise subprocess.TimeoutExpired(script, timeout, out, err)
    return subprocess.CompletedProcess(script, code, out, err)


def asked(request: Request) -> int | None:
    """The exit code of a launch, or None after its timeout."""
    source = forks()
    assert source.stdin is not None and source.stdout is not None
    source.stdin.write(request.line())
    source.stdin.flush()
    answer = source.stdout.readline()
    assert answer, f"the process that forks has ended ({source.wait()})"
    code: int | None = json.loads(answer)
    return code


@functools.cache
def forks() -> subprocess.Popen[str]:
    """The process that forks others, started once for all tests of this process; it ends with it."""
    source = subprocess.Popen(
        [sys.executable, "-m", "tests.forking"],
        env={**os.environ, **PATHS, **STARTED},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert source.stdout is not None
    assert source.stdout.readline().strip() == READY
    atexit.register(source.communicate)
    return source


def torchrun(
    count: int, script: str, *arguments: object, environment: dict[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """As `launched`, each process with a start of its own, by torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "worker.py"
        file.write_text(script, encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=localhost:0", str(file), *map(str, arguments)]
        own = {**PATHS, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, env={**os.environ, **own, **(environment or {})}, capture_output=True, text=True, timeout=timeout
        )
