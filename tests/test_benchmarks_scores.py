"""The benchmarks' scores: ours and the originals', against counts done by hand and on random answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_ti.errors import DataError
from align_ti.evaluation.benchmarks import BENCHMARKS, PAPER, benchmark, paper_row
from align_ti.evaluation.benchmarks.mme import COGNITION, PERCEPTION
from align_ti.evaluation.scoring import (
    gqa_normalize,
    mmbench_choice,
    mme_answer,
    pope_answer,
    scienceqa_choice,
    vqa_accuracy,
)
from tests.benchmark_folders import MAKERS, mme_folder, own_folder, write_lines


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Each benchmark with its questions and the right answers, by name."""
    evals = tmp_path_factory.mktemp("eval")
    made = {}
    for name, make in MAKERS.items():
        answers = make(evals)
        made[name] = (benchmark(name), benchmark(name).items(evals), answers)
    return made


def scores(report):
    return {name: metric.score for name, metric in report.metrics.items()}


PERFECT = {"mme": {"perception": 2000, "cognition": 800}}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_answers_score_everything(tasks, name, strict):
    task, items, answers = tasks[name]
    report = task.score(items, answers, strict_original=strict)
    assert report.headline in report.metrics
    assert set(report.right.values()) == {1.0} and set(report.right) == set(answers)
    for metric, value in scores(report).items():
        if "yes ratio" in metric:
            assert value == 50
        elif name == "mme" and metric in PERCEPTION + COGNITION:
            assert value == 200
        else:
            assert value == pytest.approx(PERFECT.get(name, {}).get(metric, 100))
    assert not any("missing" in note for note in report.notes)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_predictions_are_all_wrong_and_said_to_be_missing(tasks, name):
    task, items, _ = tasks[name]
    report = task.score(items, {})
    assert all(value == 0 for value in scores(report).values())
    assert set(report.right.values()) == {0.0} and len(report.right) == len(items)
    assert f"{len(items)} of {len(items)} predictions are missing" in report.notes[0]


@pytest.mark.parametrize("name", ["gqa", "sqa", "textvqa", "pope", "mme"])
def test_no_predictions_stop_the_originals(tasks, name):
    task, items, answers = tasks[name]
    with pytest.raises(DataError, match=r"where the original|so the original"):
        task.score(items, {}, strict_original=True)
    if name in ("pope", "mme"):
        with pytest.raises(DataError, match=r"no answers (to|in)|an odd number"):
            task.score(items, {items[0].id: answers[items[0].id]}, strict_original=True)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_one_missing_prediction_scores_as_a_wrong_one_does(tasks, name):
    task, items, answers = tasks[name]
    gone = items[0].id
    without = task.score(items, {id: text for id, text in answers.items() if id != gone})
    assert without.right[gone] == 0.0
    assert f"1 of {len(items)} predictions are missing (the first: {gone!r}): counted as wrong." in without.notes
    wrong = task.score(
        items, answers | {gone: "No" if answers[gone] == "Yes" else "Yes" if answers[gone] == "No" else "nonsense"}
    )
    for metric, value in scores(without).items():
        if "yes ratio" not in metric:
            assert value == pytest.approx(wrong.metrics[metric].score)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_predictions_of_another_task_are_refused(tasks, name):
    task, items, answers = tasks[name]
    with pytest.raises(DataError, match=r"none of the 2 predictions belongs to one of the \d+ questions"):
        task.score(items, {"elsewhere 1": "Yes", "elsewhere 2": "No"})
    with pytest.raises(DataError, match="no questions"):
        task.score([], answers)
    report = task.score(items, answers | {"elsewhere": "Yes"})
    assert "1 predictions belong to no scored question: ignored." in report.notes
    assert scores(report) == scores(task.score(items, answers))


@pytest.mark.parametrize("name", PAPER)
def test_another_number_of_questions_than_published_is_said(tasks, name):
    task, items, answers = tasks[name]
    published = {"gqa": 12578, "sqa": 4241, "textvqa": 5000, "pope": 8910, "mme": 2374, "mmbench": 4377}[name]
    assert any(f"the published benchmark has {published}" in note for note in task.score(items, answers).notes)


