"""Records that are encoded on demand, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from align_ti.data.batch import Batch
from align_ti.data.cache import SampleCache
from align_ti.data.conversation import IMAGE_TAG, Conversation, Turn
from align_ti.data.lengths import TooLong, estimated_lengths, fit, paired
from align_ti.data.roles import NO_LABEL, OTHER, PER_TOKEN, encode
from align_ti.data.teacher_cache import TeacherCache
from align_ti.errors import DataError

MEASURED = 64
"""Samples that lengths are estimated from."""


class EncodedConversations(Dataset[dict[str, Any]]):
    """Conversations as tensors, decoded and tokenised on access (usually in a worker).

    Args:
        conversations: the records.
        processor: the model's processor.
        max_length: maximum number of tokens; None for no limit.
        cache: keep samples in memory. Each worker process keeps its own.
        disk: keep samples on disk.
        too_long: what happens to a longer record, see `align_ti.data.lengths.fit`.
        teacher: the same records for a teacher with its own inputs; each sample then holds the teacher's inputs under
            `teacher`.

    With `teacher_cache` set, each sample also holds the teacher's cached outputs for it.
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
        teacher: EncodedConversations | None = None,
    ) -> None:
        self.teacher = teacher
        self.teacher_cache: TeacherCache | None = None
        self.conversations = conversations
        self.processor = processor
        self.max_length, self.too_long = max_length, too_long
        self.kept: dict[int, dict[str, Tensor]] | None = {} if cache else None
        self.disk = disk
        self.exact_lengths: list[int] | None = None

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = fit(self.whole(index), self.max_length, self.too_long, self.conversations[index].place)
        both: dict[str, Any] = sample if self.teacher is None else paired(sample, self.teacher.whole(index))
        return both if self.teacher_cache is None else self.teacher_cache.joined(both, self.conversations[index].place)

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
        """The sample from the disk cache; encoded and stored if it is not there."""
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
        """Leave out all other records, and store the lengths of those that stay."""
        self.conversations = [self.conversations[index] for index in indices]
        self.exact_lengths = list(lengths)
        if self.teacher is not None:
            self.teacher.keep_only(indices, lengths)
        if self.kept is not None:
            self.kept = {new: self.kept[old] for new, old in enumerate(indices) if old in self.kept}


