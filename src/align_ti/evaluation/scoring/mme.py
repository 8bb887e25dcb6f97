"""MME's rule: yes, no or other from the first characters of an answer. Imports no torch."""

from __future__ import annotations

from typing import Literal

LOOKED_AT = 4
"""Characters of the answer that count."""


def mme_answer(text: str) -> Literal["yes", "no", "other"]:
    """Yes if the first four characters, in lower case, hold `yes`; else no if they hold `no`; else other, which is always wrong.

    Nothing is stripped: `know`, `Not` and `None` are a no, while `**Yes**` and `  yes` are other.
    """
    start = text.lower()[:LOOKED_AT]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"
