"""A conversation with one model about images, question by question."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Evaluation
from align_ti.data.conversation import IMAGE_TAG, Conversation, Turn
from align_ti.evaluation.runner import answer
from align_ti.evaluation.tasks import Question


@dataclass(slots=True)
class Chat:
    """A model and what was said so far. The images stand in front of the first question."""

    model: PreTrainedModel
    processor: ProcessorMixin
    images: tuple[Path, ...] = ()
    max_new_tokens: int = 256
    turns: tuple[Turn, ...] = ()

    def ask(self, question: str) -> tuple[str, bool]:
        """The model's greedy answer to a question in the light of what was said before, and whether it was cut at the token limit.

        The two are remembered; an empty answer is not, nor the question it was given to, since no later turn could follow it.

        Raises:
            DataError: an image cannot be read, or the question holds an image tag.
        """
        tags = IMAGE_TAG * len(self.images) if not self.turns else ""
        turns = (*self.turns, Turn("user", tags + question))
        asked = Question(Conversation(turns, self.images, place="the chat"), expected="", kind="", picture="")
        settings = Evaluation(batch_size=1, max_new_tokens=self.max_new_tokens)
        [(text, cut)] = answer(self.model, self.processor, [asked], settings)
        if text:
            self.turns = (*turns, Turn("assistant", text))
        return text, cut


def visible(text: str) -> str:
    """The text without control characters, which could command a terminal; line ends and tabs stay."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cs"}
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
