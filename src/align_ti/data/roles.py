"""Every token has one role, decided here from the model's own processor and chat template; masks derive from it.

Roles are found by characters. `rendering` says where the words are in the text of the template; the processor says what it put in
place of each image; the text so expanded must tokenize to the processor's own ids. Where one of these does not hold, roles would
be guessed, so the record is refused.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from align_ti.data.conversation import Conversation
from align_ti.data.rendering import Words, render, with_openings
from align_ti.errors import DataError

OTHER, VISUAL, INSTRUCTION, RESPONSE = 0, 1, 2, 3
ROLE_NAMES = ("other", "visual", "instruction", "response")
ROLE_OF_WORDS = {"system": OTHER, "user": INSTRUCTION, "assistant": RESPONSE}

NO_LABEL = -100
"""The label of a token that no loss reads; transformers' own convention."""

TEACHER_HIDDEN, TEACHER_ATTENTION = "teacher_hidden", "teacher_attention"
"""What a cache of the teacher (`align_ti.data.teacher_cache`) adds to a sample: rows, and one number a visual token, in order."""

NOT_FOR_THE_MODEL = frozenset(
    {"labels", "roles", "pictures", "student_written", "candidates", "teacher", TEACHER_HIDDEN, TEACHER_ATTENTION}
)

PER_TOKEN = frozenset(
    {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "mm_token_type_ids",
        "roles",
        "labels",
        "pictures",
        "student_written",
    }
)
"""Fields with one entry a token: what tokenizers return, the two names for "which modality", and ours. All else is of images."""


class Picture(NamedTuple):
    """An image's placeholder in the rendered text, by character, and what the processor puts in its place."""

    start: int
    stop: int
    text: str


class Piece(NamedTuple):
    """One token of a text and the characters it stands for; none for a token that the tokenizer adds of itself."""

    token: int
    start: int
    stop: int


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model reads."""
    return {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}


def encode(
    conversation: Conversation,
    processor: ProcessorMixin,
    max_length: int | None = None,
    *,
    train: bool = True,
    ask: bool = False,
) -> dict[str, Tensor]:
    """One record as tensors: the processor's inputs, `roles`, `labels` and `pictures` (at visual tokens the number of their image in
    the record, from 1; 0 elsewhere). Fields of `PER_TOKEN` are [seq], others as they come.

    Every assistant turn's text and the special token that ends it are response; every user turn's text is instruction; tokens whose
    embedding is replaced by an image feature are visual; all others are other, including what the processor puts around visual tokens.
    A token that covers text and something else (a space of the template, for example) has the text's role.

    Args:
        conversation: the record.
        processor: the model's own processor with its chat template.
        max_length: maximum number of tokens.
        train: refuse a record without a response.
        ask: end with the template's prompt for an answer.

    Raises:
        DataError: the record is too long, has no response, or has special tokens inside its text; or template or processor make
            the roles ambiguous.
    """
    place = conversation.place
    if train and conversation.turns[-1].speaker != "assistant":
        raise DataError(
            f"{place}: the last turn is by the user; a response to learn is needed; add it or remove the record."
        )
    text, words = render(conversation, processor, ask=ask)
    check_words(text, words, processor, place)
    if train:
        words = with_openings(conversation, text, words, processor)
    inputs, pictures = expand(text, conversation.pictures(), processor, place)
    text, words, areas = put_in(text, words, pictures, place)
    pieces = pieces_of(text, processor)
    check_same(pieces, inputs["input_ids"][0], place)
    roles = token_roles(text, pieces, words, areas, processor)
    check_visual(pieces, roles, areas, processor, place)
    if train:
        check_ends(pieces, roles, words, place)
    inputs["roles"] = torch.tensor([roles])
    inputs["pictures"] = torch.tensor([picture_numbers(pieces, roles, areas)])
    inputs["labels"] = torch.where(inputs["roles"] == RESPONSE, inputs["input_ids"], NO_LABEL)
    if max_length is not None and len(pieces) > max_length:
        raise DataError(
            f"{place}: {len(pieces)} tokens, but max_length is {max_length}: a response would be cut off; raise data.max_length, "
            "shorten the record, or remove it."
        )
    return {name: value[0] if name in PER_TOKEN else value for name, value in inputs.items()}


# --- text to tokens ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def exact_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's own rules, with blanks kept in the offsets.

    Byte-level tokenizers may leave blanks out of them (Llama 3, SmolLM2): a token of blanks alone would then stand for no
    character and lose its role.

    Raises:
        DataError: the tokenizer has no such rules (it is not of the `tokenizers` library).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; a tokenizer with a tokenizer.json is "
            "accepted; convert it to one."
        )
    state = json.loads(backend.to_str())
    last = state["post_processor"] or {}
    for step in [last, *last.get("processors", [])]:
        if "trim_offsets" in step:
            step["trim_offsets"] = False
    exact = Tokenizer.from_str(json.dumps(state))
    exact.no_truncation()
    exact.no_padding()
    return exact


def adds_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether special tokens are added to the text: unless the template put them there, as transformers has it."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def pieces_of(text: str, processor: ProcessorMixin) -> list[Piece]:
    """The tokens of the text."""
    tokenizer = processor.tokenizer
    encoded = exact_tokenizer(tokenizer).encode(text, add_special_tokens=adds_special_tokens(text, tokenizer))
    return [Piece(token, *span) for token, span in zip(encoded.ids, encoded.offsets, strict=True)]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Every token that means something else than its letters, by id; the unknown token is none where it stands for letters."""
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    named = tokenizer.all_special_ids
    return special | dict(zip(named, tokenizer.convert_ids_to_tokens(named), strict=True))


