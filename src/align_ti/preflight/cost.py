"""Expected memory of a device and time of a run, from one real forward and backward pass."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from align_ti.allocator import keep_freed_memory
from align_ti.config import Engine, Objective, Training
from align_ti.config.engines import SHARDED_WEIGHTS
from align_ti.data.collator import Collator
from align_ti.models.loading import first_line
from align_ti.models.pairing import Pairing
from align_ti.preflight.pair import Models, on_device
from align_ti.preflight.samples import Sample
from align_ti.preflight.terms import MISHAPS
from align_ti.preflight.verdicts import Verdict
from align_ti.training.memory import Peak, peak_memory
from align_ti.training.objective import distillation_loss
from align_ti.training.optimizers import hidden_matrices

BUDGET = 30.0
"""Seconds that the measured pass may take; a batch that would take longer is measured smaller and scaled up."""

TIGHT = 0.9
"""Share of a device's memory from which a step is called tight: fragmentation and longer records need room."""

LESS = "a smaller training.per_device_train_batch_size, training.gradient_checkpointing: true, or bfloat16 weights"
"""What takes less memory."""

UNCHECKED = "check it on a device with more memory (`align-ti check`), then train with check: false"
"""What to do if a run fits its devices only in parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The processes of a run, and what of it each of them holds in part only."""

    processes: int = 1
    engine: Engine = "ddp"
    teacher: bool = False
    """Whether the teacher is sharded (teacher.sharded)."""

    @property
    def parts(self) -> bool:
        """Whether anything is held in parts."""
        return self.processes > 1 and (self.engine != "ddp" or self.teacher)

    @property
    def student_share(self) -> float:
        """What each process holds of the student's weights."""
        return 1 / self.processes if self.engine in SHARDED_WEIGHTS else 1.0

    @property
    def state_share(self) -> float:
        """What each process holds of gradients and optimizer states."""
        return 1.0 if self.engine == "ddp" else 1 / self.processes

    @property
    def teacher_share(self) -> float:
        """What each process holds of the teacher's weights."""
        return 1 / self.processes if self.teacher else 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One forward and backward pass: seconds, MiB above the start (None: not told), and on how many records and tokens."""

    seconds: float
    mib: float | None
    of: str
    records: int
    tokens: int


def cost_verdicts(
    models: Models,
    samples: Sequence[Sample],
    objective: Objective,
    training: Training,
    precision: Callable[[], AbstractContextManager[Any]],
    *,
    collate: Collator,
    pairing: Pairing,
    num_records: int,
    spread: Spread,
) -> list[Verdict]:
    """Expected memory of a device, and time of a step and of the run."""
    wanted = training.per_device_train_batch_size
    longest = sorted(samples, key=lambda sample: sample.length, reverse=True)
    batch = [longest[index % len(longest)] for index in range(wanted)]
    device = models["student"].device
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does

    def run(records: int, memory: AbstractContextManager[Peak]) -> Measured:
        tensors = on_device(collate([sample.tensors for sample in batch[:records]]), device)
        checkpointing = training.gradient_checkpointing
        return step(models, tensors, objective, precision, memory, pairing, checkpointing=checkpointing)

    try:
        run(1, nullcontext(Peak()))  # what is allocated and compiled once is not measured
        share = min(1.0, BUDGET / max(run(1, nullcontext(Peak())).seconds * wanted, 1e-9))
        measured = run(max(1, int(wanted * share)), peak_memory())
    except MISHAPS as error:
        return [does_not_run(error, spread)]
    mean = sum(sample.length for sample in samples) / len(samples)
    return [
        memory(models, measured, training, spread),
        duration(measured, mean / longest[0].length, training, num_records, spread.processes),
    ]


def step(
    models: Models,
    batch: Mapping[str, Any],
    objective: Objective,
    precision: Callable[[], AbstractContextManager[Any]],
    memory: AbstractContextManager[Peak],
    pairing: Pairing,
    *,
    checkpointing: bool,
) -> Measured:
    """One forward and backward pass as in training, measured; the gradients are dropped."""
    student = models["student"]
    student.train()
    with recomputing(student, checkpointing), memory as peak:
        started = time.perf_counter()
        with precision():
            out = distillation_loss(student, models.get("teacher"), batch, objective, pairing=pairing)
        if out.loss.requires_grad:
            out.loss.backward()
        if student.device.type == "cuda":
            torch.cuda.synchronize(student.device)
        seconds = time.perf_counter() - started
    student.zero_grad(set_to_none=True)
    student.eval()
    records, length = batch["input_ids"].shape
    return Measured(seconds, peak.mib, peak.of, records, records * length)


@contextmanager
def recomputing(student: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing inside the block if it is wanted and not on already, and off again after it."""
    if not wanted or any(getattr(module, "gradient_checkpointing", False) for module in student.modules()):
        yield
        return
    # Newer releases of transformers have this name for it and warn about the other.
    name = (
        "activation_checkpointing" if hasattr(student, "activation_checkpointing_enable") else "gradient_checkpointing"
    )
    getattr(student, f"{name}_enable")()
    try:
        yield
    finally:
        getattr(student, f"{name}_disable")()
        # Switching it on makes the embeddings' output require a gradient; switching it off leaves that.
        student.disable_input_require_grads()


