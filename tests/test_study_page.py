"""The page of a study: nothing from outside, all escaped, no difference without its interval, whatever is missing."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import pytest

from align_ti.errors import RunError
from align_ti.report.drawing import looks
from align_ti.report.numbers import OPERATIONS, TIMES, amount, amounts, bounds, decimals, number, signed
from align_ti.report.study import options, study_figures, write_study_page
from align_ti.report.study_plots import crowding
from tests.study_content import study_content

PICTURES = (
    "differences",
    "kinds",
    "frontier-seconds",
    "frontier-flops",
    "learning-step-digits_validation",
    "learning-seconds-digits_validation",
)

VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture(scope="module")
def whole() -> dict:
    """A study with all there can be, of which one run failed and one is missing."""
    return study_content(
        failed=(("kd", 1),),
        missing=(("align_ti", 2),),
        labels={"sft": "SFT", "kd": "KD", "align_ti": "Align-TI"},
        compare=[["align_ti", "kd"], ["kd", "sft"]],
    )


def page_of(content: dict, root: Path) -> str:
    """The page that a study.json gives."""
    (root / "study.json").write_text(json.dumps(content, allow_nan=False))
    path = write_study_page(root)
    assert path == root / "study.html"
    return path.read_text(encoding="utf-8")


def told(content: dict, root: Path) -> str:
    """The words of that page; its figures, which take long to draw, are left out."""
    with patch("align_ti.report.study.study_figures", lambda content: dict.fromkeys(PICTURES, "<svg></svg>")):
        return words_of(page_of(content, root))


class Balance(HTMLParser):
    """Notes tags that are opened and not closed, or closed and not opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if not set(self.open) & {"style", "svg"}:
            self.text.append(data)


def words_of(page: str) -> str:
    """The page's text outside its figures; fails if a tag is not closed."""
    balance = Balance()
    balance.feed(page)
    assert not balance.wrong and not balance.open
    return " ".join(" ".join(balance.text).split())


def test_the_page_needs_nothing_from_outside_and_follows_the_readers_colours(whole, tmp_path):
    page = page_of(whole, tmp_path)
    assert "http" not in page and "src=" not in page and "@import" not in page and "<script" not in page
    assert all(target.startswith(("#", "data:text/csv;")) for target in re.findall(r'href="([^"]*)"', page))
    assert not re.findall(r"url\((?!#)", page)
    assert page.count("<svg") == 6
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    # A figure's black text would be lost on dark paper.
    assert not re.search(r"(fill|stroke): #000000", page)


def test_wide_tables_can_be_scrolled_with_the_keyboard_and_have_names(whole, tmp_path):
    page = page_of(whole, tmp_path)
    wide = re.findall(r'<div class="wide"[^>]*>', page)
    assert len(wide) > 5 and all('tabindex="0" role="region" aria-label="' in one for one in wide)
    assert not re.search(r"<th(?![^>]*scope=)", page)


def test_panels_without_a_pair_are_not_drawn(whole):
    # The iterator of panels was used up before the empty ones were hidden, so that an odd number of pairs left an empty frame.
    three = [{**whole["differences"][0], "of": of, "to": to} for of, to in (("align_ti", "kd"), ("kd", "sft"))]
    three.append({**three[0], "of": "align_ti", "to": "sft"})
    made = {}

    def drawn(figure, title):
        made[title] = figure
        return title

    with patch("align_ti.report.study_plots.drawn", drawn):
        figure = made[study_figures({**whole, "differences": three, "variants": {}, "curves": {}})["kinds"]]
    shown = [ax for ax in figure.axes if ax.axison]
    assert len(figure.axes) == 4 and len(shown) == 3
    figure.draw_without_rendering()
    # Each column has its numbers below its last panel.
    assert [any(tick.label1.get_visible() for tick in ax.xaxis.get_major_ticks()) for ax in shown] == [
        False,
        True,
        True,
    ]


