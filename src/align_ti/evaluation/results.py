"""Scores in a file, with all that intervals and paired tests need; one file for one model on one benchmark. Imports no torch.

    scored(benchmark, report, model, questions, title="")  -> what the file holds, as JSON's types
    write_scores(path, content)                            -> writes it whole; a path ends in `scores.json` (`pope.scores.json`)
    read_scores(path)                                      -> {benchmark: Scores} of a file, or of a folder of such files

A file holds each metric's sums over clusters (a few numbers a cluster), and names the function that makes the score of them. So the
function has to be a named one of `align_ti.evaluation` whose last argument is called `sums`; what comes before is bound by
`functools.partial` to numbers or words. A file is data: it can name these functions and nothing else.

`read_scores` also reads what `align-ti evaluate MODEL DATA --out` and a run's `evaluation-*.json` hold (`answers`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from os.path import commonpath
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.base import Report
from align_ti.evaluation.metrics import Metric, Value, mean_of
from align_ti.evaluation.statistics import interval, told
from align_ti.runs import write_text

FORMAT = "align-ti scores 1"
"""What a file of scores calls itself."""

EXACT_MATCH = "exact match"
"""The benchmark that answers to a user's own records count as; a digest of the questions tells one set of records from another."""

NAMED = re.compile(r"align_ti\.evaluation\.(?:metrics|(?:benchmarks|scoring)\.[a-z][a-z_0-9]*):([a-z][a-z_0-9]*)")
"""A function that a file may name: public, and in a part that only computes."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one model on one benchmark, as a file tells them."""

    benchmark: str
    title: str
    """The benchmark's name for people."""
    headline: str
    """The metric that tables show."""
    metrics: Mapping[str, Metric]
    notes: Sequence[str]
    model: str
    questions: str
    """A digest of what was asked, and how it is scored; only scores with equal ones are compared."""
    path: Path
    """The file."""


# --- written ----------------------------------------------------------------------------------------------------------


def scored(benchmark: str, report: Report, model: str, questions: str, title: str = "") -> dict[str, Any]:
    """What a file of scores holds: each metric with its 95 % interval, and the sums and clusters that comparisons need.

    Args:
        benchmark: its name on the command line.
        report: the scores.
        model: the model's name for people.
        questions: a digest of what was asked, and how it is scored; only scores with equal ones are compared.
        title: the benchmark's name for people; its name if empty.

    Raises:
        ValueError: a metric's function cannot be named in a file.
    """
    lists = list(dict.fromkeys(metric.clusters for metric in report.metrics.values()))
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        "title": title or benchmark,
        "model": model,
        "questions": questions,
        "headline": report.headline,
        "metrics": {
            name: {
                **told(interval(metric)),
                "unit": metric.unit,
                "function": name_of(metric.value),
                "cluster_list": lists.index(metric.clusters),
                "sums": [[short(number) for number in row] for row in metric.sums.tolist()],
            }
            for name, metric in report.metrics.items()
        },
        "notes": list(report.notes),
        # Metrics mostly share their clusters, so a list is written once.
        "cluster_lists": [list(names) for names in lists],
    }


def write_scores(path: Path, content: Mapping[str, Any]) -> None:
    """Write scores whole, a line for each metric.

    Raises:
        ValueError: the name does not end in `scores.json`, by which a folder's scores are found.
    """
    if not is_named_scores(path):
        raise ValueError(f"{path}: `scores.json`, or a name that ends in `.scores.json`, is accepted.")
    parts = {name: json.dumps(part, ensure_ascii=False) for name, part in content.items() if name != "metrics"}
    rows = (f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(one)}" for name, one in content["metrics"].items())
    parts["metrics"] = "{\n    " + ",\n    ".join(rows) + "\n  }"
    write_text(path, "{\n  " + ",\n  ".join(f'"{name}": {parts[name]}' for name in content) + "\n}\n")


def is_named_scores(path: Path) -> bool:
    """Whether a file's name says that it holds scores."""
    return path.name == "scores.json" or path.name.endswith(".scores.json")


def short(number: float) -> float | int:
    """The number, as a whole one where it is, which is what most counts are."""
    return int(number) if number.is_integer() else number


