"""Where the models look: the instruction's attention as heat maps over a few images, and the IRS of every layer."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

from align_ti.report.drawing import INK, WIDTH, Drawing, axes, drawn, look, looks, picture_of, short
from align_ti.report.folders import Folder, Model, content, shown_picture
from align_ti.report.pictures import Pictures

HEAT = (222, 72, 0)
"""The colour of attention, over an image without colours."""

Told = Mapping[str, Any]


def looks_of(models: Sequence[Model], folder: Folder, pictures: Pictures) -> dict[str, Any] | None:
    """What the part of the page shows of a folder; None if nothing was measured."""
    told = content(folder.run.looks)
    scored = content(folder.run.layer_scores)
    if not told.get("models") and scored.get("scores") and "teacher" in folder.summary["labels"]:
        told = {"models": {"teacher": scored}, "pictures": []}
    own = {model.name: model.label for model in models if model.folder is folder}
    names = [name for name in folder.summary["labels"] if name in told.get("models", {})]
    if not names:
        return None
    labels = {name: own.get(name, folder.summary["labels"][name]) for name in names}
    return {
        "title": folder.name,
        "curve": curve(folder, told["models"], labels),
        "pictures": [shown(folder, one, told["models"], labels, pictures) for one in told["pictures"]],
        "numbers": numbers(told["pictures"], labels),
        "notes": told.get("notes", []),
    }


def shown(folder: Folder, one: Told, models: Told, labels: Mapping[str, str], pictures: Pictures) -> dict[str, Any]:
    """One image: a row for each model, a cell for each instruction."""
    rows = []
    for name, label in labels.items():
        if name in one["models"]:
            grid, weights = one["models"][name]["grid"], np.array(one["models"][name]["weights"], dtype=float)
            maps = weights.reshape(len(weights), *grid)
            cells = [{"heat": heat(of, float(maps.max())), "words": in_words(of)} for of in maps]
            rows.append({"label": label, "layer": models[name]["layer"], "cells": cells})
    return {
        "picture": pictures.add(shown_picture(folder, one.get("picture"))),
        "instructions": one["instructions"],
        "rows": rows,
    }


def heat(weights: np.ndarray, most: float) -> str:
    """A map of weights as a data URL, a pixel for each visual token: the more weight, the less one sees through it."""
    pixels = np.zeros((*weights.shape, 4), dtype=np.uint8)
    pixels[..., :3] = HEAT
    pixels[..., 3] = np.round(230 * weights / most) if most > 0 else 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def in_words(weights: np.ndarray) -> str:
    """Where most of the attention is, and how much of it: the image's ninth that has most."""
    # By the middle of each cell, so that two rows are top and bottom.
    rows, columns = ((2 * np.arange(size) + 1) * 3 // (2 * size) for size in weights.shape)
    ninths = np.zeros((3, 3))
    np.add.at(ninths, (rows[:, None], columns[None, :]), weights)
    row, column = np.unravel_index(int(ninths.argmax()), (3, 3))
    place = f"{('top', 'middle', 'bottom')[row]} {('left', 'center', 'right')[column]}".replace(
        "middle center", "center"
    )
    return f"{place} {100 * ninths[row, column] / max(ninths.sum(), 1e-12):.0f} %"


def numbers(pictures: Sequence[Told], labels: Mapping[str, str]) -> Drawing:
    """All weights as a table to download."""
    header = ("image", "instruction", "model", "row", "column", "weight")
    rows = [
        (number, text, label, place // columns, place % columns, weight)
        for number, one in enumerate(pictures)
        for name, label in labels.items()
        if name in one["models"]
        for columns in [one["models"][name]["grid"][1]]
        for text, weights in zip(one["instructions"], one["models"][name]["weights"], strict=True)
        for place, weight in enumerate(weights)
    ]
    return picture_of("attention-over-images", "", header, rows)


def curve(folder: Folder, models: Told, labels: Mapping[str, str]) -> Drawing:
    """The IRS of every layer of each model, the chosen layer ringed; the teacher's as it was scored for training, if it was."""
    scored = content(folder.run.layer_scores)
    scores = {name: {int(layer): value for layer, value in models[name]["scores"].items()} for name in labels}
    if "teacher" in scores and scored.get("scores"):
        scores["teacher"] = {int(layer): value for layer, value in scored["scores"].items()}
    with look():
        figure, ax = axes(WIDTH, 3.4)
        for name, style in looks(list(labels)).items():
            across, up, label = list(scores[name]), list(scores[name].values()), short(labels[name], 24)
            ax.plot(
                across,
                up,
                color=style.colour,
                linestyle=style.dash,
                marker=style.marker,
                markersize=5,
                label=label,
            )
            chosen = models[name]["layer"]
            if chosen in scores[name]:
                ax.plot(chosen, scores[name][chosen], "o", markersize=12, markerfacecolor="none", markeredgecolor=INK)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(bottom=0)
        ax.set_xlabel("layer (circled: the layer of the maps)")
        ax.set_ylabel("IRS")
        # Above the frame: with five models no corner of it is sure to be free.
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
        text = drawn(figure, "Instruction-relevance score of every layer of each model")
    rows = [(labels[name], layer, value) for name, of in scores.items() for layer, value in of.items()]
    caption = (
        "IRS (instruction-relevance score): how much a layer's attention over the image changes with the instruction, "
        "from 0 (not at all) to 1."
    )
    return picture_of("layers", text, ("model", "layer", "IRS"), rows, caption)
