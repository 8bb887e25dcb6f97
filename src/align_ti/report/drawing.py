"""How every figure of a page looks: SVG text, legible at a phone's width, on light and dark paper, and without colours."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers too.
COLOURS = {
    "teacher": "#7f7f7f",
    "start": "#949494",
    "before": "#949494",
    "sft": "#e69f00",
    "kd": "#56b4e9",
    "align_ti": "#009e73",
    "student": "#009e73",
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "align-ti",
    "font.family": "sans-serif",
}

INK, SOFT, LINE, PAPER = "#1c2430", "#5b6675", "#dde2e8", "#fefefe"
"""Text and points, lesser text, grid, and what lies behind; each becomes a property that dark paper sets anew."""

THEME = {
    INK: ("--ink", "#e6ebf2"),
    SOFT: ("--soft", "#a3afbe"),
    LINE: ("--line", "#333d4a"),
    PAPER: ("--paper", "#12161c"),
}
"""By colour on light paper: the property's name, and the colour on dark paper."""

WIDTH = 4.6
"""Inches: 331 points, so that text is no smaller on a phone than it says."""

OTHERS = ("#0072b2", "#d55e00", "#cc79a7", "#8c6d1f", "#7f7f7f", "#e69f00", "#56b4e9", "#009e73")
MARKERS = "osD^vP*Xph<>"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

LOOK: dict[Any, Any] = STYLE | {
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.alpha": 1.0,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a variant is drawn: no two alike, in colour or without."""

    colour: str
    marker: str
    dash: Any


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Each variant's look, by its place and, where the run's page has a colour for it, by its name."""
    taken = {COLOURS[name] for name in names if name in COLOURS}
    free = [colour for colour in OTHERS if colour not in taken]
    strange = [name for name in names if name not in COLOURS]
    return {
        name: Look(
            COLOURS.get(name) or free[strange.index(name) % len(free)],
            MARKERS[place % len(MARKERS)],
            DASHES[place % len(DASHES)],
        )
        for place, name in enumerate(names)
    }


@contextmanager
def look() -> Iterator[None]:
    """The look of all figures, for the block."""
    with mpl.rc_context(LOOK):
        yield


def drawn(figure: Figure, title: str) -> str:
    """The figure as SVG that names nothing outside itself and follows the reader's colour scheme, alone or inside a page."""
    text = svg(figure, title)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    # Groups are numbered anew in each figure; a page holds several, and nothing refers to groups.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for light, (name, _) in THEME.items():
        text = text.replace(light, f"var({name})")
    light_rules = "".join(f"{name}:{light};" for light, (name, _) in THEME.items())
    dark_rules = "".join(f"{name}:{dark};" for name, dark in THEME.values())
    rules = f".figure{{{light_rules}}}@media screen and (prefers-color-scheme:dark){{.figure{{{dark_rules}}}}}"
    return text.replace("<svg", '<svg class="figure" role="img"', 1).replace(
        "</title>", f"</title><style>{rules}</style>", 1
    )


def short(text: str, length: int = 34) -> str:
    """The text, cut where it would run into its neighbour."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def minus(of: str, to: str, length: int | None = None, between: str = " ") -> str:
    """What a difference is of.

    Args:
        of: the variant.
        to: what it is compared with.
        length: characters that a line has room for; both names are cut to half of what is too long, or to a line each.
        between: what stands before the sign if it is too long; a line's end puts the names on two lines.
    """
    whole = f"{of} \N{MINUS SIGN} {to}"
    if length is None or len(whole) <= length:
        return whole
    each = length - 3 if between == "\n" else (length - 3) // 2
    return f"{short(of, each)}{between}\N{MINUS SIGN} {short(to, each)}"


def spread(*values: float | None) -> list[float]:
    """The numbers among the values."""
    return [value for value in values if value is not None]


def around(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """Limits of an axis that shows all values, with a margin; never empty."""
    low, high = min(values), max(values)
    reach = (high - low) * margin or max(abs(high) * 0.1, 1.0)
    return low - reach, high + reach


def svg(figure: Figure, title: str) -> str:
    """The figure as an inline SVG element with a title for screen readers; the same figure gives the same text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Fixed sizes would overflow narrow windows.
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    return re.sub(r"(<svg[^>]*>)", lambda found: f"{found[1]}<title>{html.escape(title)}</title>", text, count=1)


def axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


Cell = str | float | int | None


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure on a page, with the numbers that it shows as a table to download."""

    name: str
    """Of the file that is downloaded, without its ending."""
    svg: Markup
    header: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    @property
    def csv(self) -> str:
        """The table as a data URL; text that a spreadsheet would compute is marked as text."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(map(as_text, self.header))
        writer.writerows([["" if cell is None else as_text(cell) for cell in row] for row in self.rows])
        return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(buffer.getvalue().encode()).decode()}"


def as_text(cell: Cell) -> Cell:
    """The cell, with an apostrophe before text that begins as a formula does."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t")) else cell


def picture_of(
    name: str, svg_text: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = ""
) -> Drawing:
    """A figure that was drawn here, and so is markup, with its numbers."""
    # HTML knows the namespace of SVG.
    inline = svg_text.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
    return Drawing(name, Markup(inline), tuple(header), rows, caption)
