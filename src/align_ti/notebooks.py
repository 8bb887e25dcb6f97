"""What objects look like in a notebook: tables and marked text as HTML, with everything escaped. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

CELL = "padding:.2em .7em;text-align:"

PAINTS = {"other": "#e4e7eb", "visual": "#f3d6e8", "instruction": "#cfe6fa", "response": "#cdeedd"}
"""The background of each role; the text on it is dark, whatever the notebook's theme."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table: the first column to the left, the others, which hold numbers, to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        sides = ["left", *["right"] * (len(cells) - 1)]
        return "".join(
            f'<{tag} style="{CELL}{side}">{escape(cell)}</{tag}>' for cell, side in zip(cells, sides, strict=True)
        )

    head = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table>{head}<thead><tr>{line(columns, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def marked(role: str, label: str, text: str) -> str:
    """Text on its role's colour, with the role in words in front of it: colour alone tells nothing to some readers."""
    return (
        f'<span style="background:{PAINTS[role]};color:#1c2430;padding:.1em .3em;white-space:pre-wrap">'
        f"<small><b>{escape(label)}</b></small> {escape(text)}</span> "
    )
