"""The processes of one launch: how they start on one machine, end together, and part. Imports no torch by itself."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

PATIENCE = timedelta(hours=12)
"""How long processes wait where one of them does what the others need: reading and checking all records, say."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Signals that the launch hands on to its processes, which stop with a checkpoint."""

GRACE = 5.0
"""Seconds that the other processes have to end by themselves, once one has failed; they may wait for it in a collective for ever."""

STOPPING = 60.0
"""Seconds that the others have once one has stopped on request: they stop too, after what they still have to write."""

STOPPED = (75, 130)
"""Exit codes of a process that stopped on request."""

OWN_CODES = (2, *STOPPED)
"""Exit codes of the command line (an error, requeue, Ctrl-C): they count before the code of one that failed because another ended."""


def launch(count: int, arguments: Sequence[str]) -> int:
    """Runs `align-ti` with these arguments as so many processes of this machine, and gives the exit code of the launch.

    The first process writes to this terminal. Of the others the output is kept, and shown if one of them is what failed. Signals are
    handed on. When a process fails the others are ended, and one sentence says which it was.
    """
    environment = {**os.environ, **meeting_place(count)}
    # Threads of all processes together, not of each, are to be as many as there are cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [sys.executable, "-m", "align_ti", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        kept = [Path(folder) / f"rank-{rank}" for rank in range(count)]
        processes: list[subprocess.Popen[bytes]] = []

        def hand_on(number: int, _frame: FrameType | None) -> None:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in FORWARDED}
        try:
            for rank in range(count):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with kept[rank].open("wb") as file:
                    output = None if rank == 0 else file
                    # A session of its own: Ctrl-C reaches it once, through hand_on.
                    processes.append(
                        subprocess.Popen(
                            command,
                            env=own,
                            stdout=output,
                            stderr=output,
                            start_new_session=True,
                            preexec_fn=die_with_parent if sys.platform == "linux" else None,
                        )
                    )
            failed = ended(processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        if failed is None:
            return 0
        code = processes[failed].returncode
        if failed:
            sys.stderr.write(kept[failed].read_text(encoding="utf-8", errors="replace")[-4000:])
        if code not in OWN_CODES:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            print(
                f"error: process {failed} of {count} {how}, and the others were ended; the same command resumes from the last "
                "checkpoint, if there is one.",
                file=sys.stderr,
            )
        return code if code > 0 else 128 - code


def meeting_place(count: int) -> dict[str, str]:
    """Where the processes find each other: a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }


def ended(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all processes have ended, or one has failed and the others had their time; gives the one that is to blame."""
    until, order, failed = None, list[int](), False
    while True:
        for rank, process in enumerate(processes):
            if process.poll() not in {None, 0} and rank not in order:
                order.append(rank)
        running = any(process.poll() is None for process in processes)
        if order and until is None:
            until = time.monotonic() + STOPPING
        if not failed and any(processes[rank].returncode not in STOPPED for rank in order):
            failed, until = True, time.monotonic() + GRACE
        if not running or (until is not None and time.monotonic() > until):
            own = [rank for rank in order if processes[rank].returncode in OWN_CODES]
            # Of several with one reason the lowest: the first process has told its reason already.
            own = sorted(rank for rank in own if processes[rank].returncode == processes[own[0]].returncode)
            # A process that is killed loses no connection; those that wait for it do, in the same moment.
            killed = [rank for rank in order if processes[rank].returncode == -signal.SIGKILL]
            return next(iter([*own, *killed, *order]), None)
        time.sleep(0.05)


def die_with_parent() -> None:
    """Asks Linux to kill this process when the one that started it dies, so that none is left behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def group_of_launch() -> Any:
    """torch.distributed where this process has joined a group of processes; None where it has not, or torch is not imported."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None


def wait_for_all() -> None:
    """Waits until every process of the launch has come here; nothing where there is only one.

    The group that trains ends a run whose processes wait for each other for longer than its timeout, ten minutes under NCCL. That is
    right within a step, and wrong where one process reads a million records: this wait has a group of its own.
    """
    distributed = group_of_launch()
    if distributed is not None:
        distributed.barrier(group=patient_group(distributed.group.WORLD))


@lru_cache(maxsize=1)
def patient_group(world: Any) -> Any:
    """The group of all processes in which they wait for each other; the key is the group that trains."""
    return sys.modules["torch.distributed"].new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process of the launch runs the block, then the others do, however long they wait for it."""
    distributed = group_of_launch()
    first = distributed is None or distributed.get_rank() == 0
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


def part_in_order() -> None:
    """Waits for the other processes of the launch, and leaves their group; nothing where there is only one process.

    A process that ends while the threads of its group still run is aborted by the C++ runtime ("terminate called without an active
    exception", seen with gloo), and the launcher then reports a run that failed after it was finished. So the command line, and a
    script of one's own, calls this at the end, after a success: after an error the others may never arrive.
    """
    distributed = group_of_launch()
    if distributed is not None:
        distributed.barrier()
        distributed.destroy_process_group()
