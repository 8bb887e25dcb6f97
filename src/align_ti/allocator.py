"""How the C library deals with memory that is freed: on a CPU it decides how often the system clears the same memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

KEPT_BLOCKS = (2**28, 2**25)
"""Bytes of the largest block that is kept when it is freed; larger ones go back to the system. Older releases take the second."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt."""

USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
"""Variables of the environment by which a user sets the same; GLIBC_TUNABLES is the other way."""


def keep_freed_memory() -> bool:
    """Freed memory stays with this process, for its next tensors; true if the C library does so (glibc).

    By default glibc gives memory back to the system once some dozens of MiB are free, and the system clears it before it hands it out
    again: for the intermediate results of every step anew, which on a CPU is a good part of a small model's step (docs/performance.md).
    PyTorch keeps the memory of accelerators in any case. What a user has set by the environment stays as it is.
    """
    option = of_glibc("mallopt")
    set_already = any(name in os.environ for name in USERS_OWN) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if option is None or set_already:
        return False
    return any(option(MMAP_THRESHOLD, size) for size in KEPT_BLOCKS) and bool(option(TRIM_THRESHOLD, -1))


def of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, or None where it has none of that name (musl, macOS, Windows)."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return found
