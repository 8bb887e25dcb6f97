"""A model asked the questions of benchmarks: predictions in files, made by one or several processes, gone on with after a stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Teacher
from align_ti.data.conversation import Conversation
from align_ti.errors import InterruptedRunError
from align_ti.evaluation.benchmarks.base import Benchmark, Item
from align_ti.evaluation.generation import asking_order
from align_ti.evaluation.predictions import (
    About,
    Prediction,
    Writer,
    conversation_of,
    images_digest,
    join_parts,
    made_so_far,
    part_path,
    part_paths,
    questions_digest,
    subset,
)
from align_ti.evaluation.results import write_scores
from align_ti.evaluation.runner import chunks, said_to
from align_ti.evaluation.scored import Scored, score_file
from align_ti.models.headonly import digest_of
from align_ti.models.loading import best_device, load_processor
from align_ti.phases import part
from align_ti.pipeline.parts import launched, load_teacher
from align_ti.processes import wait_for_all

Progress = Callable[[str, int, int], None]
"""Called with a benchmark's name, the questions that this process has asked, and those that it has to ask."""

ASKED_WITH = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a model's folder, besides config and weights, that its answers depend on."""


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark with the questions that are asked of it."""

    benchmark: Benchmark
    items: Sequence[Item]
    """The questions that are asked."""
    every: Sequence[Item]
    """All of its questions."""
    limit: int | None = None
    """How many were wanted at least; None: all of them."""

    def about(self, teacher: Teacher, digest: str, max_new_tokens: int | None) -> About:
        """What the file of predictions says about its making; settings without effect are left out."""
        settings: dict[str, Any] = {"max_new_tokens": self.tokens(max_new_tokens), "dtype": teacher.dtype}
        settings["images"] = images_digest(self.items)
        if teacher.quantization is not None:
            settings["quantization"] = teacher.quantization
        if self.limit is not None:
            settings["limit"] = self.limit
        return About(teacher.path, digest, self.benchmark.name, questions_digest(self.items), settings)

    def tokens(self, max_new_tokens: int | None) -> int:
        """Tokens of one answer at most: as given, or as the benchmark's protocol says."""
        return self.benchmark.max_new_tokens if max_new_tokens is None else max_new_tokens


def read_task(benchmark: Benchmark, folder: Path, limit: int | None = None) -> Task:
    """A benchmark's questions; images that are missing are told at once.

    Raises:
        DataError: a file of the benchmark is missing or of another version, or an image's file is missing.
    """
    every = benchmark.items(folder)
    items = subset(every, limit)
    for item in items:
        conversation_of(item).check_files()
    return Task(benchmark, items, every, limit)


def model_digest(path: str) -> str:
    """A digest of all of a model that its answers depend on: weights, configs, tokenizer, template; of a hub name its commit.

    Raises:
        ModelError: the folder holds no weights, or the hub's copy does not tell its commit.
    """
    weights, folder = digest_of(path), Path(path)
    if not folder.is_dir():
        return weights
    digest = hashlib.sha256(weights.encode())
    for name in ASKED_WITH:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()[:32]


