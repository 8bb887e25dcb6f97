"""POPE's rule: yes or no from a free answer. Imports no torch."""

from __future__ import annotations

from typing import Literal

NO = ("No", "not", "no")
"""The words that make an answer a no. `NO`, `Not` and `cannot` are none of them."""


def pope_answer(text: str) -> Literal["yes", "no"]:
    """No if a word up to the first full stop, commas deleted, is exactly one of `NO`; everything else, the empty answer too, is yes.

    Words end at spaces alone: a line end or a tab is part of its word, so `"no\\n"` is a yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in NO for word in words) else "yes"