ANSWERS = st.sampled_from(
    [
        "Yes",
        "No",
        "yes.",
        "no",
        "A",
        "B",
        "C",
        "D",
        "B. x",
        "cat",
        "The answer is A.",
        "2",
        "dakota",
        "not sure",
        "maybe",
        "",
        "\u00e9",
    ]
)


@pytest.mark.parametrize("name", BENCHMARKS)
@settings(max_examples=25)
@given(data=st.data())
def test_order_does_not_matter_and_shares_stay_in_bounds(tasks, name, data):
    task, items, answers = tasks[name]
    given_to = data.draw(st.lists(st.sampled_from(items), min_size=1, max_size=8, unique_by=lambda item: item.id))
    predictions = answers | {item.id: data.draw(ANSWERS) for item in given_to}
    report = task.score(items, predictions)
    again = task.score(data.draw(st.permutations(items)), dict(reversed(predictions.items())))
    assert scores(again) == pytest.approx(scores(report))
    assert again.right == report.right
    assert all(0 <= value <= 1 for value in report.right.values())
    top = {"perception": 2000, "cognition": 800} | dict.fromkeys(PERCEPTION + COGNITION, 200) if name == "mme" else {}
    assert all(0 <= value <= top.get(metric, 100) + 1e-9 for metric, value in scores(report).items())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_metric_is_a_function_of_sums_over_its_clusters(tasks, name):
    """Many draws at once score as each by itself, and the clusters are named once each."""
    task, items, answers = tasks[name]
    report = task.score(items, answers | {item.id: "Yes" for item in items[::3]})
    random = np.random.default_rng(0)
    for metric in report.metrics.values():
        assert len(metric.clusters) == len(set(metric.clusters)) == len(metric.sums)
        drawn = metric.sums[random.integers(len(metric.sums), size=(5, len(metric.sums)))].sum(1)
        assert metric.value(drawn) == pytest.approx([float(metric.value(one)) for one in drawn])
        assert np.isfinite(metric.value(np.zeros_like(drawn))).all()


# --- GQA --------------------------------------------------------------------------------------------------------------


def test_gqa(tasks):
    task, items, answers = tasks["gqa"]
    wrong = {"201640614": "a shirt", "202225914": "no"}
    report = task.score(items, answers | wrong)
    assert report.headline == "accuracy"
    assert scores(report) == pytest.approx({"accuracy": 400 / 6, "binary": 50, "open": 75})
    assert report.metrics["accuracy"].clusters == ("n161313.jpg", "n235859.jpg")


def test_gqa_strays(tasks):
    """White space is tidied by ours alone; everything else is the rule's."""
    task, items, answers = tasks["gqa"]
    stray = answers | {"201640614": " shirt. ", "201640616": "blue.\n", "202225916": "Remote\tcontrol"}
    assert task.score(items, stray).metrics["open"].score == 100
    assert task.score(items, stray, strict_original=True).metrics["open"].score == 25


def test_gqa_strictly_skips_missing_predictions(tasks):
    task, items, answers = tasks["gqa"]
    some = {id: answers[id] for id in ("202225914", "202225915")} | {"202225916": "x"}
    report = task.score(items, some, strict_original=True)
    assert scores(report) == pytest.approx({"accuracy": 200 / 3, "binary": 100, "open": 50})
    assert report.right == {"202225914": 1, "202225915": 1, "202225916": 0}
    assert "left out of the denominator" in report.notes[0]
    assert task.score(items, some).metrics["accuracy"].score == pytest.approx(200 / 6)


def test_gqa_strictly_needs_a_group(tasks):
    task, items, answers = tasks["gqa"]
    with pytest.raises(DataError, match="no scored question has a global group, so the original divides by zero"):
        task.score(items, {"201307251": answers["201307251"]}, strict_original=True)


