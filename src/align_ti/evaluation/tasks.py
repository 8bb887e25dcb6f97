"""A conversation with its last answer taken off: the question that a model is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from align_ti.data.conversation import Conversation, Picture
from align_ti.data.groups import identity
from align_ti.errors import DataError


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, what is expected, and what scores are grouped by."""

    conversation: Conversation
    expected: str
    kind: str
    picture: str
    """Tells images apart, for intervals."""


def name_of(image: Picture) -> str:
    """A name that records with the same image share: its path, a digest of its bytes in a table, or the object in memory."""
    found = identity(image)
    return found.hex() if isinstance(found, bytes) else str(found)


def question(conversation: Conversation) -> Question:
    """The last answer of a record as a question; earlier turns stay as they are.

    Raises:
        DataError: the record has no answer to compare with.
    """
    if conversation.turns[-1].speaker != "assistant":
        raise DataError(
            f"{conversation.place}: the last turn is by the user, so there is no answer to compare with; add the expected answer."
        )
    pictures = "|".join(name_of(image) for image in conversation.images)
    return Question(
        conversation=replace(conversation, turns=conversation.turns[:-1]),
        expected=conversation.turns[-1].text,
        kind=conversation.kind,
        picture=pictures or conversation.place,
    )
