"""A model answers training records turn by turn: greedy, or by draws that each record has of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedModel,
    ProcessorMixin,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from align_ti.config import Generation
from align_ti.data.answers import Key, own_generator
from align_ti.data.conversation import IMAGE_TAG, Conversation, Turn
from align_ti.data.lengths import traits
from align_ti.data.rendering import render
from align_ti.data.roles import check_words, encode
from align_ti.data.sources import Refused
from align_ti.errors import DataError
from align_ti.evaluation.runner import said
from align_ti.models.families import widest_float


@dataclass(frozen=True, slots=True)
class Answered:
    """A record with the model's answers, and whether one of them was cut at the token limit."""

    conversation: Conversation
    cut: bool


@dataclass(slots=True)
class Dialogue:
    """A record while it is answered."""

    record: Conversation
    key: Key
    turns: list[Turn] = field(default_factory=list)
    cut: bool = False
    reason: str = ""
    """Why it cannot be answered; empty as long as it can."""

    @property
    def questions(self) -> list[Turn]:
        """The record's user turns."""
        return [turn for turn in self.record.turns if turn.speaker == "user"]

    def so_far(self) -> Conversation:
        """The record up to what was said last, with the images shown until then."""
        shown = sum(turn.text.count(IMAGE_TAG) for turn in self.turns)
        return replace(self.record, turns=tuple(self.turns), images=self.record.images[:shown])


def asking_order(conversations: Sequence[Conversation]) -> list[int]:
    """The order in which records are asked: those alike in turns, images and characters beside each other, the largest first.

    So a batch has little padding, memory runs out in the first batch or never, and estimates of the remaining time err on the long
    side.
    """
    sizes = [traits(one) for one in conversations]
    return sorted(range(len(sizes)), key=lambda index: (-sizes[index][1], -sizes[index][2], -sizes[index][0], index))


def answer_records(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    keys: Sequence[Key],
    settings: Generation,
) -> list[Answered | Refused]:
    """The records of one batch with the model's answers in place of their own, or why a record has none.

    Turn after turn: each user turn is answered in the light of the model's own earlier answers. A user turn at the end, which has
    no answer in the record, gets one too.

    Args:
        model: the model that answers.
        processor: its processor.
        conversations: the records.
        keys: what the draws of each depend on, besides the seed.
        settings: how to answer.

    Raises:
        DataError: a record cannot be asked, and bad ones are not skipped.
    """
    dialogues = [
        Dialogue(one, key, [turn for turn in one.turns[:1] if turn.speaker == "system"])
        for one, key in zip(conversations, keys, strict=True)
    ]
    for number in range(max(len(one.questions) for one in dialogues)):
        asked, samples = [], []
        for one in dialogues:
            if one.reason or number >= len(one.questions):
                continue
            one.turns.append(one.questions[number])
            try:
                samples.append(encode(one.so_far(), processor, train=False, ask=True))
            except DataError as error:
                if settings.on_bad_record == "error":
                    raise
                one.reason = str(error)
            else:
                asked.append(one)
        if asked:
            choose = choices(settings, [one.key for one in asked], number)
            answers = said(model, processor, samples, settings.max_new_tokens, choose)
            for one, (text, cut) in zip(asked, answers, strict=True):
                take(one, text, cut, processor)
    return [
        Refused(one.record.place, one.reason) if one.reason else Answered(one.so_far(), one.cut) for one in dialogues
    ]


def take(dialogue: Dialogue, text: str, cut: bool, processor: ProcessorMixin) -> None:
    """Add an answer to what was said. One that cannot be a response (empty, or with special tokens as words) ends the dialogue."""
    place = f"{dialogue.record.place}, as the model answers it"
    if not text:
        number = sum(turn.speaker == "user" for turn in dialogue.turns)
        dialogue.reason = f"{place}: answer {number} is empty; a response needs at least one character."
        return
    dialogue.turns.append(Turn("assistant", text))
    dialogue.cut = dialogue.cut or cut
    try:
        # The checks of every record, then those of its words, which take no image.
        whole = replace(dialogue.so_far(), place=place)
        check_words(*render(whole, processor), processor, place)
    except DataError as error:
        dialogue.reason = str(error)


# --- draws ------------------------------------------------------------------------------------------------------------


def choices(settings: Generation, keys: Sequence[Key], turn: int) -> list[LogitsProcessor]:
    """What changes the logits of one turn of a batch so that taking the most probable token draws one; nothing if greedy."""
    if settings.temperature == 0:
        return []
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k is not None:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        found.append(TopPLogitsWarper(settings.top_p))
    numbers = [own_generator(settings.seed, *key, str(turn)).random(settings.max_new_tokens) for key in keys]
    return [*found, OwnDraws(torch.from_numpy(np.stack(numbers)))]


class OwnDraws(LogitsProcessor):
    """Draws each row's token by a number of the row's own: the first token up to which the probabilities add up to more than it.

    transformers draws all rows of a batch from one generator, so that an answer would depend on what it is batched with.
    """

    def __init__(self, numbers: Float[Tensor, "rows steps"]) -> None:
        self.numbers, self.step = numbers, 0

    def __call__(self, input_ids: Int[Tensor, "rows seq"], scores: Float[Tensor, "rows vocab"]) -> Tensor:
        """Scores of which only the drawn token's is finite."""
        wide = widest_float(scores.device)
        sums = scores.to(wide).softmax(-1).cumsum(-1)
        number = self.numbers[:, self.step, None].to(scores.device, wide)
        self.step += 1
        # Of the sum rather than of 1, which rounding may leave above it.
        drawn = (sums > number * sums[:, -1:]).int().argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)