def test_gqa_scores_balanced_questions_alone(tasks):
    from dataclasses import replace

    task, items, answers = tasks["gqa"]
    first, *rest = items
    unbalanced = replace(first, reference=first.reference | {"balanced": False})
    report = task.score([unbalanced, *rest], answers | {first.id: "wrong"})
    assert report.metrics["accuracy"].score == 100 and first.id not in report.right
    assert any("1 questions are not of the balanced set" in note for note in report.notes)
    with pytest.raises(DataError, match="none of the 1 questions is of the balanced set"):
        task.score([unbalanced], answers)


def test_gqa_without_binary_questions(tasks):
    task, items, answers = tasks["gqa"]
    report = task.score([item for item in items if item.kind == "open"], answers)
    assert set(report.metrics) == {"accuracy", "open"}
    assert any("No binary questions" in note for note in report.notes)


# --- ScienceQA --------------------------------------------------------------------------------------------------------


def test_scienceqa(tasks):
    task, items, answers = tasks["sqa"]
    report = task.score(items, answers | {"5": "B. a cube", "16": "The answer is D", "20": "e"})
    assert report.headline == "image"
    assert scores(report) == {"image": 50, "all": 50}


def test_scienceqa_strays(tasks):
    task, items, _answers = tasks["sqa"]
    stray = {"5": "B\n", "16": "D.\nBoth act.", "11": " B", "20": "E"}
    assert scores(task.score(items, stray)) == {"image": 100, "all": 100}
    assert scores(task.score(items, stray, strict_original=True)) == {"image": 0, "all": 25}


def test_scienceqa_s_missing_predictions_count_among_the_pictures(tasks):
    task, items, answers = tasks["sqa"]
    some = {id: text for id, text in answers.items() if id != "16"}
    assert scores(task.score(items, some)) == {"image": 50, "all": 75}
    assert scores(task.score(items, some, strict_original=True)) == {"image": 100, "all": 75}


def test_scienceqa_without_pictures(tasks):
    task, items, answers = tasks["sqa"]
    texts = [item for item in items if item.kind == "text"]
    report = task.score(texts, answers)
    assert scores(report) == {"image": 0, "all": 100}
    assert any(
        note.startswith("image is 0 because there are no questions with an image (0 / 0)") for note in report.notes
    )
    with pytest.raises(DataError, match="no answered question has an image, so the original divides by zero"):
        task.score(texts, answers, strict_original=True)


# --- TextVQA ----------------------------------------------------------------------------------------------------------


def test_textvqa(tasks):
    task, items, answers = tasks["textvqa"]
    ids = list(answers)
    report = task.score(items, {ids[0]: "Dakota Digital.", ids[1]: "drupalcon?", ids[2]: "unanswerable", ids[3]: "3"})
    assert list(report.right.values()) == pytest.approx([1, 1, 0.3, 0.3])
    assert report.metrics["accuracy"].score == pytest.approx(65)
    # "two" and "2" are one answer.
    assert task.score(items, {ids[3]: "TWO"}).right[ids[3]] == 1
    assert len(report.metrics["accuracy"].clusters) == 3


def test_textvqa_strictly_scores_what_was_answered(tasks):
    task, items, answers = tasks["textvqa"]
    ids = list(answers)
    some = {ids[0]: "dakota", ids[1]: "x"}
    assert task.score(items, some, strict_original=True).metrics["accuracy"].score == 50
    assert task.score(items, some).metrics["accuracy"].score == 25
    with pytest.raises(DataError, match="no predictions, so the original divides by zero"):
        task.score(items, {}, strict_original=True)


def test_textvqa_without_ocr_tokens_is_said(tasks):
    from dataclasses import replace

    task, items, answers = tasks["textvqa"]
    bare = [replace(item, text="\n".join((item.text.split("\n")[0], item.text.split("\n")[-1]))) for item in items]
    assert any("4 of 4 prompts hold no OCR tokens" in note for note in task.score(bare, answers).notes)
    assert not any("OCR" in note for note in task.score(items, answers).notes)


