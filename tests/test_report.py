"""The page is self-contained, escaped, and a pure function of the run folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from align_ti.errors import RunError
from align_ti.report.page import write_report

KINDS = {"overall": 4, "digit": 2, "colour": 2}


def run_folder(root: Path, **changes: object) -> Path:
    """A finished run with words that are dangerous in HTML."""
    names = {"teacher": "teacher", "align_ti": "Align-TI <b>"}
    summary = {
        "title": "A <script>alert(1)</script> title",
        "seed": 3,
        "labels": names,
        "questions": 4,
        "accuracy": {name: dict.fromkeys(KINDS, 50.0) for name in names},
        "interval_95": {name: {kind: [40.0, 60.0] for kind in KINDS} for name in names},
        "questions_by_kind": KINDS,
        "cut_answers": dict.fromkeys(names, 0),
        "divergence_nats": {"align_ti": 0.5},
        "seconds_per_step": {"align_ti": 0.1},
        "peak_memory_mib": {"align_ti": 120.0},
        "memory": "resident",
        "layer": 1,
        "layer_scores": {"0": 0.1, "1": 0.2},
        **changes,
    }
    (root / "summary.json").write_text(json.dumps(summary))
    Image.new("RGB", (8, 8)).save(root / "a.png")
    (root / "secret.png").write_text("a private file that an answer names as its picture")
    answers = [
        {
            "kind": kind,
            "image": str(root / "a.png"),
            "question": "<image><i>Q</i>?",
            "expected": "A",
            "answer": "<img src=x>",
            "right": False,
        }
        for kind in ("digit", "colour", "digit", "colour")
    ]
    for name in names:
        (root / f"evaluation-{name}.json").write_text(json.dumps({"answers": answers}))
    (root / "align_ti").mkdir(exist_ok=True)
    lines = [{"step": step, "loss": 1.0, "sft": 1.0, "tpa": 0.5 / step, "branch_share": 0.5} for step in (1, 2, 2, 3)]
    (root / "align_ti" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_what_comes_from_data_is_escaped(tmp_path):
    page = write_report(run_folder(tmp_path)).read_text()
    assert "<script" not in page
    assert "<img src=x>" not in page
    assert "&lt;i&gt;Q&lt;/i&gt;?" in page
    assert "Align-TI &lt;b&gt;" in page
    # Names reach the plots too, where matplotlib escapes them.
    assert not re.search(r"Align-TI <b>", page)


def test_benchmarks_stand_on_the_page_with_their_intervals(tmp_path):
    one = {"title": "POPE", "metric": "f1", "value": 81.26, "low": 79.0, "high": 83.5, "questions": 24}
    told = {"pope": {**one, "notes": ["<b>2</b> missing"]}, "own": {**one, "low": None, "high": None, "notes": []}}
    page = write_report(run_folder(tmp_path, benchmarks={"align_ti": told})).read_text()
    assert page.count("81.3") == 2 and page.count("79.0 to 83.5") == page.count("interval unknown") == 1
    assert "f1, 24 questions" in page and "&lt;b&gt;2&lt;/b&gt; missing" in page
    assert "By their own protocols" not in write_report(run_folder(tmp_path)).read_text()


def test_fidelity_stands_on_the_page_with_its_intervals(tmp_path):
    # Only the KL on right answers did, without its interval.
    measures = {
        "response_kl": {"value": 0.51234, "low": 0.4, "high": 0.6, "unit": "nats"},
        "own_agreement": {"value": 61.26, "low": None, "high": None, "unit": "%"},
    }
    own = {"align_ti": measures, "start": {"response_kl": measures["response_kl"]}}
    labels = {"teacher": "teacher", "align_ti": "Align-TI", "start": "before"}
    notes = {"align_ti": ["<b>visual_kl</b> could not be measured"]}
    page = write_report(run_folder(tmp_path, fidelity=own, fidelity_notes=notes, labels=labels)).read_text()
    for told in ("0.5123", "0.4000 to 0.6000", "KL, response tokens (nats)"):
        assert told in page
    row = next(line for line in page.splitlines() if line.startswith("<tr><td>before") and "0.5123" in line)
    assert "61.3" in page and "interval unknown" in page and row.count("<td>") == 3 and "61.3" not in row
    assert "&lt;b&gt;visual_kl&lt;/b&gt; could not" in page and "KL from teacher" not in page


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = write_report(run_folder(tmp_path)).read_text()
    outside = [url for url in re.findall(r'(?:src|href)="([^"]*)"', page) if not url.startswith(("data:", "#"))]
    assert not outside
    assert page.count("<svg") == 6
    assert "data:image/png;base64," in page


def test_only_pixels_get_into_the_page(tmp_path):
    root = run_folder(tmp_path)
    for path in root.glob("evaluation-*.json"):
        path.write_text(path.read_text().replace("a.png", "secret.png"))
    assert "data:image" not in write_report(root).read_text()


def test_half_a_line_of_metrics_does_no_harm(tmp_path):
    with (run_folder(tmp_path) / "align_ti" / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 4, "lo')
    assert write_report(tmp_path).is_file()


def test_the_same_folder_gives_the_same_page(tmp_path):
    first = write_report(run_folder(tmp_path)).read_text()
    assert write_report(tmp_path).read_text() == first


def test_what_was_not_measured_is_a_dash_not_a_zero(tmp_path):
    page = write_report(
        run_folder(tmp_path, peak_memory_mib={"align_ti": None}, seconds_per_step={"align_ti": None})
    ).read_text()
    assert page.count("<svg") == 4
    assert "None" not in page


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="finish the run first"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{broken")
    with pytest.raises(RunError, match="not valid JSON"):
        write_report(tmp_path)


def test_the_report_imports_no_torch():
    code = "import align_ti.report.page, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