def name_of(value: Value) -> list[Any]:
    """The function of a metric by name, then what it is bound to.

    Raises:
        ValueError: it is none that a file may name.
    """
    function, bound, named = (value.func, value.args, value.keywords) if isinstance(value, partial) else (value, (), {})
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    if (
        named
        or not all(is_plain(one) or (isinstance(one, tuple) and all(map(is_plain, one))) for one in bound)
        or named_function(name, len(bound)) is None
    ):
        raise ValueError(
            f"the metric's value is {name} with {bound} and {named}; a function in align_ti.evaluation (metrics, benchmarks, scoring), "
            "the last argument `sums`, bound to numbers, words or tuples of them by their order, is accepted, since a file names it."
        )
    return [name, *bound]


def is_plain(value: Any) -> bool:
    """Whether a value is a number or a word, which a file can hold."""
    return isinstance(value, (int, float, str))


def named_function(name: str, bound: int) -> Any:
    """The function that a file names, or None if it is none of sums with so many arguments before them."""
    match = NAMED.fullmatch(name)
    if match is None:
        return None
    try:
        found = getattr(import_module(name.partition(":")[0]), match[1], None)
    except ImportError:
        return None
    # What a module imports from elsewhere is not its own.
    if not isinstance(found, FunctionType) or inspect.unwrap(found).__module__ != name.partition(":")[0]:
        return None
    arguments = list(inspect.signature(found).parameters)
    return found if arguments[-1:] == ["sums"] and len(arguments) == bound + 1 else None


# --- read -------------------------------------------------------------------------------------------------------------


def read_scores(path: Path) -> dict[str, Scores]:
    """The scores in a file by benchmark; of a folder, those of its files and of its folders' files.

    A folder is one model's. In a run folder the trained student's answers count too.

    Raises:
        DataError: nothing is found, a file is damaged or of another version, or two files are of one benchmark.
    """
    files = [path] if not path.is_dir() else score_files(path)
    found: dict[str, Scores] = {}
    for scores in (scores for file in files for scores in scores_in(file)):
        if scores.benchmark in found:
            raise DataError(
                f"{path}: {found[scores.benchmark].path} and {scores.path} are both scores on {scores.benchmark!r}; one file "
                "for each is accepted in a folder; name one of the files instead."
            )
        found[scores.benchmark] = scores
    if not found:
        raise DataError(
            f"{path}: no scores found; a file that `align-ti evaluate --out` or `align-ti score` wrote, a folder with files named "
            "scores.json or *.scores.json, or a run folder with evaluation-student.json is accepted."
        )
    return found


def score_files(folder: Path) -> list[Path]:
    """The files of scores in a folder and in its folders, then the student's answers of a run."""
    named = [
        file for pattern in ("*.json", "*/*.json") for file in sorted(folder.glob(pattern)) if is_named_scores(file)
    ]
    return [*named, *folder.glob("evaluation-student.json")]


def evaluations(folder: Path) -> list[Path]:
    """The files of answers in a run folder, one a model."""
    return sorted(folder.glob("evaluation-*.json"))


