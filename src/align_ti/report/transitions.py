"""What comes next: along a few answers, the next-token distributions of teacher and student behind tokens that could be said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align_ti.report.drawing import Drawing, picture_of
from align_ti.report.folders import ROLES, Folder, Model, content, shown_picture
from align_ti.report.pictures import Pictures

Told = Mapping[str, Any]


def transitions_of(models: Sequence[Model], folder: Folder, pictures: Pictures) -> dict[str, Any] | None:
    """What the part of the page shows of a folder: teacher, start, and the student trained last; None if there is nothing."""
    told = content(folder.run.transitions)
    if not told.get("answers"):
        return None
    own = {model.name: model.label for model in models if model.folder is folder}
    labels = {name: own.get(name, label) for name, label in folder.summary["labels"].items()}
    measured = told["answers"][0]["steps"][0]["candidates"][0]["probability"]
    names = [name for name in labels if name in measured]
    trained = [name for name in names if name not in ROLES]
    shown = [name for name in names if name in ROLES] + trained[-1:]
    kinds = {name: ROLES.get(name, "after").replace("start", "before") for name in shown}
    return {
        "title": folder.name,
        "models": [
            {
                "name": name,
                "label": labels[name],
                # Beside a bar there is room for a few words.
                "short": "before training" if kinds[name] == "before" else labels[name],
                "kind": kinds[name],
            }
            for name in shown
        ],
        "answers": [answer(folder, one, shown, pictures) for one in told["answers"]],
        "numbers": numbers(told["answers"], {name: labels[name] for name in names}),
        "notes": told.get("notes", []),
    }


def answer(folder: Folder, one: Told, shown: Sequence[str], pictures: Pictures) -> dict[str, Any]:
    """One answer; the step at which most was learnt is open."""
    steps, said = [], ""
    for step in one["steps"]:
        steps.append(
            {"before": said, "token": step["token"], "learnt": learnt(step, shown), "candidates": step["candidates"]}
        )
        said += step["token"]
    most = max(range(len(steps)), key=lambda place: steps[place]["learnt"])
    return {
        "picture": pictures.add(shown_picture(folder, one.get("picture"))),
        "kind": one.get("kind") or "question",
        "question": one["question"],
        "answer": one["answer"],
        "steps": [{**step, "open": place == most} for place, step in enumerate(steps)],
    }


def learnt(step: Told, shown: Sequence[str]) -> float:
    """By how many nats the divergence from the teacher behind the answer's own token has fallen; 0 where it is not known."""
    divergences = [step["candidates"][0]["kl"][name] for name in shown if name in step["candidates"][0]["kl"]]
    return float(divergences[0] - divergences[-1]) if len(divergences) > 1 else 0.0


def numbers(answers: Sequence[Told], labels: Mapping[str, str]) -> Drawing:
    """All probabilities as a table to download."""
    rows = [
        (number, place, one["token"], next_one["token"], *(next_one["probability"].get(name) for name in labels))
        for number, of in enumerate(answers)
        for place, step in enumerate(of["steps"])
        for one in step["candidates"]
        for next_one in one["next"]
    ]
    return picture_of("next-token-distributions", "", ("answer", "step", "candidate", "next", *labels.values()), rows)
