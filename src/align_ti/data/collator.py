"""Records that are encoded on demand, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from align_ti.data.conversation import Conversation
from align_ti.data.roles import NO_LABEL, OTHER, encode


class EncodedConversations(Dataset[dict[str, Tensor]]):
    """Conversations as tensors, encoded when they are asked for and kept if `cache` is set."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: ProcessorMixin,
        max_length: int | None = None,
        *,
        cache: bool = False,
    ) -> None:
        self.conversations = conversations
        self.processor = processor
        self.max_length = max_length
        self.kept: dict[int, dict[str, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        sample = encode(self.conversations[index], self.processor, self.max_length)
        if self.kept is not None:
            self.kept[index] = sample
        return sample


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads samples into one batch: tokens to the longest, pictures one behind the other."""

    pad_token: int
    teacher_pad_token: int | None = None
    """The pad token of a teacher that reads inputs of its own (`teacher` in each sample)."""
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
