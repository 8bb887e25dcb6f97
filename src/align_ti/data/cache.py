"""Processed samples on disk, so that a record is decoded and tokenised once for all epochs, runs and workers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import ProcessorMixin

from align_ti.data.conversation import Conversation, Picture, StoredPicture
from align_ti.errors import CacheError

logger = logging.getLogger(__name__)

VERSIONED = ("align-ti", "transformers", "tokenizers", "pillow", "torch")
"""Packages whose version is part of a sample's key."""


class SampleCache:
    """One safetensors file for each sample, in a folder that runs and workers may share.

    A file's name is a fingerprint of everything that its content depends on: the record's words, its images (a file's path, size and
    time of change; the bytes of others), the processor, this package's code and the versions of those it uses. So a file is never
    out of date, and one that is damaged is told by its checksum, made again, and counted in `rebuilt`.

    Args:
        folder: where the files lie; it is made if it is missing.
        processor: what the samples are made with.
    """

    def __init__(self, folder: Path, processor: ProcessorMixin) -> None:
        self.folder, self.rebuilt = folder, 0
        self.made_with = fingerprint_of(processor)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"data.cache_dir: {folder} cannot be made ({error.strerror}); a folder that can be written is accepted; choose another."
            ) from error

    def path(self, conversation: Conversation) -> Path:
        """The file of a record's sample.

        Raises:
            DataError: an image's file is missing.
        """
        content = [
            self.made_with,
            [[turn.speaker, turn.text] for turn in conversation.turns],
            [picture_mark(image, conversation) for image in conversation.images],
        ]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, path: Path) -> dict[str, Tensor] | None:
        """The kept sample, or None if it is not there or damaged."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                sample = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                kept = (file.metadata() or {}).get("checksum")
            if kept == checksum(sample):
                return sample
            reason = "its checksum does not match"
        except (SafetensorError, OSError) as error:
            reason = str(error)
        self.rebuilt += 1
        logger.warning(
            "%s is damaged (%s) and is made again from its record; %d so far in this process",
            path,
            reason,
            self.rebuilt,
        )
        return None

    def save(self, path: Path, sample: Mapping[str, Tensor]) -> None:
        """Keep a sample; a reader never meets half of it, and of several writers the last one counts.

        Raises:
            DataError: the folder cannot be written, for example because the disk is full.
        """
        whole = {name: value.contiguous() for name, value in sample.items()}
        # Processes in containers that share a folder may have one number.
        draft = path.with_name(f".{path.stem}.{os.getpid()}-{uuid4().hex[:8]}")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(whole, draft, metadata={"checksum": checksum(whole)})
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise CacheError(
                f"data.cache_dir: {path} cannot be written ({error}); room on a disk that can be written is needed; free some, choose "
                "another folder, or set data.cache: none."
            ) from error


def checksum(sample: Mapping[str, Tensor]) -> str:
    """A checksum over names, types, shapes and values."""
    value = 0
    for name in sorted(sample):
        tensor = sample[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def picture_mark(image: Picture, conversation: Conversation) -> str:
    """What tells an image from another, without decoding it."""
    if isinstance(image, Path):
        conversation.check_files()
        stat = image.stat()
        return f"{image.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    if isinstance(image, StoredPicture):
        return hashlib.sha256(image.read()).hexdigest()
    return f"{image.mode} {image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"


def fingerprint_of(processor: ProcessorMixin) -> str:
    """A digest of the processor, of this package's reading code, and of the versions of what it uses."""
    digest = hashlib.sha256()
    for part in (
        processor.to_json_string(),
        repr(processor.chat_template),
        processor.tokenizer.backend_tokenizer.to_str(),
    ):
        digest.update(part.encode())
    digest.update(repr(sorted(processor.tokenizer.special_tokens_map.items())).encode())
    for package in VERSIONED:
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
