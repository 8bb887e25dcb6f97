"""The model card of a finished student: a README with the metadata that model hubs read, from the run's files only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from align_ti.report.folders import scheduled_in, weights_of
from align_ti.report.tables import benchmark_rows, bounds, fidelity_rows
from align_ti.runs import RunFolder, read_json, write_text


def write_card(run: RunFolder, folder: Path) -> Path:
    """Writes the card of a run's student into a folder and returns its path.

    Measurements are in it if the run has a summary, on its own questions, on benchmarks, or on both. Of files and folders only the
    names are.

    Raises:
        RunError: the run has not trained a student.
    """
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    student, teacher = recipe["student"]["path"], (recipe.get("teacher") or {}).get("path")
    provenance = read_json(run.provenance)
    metrics = run.read_metrics()
    summary: dict[str, Any] = read_json(run.summary) if run.summary.exists() else {}
    measured, benchmarks = leaves(recipe["data"].get("eval")), summary.get("benchmarks", {})
    scores = own_scores(summary, measured) | benchmarks.get("student", {})
    asked = [*measured, *(recipe.get("evaluation") or {}).get("tasks", ())]
    environment = Environment(
        loader=PackageLoader("align_ti.report", ""), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    environment.filters |= {"code": code, "block": block, "one_line": one_line}
    text = environment.get_template("card.md.j2").render(
        front=front_matter(student, teacher, provenance["versions"]["align-ti"], scores),
        title=f"{one_line(name_only(student))}, distilled",
        student=name_only(student),
        teacher=name_only(teacher),
        summary=summary,
        measured=measured,
        accuracy=summary.get("accuracy", {}),
        fidelity=fidelity_rows(summary),
        benchmarks=benchmarks,
        benchmark_rows=benchmark_rows(benchmarks),
        asked=asked,
        data=leaves(recipe["data"]["train"]),
        training=read_json(run.training),
        terms=weights_of(recipe["objective"]),
        scheduled=scheduled_in(recipe["objective"]),
        last=metrics[-1] if metrics else {},
        recipe=yaml.safe_dump(name_only(recipe), sort_keys=False, allow_unicode=True),
        provenance=provenance,
    )
    path = folder / "README.md"
    write_text(path, text)
    return path


def front_matter(student: str, teacher: str | None, version: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The metadata as YAML. A base model is named to hubs only where it is a hub's: a folder's name would point at somebody else's."""
    index = model_index(f"{name_only(student)}, distilled", scores)
    content: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({} if is_local(student) else {"base_model": student}),
        "tags": ["knowledge-distillation", "vision-language-model", "align-ti"],
        "align_ti": {"version": version, "student": name_only(student), "teacher": name_only(teacher)},
        **({"model-index": index} if index else {}),
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def own_scores(summary: Mapping[str, Any], measured: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The student's exact match on the recipe's own questions, overall and by kind, in the form of `model_index`."""
    if "student" not in summary.get("accuracy", {}):
        return {}
    accuracy, interval = summary["accuracy"]["student"], summary["interval_95"]["student"]
    title = ", ".join(measured) or "held-out questions"
    return {
        f"{slug(title)}/{kind}": {
            "dataset": slug(title),
            "title": title,
            "metric": "exact_match",
            "of": kind,
            "value": accuracy[kind],
            "low": interval[kind][0],
            "high": interval[kind][1],
            "questions": questions,
        }
        for kind, questions in summary["questions_by_kind"].items()
    }


def model_index(name: str, scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores in the form that model hubs read from a card's metadata (`model-index`); nothing without scores.

    Args:
        name: the model's.
        scores: by a name: `title`, `metric`, `value`, `low` and `high` (the ends of the 95 % interval; None where unknown). Also taken:
            `dataset`, by which scores are grouped (by default the score's own name), `of` (the part that was scored) and `questions`.
    """
    results: dict[str, dict[str, Any]] = {}
    for key, score in scores.items():
        dataset = score.get("dataset", key)
        result = results.setdefault(
            dataset,
            {
                "task": {"type": "image-text-to-text", "name": "Visual question answering"},
                "dataset": {"type": dataset, "name": score["title"]},
                "metrics": [],
            },
        )
        what = " ".join([score["metric"].replace("_", " "), *([f"({score['of']})"] if "of" in score else [])])
        result["metrics"].append(
            {
                "type": score["metric"],
                "value": score["value"],
                # Hubs show name and value alone.
                "name": f"{what}, 95 % interval {bounds(score, '%')}",
                "args": {
                    **({} if None in (score["low"], score["high"]) else {"interval_95": [score["low"], score["high"]]}),
                    **({"questions": score["questions"]} if "questions" in score else {}),
                },
            }
        )
    return [{"name": name, "results": list(results.values())}] if results else []


def slug(text: str) -> str:
    """The text in lower case with a hyphen for all that is neither letter nor digit, as hubs name datasets."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "questions"


def is_local(name: str) -> bool:
    """Whether the name is of a file or folder rather than a hub's."""
    if Path(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith((".", "~")):
        return True
    try:
        return Path(name).exists()
    except OSError:  # longer than a file's name can be
        return False


def name_only(value: Any) -> Any:
    """The same content with the last part of every path in it; hub names stay whole."""
    if isinstance(value, dict):
        return {key: name_only(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [name_only(inner) for inner in value]
    return leaf(value) if isinstance(value, str) and is_local(value) else value


def leaf(path: str) -> str:
    """The last part of a path, whichever way its slashes lean."""
    return PureWindowsPath(path).name or "folder"


def leaves(value: Any) -> list[str]:
    """The names of all files that a recipe's entry holds, however deep."""
    if isinstance(value, dict):
        return [name for inner in value.values() for name in leaves(inner)]
    if isinstance(value, list):
        return [name for inner in value for name in leaves(inner)]
    return [name_only(value)] if isinstance(value, str) else []


def one_line(text: str) -> str:
    """Text for a heading: one line, nothing that Markdown or HTML reads as more."""
    return re.sub(r"([\\`*_\[\]<>#|&])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """The text as inline code that no character of it can leave, in a table either."""
    flat = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", flat)), default=0) + 1)
    pad = " " if "`" in flat else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def block(text: str, language: str) -> str:
    """The text as a fenced block that no line of it can close."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}{fence}"
