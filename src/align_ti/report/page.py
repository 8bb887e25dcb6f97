"""The self-contained HTML page of a run."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from align_ti.phases import phase_names
from align_ti.report import plots
from align_ti.report.tables import benchmark_rows, fidelity_rows
from align_ti.runs import RunFolder, read_json, write_text

EXAMPLES = 12
"""Questions shown with every model's answer."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question as the page shows it: picture as a data URL, answers by model."""

    picture: str | None
    kind: str
    question: str
    expected: str
    answers: list[tuple[str, str, bool]]


def write_report(root: Path) -> Path:
    """Writes `report.html` from what lies in the run folder and returns its path.

    Raises:
        RunError: the folder holds no finished run.
    """
    run = RunFolder(Path(root))
    summary = read_json(run.summary)
    trained = {name: metrics_of(run, name) for name in summary["seconds_per_step"]}
    main = list(trained)[-1]
    costs = {name: value for name, value in summary["seconds_per_step"].items() if value is not None}
    memory = {name: value for name, value in summary["peak_memory_mib"].items() if value is not None}
    figures = {"accuracy": plots.accuracy_bars(summary)} if summary["accuracy"] else {}
    if summary.get("layer_scores"):
        figures["layers"] = plots.layer_curve(summary["layer_scores"], summary["layer"])
    if trained[main]:
        figures["terms"] = plots.term_curves(trained[main])
    if any(line.get("branch_share") is not None for line in trained[main]):
        figures["share"] = plots.share_curve(trained[main])
    if costs:
        figures["seconds"] = plots.cost_bars(costs, summary["labels"], "seconds a step (median)", "Seconds per step")
    if memory:
        figures["memory"] = plots.cost_bars(
            memory, summary["labels"], f"MiB, {summary['memory']}, above the start", "Peak memory"
        )
    phases = phases_of(run, trained)
    if phases:
        figures["phases"] = plots.phase_bars(phases, summary["labels"])
    # Everything from data is escaped; only our own SVG is markup.
    environment = Environment(
        loader=PackageLoader("align_ti.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("page.html.j2").render(
        summary=summary,
        figures={name: Markup(figure) for name, figure in figures.items()},
        main=summary["labels"][main],
        fidelity=fidelity_rows(summary),
        benchmark_rows=benchmark_rows(summary.get("benchmarks", {})),
        phases=phases,
        phase_names=phase_names(phases.values()),
        examples=examples(run, summary),
        provenance=summary.get("provenance") or (read_json(run.provenance) if run.provenance.exists() else None),
    )
    write_text(run.report, page)
    return run.report


def metrics_of(run: RunFolder, name: str) -> list[dict[str, Any]]:
    """The training log of one method: in its own folder below a demo, in the run folder itself otherwise."""
    below = RunFolder(run.root / name)
    return (below if below.metrics.exists() else run).read_metrics()


def phases_of(run: RunFolder, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Where a step's time goes, by method, for those that counted it; found where their logs are."""
    folders = {name: RunFolder(run.root / name) for name in names}
    found = {name: below if below.metrics.exists() else run for name, below in folders.items()}
    return {name: read_json(folder.phases) for name, folder in found.items() if folder.phases.exists()}


def examples(run: RunFolder, summary: dict[str, Any]) -> list[Example]:
    """Questions spread over the evaluation set, as many of each kind as of any other, with every model's answer; none without a set."""
    results = {name: read_json(run.evaluation(name))["answers"] for name in summary["accuracy"]}
    if not results:
        return []
    asked = next(iter(results.values()))
    kinds = list(dict.fromkeys(one["kind"] for one in asked))
    by_kind = {kind: [index for index, one in enumerate(asked) if one["kind"] == kind] for kind in kinds}
    chosen = []
    for turn in range(EXAMPLES):
        of_kind = by_kind[kinds[turn % len(kinds)]]
        # A different picture each time, and not only the first ones.
        chosen.append(of_kind[(turn * 7) % len(of_kind)])
    return [
        Example(
            picture=picture(asked[index].get("image")),
            kind=asked[index]["kind"],
            question=asked[index]["question"].replace("<image>", ""),
            expected=asked[index]["expected"],
            answers=[
                (summary["labels"][name], answers[index]["answer"], answers[index]["right"])
                for name, answers in results.items()
            ],
        )
        for index in dict.fromkeys(chosen)
    ]


def picture(path: str | None) -> str | None:
    """The picture, small, as a data URL; None if the record has none, or the file is gone or no picture.

    It is decoded and encoded anew, so that nothing but pixels gets into the page.
    """
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            return data_url(opened)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def data_url(opened: Image.Image) -> str:
    """The picture, small, as a data URL of its pixels alone."""
    buffer = io.BytesIO()
    small = opened.convert("RGB")
    small.thumbnail((192, 192))
    small.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
