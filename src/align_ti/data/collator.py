"""Records that are encoded on demand, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from align_ti.data.cache import SampleCache
from align_ti.data.conversation import Conversation
from align_ti.data.lengths import TooLong, estimated_lengths, fit
from align_ti.data.roles import NO_LABEL, OTHER, encode

MEASURED = 64
"""Samples that lengths are estimated from."""


class EncodedConversations(Dataset[dict[str, Tensor]]):
    """Conversations as tensors, decoded and tokenised when they are asked for, wherever that is (in a worker, as a rule).

    Args:
        conversations: the records.
        processor: the model's processor.
        max_length: tokens at most; None for any number.
        cache: keep samples in memory. Each worker process keeps its own.
        disk: keep samples on disk.
        too_long: what happens to a longer record, see `align_ti.data.lengths.fit`.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: ProcessorMixin,
        max_length: int | None = None,
        *,
        cache: bool = False,
        disk: SampleCache | None = None,
        too_long: TooLong = "error",
    ) -> None:
        self.conversations = conversations
        self.processor = processor
        self.max_length, self.too_long = max_length, too_long
        self.kept: dict[int, dict[str, Tensor]] | None = {} if cache else None
        self.disk = disk
        self.exact_lengths: list[int] | None = None

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return fit(self.whole(index), self.max_length, self.too_long, self.conversations[index].place)

    def whole(self, index: int) -> dict[str, Tensor]:
        """The sample of a record, however long it is.

        Raises:
            DataError: the record cannot be used.
        """
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        sample = self.from_disk(index) if self.disk is not None else encode(self.conversations[index], self.processor)
        if self.kept is not None:
            self.kept[index] = sample
        return sample

    def from_disk(self, index: int) -> dict[str, Tensor]:
        """The sample as it is kept on disk, made and kept if it is not there."""
        assert self.disk is not None
        path = self.disk.path(self.conversations[index])
        sample = self.disk.load(path)
        if sample is None:
            sample = encode(self.conversations[index], self.processor)
            self.disk.save(path, sample)
        return sample

    def lengths(self) -> list[int]:
        """The length of each sample in tokens: exact after `keep_only`, otherwise estimated from at most 64 samples."""
        if self.exact_lengths is not None:
            return self.exact_lengths
        step = max(1, len(self) // MEASURED)
        measured = [(self.conversations[index], self.whole(index)) for index in range(0, len(self), step)[:MEASURED]]
        estimates = estimated_lengths(self.conversations, measured)
        return estimates if self.max_length is None else [min(length, self.max_length) for length in estimates]

    def keep_only(self, indices: Sequence[int], lengths: Sequence[int]) -> None:
        """Leave out every other record, and know the lengths of those that stay."""
        self.conversations = [self.conversations[index] for index in indices]
        self.exact_lengths = list(lengths)
        if self.kept is not None:
            self.kept = {new: self.kept[old] for new, old in enumerate(indices) if old in self.kept}


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads samples into one batch: tokens to the longest, pictures one behind the other."""

    pad_token: int
    side: str = "right"
    """Where padding goes: "right" or "left". The loss is the same either way."""

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad_token, "labels": NO_LABEL, "roles": OTHER, "attention_mask": 0}
        length = max(len(sample["input_ids"]) for sample in samples)
        names = dict.fromkeys(name for sample in samples for name in sample)
        batch = {}
        for name in names:
            values = [sample[name] for sample in samples if name in sample]
            if name in fill or values[0].dim() == 1:
                batch[name] = torch.stack([self.padded(value, length, fill.get(name, 0)) for value in values])
            else:
                batch[name] = torch.cat(values)
        return batch

    def padded(self, value: Tensor, length: int, fill: int) -> Tensor:
        """The vector grown to the length on the collator's side."""
        room = (0, length - len(value)) if self.side == "right" else (length - len(value), 0)
        return torch.nn.functional.pad(value, room, value=fill)
