"""How the benchmarks measure: rounds over all variants in turn, so that a slow moment of the machine meets each of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from align_ti.runs import provenance
from align_ti.training.memory import peak_memory

Work = Callable[[], Any]


def check_device(device: str) -> None:
    """Refuse a measurement whose memory would be read off another device.

    Raises:
        SystemExit: the device is the processor, but an accelerator is there; or the other way round.
    """
    if (device == "cpu") == torch.cuda.is_available():
        found = "an accelerator" if torch.cuda.is_available() else "none"
        raise SystemExit(
            f"--device is {device}, but {found} was found, so memory would be read off another one; give --device cuda where there is "
            "one, or hide it (CUDA_VISIBLE_DEVICES=)."
        )


def dtype_of(device: str, name: str | None = None) -> torch.dtype:
    """The named type of the models' numbers; by default float32 on a processor and bfloat16 on an accelerator."""
    dtype: torch.dtype = getattr(torch, name or ("float32" if device == "cpu" else "bfloat16"))
    return dtype


def synchronize() -> None:
    """Waits for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Work) -> float:
    """Wall-clock seconds of one call."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def mib_of(work: Work) -> float | None:
    """Peak memory of one call above what was there before, in MiB; None where the system does not tell."""
    synchronize()
    with peak_memory() as peak:
        work()
        synchronize()
    return None if peak.mib is None else round(peak.mib, 1)


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names in order, another one first in each round."""
    start = by % len(names) if names else 0
    return [*names[start:], *names[:start]]


def seconds_by_round(works: Mapping[str, Work], rounds: Mapping[str, int]) -> dict[str, list[float]]:
    """Seconds of each work in each of its rounds; those with fewer rounds take part in the first ones."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(max(rounds.values(), default=0)):
        for name in rotated([name for name in works if index < rounds[name]], index):
            seconds[name].append(round(seconds_of(works[name]), 5))
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; of a single value it is that value."""
    if len(values) == 1:
        return {"median": values[0], "lower": values[0], "upper": values[0]}
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 5), "lower": round(lower, 5), "upper": round(upper, 5)}


def ratios(values: Sequence[float], against: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio within a round, over the rounds that both took part in."""
    return summary([one / other for one, other in zip(values, against, strict=False)])


def machine(device: str) -> dict[str, Any]:
    """Everything about the machine that a time depends on, at the moment of asking."""
    accelerator = torch.cuda.get_device_name() if device != "cpu" else None
    return {
        "device": device,
        "accelerator": accelerator,
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "provenance": provenance(),
    }
