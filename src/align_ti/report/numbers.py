"""How numbers are written: decimals, signs, intervals, units of time and of operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import floor, log10
from typing import Any

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"

TIMES = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))
OPERATIONS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def decimals(unit: str, values: Iterable[float], of_per_cent: int) -> int:
    """Decimals that values of a unit are told with: as many for per cents as given, else three digits of the largest.

    Nats have two at least: a divergence is near 0 for one model and may be above 10 for another.
    """
    if unit == "%":
        return of_per_cent
    largest = max((abs(value) for value in values), default=0.0)
    least = 2 if unit == "nats" else 0
    return max(1, least) if largest == 0 else min(6, max(least, 2 - floor(log10(largest))))


def number(value: float, places: int) -> str:
    """The number with so many decimals, and a minus sign that lines up with digits."""
    # A mean of 50.75 may have been computed as 50.749999999999996; both are told alike.
    told = f"{round(value, places + 6):,.{places}f}"
    if float(told.replace(",", "")) == 0:
        told = told.removeprefix("-")
    return told.replace("-", MINUS)


def signed(value: float, places: int) -> str:
    """The number with its sign; none for what rounds to 0."""
    told = number(value, places)
    return f"+{told}" if value > 0 and float(told.replace(",", "")) != 0 else told


def bounds(low: float | None, high: float | None, places: int, *, sign: bool = False) -> str:
    """An interval in words."""
    if low is None or high is None:
        return "interval unknown"
    write = signed if sign else number
    return f"{write(low, places)} to {write(high, places)}"


def with_interval(one: Mapping[str, Any], places: int) -> str:
    """A difference and its interval."""
    return f"{signed(one['mean'], places)} ({bounds(one['low'], one['high'], places, sign=True)})"


def probability(value: float | None) -> str:
    """A p value; below a thousandth it says no more than that."""
    if value is None:
        return DASH
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def digits(value: float) -> str:
    """The number to three digits, or to the unit if it has more."""
    return "0" if value == 0 else f"{value:,.{max(0, 2 - floor(log10(abs(value))))}f}"


def scaled(units: Sequence[tuple[float, str]], values: Sequence[float]) -> tuple[float, str]:
    """The largest unit that the largest value is at least two of; the smallest if there is none."""
    largest = max(values, default=0.0)
    return next((one for one in units if largest >= 2 * one[0]), units[-1])


def amount(units: Sequence[tuple[float, str]], value: float) -> str:
    """The value in a unit that suits it."""
    scale, name = scaled(units, [value])
    return f"{digits(value / scale)} {name}"


def amounts(units: Sequence[tuple[float, str]], values: Sequence[float]) -> list[str]:
    """The values in the unit that suits the largest, with equal decimals, so that they can be compared at a glance."""
    scale, name = scaled(units, values)
    return [f"{told} {name}" for told in aligned([value / scale for value in values])]


def aligned(values: Sequence[float]) -> list[str]:
    """The numbers with equal decimals, so many that the largest has three digits."""
    places = decimals("", values, 0)
    told = [number(value, places) for value in values]
    # A value that would be told as 0 beside a much larger one keeps digits of its own.
    return [
        digits(value) if value and float(one.replace(",", "").replace(MINUS, "-")) == 0 else one
        for value, one in zip(values, told, strict=True)
    ]


def capital(text: str) -> str:
    """The text with a capital first letter, as a heading has it."""
    return text[:1].upper() + text[1:]


def plural(of: Sequence[Any] | Mapping[Any, Any], word: str) -> str:
    """The word for so many."""
    return word if len(of) == 1 else f"{word}s"


def points(unit: str) -> str:
    """The unit of a difference: of per cents, points."""
    return "points" if unit == "%" else unit
