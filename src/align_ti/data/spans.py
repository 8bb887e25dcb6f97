"""Tokens as people read them: adjacent ones of one role in one span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from align_ti.data.roles import ROLE_NAMES, VISUAL


@dataclass(frozen=True, slots=True)
class Span:
    """Adjacent tokens of one role as text; a run of visual tokens is named by its length."""

    role: str
    text: str
    tokens: int


def spans(ids: Sequence[int], roles: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> tuple[Span, ...]:
    """The tokens in spans of one role each; without a tokenizer by their numbers."""
    found = []
    for role, run in groupby(zip(roles, ids, strict=True), key=lambda pair: pair[0]):
        own = [token for _, token in run]
        if role == VISUAL:
            text = f"[{len(own)} visual tokens]"
        elif tokenizer is None:
            text = " ".join(map(str, own))
        else:
            text = visible(str(tokenizer.decode(own)))
        found.append(Span(ROLE_NAMES[role], text, len(own)))
    return tuple(found)


def visible(text: str) -> str:
    """The text with what a terminal would obey, such as escape codes, made visible."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)
