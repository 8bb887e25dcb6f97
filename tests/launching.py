"""Scripts of tests on several processes of this machine, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    """As `on_processes`, however they end."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "worker.py"
        file.write_text(script, encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=localhost:0", str(file), *map(str, arguments)]
        own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, env={**os.environ, **own, **(environment or {})}, capture_output=True, text=True, timeout=timeout
        )
