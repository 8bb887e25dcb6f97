"""Where the results come from: the command that repeats a run, its recipe, its data, the check's verdicts, versions and machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from align_ti.report.card import name_only
from align_ti.report.folders import Folder, Model, content, folders_of
from align_ti.report.study import machine
from align_ti.runs import RunFolder, read_lines

SKIPPED = 20
"""Skipped records that are named."""

FOLDERS = re.compile(r"(?:[A-Za-z]:)?[\\/](?:[^\s\\/:;,'\"]+[\\/])+")
"""The folders of an absolute path: where things lay is nobody's business on a page."""


def origins_of(models: Sequence[Model]) -> list[dict[str, Any]]:
    """What the part of the page shows, for each folder."""
    found = []
    for folder in folders_of(models):
        trained = [model for model in models if model.folder is folder and model.role == "trained"]
        made = folder.summary.get("provenance") or next(
            (told for model in trained if (told := content(model.run.provenance))), None
        )
        found.append(
            {
                "title": folder.name,
                "command": command(folder, trained),
                # Without the name of a class around its fields.
                "choices": {
                    name: re.sub(r"^\w+\((.*)\)$", r"\1", value) for name, value in (folder.demo or {}).items()
                },
                "seed": folder.summary["seed"],
                "runs": [one for model in trained if (one := told_run(model)) is not None],
                "machine": None if made is None else machine({"runs": len(trained), **made}),
            }
        )
    return found


def command(folder: Folder, trained: Sequence[Model]) -> str | None:
    """The command that makes the folder again; None where its recipe is not kept."""
    if folder.demo is not None:
        steps = folder.summary.get("steps")
        told = [f"--seed {folder.summary['seed']}", *([] if steps is None else [f"--steps {steps}"])]
        split = folder.summary.get("split", "test")
        return " ".join(["align-ti demo --out runs/again", *told, *([] if split == "test" else [f"--split {split}"])])
    if trained and trained[0].run.recipe.exists():
        return f"align-ti train {folder.name}/recipe.yaml --set out=runs/again"
    return None


def told_run(model: Model) -> dict[str, Any] | None:
    """A run's recipe, data and check; None where nothing of it is kept."""
    run = model.run
    check = content(run.check)
    told = {
        "label": model.label,
        "recipe": yaml.safe_dump(name_only(dict(model.recipe)), sort_keys=False, allow_unicode=True)
        if model.recipe
        else "",
        "data": data_of(run),
        "verdicts": [
            {**one, "measured": without_folders(one["measured"]), "expected": without_folders(one["expected"])}
            for one in check.get("verdicts", [])
        ],
    }
    return told if any(told[key] for key in ("recipe", "data", "verdicts")) else None


def data_of(run: RunFolder) -> dict[str, Any]:
    """What became of the training records."""
    told = content(run.data)
    if "used" not in told:
        return {}
    skipped = [without_folders(f"{one.get('place', '')}: {one.get('reason', '')}") for one in read_lines(run.skipped)]
    return {**told, "named": skipped[:SKIPPED], "more": max(0, len(skipped) - SKIPPED)}


def without_folders(text: str) -> str:
    """The text with the names of files alone in place of their paths."""
    return FOLDERS.sub("", text)
