"""The figures of docs/quality.md and docs/quality-studies.md: those of each study's page, as SVG files beside its `study.json`.

python -m benchmarks.quality.figures
"""

from __future__ import annotations

import json
from typing import Any

from align_ti.report.drawing import SOFT, axes, drawn, look, looks
from align_ti.report.study import study_figures
from benchmarks.quality.tables import RESULTS, shown

SHOWN = ("differences", "kinds", "frontier-seconds", "learning-seconds-digits_validation")
"""The figures that are kept; the page that `align-ti study` writes has all."""


METHODS = {"sft": "SFT", "kd": "SFT + vanilla KD", "align_ti": "Align-TI"}
"""The methods of the summary's figure, as its legend has them."""

NAMES = {"adamw": "AdamW", "muon": "Muon"}
"""The optimizers of `alone.json`, as the legend has them."""


def told(run: dict[str, Any]) -> str:
    """What distinguishes a run of `alone.json` from the others."""
    optimizer, rate = NAMES[run["optimizer"]], run["learning_rate"]
    return f"{run['kind']}, {optimizer}, rate {rate:g}, {run['steps']} steps, seed {run['seed']}"


def alone_figure(content: dict[str, Any]) -> str:
    """Accuracy along the training on one kind of question alone, a line for each run of `alone.json`."""
    with look():
        figure, plot = axes(8.4, 2.8)
        names = {told(one): one["curve"] for one in content["runs"]}
        for (name, curve), line in zip(names.items(), looks(list(names)).values(), strict=True):
            steps, values = [one["step"] for one in curve], [one["accuracy"] for one in curve]
            plot.plot(steps, values, color=line.colour, linestyle=line.dash, marker=line.marker, label=name)
        plot.set(xlabel="training step (32 questions each)", ylabel="accuracy, %", ylim=(0, 102))
        plot.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return drawn(figure, "accuracy along the training on one kind of question alone")


def summary_figure(studies: dict[str, dict[str, Any]]) -> str:
    """The accuracy of SFT, vanilla KD and Align-TI in each training that all three were studied in, with intervals; the teacher's
    as a line.

    Args:
        studies: the content of each `study.json`, by study.
    """
    lines = shown()
    with look():
        figure, plot = axes(8.4, 0.9 + 0.42 * len(lines))
        for shift, (name, style) in zip((-0.22, 0.0, 0.22), looks(list(METHODS)).items(), strict=True):
            for place, (_, study, end) in enumerate(lines):
                found = studies[study]["variants"][name + end]["accuracy"]
                plot.plot([found["low"], found["high"]], [place + shift] * 2, color=style.colour, linewidth=1.6)
                label = METHODS[name] if place == 0 else None
                plot.plot(
                    found["mean"],
                    place + shift,
                    style.marker,
                    color=style.colour,
                    markersize=6,
                    label=label,
                    linestyle="",
                )
        teacher = studies[lines[0][1]]["teacher"]["value"]
        plot.axvline(teacher, color=SOFT, linewidth=1.2)
        plot.annotate(
            "teacher",
            (teacher, -0.6),
            (-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=SOFT,
            fontsize=9,
        )
        plot.set_yticks(range(len(lines)), [label for label, _, _ in lines])
        plot.set_ylim(len(lines) - 0.5, -0.9)
        plot.set(xlabel="exact match on test, %; lines: 95 % intervals")
        plot.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        return drawn(figure, "accuracy of SFT, vanilla KD and Align-TI in each training")


def main() -> None:
    alone = RESULTS / "alone.json"
    if alone.exists():
        alone.with_suffix(".svg").write_text(alone_figure(json.loads(alone.read_text("utf-8"))), encoding="utf-8")
    studies = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*/study.json"))
    }
    (RESULTS / "summary.svg").write_text(summary_figure(studies), encoding="utf-8")
    for study, content in studies.items():
        figures = study_figures(content)
        for name in SHOWN:
            if name in figures:
                path = RESULTS / study / f"{name}.svg"
                path.write_text(figures[name], encoding="utf-8")
                print(path.relative_to(RESULTS.parent.parent))


if __name__ == "__main__":
    main()
