"""Training data read as they are needed: records of one source in a shuffled stream."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from transformers import ProcessorMixin

from align_ti.config import Data
from align_ti.data.conversation import Conversation
from align_ti.data.lengths import fit, paired
from align_ti.data.roles import encode
from align_ti.data.sources import image_root, iterate
from align_ti.data.teacher_cache import TeacherCache
from align_ti.errors import DataError


class StreamedConversations(IterableDataset[dict[str, Any]]):
    """The samples of one source without end, pass after pass, in an order fixed by seed and pass, each read when its turn comes.

    It has no end, so that a batch and an optimizer step may reach over the end of a pass, and a resumed run comes to its place by
    counting batches alone. Every worker reads the whole source and processes its share of the records. The trainer needs `max_steps`,
    and each process must fetch its own batches (`dispatch_batches=False`), since images are not counted by records.
    """

    def __init__(
        self,
        data: Data,
        processor: ProcessorMixin,
        seed: int = 0,
        teacher_processor: ProcessorMixin | None = None,
    ) -> None:
        self.teacher_processor = teacher_processor
        self.teacher_cache: TeacherCache | None = None
        (self.source,) = data.sources
        self.root = image_root(self.source, data.images)
        self.data, self.processor, self.seed = data, processor, seed

    def conversations(self, number: int = 0) -> Iterator[Conversation]:
        """The records of a pass, from 0, in their shuffled order.

        Raises:
            DataError: the source cannot be read, is empty, or one of its records cannot be used.
        """
        return shuffled(iterate(self.source, self.root, stream=True), self.data.shuffle_buffer, f"{self.seed}/{number}")

    def first(self, most: int) -> list[Conversation]:
        """The first records of the first pass."""
        return list(islice(self.conversations(), most))

    def sample(self, conversation: Conversation) -> dict[str, Any]:
        """The record as tensors, for a teacher with a processor of its own too."""
        sample = fit(encode(conversation, self.processor), self.data.max_length, self.data.too_long, conversation.place)
        both: dict[str, Any] = (
            sample if self.teacher_processor is None else paired(sample, encode(conversation, self.teacher_processor))
        )
        return both if self.teacher_cache is None else self.teacher_cache.joined(both, conversation.place)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in count():
            at = -1
            for at, conversation in enumerate(self.conversations(number)):
                if at % parts == part:
                    yield self.sample(conversation)
            if at < 0:
                raise DataError(
                    f"{self.source.path}: no records found; at least one is needed; check that this is the right source."
                )


def shuffled(records: Iterator[Conversation], buffer: int, seed: str) -> Iterator[Conversation]:
    """The records in a random order: each is drawn among as many as the buffer holds."""
    chooser = random.Random(seed)
    held: list[Conversation] = []
    for record in records:
        if len(held) < buffer:
            held.append(record)
        else:
            index = chooser.randrange(buffer)
            yield held[index]
            held[index] = record
    chooser.shuffle(held)
    yield from held