def predict(
    model: str | Teacher,
    tasks: Sequence[Task],
    out: Path,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    digest: str | None = None,
    advance: Progress = lambda name, done, total: None,
) -> dict[str, Path]:
    """The model's greedy answers to the questions of benchmarks, a file each (`NAME.jsonl` in the folder `out`); all processes call it.

    The processes of a launch share the batches out. What an earlier call has left is not asked again, by however many processes it
    was made; the model is loaded only if something is left to ask.

    Args:
        model: a folder or hub name, loaded in the precision that it was saved in; or a model with its settings.
        tasks: the benchmarks with their questions.
        out: the folder of the files.
        batch_size: questions answered at a time. No effect on the answers but by rounding.
        max_new_tokens: tokens of one answer at most; by default as each benchmark says.
        digest: the model's (`model_digest`), if it is known.
        advance: called after each batch.

    Raises:
        DataError: a question cannot be asked.
        InterruptedRunError: Ctrl-C; the same call goes on.
        ModelError: the model cannot be loaded.
        RunError: a file holds something else, or answers made otherwise, or another command writes to it.
    """
    teacher, state = Teacher(path=model) if isinstance(model, str) else model, launched()
    told = model_digest(teacher.path) if digest is None else digest
    paths = {task.benchmark.name: out / f"{task.benchmark.name}.jsonl" for task in tasks}
    abouts = [task.about(teacher, told, max_new_tokens) for task in tasks]
    # All files before anything is loaded: one that was made otherwise is told at once.
    made = [made_so_far(paths[task.benchmark.name], about) for task, about in zip(tasks, abouts, strict=True)]
    # Every process has read what is there before one of them writes.
    wait_for_all()
    loaded: tuple[PreTrainedModel, ProcessorMixin] | None = None
    for task, about, done in zip(tasks, abouts, made, strict=True):
        name = task.benchmark.name
        path = paths[name]
        if not all(item.id in done for item in task.items):
            if loaded is None:
                with part("load models"):
                    device = state.device if state.num_processes > 1 else best_device()
                    loaded = load_teacher(teacher, device), load_processor(teacher.path)
            ask_share(*loaded, task, about, done, path, batch_size, state, advance)
        wait_for_all()
        if state.is_main_process and (part_paths(path) or not path.exists()):
            join_parts(path, about, task.items)
        wait_for_all()
    return paths


def where_to(model: str, out: Path | None) -> tuple[Path, str]:
    """The folder for a model's predictions, and the model's digest: the folder given, or one that no other model has.

    Raises:
        ModelError: the folder of the model holds no weights.
    """
    digest = model_digest(model)
    name = Path(model).resolve().name if Path(model).exists() else Path(model).name
    return out or Path("evaluations") / f"{name}-{digest.removeprefix('commit ')[:8]}", digest


def score_tasks(tasks: Sequence[Task], out: Path, *, strict_original: bool = False) -> dict[str, Scored]:
    """Scores the predictions in a folder, and writes `NAME.scores.json` beside each file; by the benchmarks' names.

    Raises:
        DataError: a file does not fit its benchmark.
    """
    found = {}
    for task in tasks:
        name = task.benchmark.name
        found[name] = score_file(out / f"{name}.jsonl", task.benchmark, task.every, strict_original=strict_original)
        write_scores(out / f"{name}.scores.json", found[name].content)
    return found


def ask_share(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    task: Task,
    about: About,
    done: dict[str, Prediction],
    path: Path,
    batch_size: int,
    state: PartialState,
    advance: Progress,
) -> None:
    """Asks this process's share of the questions that have no answer yet, and writes the answers to its part file.

    Batches are the same wherever a call begins and however many processes share them. One of which some answers are there already is
    asked as a whole again, so that the others are what they would have been even where rounding depends on the batch.
    """
    conversations = [conversation_of(item) for item in task.items]
    mine = [
        batch
        for batch in list(batches(conversations, batch_size))[state.process_index :: state.num_processes]
        if any(task.items[index].id not in done for index in batch)
    ]
    writer, count, total = Writer(part_path(path, state.process_index), about), 0, sum(map(len, mine))
    advance(task.benchmark.name, 0, total)
    try:
        for batch in mine:
            asked = [conversations[index] for index in batch]
            answers = said_to(model, processor, asked, int(about.settings["max_new_tokens"]))
            made = [
                Prediction(task.items[index].id, text, task.items[index].text, cut)
                for index, (text, cut) in zip(batch, answers, strict=True)
            ]
            writer.add([one for one in made if one.id not in done])
            count += len(batch)
            advance(task.benchmark.name, count, total)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"stopped at {task.benchmark.name}, after {count} of {total} questions of this process; the answers are in {writer.path}: "
            "the same command resumes from there."
        ) from None


def batches(conversations: Sequence[Conversation], size: int) -> Iterable[Sequence[int]]:
    """The questions by number in batches of those whose prompts and answers are of like length, the largest first.

    Questions of one kind stand together, since their answers are alike, and within a kind those of like prompts.
    """
    order = asking_order(conversations)
    first: dict[str, int] = {}
    for place, index in enumerate(order):
        first.setdefault(conversations[index].kind, place)
    return chunks(sorted(order, key=lambda index: first[conversations[index].kind]), size)
