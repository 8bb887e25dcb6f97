"""Seconds of an optimizer step on many devices, simulated: counted work and bytes over assumed speeds. Nothing here is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from align_ti.planning.memory import Layout, Model
from align_ti.planning.traffic import traffic_of

TEACHER = ("teacher forward", "teacher second pass")
"""Phases that the teacher alone works in. Its share of the rows' products is counted under them by neither model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a simulation assumes of the machines; the defaults are an H100's data sheet and three guesses.

    Figures: NVIDIA H100 SXM, 989 TFLOP/s of dense bfloat16 products, NVLink 900 GB/s in both directions together; InfiniBand NDR, 400
    Gb/s for each device. Guesses: `utilisation`, `link_share`, `overlap`, `hop_seconds`, `unevenness`.
    """

    flops: float = 989e12
    utilisation: float = 0.4
    """Share of these FLOP/s that a model reaches."""
    node: int = 8
    """Devices joined by the fast links."""
    node_bytes: float = 450e9
    """Bytes a second that a device sends inside its node."""
    net_bytes: float = 50e9
    """Bytes a second that a device sends to other nodes."""
    link_share: float = 0.8
    """Share of these bytes a second that a collective reaches."""
    hop_seconds: float = 10e-6
    """Delay of one hop; a collective has as many as log2 of the devices."""
    overlap: float = 0.8
    """Share of the work under which an exchange is hidden."""
    unevenness: float = 0.05
    """Standard deviation of a device's work on a micro-batch, relative to its mean: lengths of records differ."""


DDP_BUCKET = 25 * 2**20
"""Bytes of one of DDP's buckets: PyTorch's own default of bucket_cap_mb."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step: work of the two models, what no work hides of the exchange, and waiting for the slowest device."""

    teacher: float
    student: float
    exchange: float
    waiting: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.teacher + self.student + self.exchange + self.waiting

    def share(self, part: str) -> float:
        """The share of a part."""
        return float(getattr(self, part)) / self.total


def step_time(
    model: Model,
    layout: Layout,
    machine: Machine,
    micro_batches: int = 1,
    *,
    draws: bool = True,
    units: int = 1,
    cached_teacher: bool = False,
) -> StepTime:
    """Seconds of an optimizer step.

    Args:
        model: sizes, and the counted work of a micro-batch.
        layout: engine and devices.
        machine: what is assumed of them.
        micro_batches: forward passes of a step on each device.
        draws: whether there are candidates.
        units: layers of the student, which sharding gathers one by one.
        cached_teacher: what the teacher makes is read from somewhere else, at no cost.
    """
    speed, flops = machine.flops * machine.utilisation, model.counted.flops
    theirs = 0.0 if cached_teacher else sum(flops.get(phase, 0) for phase in TEACHER) / speed
    ours = sum(size for phase, size in flops.items() if phase not in TEACHER) / speed
    if draws and micro_batches > 1:
        # Candidates are drawn beforehand, by one more pass of the student.
        ours += flops.get("student forward", 0) / speed
    traffic = traffic_of(model, layout, micro_batches, draws=draws, terms=4)
    hidden_under = machine.overlap * micro_batches * (ours + theirs)
    if layout.engine in {"ddp", "zero2"}:
        # Only the last micro-batch's backward is there to hide the exchange of gradients.
        hidden_under = machine.overlap * flops.get("backward", 0) / speed
    exchange = 0.0
    if layout.devices > 1:
        rate = machine.link_share * (machine.node_bytes if layout.devices <= machine.node else machine.net_bytes)
        hops = math.ceil(math.log2(layout.devices)) * machine.hop_seconds
        exchange = traffic.total / rate + collectives(model, layout, micro_batches, draws, units) * hops
    work = micro_batches * (ours + theirs)
    return StepTime(
        teacher=micro_batches * theirs,
        student=micro_batches * ours,
        exchange=max(0.0, exchange - hidden_under),
        waiting=work * machine.unevenness / math.sqrt(micro_batches) * slowest(layout.devices),
    )


def collectives(model: Model, layout: Layout, micro_batches: int, draws: bool, units: int) -> int:
    """How often devices talk in a step: buckets of gradients, or each unit in each pass; and once for masses."""
    if layout.engine in {"ddp", "zero2"}:
        times = 1 if layout.engine == "ddp" else micro_batches
        return 1 + times * math.ceil(model.student.trained / DDP_BUCKET)
    passes = (4 if draws else 2) + (1 if draws and micro_batches > 1 else 0)
    return 1 + micro_batches * (units + 1) * (passes + 1)


def slowest(devices: int) -> float:
    """Expected greatest of as many standard normal numbers (Blom's approximation)."""
    return 0.0 if devices == 1 else NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))
