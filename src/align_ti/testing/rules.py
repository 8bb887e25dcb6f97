"""How a rule is stated: what holds, or an error with the numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def holds(what: bool, otherwise: str) -> None:
    """Goes on if the rule holds.

    Raises:
        AssertionError: it does not.
    """
    if not what:
        raise AssertionError(otherwise)


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Goes on if two tensors are equal within a tolerance, relative to the larger entries and absolute near 0.

    Raises:
        AssertionError: they are not.
    """
    apart = (found - expected).abs()
    limit = tolerance * (1 + expected.abs())
    worst = float((apart - limit).max()) if apart.numel() else 0.0
    holds(
        found.shape == expected.shape and not bool(torch.isnan(apart).any()) and worst <= 0,
        f"{what} differs by {float(apart.max()) if apart.numel() else 0.0:.3g}; at most {tolerance:g} is expected",
    )
