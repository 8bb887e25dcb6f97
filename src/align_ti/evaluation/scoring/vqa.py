"""VQA's rule as TextVQA uses it: answers normalised, and worth what ten people agree on. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from align_ti.errors import DataError

ANSWERS = 10
"""People who answered each question."""

NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}

ARTICLES = ("a", "an", "the")

CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
    how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""

CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in CONTRACTED.split()
    for place, letter in enumerate(form)
    if letter == "'"
    # The one entry of the original that goes the other way.
} | {"somebody'd": "somebodyd"}
"""The right spelling of each word that lacks one apostrophe.

The original's table also has keys with a capital (`Im`, `Ive`, `Id've`, `I'dve`), which no word in lower case equals, and two that
map to themselves (`let's`, `she's`). It has no entry for `im`, `its`, `id`, `shes` or `wed`.
"""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

PERIOD = re.compile(r"\.(?!\d)")
"""A full stop that no digit follows. The original means to look behind it too, but its look-behind is misspelt and without effect."""

PERIODS = 32
"""Full stops deleted at most: the original hands over `re.UNICODE`, whose value is 32, where the count belongs."""

DIGIT_COMMA = re.compile(r"(?<=\d),+(?=\d)")


def vqa_normalize(text: str) -> str:
    """The text as answers are compared: lower case, little punctuation, numbers as digits, no articles; perhaps empty."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [NUMBERS.get(word, word) for word in without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def without_punctuation(text: str) -> str:
    """The text with each punctuation mark deleted or replaced by a space, and without full stops that no digit follows.

    A mark is deleted, wherever it stands, if somewhere in the text it has a space beside it.
    """
    whole, comma = text, DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside_a_space = f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if beside_a_space or comma else " ")
    return PERIOD.sub("", text, count=PERIODS)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How far people agree with the prediction, 0 to 1: the mean over the ten of min(1, how many of the other nine say it / 3).

    So 0.3, 0.6, 0.9 and 1 for one, two, three and more of them. An empty prediction scores where people's answers normalise to
    nothing (`the`, `?`).

    Raises:
        DataError: not exactly ten answers.
    """
    if len(answers) != ANSWERS:
        raise DataError(
            f"vqa_accuracy: {len(answers)} answers; exactly {ANSWERS} are accepted, as every question of VQA and TextVQA has; for "
            "another number use vqa_consensus."
        )
    said = vqa_normalize(prediction)
    agree = [vqa_normalize(answer) == said for answer in answers]
    same = sum(agree)
    return (same * min(1.0, (same - 1) / 3) + (ANSWERS - same) * min(1.0, same / 3)) / ANSWERS if same else 0.0
