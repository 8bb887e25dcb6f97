"""A study's figures, as SVG text: legible at a phone's width, on light and dark paper, and without colours."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from align_ti.report.drawing import (
    INK,
    PAPER,
    SOFT,
    WIDTH,
    Look,
    around,
    axes,
    drawn,
    look,
    looks,
    minus,
    short,
    spread,
)

OFFSETS = (
    (9, 0, "left"),
    (-9, 0, "right"),
    (0, 13, "center"),
    (0, -13, "center"),
    (9, 8, "left"),
    (9, -8, "left"),
    (-9, 8, "right"),
    (-9, -8, "right"),
    (8, 11, "left"),
    (8, -11, "left"),
    (-8, 11, "right"),
    (-8, -11, "right"),
    (14, 18, "left"),
    (14, -18, "left"),
    (-14, 18, "right"),
    (-14, -18, "right"),
    (20, 26, "left"),
    (20, -26, "left"),
    (-20, 26, "right"),
    (-20, -26, "right"),
    (26, 44, "left"),
    (26, -44, "left"),
    (-26, 44, "right"),
    (-26, -44, "right"),
)
"""Where a label may stand: points across and up from what it names, and the side that it is held by; the best first."""

NEAR = 12
"""So many of these are so near that no line needs to lead there."""

Row = Mapping[str, Any]

Box = tuple[float, ...]
"""Left, bottom, right, top, in pixels."""

Boxes = Float[np.ndarray, "_ 4"]


# --- differences ------------------------------------------------------------------------------------------------------


def forest(rows: Sequence[Row], labels: Mapping[str, str], told: Sequence[str], unit: str) -> str:
    """The differences with their intervals, a row for each pair; hollow where the corrected interval holds 0.

    Args:
        rows: the study's differences.
        labels: of variants.
        told: each difference in words.
        unit: of the differences.
    """
    with look():
        figure, ax = axes(WIDTH, 0.75 + 0.47 * len(rows))
        reach = [0.0]
        for place, (row, words) in enumerate(zip(rows, told, strict=True)):
            low, high, wide_low, wide_high = (row[key] for key in ("low", "high", "corrected_low", "corrected_high"))
            reach += spread(row["mean"], low, high, wide_low, wide_high)
            if wide_low is not None and wide_high is not None:
                ax.plot([wide_low, wide_high], [place, place], color=INK, linewidth=1.0)
            if low is not None and high is not None:
                ax.plot([low, high], [place, place], color=INK, linewidth=3.5, solid_capstyle="butt")
            point = INK if clear(wide_low, wide_high) else PAPER
            ax.plot(row["mean"], place, "o", markersize=7, markeredgecolor=INK, markerfacecolor=point, zorder=3)
            line = ax.get_yaxis_transform()
            label = minus(labels[row["of"]], labels[row["to"]], 32)
            for text, side, colour, across in ((label, "left", INK, 0), (words, "right", SOFT, 1)):
                ax.annotate(
                    text,
                    (across, place),
                    (0, 7),
                    xycoords=line,
                    textcoords="offset points",
                    fontsize=9,
                    color=colour,
                    ha=side,
                    bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
                )
        ax.axvline(0, color=SOFT, linewidth=1.2, zorder=1)
        ax.set_xlim(*around(reach))
        ax.set_ylim(len(rows) - 0.6, -0.75)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        many = f", thin: corrected for {len(rows)} comparisons" if len(rows) > 1 else ""
        ax.set_xlabel(f"difference, {unit}\nthick: 95 % interval{many}")
        return drawn(figure, "Differences between variants with their intervals")


def clear(low: float | None, high: float | None) -> bool:
    """Whether an interval is known and leaves out 0."""
    return low is not None and high is not None and (low > 0 or high < 0)


def kinds(rows: Sequence[Row], pairs: Sequence[tuple[str, str]], labels: Mapping[str, str], unit: str) -> str:
    """Each metric's difference, a panel for each pair; hollow where the interval, which is not corrected, holds 0."""
    with look():
        columns = min(2, len(pairs))
        lines = -(-len(pairs) // columns)
        figure = Figure(figsize=(WIDTH, lines * (0.55 + 0.2 * len(rows)) + 0.4), layout="constrained")
        panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
        for ax, (of, to) in zip(panels, pairs, strict=False):
            for place, row in enumerate(rows):
                for one in row["differences"]:
                    if (one["of"], one["to"]) == (of, to):
                        dot(ax, place, one)
            ax.axvline(0, color=SOFT, linewidth=1.2, zorder=1)
            ax.set_title(minus(labels[of], labels[to], 26 if columns == 2 else 50, "\n"), fontsize=9, loc="left")
            ax.set_yticks(range(len(rows)), [short(row["metric"], 16) for row in rows], fontsize=9)
            ax.set_ylim(len(rows) - 0.4, -0.6)
            ax.tick_params("x", labelsize=9)
            # Two panels stand side by side: their outer numbers must not meet.
            ax.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
        for place in range(len(pairs), len(panels)):
            panels[place].set_axis_off()
            # The numbers of the axis stand below the last panel of the column.
            panels[place - columns].tick_params("x", labelbottom=True)
        figure.supxlabel(f"difference, {unit}; lines: 95 % intervals, not corrected", fontsize=9)
        return drawn(figure, "Differences by question type, with intervals")


def dot(ax: Axes, place: float, one: Row) -> None:
    """A difference and its interval on a line of a panel."""
    low, high = one["low"], one["high"]
    if low is not None and high is not None:
        ax.plot([low, high], [place, place], color=INK, linewidth=1.6)
    face = INK if clear(low, high) else PAPER
    ax.plot(one["mean"], place, "o", markersize=5, markeredgecolor=INK, markerfacecolor=face, zorder=3)


# --- cost -------------------------------------------------------------------------------------------------------------


def frontier(
    variants: Mapping[str, Row],
    labels: Mapping[str, str],
    best: Sequence[str],
    by: str,
    scale: float,
    words: tuple[str, str],
) -> str:
    """Accuracy over cost with intervals, and the line of the variants that no other one beats at their cost or a lower one.

    Args:
        variants: the study's.
        labels: of variants.
        best: the variants on the line, cheapest first.
        by: `seconds` or `flops`.
        scale: what a unit of the axis is in seconds or operations.
        words: what the axes are.
    """
    with look():
        figure, ax = axes(WIDTH, 3.6)
        places = {name: (one[by] / scale, one["accuracy"]["mean"]) for name, one in variants.items()}
        for name, style in looks(list(labels)).items():
            if name not in variants:
                continue
            (x, y), told = places[name], variants[name]["accuracy"]
            if told["low"] is not None and told["high"] is not None:
                ax.plot([x, x], [told["low"], told["high"]], color=style.colour, linewidth=1.6)
            ax.plot(x, y, style.marker, color=style.colour, markersize=8, markeredgecolor=PAPER, zorder=3)
        ax.plot(*zip(*[places[name] for name in best], strict=True), color=SOFT, linewidth=1.0, dashes=(4, 3), zorder=1)
        costs = [x for x, _ in places.values()]
        if max(costs) > 8 * min(costs) > 0:
            ax.set_xscale("log")
            ax.set_xlim(min(costs) / 1.6, max(costs) * 1.6)
        else:
            # Equal costs would stretch what the clock's noise is over the whole width.
            reach = max(0.35 * (max(costs) - min(costs)), 0.15 * max(costs)) or 1.0
            ax.set_xlim(max(0.0, min(costs) - reach), max(costs) + reach)
        seen = [value for one in variants.values() for value in spread(*one["accuracy"].values())]
        ax.set_ylim(*around(seen, 0.12))
        ax.set_xlabel(words[0])
        ax.set_ylabel(words[1])
        bars = {
            name: spread(variants[name]["accuracy"]["low"], variants[name]["accuracy"]["high"]) for name in variants
        }
        named = {name: (short(labels[name], 26), *places[name]) for name in variants}
        place_labels(figure, ax, named, bars, [places[name] for name in best])
        return drawn(figure, f"Accuracy over {by}")


def place_labels(
    figure: Figure,
    ax: Axes,
    points: Mapping[str, tuple[str, float, float]],
    bars: Mapping[str, Sequence[float]],
    path: Sequence[tuple[float, float]],
) -> None:
    """Writes each point's label where it meets no point, bar, line or other label, if there is room; a line leads to far ones.

    Args:
        figure: the figure; its layout is settled by this.
        ax: its axes, with limits.
        points: label, x and y by name.
        bars: the ends of each point's interval.
        path: the corners of the line that is drawn.
    """
    figure.draw_without_rendering()
    pixels = figure.dpi / 72
    taken: list[Box] = []
    for name, (_, x, y) in points.items():
        across, up = ax.transData.transform((x, y))
        reach = 6 * pixels
        taken.append((across - reach, up - reach, across + reach, up + reach))
        if bars[name]:
            ends = [ax.transData.transform((x, end))[1] for end in (min(bars[name]), max(bars[name]))]
            taken.append((across - 2 * pixels, ends[0], across + 2 * pixels, ends[1]))
    corners = [ax.transData.transform(corner) for corner in path]
    for start, end in itertools.pairwise(corners):
        for share in range(1, 30):
            across, up = start + (end - start) * share / 30
            taken.append((across - pixels, up - pixels, across + pixels, up + pixels))
    frame = tuple(ax.get_window_extent().extents)
    for label, x, y in sorted(points.values(), key=lambda one: -one[2]):
        text = ax.annotate(
            label, (x, y), (0, 0), textcoords="offset points", fontsize=9, va="center", annotation_clip=False
        )
        size = text.get_window_extent()
        text.remove()
        at = ax.transData.transform((x, y))
        found = []
        for order, (across, up, side) in enumerate(OFFSETS):
            left = at[0] + across * pixels - {"left": 0.0, "center": 0.5, "right": 1.0}[side] * size.width
            middle = at[1] + up * pixels
            box = (left, middle - size.height / 2, left + size.width, middle + size.height / 2)
            found.append((crowding(box, taken, frame) + order / 2, order, box))
        _, order, box = min(found, key=lambda one: one[:2])
        across, up, side = OFFSETS[order]
        far = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        text = ax.annotate(
            label,
            (x, y),
            (across, up),
            textcoords="offset points",
            fontsize=9,
            ha=side,
            va="center",
            arrowprops=far if order >= NEAR else None,
            annotation_clip=False,
        )
        text.set_in_layout(False)
        taken.append(box)


def crowding(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """How much of a box, in square pixels, lies on others or outside the frame."""
    own = np.array([box])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return float(area - met(own, np.array([frame])).sum() + met(own, np.array(taken)).sum())


def met(one: Boxes, others: Boxes) -> Float[np.ndarray, " boxes"]:
    """The area that a box has in common with each other one."""
    low, high = np.maximum(one[:, :2], others[:, :2]), np.minimum(one[:, 2:], others[:, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=1))


# --- learning curves --------------------------------------------------------------------------------------------------


def learning(
    curves: Mapping[str, Sequence[Row]], labels: Mapping[str, str], by: str, scale: float, words: tuple[str, str]
) -> str:
    """One benchmark's learning curves: mean over seeds, and its 95 % interval as a band where there are several.

    Args:
        curves: the points by variant.
        labels: of variants.
        by: `step` or `seconds`.
        scale: what a unit of the axis is in steps or seconds.
        words: what the axes are.
    """
    with look():
        figure, ax = axes(WIDTH, 3.5)
        ends = []
        for name, style in looks(list(labels)).items():
            points = curves.get(name)
            if not points:
                continue
            across = [point[by] / scale for point in points]
            means = [point["mean"] for point in points]
            every = max(1, len(points) // 6)
            ax.plot(
                across,
                means,
                color=style.colour,
                linestyle=style.dash,
                marker=style.marker,
                markersize=5,
                markevery=every,
                linewidth=1.6,
            )
            banded = [place for place, point in enumerate(points) if None not in (point["low"], point["high"])]
            ax.fill_between(
                [across[place] for place in banded],
                [points[place]["low"] for place in banded],
                [points[place]["high"] for place in banded],
                color=style.colour,
                alpha=0.16,
                linewidth=0,
            )
            ends.append((means[-1], across[-1], short(labels[name], 22), style))
        # Two seeds have bands that would press the curves flat; those are cut off at the frame.
        seen = [value for points in curves.values() for point in points for value in point["per_seed"].values()]
        ax.set_ylim(*around(seen))
        ax.set_xlim(left=0)
        ax.set_xlabel(words[0])
        ax.set_ylabel(words[1])
        end_labels(ax, ends)
        return drawn(figure, f"Learning curves over {'steps' if by == 'step' else by}")


def end_labels(ax: Axes, ends: Sequence[tuple[float, float, str, Look]]) -> None:
    """Names each curve right of the frame at its end's height, moved apart where they would meet, with its marker."""
    low, high = ax.get_ylim()
    apart = (high - low) * 0.062
    heights: list[float] = []
    ordered = sorted(ends, key=lambda one: one[0])
    for value, *_ in ordered:
        heights.append(value if not heights else max(value, heights[-1] + apart))
    over = max(0.0, heights[-1] - high) if heights else 0.0
    # Pushed down again from the top, as far as they went over it.
    for place in reversed(range(len(heights))):
        limit = high if place == len(heights) - 1 else heights[place + 1] - apart
        heights[place] = min(heights[place], limit) if over else heights[place]
    for (value, across, label, style), height in zip(ordered, heights, strict=True):
        line = ax.get_yaxis_transform()
        ax.plot(1.03, height, style.marker, color=style.colour, markersize=5, transform=line, clip_on=False)
        ax.text(1.055, height, label, transform=line, fontsize=9, va="center")
        ax.annotate(
            "",
            (across, value),
            (1.015, height),
            xycoords="data",
            textcoords=line,
            arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "linestyle": (0, (1, 2))},
            annotation_clip=False,
        )