Sample = Mapping[str, Any]
"""A record as tensors by name; under `teacher` those of a teacher that reads inputs of its own."""


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads samples into one batch: tokens to the longest, images concatenated, as the model's processor batches them.

    Tiles and pixels are padded with zeros where the processor does the same. Idefics3 and SmolVLM batch images by sample; a sample
    with fewer images, or none, has zeros in their place, which the model ignores.
    """

    pad_token: int
    side: str = "right"
    """Where padding goes: "right" or "left". The loss is the same either way."""
    teacher_pad_token: int | None = None
    """The pad token of a teacher that reads inputs of its own; by default the student's."""
    blank: Sample | None = None
    """A sample with an image and weight 0, appended to batches without any image; by default nothing is appended."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Decodes the tokens if a notebook displays the batch; by default their ids are shown."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch; what the samples hold for a teacher alone (`teacher`) becomes a batch of its own in it.

        Raises:
            DataError: images of different size that the processor gives no way to fill up.
        """
        if self.blank is not None:
            pictures = self.blank.keys() - PER_TOKEN - {"teacher"}
            if not any(pictures & sample.keys() for sample in samples):
                samples = [*samples, self.blank]
        if "teacher" in samples[0]:
            theirs = self.pad_token if self.teacher_pad_token is None else self.teacher_pad_token
            # Its tokens may be another tokenizer's.
            teacher = replace(self, pad_token=theirs, blank=None, tokenizer=None)(
                [sample["teacher"] for sample in samples]
            )
            own = [{name: value for name, value in sample.items() if name != "teacher"} for sample in samples]
            return self.made({**replace(self, blank=None)(own), "teacher": teacher})
        names = dict.fromkeys(name for sample in samples for name in sample)
        by_sample = pictures_by_sample(samples)
        batch: dict[str, Any] = {}
        for name in names:
            if name in PER_TOKEN:
                batch[name] = self.tokens(name, samples)
                continue
            values = [sample[name] for sample in samples if name in sample]
            if name in by_sample:
                none = values[0].new_zeros((1, 0, *values[0].shape[2:]))
                values = [sample.get(name, none) for sample in samples]
            elif not FILLED.intersection(names) and len({value.shape[1:] for value in values}) > 1:
                shapes = ", ".join(str(list(value.shape)) for value in values)
                raise DataError(
                    f"{name} of the samples of a batch has shapes {shapes}; equal sizes are accepted where the processor gives neither "
                    "image_sizes nor a pixel mask; let it crop or resize images to one size, or take a batch of 1."
                )
            batch[name] = joined(values)
        return self.made(batch)

    def made(self, fields: dict[str, Any]) -> Batch:
        """The fields as a batch."""
        batch = Batch(fields)
        batch.tokenizer = self.tokenizer
        return batch

    def tokens(self, name: str, samples: Sequence[Sample]) -> Tensor:
        """A field with one entry per token, padded to the longest sample; 0 (a token of text) for a sample without the field."""
        fill = {"input_ids": self.pad_token, "labels": NO_LABEL, "roles": OTHER}.get(name, 0)
        length = max(len(sample["input_ids"]) for sample in samples)
        rows = [sample.get(name, torch.zeros_like(sample["input_ids"])) for sample in samples]
        return torch.stack([self.padded(row, length, fill) for row in rows])

    def padded(self, value: Tensor, length: int, fill: int) -> Tensor:
        """The vector padded to the length, on the collator's side."""
        room = (0, length - len(value)) if self.side == "right" else (length - len(value), 0)
        return torch.nn.functional.pad(value, room, value=fill)


def blank_sample(processor: ProcessorMixin, teacher_processor: ProcessorMixin | None = None) -> dict[str, Any]:
    """A sample that has an image and weighs nothing in any term: none of its tokens has a role or a label.

    Where weights are gathered in a module's call, every process has to call the same modules; a process whose records have no image
    calls its towers with this one.
    """
    turns = (Turn("user", f"{IMAGE_TAG}\n."), Turn("assistant", "."))
    conversation = Conversation(turns, (Image.new("RGB", (64, 64), "white"),), "a blank image")

    def of(one: ProcessorMixin) -> dict[str, Any]:
        sample = encode(conversation, one)
        nothing = {"labels": NO_LABEL, "roles": OTHER, "pictures": 0}
        return {
            name: torch.full_like(value, nothing[name]) if name in nothing else value for name, value in sample.items()
        }

    own = of(processor)
    return own if teacher_processor is None else {**own, "teacher": of(teacher_processor)}


FILLED = frozenset({"image_sizes", "pixel_attention_mask"})
"""Fields that tell a model which tiles and pixels are real; without one of them no zeros may be put beside images."""


def pictures_by_sample(samples: Sequence[Sample]) -> frozenset[str]:
    """The fields of [1, images, ...] a sample: Idefics3's and SmolVLM's, known by a mask over the pixels of such images."""
    fields = frozenset({"pixel_values", "pixel_attention_mask"})
    has = any(fields <= sample.keys() and sample["pixel_values"].dim() == 5 for sample in samples)
    return fields if has else frozenset()


def joined(values: Sequence[Tensor]) -> Tensor:
    """The values one behind the other, every axis but the first filled with zeros at its end to the largest."""
    sizes = [max(lengths) for lengths in zip(*(value.shape[1:] for value in values), strict=True)]
    grown = []
    for value in values:
        room = [(0, size - length) for size, length in zip(sizes, value.shape[1:], strict=True)]
        # Padding counts axes from the last.
        grown.append(torch.nn.functional.pad(value, [side for pair in reversed(room) for side in pair]))
    return torch.cat(grown)
