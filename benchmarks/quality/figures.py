"""The figures of docs/quality.md: those of each study's page, as SVG files beside its `study.json`.

python -m benchmarks.quality.figures
"""

from __future__ import annotations

import json
from typing import Any

from align_ti.report.drawing import axes, drawn, look, looks
from align_ti.report.study import study_figures
from benchmarks.quality.tables import RESULTS

SHOWN = ("differences", "kinds", "frontier-seconds", "learning-seconds-digits_validation")
"""The figures that are kept; the page that `align-ti study` writes has all."""


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


def main() -> None:
    alone = RESULTS / "alone.json"
    if alone.exists():
        alone.with_suffix(".svg").write_text(alone_figure(json.loads(alone.read_text("utf-8"))), encoding="utf-8")
    for file in sorted(RESULTS.glob("*/study.json")):
        figures = study_figures(json.loads(file.read_text(encoding="utf-8")))
        for name in SHOWN:
            if name in figures:
                path = file.parent / f"{name}.svg"
                path.write_text(figures[name], encoding="utf-8")
                print(path.relative_to(RESULTS.parent.parent))


if __name__ == "__main__":
    main()
