"""Tasks side by side, each in a process of its own that tells how far it is. Imports torch in those processes alone."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from queue import Empty

from align_ti.errors import AlignTIError, InterruptedRunError, RunError
from align_ti.processes import die_with_parent

Advance = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done, and all there is."""

Task = Callable[[Advance], None]
"""What a process does; it can be pickled, and goes on where it was stopped."""

PATIENCE = 0.2
"""Seconds to wait for a word of the processes before looking whether one has ended."""


def nothing() -> None:
    """No preparation."""


def side_by_side(
    tasks: Mapping[str, Task], jobs: int, advance: Advance, threads: int = 1, prepare: Callable[[], None] = nothing
) -> None:
    """Does all tasks, in their order, `jobs` of them at a time.

    When one fails, or on Ctrl-C, the others get SIGTERM and are waited for.

    Args:
        tasks: by the name that an error gives them.
        jobs: how many run at the same time.
        advance: called here, with what the tasks tell.
        threads: threads that torch has in each process.
        prepare: called first in each process; a function of a module.

    Raises:
        RunError: a task failed.
        InterruptedRunError: Ctrl-C; the same call goes on.
    """
    # Started anew: a forked process would share the locks of threads that libraries have started here.
    context = multiprocessing.get_context("spawn")
    told: Queue[str | tuple[str, int, int]] = context.Queue()
    waiting, running, said = list(tasks.items()), dict[str, BaseProcess](), [""]

    def listen(seconds: float = PATIENCE) -> None:
        with suppress(Empty):
            word = told.get(timeout=seconds)
            if isinstance(word, str):
                said[0] = word
            else:
                advance(*word)

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, task = waiting.pop(0)
                running[name] = context.Process(target=work, args=(task, told, threads, prepare), name=name)
                running[name].start()
            listen()
            for name, code in [(name, process.exitcode) for name, process in running.items()]:
                if code is None:
                    continue
                del running[name]
                while not told.empty():
                    listen()
                if code:
                    raise RunError(f"{name}: {said[0] or f'its process ended with exit code {code}'}")
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"stopped; {' and '.join(running)} will resume from what is saved: run the same command again."
        ) from None
    finally:
        for process in running.values():
            process.terminate()
        # What a process still tells has to be taken, or it cannot end.
        while any(process.is_alive() for process in running.values()):
            listen()


def work(task: Task, told: Queue[str | tuple[str, int, int]], threads: int, prepare: Callable[[], None]) -> None:
    """What a process of `side_by_side` does."""
    if sys.platform == "linux":
        die_with_parent()
    prepare()
    import torch

    torch.set_num_threads(threads)
    try:
        task(lambda stage, done, total: told.put((stage, done, total)))
    except AlignTIError as error:
        told.put(f"{type(error).__name__}: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