def test_each_picture_is_a_file_by_itself(whole):
    figures = study_figures(whole)
    assert tuple(figures) == PICTURES
    for name, figure in figures.items():
        root = ElementTree.fromstring(figure)
        assert root.tag == "{http://www.w3.org/2000/svg}svg", name
        assert root.find("{http://www.w3.org/2000/svg}title").text
        assert {"http://www.w3.org/2000/svg"} == set(re.findall(r"http[^\"'<\s]*", figure))


def test_what_comes_from_data_is_escaped(whole, tmp_path):
    content, evil = copy.deepcopy(whole), "<script>alert(1)</script>&$x_$\\"
    content["title"] = evil
    content["labels"] = {name: f"{evil}{name}" for name in content["labels"]}
    content["recipes"] = {name: {evil: evil} for name in content["recipes"]}
    content["base"] = {"recipe": evil, "changes": {evil: [evil]}}
    content["failed"][0]["error"] = evil
    content["made_on"][0] |= {"processor": evil, "versions": {evil: evil}}
    content["curves"] = {name: {evil: curve["digits_validation"]} for name, curve in content["curves"].items()}
    for row in content["metrics"]:
        row |= {"metric": f"{row['metric']}{evil}", "title": evil}
    for row in content["time_to_quality"]:
        row["benchmark"] = evil
    page = page_of(content, tmp_path)
    assert "<script" not in page
    words_of(page)
    # A dollar sign starts no formula in a figure.
    assert "$x_$" in page


def test_each_difference_stands_beside_its_interval(whole, tmp_path):
    words = told(whole, tmp_path)
    for one in whole["differences"]:
        own = f"{signed(one['mean'], 2)} {bounds(one['low'], one['high'], 2, sign=True)}"
        corrected = bounds(one["corrected_low"], one["corrected_high"], 2, sign=True)
        assert f"{own} {corrected}" in words
    for one in whole["variants"].values():
        mean = f"{number(one['accuracy']['mean'], 1)} {bounds(one['accuracy']['low'], one['accuracy']['high'], 1)}"
        assert mean in words
    for row in whole["metrics"]:
        if row["unit"] == "%":
            for one in row["differences"]:
                assert f"{signed(one['mean'], 2)} {bounds(one['low'], one['high'], 2, sign=True)}" in words
    assert "not corrected" in words
    # The same in the figure of them.
    forest = study_figures(whole)["differences"]
    assert all(
        f"{signed(one['mean'], 2)} ({bounds(one['low'], one['high'], 2, sign=True)})" in forest
        for one in whole["differences"]
    )


def test_bold_is_what_leaves_out_nought(whole, tmp_path):
    content = copy.deepcopy(whole)
    first, second = content["differences"]
    first |= {"mean": 3.21, "corrected_low": 1.0, "corrected_high": 5.0}
    second |= {"mean": 3.21, "corrected_low": -1.0, "corrected_high": 5.0}
    content["metrics"] = []
    told(content, tmp_path)
    assert (tmp_path / "study.html").read_text().count("<strong>+3.21</strong>") == 1


def test_the_first_sentence_tells_the_best_its_gap_and_its_cost(whole, tmp_path):
    content = copy.deepcopy(whole)
    best = content["variants"]["align_ti"]
    best |= {"gap_closed": 42.4, "gap_closed_interval": [30.0, 55.0], "seconds": 7200.0, "flops": 3.0e15}
    content["variants"]["sft"] |= {"seconds": 3600.0, "flops": 1.0e15}
    best["accuracy"]["mean"] = 99.0
    words = told(content, tmp_path)
    assert "Align-TI is best: Digits accuracy 99.0 %" in words
    assert "it closed 42 % (30 to 55) of the gap between SFT and the teacher" in words
    assert "at 2.00 h of training and 3.00 PFLOP per run, 2.00 and 3.00 times those of SFT." in words


