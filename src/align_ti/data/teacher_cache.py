"""What a teacher made of each sample, kept on disk: hidden states of the rows that KD and IVA weigh, and IVA's attention.

A folder holds `made.json` (what it was made with), `shard-PROCESS-NUMBER.safetensors` (samples, each file written whole), `teacher/`
(config and head), `writing.json` (what writing took), and, once every sample is there, `index.json`. A sample is found by a digest of
what the teacher reads of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from align_ti.data.batch import next_labels
from align_ti.data.cache import checksum
from align_ti.data.roles import NO_LABEL, TEACHER_ATTENTION, TEACHER_HIDDEN, VISUAL
from align_ti.errors import CacheError

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the folder's layout."""

SHARD_BYTES = 2**28
"""Bytes of samples that are gathered before a shard is written; a stop loses at most as much work of each process."""

OPEN_SHARDS = 64
"""Shards that a process keeps open while it reads."""

ROWS = {False: "response", True: "response and visual"}
"""Which rows are kept, by whether a term compares visual rows."""

Kept = Mapping[str, Tensor]
"""`teacher_hidden` [rows, hidden] and, if IVA's attention is kept, `teacher_attention` [visual]."""


def kept_rows(
    labels: Int[Tensor, "batch seq"], roles: Int[Tensor, "batch seq"], *, visual: bool
) -> Bool[Tensor, "batch seq"]:
    """The rows that are kept: those that predict a response token, and those of visual tokens where a term compares them."""
    predicts = next_labels(labels) != NO_LABEL
    return predicts | (roles == VISUAL) if visual else predicts


def sample_key(sample: Mapping[str, Any]) -> str:
    """A digest of everything that the teacher reads of a sample: tokens, roles, pixels."""
    read = sample.get("teacher", sample)
    digest = hashlib.sha256()
    for name in sorted(read):
        value = read[name].contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Made:
    """What a cache's content depends on beside the samples; a cache of another is refused."""

    teacher: str
    """A digest of the teacher's config and weights."""
    dtype: str
    """The precision that the teacher is loaded in, and its quantization."""
    autocast: str
    processor: str
    """A digest of the processor that the teacher reads by."""
    template: str
    rows: str
    layer: int | None
    """The layer whose attention is kept."""
    format: int = FORMAT
    versions: Mapping[str, str] = field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in ("align-ti", "transformers")}
    )

    @property
    def digest(self) -> str:
        """A digest of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    @classmethod
    def read(cls, folder: Path) -> Made | None:
        """What the cache in a folder was made with; None if there is none.

        Raises:
            CacheError: the file says something else, or is of another version of the layout.
        """
        path = folder / "made.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                raise CacheError(
                    f"{folder}: a teacher cache of format {told['format']}; this version reads and writes format {FORMAT}; make it "
                    "again in another folder (`align-ti cache`), or use the version that made it."
                )
            return cls(**told)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{path}: cannot be read as a teacher cache ({error}); a folder that `align-ti cache` wrote is accepted; make it again."
            ) from error


MEANINGS = {
    "teacher": "the teacher (config or weights)",
    "dtype": "the teacher's precision (teacher.dtype, teacher.quantization)",
    "autocast": "autocast (training.bf16, training.fp16)",
    "processor": "the processor that the teacher reads by",
    "template": "the chat template",
    "rows": "which rows are kept (objective.iva.weight)",
    "layer": "the layer that IVA reads (objective.iva.layer)",
    "format": "the format",
    "versions": "versions",
}
"""What each field of `Made` means to whom a refusal is told."""


def check_made(folder: Path, found: Made, wanted: Made, *, reading: bool) -> None:
    """Refuse a cache that was made otherwise. To be read, it may hold more than is wanted: visual rows and a layer for no term.

    Raises:
        CacheError: what differs is named.
    """
    ignored = {"rows", "layer"} if reading and wanted.rows == ROWS[False] else set()
    were, are = asdict(found), asdict(wanted)
    differ = [
        f"{meaning} is {were[name]!r} there and {are[name]!r} here"
        for name, meaning in MEANINGS.items()
        if name not in ignored and were[name] != are[name]
    ]
    if differ:
        way = "make it again in another folder" if reading else "choose another folder (--out), or remove this one"
        raise CacheError(
            f"{folder}: the teacher cache was made with something else: {'; '.join(differ)}. Only a cache of this teacher, processor, "
            f"template and version is accepted; {way} (`align-ti cache`), or restore what has changed."
        )


def write_whole(path: Path, content: Any) -> None:
    """A JSON file that is there as a whole or not at all."""
    draft = path.with_name(f".draft-{os.getpid()}-{path.name}")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draft.replace(path)


# --- written ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ShardWriter:
    """Adds samples to a cache, a shard at a time. Each process of a launch has a writer with its own number."""

    folder: Path
    made: Made
    process: int = 0
    shard_bytes: int = SHARD_BYTES
    held: dict[str, Kept] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    size: int = 0

    def add(self, key: str, kept: Kept, tokens: int, seconds: float) -> None:
        """Take a sample of so many tokens, which took the teacher some seconds; it is on disk when its shard is full or `flush` has
        returned."""
        whole = {name: value.contiguous().cpu() for name, value in kept.items()}
        self.held[key] = whole
        rows = len(whole[TEACHER_HIDDEN])
        self.told[key] = {"checksum": checksum(whole), "tokens": tokens, "rows": rows, "seconds": seconds}
        self.size += sum(value.numel() * value.element_size() for value in whole.values())
        if self.size >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one shard, under its name only when it is whole.

        Raises:
            CacheError: it cannot be written.
        """
        if not self.held:
            return
        draft = self.folder / f".draft-{os.getpid()}-{self.process:03d}.safetensors"
        tensors = {f"{key}.{name}": value for key, kept in self.held.items() for name, value in kept.items()}
        try:
            save_file(tensors, draft, metadata={"made": self.made.digest, "samples": json.dumps(self.told)})
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(self.next_name())
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise CacheError(
                f"{self.folder}: a shard cannot be written ({error}); room on a disk that can be written is needed; free some, and run "
                "the same command again: it resumes from the last whole shard."
            ) from error
        self.held, self.told, self.size = {}, {}, 0

    def next_name(self) -> Path:
        """The first name of this process's that is free."""
        number = 0
        while (path := self.folder / f"shard-{self.process:03d}-{number:05d}.safetensors").exists():
            number += 1
        return path


