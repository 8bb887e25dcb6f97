"""Images under several instructions: the sample that layers are scored on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from align_ti.data.conversation import IMAGE_TAG, Conversation, Picture, StoredPicture, Turn
from align_ti.errors import DataError


def same_image_groups(
    conversations: Sequence[Conversation], images: int, instructions: int, seed: int = 0
) -> list[list[Conversation]]:
    """Up to `images` groups, each one image under 2 to `instructions` different instructions, without answers.

    Every user turn of a one-image record is an instruction about its image, asked on its own. One with no words behind the
    image cannot look at it, since attention is causal, and is passed over. The sample is drawn with the seed.

    Raises:
        DataError: no image has two instructions.
    """
    asked: dict[object, dict[str, Conversation]] = {}
    for conversation in conversations:
        if len(conversation.images) != 1:
            continue
        group = asked.setdefault(identity(conversation.images[0]), {})
        for turn in conversation.turns:
            text = turn.text.replace(IMAGE_TAG, "")
            if turn.speaker == "user" and turn.text.rpartition(IMAGE_TAG)[2].strip():
                question = Turn("user", turn.text if IMAGE_TAG in turn.text else IMAGE_TAG + turn.text)
                group.setdefault(
                    text, Conversation((question,), conversation.images, conversation.place, conversation.kind)
                )
    groups = [list(group.values()) for group in asked.values() if len(group) >= 2]
    if not groups:
        raise DataError(
            "no image of the training data has two different instructions, so layers cannot be scored; set "
            "objective.iva.layer to a number, or score layers on other data with `align-ti score-layers`."
        )
    chooser = random.Random(seed)
    chosen = chooser.sample(groups, min(images, len(groups)))
    return [chooser.sample(group, min(instructions, len(group))) for group in chosen]


def identity(picture: Picture) -> object:
    """What two records share if they show the same image: its path, the bytes inside a table, or the object in memory."""
    if isinstance(picture, Path):
        return picture
    return hashlib.sha256(picture.read()).digest() if isinstance(picture, StoredPicture) else id(picture)
