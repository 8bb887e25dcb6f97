"""How long records are: what happens to those that are too long, lengths without decoding, and batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from align_ti.data.conversation import Conversation
from align_ti.data.roles import PER_TOKEN, RESPONSE
from align_ti.errors import DataError

TooLong = Literal["error", "truncate"]


def fit(sample: dict[str, Tensor], max_length: int | None, too_long: TooLong, place: str) -> dict[str, Tensor]:
    """The sample itself if it is short enough; otherwise an error, or the sample without the end of its last response.

    Only tokens from the last response on are cut, so every image stays whole and no response vanishes. The token that ends the
    turn is cut with them: the student does not learn to stop where the answer did not.

    Raises:
        DataError: the sample is too long, or no token of its last response would be left.
    """
    length = len(sample["input_ids"])
    if max_length is None or length <= max_length:
        return sample
    if too_long == "error":
        raise DataError(
            f"{place}: {length} tokens, but max_length is {max_length}: a response would be cut off; raise data.max_length, shorten or "
            "remove the record, or set data.too_long: truncate to cut the end of its last response."
        )
    start = last_response(sample["roles"])
    if start >= max_length:
        raise DataError(
            f"{place}: {length} tokens, of which the last response begins at {start}, but max_length is {max_length}: nothing of the "
            "response would be left; raise data.max_length or remove the record."
        )
    return {name: value[:max_length] if name in PER_TOKEN else value for name, value in sample.items()}


def paired(sample: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Any]:
    """The student's sample with the teacher's own in it; of a shortened one the teacher's is shortened to the same response."""
    count, positions = int((sample["roles"] == RESPONSE).sum()), (teacher["roles"] == RESPONSE).nonzero().flatten()
    length = len(teacher["roles"])
    stop = int(positions[count - 1]) + 1 if count < len(positions) else length
    return {
        **sample,
        "teacher": {name: value[:stop] if name in PER_TOKEN else value for name, value in teacher.items()},
    }


def last_response(roles: Tensor) -> int:
    """The position of the first token of the last response: behind everything that is no response and stands before one."""
    positions = (roles == RESPONSE).nonzero().flatten()
    gaps = (positions.diff() > 1).nonzero().flatten()
    return int(positions[gaps[-1] + 1] if len(gaps) else positions[0])


def estimated_lengths(
    conversations: Sequence[Conversation], measured: Sequence[tuple[Conversation, dict[str, Tensor]]]
) -> list[int]:
    """The length of each record in tokens, roughly: words by their characters, and the same number of tokens for every image.

    Args:
        conversations: the records; nothing is decoded.
        measured: some of them as samples, from which tokens for a character, a turn and an image are fitted by least squares.
    """
    features = torch.tensor([traits(conversation) for conversation, _ in measured], dtype=torch.float64)
    lengths = torch.tensor([len(sample["input_ids"]) for _, sample in measured], dtype=torch.float64)
    # The pseudo-inverse takes the smallest solution where few records are measured, or all are alike.
    weights = torch.linalg.pinv(features) @ lengths
    every = torch.tensor([traits(conversation) for conversation in conversations], dtype=torch.float64)
    return [max(1, round(float(length))) for length in every @ weights]


def traits(conversation: Conversation) -> tuple[int, int, int]:
    """What a record's length is estimated from: characters, turns, images."""
    return (
        sum(len(turn.text) for turn in conversation.turns),
        len(conversation.turns),
        len(conversation.images),
    )


class LengthGrouped(Sampler[int]):
    """Every record once an epoch, records of like length beside each other, the order fixed by seed and epoch.

    As transformers' own sampler, but of the same order in a run that is resumed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
