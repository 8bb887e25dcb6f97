"""Several sources as one set of training records: what is taken of each, by count or weight, fixed by the seed; whose responses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from align_ti.config import Data, Source
from align_ti.data.answers import Answers, source_name, with_responses
from align_ti.data.conversation import Conversation
from align_ti.data.records import ImageRoot
from align_ti.data.sources import Refused, image_root, read_source, stop
from align_ti.errors import DataError


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What became of one source."""

    path: str
    records: int
    """Records in the source, bad ones included."""
    refused: int
    """Bad ones among them, found while reading."""
    taken: int
    """Records in the mix."""
    other_extension: int
    """Images found under another extension than the record names."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """The training records, where they came from, and what was left out while reading."""

    conversations: list[Conversation]
    sources: tuple[SourceReport, ...]
    refused: tuple[Refused, ...] = ()
    unanswered: tuple[Refused, ...] = ()
    """Records that were drawn and left out, since the teacher has no usable answer to them."""


def read_mixture(data: Data, seed: int = 0) -> Mixture:
    """All training records of a recipe, source by source, each in its own order.

    Raises:
        DataError: a source or record cannot be used (a record only if bad ones are not skipped), a source has fewer records
            than its count, or there is no usable answer to a record that should have the teacher's.
    """
    answers = None if data.answers is None else Answers(data.answers)
    if answers is not None:
        check_names(data.sources)
    refused: list[Refused] = []
    unanswered: list[Refused] = []
    skip = data.on_bad_record == "skip"
    read: list[tuple[list[Conversation], ImageRoot, int]] = []
    for source in data.sources:
        before, root = len(refused), image_root(source, data.images)
        records = read_source(source, root, refused.append if skip else stop)
        read.append((records, root, len(refused) - before))
    counts = numbers_taken(data.sources, [len(records) for records, _, _ in read])
    conversations: list[Conversation] = []
    reports = []
    for index, (source, (records, root, bad), count) in enumerate(zip(data.sources, read, counts, strict=True)):
        taken = drawn(records, count, f"{seed}/{index}")
        if answers is not None:
            taken = with_responses(taken, source, data, seed, answers, unanswered.append if skip else stop)
        conversations += taken
        reports.append(SourceReport(source.path, len(records) + bad, bad, len(taken), root.other_extension))
    return Mixture(conversations, tuple(reports), tuple(refused), tuple(unanswered))


def check_names(sources: Sequence[Source]) -> None:
    """Answers are found by the last part of a source's path, so that data can be moved; two sources must not share it.

    Raises:
        DataError: two do.
    """
    paths: dict[str, str] = {}
    for source in sources:
        other = paths.setdefault(source_name(source), source.path)
        if other != source.path:
            raise DataError(
                f"data.answers are found by the names of data files, and {other} and {source.path} have the same; a name of its own "
                "for each source is accepted; rename one of the two before its answers are generated."
            )


def numbers_taken(sources: Sequence[Source], sizes: Sequence[int]) -> list[int]:
    """How many records each source gives: its count, its share by weight, or all.

    By weight, the mix is as large as it can be without taking a record twice, so the source that is scarcest for its weight is
    taken as a whole.

    Raises:
        DataError: a count is larger than the source, or a weight leaves nothing of it.
    """
    if all(source.weight is not None for source in sources):
        total = min(size / (source.weight or 1.0) for source, size in zip(sources, sizes, strict=True))
        # The least bit more, so that the scarcest source is not rounded to one less than it has.
        taken = [int((source.weight or 1.0) * total * (1 + 1e-12)) for source in sources]
        for source, count, size in zip(sources, taken, sizes, strict=True):
            if count == 0:
                raise DataError(
                    f"{source.path}: weight {source.weight:g} leaves none of its {size} records beside the other sources; at least one "
                    "is needed; raise the weight, or remove the source."
                )
        return taken
    for source, size in zip(sources, sizes, strict=True):
        if source.count is not None and source.count > size:
            raise DataError(
                f"{source.path}: count is {source.count}, but it has {size} usable records, and none is taken twice; lower the count, "
                "or leave it out to take all."
            )
    return [size if source.count is None else source.count for source, size in zip(sources, sizes, strict=True)]


def drawn(records: Sequence[Conversation], count: int, seed: str) -> list[Conversation]:
    """That many of the records, in their own order. A source's draw does not depend on the other sources."""
    if count == len(records):
        return list(records)
    # A text as the seed gives the same draw in every Python.
    return [records[index] for index in sorted(random.Random(seed).sample(range(len(records)), count))]
