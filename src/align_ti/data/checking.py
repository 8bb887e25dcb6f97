"""One pass over all records before training: which cannot be used and why, which are cut, and how long each is.

Bad records are found before training, not left out of batches on the way: so every batch has the size the recipe says, all processes
agree on the data, and the run stops before the first step if too much is wrong. What the pass processes is what training
needs: with the disk cache it is done only once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch.utils.data import DataLoader, Dataset

from align_ti.data.collator import EncodedConversations
from align_ti.data.conversation import Conversation, StoredPicture
from align_ti.data.lengths import fit
from align_ti.data.sources import Refused
from align_ti.errors import DataError

Steps = Callable[[int, int], None]
"""Called with the records done and all records."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A record whose last response lost its end."""

    place: str
    tokens: int
    """Tokens before."""
    kept: int
    """Tokens after."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What the pass found."""

    of: str
    """A digest of the records."""
    usable: list[int] = field(default_factory=list)
    """Indices of the records that training takes."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each of them."""
    refused: list[Refused] = field(default_factory=list)
    cut: list[Cut] = field(default_factory=list)


def check_records(
    data: EncodedConversations, workers: int = 0, advance: Steps | None = None, *, skip: bool = True
) -> Checked:
    """Processes every record once.

    Args:
        data: the records.
        workers: processes that share the work; samples kept in memory are made in this process whatever the number.
        advance: progress.
        skip: go on after a record that cannot be used.

    Raises:
        DataError: a record cannot be used, and bad ones are not skipped.
    """
    found = Checked(digest(data.conversations))
    for done, (index, tokens, kept, reason) in enumerate(findings(data, workers), start=1):
        place = data.conversations[index].place
        if reason and not skip:
            raise DataError(reason)
        if reason:
            found.refused.append(Refused(place, reason))
        else:
            found.usable.append(index)
            found.lengths.append(kept)
            if kept < tokens:
                found.cut.append(Cut(place, tokens, kept))
        if advance is not None:
            advance(done, len(data))
    return found


class Findings(Dataset[tuple[int, int, int, str]]):
    """For each record: its index, its tokens before and after cutting, and why it cannot be used (empty if it can)."""

    def __init__(self, data: EncodedConversations) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, int, int, str]:
        data = self.data
        try:
            sample = data.whole(index)
            short = fit(sample, data.max_length, data.too_long, data.conversations[index].place)
            if data.teacher is not None:
                data.teacher.whole(index)
        except DataError as error:
            return index, 0, 0, str(error)
        return index, len(sample["input_ids"]), len(short["input_ids"]), ""


def findings(data: EncodedConversations, workers: int) -> Iterator[tuple[int, int, int, str]]:
    """The findings in order; processes share them where samples are not kept in this one."""
    every = Findings(data)
    if workers and data.kept is None:
        yield from DataLoader(every, batch_size=None, num_workers=workers)
    else:
        yield from (every[index] for index in range(len(every)))


def limit_reached(skipped: int, records: int, limit: float) -> bool:
    """Whether more were skipped than the limit allows: a number of records, or below 1 a share of them."""
    return skipped > (limit if isinstance(limit, int) else limit * records)


def refuse_too_many(refused: Sequence[Refused], records: int, limit: float) -> None:
    """Stop if more records were skipped than the limit allows.

    Raises:
        DataError: too many; the message has the first reasons.
    """
    if limit_reached(len(refused), records, limit):
        first = "\n".join(f"  {one.reason}" for one in refused[:3])
        raise DataError(
            f"{len(refused)} of {records} records cannot be used, but data.max_skipped is {limit}; fix the data or raise the limit. "
            f"The first:\n{first}"
        )


def digest(conversations: Sequence[Conversation]) -> str:
    """A digest of the records' places, words and image names: no image is read."""
    result = hashlib.sha256()
    for one in conversations:
        names = [image.name if isinstance(image, StoredPicture) else str(image) for image in one.images]
        result.update(repr((one.place, one.turns, names)).encode())
    return result.hexdigest()
