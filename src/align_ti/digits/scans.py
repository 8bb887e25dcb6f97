"""The 1,797 real scans of handwritten digits inside scikit-learn's wheel, split once and for all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from sklearn.datasets import load_digits

Split = Literal["train", "validation", "test"]

SPLIT_SEED = 20_260_209
"""Fixes which scan belongs to which split, whatever the seed of a run, so that no run trains on another's test scans."""

SPLIT_SHARES: dict[Split, float] = {"train": 0.65, "validation": 0.10, "test": 0.25}


@dataclass(frozen=True, slots=True)
class Scans:
    """The scans of one split: ink from 0 (paper) to 1 (full ink), and the digit that was written."""

    ink: Float[np.ndarray, "scans 8 8"]
    digit: Int[np.ndarray, " scans"]
    index: Int[np.ndarray, " scans"]
    """Each scan's number in scikit-learn's file, which shows that splits are disjoint."""


@lru_cache(maxsize=3)
def load_scans(split: Split) -> Scans:
    """The scans of a split. Splits share no scan.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998), the
    copy in scikit-learn.
    """
    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    bounds = np.cumsum([round(share * len(order)) for share in SPLIT_SHARES.values()])
    start = {"train": 0, "validation": bounds[0], "test": bounds[1]}[split]
    stop = {"train": bounds[0], "validation": bounds[1], "test": len(order)}[split]
    index = np.sort(order[start:stop])
    return Scans(ink=data.images[index] / 16.0, digit=data.target[index], index=index)
