"""A teacher's cache: written once by one or several processes, going on after a stop; opened for training; what it costs and saves."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Objective, Recipe, not_cacheable
from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.roles import INSTRUCTION
from align_ti.data.streaming import StreamedConversations
from align_ti.data.teacher_cache import (
    ROWS,
    Made,
    ShardWriter,
    TeacherCache,
    Totals,
    add_writing,
    check_made,
    make_folder,
    merge,
    passes_until_even,
    remove_drafts,
    sample_key,
    whole_shards,
    write_whole,
)
from align_ti.errors import ConfigError, InterruptedRunError
from align_ti.interactions.layer_scores import best_layer, score_on_records
from align_ti.models.headonly import digest_of, save_head
from align_ti.models.loading import check_teacher_precision, load_processor
from align_ti.models.pairing import options_of, own_processor
from align_ti.phases import part
from align_ti.pipeline.parts import Parts, launched, load_teacher
from align_ti.pipeline.records import Steps, TrainingData, training_data
from align_ti.processes import first_process_first, wait_for_all
from align_ti.training.cached_pass import outputs_to_cache
from align_ti.training.passes import united

MEASURED = 8
"""Samples that times and sizes are measured on before anything is written."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Mean seconds of a sample: the teacher's pass, writing what it made, and finding and reading it again."""

    teacher: float
    writing: float
    reading: float

    @property
    def even(self) -> int | None:
        """Passes over the data (epochs, times students) from which the cache takes less time than the teacher; None: never."""
        return passes_until_even(self.teacher, self.writing, self.reading)


