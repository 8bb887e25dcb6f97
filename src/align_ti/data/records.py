"""One raw record of any format as a conversation: LLaVA, messages, prompt and completion, plain captions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from align_ti.data.conversation import IMAGE_TAG, Conversation, Picture, Speaker, StoredPicture, Turn
from align_ti.errors import DataError

Format = Literal["auto", "llava", "messages", "prompt_completion", "plain"]
"""auto: by the record's keys. The others are described in docs/data.md."""

SPEAKERS: Mapping[str, Speaker] = {"human": "user", "gpt": "assistant", "system": "system"}
"""LLaVA's names of the speakers."""

ROLES: tuple[Speaker, ...] = ("system", "user", "assistant")
"""The roles of messages."""

OTHER_MEDIA = ("video", "videos", "audio", "audios")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")
"""What `find_extension` tries, in upper case too."""

Slot = Picture | None
"""A place of an image inside a text: None if the record's own list of images fills it."""


class ImageRoot:
    """The folder that image names start from; no name leads out of it.

    Args:
        folder: the folder; None if the source has none, so that names of files are refused.
        find_extension: look for a missing image under its name with another extension.
    """

    def __init__(self, folder: Path | None, find_extension: bool = False) -> None:
        self.folder, self.find_extension = folder, find_extension
        self.resolved = None if folder is None else folder.resolve()
        self.other_extension = 0
        """Images that were found under another extension."""

    def path(self, name: str, place: str) -> Path:
        """The path of an image.

        Raises:
            DataError: the name leads out of the root or is none, or there is no root.
        """
        if "://" in name or name.startswith("data:"):
            raise DataError(
                f"{place}: image {name!r:.80} is an address; images are never downloaded; give a file under the image root."
            )
        if self.folder is None or self.resolved is None:
            raise DataError(
                f"{place}: image {name!r} is a file name, but this source has no image root; give the folder (images of the "
                "source, or data.images)."
            )
        path = self.folder / name
        try:
            inside = path.resolve().is_relative_to(self.resolved)
            missing = inside and self.find_extension and not path.is_file()
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(
                f"{place}: image {name!r:.80} is no usable file name ({error}); a relative path is accepted; rename it."
            ) from error
        if not inside:
            raise DataError(
                f"{place}: image {name!r} lies outside the image root {self.folder}; only images inside it are read; move the "
                "image or choose a higher root."
            )
        return self.with_extension(path, place) if missing else path

    def with_extension(self, path: Path, place: str) -> Path:
        """The one file that differs from the path in its extension alone; the path itself if there is none."""
        tried = (path.with_suffix(suffix) for lower in EXTENSIONS for suffix in (lower, lower.upper()))
        found: list[Path] = []
        for other in tried:
            # A disk may tell no difference between .jpg and .JPG.
            if other.is_file() and not any(other.samefile(one) for one in found):
                found.append(other)
        if len(found) > 1:
            raise DataError(
                f"{place}: image {path} does not exist and {', '.join(other.name for other in found)} do; find_extension accepts "
                "exactly one; remove the others or name the image by its full name."
            )
        if found and not found[0].resolve().is_relative_to(self.resolved or ""):
            raise DataError(
                f"{place}: image {path} does not exist, and {found[0].name} beside it lies outside the image root {self.folder}; only "
                "images inside it are read; move the image or choose a higher root."
            )
        self.other_extension += len(found)
        return found[0] if found else path


def read_record(record: Any, place: str, root: ImageRoot, format: Format = "auto") -> Conversation:
    """One record as a conversation.

    Args:
        record: the raw record: a JSON object or a row.
        place: file and number, for error messages; the record's `id` is added.
        root: where its images lie.
        format: how to read it.

    Raises:
        DataError: the record is of no known format or contradicts itself. Nothing is guessed.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: a record is {type(record).__name__}; an object is accepted.")
    if record.get("id") is not None:
        place = f"{place}, id {record['id']!r}"
    for name in OTHER_MEDIA:
        if record.get(name):
            raise DataError(f"{place}: the record has {name!r}; images and text are accepted; remove the record.")
    chosen = format_of(record, place) if format == "auto" else format
    pictures = [picture(value, place, root) for value in image_values(record, place)]
    if chosen in {"llava", "plain"}:
        turns = read_turns(record.get("conversations"), place)
        if chosen == "plain":
            turns = as_caption(turns, place)
    else:
        turns, pictures = read_messages(messages_of(record, chosen, place), pictures, place, root)
    return Conversation(
        turns=turns,
        images=tuple(pictures),
        place=place,
        kind=str(record.get("kind") or record.get("category") or ""),
    )


def format_of(record: Mapping[str, Any], place: str) -> Format:
    """The format that the record's keys tell; a key whose value is null does not count, as tables have them."""
    present = {name for name, value in record.items() if value is not None}
    found: list[Format] = []
    if "conversations" in present:
        found.append("llava")
    if "messages" in present:
        found.append("messages")
    if {"prompt", "completion"} <= present:
        found.append("prompt_completion")
    if len(found) == 1:
        return found[0]
    keys = ", ".join(repr(str(key)) for key in record) or "none"
    if found:
        raise DataError(
            f"{place}: the record is {' and '.join(found)} at once (keys {keys}), so it would be guessed which is meant; give the "
            "source's format."
        )
    if {"chosen", "rejected"} <= present:
        raise DataError(
            f"{place}: a pair of chosen and rejected conversations; one conversation is accepted; keep the chosen one as "
            "'conversations' or 'messages'."
        )
    raise DataError(
        f"{place}: keys {keys} tell no known format; accepted: 'conversations' (LLaVA), 'messages', or 'prompt' and 'completion'; "
        "rename the key."
    )


