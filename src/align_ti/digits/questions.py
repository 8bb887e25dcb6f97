"""Questions about a scene, eight kinds, each with its one right answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from align_ti.digits.scenes import COLOURS, COLUMNS, GRID, ROWS, WORDS, Scene

NUMBERS = (*WORDS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")


@dataclass(frozen=True, slots=True)
class Question:
    """One instruction, its answer, and the kind that scores are grouped by."""

    kind: str
    text: str
    answer: str


def digit_at(scene: Scene, random: np.random.Generator) -> Question:
    """Which digit stands at a place."""
    figure = scene.figures[int(random.integers(len(scene.figures)))]
    return Question("digit", f"Which digit is at the {figure.place}?", f"It is a {WORDS[figure.digit]}.")


def colour_at(scene: Scene, random: np.random.Generator) -> Question:
    """Which colour the digit at a place has."""
    figure = scene.figures[int(random.integers(len(scene.figures)))]
    return Question("colour", f"What colour is the digit at the {figure.place}?", f"It is {figure.colour}.")


def count_of(scene: Scene, random: np.random.Generator) -> Question:
    """How many digits have a colour; zero may be right."""
    colours = [figure.colour for figure in scene.figures]
    # Two draws in three ask for a colour that is there, or most answers would be "no".
    pool = colours if random.random() < 2 / 3 else list(COLOURS)
    colour = pool[int(random.integers(len(pool)))]
    number = colours.count(colour)
    noun = "digit is" if number == 1 else "digits are"
    return Question("count", f"How many digits are {colour}?", f"{NUMBERS[number].capitalize()} {noun} {colour}.")


def where_is(scene: Scene, random: np.random.Generator) -> Question | None:
    """Where a digit stands that is the only one of its name; None if every name occurs twice."""
    names = [figure.name for figure in scene.figures]
    single = [figure for figure in scene.figures if names.count(figure.name) == 1]
    if not single:
        return None
    figure = single[int(random.integers(len(single)))]
    return Question("where", f"Where is the {figure.name}?", f"It is at the {figure.place}.")


def row_of(scene: Scene, random: np.random.Generator) -> Question:
    """What one row reads, left to right."""
    row = int(random.integers(GRID))
    names = [figure.name for figure in scene.figures if figure.row == row]
    answer = ", then ".join(names).capitalize() if names else "Nothing"
    return Question("row", f"Read the {ROWS[row]} row.", f"{answer}.")


def reading(scene: Scene, random: np.random.Generator) -> Question:
    """Everything, in reading order: one wrong word makes it wrong."""
    text = ", ".join(f"{figure.place} {figure.name}" for figure in scene.figures)
    return Question("reading", "Read every digit.", f"{text.capitalize()}.")


def pair(scene: Scene, random: np.random.Generator) -> tuple[str, str, int, int]:
    """Two different figures of the scene: their places, then their digits."""
    one, two = random.choice(len(scene.figures), size=2, replace=False)
    first, second = scene.figures[int(one)], scene.figures[int(two)]
    return first.place, second.place, first.digit, second.digit


def comparison(scene: Scene, random: np.random.Generator) -> Question:
    """Which of two digits, found by place, is larger."""
    here, there, first, second = pair(scene, random)
    if first == second:
        answer = f"Neither, both are {WORDS[first]}."
    else:
        place = here if first > second else there
        answer = f"The {WORDS[max(first, second)]} at the {place} is larger than {WORDS[min(first, second)]}."
    return Question("compare", f"Which is larger, the digit at the {here} or at the {there}?", answer)


def addition(scene: Scene, random: np.random.Generator) -> Question:
    """What two digits, found by place, add up to."""
    here, there, first, second = pair(scene, random)
    answer = f"{WORDS[first].capitalize()} plus {WORDS[second]} is {NUMBERS[first + second]}."
    return Question("add", f"Add the digits at the {here} and the {there}.", answer)


KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "digit": digit_at,
    "colour": colour_at,
    "count": count_of,
    "where": where_is,
    "row": row_of,
    "reading": reading,
    "compare": comparison,
    "add": addition,
}


def ask(scene: Scene, random: np.random.Generator, kinds: tuple[str, ...] = tuple(KINDS)) -> list[Question]:
    """One question of each kind (a kind that the scene cannot answer is left out), in the order of `kinds`."""
    questions = (KINDS[kind](scene, random) for kind in kinds)
    return [question for question in questions if question is not None]


def all_phrases() -> list[str]:
    """Sentences that together hold every word form of the questions and answers: what the tokenizer is trained on."""
    places = [f"{row} {column}" for row in ROWS for column in COLUMNS]
    names = [f"{colour} {word}" for colour in COLOURS for word in WORDS]
    phrases = ["Read every digit.", "Nothing."]
    phrases += [f"Read the {row} row." for row in ROWS]
    for place in places:
        phrases += [
            f"Which digit is at the {place}?",
            f"What colour is the digit at the {place}?",
            f"It is at the {place}.",
        ]
        phrases += [f"Add the digits at the {place} and the {place}."]
        phrases += [f"Which is larger, the digit at the {place} or at the {place}?"]
        phrases += [f"{place.capitalize()} {name}, {place} {name}." for name in names]
    for word in WORDS:
        phrases += [
            f"It is a {word}.",
            f"Neither, both are {word}.",
            f"The {word} at the {places[0]} is larger than {word}.",
        ]
    for colour in COLOURS:
        phrases += [f"How many digits are {colour}?", f"One digit is {colour}.", f"It is {colour}."]
    phrases += [f"{name.capitalize()}, then {name}." for name in names] + [f"Where is the {name}?" for name in names]
    phrases += [f"{number.capitalize()} plus {number} is {number}." for number in NUMBERS]
    return phrases + [f"{number.capitalize()} digits are {colour}." for number in NUMBERS for colour in COLOURS]
