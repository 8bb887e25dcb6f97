"""Evaluation batches on several processes: every record counts once, whatever fills the last batches up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from align_ti.data.roles import NO_LABEL, OTHER, TEACHER_ATTENTION, TEACHER_HIDDEN, VISUAL
from align_ti.data.stream_shards import Counted, StreamShard
from align_ti.data.teacher_cache import kept_rows


def stream_loader(trainer: Trainer, stream: IterableDataset[Any]) -> DataLoader[Any]:
    """This process's batches of a stream. accelerate would fill the last ones with repeated records and not say how many."""
    args = trainer.args
    collate: Any = trainer.data_collator
    count = int(args.dataloader_num_workers)
    return DataLoader(
        StreamShard(stream, args.eval_batch_size, int(args.process_index), int(args.world_size)),
        batch_size=args.eval_batch_size,
        collate_fn=Counted(collate),
        num_workers=count,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor if count else None,
    )


def records_of_its_own(trainer: Trainer) -> int | None:
    """The number of records at the start of this evaluation batch that no other batch contains; None: all of them.

    If records do not fill the last batches of all processes, accelerate appends the first ones again. Streams are split by
    `stream_loader` instead.
    """
    args, state = trainer.args, trainer.accelerator.gradient_state
    if args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    size = int(state.active_dataloader.total_batch_size) // int(args.world_size)
    before = int(args.process_index) * size
    return min(size, max(0, int(state.remainder) - before))


def weightless_from(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The batch, its records from this one on with weight 0 in every term: none of their tokens has a role or a label, and nothing
    is kept of the teacher's pass over them."""
    nothing = {"labels": NO_LABEL, "roles": OTHER, "pictures": 0}
    changed = dict(batch)
    if TEACHER_HIDDEN in batch:
        # One row after another, sample by sample.
        rows = kept_rows(batch["labels"], batch["roles"], visual=TEACHER_ATTENTION in batch)
        changed[TEACHER_HIDDEN] = batch[TEACHER_HIDDEN][: int(rows[:count].sum())]
    if TEACHER_ATTENTION in batch:
        changed[TEACHER_ATTENTION] = batch[TEACHER_ATTENTION][: int((batch["roles"][:count] == VISUAL).sum())]
    for name, value in nothing.items():
        if name in batch:
            changed[name] = batch[name].clone()
            changed[name][count:] = value
    if "teacher" in batch:
        changed["teacher"] = weightless_from(batch["teacher"], count)
    return changed
