"""The means of each term over the steps between two lines of the log."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from align_ti.models.families import widest_float
from align_ti.training.objective import DistillationOutput


class Sums:
    """Totals and masses of each term since the last log, summed over batches."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.masses: dict[str, Tensor] = {}

    def add(self, output: DistillationOutput) -> None:
        parts = [*((name, output.totals[name], output.masses[name]) for name in output.totals)]
        if output.branch_share is not None:
            parts.append(("branch_share", output.branch_share, torch.ones_like(output.branch_share)))
        for name, total, mass in parts:
            self.count(name, total, mass)

    def count(self, name: str, total: Tensor, mass: Tensor) -> None:
        """Adds to one mean: the sum of some values, and their number."""
        self.totals[name] = self.totals.get(name, 0.0) + total.to(widest_float(total.device))
        self.masses[name] = self.masses.get(name, 0.0) + mass.to(widest_float(mass.device))

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each term over everything added, on all processes; the sums then start again at 0."""
        names = list(self.totals)
        if not names:
            return {}
        both = reduce(torch.stack([torch.stack([self.totals[name], self.masses[name]]) for name in names]))
        self.totals, self.masses = {}, {}
        return {name: float(total / mass.clamp(min=1)) for name, (total, mass) in zip(names, both, strict=True)}