def whole_shards(folder: Path, made: Made) -> dict[str, dict[str, dict[str, Any]]]:
    """The samples of each whole shard: by key, what is told of them.

    A damaged shard is removed, so that its samples are made again.

    Raises:
        CacheError: a shard was made with something else.
    """
    found = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                samples = json.loads(told["samples"])
        except FileNotFoundError:
            continue  # another process found it damaged
        except OSError as error:
            raise CacheError(
                f"{path}: the shard cannot be read ({error}), which says nothing of its content; run the same command again "
                "when it can."
            ) from error
        except (SafetensorError, ValueError, KeyError) as error:
            logger.warning("%s is damaged (%s); it is removed, and its samples are made again", path, error)
            path.unlink(missing_ok=True)
            continue
        if told.get("made") != made.digest:
            raise CacheError(
                f"{path}: the shard was made with something else than {folder / 'made.json'} says; shards of one cache are accepted; "
                "remove it."
            )
        found[path.name] = samples
    return found


def remove_drafts(folder: Path) -> None:
    """Remove what a kill left half written. Nobody may be writing."""
    for path in folder.glob(".draft-*"):
        path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Totals:
    """How much a finished cache holds."""

    samples: int
    tokens: int
    rows: int
    bytes: int


def merge(folder: Path, made: Made, cost: Mapping[str, float]) -> Totals:
    """Writes `index.json` over all whole shards; a sample that is in several is taken from the first."""
    shards, seen = {}, dict[str, Any]()
    for name, samples in whole_shards(folder, made).items():
        new = {key: told for key, told in samples.items() if key not in seen}
        shards[name] = {key: told["checksum"] for key, told in new.items()}
        seen |= new
    size = sum((folder / name).stat().st_size for name in shards)
    tokens, rows = (sum(told[name] for told in seen.values()) for name in ("tokens", "rows"))
    totals = Totals(len(seen), tokens, rows, size)
    write_whole(
        folder / "index.json", {"made": made.digest, "totals": asdict(totals), "cost": dict(cost), "shards": shards}
    )
    return totals


