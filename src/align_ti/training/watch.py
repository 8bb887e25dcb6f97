"""What a run records while it trains: metrics, time of each step, and a stop that loses nothing."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align_ti.runs import RunFolder

WARM_UP = 5
"""First steps of a run that the time of a step leaves out: allocation and compilation happen in them."""


class RunRecorder(TrainerCallback):
    """Appends each log to the run's metrics, times every step, and stops at the end of a step when asked to."""

    def __init__(self, run: RunFolder, advance: Callable[[int, int], None] | None = None) -> None:
        self.run, self.advance = run, advance
        self.seconds: list[float] = []
        self.stopped = False
        self.started = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """The median time of a step, or None if there were too few to tell."""
        steps = self.seconds[WARM_UP:]
        return statistics.median(steps) if steps else None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        if self.advance is not None:
            self.advance(state.global_step, state.max_steps)
        if self.anybody_stopped(args) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def anybody_stopped(self, args: TrainingArguments) -> bool:
        """Whether any process was asked to stop: all have to stop at the same step, or the others would wait for it forever."""
        if args.world_size == 1:
            return self.stopped
        flag = torch.tensor(int(self.stopped), device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            self.run.append_metrics({"step": state.global_step, **logs})

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the block, the first Ctrl-C finishes the step and saves a checkpoint; the second stops at once."""

        def stop(_signal: int, _frame: FrameType | None) -> None:
            self.stopped = True
            signal.signal(signal.SIGINT, before)

        try:
            before = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not the main thread, where signals cannot be handled
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