def test_a_lead_is_told_the_way_round_that_it_is(whole, tmp_path):
    content = copy.deepcopy(whole)
    for name, mean in {"sft": 10.0, "kd": 30.0, "align_ti": 20.0}.items():
        content["variants"][name]["accuracy"]["mean"] = mean
    content["differences"][0] |= {"mean": -10.0, "corrected_low": -14.0, "corrected_high": -5.0}
    words = told(content, tmp_path)
    assert (
        "Its lead over Align-TI, the second best, is +10.00 points (+5.00 to +14.00, corrected for 2 comparisons)."
        in words
    )
    content["differences"][0]["corrected_high"] = 1.0
    assert "which is not significant" in told(content, tmp_path)
    content["differences"] = content["differences"][1:]
    assert "is not among the study's comparisons" in told(content, tmp_path)


def test_what_failed_or_is_missing_stands_above_the_tables(whole, tmp_path):
    words = told(whole, tmp_path)
    above = words[: words.index("Variants")]
    assert "1 of 9 runs failed: KD, seed 1." in above
    assert "1 of 9 runs not run yet: Align-TI, seed 2." in above
    assert "RunError: <b>the disk</b> is full" in words
    assert "failed" in words[words.index("Scores by seed") :] and "missing" in words[words.index("Scores by seed") :]
    assert "Incomplete" not in told(whole | {"failed": [], "missing": []}, tmp_path)


def test_a_study_that_has_barely_begun_has_a_page(tmp_path):
    begun = study_content(seeds=1, pictures=1, teacher=False, curves=False, fidelity=False, missing=(("align_ti", 0),))
    words = words_of(page_of(begun, tmp_path))
    assert "align_ti no finished run" in words
    assert "interval unknown" in words or begun["differences"][0]["low"] is not None
    assert "gap is reported" in words and "Time to quality" not in words and "None" not in words and "nan" not in words
    every = tuple((name, 0) for name in ("sft", "kd", "align_ti"))
    assert "No run has finished yet." in words_of(page_of(study_content(seeds=1, missing=every), tmp_path))


def test_what_is_unknown_is_told_as_unknown(whole, tmp_path):
    content = copy.deepcopy(whole)
    for one in content["differences"]:
        one |= dict.fromkeys(("low", "high", "p", "corrected_low", "corrected_high", "corrected_p", "relative"))
    for row in content["metrics"]:
        for one in [*row["differences"], *row["variants"].values()]:
            one |= {"low": None, "high": None}
    for one in content["variants"].values():
        one["accuracy"] |= {"low": None, "high": None}
        one |= {"gap_closed_interval": [None, None], "peak_memory_mib": None}
    content["teacher"] |= {"low": None, "high": None}
    content["made_on"] = [{"python": "3", "runs": 1}]
    for curves in content["curves"].values():
        for point in curves["digits_validation"]:
            point |= {"low": None, "high": None}
    words = words_of(page_of(content, tmp_path))
    assert "None" not in words and "nan" not in words
    assert words.count("interval unknown") >= 2 * len(content["differences"])
    assert "the runs so far give no interval" in words


def test_time_to_quality_says_how_many_seeds_got_there(whole, tmp_path):
    content = copy.deepcopy(whole)
    row = content["time_to_quality"][0]
    row |= {"reached": 1, "seeds": 2, "share": None, "share_low": None, "share_high": None}
    row["per_seed"] = {"0": {"share": None}, "2": {"share": 0.625}}
    words = told(content, tmp_path)
    assert "Align-TI KD undefined 1 of 2 0: not reached, 2: 0.62" in words
    row |= {"reached": 2, "share": 0.7, "share_low": 0.61, "share_high": 0.8}
    assert "Align-TI KD 0.70 0.61 to 0.80 2 of 2" in told(content, tmp_path)


