"""The progress of a run as one self-contained page without scripts, which asks for itself again until the run is done."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from align_ti.report.progress import Progress, number, shape

RELOAD = 3
"""Seconds until the page is loaded again."""

WIDTH, HEIGHT, POINTS = 160, 32, 80
"""Of a curve, in its own units; and the points of its line at most."""


def progress_page(view: Progress) -> str:
    """The page as HTML; everything from files is escaped."""
    environment = Environment(
        loader=PackageLoader("align_ti.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("progress.html.j2").render(
        view=view, reload=RELOAD, points=points, told=told, width=WIDTH, height=HEIGHT
    )


def points(values: Sequence[float]) -> str:
    """The points of a curve's line, from left to right."""
    heights = shape(values, POINTS)
    step = WIDTH / max(1, len(heights) - 1)
    return " ".join(f"{place * step:.1f},{2 + (1 - height) * (HEIGHT - 4):.1f}" for place, height in enumerate(heights))


def told(values: Sequence[float]) -> str:
    """The curve in words."""
    return f"from {number(values[0])} to {number(values[-1])}, {len(values)} values, lowest {number(min(values))}"
