"""The README's Python session runs as written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import align_ti
from align_ti.digits.files import Sizes, write_benchmark

README = Path(__file__).parent.parent / "README.md"


def test_the_ten_lines_of_python_run_and_print_every_term(tmp_path):
    (session,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in session.splitlines() if line.strip()]) <= 11
    write_benchmark(tmp_path / "digits", sizes=Sizes(train=2, validation=1, test=1))
    done = subprocess.run(
        [sys.executable, "-c", session],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert all(f"'{term}'" in done.stdout for term in ("sft", "kd", "iva", "tpa"))


def test_the_readme_is_short_and_its_table_is_of_five_seeds_or_more():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    study = json.loads((README.parent / "results" / "quality" / "muon" / "study.json").read_text())
    assert "<!-- table: muon-methods -->" in lines  # tests/test_performance_page.py holds it to the study
    assert all(len(one["per_seed"]) >= 5 for one in study["variants"].values())


def test_every_public_name_can_be_imported():
    assert {"Objective", "Sft", "Kd", "Iva", "Tpa", "distillation_loss", "score_layers", "AlignTITrainer"} <= set(
        align_ti.__all__
    )
    for name in align_ti.__all__:
        assert getattr(align_ti, name) is not None