def does_not_run(error: Exception, spread: Spread) -> Verdict:
    """The verdict where no step could be measured, out of memory among the reasons."""
    less = f"the check needs both models whole on one device, which this run does not: {UNCHECKED}"
    return Verdict(
        name="memory",
        state="fail",
        measured=f"a forward and backward pass stopped with: {first_line(error).rstrip('.')}",
        expected="a pass without errors",
        way_out=f"fix what the message names; if memory ran out: {less if spread.parts else LESS}",
    )


def memory(models: Models, measured: Measured, training: Training, spread: Spread) -> Verdict:
    """Weights + the optimizer's states + the measured peak of a pass, in which gradients are included.

    Weights that lie on another device than the student do not count. Of what is sharded the process's own part counts, without what
    is gathered of it during a pass, so that this is a lower bound.
    """
    student, wanted = models["student"], training.per_device_train_batch_size
    shares = {"student": spread.student_share, "teacher": spread.teacher_share}
    weights = sum(parameter_mib(model, on=student.device) * shares[name] for name, model in models.items())
    whole = parameter_mib(student, trained=True)
    trained = whole * spread.state_share
    muon = training.optimizer == "muon"
    single = hidden_matrices(student) if muon else []
    spared = sum(matrix.numel() * matrix.element_size() for matrix in single) / 2**20
    state = (2 * whole - spared) * spread.state_share
    exchange = whole if spread.processes > 1 and spread.engine == "ddp" else 0.0
    values: dict[str, Any] = {"weights_mib": weights, "optimizer_mib": state, "exchange_mib": exchange}
    kind = "states of Muon and AdamW" if muon else "AdamW's two states"
    known = f"weights {weights:.4g} + {kind} {state:.4g} + " + (
        f"exchange of gradients {exchange:.4g} + " if exchange else ""
    )
    if measured.mib is None:
        said, total = f"{known}an unknown peak, which this system does not report", None
    else:
        # Gradients have the size of what is trained whatever the batch; the rest of the peak grows with it.
        activations = max(measured.mib - whole, 0.0) * wanted / measured.records
        total = weights + state + exchange + trained + activations
        values |= {"gradients_mib": trained, "activations_mib": activations, "total_mib": total}
        said = (
            f"a step of {wanted} record(s) takes about {total:.4g} MiB: {known}gradients {trained:.4g} + activations "
            f"{activations:.4g} (measured on {measured.records}, {measured.of} memory)"
        )
    there = device_mib(student.device)
    values["device_mib"] = there
    share = 0.0 if total is None or there is None else total / there
    if spread.parts:
        said += f"; each of {spread.processes} processes holds parts, and what it gathers in a pass is not counted: see `align-ti plan`"
    return Verdict(
        name="memory",
        state="fail" if share > 1 else "warn" if share > TIGHT else "pass",
        measured=said,
        expected=f"at most {TIGHT:.0%} of " + ("the device's" if there is None else f"{there:.5g} MiB"),
        way_out=LESS,
        values=values,
    )


def parameter_mib(model: nn.Module, trained: bool = False, on: torch.device | None = None) -> float:
    """Size of the weights in MiB: of those that are trained, or that lie on a device, if asked for."""
    kept = (
        parameter
        for parameter in model.parameters()
        if (parameter.requires_grad or not trained) and (on is None or parameter.device == on)
    )
    return sum(parameter.numel() * parameter.element_size() for parameter in kept) / 2**20


def device_mib(device: torch.device) -> float | None:
    """All memory of the accelerator, or of the machine, in MiB; None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory / 2**20)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    except (ValueError, OSError, AttributeError):
        return None


def duration(measured: Measured, shorter: float, training: Training, num_records: int, processes: int) -> Verdict:
    """Seconds of an optimizer step and of the whole run, from the longest of the first records, scaled to their mean length."""
    batch, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    seconds = measured.seconds * batch / measured.records * accumulated * shorter
    steps = training.max_steps
    if steps < 0:
        steps = max(1, round(training.num_train_epochs * num_records / (batch * accumulated * processes)))
    return Verdict(
        name="time",
        state="pass",
        measured=f"an optimizer step takes about {seconds:.3g} s, {steps} steps about {clock(seconds * steps)} (one pass of "
        f"{measured.records} record(s) with {measured.tokens} tokens took {measured.seconds:.3g} s; data loading and the "
        "optimizer's update come on top)",
        expected="no limit; for planning only",
        values={"seconds_per_step": seconds, "steps": steps, "measured_seconds": measured.seconds},
    )


def clock(seconds: float) -> str:
    """A duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