# --- images ---------------------------------------------------------------------------------------------------------


def image_values(record: Mapping[str, Any], place: str) -> list[Any]:
    """The record's images as they stand in it: none (no key, null, "" or an empty list), one, or a list."""
    given = {name: record[name] for name in ("image", "images") if record.get(name) not in (None, "", [])}
    if len(given) > 1:
        raise DataError(f"{place}: both 'image' and 'images' are given; one of them is accepted; remove the other.")
    for name, value in given.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        for one in values:
            if not isinstance(one, str | bytes | Mapping | StoredPicture | Image.Image) or not one:
                raise DataError(
                    f"{place}: {name!r} is {value!r:.80}; a file name or a list of file names is accepted (in tables also the "
                    "bytes of files)."
                )
        return values
    return []


def picture(value: Any, place: str, root: ImageRoot) -> Picture:
    """An image as it stands in a record: a name, a file's bytes, or both in {"bytes", "path"}."""
    if isinstance(value, StoredPicture | Image.Image):
        return value
    if isinstance(value, str):
        return root.path(value, place)
    content = value if isinstance(value, bytes) else value.get("bytes") if isinstance(value, Mapping) else None
    if isinstance(content, bytes):
        return StoredPicture("in the record", partial(bytes, content))
    name = value.get("path") if isinstance(value, Mapping) else None
    if isinstance(name, str) and name and content is None:
        return root.path(name, place)
    raise DataError(
        f"{place}: an image is {value!r:.80}; a file name, or an object with 'bytes' or 'path', is accepted; fix the record."
    )


# --- LLaVA ------------------------------------------------------------------------------------------------------------


def read_turns(turns: Any, place: str) -> tuple[Turn, ...]:
    """The turns of a LLaVA record."""
    if not isinstance(turns, list):
        raise DataError(
            f"{place}: 'conversations' is {type(turns).__name__}; a list of {{'from', 'value'}} objects is accepted."
        )
    return tuple(read_turn(turn, place, number) for number, turn in enumerate(turns, start=1))


def read_turn(turn: Any, place: str, number: int) -> Turn:
    """One `{"from", "value"}` object as a turn; line ends beside an image tag go with it, as in LLaVA's own reader."""
    if isinstance(turn, Mapping) and "content" in turn and "value" not in turn:
        raise DataError(
            f"{place}: turn {number} has 'role' and 'content', but stands under 'conversations'; name the key 'messages'."
        )
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise DataError(
            f"{place}: turn {number} is {turn!r:.80}; an object with 'from' and a text 'value' is accepted."
        )
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise DataError(
            f"{place}: turn {number} is from unknown role {speaker!r}; accepted: {', '.join(SPEAKERS)}; rename the role."
        )
    return Turn(SPEAKERS[speaker], without_line_ends(turn["value"]))


def without_line_ends(text: str) -> str:
    """The text without the one line end on either side of each image tag."""
    return re.sub(rf"(?:\r?\n)?{IMAGE_TAG}(?:\r?\n)?", IMAGE_TAG, text)


def with_line_ends(text: str) -> str:
    """The text that `without_line_ends` makes this one of: line ends beside an image tag are doubled, so that they stay."""
    first, *others = text.split(IMAGE_TAG)
    pieces = [first, *("\n" + piece if piece.startswith(("\n", "\r\n")) else piece for piece in others)]
    return IMAGE_TAG.join([*(piece + "\n" if piece.endswith("\n") else piece for piece in pieces[:-1]), pieces[-1]])


