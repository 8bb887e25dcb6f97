"""The field's benchmarks, a file each: where its files are, how it asks, how it scores. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module

from align_ti.errors import ConfigError, DataError
from align_ti.evaluation.benchmarks.base import Benchmark, Report

BENCHMARKS: Mapping[str, str] = {
    "gqa": "align_ti.evaluation.benchmarks.gqa:Gqa",
    "sqa": "align_ti.evaluation.benchmarks.scienceqa:ScienceQa",
    "textvqa": "align_ti.evaluation.benchmarks.textvqa:TextVqa",
    "pope": "align_ti.evaluation.benchmarks.pope:Pope",
    "mme": "align_ti.evaluation.benchmarks.mme:Mme",
    "mmbench": "align_ti.evaluation.benchmarks.mmbench:MmBench",
    "digits": "align_ti.evaluation.benchmarks.digits:Digits",
    "digits_validation": "align_ti.evaluation.benchmarks.digits:DigitsValidation",
    "own": "align_ti.evaluation.benchmarks.own:Own",
}
"""Where each benchmark's class is: module:class."""

PAPER = ("gqa", "sqa", "textvqa", "pope", "mme", "mmbench")
"""The columns of the paper's table, in its order."""


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name; its module is imported now. `own:SCORER` is one's own with a scorer for every question.

    Raises:
        ConfigError: there is none of that name.
    """
    plain, _, option = name.partition(":")
    if plain not in BENCHMARKS or (option and plain != "own"):
        close = difflib.get_close_matches(plain.lower(), BENCHMARKS, n=2, cutoff=0.5)
        meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ConfigError(f"no benchmark is named {name!r}; accepted: {', '.join(BENCHMARKS)}{meant}")
    module, _, cls = BENCHMARKS[plain].partition(":")
    made: type[Benchmark] = getattr(import_module(module), cls)
    return made(option) if option else made()  # type: ignore[call-arg]


def paper_row(reports: Mapping[str, Report]) -> dict[str, float]:
    """The row of the paper's table: the six headlines in its order and their mean under `mean`; MME counts as perception / 20.

    Args:
        reports: by the benchmarks' names; others than the six are passed over.

    Raises:
        DataError: one of the six is missing.
    """
    missing = [name for name in PAPER if name not in reports]
    if missing:
        raise DataError(
            f"the paper's row needs {', '.join(PAPER)}; found no score of {', '.join(missing)}; score them too."
        )
    row = {name: reports[name].metrics[reports[name].headline].score for name in PAPER}
    return row | {"mean": sum(row.values()) / len(row)}
