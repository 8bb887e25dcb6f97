"""Tiny models and batches: the package's own, by the name that the tests use."""

from align_ti.testing.tiny import *  # noqa: F403
