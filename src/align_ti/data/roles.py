"""Every token has one role, decided here from the model's own chat template; masks derive from it.

The template is rendered twice: once with the real words and once with a marker in place of each. The marked rendering shows what
the template puts around the words; if those pieces and the words do not give the real rendering back, the template changes words
and roles would be guessed, so the record is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from align_ti.data.conversation import IMAGE_TAG, Conversation
from align_ti.errors import DataError

OTHER, VISUAL, INSTRUCTION, RESPONSE = 0, 1, 2, 3
ROLE_NAMES = ("other", "visual", "instruction", "response")

NO_LABEL = -100
"""The label of a token that no loss reads; transformers' own convention."""

NOT_FOR_THE_MODEL = frozenset({"labels", "roles", "candidates", "teacher"})


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model reads."""
    return {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}


@dataclass(frozen=True, slots=True)
class Span:
    """Words in the rendered text, by character, and the role of their tokens."""

    start: int
    stop: int
    role: int


def encode(
    conversation: Conversation, processor: ProcessorMixin, max_length: int | None = None, *, train: bool = True
) -> dict[str, Tensor]:
    """One record as tensors: the processor's inputs, `roles` and `labels`, each [seq], pictures in front of their own axes.

    Every assistant turn's words and the special token that ends it are response; every user turn's words are instruction; image
    tokens are visual; what the template adds is other.

    Args:
        conversation: the record.
        processor: the model's own processor with its chat template.
        max_length: tokens at most.
        train: refuse a record without a response.

    Raises:
        DataError: the record is too long, has no response, or the template does not let roles be told apart.
    """
    place = conversation.place
    if train and conversation.turns[-1].speaker != "assistant":
        raise DataError(
            f"{place}: the last turn is by the user; a response to learn is needed; add it or remove the record."
        )
    text, spans = render(conversation, processor)
    tokenizer = processor.tokenizer
    # As transformers does when it renders and tokenizes in one go: special tokens are added unless the template put them there.
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    plain = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    roles = token_roles(plain, spans, frozenset(tokenizer.all_special_ids))
    if train:
        check_ends(plain, roles, spans, place)
    pictures = conversation.pictures()
    inputs = processor(
        text=[text], images=[pictures] if pictures else None, add_special_tokens=special, return_tensors="pt"
    )
    ids = inputs["input_ids"][0]
    inputs["roles"] = spread(torch.tensor(plain["input_ids"]), torch.tensor(roles), ids, image_id(processor), place)[
        None
    ]
    inputs["labels"] = torch.where(inputs["roles"] == RESPONSE, inputs["input_ids"], NO_LABEL)
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"{place}: {len(ids)} tokens, but max_length is {max_length}: a response would be cut off; raise data.max_length, "
            "shorten the record, or remove it."
        )
    per_token = {"input_ids", "attention_mask", "roles", "labels", "token_type_ids", "mm_token_type_ids"}
    return {name: value[0] if name in per_token else value for name, value in inputs.items()}


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


def render(conversation: Conversation, processor: ProcessorMixin) -> tuple[str, list[Span]]:
    """The text that the template makes of the record, and where each turn's words are in it.

    Raises:
        DataError: the template leaves words out, repeats or changes them.
    """
    real = messages(conversation)
    parts = [
        (message["role"], part["text"]) for message in real for part in message["content"] if part["type"] == "text"
    ]
    taken = "".join(words for _, words in parts)
    markers = [f"\u27e6{number}\u27e7" for number in range(len(parts))]
    if any(marker in taken for marker in markers):
        markers = [f"\u27e6\u27e6{number}\u27e7\u27e7" for number in range(len(parts))]
    text: str = processor.apply_chat_template(real, tokenize=False)
    marked: str = processor.apply_chat_template(messages(conversation, markers), tokenize=False)
    prompt = generation_prompt(real, processor)
    rebuilt, spans, position = "", [], 0
    for marker, (speaker, words) in zip(markers, parts, strict=True):
        at = marked.find(marker, position)
        if at < 0 or marked.count(marker) != 1:
            raise DataError(
                f"{conversation.place}: the chat template shows the words of a {speaker} turn {marked.count(marker)} times or "
                "out of order; roles can be told apart only where it shows them once, in order; use another template."
            )
        rebuilt += marked[position:at]
        position = at + len(marker)
        # Some templates take a line break behind a picture for their own, some strip all words.
        forms = (words, words.removeprefix("\n"), words.strip())
        shown = next((form for form in forms if text.startswith(form, len(rebuilt))), forms[-1])
        role = {"user": INSTRUCTION, "assistant": RESPONSE}.get(speaker, OTHER)
        start = len(rebuilt)
        if role == RESPONSE and rebuilt.rstrip().endswith(prompt):
            # The model is asked to go on from the prompt, so the blank behind it is the model's to say.
            start = len(rebuilt.rstrip())
        spans.append(Span(start, len(rebuilt) + len(shown), role))
        rebuilt += shown
    rebuilt += marked[position:]
    if rebuilt != text:
        first = next(
            (i for i, (a, b) in enumerate(zip(rebuilt, text, strict=False)) if a != b), min(len(rebuilt), len(text))
        )
        raise DataError(
            f"{conversation.place}: the chat template changes the words it is given (near {text[max(0, first - 20) : first + 20]!r}), "
            "so roles would be guessed; use a template that shows words as they are."
        )
    return text, spans


def generation_prompt(conversation: list[dict[str, Any]], processor: ProcessorMixin) -> str:
    """What the template adds to a user's turn when an answer is asked for."""
    asked = conversation[: next(i for i, message in enumerate(conversation) if message["role"] == "user") + 1]
    without: str = processor.apply_chat_template(asked, tokenize=False)
    with_prompt: str = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    # A template without a prompt has nothing that a blank could follow; no text ends with a null character.
    return with_prompt.removeprefix(without) or "\0"


