"""Scorers for one's own benchmark: what a prediction is worth, 0 to 1, by the best of its references. Imports no torch."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import isinf

from align_ti.errors import DataError
from align_ti.evaluation.scoring.exact import is_right
from align_ti.evaluation.scoring.vqa import ANSWERS, vqa_accuracy, vqa_normalize

ANLS_THRESHOLD = 0.5
"""Similarities below it are worth nothing."""

NUMBER = re.compile(
    r"(?<![\w.])[-+\N{MINUS SIGN}]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.(?!\d)|\.\d+)?(?:[eE][-+]?\d+)?"
)
"""A number as people write it: sign, thousands with commas, decimals, exponent. May match nothing."""

WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

LETTER_FIRST = re.compile(r"\W*([A-Za-z])(?:\s*[.):,\]}]|\s*$)")
LETTER_STATED = re.compile(r"(?i:\b(?:answer|option|choice)\b(?:\s+is)?\s*:?)\s*\W{0,3}([A-Z])(?!\w)")
LETTER_ALONE = re.compile(r"(?<![\w'])([A-Z])(?![\w'])")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference, whatever its case, its spaces and a full stop at its end."""
    return float(any(is_right(prediction, one) for one in references))


def vqa_consensus(prediction: str, references: Sequence[str]) -> float:
    """VQA's soft accuracy after its normalisation: with ten references the original's, else min(1, how many say it / min(3, all))."""
    if len(references) == ANSWERS:
        return vqa_accuracy(prediction, references)
    said = vqa_normalize(prediction)
    same = sum(vqa_normalize(one) == said for one in references)
    return min(1.0, same / min(3, len(references))) if references else 0.0


def choice_letter(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction chooses a reference's letter.

    It chooses the letter that it is or starts with (`b`, `(B)`, `B. a dog`), else the one that it states (`the answer is B`), else the
    only capital that stands alone in it.

    Raises:
        DataError: a reference is no letter.
    """
    wanted = set()
    for one in references:
        if not re.fullmatch(r"\W*[A-Za-z]\W*", one):
            raise DataError(
                f"choice_letter: the reference {one!r:.60} is no letter; one letter, such as 'B', is accepted."
            )
        wanted.add(re.sub(r"\W", "", one).upper())
    first = LETTER_FIRST.match(prediction) or LETTER_STATED.search(prediction)
    # "I" and a sentence's "A" are words.
    alone = set(LETTER_ALONE.findall(prediction)) - {"I"}
    letter = first[1].upper() if first else alone.pop() if len(alone) == 1 else ""
    return float(letter in wanted)


def yes_no(prediction: str, references: Sequence[str]) -> float:
    """1 if the first of the words yes and no in the prediction, whatever its case, is that of a reference.

    Raises:
        DataError: a reference is neither.
    """
    wanted = {one.strip().rstrip(".").lower() for one in references}
    if not wanted <= {"yes", "no"}:
        raise DataError(f"yes_no: the references are {', '.join(sorted(wanted))!r:.60}; 'yes' and 'no' are accepted.")
    said = re.search(r"\b(yes|no)\b", prediction.lower())
    return float(said is not None and said[1] in wanted)


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: 1 - edits / the longer length, whatever the case; nothing below one half."""
    said = " ".join(prediction.lower().split())
    best = max((similarity(said, " ".join(one.lower().split())) for one in references), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def similarity(one: str, other: str) -> float:
    """1 - edits / the longer length; 1 if both are empty."""
    longer = max(len(one), len(other))
    return 1 - edits(one, other) / longer if longer else 1.0


def edits(one: str, other: str) -> int:
    """Letters to insert, delete or replace at least to turn one text into the other."""
    row = list(range(len(other) + 1))
    for index, letter in enumerate(one, start=1):
        diagonal, row[0] = row[0], index
        for column, wanted in enumerate(other, start=1):
            cost = min(row[column] + 1, row[column - 1] + 1, diagonal + (letter != wanted))
            diagonal, row[column] = row[column], cost
    return row[-1]


def contains(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the prediction as whole words, whatever the case and the spaces."""
    said = " ".join(prediction.lower().split())
    wanted = [" ".join(one.lower().split()) for one in references]
    return float(any(one and re.search(rf"(?<!\w){re.escape(one)}(?!\w)", said) for one in wanted))


def numeric(prediction: str, references: Sequence[str], relative: float = 0.05, absolute: float = 0.0) -> float:
    """1 if the only number in the prediction is a reference's, up to a tolerance. Signs of money and per cent are passed over.

    Args:
        prediction: the answer.
        references: numbers.
        relative: the tolerance as a share of the reference, 5 % as ChartQA has it.
        absolute: the tolerance as a distance; the larger one counts.

    Raises:
        DataError: a reference is no number, or too large for one.
    """
    said = numbers(prediction)
    wanted = [numbers(one) for one in references]
    for one, found in zip(references, wanted, strict=True):
        if len(found) != 1:
            raise DataError(f"numeric: the reference {one!r:.60} holds {len(found)} numbers; exactly one is accepted.")
        if isinf(found[0]):
            raise DataError(f"numeric: the reference {one!r:.60} is too large; numbers below 1.8e308 are accepted.")
    return float(
        len(said) == 1 and any(abs(said[0] - value) <= max(relative * abs(value), absolute) for (value,) in wanted)
    )


def numbers(text: str) -> list[float]:
    """The numbers in a text."""
    found = (match[0] for match in NUMBER.finditer(text) if any(letter.isdecimal() for letter in match[0]))
    return [float(one.replace(",", "").replace("\N{MINUS SIGN}", "-")) for one in found]


def word_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the words, counted with repetition, in lower case without punctuation and articles, as SQuAD has it."""
    said = squad_words(prediction)
    return max((overlap(said, squad_words(one)) for one in references), default=0.0)


def overlap(said: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags of words; if one is empty, whether both are."""
    if not said or not wanted:
        return float(said == wanted)
    both = sum((Counter(said) & Counter(wanted)).values())
    return 2 * both / (len(said) + len(wanted))


def squad_words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    return [word for word in text.lower().translate(WITHOUT_PUNCTUATION).split() if word not in {"a", "an", "the"}]


SCORERS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "vqa": vqa_consensus,
    "choice": choice_letter,
    "yes_no": yes_no,
    "anls": anls,
    "contains": contains,
    "numeric": numeric,
    "f1": word_f1,
}
"""By the name that a benchmark of one's own chooses one by."""
