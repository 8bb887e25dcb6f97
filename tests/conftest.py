"""Settings for every test: one thread (tests run in two processes), no network, shapes in annotations checked while tests run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook looks it up by name)

# Every shape that an annotation names is checked in every call of every test.
install_import_hook("align_ti", "tests.typechecker.check")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "align_ti",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("align_ti")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)
