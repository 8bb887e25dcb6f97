"""Tasks side by side: what they tell arrives, and an error or Ctrl-C ends all of them."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from align_ti.errors import DataError, InterruptedRunError, RunError
from align_ti.parallel import side_by_side


def counts(to: int, advance) -> None:
    for done in range(1, to + 1):
        advance(f"to {to}", done, to)


def fails(advance) -> None:
    raise DataError("a record is broken")


def dies(advance) -> None:
    os._exit(7)


def waits(mark: Path, advance) -> None:
    """Leaves a mark when it has begun, and another one when it is asked to stop."""

    def stop(*_) -> None:
        mark.with_suffix(".stopped").touch()
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    mark.touch()
    advance("wait", 0, 1)
    time.sleep(60)


def fails_after(mark: Path, advance) -> None:
    while not mark.exists():
        time.sleep(0.05)
    fails(advance)


def test_all_tasks_are_done_and_all_that_they_tell_arrives_in_order():
    told = []
    tasks = {str(to): functools.partial(counts, to) for to in (3, 2, 500)}
    side_by_side(tasks, 2, lambda *word: told.append(word))
    for to in (3, 2, 500):
        assert [word for word in told if word[0] == f"to {to}"] == [(f"to {to}", n, to) for n in range(1, to + 1)]


def test_the_error_of_a_task_is_told_and_the_others_are_stopped(tmp_path):
    mark = tmp_path / "begun"
    tasks = {
        "long": functools.partial(waits, mark),
        "bad": functools.partial(fails_after, mark),
        "never begun": functools.partial(waits, tmp_path / "never"),
    }
    with pytest.raises(RunError, match="bad: DataError: a record is broken"):
        side_by_side(tasks, 2, lambda *_: None)
    assert mark.with_suffix(".stopped").exists() and not (tmp_path / "never").exists()


def test_a_task_whose_process_dies_is_told():
    with pytest.raises(RunError, match="lost: its process ended with exit code 7"):
        side_by_side({"lost": dies}, 1, lambda *_: None)


def test_ctrl_c_stops_all(tmp_path):
    mark = tmp_path / "begun"

    def advance(*_) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(InterruptedRunError, match="stopped; long will resume"):
        side_by_side({"long": functools.partial(waits, mark)}, 1, advance)
    assert mark.with_suffix(".stopped").exists()