def token_roles(encoded: Mapping[str, Any], spans: list[Span], special: frozenset[int]) -> list[int]:
    """The role of each token of the rendered text: that of the words it overlaps.

    The token right behind a response is response too if it is special: it ends the turn, and a student that never learns it
    never stops.
    """
    roles = []
    ends = {span.stop for span in spans if span.role == RESPONSE}
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = [span.role for span in spans if start < span.stop and stop > span.start]
        if inside:
            roles.append(max(inside))
        else:
            roles.append(RESPONSE if token in special and start in ends and stop > start else OTHER)
    return roles


def check_ends(encoded: Mapping[str, Any], roles: list[int], spans: list[Span], place: str) -> None:
    """Refuse a template that puts no special token right behind a response: the student would never learn to stop.

    Raises:
        DataError: a response has no end-of-turn token.
    """
    ended = {
        start
        for (start, stop), role in zip(encoded["offset_mapping"], roles, strict=True)
        if role == RESPONSE and stop > start
    }
    for span in spans:
        if span.role == RESPONSE and span.stop not in ended:
            raise DataError(
                f"{place}: the chat template puts no special token right behind the response, so the student would never learn to "
                "stop; let the template end each answer with the tokenizer's end-of-turn token (such as eos_token)."
            )


def spread(plain: Tensor, roles: Tensor, expanded: Tensor, image: int | None, place: str) -> Tensor:
    """The roles of the text's tokens carried over to the processor's tokens, where each image token has become many."""
    if image is None:
        image = -1
    text_only, text_in_expanded = plain[plain != image], expanded[expanded != image]
    if not torch.equal(text_only, text_in_expanded):
        raise DataError(
            f"{place}: the processor changes more than image tokens ({len(text_only)} other tokens before, "
            f"{len(text_in_expanded)} after), so roles would be guessed; this processor is not supported yet."
        )
    result = torch.full_like(expanded, VISUAL)
    result[expanded != image] = roles[plain != image]
    return result


def image_id(processor: ProcessorMixin) -> int | None:
    """The token id that the processor repeats for a picture."""
    found = getattr(processor, "image_token_id", None)
    return None if found is None else int(found)
