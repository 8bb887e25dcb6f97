"""What is shown of a run while it trains: plain data, which the terminal and the page both draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, log


@dataclass(frozen=True, slots=True)
class Bar:
    """How much of something is done; `total` is None where that is not known."""

    label: str
    done: int
    total: int | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: a label, a cell a column, and the values so far, drawn as a curve if there are any."""

    label: str
    cells: tuple[str, ...]
    curve: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A table: `columns` are the headings of the cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run, a demo or a study is."""

    title: str
    state: str
    """In words: what is going on, and the way out where nothing is."""
    done: bool
    """Whether nothing more will come."""
    bars: tuple[Bar, ...] = ()
    sections: tuple[Section, ...] = ()
    troubles: tuple[str, ...] = ()
    """What went wrong, the newest last."""
    log: tuple[str, ...] = ()
    """A line for every entry of the logs, the newest last."""


def shape(values: Sequence[float], points: int) -> list[float]:
    """The values as heights from 0 to 1, at most `points` of them; each is the mean of its part of the values.

    Heights are logarithmic where all values are positive and the largest is more than ten times the smallest, as losses are that fall
    from their first step. Values that are not finite are left out; equal ones lie in the middle.
    """
    known = [value for value in values if isfinite(value)]
    if not known:
        return []
    count = min(points, len(known))
    borders = [round(part * len(known) / count) for part in range(count + 1)]
    means = [sum(known[start:stop]) / (stop - start) for start, stop in pairwise(borders)]
    if min(means) > 0 and max(means) > 10 * min(means):
        means = [log(mean) for mean in means]
    low, high = min(means), max(means)
    return [0.5 if high == low else (mean - low) / (high - low) for mean in means]


def number(value: float | None) -> str:
    """A number to four digits, or a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def counted(count: int, what: str) -> str:
    """A number of things, such as `2 runs`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