def is_special(piece: Piece, text: str, special: Mapping[int, str]) -> bool:
    """Whether the token is a special one that stands in the text as such."""
    return special.get(piece.token) == text[piece.start : piece.stop].strip()


def expand(
    text: str, images: list[Image.Image], processor: ProcessorMixin, place: str
) -> tuple[dict[str, Tensor], list[Picture]]:
    """The processor's inputs for the text, and what it put in place of each image's placeholder.

    Raises:
        DataError: the processor refuses the text, or there are more or fewer placeholders than images.
    """
    # Processors of transformers before 5.15 do not say what they put in.
    tells = bool(images) and hasattr(processor, "get_text_with_replacements")
    special = adds_special_tokens(text, processor.tokenizer)
    options: dict[str, Any] = {"return_text_replacement_offsets": True} if tells else {}
    try:
        inputs = dict(
            processor(
                text=[text],
                images=[images] if images else None,
                add_special_tokens=special,
                return_tensors="pt",
                **options,
            )
        )
    except ValueError as error:
        raise DataError(
            f"{place}: the processor refuses the text of the chat template ({error}); one placeholder for each image is accepted; "
            "use the model's own template and processor."
        ) from error
    told = inputs.pop("text_replacement_offsets", None)
    if told is not None:
        pictures = [Picture(one["span"][0], one["span"][1], one["replacement"]) for one in told[0]]
    else:
        pictures = repeated(pieces_of(text, processor), inputs["input_ids"][0].tolist(), processor) if images else []
    if len(pictures) != len(images):
        raise DataError(
            f"{place}: the text of the chat template has {len(pictures)} placeholder(s) for {len(images)} image(s); one for each is "
            "accepted; use the model's own template and processor."
        )
    return inputs, pictures


def repeated(pieces: Sequence[Piece], expanded: Sequence[int], processor: ProcessorMixin) -> list[Picture]:
    """The images of a processor that does not report what it puts in, assuming that it repeats the placeholder; `check_same` verifies
    it."""
    image, placeholder = image_id(processor), str(getattr(processor, "image_token", ""))
    pictures, at = [], 0
    for index, piece in enumerate(pieces):
        if piece.token != image:
            at += 1
            continue
        followed = index + 1 < len(pieces) and pieces[index + 1].token == image
        start = at
        while at < len(expanded) and expanded[at] == image and not (followed and at > start):
            at += 1
        pictures.append(Picture(piece.start, piece.stop, placeholder * (at - start)))
    return pictures


def put_in(
    text: str, words: Sequence[Words], pictures: Sequence[Picture], place: str
) -> tuple[str, list[Words], list[range]]:
    """The text with every image in its place, where the words are now, and where the images are.

    Raises:
        DataError: a placeholder is made of words.
    """
    expanded, areas, starts, position = "", [], [0] * len(words), 0
    for picture in pictures:
        for index, one in enumerate(words):
            if max(one.start, picture.start) < min(one.stop, picture.stop):
                raise special_words(text[picture.start : picture.stop], one.speaker, place)
            if one.start >= picture.stop:
                starts[index] += len(picture.text) - (picture.stop - picture.start)
        expanded += text[position : picture.start]
        areas.append(range(len(expanded), len(expanded) + len(picture.text)))
        expanded, position = expanded + picture.text, picture.stop
    moved = [Words(one.start + by, one.stop + by, one.speaker) for one, by in zip(words, starts, strict=True)]
    return expanded + text[position:], moved, areas


# --- tokens to roles --------------------------------------------------------------------------------------------------


