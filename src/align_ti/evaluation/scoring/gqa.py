"""GQA's rule: an answer is right if it equals the reference after one small normalisation. Imports no torch."""

from __future__ import annotations


def gqa_normalize(text: str) -> str:
    """The text without full stops at its end, in lower case; spaces, articles, numbers and other punctuation stay as they are."""
    return text.rstrip(".").lower()