def scores_in(path: Path) -> list[Scores]:
    """The scores in a file: of one benchmark; or of answers, with the fidelity to a teacher if it was measured.

    Raises:
        DataError: it cannot be read, or is neither.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the name.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({error}); write it again by `align-ti evaluate` or `align-ti score`."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("answers"), list):
        found = [of_answers(path, content["answers"])]
        faithful = content.get("fidelity")
        if isinstance(faithful, dict) and "scores" in faithful:
            found.append(of_content(path, faithful["scores"]))
        return found
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        called = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path}: found {called!r} where a file of scores says {FORMAT!r}; files that `align-ti evaluate --out` and "
            "`align-ti score` write are accepted; score the predictions again by this version."
        )
    return [of_content(path, content)]


def of_content(path: Path, content: Mapping[str, Any]) -> Scores:
    """The scores that a file holds.

    Raises:
        DataError: something is missing, or a score does not come out of its sums.
    """
    try:
        lists = [tuple(str(name) for name in names) for names in content["cluster_lists"]]
        metrics = {str(name): metric_of(told_of, lists) for name, told_of in content["metrics"].items()}
        scores = Scores(
            benchmark=str(content["benchmark"]),
            title=str(content["title"]),
            headline=str(content["headline"]),
            metrics=metrics,
            notes=tuple(str(note) for note in content["notes"]),
            model=str(content["model"]),
            questions=str(content["questions"]),
            path=path,
        )
        if scores.headline not in metrics:
            raise ValueError(f"the headline {scores.headline!r} is none of the metrics {', '.join(metrics)}")
        for name, metric in metrics.items():
            if not np.isclose(metric.score, float(content["metrics"][name]["value"]), rtol=1e-6, atol=1e-6):
                raise ValueError(f"{name} is {content['metrics'][name]['value']}, but its sums give {metric.score:g}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{path}: damaged or of another version ({reason}); score the predictions again by `align-ti score`."
        ) from error
    return scores


def metric_of(told_of: Mapping[str, Any], lists: Sequence[tuple[str, ...]]) -> Metric:
    """A metric as a file tells it.

    Raises:
        ValueError: its sums do not fit its clusters, or its function is none that a file may name.
    """
    name, *held = told_of["function"]
    bound = [tuple(one) if isinstance(one, list) else one for one in held]
    function = named_function(name, len(bound)) if isinstance(name, str) else None
    if function is None:
        raise ValueError(f"the function {name!r} with {len(bound)} arguments before the sums is not known")
    names, sums = lists[told_of["cluster_list"]], np.array(told_of["sums"], dtype=float)
    if sums.ndim != 2 or len(sums) != len(names) or len(set(names)) != len(names) or not np.isfinite(sums).all():
        raise ValueError(f"sums of shape {sums.shape} for {len(set(names))} clusters")
    return Metric(sums, partial(function, *bound) if bound else function, names, str(told_of["unit"]))


def of_answers(path: Path, answers: Sequence[Any]) -> Scores:
    """Exact match, overall and by kind, from a file of answers.

    Raises:
        DataError: an answer does not say whether it is right, or there is none.
    """
    asked = []
    for number, one in enumerate(answers):
        if not isinstance(one, dict) or not isinstance(one.get("right"), bool) or "question" not in one:
            raise DataError(
                f"{path}, answer {number}: no `question` and `right` (true or false) found; write the file again by "
                "`align-ti evaluate`."
            )
        asked.append(one)
    if not asked:
        raise DataError(f"{path}: no answers; a file with at least one is accepted.")
    pictures = without_common_folder([one.get("image") for one in asked])
    # Of an image inside a table its name in the file is a digest.
    pictures = [picture or str(one.get("picture", "")) for picture, one in zip(pictures, asked, strict=True)]
    told_of = [
        [one["question"], one.get("expected"), one.get("kind"), picture]
        for one, picture in zip(asked, pictures, strict=True)
    ]
    # A record without an image is a cluster of its own.
    clusters = [picture or f"record {number}" for number, picture in enumerate(pictures)]
    metrics = {"overall": mean_of([float(one["right"]) for one in asked], clusters)}
    for kind in dict.fromkeys(str(one.get("kind") or "") for one in asked):
        if kind:
            chosen = [index for index, one in enumerate(asked) if one.get("kind") == kind]
            metrics[kind] = mean_of([float(asked[i]["right"]) for i in chosen], [clusters[i] for i in chosen])
    return Scores(
        benchmark=EXACT_MATCH,
        title="exact match on own questions",
        headline="overall",
        metrics=metrics,
        notes=(),
        model=path.stem.removeprefix("evaluation-"),
        questions=hashlib.sha256(json.dumps(told_of, ensure_ascii=False).encode()).hexdigest()[:32],
        path=path,
    )


def without_common_folder(paths: Sequence[str | None]) -> list[str]:
    """The images' paths from the folder that all lie in, so that they are the same wherever the data lie; empty for no image."""
    given = [str(path) for path in paths if path]
    try:
        start = commonpath([str(Path(path).parent) for path in given]) if given else ""
    except ValueError:  # relative and absolute paths in one file
        start = ""
    return ["" if not path else Path(path).relative_to(start).as_posix() if start else str(path) for path in paths]
