"""The typed record behind every data format: images and turns, with the place they came from."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from align_ti.errors import DataError

Speaker = Literal["system", "user", "assistant"]

IMAGE_TAG = "<image>"
"""Stands for one image inside a user's text, in reading order."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The text of one turn. A user's text has one `<image>` tag for each of its images."""

    speaker: Speaker
    text: str


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """An image that lies as the bytes of a file inside a table, read when it is asked for."""

    name: str
    """Where it lies, for error messages."""
    read: Callable[[], bytes] = field(repr=False)
    """Gives the bytes. A module's function or a partial of one, so that it can be sent to a worker."""


Picture = Path | Image.Image | StoredPicture
"""A file, an image in memory, or one inside a table."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training or test record.

    `images` are paths, images inside tables, or images that are in memory already, in the order of their tags. `place`
    says where the record came from (`file, record N, id X`), for error messages.
    """

    turns: tuple[Turn, ...]
    images: tuple[Picture, ...] = ()
    place: str = "a conversation made in memory"
    kind: str = ""
    """A label for scoring by group (`category` or `kind` in the file); empty if there is none."""
    responses: Literal["gold", "teacher"] = "gold"
    """Whether the assistant's turns are the recorded ones, or a teacher's in their place."""

    def __post_init__(self) -> None:
        check(self)

    def check_files(self) -> None:
        """Refuse the record if an image's file is missing; nothing is decoded.

        Raises:
            DataError: a file does not exist.
        """
        for image in self.images:
            try:
                there = not isinstance(image, Path) or image.is_file()
            except OSError as error:
                raise DataError(
                    f"{self.place}: image {image!s:.80}... cannot be opened ({error.strerror}); a file name is accepted; fix "
                    "the record."
                ) from error
            if not there:
                assert isinstance(image, Path)
                raise missing_picture(image, self.place)

    def pictures(self) -> list[Image.Image]:
        """The record's images, decoded, as RGB.

        Raises:
            DataError: a file is missing or is no readable image.
        """
        return [open_picture(image, self.place) for image in self.images]


def check(conversation: Conversation) -> None:
    """Refuse a record that cannot be trained on or asked.

    Raises:
        DataError: no turns, wrong order of speakers, an empty answer, or tags that do not match the images.
    """
    place, turns = conversation.place, conversation.turns
    for text in (
        *(turn.text for turn in turns),
        *(str(image) for image in conversation.images if isinstance(image, Path)),
    ):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise DataError(
                f"{place}: {text.encode('utf-8', 'backslashreplace').decode()[:60]!r} holds half of a surrogate pair, such as an emoji "
                "cut in two; whole characters are accepted; fix the record."
            )
    spoken = [turn for turn in turns if turn.speaker != "system"]
    if any(turn.speaker == "system" for turn in turns[1:]):
        raise DataError(f"{place}: a system turn stands after the first turn; accepted: first or not at all; move it.")
    for index, turn in enumerate(spoken):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.speaker != expected:
            raise DataError(
                f"{place}: turn {index + 1} is by {turn.speaker!r}; user and assistant must alternate, the user "
                "first; reorder or merge the turns."
            )
        if turn.speaker == "assistant" and not turn.text.strip():
            raise DataError(
                f"{place}: the answer in turn {index + 1} is empty; an answer needs at least one character; fill it "
                "or remove the record."
            )
    if not spoken:
        raise DataError(f"{place}: no turns found; a record needs a user turn; add it or remove the record.")
    for turn in turns:
        if turn.speaker != "user" and IMAGE_TAG in turn.text:
            raise DataError(
                f"{place}: an {IMAGE_TAG} tag stands in a turn by {turn.speaker!r}; images are accepted in user turns "
                "only; move the tag, or spell it differently if it is meant as text."
            )
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if tags != len(conversation.images):
        raise DataError(
            f"{place}: {tags} {IMAGE_TAG} tag(s) in the text but {len(conversation.images)} image(s) in the record; "
            "the counts must be equal; add or remove tags or images."
        )


def missing_picture(image: Path, place: str) -> DataError:
    """The error for an image that is not there."""
    return DataError(
        f"{place}: image {image} does not exist; check the record's name for it and the image root (data.images in a recipe)."
    )


def open_picture(image: Picture, place: str) -> Image.Image:
    """The image as RGB, fully decoded; of an animation the first frame.

    Raises:
        DataError: the file is missing, no image, or cut off. Nothing is put in its place.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    name = image.name if isinstance(image, StoredPicture) else str(image)
    try:
        with Image.open(io.BytesIO(image.read()) if isinstance(image, StoredPicture) else image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise missing_picture(Path(name), place) from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{place}: image {name} cannot be read ({error}); a complete PNG, JPEG or other format that Pillow reads "
            "is accepted; restore the file or remove the record."
        ) from error
