"""Every error a user can meet, as one tree.

Each message says where (file and record, or option), what was found, what is accepted, and the way out.
"""

from __future__ import annotations


class AlignTIError(Exception):
    """Root of the tree: catch this to catch every error of Align-TI."""


class ConfigError(AlignTIError, ValueError):
    """An option or a recipe is wrong: unknown key, wrong type, value out of range."""


class DataError(AlignTIError, ValueError):
    """A record, a picture or a data file cannot be used; the message names file and record."""


class BatchError(AlignTIError, ValueError):
    """A batch handed to the loss contradicts itself: roles, labels, candidates or shapes do not fit."""


class CacheError(AlignTIError):
    """The folder that processed records are kept in cannot be used; no record is to blame."""


class ModelError(AlignTIError, ValueError):
    """A model, or a pair of models, cannot be used: tokenizers, image tokens, attention or mode do not fit."""


class RunError(AlignTIError, RuntimeError):
    """A run folder cannot be used: missing, unfinished, or made with other settings."""


class InterruptedRunError(RunError):
    """A run was stopped on request; a checkpoint is saved and the same call goes on from it."""


class RequeueError(InterruptedRunError):
    """A scheduler's signal (SIGTERM, SIGUSR1) stopped a run; the command line ends with exit code 75, to requeue on."""


class CheckError(AlignTIError, RuntimeError):
    """A check before training failed; the message names every failed verdict with its way out."""
