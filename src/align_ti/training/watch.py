"""What a run records while it trains: metrics, time of each step, and a stop that loses nothing."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align_ti.models.families import tower
from align_ti.models.overrides import override_forward
from align_ti.phases import OTHER, Stopwatch, phase, settled_clock
from align_ti.runs import WHOLE, RunFolder, write_json
from align_ti.training.memory import highest

SCHEDULER = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""The signals by which a scheduler says that the time is over; Windows has no SIGUSR1."""

CTRL_C, REQUEUE = 1, 2
"""Who asked a run to stop; of several processes the higher one counts."""

WARM_UP = 5
"""First steps of a run that the time of a step leaves out: allocation and compilation happen in them."""

STEP = (
    "data",
    "generation",
    "vision",
    "student forward",
    "teacher forward",
    "capture",
    "candidates",
    "student second pass",
    "teacher second pass",
    "divergence",
    "backward",
    "optimizer",
    OTHER,
)
"""The phases of a step, in the order in which they are shown; docs/training.md says what is in each."""


@runtime_checkable
class Timed(Protocol):
    """What the time of a step depends on beside the step: whether a trainer's steps differ in their work, by chance or along
    training, and what it does before a step begins."""

    seconds_before_step: float

    @property
    def steps_differ(self) -> bool: ...

    @property
    def steps_change(self) -> bool: ...


class RunRecorder(TrainerCallback):
    """Appends each log to the run's metrics, times every step, and stops at the end of a step when asked to.

    A line of the metrics also has `time`, the seconds since 1970, and `memory_mib`, the most memory so far (`memory.highest`).
    """

    def __init__(self, run: RunFolder, advance: Callable[[int, int], None] | None = None) -> None:
        self.run, self.advance = run, advance
        self.trainer: Timed | None = None
        self.seconds: list[float] = []
        self.asked = 0
        """What this process was asked by. Only signals change it: one that comes during the exchange is seen after the next step."""
        self.stopped = 0
        """What any of the processes was asked by, at the end of the last step."""
        self.started = 0.0
        self.went_on = False
        """Whether the run goes on from a checkpoint."""

    def attach(self, trainer: Timed) -> None:
        """Tells whose steps these are; their time then includes what the trainer does before transformers says that one begins."""
        self.trainer = trainer

    @property
    def seconds_per_step(self) -> float | None:
        """The median time of a step, the mean if steps differ in their work; None if there were too few to tell, or if the work
        changes along training and the run went on from a checkpoint, whose steps were not timed here."""
        steps = self.seconds[WARM_UP:]
        if not steps:
            return None
        # Where some batches are answered and others not, a median is the time of one kind, whatever the other costs.
        changes = self.trainer is not None and self.trainer.steps_change
        if changes and self.went_on:
            return None
        differ = changes or (self.trainer is not None and self.trainer.steps_differ)
        return statistics.fmean(steps) if differ else statistics.median(steps)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.went_on = state.global_step > 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        before = 0.0 if self.trainer is None else self.trainer.seconds_before_step
        self.seconds.append(before + time.perf_counter() - self.started)
        if self.advance is not None:
            self.advance(state.global_step, state.max_steps)
        self.stopped = self.anybody_stopped(args)
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def anybody_stopped(self, args: TrainingArguments) -> int:
        """What any process was asked by: all have to stop at the same step, or the others would wait for it forever."""
        if args.world_size == 1:
            return self.asked
        flag = torch.tensor(self.asked, device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes down what a whole checkpoint holds, once every process has written its part."""
        if args.world_size > 1:
            torch.distributed.barrier()
        checkpoint = self.run.root / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != WHOLE)
            write_json(checkpoint / WHOLE, {str(path.relative_to(checkpoint)): path.stat().st_size for path in files})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            memory = highest()
            now = {"time": round(time.time(), 3), "memory_mib": None if memory is None else round(memory, 1)}
            self.run.append_metrics({"step": state.global_step, **logs, **now})

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the block, Ctrl-C, SIGTERM and SIGUSR1 finish the step and save a checkpoint; the second Ctrl-C stops at once.

        A second SIGTERM or SIGUSR1 changes nothing: schedulers send them to a launcher and to its processes alike.
        """

        def stop(_signal: int, _frame: FrameType | None) -> None:
            self.asked = max(self.asked, CTRL_C)
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        def requeue(_signal: int, _frame: FrameType | None) -> None:
            self.asked = REQUEUE

        if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled
            yield
            return
        before = {one: signal.getsignal(one) for one in (signal.SIGINT, *SCHEDULER)}
        try:
            signal.signal(signal.SIGINT, stop)
            for one in SCHEDULER:
                signal.signal(one, requeue)
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


class StepPhases(TrainerCallback):
    """Where the time of each optimizer step goes, for `AlignTITrainer(phases=...)`.

    A step lasts from asking for its batches to the end of its update; the log, checkpoints and evaluations after it belong to none.

    Args:
        clock: tells the time in seconds; by default one that waits for the models' accelerators.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock
        self.stopwatch = Stopwatch()
        self.steps = array("d")
        self.spent = {name: array("d") for name in STEP}

    @contextmanager
    def running(self, models: Iterable[PreTrainedModel]) -> Iterator[None]:
        """Inside the block phases are counted, the vision towers of the models among them."""
        watched = list(models)
        devices = {parameter.device for model in watched for parameter in model.parameters()}
        self.stopwatch = Stopwatch(settled_clock(devices) if self.clock is None else self.clock)
        towers = {id(part): part for model in watched if (part := tower(model)) is not None}
        with ExitStack() as stack:
            for part in towers.values():
                stack.enter_context(override_forward(part, in_phase("vision", part.forward)))
            stack.enter_context(self.stopwatch.running())
            yield

    def begin_step(self) -> None:
        """Leaves out what lies between two steps."""
        self.stopwatch.lap()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The batches are there. What follows is forward and backward, in phases of their own, and the update.
        self.stopwatch.enter("optimizer")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopwatch.leave()
        lap = self.stopwatch.lap()
        self.steps.append(lap.seconds)
        for name, seconds in self.spent.items():
            seconds.append(lap.phases.get(name, 0.0))

    def summary(self) -> dict[str, Any] | None:
        """The content of `phases.json`: seconds of a step after the first few, as a whole and by phase; None if there were too few.

        The means of the phases add up to the step's; medians need not. `share` is the phase's part of the mean step.
        """
        whole = self.steps[WARM_UP:]
        if not whole:
            return None
        spent = {name: seconds[WARM_UP:] for name, seconds in self.spent.items()}
        return {
            "steps": len(whole),
            "steps_left_out": WARM_UP,
            "step": averages(whole),
            "phases": {
                name: {**averages(seconds), "share": round(sum(seconds) / sum(whole), 6)}
                for name, seconds in spent.items()
                if any(seconds)
            },
        }


def averages(seconds: Sequence[float]) -> dict[str, float]:
    """Median and mean, to the microsecond."""
    return {
        "median_seconds": round(statistics.median(seconds), 6),
        "mean_seconds": round(statistics.fmean(seconds), 6),
    }


def in_phase(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a phase."""

    def timed(*arguments: Any, **options: Any) -> Any:
        with phase(name):
            return function(*arguments, **options)

    return timed