# --- POPE -------------------------------------------------------------------------------------------------------------


def test_pope(tasks):
    """Of a split's 8 questions two yes become no, one no becomes yes."""
    task, items, answers = tasks["pope"]
    of = [item.id for item in items if item.kind == "popular"]
    yes = [id for id in of if answers[id] == "Yes"]
    no = [id for id in of if answers[id] == "No"]
    report = task.score(items, answers | {yes[0]: "No", yes[1]: "not that I see", no[0]: "Yes, of course"})
    got = scores(report)
    precision, recall = 2 / 3, 2 / 4
    assert got["popular accuracy"] == pytest.approx(100 * 5 / 8)
    assert got["popular precision"] == pytest.approx(100 * precision)
    assert got["popular recall"] == pytest.approx(100 * recall)
    assert got["popular f1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    assert got["popular yes ratio"] == pytest.approx(100 * 3 / 8)
    assert got["random f1"] == got["adversarial f1"] == 100
    assert report.headline == "f1"
    assert got["f1"] == pytest.approx((200 + got["popular f1"]) / 3)
    assert [name for name in got if name.endswith(" f1")] == ["adversarial f1", "popular f1", "random f1"]


def test_pope_strays(tasks):
    task, items, answers = tasks["pope"]
    stray = {id: f"{text}\n" if index % 2 else f"{text}\tit is" for index, (id, text) in enumerate(answers.items())}
    assert task.score(items, stray).metrics["f1"].score == 100
    assert task.score(items, stray, strict_original=True).metrics["f1"].score < 70


def test_pope_strictly_moves_the_labels_up_when_a_prediction_is_missing(tasks):
    task, items, answers = tasks["pope"]
    third = [item.id for item in items if item.kind == "random"][2]
    some = {id: text for id, text in answers.items() if id != third}
    strict = task.score(items, some, strict_original=True)
    # Labels alternate: two answers meet their own, the other five their neighbours'.
    assert strict.metrics["random accuracy"].score == pytest.approx(200 / 7)
    assert strict.metrics["random yes ratio"].score == pytest.approx(300 / 7)
    assert strict.metrics["popular accuracy"].score == 100
    assert "the labels move up, as in the original" in strict.notes[0]
    ours = task.score(items, some)
    assert ours.metrics["random accuracy"].score == pytest.approx(700 / 8)


def test_pope_strictly_joins_by_the_order_of_the_answers_file(tasks):
    # The questions' own order was taken, by which a file in another order scored as if it were not.
    task, items, answers = tasks["pope"]
    yes_first = {id: text for id, text in answers.items() if text == "Yes"} | answers
    # Labels alternate, so every second answer meets its opposite.
    assert task.score(items, yes_first, strict_original=True).metrics["random accuracy"].score == 50
    assert task.score(items, yes_first).metrics["random accuracy"].score == 100


def test_pope_s_denominators_of_zero(tasks):
    task, items, answers = tasks["pope"]
    never = task.score(items, dict.fromkeys(answers, "no"))
    assert never.metrics["f1"].score == 0 and never.metrics["random accuracy"].score == 50
    for split in ("adversarial", "popular", "random"):
        assert any(
            note.startswith(f"{split} precision is 0 because there is no answer yes (0 / 0)") for note in never.notes
        )
    with pytest.raises(DataError, match=r"adversarial precision is 0 .* where the original divides by zero"):
        task.score(items, dict.fromkeys(answers, "no"), strict_original=True)
    turned = {id: "No" if text == "Yes" else "Yes" for id, text in answers.items()}
    assert any("random F1 is 0 because there is no right yes" in note for note in task.score(items, turned).notes)
    negatives = [item for item in items if answers[item.id] == "No"]
    assert any(
        "random recall is 0 because there is no label yes" in note
        for note in task.score(
            negatives, answers | {negatives[0].id: "Yes"} | {item.id: "Yes" for item in negatives}
        ).notes
    )


def test_pope_of_one_split(tasks):
    task, items, answers = tasks["pope"]
    report = task.score([item for item in items if item.kind == "random"], answers)
    assert report.metrics["f1"].score == 100
    assert "No popular questions: the mean F1 is over random." in report.notes


def test_pope_s_pictures_are_the_clusters_of_all_splits(tasks):
    task, items, answers = tasks["pope"]
    report = task.score(items, answers)
    assert report.metrics["f1"].clusters == report.metrics["random f1"].clusters
    assert len(report.metrics["f1"].clusters) == 2


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_f1_is_the_harmonic_mean(pairs):
    from align_ti.evaluation.benchmarks.pope import VALUES, confusion

    word = {True: "yes", False: "no"}
    total = np.sum([confusion(word[said], word[label]) for said, label in pairs], axis=0)
    precision, recall, f1 = (float(VALUES[name](total)) for name in ("precision", "recall", "f1"))
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall) if precision + recall else 0)
    assert float(VALUES["accuracy"](total)) == pytest.approx(100 * np.mean([said == label for said, label in pairs]))
    assert float(VALUES["yes ratio"](total)) == pytest.approx(100 * np.mean([said for said, _ in pairs]))


