"""ScienceQA's rule: which option an answer chooses. Imports no torch."""

from __future__ import annotations

import re

LETTERS = "ABCDE"
"""The options that a question may have."""

STATED = re.compile("The answer is ([A-Z]).")
"""The full stop stands for any character except a line end, and one has to follow: `The answer is B` is no choice."""


def scienceqa_choice(text: str, num_choices: int) -> int | None:
    """The index of the option that the answer chooses; None if it chooses none of the first `num_choices` letters.

    In this order, with nothing stripped and capitals alone: the answer is a letter; it starts with a letter, a full stop and a
    space; it says `The answer is X` and a further character exactly once.
    """
    if text in tuple(LETTERS):
        letter = text
    elif text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        letter = text[0]
    else:
        stated = STATED.findall(text)
        letter = stated[0] if len(stated) == 1 else ""
    offered = LETTERS[:num_choices]
    return offered.index(letter) if letter and letter in offered else None
