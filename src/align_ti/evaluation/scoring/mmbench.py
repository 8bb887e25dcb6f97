"""MMBench's rule: which option an answer chooses, without a judge model. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

FAILED = "Failed to obtain answer via API"
"""What tools write in place of an answer that they could not get."""

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""Answers that refuse, by which words."""

SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))

STATED = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
"""Reads the letter in either case and without a look at what follows: `the answer is Bob` chooses B."""

LAST = 4
"""A letter counts if its first place is among this many words at the end."""


def mmbench_choice(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the option that the answer chooses; None if that cannot be told, or if the answer refuses.

    First by letter: exactly one option's letter stands as a word of its own, near the end; or the answer states it. Then by text:
    the answer is not much longer than the options together, and holds exactly one option's text, whatever its case.

    Args:
        text: the answer.
        choices: the options' texts by their letters.
    """
    letter = by_letter(text, choices)
    if letter == "":
        letter = by_text(text, choices)
    return letter or None


def by_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """The option by its letter; None if the answer refuses; empty if the letter cannot be told."""
    if FAILED in text:
        return ""
    if any(refusal in text for refusal in REFUSALS):
        return None
    words = text.translate(SEPARATORS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST:
        return named[0]
    if not named and "Z" in words:
        return None
    stated = STATED.search(text)
    return stated[1].upper() if stated and stated[1].upper() in choices else ""


def by_text(text: str, choices: Mapping[str, str]) -> str:
    """The option by its text; empty if none or several are found."""
    lower = text.lower()
    if len(lower) > 2 * sum(len(option) for option in choices.values()):
        return ""
    found = [letter for letter, option in choices.items() if option.lower() in lower]
    return found[0] if len(found) == 1 else ""
