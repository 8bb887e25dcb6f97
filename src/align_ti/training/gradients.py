"""Each term's share in the gradient of an optimizer step, measured apart from the step itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align_ti.config import Objective
from align_ti.runs import GRADIENT_SHARE

FLOAT16_SCALE = 1024.0
"""What a loss is multiplied by before it goes backward in float16, as a gradient scaler does."""

GRADIENT_NORM = "_gradient_norm"
"""In the metrics: what the name of the norm of a term's own gradient ends with."""


def only(objective: Objective, name: str) -> Objective:
    """The objective with one term alone, at its own weight and without schedules."""
    return Objective.only(chunk_rows=objective.chunk_rows, **{name: objective.without_schedules().terms[name]})


def added_gradients(losses: Sequence[Callable[[], Tensor]], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradient of the sum of several losses at each parameter, 0 where there is none; each loss is made when its turn comes.

    The parameters' own `grad` is left alone, and hooks that wait for it are not called.
    """
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for loss in losses:
        value = loss()
        if not value.requires_grad:
            continue
        for sum_, found in zip(total, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
            if found is not None:
                sum_ += found
    return total


def norm_of(gradients: Sequence[Tensor]) -> float:
    """The Euclidean norm of all of them together, in float32 or wider."""
    norms = [torch.linalg.vector_norm(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in gradients]
    return float(torch.stack([norm.to(norms[0]) for norm in norms]).norm()) if norms else 0.0


def shares_of(norms: Mapping[str, float]) -> dict[str, float]:
    """Each term's norm and its share in the sum of all norms, by their names in the log."""
    whole = sum(norms.values())
    shares = {name: norm / whole if whole != 0 else 0.0 for name, norm in norms.items()}
    return {f"{name}{GRADIENT_NORM}": norm for name, norm in norms.items()} | {
        f"{name}{GRADIENT_SHARE}": share for name, share in shares.items()
    }


class LogsGradients(TrainerCallback):
    """Logs, at the end of a step, what was measured before it."""

    def __init__(self, log: Callable[[dict[str, float]], None]) -> None:
        self.log = log
        self.pending: dict[str, float] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.pending:
            due = control.should_log
            self.log(self.pending)
            # Any log counts as the step's own, whose terms are still to come.
            control.should_log, self.pending = due, {}
