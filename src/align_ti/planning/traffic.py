"""What a device sends for one optimizer step, by a ring: bytes of gradients and weights by engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from align_ti.config.engines import DEEPSPEED, SHARDED_WEIGHTS
from align_ti.planning.memory import Layout, Model


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one device sends in an optimizer step, by purpose."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def traffic_of(model: Model, layout: Layout, micro_batches: int, *, draws: bool, terms: int) -> Traffic:
    """What one device sends in an optimizer step.

    Args:
        model: the recipe's sizes.
        layout: engine and devices.
        micro_batches: forward passes of a step.
        draws: whether there are candidates, and so a second pass over the language model.
        terms: terms whose masses are summed over all devices.
    """
    if layout.devices == 1:
        return Traffic({})
    ring = (layout.devices - 1) / layout.devices
    student, element = model.student, 2 if model.half else 4
    gradients = student.trained_numel * element if layout.engine in DEEPSPEED else student.trained
    sent: dict[str, float] = {"masses": 2 * ring * 8 * terms}
    if layout.engine == "ddp":
        sent["gradients"] = 2 * ring * gradients
    else:
        sent["gradients"] = ring * gradients * micro_batches
    if layout.engine == "zero2":
        sent["weights"] = ring * student.trained_numel * element
    if layout.engine in SHARDED_WEIGHTS:
        weights = student.numel * element if layout.engine == "zero3" else student.weights
        language = weights * (1 - student.tower / max(student.weights, 1))
        # Each pass gathers every layer: the gold pass and that of candidates, both again in backward; and the pass that draws them
        # beforehand, where masses have to be known over several micro-batches. The tower is read once in a forward pass.
        passes = 2 * (2 if draws else 1)
        drawing = 1 if draws and micro_batches > 1 else 0
        sent["weights"] = ring * micro_batches * (language * (passes + drawing) + (weights - language) * (1 + drawing))
    if layout.shard_teacher and not model.cached:
        sent["teacher's weights"] = ring * micro_batches * model.teacher_bytes * (2 if draws else 1)
    return Traffic({name: int(size) for name, size in sent.items()})
