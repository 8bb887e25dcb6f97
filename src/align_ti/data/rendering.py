"""A record as the text that the model's own chat template makes of it, and where each turn's words are in that text.

The template is rendered with the real words, with a marker in place of each piece of words, and with blanks around the markers,
which shows what it trims. What stands around the markers and the words must give the real rendering back; if not, the template
changes words and roles would be guessed, so the record is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import ProcessorMixin

from align_ti.data.conversation import IMAGE_TAG, Conversation
from align_ti.errors import DataError

BEFORE, BEHIND = "\n\n\t", "\v\n"
"""Blanks around a marker. What is left of them tells what a template trims: nothing, one line end in front (which a template may
have taken for its own behind an image), line ends, or all blanks."""


@dataclass(frozen=True, slots=True)
class Words:
    """One piece of a turn's words in a text, by character."""

    start: int
    stop: int
    speaker: str


def messages(conversation: Conversation, words: list[str] | None = None) -> list[dict[str, Any]]:
    """The conversation in transformers' chat form; the n-th non-empty piece of text is `words[n]` if words are given."""
    replacement = iter(words) if words is not None else None
    result = []
    for turn in conversation.turns:
        content: list[dict[str, str]] = []
        for index, piece in enumerate(turn.text.split(IMAGE_TAG) if turn.speaker == "user" else [turn.text]):
            if index:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": piece if replacement is None else next(replacement)})
        result.append({"role": turn.speaker, "content": content})
    return result


def render(conversation: Conversation, processor: ProcessorMixin, *, ask: bool = False) -> tuple[str, list[Words]]:
    """The text that the template makes of the record, and the words in it, in order; with `ask`, the prompt for an answer too.

    Raises:
        DataError: the template fails, leaves words out, repeats or changes them.
    """
    place, real = conversation.place, messages(conversation)
    given = [(turn["role"], part["text"]) for turn in real for part in turn["content"] if part["type"] == "text"]
    markers = unused_markers([words for _, words in given])
    text = apply(real, processor, place, ask=ask)
    marked = apply(messages(conversation, markers), processor, place, ask=ask)
    padded = apply(messages(conversation, [BEFORE + one + BEHIND for one in markers]), processor, place, ask=ask)
    speakers = [speaker for speaker, _ in given]
    frame = between(marked, markers, speakers, place)
    kept = [
        kept_blanks(piece, loose) for piece, loose in zip(frame, between(padded, markers, speakers, place), strict=True)
    ]
    rebuilt, found = frame[0], []
    for index, (speaker, words) in enumerate(given):
        shown = trimmed(words, kept[index][1], kept[index + 1][0])
        found.append(Words(len(rebuilt), len(rebuilt) + len(shown), speaker))
        rebuilt += shown + frame[index + 1]
    check_rebuilt(rebuilt, text, place)
    return text, found


def apply(chat: list[dict[str, Any]], processor: ProcessorMixin, place: str, *, ask: bool) -> str:
    """The template's rendering. Thinking is switched off where the template has a switch: records hold answers, not thoughts.

    Raises:
        DataError: there is no template, or it fails.
    """
    template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
    switch: dict[str, Any] = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
    try:
        text: str = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask, **switch)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"{place}: the chat template cannot render the record ({error}); a template that takes such turns is accepted; change "
            "the record, or give the processor another chat_template."
        ) from error
    return text


def unused_markers(given: list[str]) -> list[str]:
    """As many different markers as pieces of words, none of which occurs in them."""
    width = 1
    while any("\u27e6" * width in words for words in given):
        width += 1
    return [f"{chr(0x27E6) * width}{number}{chr(0x27E7) * width}" for number in range(len(given))]


def between(marked: str, markers: list[str], speakers: list[str], place: str) -> list[str]:
    """What the template puts before, between and behind the markers.

    Raises:
        DataError: a marker is shown more or less often than once, or out of order; or the parts of a turn are printed as a list.
    """
    frame, position = [], 0
    for marker, speaker in zip(markers, speakers, strict=True):
        at = marked.find(marker, position)
        if at < 0 or marked.count(marker) != 1:
            raise DataError(
                f"{place}: the chat template shows the words of a {speaker} turn {marked.count(marker)} times or out of order; roles "
                "can be told apart only where it shows them once, in order; use another template."
            )
        frame.append(marked[position:at])
        position = at + len(marker)
    frame.append(marked[position:])
    if any("{'type':" in piece for piece in frame):
        raise DataError(
            f"{place}: the chat template prints a turn's list of parts as it is; a template for turns with images is accepted "
            "(content as a list of parts); give the processor one."
        )
    return frame


def kept_blanks(piece: str, padded: str) -> tuple[str, str]:
    """What is left of `BEHIND` of the marker before a piece of the template, and of `BEFORE` of the marker behind it."""
    for behind in (BEHIND, BEHIND[0], ""):
        for before in (BEFORE, BEFORE[1:], BEFORE[-1], ""):
            if behind + piece + before == padded:
                return behind, before
    # Taken for a template that trims nothing; where that is wrong, the rendering cannot be put together again.
    return BEHIND, BEFORE


def trimmed(words: str, before: str, behind: str) -> str:
    """The words with the blanks removed that the template removes; `before` and `behind` are what it left of those around a marker."""
    in_front = {BEFORE[1:]: words.removeprefix("\n"), BEFORE[-1]: words.lstrip("\n"), "": words.lstrip()}
    words = in_front.get(before, words)
    return {BEHIND: words, BEHIND[0]: words.rstrip("\n"), "": words.rstrip()}[behind]


def check_rebuilt(rebuilt: str, text: str, place: str) -> None:
    """Refuse a rendering that is not the template's frame with the words in it.

    Raises:
        DataError: they differ.
    """
    if rebuilt == text:
        return
    pairs = zip(rebuilt, text, strict=False)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(rebuilt), len(text)))
    raise DataError(
        f"{place}: the chat template changes the words it is given or shows a part of them (near "
        f"{text[max(0, first - 20) : first + 20]!r}), so roles would be guessed; use a template that shows words as they are."
    )


def with_openings(conversation: Conversation, text: str, words: list[Words], processor: ProcessorMixin) -> list[Words]:
    """The words, each answer with the blank in front of it that the prompt for an answer leaves out.

    A model that is asked with `ASSISTANT:` says the blank itself, and in front of a number it is a token of its own.

    Raises:
        DataError: the template asks for an answer with other text than stands before the answer it is given (blanks aside), so the
            student would learn to answer behind a prompt that it is never asked with.
    """
    opening = apply(messages(conversation)[:-1], processor, conversation.place, ask=True)
    before = text[: words[-1].start]
    if "".join(opening.split()) != "".join(before.split()):
        raise DataError(
            f"{conversation.place}: the chat template asks for an answer with {opening[-40:]!r}, but puts {before[-40:]!r} in front "
            "of the answer it is given, so the student would learn to answer a prompt that it is never asked with; use a template "
            "that does both alike (one that does not open thoughts, for instance)."
        )
    blank = before[len(opening) :] if before.startswith(opening) else ""

    def opened(piece: Words) -> Words:
        said = piece.speaker == "assistant" and blank and text[: piece.start].endswith(blank)
        return Words(piece.start - len(blank), piece.stop, piece.speaker) if said else piece

    return [opened(piece) for piece in words]
