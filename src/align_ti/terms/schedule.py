"""Options of a term that change along training."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from align_ti.options import Options


class Schedule(Options):
    """The course of one option over training: `initial` until `begin`, `final` from `end` on, and in between from one to the other.

    Times are fractions of the training steps. With `begin` equal to `end`, the option changes from one step to the next.
    """

    where: ClassVar[str] = "schedule"
    initial: float | None = Field(default=None, allow_inf_nan=False)
    """The value at first; by default the option's own."""
    final: float = Field(allow_inf_nan=False)
    """The value at last."""
    begin: float = Field(default=0.0, ge=0, le=1)
    """When the change begins."""
    end: float = Field(default=1.0, gt=0, le=1)
    """When it ends."""
    shape: Literal["linear", "cosine"] = "linear"
    """How the value changes in between."""

    @model_validator(mode="after")
    def _begins_first(self) -> Schedule:
        if self.begin > self.end:
            raise ValueError(f"begin is {self.begin:g}, after end, {self.end:g}; give a begin of at most {self.end:g}")
        return self

    def value(self, progress: float, own: float) -> float:
        """The option's value at this fraction of training; `own` is the value given for the option itself."""
        initial = own if self.initial is None else self.initial
        if progress >= self.end:
            return self.final
        if progress <= self.begin:
            return initial
        done = (progress - self.begin) / (self.end - self.begin)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return initial + (self.final - initial) * done