# --- MME --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_pictures(tmp_path_factory):
    evals = tmp_path_factory.mktemp("mme")
    answers = mme_folder(evals, pictures=2)
    return benchmark("mme"), benchmark("mme").items(evals), answers


def test_mme(two_pictures):
    task, items, answers = two_pictures
    of = [item.id for item in items if item.kind == "count"]
    report = task.score(items, answers | {of[0]: "maybe"})
    got = scores(report)
    assert got["count"] == pytest.approx(75 + 50)
    assert got["perception"] == pytest.approx(1925) and got["perception/20"] == pytest.approx(96.25)
    assert got["cognition"] == 800
    assert report.headline == "perception/20"
    assert report.metrics["perception"].unit == "points" and report.metrics["perception/20"].unit == "%"
    # Both wrong in one image cost one pair, one wrong in each of two cost two.
    both = scores(task.score(items, answers | {of[0]: "", of[1]: ""}))["count"]
    apart = scores(task.score(items, answers | {of[0]: "", of[2]: ""}))["count"]
    assert (both, apart) == (100, 50)
    cognition = next(item.id for item in items if item.kind == "text_translation")
    assert scores(task.score(items, answers | {cognition: ""}))["cognition"] == pytest.approx(725)


def test_mme_strays(two_pictures):
    task, items, answers = two_pictures
    stray = {id: f"  {text}\tI think\n" for id, text in answers.items()}
    assert task.score(items, stray).metrics["perception"].score == 2000
    with pytest.raises(DataError, match="holds a tab or a line end, which breaks the original's file"):
        task.score(items, stray, strict_original=True)
    spaced = {id: f"  {text}" for id, text in answers.items()}
    # Four characters hold "  no" and only a part of "  yes".
    strict = scores(task.score(items, spaced, strict_original=True))
    assert strict["count"] == 50
    assert task.score(items, spaced).metrics["perception"].score == 2000


def test_mme_strictly_stops_where_the_original_stops(two_pictures):
    task, items, answers = two_pictures
    of = [item.id for item in items if item.kind == "OCR"]
    with pytest.raises(DataError, match="3 answers in category OCR, an odd number"):
        task.score(items, {id: text for id, text in answers.items() if id != of[0]}, strict_original=True)
    with pytest.raises(DataError, match="no answers in category OCR"):
        task.score(items, {id: text for id, text in answers.items() if id not in of}, strict_original=True)
    with pytest.raises(DataError, match="no answer in category OCR says yes or no"):
        task.score(items, answers | dict.fromkeys(of, "maybe"), strict_original=True)
    assert task.score(items, answers | dict.fromkeys(of, "maybe")).metrics["perception"].score == 1800


def test_mme_strictly_pairs_neighbours(two_pictures):
    task, items, answers = two_pictures
    of = [item.id for item in items if item.kind == "OCR"]
    # The first image's second and the second image's second answer are left: one pair of two images.
    some = {id: text for id, text in answers.items() if id not in (of[0], of[2])} | {of[3]: "Yes"}
    strict = task.score(items, some, strict_original=True)
    assert strict.metrics["OCR"].score == 50
    assert task.score(items, some).metrics["OCR"].score == 25


