import os
import subprocess
import sys

import pytest

from align_ti import allocator

FAULTS = """
import resource, sys, torch
from align_ti.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks = [torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256)) for _ in range(8)]
model, rows = torch.nn.Sequential(*blocks), torch.randn(2048, 256)
def step():
    model(rows).sum().backward()
for _ in range(20):
    step()
start = faults()
for _ in range(10):
    step()
print(kept, faults() - start)
"""


def page_faults(way: str, **environment: str) -> tuple[str, int]:
    """Whether memory is kept, and the pages that the system handed out for ten steps of a small network."""
    inherited = {name: value for name, value in os.environ.items() if name not in allocator.USERS_OWN}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, way], env=inherited | environment, capture_output=True, text=True, check=True
    )
    kept, faults = run.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(allocator.of_glibc("mallopt") is None, reason="another C library than glibc")
def test_freed_memory_is_used_again():
    (_, before), (kept, after) = page_faults("given back"), page_faults("kept")
    assert kept == "True"
    assert after < before / 4, "pages"


@pytest.mark.skipif(allocator.of_glibc("mallopt") is None, reason="another C library than glibc")
def test_what_a_user_has_set_stays(monkeypatch):
    assert page_faults("kept", MALLOC_MMAP_THRESHOLD_="131072")[0] == "False"


def test_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr(allocator, "of_glibc", lambda name: None)
    assert allocator.keep_freed_memory() is False
    monkeypatch.undo()
    assert allocator.of_glibc("there_is_no_such_function") is None
