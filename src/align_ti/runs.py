"""The run folder: where everything of a run lies, what made it, and its append-only metrics. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import yaml

from align_ti.config import Recipe
from align_ti.errors import RunError

WHOLE = "whole.json"
"""The file that tells what a whole checkpoint holds: each file and its size in bytes; written last."""

SPLIT = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
"""Options that only tell how the records of a step are split over processes and passes."""

HANDING_OVER = 3.0
"""Seconds that a run waits for the lock of its folder: the processes of a killed launch need a moment to go."""

GRADIENT_SHARE = "_gradient_share"
"""In the metrics: what the name of a term's share in the gradient ends with."""

PACKAGES = (
    "align-ti",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "scikit-learn",
)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A draft beside `out` that takes its place when the block ends well, so that a stopped one leaves nothing that looks finished.

    Raises:
        RunError: the folder holds something already; nothing is written over.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty; a new or empty folder is accepted; choose another or remove it.")
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run folder; its files are written atomically."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line for every log of training: `step`, `time` (seconds since 1970) and numbers by name.

        A resumed run may repeat steps, the later line counts.
        """
        return self.root / "metrics.jsonl"

    @property
    def data(self) -> Path:
        """The training data that were used: records of each source, skipped, truncated."""
        return self.root / "data.json"

    @property
    def skipped(self) -> Path:
        """One JSON object a line for every record that was left out: its place and the reason."""
        return self.root / "skipped.jsonl"

    @property
    def truncated(self) -> Path:
        """One JSON object a line for every record whose last response was cut: its place, tokens before and after."""
        return self.root / "truncated.jsonl"

    @property
    def checked(self) -> Path:
        """What the pass over the training data found, for other processes and for a resumed run."""
        return self.root / "checked.json"

    @property
    def layer_scores(self) -> Path:
        return self.root / "layer_scores.json"

    @property
    def check(self) -> Path:
        """The verdicts of the check before training; the page beside it shows samples too."""
        return self.root / "check.json"

    @property
    def check_page(self) -> Path:
        return self.root / "check.html"

    @property
    def student(self) -> Path:
        """The finished student, which plain transformers loads; there only when training has ended."""
        return self.root / "student"

    @property
    def draft(self) -> Path:
        """The student while it is written."""
        return self.root / ".student"

    @property
    def cost(self) -> Path:
        return self.root / "cost.json"

    @property
    def phases(self) -> Path:
        """Where the time of a step goes, if training.phases asked for it."""
        return self.root / "phases.json"

    @property
    def training(self) -> Path:
        """The amount of training: steps, records, and trained parameters by part."""
        return self.root / "training.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def looks(self) -> Path:
        """The models' attention to a few images, under several instructions each; the images are in the folder `shown`."""
        return self.root / "looks.json"

    @property
    def transitions(self) -> Path:
        """The models' next-token distributions after a few candidates, along a few answers."""
        return self.root / "transitions.json"

    @property
    def shown(self) -> Path:
        """The images of `looks` and `transitions`, small."""
        return self.root / "shown"

    @property
    def spent(self) -> Path:
        """Seconds of each part of a demo, added up over the calls that it took."""
        return self.root / "spent.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def lock(self) -> Path:
        """Locked by the run that lives in the folder; the file stays, the lock ends with its process."""
        return self.root / ".lock"

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which no other process trains in the folder; on a file system without locks there is no protection.

        Raises:
            RunError: another process trains in it.
        """
        if self.root.exists() and not self.root.is_dir():
            yield
            return
        with locked(self.lock, HANDING_OVER) as owner:
            if owner is not None:
                raise RunError(
                    f"{self.root}: another run (process {owner}) is training in this folder; one run at a time is accepted; wait "
                    "for it or stop it, or choose another folder (out)."
                )
            yield

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None; a kill may leave one partly written, or partly removed."""
        found = sorted(self.root.glob("checkpoint-*/trainer_state.json"), key=lambda path: step_of(path.parent))
        folders = [path.parent for path in reversed(found)]
        for whole in (has_all_files, has_state):
            for folder in folders:
                if whole(folder):
                    return folder
        return None

    def tasks(self, name: str) -> Path:
        """The folder of one model's predictions on benchmarks, and their scores, by the model's name."""
        return self.root / "tasks" / name

    @property
    def benchmarks(self) -> Path:
        """The benchmarks' headlines of all models, if evaluation.tasks asked for some."""
        return self.root / "benchmarks.json"

    def evaluation(self, name: str) -> Path:
        """The answers and scores of one model, by name."""
        return self.root / f"evaluation-{name}.json"

    def claim(self, recipe: Recipe, processes: int = 1) -> bool:
        """Claim the folder for this recipe; True if it already was, so that the run resumes.

        A run that was only checked, and trained nothing yet, makes room for another recipe. A run may go on with another number of
        processes, if batch and accumulation are set so that a step has as many records as before.

        Args:
            recipe: the run.
            processes: how many processes train.

        Raises:
            RunError: the folder holds a run of another recipe or of other steps, or files that are no run.
        """
        content = recipe.model_dump(mode="json")
        extensions = {file: digest(Path(file)) for file in recipe.extensions}
        own = {"processes": processes} | ({"extensions": extensions} if extensions else {})
        if self.recipe.exists():
            before = with_new_defaults(recipe, yaml.safe_load(self.recipe.read_text(encoding="utf-8")))
            kept, changed = read_json(self.provenance), differing(before, content)
            if self.trained_something():
                changed = [name for name in changed if name not in SPLIT]
                if changed:
                    raise RunError(
                        f"{self.root} holds a run with other settings ({', '.join(sorted(changed))}); a run resumes only with its own; "
                        "choose another folder (out), or remove this one."
                    )
                if kept.get("extensions", {}) != extensions:
                    raise RunError(
                        f"{self.root}: the extensions ({', '.join(extensions)}) have changed since this run began, and it would resume "
                        "with another objective; restore them, or choose another folder (out)."
                    )
                if not self.student.exists():
                    self.check_step(
                        records_of(before, kept.get("processes", processes)), records_of(content, processes)
                    )
                return True
            if not changed and own.items() <= kept.items():
                return True
        elif self.root.exists() and (not self.root.is_dir() or self.foreign_files()):
            raise RunError(
                f"{self.root} exists and is no run folder; an empty or new folder is accepted; choose another (out)."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        # The recipe last: where it is, everything of a claimed folder is.
        write_json(self.provenance, provenance() | own)
        write_text(self.recipe, yaml.safe_dump(content, sort_keys=False))
        return False

    def check_step(self, before: int, now: int) -> None:
        """Refuses to resume with another number of records per step.

        Raises:
            RunError: the two differ.
        """
        if before != now:
            raise RunError(
                f"{self.root} holds a run of {before} records a step, and this one would take {now}; a run resumes with any number of "
                "processes whose product with training.per_device_train_batch_size and training.gradient_accumulation_steps is "
                f"{before}; change these, or choose another folder (out)."
            )

    def trained_something(self) -> bool:
        """Whether the folder holds a log, a checkpoint or a student, which another recipe must not touch."""
        return self.metrics.exists() or self.student.exists() or any(self.root.glob("checkpoint-*"))

    def foreign_files(self) -> list[Path]:
        """What lies in the folder besides a check's own files, and those of a claim that a kill has cut short."""
        ours = {self.check, self.check_page, self.lock, self.provenance}
        drafts = {f".{path.name}" for path in (*ours, self.recipe)}
        return [path for path in self.root.iterdir() if path not in ours and path.stem not in drafts]

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to the metrics."""
        with self.metrics.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # Half a line that a kill has left must not swallow the next.
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((json.dumps(dict(line)) + "\n").encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metrics in order of steps; of a step logged twice the later line."""
        return [
            line
            for _, line in sorted({line["step"]: line for line in read_lines(self.metrics) if "loss" in line}.items())
        ]


OWNER = re.compile(r"(\d{1,9}) on (.+)")
"""What a lock file says of the process that last held it: its number and the machine's name."""

HELD: set[int] = set()
"""The open lock files of this process."""


@contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[str | None]:
    """Locks a file for the block, and gives None; if another process holds it, gives that process in words, and nothing is locked.

    A file system without locks, and Windows, let everybody in. The file stays; the lock ends with its process.

    Args:
        path: the lock file; it is made.
        wait: seconds to wait for another process to let go.
    """
    if fcntl is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    HELD.add(handle)
    try:
        yield take(handle, time.monotonic() + wait)
    finally:
        HELD.discard(handle)
        os.close(handle)


def take(handle: int, until: float) -> str | None:
    """Locks the open lock file and writes this process's number into it; the owner's if another holds it until then."""
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return os.pread(handle, 100, 0).decode("utf-8", errors="replace").strip() or "unknown"
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}:
                raise
            return None
        else:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()} on {platform.node()}\n".encode(), 0)
            return None