def test_mme_strictly_pairs_neighbours_of_the_answers_file(two_pictures):
    # The questions' own order was taken, by which a file in another order scored as if it were not.
    task, items, answers = two_pictures
    of = [item.id for item in items if item.kind == "OCR"]
    wrong = answers | {of[0]: "No", of[1]: "Yes"}
    assert task.score(items, wrong, strict_original=True).metrics["OCR"].score == 50 + 50
    mixed = {of[0]: wrong[of[0]], of[2]: wrong[of[2]]} | wrong
    assert task.score(items, mixed, strict_original=True).metrics["OCR"].score == 50
    assert task.score(items, mixed).metrics["OCR"].score == 50 + 50


def test_mme_of_some_questions(two_pictures):
    task, items, answers = two_pictures
    report = task.score([item for item in items if item.kind == "count"][:3], answers)
    got = scores(report)
    assert got["count"] == 200 and got["perception"] == 200 and got["cognition"] == 0
    assert any("1 images lack one of their two questions" in note for note in report.notes)
    assert any("No questions of commonsense_reasoning, " in note and "in cognition" in note for note in report.notes)


# --- MMBench ----------------------------------------------------------------------------------------------------------


def test_mmbench_is_circular(tasks):
    task, items, answers = tasks["mmbench"]
    report = task.score(items, answers | {"1000252": "Z"})
    assert report.headline == "circular"
    assert scores(report) == pytest.approx({"circular": 200 / 3, "perception": 100, "reasoning": 50})
    assert report.right["252"] == 1 and report.right["1000252"] == 0
    assert set(report.metrics["circular"].clusters) == {"241", "252", "263"}
    # A second wrong rotation of the same question costs nothing more.
    again = task.score(items, answers | {"1000252": "Z", "252": ""})
    assert scores(again) == scores(report)


def test_mmbench_by_text_and_by_letter(tasks):
    task, items, answers = tasks["mmbench"]
    report = task.score(items, answers | {"241": "It is a dog", "1000263": "the answer is A", "263": "light"})
    assert scores(report)["circular"] == 100
    assert scores(task.score(items, answers | {"241": "a"}))["perception"] == 0


def test_mmbench_is_the_same_strictly(tasks):
    task, items, answers = tasks["mmbench"]
    some = {id: text for id, text in answers.items() if id != "263"} | {"241": "**B**\n"}
    assert scores(task.score(items, some)) == scores(task.score(items, some, strict_original=True))


# --- digits, one's own, the paper's row -------------------------------------------------------------------------------


def test_digits(tasks):
    task, items, answers = tasks["digits"]
    first = items[0]
    report = task.score(items, {id: f" {text.upper()}" for id, text in answers.items()} | {first.id: "It is a ten."})
    assert report.metrics["accuracy"].score == pytest.approx(100 * (len(items) - 1) / len(items))
    assert report.metrics[first.kind].score == 50
    assert len(report.metrics["accuracy"].clusters) == 2


def test_one_s_own(tasks):
    task, items, _ = tasks["own"]
    report = task.score(items, {"a": "red kite", "b": "kit", "c": "Yes", "4": "four"})
    assert list(report.right.values()) == pytest.approx([0, 0.75, 0, 0])
    assert scores(report) == pytest.approx({"score": 18.75, "thing": 0, "sum": 0})
    assert len(report.metrics["score"].clusters) == 3


def test_one_s_own_with_a_scorer_for_all(tmp_path):
    answers = own_folder(tmp_path)
    task = benchmark("own:f1")
    report = task.score(task.items(tmp_path), answers | {"a": "red"})
    assert report.right["a"] == pytest.approx(2 / 3)
    write_lines(tmp_path / "x.jsonl", [{"id": 1, "question": "q", "answer": "a", "kind": "score"}])
    assert set(benchmark("own").score(benchmark("own").items(tmp_path / "x.jsonl"), {"1": "a"}).metrics) == {
        "score",
        "kind score",
    }


