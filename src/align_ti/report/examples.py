"""Examples: questions with every model's answer side by side, which the page's script filters and searches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align_ti.report.folders import Model
from align_ti.report.pictures import Pictures

EXAMPLES = 200
"""Questions on a page at most."""


def examples_of(models: Sequence[Model], pictures: Pictures) -> dict[str, Any] | None:
    """What the part of the page shows; None if no answers are kept.

    Of more than `EXAMPLES` questions, as many of each kind and of each pattern of right and wrong as of any other, so that rare ones
    are there too.
    """
    answered = same_questions(models)
    if not answered:
        return None
    asked = answered[0].answers
    right = [tuple(bool(model.answers[index]["right"]) for model in answered) for index in range(len(asked))]
    chosen = spread([(str(one["kind"]), pattern) for one, pattern in zip(asked, right, strict=True)], EXAMPLES)
    teacher, before, after = (of_role(answered, role) for role in ("teacher", "start", "trained"))
    chosen.sort(key=lambda index: (-interest(right[index], answered, before, after), index))
    return {
        "models": answered,
        "kinds": list(dict.fromkeys(str(one["kind"]) for one in asked if one["kind"])),
        "choices": choices(answered, teacher, before, after),
        "all": len(asked),
        "examples": [
            {
                "picture": pictures.add(asked[index].get("image")),
                "kind": str(asked[index]["kind"] or ""),
                "question": asked[index]["question"].replace("<image>", "").strip(),
                "expected": asked[index]["expected"],
                "right": " ".join(model.key for model, hit in zip(answered, right[index], strict=True) if hit),
                "answers": [
                    {"label": model.label, "text": model.answers[index]["answer"], "right": hit}
                    for model, hit in zip(answered, right[index], strict=True)
                ],
            }
            for index in chosen
        ],
    }


def same_questions(models: Sequence[Model]) -> list[Model]:
    """The models that answered the same questions: the largest group of them, the first if there are several."""
    groups: dict[tuple[tuple[Any, ...], ...], list[Model]] = {}
    for model in models:
        if model.answers:
            asked = tuple((one["question"], one.get("expected"), one.get("image")) for one in model.answers)
            groups.setdefault(asked, []).append(model)
    return max(groups.values(), key=len, default=[])


def of_role(models: Sequence[Model], role: str) -> Model | None:
    """The last model of a role."""
    return next((model for model in reversed(models) if model.role == role), None)


def spread(groups: Sequence[tuple[str, tuple[bool, ...]]], most: int) -> list[int]:
    """The numbers of at most so many items, as many of each group as of any other while there are some, in their own order."""
    if len(groups) <= most:
        return list(range(len(groups)))
    by_group: dict[tuple[str, tuple[bool, ...]], list[int]] = {}
    for index, group in enumerate(groups):
        by_group.setdefault(group, []).append(index)
    chosen: list[int] = []
    for turn in range(max(map(len, by_group.values()))):
        chosen += [of[turn] for of in by_group.values() if turn < len(of)]
    return sorted(chosen[:most])


def interest(right: Sequence[bool], models: Sequence[Model], before: Model | None, after: Model | None) -> int:
    """How much a reader learns from an example: what was learnt first, then what was lost, then where models differ."""
    hits = {model.key: hit for model, hit in zip(models, right, strict=True)}
    if before is not None and after is not None and hits[before.key] != hits[after.key]:
        return 3 if hits[after.key] else 2
    return int(len(set(right)) > 1)


def choices(
    models: Sequence[Model], teacher: Model | None, before: Model | None, after: Model | None
) -> list[tuple[str, str]]:
    """Who is right: each choice's rule for the script (+KEY: right, -KEY: wrong), and its words."""
    found: list[tuple[str, str]] = []
    if before is not None and after is not None:
        found.append(
            (f"+{after.key} -{before.key}", f"corrected by training: {before.label} wrong, {after.label} correct")
        )
        found.append(
            (f"-{after.key} +{before.key}", f"made wrong by training: {before.label} correct, {after.label} wrong")
        )
    if teacher is not None and after is not None:
        found.append((f"+{teacher.key} -{after.key}", f"{teacher.label} correct, {after.label} wrong"))
        found.append((f"-{teacher.key} +{after.key}", f"{teacher.label} wrong, {after.label} correct"))
    keys = [model.key for model in models]
    found.append((" ".join(f"+{key}" for key in keys), "all correct"))
    found.append((" ".join(f"-{key}" for key in keys), "all wrong"))
    for model in models:
        found += [(f"+{model.key}", f"{model.label} correct"), (f"-{model.key}", f"{model.label} wrong")]
    return found