def token_roles(
    text: str, pieces: Sequence[Piece], words: Sequence[Words], areas: Sequence[range], processor: ProcessorMixin
) -> list[int]:
    """The role of each token of the expanded text.

    The special token right behind a response is response too: it ends the turn, and a student that never learns it never stops.
    """
    special, image = special_tokens(processor.tokenizer), image_id(processor)
    shade = bytearray(len(text))
    for area in areas:
        shade[area.start : area.stop] = bytes([VISUAL]) * len(area)
    for one in words:
        shade[one.start : one.stop] = bytes([ROLE_OF_WORDS[one.speaker]]) * (one.stop - one.start)
    ends = {one.stop for one in words if one.speaker == "assistant"}
    roles = []
    for piece in pieces:
        held = shade[piece.start : piece.stop]
        if piece.token == image:
            roles.append(VISUAL if VISUAL in held else OTHER)
        elif is_special(piece, text, special):
            roles.append(RESPONSE if any(at in ends for at in range(piece.start, piece.stop)) else OTHER)
        else:
            roles.append(max((role for role in held if role != VISUAL), default=OTHER))
    return roles


def picture_numbers(pieces: Sequence[Piece], roles: Sequence[int], areas: Sequence[range]) -> list[int]:
    """For each visual token the number of its image, from 1; 0 for all other tokens."""
    starts = [area.start for area in areas]
    return [
        bisect_right(starts, piece.start) if role == VISUAL else 0 for piece, role in zip(pieces, roles, strict=True)
    ]


def image_id(processor: ProcessorMixin) -> int | None:
    """The token id whose embedding is replaced by an image's feature, as the tokenizer names it, else the processor.

    Gemma's processor names the placeholder instead, which stands beside the visual tokens.
    """
    found = getattr(processor.tokenizer, "image_token_id", None)
    if found is None:
        found = getattr(processor, "image_token_id", None)
    return None if found is None else int(found)


# --- refusals ---------------------------------------------------------------------------------------------------------


def special_words(token: str, speaker: str, place: str) -> DataError:
    """The error for words that the tokenizer would read as a special token."""
    return DataError(
        f"{place}: the words of a {speaker} turn hold {token!r}, which this tokenizer or processor reads as a special token and not as "
        "letters; words without it are accepted; spell it differently or remove the record."
    )


def check_words(text: str, words: Sequence[Words], processor: ProcessorMixin, place: str) -> None:
    """Refuse words that would be read as special tokens or placeholders.

    Raises:
        DataError: such a token stands among the words, or is made of words and what the template puts beside them.
    """
    special = special_tokens(processor.tokenizer)
    named = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
    placeholders = [token for token in named if isinstance(token, str)]
    pieces = [piece for piece in pieces_of(text, processor) if is_special(piece, text, special)]
    for one in words:
        for token in placeholders:
            if token in text[one.start : one.stop]:
                raise special_words(token, one.speaker, place)
        for piece in pieces:
            # A special token may swallow blanks beside it.
            if text[max(piece.start, one.start) : min(piece.stop, one.stop)].strip():
                raise special_words(special[piece.token], one.speaker, place)


def check_same(pieces: Sequence[Piece], ids: Tensor, place: str) -> None:
    """Refuse a processor whose tokens are not those of the text with every image in its place.

    Raises:
        DataError: they differ.
    """
    if [piece.token for piece in pieces] != ids.tolist():
        raise DataError(
            f"{place}: the processor gives {len(ids)} tokens that are not those of its text with every image in its place "
            f"({len(pieces)}), so roles would be guessed; this processor, or this version of transformers (5.15 or later says what it "
            "puts in), is not supported yet."
        )


def check_visual(
    pieces: Sequence[Piece], roles: Sequence[int], areas: Sequence[range], processor: ProcessorMixin, place: str
) -> None:
    """Refuse an image without visual tokens, and an image token that belongs to no image.

    Raises:
        DataError: there is such an image or token.
    """
    visual = [piece for piece, role in zip(pieces, roles, strict=True) if role == VISUAL]
    # A special token may swallow blanks beside it, so one of its ends may lie outside.
    reached = {piece.start for piece in visual} | {piece.stop - 1 for piece in visual}
    empty = sum(reached.isdisjoint(area) for area in areas)
    image = image_id(processor)
    loose = sum(piece.token == image and role != VISUAL for piece, role in zip(pieces, roles, strict=True))
    if empty or loose:
        raise DataError(
            f"{place}: {empty} image(s) without visual tokens and {loose} image token(s) without an image; each image needs "
            "tokens of its own; use the model's own processor and template."
        )


def check_ends(pieces: Sequence[Piece], roles: Sequence[int], words: Sequence[Words], place: str) -> None:
    """Refuse a template that puts no special token right behind a response: the student would never learn to stop.

    Raises:
        DataError: a response has no end-of-turn token.
    """
    response = [piece for piece, role in zip(pieces, roles, strict=True) if role == RESPONSE]
    for one in words:
        if one.speaker == "assistant" and not any(piece.start <= one.stop < piece.stop for piece in response):
            raise DataError(
                f"{place}: the chat template puts no special token right behind the response, so the student would never learn to "
                "stop; let the template end each answer with the tokenizer's end-of-turn token (such as eos_token)."
            )
