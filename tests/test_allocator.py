import os
import subprocess
import sys

import pytest

from align_ti import allocator

SET_BY_USERS = (*allocator.USERS_OWN, "GLIBC_TUNABLES")

FAULTS = """
import ctypes, resource, sys
from align_ti.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
library = ctypes.CDLL(None)
library.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
size, count = 100_000, 640
def step():
    blocks = [library.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        library.free(block)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
start = faults()
for _ in range(10):
    step()
print(kept, faults() - start)
"""


def page_faults(way: str, **environment: str) -> tuple[str, int]:
    """Whether memory is kept, and the pages that the system hands out for 64 MB made and freed ten times."""
    inherited = {name: value for name, value in os.environ.items() if name not in SET_BY_USERS}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, way], env=inherited | environment, capture_output=True, text=True, check=True
    )
    kept, faults = run.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(allocator.of_glibc("mallopt") is None, reason="another C library than glibc")
def test_freed_memory_is_used_again():
    # Where the system gives pages of 2 MiB unasked (transparent_hugepage: always), 64 MB are 32 faults, and the first bound failed;
    # the process asks for ordinary ones.
    (_, before), (kept, after) = page_faults("given back"), page_faults("kept")
    assert kept == "True"
    # 16,000 pages of 4 KiB each time; fewer where the system's pages are larger.
    assert before > 1000
    assert after < before / 20, "pages"


@pytest.mark.parametrize(
    "name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES=glibc.malloc.trim_threshold"]
)
def test_what_a_user_has_set_stays(monkeypatch, name):
    calls = []
    monkeypatch.setattr(allocator, "of_glibc", lambda _: lambda *given: calls.append(given) or 1)
    for other in SET_BY_USERS:
        monkeypatch.delenv(other, raising=False)
    name, _, value = name.partition("=")
    monkeypatch.setenv(name, f"{value}=131072")
    assert allocator.keep_freed_memory() is False
    assert calls == []
    monkeypatch.delenv(name)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.x86_ibt=off")
    assert allocator.keep_freed_memory() is True
    assert calls == [(-3, 2**28), (-1, -1)]


def test_a_release_that_refuses_large_blocks_keeps_smaller_ones(monkeypatch):
    calls = []
    monkeypatch.setattr(allocator, "of_glibc", lambda _: lambda *given: calls.append(given) or int(given[1] < 2**26))
    for name in SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)
    assert allocator.keep_freed_memory() is True
    assert calls == [(-3, 2**28), (-3, 2**25), (-1, -1)]


def test_another_c_library_is_no_error(monkeypatch):
    assert allocator.of_glibc("there_is_no_such_function") is None
    monkeypatch.setattr(allocator, "of_glibc", lambda name: None)
    assert allocator.keep_freed_memory() is False
