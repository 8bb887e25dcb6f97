"""A stream of unknown length split over several processes, each of its records counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

OWN_RECORDS = "records_of_its_own"
"""The field of a batch that tells how many records at its head are no repeated ones."""


class Repeated(dict[str, Any]):
    """A sample that is there only to fill a batch up."""


class StreamShard(IterableDataset[Mapping[str, Any]]):
    """One process's samples of a stream: in each step the batch that is its turn, and as many as every other process has.

    Where the stream ends within a step, the step is filled up with its first sample, marked as `Repeated`. The stream has to give the
    same samples in every process. Several workers give their own parts of it.

    Args:
        stream: the samples.
        batch: samples of one batch.
        process: the number of this process, from 0.
        processes: how many there are.
    """

    def __init__(self, stream: Iterable[Any], batch: int, process: int, processes: int) -> None:
        self.stream, self.batch, self.process, self.processes = stream, batch, process, processes

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        step, count = self.batch * self.processes, 0
        first: Mapping[str, Any] = {}
        for sample in self.stream:
            if not count:
                first = sample
            if self.its_turn(count):
                yield sample
            count += 1
        for place in range(count, count + -count % step):
            if self.its_turn(place):
                yield Repeated(first)

    def its_turn(self, place: int) -> bool:
        """Whether the sample at a place of the stream is this process's."""
        return place // self.batch % self.processes == self.process


@dataclass(frozen=True, slots=True)
class Counted:
    """Collates samples, and tells under `OWN_RECORDS` how many of a batch are no repeated ones; these stand at its head."""

    collate: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """The batch."""
        own = sum(not isinstance(sample, Repeated) for sample in samples)
        return {**self.collate(samples), OWN_RECORDS: own}
