"""Where time goes: named phases of a piece of work, counted by a stopwatch if one is running. Imports no torch of its own accord.

stopwatch = Stopwatch()
with stopwatch.running():
    with phase("forward"):
        ...
stopwatch.seconds  # {"forward": 1.2, "other": 0.1}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

OTHER = "other"
"""The phase of everything that is in no phase of its own."""

_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class Lap:
    """The seconds of each phase since the lap began, and of the lap as a whole, which they add up to."""

    phases: dict[str, float]
    seconds: float


class Stopwatch:
    """Exclusive seconds of each phase: a phase inside another stops the outer one's time until it ends.

    Args:
        clock: tells the time in seconds.
        of: "step" counts what `phase` names, "run" what `part` names; the time of the other kind belongs to what is around it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, of: Literal["step", "run"] = "step") -> None:
        self.clock, self.of = clock, of
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._border = self._lap_began = clock()

    def enter(self, name: str) -> None:
        """Begins a phase inside the one that is open."""
        self._count()
        self._open.append(name)

    def leave(self) -> None:
        """Ends the innermost phase."""
        self._count()
        self._open.pop()

    def so_far(self) -> dict[str, float]:
        """The seconds of each phase up to now, those of open phases included."""
        self._count()
        return dict(self.seconds)

    def lap(self) -> Lap:
        """What was counted since the last lap, and a new start; phases that are open stay open."""
        now = self._count()
        lap = Lap(self.seconds, now - self._lap_began)
        self.seconds, self._lap_began = {}, now
        return lap

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is a phase; an error ends it, and every phase that was left open inside it, as its end would."""
        depth = len(self._open)
        self.enter(name)
        try:
            yield
        finally:
            self._count()
            del self._open[depth:]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The time of the block counts in no phase and in no lap, nor does any phase inside it."""
        began, token = self._count(), _RUNNING.set(None)
        try:
            yield
        finally:
            _RUNNING.reset(token)
            self._border = self.clock()
            self._lap_began += self._border - began

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block, on this thread, `phase` counts on this stopwatch; time outside of any phase counts as "other"."""
        token = _RUNNING.set(self)
        try:
            with self.phase(OTHER):
                yield
        finally:
            _RUNNING.reset(token)

    def _count(self) -> float:
        """Gives the time since the last border to the innermost open phase; returns the time of the new border."""
        now = self.clock()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._border
        self._border = now
        return now


_RUNNING: ContextVar[Stopwatch | None] = ContextVar("align_ti_stopwatch", default=None)


def phase(name: str) -> AbstractContextManager[None]:
    """A block that a running stopwatch of steps counts as this phase; without one, next to nothing happens."""
    stopwatch = _RUNNING.get()
    return _NOTHING if stopwatch is None or stopwatch.of != "step" else stopwatch.phase(name)


def part(name: str) -> AbstractContextManager[None]:
    """A block that a running stopwatch of a run counts as this part; without one, next to nothing happens."""
    stopwatch = _RUNNING.get()
    return _NOTHING if stopwatch is None or stopwatch.of != "run" else stopwatch.phase(name)


def outside_of_steps() -> AbstractContextManager[None]:
    """A block that a running stopwatch of steps leaves out, with all phases in it; without one, next to nothing happens."""
    stopwatch = _RUNNING.get()
    return _NOTHING if stopwatch is None or stopwatch.of != "step" else stopwatch.stopped()


def phase_names(runs: Collection[Mapping[str, Any]]) -> list[str]:
    """Every phase that any of the runs' `phases.json` has, in the order of the one that has most."""
    longest_first = sorted(runs, key=lambda run: -len(run["phases"]))
    return list(dict.fromkeys(name for run in longest_first for name in run["phases"]))


def settled_clock(devices: Iterable[torch.device]) -> Callable[[], float]:
    """A clock that lets accelerators among the devices finish what they were given before it tells the time.

    Without the wait, work would be counted where its result is first needed. Waiting at every border of a phase keeps the processor
    from running ahead of the accelerator, so a run that is watched is a little slower than one that is not.
    """
    waited_for = {device for device in devices if device.type not in {"cpu", "meta"}}
    if not waited_for:
        return time.perf_counter
    import torch

    def settled() -> float:
        for device in waited_for:
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return settled