@dataclass(frozen=True, slots=True)
class Cached:
    """A cache that is there, or, from a few samples, one that is meant."""

    folder: Path
    records: int
    totals: Totals
    """Of `estimate` scaled up from the samples that were measured."""
    cost: Cost
    measured: int
    """Samples that sizes and times are from."""
    layer: int | None
    hidden: int
    """Size of the teacher's hidden states."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes over tokens of the teacher's sequence, those included of which nothing is kept."""
        return self.totals.bytes / max(1, self.totals.tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """What a cache is made from."""

    recipe: Recipe
    folder: Path
    teacher: PreTrainedModel
    processor: ProcessorMixin
    """The one that the teacher reads by."""
    data: EncodedConversations

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the recipe trains under."""
        training = self.recipe.training
        dtype = torch.float16 if training.fp16 else torch.bfloat16
        return torch.autocast(self.teacher.device.type, dtype=dtype, enabled=training.bf16 or training.fp16)

    def kept(self, samples: Sequence[dict[str, Any]], layer: int | None) -> list[dict[str, torch.Tensor]]:
        """What is kept of samples that go through the teacher together, on the CPU."""
        collate = Collator(self.processor.tokenizer.pad_token_id)
        batch = collate([sample.get("teacher", sample) for sample in samples])
        with self.autocast():
            found = outputs_to_cache(self.teacher, batch, layer)
        return [{name: value.cpu() for name, value in one.items()} for one in found]


def cache_teacher(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    batch_size: int = 1,
    shard_bytes: int | None = None,
    advance: Steps = lambda done, total: None,
) -> Cached:
    """Writes what KD and IVA need of the recipe's teacher, for all its training records; goes on where an earlier call stopped.

    Process i of n takes the records i, i + n, i + 2n, ...; the first one writes the index when all are done.

    Args:
        recipe: the run that students will train by.
        out: the folder; by default the recipe's `data.teacher_cache`.
        batch_size: records that go through the teacher together. No effect on what is kept but by rounding.
        shard_bytes: bytes of a shard; by default 256 MiB.
        advance: called with this process's records done, and all of them.

    Raises:
        CacheError: the folder holds a cache of something else, or cannot be written.
        ConfigError: a term asks the teacher more than a cache holds.
        InterruptedRunError: Ctrl-C; the same call goes on.
        AlignTIError: whatever is wrong with data or models.
    """
    state = launched()
    work = prepared(recipe, out)
    with first_process_first():
        made = begun(work, first=state.is_main_process)
    done = {key for samples in whole_shards(work.folder, made).values() for key in samples}
    writer = ShardWriter(work.folder, made, state.process_index)
    if shard_bytes is not None:
        writer.shard_bytes = shard_bytes
    mine, pending, at, wrote = range(state.process_index, len(work.data), state.num_processes), [], 0, 0
    seconds = 0.0
    try:
        for at, index in enumerate(mine, start=1):
            sample = work.data[index]
            if (key := sample_key(sample)) not in done:
                done.add(key)
                pending.append((key, sample))
            if len(pending) == batch_size or (pending and at == len(mine)):
                seconds += add(work, writer, pending)
                wrote, pending = wrote + len(pending), []
            advance(at, len(mine))
        started = time.perf_counter()
        writer.flush()
        seconds += time.perf_counter() - started
    except KeyboardInterrupt:
        # Held are samples that the writer was given, so `wrote` counts them.
        started = time.perf_counter()
        writer.flush()
        if state.is_main_process:
            add_writing(work.folder, seconds + time.perf_counter() - started, wrote)
        raise InterruptedRunError(
            f"stopped at record {at} of this process's {len(mine)}; what was made is in {work.folder}: the same command resumes "
            "from there."
        ) from None
    wait_for_all()
    if state.is_main_process:
        few = [work.data[index] for index in range(min(MEASURED, len(work.data)))]
        finish(work.folder, made, add_writing(work.folder, seconds, wrote), few)
    wait_for_all()
    found = TeacherCache(work.folder)
    return Cached(
        work.folder,
        len(work.data),
        found.totals,
        Cost(**found.cost),
        found.totals.samples,
        made.layer,
        hidden_size(work.teacher),
    )


def add(work: Work, writer: ShardWriter, pending: Sequence[tuple[str, dict[str, Any]]]) -> float:
    """Sends samples through the teacher and hands what it made to the writer; seconds that the writer took."""
    started = time.perf_counter()
    kept = work.kept([sample for _, sample in pending], writer.made.layer)
    spent = (time.perf_counter() - started) / len(pending)
    started = time.perf_counter()
    for (key, sample), one in zip(pending, kept, strict=True):
        writer.add(key, one, len(sample.get("teacher", sample)["input_ids"]), spent)
    return time.perf_counter() - started


def finish(folder: Path, made: Made, writing: float, samples: Sequence[dict[str, Any]]) -> None:
    """Writes the index with what a sample took: the teacher's pass, the writing, and reading it, which is measured on these samples."""
    merge(folder, made, asdict(Cost(0.0, writing, 0.0)))
    found = TeacherCache(folder)
    found.joined(samples[0], "a record that was just written")  # a shard is opened once, which is not measured
    started = time.perf_counter()
    for sample in samples:
        found.joined(sample, "a record that was just written")
    reading = (time.perf_counter() - started) / len(samples)
    every = [told for shard in whole_shards(folder, made).values() for told in shard.values()]
    merge(folder, made, asdict(Cost(sum(told["seconds"] for told in every) / len(every), writing, reading)))


def estimate(recipe: Recipe, out: Path | str | None = None, *, batch_size: int = 1) -> Cached:
    """What a cache would take, from a few records that are sent through the teacher and written to a folder that is removed again.

    Raises:
        AlignTIError: whatever `cache_teacher` would refuse.
    """
    work = prepared(recipe, out)
    made = made_for(work, resolved(work, Made.read(work.folder)))
    if (before := Made.read(work.folder)) is not None:
        check_made(work.folder, before, made, reading=False)
    step = max(1, len(work.data) // MEASURED)
    samples = [work.data[index] for index in range(0, len(work.data), step)[:MEASURED]]
    work.kept(samples[:1], made.layer)  # what is allocated once is not measured
    beside = next(parent for parent in work.folder.absolute().parents if parent.exists())
    # On the disk that the cache would be on.
    with tempfile.TemporaryDirectory(dir=beside, prefix=".align-ti-") as name:
        folder, writing = Path(name), 0.0
        write_whole(folder / "made.json", asdict(made))
        writer = ShardWriter(folder, made)
        for start in range(0, len(samples), batch_size):
            pending = [(sample_key(sample), sample) for sample in samples[start : start + batch_size]]
            writing += add(work, writer, pending)
        started = time.perf_counter()
        writer.flush()
        writing += time.perf_counter() - started
        finish(folder, made, writing / len(samples), samples)
        found = TeacherCache(folder)
    share = len(work.data) / len(samples)
    totals = Totals(**{name: round(count * share) for name, count in asdict(found.totals).items()})
    cost = Cost(**found.cost)
    return Cached(work.folder, len(work.data), totals, cost, len(samples), made.layer, hidden_size(work.teacher))


def hidden_size(model: PreTrainedModel) -> int:
    """The size of what the head reads."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def prepared(recipe: Recipe, out: Path | str | None) -> Work:
    """The teacher and the data of a recipe, as its students will read them.

    Raises:
        AlignTIError: they cannot be used, or a cache does not serve the recipe.
    """
    if out is None and recipe.data.teacher_cache is None:
        raise ConfigError(
            "no folder for the teacher cache: the recipe has no data.teacher_cache and --out is not given; give one of the two."
        )
    if (reason := not_cacheable(recipe)) is not None:
        raise ConfigError(f"a teacher cache does not serve this recipe: {reason}.")
    if recipe.data.stream:
        raise ConfigError(
            "data.stream is true, and a cache is made of records that are known as a whole; a recipe without it is accepted "
            "(--set data.stream=false); the students may still read a stream of the same records."
        )
    assert recipe.teacher is not None
    with part("load models"):
        processor, theirs = load_processor(recipe.student.path), load_processor(recipe.teacher.path)
        device = launched().device
        teacher = load_teacher(recipe.teacher, device).requires_grad_(False)
        check_teacher_precision(teacher, device, bf16=recipe.training.bf16)
    own = own_processor(processor, theirs)
    data, _ = training_data(recipe, processor, teacher_processor=own)
    assert isinstance(data, EncodedConversations)
    return Work(recipe, Path(out or str(recipe.data.teacher_cache)), teacher, processor if own is None else own, data)


def begun(work: Work, *, first: bool) -> Made:
    """What the cache in the folder is made with; the first process makes the folder ready.

    Raises:
        CacheError: the folder holds a cache of something else.
    """
    before = Made.read(work.folder)
    made = made_for(work, resolved(work, before))
    if before is not None:
        check_made(work.folder, before, made, reading=False)
    if first:
        make_folder(work.folder)
        remove_drafts(work.folder)
        # Whoever reads it from now on is told that it is unfinished.
        (work.folder / "index.json").unlink(missing_ok=True)
        save_head(work.teacher, work.folder / "teacher")
        write_whole(work.folder / "made.json", asdict(made))
        whole_shards(work.folder, made)
    return made


def resolved(work: Work, before: Made | None) -> Objective:
    """The objective with a number for IVA's layer: the one that an earlier call found, or the one with the highest score (IRS).

    The sample, its order and the scores are those of a run of the recipe with the teacher.
    """
    objective = work.recipe.objective
    if not objective.needs_layer:
        return objective
    if before is not None and before.layer is not None:
        return objective.at_layer(before.layer)
    sample = work.recipe.layer_scores.model_dump()
    scores = score_on_records(work.teacher, work.processor, work.data.conversations, **sample, seed=work.recipe.seed)
    return objective.at_layer(best_layer(scores))


def made_for(work: Work, objective: Objective) -> Made:
    """What a cache of the recipe depends on."""
    return made_with(work.recipe, work.processor, layer_of(objective, work.teacher))


def layer_of(objective: Objective, teacher: PreTrainedModel) -> int | None:
    """The layer whose attention the terms read; None where none does.

    Raises:
        ConfigError: terms read several layers, or other queries than instruction tokens.
    """
    terms = [term for term in objective.terms.values() if term.needs_teacher]
    attention = united(term.reads_of_teacher(teacher) for term in terms).attention
    if len(attention) > 1 or any(rows.roles != (INSTRUCTION,) for rows in attention):
        raise ConfigError(
            "the terms read the teacher's attention at several layers, or of other queries than instruction tokens; a cache holds "
            "that of instruction tokens at one layer; give the terms one layer, or leave one out (weight: 0)."
        )
    return next((rows.layer for rows in attention), None)


def made_with(recipe: Recipe, processor: ProcessorMixin, layer: int | None) -> Made:
    """What a cache depends on, from the recipe, the processor that the teacher reads by, and the layer."""
    assert recipe.teacher is not None
    teacher, training = recipe.teacher, recipe.training
    quantization = "" if teacher.quantization is None else f", {json.dumps(teacher.quantization, sort_keys=True)}"
    told = {
        "class": type(processor).__name__,
        "options": options_of(processor),
        "vocabulary": processor.tokenizer.get_vocab(),
        "special": processor.tokenizer.special_tokens_map,
    }
    return Made(
        teacher=digest_of(teacher.path),
        dtype=f"{teacher.dtype}{quantization}",
        autocast="bfloat16" if training.bf16 else "float16" if training.fp16 else "none",
        processor=short_digest(json.dumps(told, sort_keys=True, default=str)),
        template=short_digest(repr(processor.chat_template)),
        rows=ROWS[layer is not None],
        layer=layer,
    )


def short_digest(text: str) -> str:
    """The first half of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- used -------------------------------------------------------------------------------------------------------------


def use_cache(recipe: Recipe, parts: Parts, data: TrainingData) -> Objective:
    """Makes the training data hold what the recipe's cache has of them, and gives the objective with the cache's layer for "auto".

    Raises:
        CacheError: the cache is of another teacher, processor, template, version, or of other data; or it is damaged or unfinished.
    """
    assert recipe.data.teacher_cache is not None
    assert parts.teacher is not None
    cache = TeacherCache(Path(recipe.data.teacher_cache))
    objective = recipe.objective
    if objective.needs_layer:
        # Without attention in the cache any layer is refused below.
        objective = objective.at_layer(0 if cache.made.layer is None else cache.made.layer)
    processor = parts.own_processor or parts.processor
    wanted = made_with(recipe, processor, layer_of(objective, parts.teacher))
    check_made(cache.folder, cache.made, wanted, reading=True)
    if isinstance(data, StreamedConversations):
        data.teacher_cache = cache
    else:
        data.teacher_cache = cache
        data[0]  # other data are refused here and not in a worker
    return objective