def test_equal_scores_and_costs_do_no_harm(whole, tmp_path):
    content = copy.deepcopy(whole)
    for one in content["variants"].values():
        one["accuracy"] = {"mean": 0.0, "low": 0.0, "high": 0.0}
        one |= {"seconds": 60.0, "flops": 0.0, "gap_closed": 0.0, "gap_closed_interval": [0.0, 0.0]}
    for one in content["differences"]:
        one |= dict.fromkeys(("mean", "low", "high", "corrected_low", "corrected_high"), 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = words_of(page_of(content, tmp_path))
    assert "SFT and KD and Align-TI are tied for the best result" in words


def test_many_variants_are_told_apart_without_colours(whole):
    names = [f"variant {number}" for number in range(10)]
    found = looks(names)
    assert len({(one.marker, one.dash) for one in found.values()}) == len(names)
    one = whole["variants"]["kd"]
    variants = {name: {**one, "seconds": one["seconds"] * (1 + place)} for place, name in enumerate(names)}
    alone = {"variants": variants, "labels": dict(zip(names, names, strict=True)), "differences": [], "curves": {}}
    figures = study_figures(whole | alone | {"frontier": dict.fromkeys(("seconds", "flops"), names[:1])})
    assert list(figures) == ["frontier-seconds", "frontier-flops"]
    assert all(f">{name}<" in figures["frontier-seconds"] for name in names)


def test_a_label_stands_where_there_is_room():
    frame = (0.0, 0.0, 100.0, 100.0)
    assert crowding((10.0, 10.0, 20.0, 20.0), [(20.0, 0.0, 30.0, 30.0)], frame) == 0
    assert crowding((10.0, 10.0, 20.0, 20.0), [(15.0, 0.0, 30.0, 30.0), (0.0, 0.0, 12.0, 12.0)], frame) == 50 + 4
    assert crowding((95.0, 10.0, 105.0, 20.0), [(0.0, 0.0, 1.0, 1.0)], frame) == 50


def test_where_files_lay_is_not_on_the_page(whole, tmp_path):
    page = page_of(whole, tmp_path)
    assert "secret" not in page and "/home" not in page
    changes = {"a": ["C:\\Users\\me\\x.json", "/data/y.json"], "b": {"c": "~/z"}, "d": "kept/as/is", "e": 0.5, "f": "/"}
    assert dict(options(changes)) == {
        "a": '["x.json", "y.json"]',
        "b": '{"c": "z"}',
        "d": '"kept/as/is"',
        "e": "0.5",
        "f": '"/"',
    }


def test_the_same_study_gives_the_same_page(whole, tmp_path):
    assert page_of(whole, tmp_path) == page_of(whole, tmp_path)


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"study\.json does not exist"):
        write_study_page(tmp_path)


def test_measures_of_fidelity_have_their_names(whole, tmp_path):
    rows = [{**row, "metric": "response_kl" if row["metric"] == "kl" else row["metric"]} for row in whole["metrics"]]
    words = told({**whole, "metrics": rows}, tmp_path)
    assert "KL, response tokens" in words and "response_kl" not in words


def test_numbers():
    assert amounts(TIMES, [55.6, 130.0, 175.0]) == ["0.93 min", "2.17 min", "2.92 min"] and amounts(TIMES, []) == []
    # A divergence of 0.15 stood as 0.1 beside one of 10.3.
    assert (
        decimals("nats", [10.3, 0.15], 1) == 2 and decimals("nats", [0.0034], 1) == 5 and decimals("", [10.3], 1) == 1
    )
    assert number(-0.04, 1) == "0.0" and signed(0.004, 2) == "0.00" and signed(-1.5, 1) == "\N{MINUS SIGN}1.5"
    assert number(50.75, 1) == number(50.749999999999996, 1) == "50.8"
    assert signed(0.25, 1) == "+0.2" and bounds(None, 1.0, 1) == "interval unknown"
    assert amount(TIMES, 119) == "119 s" and amount(TIMES, 121) == "2.02 min" and amount(TIMES, 0) == "0 s"
    assert amount(OPERATIONS, 2.5e12) == "2.50 TFLOP" and amount(OPERATIONS, 1.5e12) == "1,500 GFLOP"


def test_the_page_imports_no_torch():
    code = "import align_ti.report.study, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