def as_caption(turns: Sequence[Turn], place: str) -> tuple[Turn, ...]:
    """The two turns of a caption, the question reduced to its image."""
    speakers = [turn.speaker for turn in turns]
    if speakers != ["user", "assistant"] or turns[0].text.count(IMAGE_TAG) != 1:
        raise DataError(
            f"{place}: the plain format accepts one question with one {IMAGE_TAG} tag and one answer; found turns by "
            f"{', '.join(speakers) or 'nobody'}, {turns[0].text.count(IMAGE_TAG) if turns else 0} tag(s); use format llava."
        )
    return (Turn("user", IMAGE_TAG), turns[1])


# --- messages ---------------------------------------------------------------------------------------------------------


def messages_of(record: Mapping[str, Any], format: Format, place: str) -> list[Any]:
    """The record's messages; prompt and completion are put together."""
    if format == "messages":
        found = record.get("messages")
        if not isinstance(found, list):
            raise DataError(
                f"{place}: 'messages' is {type(found).__name__}; a list of {{'role', 'content'}} objects is accepted."
            )
        return found
    both: list[Any] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.get(name)
        if not isinstance(value, str | list):
            raise DataError(f"{place}: {name!r} is {type(value).__name__}; a text or a list of messages is accepted.")
        both += [{"role": role, "content": value}] if isinstance(value, str) else value
    return both


def read_messages(
    messages: Sequence[Any], pictures: Sequence[Picture], place: str, root: ImageRoot
) -> tuple[tuple[Turn, ...], list[Picture]]:
    """Turns and images of messages.

    Images of the record's list fill the `{"type": "image"}` parts, and the `<image>` tags of texts, in reading order. If there are
    neither, they all stand in front of the first question, provided that it is plain text, as in TRL.
    """
    roles = [message_role(message, place, number) for number, message in enumerate(messages, start=1)]
    contents = [message_pieces(message, place, number, root) for number, message in enumerate(messages, start=1)]
    slots = [piece for content in contents for piece in content if not isinstance(piece, str)]
    first = roles.index("user") if "user" in roles else None
    if pictures and not slots and first is not None and isinstance(messages[first]["content"], str):
        contents[first] = [*[None] * len(pictures), *contents[first]]
        slots = [None] * len(pictures)
    empty = slots.count(None)
    if empty != len(pictures):
        raise DataError(
            f"{place}: {empty} place(s) for images in the messages but {len(pictures)} image(s) in the record; the counts must be "
            "equal; add or remove image parts or images."
        )
    remaining = iter(pictures)
    filled = [next(remaining) if slot is None else slot for slot in slots]
    turns = (
        Turn(role, "".join(piece if isinstance(piece, str) else IMAGE_TAG for piece in content))
        for role, content in zip(roles, contents, strict=True)
    )
    return tuple(turns), filled


def message_role(message: Any, place: str, number: int) -> Speaker:
    """Who speaks in a message."""
    if not isinstance(message, Mapping):
        raise DataError(
            f"{place}: message {number} is {message!r:.80}; an object with 'role' and 'content' is accepted."
        )
    for role in ROLES:
        if message.get("role") == role:
            return role
    raise DataError(
        f"{place}: message {number} has the unknown role {message.get('role')!r}; accepted: {', '.join(ROLES)}; rename the role or "
        "remove the record."
    )


def message_pieces(message: Mapping[str, Any], place: str, number: int, root: ImageRoot) -> list[str | Slot]:
    """The texts of one message, and the places of images between them."""
    content = message.get("content")
    if message.get("tool_calls"):
        raise DataError(f"{place}: message {number} calls tools; text and images are accepted; remove the record.")
    if isinstance(content, str):
        if message["role"] != "user":
            return [content]
        first, *others = without_line_ends(content).split(IMAGE_TAG)
        return [first, *(piece for text in others for piece in (None, text))]
    if not isinstance(content, list):
        raise DataError(
            f"{place}: message {number} has content of type {type(content).__name__}; a text or a list of parts is accepted."
        )
    return [message_part(part, f"{place}, message {number}", root) for part in content]


def message_part(part: Any, place: str, root: ImageRoot) -> str | Slot:
    """One part of a structured content: its text, its own image, or None for an image from the record's list."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise DataError(f"{place}: a text part holds {text!r:.80}; a text is accepted.")
        if IMAGE_TAG in text:
            raise DataError(
                f"{place}: a text part holds the tag {IMAGE_TAG}, which models take for an image; use a part of type 'image', or "
                "spell it differently if it is meant as text."
            )
        return text
    if kind == "image":
        own = [part[name] for name in ("image", "path", "url", "bytes") if part.get(name) is not None]
        return picture(own[0], place, root) if own else None
    raise DataError(
        f"{place}: a part is {part!r:.80}; accepted: {{'type': 'text', 'text': ...}} and {{'type': 'image'}}; remove the record."
    )