def test_the_paper_s_row(tasks):
    reports = {name: tasks[name][0].score(tasks[name][1], tasks[name][2]) for name in MAKERS}
    task, items, answers = tasks["pope"]
    reports["pope"] = task.score(items, answers | {items[0].id: "No"})
    row = paper_row(reports)
    assert list(row) == [*PAPER, "mean"]
    assert row["mme"] == 100 and row["pope"] == pytest.approx(reports["pope"].metrics["f1"].score)
    assert row["mean"] == pytest.approx((500 + row["pope"]) / 6)
    del reports["mme"], reports["sqa"]
    with pytest.raises(DataError, match="found no score of sqa, mme; score them too"):
        paper_row(reports)


def test_the_paper_s_average_counts_mme_as_perception_over_twenty():
    """MobileVLM's row, whose published average is 64.2."""
    from align_ti.evaluation.benchmarks.base import Report
    from align_ti.evaluation.metrics import Metric, ratio

    values = {"gqa": 59.3, "sqa": 66.7, "textvqa": 52.1, "pope": 84.3, "mme": 1302.8 / 20, "mmbench": 57.7}
    reports = {
        name: Report({"x": Metric(np.array([[value, 100.0]]), ratio, ("a",))}, "x", {})
        for name, value in values.items()
    }
    assert round(paper_row(reports)["mean"], 1) == 64.2


# --- strict scoring against the rules, written out once more ----------------------------------------------------------


def strictly(task, items, predictions):
    """The strict report, or why the original would stop."""
    try:
        return task.score(items, predictions, strict_original=True), ""
    except DataError as error:
        return None, str(error)


@settings(max_examples=40)
@given(data=st.data())
def test_strict_scores_are_the_scorers_over_the_answers_as_they_are(tasks, data):
    """Complete predictions: what the originals count, from the pure scorers alone."""
    odd = st.sampled_from(
        ["Yes", " yes", "no\n", "No.", "B", "B. x", "The answer is A.", "cat. ", "2", "dakota", "a dog", "\u0130"]
    )
    for name in ("gqa", "sqa", "textvqa", "pope", "mmbench"):
        task, items, _answers = tasks[name]
        predictions = {item.id: data.draw(odd) for item in items}
        worth = {
            "gqa": lambda said, of: gqa_normalize(said) == of["answer"],
            "sqa": lambda said, of: scienceqa_choice(said, of["choices"]) == of["answer"],
            "textvqa": lambda said, of: vqa_accuracy(said, of["answers"]),
            "pope": lambda said, of: pope_answer(said) == of["label"],
            "mmbench": lambda said, of: mmbench_choice(said, of["choices"]) == of["answer"],
        }[name]
        report, stopped = strictly(task, items, predictions)
        if report is None:
            assert name == "pope" and "divides by zero" in stopped
            continue
        assert report.right == {
            item.id: pytest.approx(float(worth(predictions[item.id], item.reference))) for item in items
        }


@settings(max_examples=40)
@given(data=st.data())
def test_strict_mme_is_the_scorer_over_the_answers_as_they_are(two_pictures, data):
    task, items, answers = two_pictures
    odd = st.sampled_from(["Yes", " yes", "  yes", "know", "**No**", "Nope", "y", ""])
    predictions = answers | {
        item.id: data.draw(odd) for item in data.draw(st.lists(st.sampled_from(items), max_size=9))
    }
    report, stopped = strictly(task, items, predictions)
    if report is None:
        assert "says yes or no" in stopped
        return
    for category in PERCEPTION + COGNITION:
        of = [mme_answer(predictions[item.id]) == item.reference["answer"] for item in items if item.kind == category]
        plus = np.mean([of[0] and of[1], of[2] and of[3]])
        assert report.metrics[category].score == pytest.approx(100 * np.mean(of) + 100 * plus)
