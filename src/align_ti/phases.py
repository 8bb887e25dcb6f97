"""Where time goes: named phases of a piece of work, counted by a stopwatch if one is running. Imports no torch of its own accord.

stopwatch = Stopwatch()
with stopwatch.running():
    with phase("forward"):
        ...
stopwatch.seconds  # {"forward": 1.2, "other": 0.1}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        names: the phases that are counted; the time of any other is part of the phase around it. None: all are counted.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, names: Collection[str] | None = None) -> None:
        self.clock, self.names = clock, names
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
    """A block that the running stopwatch counts as this phase; without one, next to nothing happens."""
    stopwatch = _RUNNING.get()
    if stopwatch is None or (stopwatch.names is not None and name not in stopwatch.names):
        return _NOTHING
    return stopwatch.phase(name)


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
