"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from align_ti.allocator import of_glibc

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(slots=True)
class Peak:
    """`mib` is the peak above the start in MiB, or None where the system does not tell; `of` says of which memory."""

    mib: float | None = None
    of: str = ""


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures the block: memory allocated on the accelerator, or else the process's resident memory (Linux)."""
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield peak
        peak.mib, peak.of = (torch.cuda.max_memory_allocated() - start) / 2**20, "accelerator"
        return
    release()
    try:
        # Writing 5 resets the kernel's high-water mark of this process.
        CLEAR.write_text("5")
        start_kib = status("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.mib, peak.of = (status("VmHWM") - start_kib) / 1024, "resident"


def highest() -> float | None:
    """The most memory so far in MiB: allocated on the accelerator, or else resident in this process (Linux); None where unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        return status("VmHWM") / 1024
    except OSError:
        return None


def status(name: str) -> int:
    """One size of this process in KiB."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {name}")


def release() -> None:
    """Give freed memory back to the system, so that one measurement does not start with the leavings of another."""
    gc.collect()
    trim = of_glibc("malloc_trim")
    if trim is not None:  # else the measurement starts a little higher
        trim(0)
