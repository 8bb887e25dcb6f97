"""The pictures of docs/quality.md: those of each study's page, as SVG files beside its `study.json`.

python -m benchmarks.quality.figures
"""

from __future__ import annotations

import json

from align_ti.report.study import study_figures
from benchmarks.quality.tables import RESULTS

SHOWN = ("differences", "kinds", "frontier-seconds", "learning-seconds-digits_validation")
"""The pictures that are kept; the page that `align-ti study` writes has all."""


def main() -> None:
    for file in sorted(RESULTS.glob("*/study.json")):
        figures = study_figures(json.loads(file.read_text(encoding="utf-8")))
        for name in SHOWN:
            if name in figures:
                path = file.parent / f"{name}.svg"
                path.write_text(figures[name], encoding="utf-8")
                print(path.relative_to(RESULTS.parent.parent))


if __name__ == "__main__":
    main()
