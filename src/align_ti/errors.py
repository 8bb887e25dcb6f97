"""Every error a user can get, as a class hierarchy.

Each message says where (file and record, or option), what was found, what is accepted, and how to fix it.
"""

from __future__ import annotations


class AlignTIError(Exception):
    """The base class: catch this to catch every error of Align-TI."""


class ConfigError(AlignTIError, ValueError):
    """An option or a recipe is wrong: unknown key, wrong type, value out of range."""


class DataError(AlignTIError, ValueError):
    """A record, an image or a data file cannot be used; the message names file and record."""


class BatchError(AlignTIError, ValueError):
    """A batch given to the loss is inconsistent: roles, labels, candidates or shapes do not fit."""


class CacheError(AlignTIError):
    """The folder of the cache of processed records cannot be used; no record is at fault."""


class ModelError(AlignTIError, ValueError):
    """A model, or a pair of models, cannot be used: tokenizers, image tokens, attention or mode do not fit."""


class RunError(AlignTIError, RuntimeError):
    """A run folder cannot be used: missing, unfinished, or made with other settings."""


class InterruptedRunError(RunError):
    """A run was stopped on request; a checkpoint is saved and the same call resumes from it."""


class RequeueError(InterruptedRunError):
    """A scheduler's signal (SIGTERM, SIGUSR1) stopped a run; the command line ends with exit code 75, to requeue on."""


class CheckError(AlignTIError, RuntimeError):
    """A check before training failed; the message names every failed check and its fix."""