def owner_lives(path: Path) -> bool | None:
    """Whether the process lives that last held the lock file; None where that cannot be known. The lock is not touched.

    Taking it for a moment would tell more, but a process that looks for the lock in that moment would find it held.
    """
    match = OWNER.fullmatch(first_line(path))
    if fcntl is None or match is None or match[2] != platform.node():
        return None
    try:
        os.kill(int(match[1]), 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def first_line(path: Path) -> str:
    """The first line of a small file, empty if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(200).strip()
    except OSError:
        return ""


def let_go() -> None:
    """Closes the lock files in a forked process, such as a worker of a data loader, which may outlive the run's own."""
    while HELD:
        os.close(HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def has_all_files(checkpoint: Path) -> bool:
    """Whether every file that a whole checkpoint had is there, with its size."""
    try:
        sizes = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def has_state(checkpoint: Path) -> bool:
    """Whether the trainer's state, which is written after weights and optimizer, is whole (an older version's, or one just saved)."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not (checkpoint / WHOLE).exists()


def whole_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None for the half of one that a kill can leave behind; a character may be cut in half too."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, halves that a kill has left aside; none if there is no file."""
    try:
        # Of bytes only line ends split; of text, characters inside a string would too.
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [parsed for line in lines if (parsed := whole_line(line))]


def with_new_defaults(recipe: Recipe, before: Any) -> Any:
    """The content of a kept recipe, with the defaults of options that are newer than it; as it is if it is no recipe any more."""
    try:
        return type(recipe).model_validate(before).model_dump(mode="json")
    except ValueError:
        return before


def records_of(recipe: Mapping[str, Any], processes: int) -> int:
    """Records of one optimizer step."""
    training = recipe["training"]
    return int(processes * training["per_device_train_batch_size"] * training["gradient_accumulation_steps"])


def differing(before: Any, after: Any, name: str = "") -> list[str]:
    """The full names of the options that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        return [
            found
            for key in keys
            for found in differing(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == after else [name]


def write_text(path: Path, text: str) -> None:
    """Write a file whole: a reader, or a run that is stopped, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole, readable by people too."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON content of a file of a run.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; finish the run first, or name the right run folder.") from None
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); remove it and run its step again.") from error


def digest(path: Path) -> str:
    """The SHA-256 of a file's content, or a word for a file that is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def provenance() -> dict[str, Any]:
    """Versions and machine of a run; no names of hosts or people."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }


def processor_name() -> str:
    """The processor's model, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
