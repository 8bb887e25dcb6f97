"""The page is self-contained, escaped, and a pure function of the run folder."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from align_ti.errors import RunError
from align_ti.report.drawing import Drawing
from align_ti.report.examples import spread
from align_ti.report.folders import distinct_names
from align_ti.report.numbers import DASH, MINUS
from align_ti.report.page import inline_script, write_report
from tests.study_content import study_content

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
    (root / "secret.png").write_text("a private file that an answer names as its image")
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


ANSWERS = {"teacher": (1, 1, 1, 1), "start": (0, 0, 1, 0), "sft": (1, 0, 1, 0), "align_ti": (1, 1, 1, 0)}
"""Who is right, question by question."""


def compared_folder(root: Path, right: dict[str, tuple[int, ...]] | None = None, pictures: int = 10) -> Path:
    """A demo of four models, of which each question is about an image of its own; the pattern of answers comes again and again."""
    root.mkdir(parents=True, exist_ok=True)
    names = {"teacher": "teacher", "start": "start", "sft": "SFT", "align_ti": "Align-TI"}
    share = {name: 25.0 * sum(of) for name, of in (right or ANSWERS).items()}
    kinds = {"overall": 4 * pictures, "digit": 2 * pictures, "colour": 2 * pictures}
    trained = ("sft", "align_ti")
    summary = {
        "title": "A demo",
        "seed": 3,
        "labels": names,
        "questions": 4 * pictures,
        "accuracy": {name: dict.fromkeys(kinds, share[name]) for name in names},
        "interval_95": {name: {kind: [share[name] - 5, share[name] + 5] for kind in kinds} for name in names},
        "questions_by_kind": kinds,
        "seconds_per_step": {"sft": 0.1, "align_ti": 0.25},
        "peak_memory_mib": dict.fromkeys(trained, 120.0),
        "memory": "resident",
        "steps": 60,
    }
    (root / "summary.json").write_text(json.dumps(summary))
    for name, pattern in (right or ANSWERS).items():
        answers = []
        for number in range(pictures):
            path = root / f"{number}.png"
            if not path.exists():
                Image.new("RGB", (12, 8), (20 * number, 90, 60)).save(path)
            answers += [
                {
                    "kind": kind,
                    "image": str(path),
                    "question": f"<image>Question {number}, {kind}?",
                    "expected": "Yes.",
                    "answer": "Yes." if hit else f"{name} says no",
                    "right": bool(hit),
                }
                for kind, hit in zip(("digit", "colour", "digit", "colour"), pattern, strict=True)
            ]
        (root / f"evaluation-{name}.json").write_text(json.dumps({"answers": answers}))
    for name in trained:
        (root / name).mkdir(exist_ok=True)
        weights = {"sft": 1.0} if name == "sft" else {"sft": 1.0, "tpa": 0.5}
        lines = [
            {"step": step, "loss": 2.0, "learning_rate": 0.1 / step, "grad_norm": 1.0}
            | dict.fromkeys(weights, 1.0 / step)
            | {f"{term}_weight": weight for term, weight in weights.items()}
            for step in (1, 2, 3)
        ]
        (root / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        recipe = {
            "objective": {term: {"weight": weight} for term, weight in weights.items()},
            "training": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2},
            "student": {"path": "/secret/place/start"},
        }
        (root / name / "recipe.yaml").write_text(json.dumps(recipe))
        (root / name / "training.json").write_text(json.dumps({"steps": 60, "parameters": {"head": [1000, 1200]}}))
        verdict = {"name": "pixels", "state": "warn", "measured": "/secret/place/x.png is dark", "expected": "light"}
        (root / name / "check.json").write_text(json.dumps({"verdicts": [verdict]}))
        story = {"used": 9, "records": 10, "skipped": 1, "truncated": 0}
        (root / name / "data.json").write_text(json.dumps(story))
        (root / name / "skipped.jsonl").write_text(
            json.dumps({"place": "/secret/place/data.json, record 3", "reason": "<b>"})
        )
    write_inside(root, list(names))
    return root


def write_inside(root: Path, names: list[str]) -> None:
    """What was measured of the inside of the models, with words that are dangerous in HTML."""
    (root / "shown").mkdir(exist_ok=True)
    Image.new("RGB", (12, 8), "navy").save(root / "shown" / "look-0.png")
    maps = {name: {"grid": [2, 3], "weights": [[0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0, 0, 0, 0, 0, 1.0]]} for name in names}
    models = {name: {"layer": 1, "scores": {"0": 0.1, "1": 0.3}} for name in names}
    picture = {"picture": "look-0.png", "instructions": ["Where is <b>it</b>?", "And this?"], "models": maps}
    looks = {"models": models, "pictures": [picture], "notes": ["a <i>note</i>"]}
    (root / "looks.json").write_text(json.dumps(looks))
    chance = {name: 0.9 if name == "teacher" else 0.2 + 0.1 * place for place, name in enumerate(names)}
    candidate = {
        "token": " red",
        "own": True,
        "probability": chance,
        "kl": {name: 2.5 - place for place, name in enumerate(names) if name != "teacher"},
        "next": [{"token": "<s>", "probability": chance}],
    }
    answer = {
        "picture": "../../a.png",
        "kind": "colour",
        "question": "What <b>colour</b>?",
        "answer": "It is red.",
        "steps": [{"token": " red", "candidates": [candidate]}] * 2,
    }
    (root / "transitions.json").write_text(json.dumps({"answers": [answer], "notes": []}))


def first_sentence(page: str) -> str:
    """What a page says first; no line breaks between a number and its unit."""
    told = re.search(r'<p class="answer"><strong>(.*?)</strong>', page)[1]
    assert not re.search(r"\d %", told)
    return told.replace("\N{NO-BREAK SPACE}", " ")


# --- what is on the page ----------------------------------------------------------------------------------------------


def test_the_top_says_how_much_of_the_gap_was_closed_and_at_what_cost(tmp_path):
    page = write_report(compared_folder(tmp_path / "demo")).read_text()
    told = first_sentence(page)
    # SFT has half of the questions right, the teacher all, Align-TI three quarters; the patterns are the same for all images.
    assert told.startswith("Align-TI closed 50 % (")
    assert "of the gap between SFT (50.0 %) and the teacher (100.0 %)" in told
    assert "at 15.0 s of training, 2.50 times that of SFT" in told
    assert "50 % of the gap" in page and 'download="headline.csv"' in page


def test_without_a_clear_gap_the_difference_is_told(tmp_path):
    weak = {**ANSWERS, "teacher": (0, 0, 1, 0)}
    page = write_report(compared_folder(tmp_path / "demo", weak)).read_text()
    told = first_sentence(page)
    assert "% of the gap" not in page and "+25.0 points" in told and "from SFT" in told
    assert "not significantly better" in page


def test_each_part_is_there_and_says_what_it_is_about(tmp_path):
    page = write_report(compared_folder(tmp_path / "demo")).read_text()
    for part in ("scores", "looks", "transitions", "examples", "training", "cost", "origin"):
        assert f'<section id="{part}">' in page and f'href="#{part}"' in page
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert f"Align-TI {MINUS} SFT" in words and "There is one comparison, so nothing is corrected." in words
    assert "Where is &lt;b&gt;it&lt;/b&gt;?" in page and "a &lt;i&gt;note&lt;/i&gt;" in page and "layer 1" in words
    # Of six cells the first has half of the weight; in the second map the last has all.
    assert "top left 50 %" in words and "bottom right 100 %" in words
    assert "What &lt;b&gt;colour&lt;/b&gt;?" in page and "&lt;s&gt;" in page and "Align-TI -0.50" in words
    assert "1,000 of 1,200" in words and "tpa x 0.5" in words and "align-ti demo" not in words
    assert (
        "9 of 10 records used, 1 skipped" in words and "data.json, record 3: &lt;b&gt;" in words and "! warn" in words
    )
    assert "/secret" not in page


def test_several_folders_are_one_page_and_their_teacher_is_one_model(tmp_path):
    first = compared_folder(tmp_path / "one")
    second = compared_folder(tmp_path / "two", {**ANSWERS, "align_ti": (1, 1, 1, 1)})
    page = write_report(first, second, out=tmp_path / "both.html").read_text()
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "2 run folders" in words and "two: Align-TI closed 100 %" in words
    assert "one: Align-TI" in words and "teacher (one)" not in words and "start (two)" not in words
    assert "best of 2 students" in words
    assert not (first / "report.html").exists()


def test_a_study_stands_beside_runs_and_alone(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text(json.dumps(study_content(curves=False, fidelity=False)))
    alone = write_report(tmp_path / "study").read_text()
    assert "of the gap" in alone and '<section id="study-0">' in alone and "Scores by seed" in alone
    shutil.copytree(tmp_path / "study", tmp_path / "other")
    several = write_report(tmp_path / "other", tmp_path / "study", out=tmp_path / "several.html").read_text()
    assert "2 studies" in several and first_sentence(several).startswith("Study other: ")
    assert not first_sentence(alone).startswith("Study")
    beside = write_report(
        compared_folder(tmp_path / "demo"), tmp_path / "study", out=tmp_path / "both.html"
    ).read_text()
    assert "1 run folder and 1 study" in beside and "Align-TI closed" in beside and "Scores by seed" in beside


def test_what_comes_from_data_is_escaped(tmp_path):
    page = write_report(run_folder(tmp_path)).read_text()
    # The one script is the page's own, and the policy lets no other run.
    assert re.findall(r"<script.*?</script>", page, re.DOTALL) == [f"<script>{inline_script()}</script>"]
    assert "script-src &#39;sha256-" in page
    assert "<img src=x>" not in page
    assert "&lt;i&gt;Q&lt;/i&gt;?" in page
    assert "Align-TI &lt;b&gt;" in page
    # Names reach the plots too, where matplotlib escapes them.
    assert not re.search(r"Align-TI <b>", page)


def test_a_table_to_download_holds_no_formula():
    drawn = Drawing("x", Markup(""), ("a", "=b"), [("=1+1", -2.5), (None, "+3")])
    text = base64.b64decode(drawn.csv.partition("base64,")[2]).decode()
    assert text == "a,'=b\n'=1+1,-2.5\n,'+3\n"


def test_benchmarks_stand_on_the_page_with_their_intervals(tmp_path):
    one = {"title": "POPE", "metric": "f1", "value": 81.26, "low": 79.0, "high": 83.5, "questions": 24}
    told = {"pope": {**one, "notes": ["<b>2</b> missing"]}, "own": {**one, "low": None, "high": None, "notes": []}}
    page = write_report(run_folder(tmp_path, benchmarks={"align_ti": told})).read_text()
    assert page.count("81.3") == 2 and page.count("79.0 to 83.5") == page.count("interval unknown") == 1
    assert "POPE (24 questions)" in page and "<td>f1</td>" in page and "&lt;b&gt;2&lt;/b&gt; missing" in page
    assert "POPE" not in write_report(run_folder(tmp_path)).read_text()


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
    assert page.count("0.512") == 2 and page.count("0.400 to 0.600") == 2 and "KL, response tokens" in page
    row = next(line for line in page.splitlines() if line.startswith("<tr><td>top-1 agreement, self-generated answers"))
    assert "61.3" in row and "interval unknown" in row and f"<td>{DASH}</td>" in row
    assert "&lt;b&gt;visual_kl&lt;/b&gt; could not" in page


def test_tokens_and_flops_stand_on_the_page_and_accuracy_against_them(tmp_path):
    root = compared_folder(tmp_path / "demo")
    before = write_report(root).read_text()
    assert 'download="accuracy-and-cost.csv"' in before and "accuracy-and-flops" not in before
    assert '<th scope="col">compute</th>' in before
    # Times of different students are in one unit, with equal decimals.
    assert '<th scope="col">training time, s</th>' in before and "<td>6.0</td>" in before and "<td>15.0</td>" in before
    spent = {
        "sft": {"tokens": 1_234_567, "response_tokens": 98_765, "flops": 2_500_000_000_000, "flops_per_step": 1},
        "align_ti": {
            "tokens": 7_654_321,
            "response_tokens": 123,
            "flops": None,
            "flops_not_counted": "no <b>reason</b>",
        },
    }
    for name, cost in spent.items():
        (root / name / "cost.json").write_text(json.dumps(cost))
    page = write_report(root).read_text()
    assert "<td>1,234,567</td><td>98,765</td>" in page
    assert '<th scope="col">compute, TFLOP</th>' in page and "<td>2.50</td></tr>" in page
    assert "Align-TI: not counted (no &lt;b&gt;reason&lt;/b&gt;)." in page and "SFT: not counted" not in page
    row = next(line for line in page.splitlines() if "7,654,321" in line)
    assert row.endswith(f"<td>{DASH}</td></tr>")
    # One student alone has FLOPs.
    assert "accuracy-and-flops" not in page
    (root / "align_ti" / "cost.json").write_text(json.dumps({**spent["sft"], "flops": 5e12}))
    both = write_report(root).read_text()
    assert 'download="accuracy-and-flops.csv"' in both and "FLOPs of training, TFLOP" in both
    assert both.count("<svg") == before.count("<svg") + 1


def test_throughput_and_memory_have_curves_and_a_pause_is_no_slow_step(tmp_path):
    root = compared_folder(tmp_path / "demo")
    before = write_report(root).read_text()
    assert "throughput.csv" not in before and "memory-mib.csv" not in before
    log = root / "align_ti" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # Half a second a step, and a day between the second step and the third; nobody knows the memory at the third.
    for line, time, memory in zip(lines, (100.0, 100.5, 86500.0), (110.0, 120.0, None), strict=True):
        line |= {"time": time, "memory_mib": memory}
    # In float16 a step may have gradients without a norm.
    extra = {**lines[-1], "step": 5, "time": 86501.0, "grad_norm": float("inf")}
    log.write_text("\n".join(map(json.dumps, [*lines, extra])))
    page = write_report(root).read_text()
    assert table_of(page, "throughput") == [
        'model,step,"throughput, records / s (including evaluation during training)"',
        "Align-TI,2,64.0",
        "Align-TI,5,64.0",
    ]
    assert table_of(page, "memory-mib")[1:] == ["Align-TI,1,110.0", "Align-TI,2,120.0"]


def table_of(page: str, name: str) -> list[str]:
    """The lines of a table to download."""
    text = re.search(rf'download="{name}\.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', page)[1]
    return base64.b64decode(text).decode().splitlines()


def test_shares_in_the_gradient_stand_beside_the_terms(tmp_path):
    root = compared_folder(tmp_path / "demo")
    assert "Share of each term" not in write_report(root).read_text()
    verdicts = [
        {"name": f"term.{name}", "state": "pass", "measured": "", "expected": "", "values": {"gradient_share": share}}
        for name, share in (("sft", 0.125), ("<i>own</i>", 0.875))
    ]
    (root / "align_ti" / "check.json").write_text(json.dumps({"verdicts": verdicts}))
    page = write_report(root).read_text()
    assert page.count("Share of each term") == 1 and "During training it was measured" not in page
    assert f"<tr><td>sft</td><td>12.5</td><td>{DASH}</td><td>{DASH}</td><td>{DASH}</td></tr>" in page
    assert "<td>&lt;i&gt;own&lt;/i&gt;</td><td>87.5</td>" in page
    with (root / "align_ti" / "metrics.jsonl").open("a") as file:
        # A resumed run measured step 3 again.
        for step, share in ((1, 0.5), (3, 0.9), (3, 0.25)):
            shares = {"sft_gradient_share": share, "tpa_gradient_share": 1 - share}
            file.write("\n" + json.dumps({"step": step, **shares, "sft_gradient_norm": 2.0}))
    page = write_report(root).read_text()
    assert "<tr><td>sft</td><td>12.5</td><td>50.0</td><td>25.0</td><td>37.5</td></tr>" in page
    assert f"<tr><td>tpa</td><td>{DASH}</td><td>50.0</td><td>75.0</td><td>62.5</td></tr>" in page
    assert "During training it was measured 2 times, first at step 1, last at step 3" in page
    assert 'download="gradient-shares-' in page


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = write_report(compared_folder(tmp_path)).read_text()
    outside = [url for url in re.findall(r'(?:src|href)="([^"]*)"', page) if not url.startswith(("data:", "#"))]
    assert not outside
    assert "@import" not in page and not re.findall(r"url\((?!#)", page)
    # Each image is in the page once, though several questions are about it.
    assert page.count('<image id="p') == 11
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_two_hundred_photographs_stay_small_and_rare_patterns_are_shown(tmp_path):
    root, rng = compared_folder(tmp_path, pictures=1), np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(
        (1024, 768), Image.Resampling.BICUBIC
    )
    smooth.save(root / "photo.jpg")
    for path in root.glob("evaluation-*.json"):
        (one, *_) = json.loads(path.read_text())["answers"]
        answers = []
        for number in range(300):
            copy = root / f"photo-{number}.jpg"
            if not copy.exists():
                copy.hardlink_to(root / "photo.jpg")
            answers.append({**one, "image": str(copy), "question": f"Question {number}?", "right": number == 299})
        path.write_text(json.dumps({"answers": answers}))
    page = write_report(root).read_text()
    assert len(page) < 20e6
    assert page.count("<article data-kind") == 200 and "200 of 300 questions" in page and "Question 299?" in page


def test_a_sample_has_as_many_of_each_group_as_there_are():
    groups = [("a", (True,))] * 50 + [("b", (False,))] * 3 + [("b", (True,))] * 50
    chosen = spread(groups, 20)
    assert len(chosen) == 20 and {50, 51, 52} <= set(chosen) and chosen == sorted(chosen)
    assert spread(groups, 200) == list(range(103))


def test_folders_are_called_by_as_little_of_their_path_as_tells_them_apart():
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/other")]
    assert distinct_names(paths) == ["a/run", "b/run", "b/other"]
    assert distinct_names(paths[1:]) == ["run", "other"]


def test_a_run_without_questions_has_a_page_of_its_training(tmp_path):
    root = compared_folder(tmp_path / "demo") / "align_ti"
    (root / "student").mkdir()
    (root / "cost.json").write_text(
        json.dumps({"seconds_per_step": 0.2, "peak_memory_mib": None, "memory": "resident"})
    )
    page = write_report(root).read_text()
    assert "have not been evaluated on any questions" in page and '<section id="training">' in page
    assert '<section id="scores">' not in page and "training time, s" in page and "<td>12.0</td>" in page


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
    row = next(line for line in page.splitlines() if line.startswith("<tr><td>Align-TI"))
    assert row.count(f"<td>{DASH}</td>") == 10
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