def add_writing(folder: Path, seconds: float, samples: int) -> float:
    """Mean seconds of writing a sample over all calls that wrote to the folder, this one's added; 0 where none did."""
    path = folder / "writing.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        before = float(told["seconds"]), int(told["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        before = 0.0, 0  # a measure of time is no reason to refuse a cache
    if not samples:
        return before[0] / before[1] if before[1] else 0.0
    every, count = before[0] + seconds, before[1] + samples
    write_whole(path, {"seconds": every, "samples": count})
    return every / count


# --- read -------------------------------------------------------------------------------------------------------------


class TeacherCache:
    """A finished cache, read a sample at a time; it may be sent to worker processes.

    Args:
        folder: what `align-ti cache` wrote.

    Raises:
        CacheError: it is none, is unfinished, or is of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: dict[str, Any] = {}
        made = Made.read(folder)
        if made is None:
            raise CacheError(
                f"data.teacher_cache: {folder} holds no teacher cache; a folder that `align-ti cache` wrote is accepted; run it first, "
                "or leave data.teacher_cache out."
            )
        self.made = made
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            of, self.totals, self.cost = index["made"], Totals(**index["totals"]), dict(index["cost"])
            self.places = {
                key: (name, mark) for name, samples in index["shards"].items() for key, mark in samples.items()
            }
        except FileNotFoundError:
            raise CacheError(
                f"data.teacher_cache: {folder} is unfinished (no index.json); a finished cache is accepted; the same `align-ti cache` "
                "resumes it."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{folder / 'index.json'}: cannot be read ({error}); run `align-ti cache` again."
            ) from error
        if of != made.digest:
            raise CacheError(
                f"{folder}: index.json and made.json are of two caches; files of one are accepted; run `align-ti cache` again."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which each process opens for itself."""
        return {**vars(self), "opened": {}}

    def shard(self, name: str) -> Any:
        """A shard, opened once: its header, which names every tensor, is long where samples are small."""
        if name not in self.opened:
            if len(self.opened) == OPEN_SHARDS:
                del self.opened[next(iter(self.opened))]
            self.opened[name] = safe_open(self.folder / name, framework="pt")
        return self.opened[name]

    def joined(self, sample: dict[str, Any], place: str) -> dict[str, Any]:
        """The sample with what the teacher made of it, beside what the teacher reads.

        Raises:
            CacheError: the cache does not hold the sample, or its shard is damaged.
        """
        kept = self.load(sample_key(sample), place)
        if "teacher" in sample:
            return {**sample, "teacher": {**sample["teacher"], **kept}}
        return {**sample, **kept}

    def load(self, key: str, place: str) -> dict[str, Tensor]:
        """What is kept under a key."""
        if key not in self.places:
            raise CacheError(
                f"{place}: the teacher cache in {self.folder} holds {self.totals.samples} sample(s), but none of these tokens, roles "
                "and pixels, so data or options that shape them (data.max_length, data.responses, ...) have changed since it was made; "
                "restore them, or run `align-ti cache` again, which adds what is missing."
            )
        name, mark = self.places[key]
        path = self.folder / name
        try:
            file = self.shard(name)
            parts = [TEACHER_HIDDEN, TEACHER_ATTENTION] if self.made.layer is not None else [TEACHER_HIDDEN]
            kept = {part: file.get_tensor(f"{key}.{part}") for part in parts}
            reason = "" if checksum(kept) == mark else "its checksum does not match"
        except (SafetensorError, OSError) as error:
            kept, reason = {}, str(error)
        if reason:
            raise CacheError(
                f"{path} is damaged ({reason}), needed for {place}; whole shards are accepted; remove it and run `align-ti cache` "
                "again, which makes its samples again."
            )
        return kept


# --- what it costs ----------------------------------------------------------------------------------------------------


def passes_until_even(teacher: float, writing: float, reading: float) -> int | None:
    """Passes over the data (epochs, times students) from which a cache takes less time than the teacher: None if it never does.

    Without it every pass pays the teacher; with it the teacher and the writing are paid once, and every pass pays the reading.

    Args:
        teacher: seconds of the teacher for a sample.
        writing: seconds of writing what it made.
        reading: seconds of finding and reading it.
    """
    if reading >= teacher:
        return None
    return math.floor((teacher + writing) / (teacher - reading)) + 1


def make_folder(folder: Path) -> None:
    """Make the folder of a cache.

    Raises:
        CacheError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"{folder} cannot be made ({error.strerror}); a folder that can be written is accepted; choose another (--out)."
        ) from error
