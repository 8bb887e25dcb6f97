"""Files of predictions: what a kill leaves of them is gone on with, what was made otherwise is refused, other tools' are read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_ti.errors import DataError, RunError
from align_ti.evaluation.benchmarks import benchmark
from align_ti.evaluation.benchmarks.base import Benchmark, Item, Report
from align_ti.evaluation.benchmarks.mme import total
from align_ti.evaluation.comparison import Model, compare
from align_ti.evaluation.metrics import mean_of
from align_ti.evaluation.predictions import (
    About,
    Prediction,
    Writer,
    images_digest,
    join_parts,
    made_so_far,
    part_path,
    part_paths,
    questions_digest,
    read_predictions,
    subset,
    whole_lines,
)
from align_ti.evaluation.results import read_scores, write_scores
from align_ti.evaluation.scored import mean_of_six, score_file
from tests.benchmark_folders import mme_folder, pope_folder, textvqa_folder


class Letters(Benchmark):
    """Whether the answer is the question's last letter."""

    name = "letters"
    title = "Letters"

    def items(self, folder: Path) -> list[Item]:
        return [
            Item(f"q{number}", f"Say {letter}", (Path("0.png"),), f"image {number // 2}", place=f"letters, {number}")
            for number, letter in enumerate("abcdefg")
        ]

    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        right = {item.id: float(predictions.get(item.id) == item.text[-1]) for item in items}
        return Report({"accuracy": mean_of(list(right.values()), [item.cluster for item in items])}, "accuracy", right)


ITEMS = Letters().items(Path())


def about(**changes: object) -> About:
    told = {"model": "m", "weights": "w", "benchmark": "letters", "questions": questions_digest(ITEMS)}
    return About(**{**told, "settings": {"max_new_tokens": 8}, **changes})  # type: ignore[arg-type]


def prediction(item: Item, text: str | None = None) -> Prediction:
    return Prediction(item.id, item.text[-1] if text is None else text, item.text, cut=False)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(words, min_size=7, max_size=7),
    owners=st.lists(st.integers(0, 2), min_size=7, max_size=7),
    cuts=st.lists(st.integers(0, 400), min_size=3, max_size=3),
)
def test_what_kills_leave_and_the_rest_give_the_file_of_one_go(tmp_path_factory, texts, owners, cuts):
    folder = tmp_path_factory.mktemp("made")
    out, whole = folder / "letters.jsonl", folder / "whole.jsonl"
    answers = {item.id: prediction(item, text) for item, text in zip(ITEMS, texts, strict=True)}
    Writer(part_path(whole, 0), about()).add(answers.values())
    assert join_parts(whole, about(), ITEMS) == list(answers.values())
    # Three processes, each killed at some byte of its file.
    for process, cut in enumerate(cuts):
        path = part_path(out, process)
        writer = Writer(path, about())
        for item, owner in zip(ITEMS, owners, strict=True):
            if owner == process:
                writer.add([answers[item.id]])
        if path.exists():
            path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - cut])
    done = made_so_far(out, about())
    assert all(answers[name] == one for name, one in done.items())
    if len(done) < len(ITEMS):
        with pytest.raises(RunError, match="questions have no answer"):
            join_parts(out, about(), ITEMS)
    # One process does the rest, in a part file that may end in half of a line.
    Writer(part_path(out, 1), about()).add(one for name, one in answers.items() if name not in done)
    join_parts(out, about(), ITEMS)
    assert out.read_bytes() == whole.read_bytes()
    assert part_paths(out) == []
    assert read_predictions(out, ITEMS, "letters").texts == dict(zip(answers, texts, strict=True))


@pytest.mark.parametrize("cut", [1, 9, 200])
def test_a_whole_file_that_was_cut_off_gets_its_rest(tmp_path, cut):
    # The rest was asked, and then not found beside the file that was cut off: each call asked again and failed again.
    out = tmp_path / "letters.jsonl"
    answers = {item.id: prediction(item) for item in ITEMS}
    Writer(part_path(out, 0), about()).add(answers.values())
    join_parts(out, about(), ITEMS)
    whole = out.read_bytes()
    out.write_bytes(whole[:-cut])
    done = made_so_far(out, about())
    assert 0 < len(done) < len(ITEMS)
    Writer(part_path(out, 0), about()).add(one for name, one in answers.items() if name not in done)
    assert join_parts(out, about(), ITEMS) == list(answers.values())
    assert out.read_bytes() == whole and part_paths(out) == []


def test_a_file_that_was_made_otherwise_is_refused_by_name(tmp_path):
    out = tmp_path / "letters.jsonl"
    Writer(part_path(out, 0), about()).add([prediction(ITEMS[0])])
    before = part_path(out, 0).read_bytes()
    for changes, named in (
        ({"weights": "v"}, "weights is 'w' there and 'v' here"),
        ({"benchmark": "pope"}, "benchmark is 'letters' there and 'pope' here"),
        ({"questions": "x"}, "questions is"),
        ({"settings": {"max_new_tokens": 9}}, "max_new_tokens is 8 there and 9 here"),
        ({"settings": {"max_new_tokens": 8, "limit": 3}}, "limit is None there and 3 here"),
    ):
        for way in (lambda now: made_so_far(out, now), lambda now: Writer(part_path(out, 0), now)):
            with pytest.raises(RunError, match=named):
                way(about(**changes))
    # The same model from another working directory.
    assert len(made_so_far(out, about(model="../m"))) == 1
    assert part_path(out, 0).read_bytes() == before
    for foreign in ("mine\n", "mine", '{"question_id": 1, "text": "yes"}\n', before.decode() + '{"id": 1}\n'):
        part_path(out, 0).write_text(foreign)
        with pytest.raises(RunError, match="nothing is written over"):
            made_so_far(out, about())
        assert part_path(out, 0).read_text() == foreign


def test_answers_to_other_images_of_the_same_names_are_not_gone_on_with(tmp_path):
    # The answers to clean images were scored as those to blurred ones.
    digests = []
    for name, content in (("clean", b"image"), ("blurred", b"other image")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(content)
        digests.append(images_digest([replace(item, images=(tmp_path / name / "0.png",)) for item in ITEMS]))
    path = tmp_path / "letters.jsonl"
    before, now = (about(settings={"max_new_tokens": 8, "images": digest}) for digest in digests)
    path.write_text(before.line())
    assert whole_lines(path, before) == ([], len(before.line()))
    with pytest.raises(RunError, match=r"other settings \(images is"):
        whole_lines(path, now)
    path.write_text(about().line())
    assert whole_lines(path, now)[0] == []


def test_two_commands_in_one_folder_are_told(tmp_path):
    path = part_path(tmp_path / "letters.jsonl", 0)
    first, second = Writer(path, about()), Writer(path, about())
    first.add([prediction(ITEMS[0])])
    with pytest.raises(RunError, match="one command may write to a folder at a time"):
        second.add([prediction(ITEMS[0])])


def test_a_limit_takes_as_large_a_part_of_every_kind():
    # MME's score is a sum over fourteen categories: of 64 questions some had none, and all answers right were 70 of 100 points.
    sizes = {"landmark": 200, "count": 30, "code": 20}
    items = [
        Item(f"{kind}-{image}-{number}", "", (), f"{kind} {image}", kind=kind)
        for kind, images in sizes.items()
        for image in range(images)
        for number in range(2)
    ]
    for limit in (64, 100, 250):
        taken = Counter(item.kind for item in subset(items, limit))
        assert all(abs(taken[kind] / 2 - limit / 500 * images) <= 1 for kind, images in sizes.items()), limit
    sums = np.tile([2.0, 2.0, 1.0, 1.0], (3, 2, 1))
    sums[2, 1] = 0  # a resample without the second category
    assert total((0, 1), 1, sums.reshape(3, -1)).tolist() == [400.0, 400.0, 400.0]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12), limits=st.tuples(st.integers(1, 50), st.integers(1, 50))
)
def test_a_limit_takes_whole_clusters_and_a_larger_one_adds_to_them(sizes, limits):
    items = [
        Item(f"{cluster}-{number}", "", (), f"cluster {cluster}")
        for number in range(4)
        for cluster, size in enumerate(sizes)
        if number < size
    ]
    few, more = (subset(items, limit) for limit in sorted(limits))
    assert few == [item for item in items if item in few] and set(map(id, few)) <= set(map(id, more))
    for chosen, limit in zip((few, more), sorted(limits), strict=True):
        clusters = {item.cluster for item in chosen}
        assert chosen == [item for item in items if item.cluster in clusters]
        assert len(items) >= len(chosen) >= min(limit, len(items))
        assert len(chosen) < limit + max(sizes)
    assert subset(items, None) == items


# --- other tools' files -----------------------------------------------------------------------------------------------


def written(path: Path, records: object) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))  # type: ignore[attr-defined]
    else:
        path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("name", "record"),
    [
        (
            "llava.jsonl",
            lambda item, text: {"question_id": item.id, "prompt": item.text, "text": text, "answer_id": "x"},
        ),
        ("gqa.json", lambda item, text: {"questionId": item.id, "prediction": text}),
        ("trl.jsonl", lambda item, text: {"id": item.id, "answer": text}),
        ("vlmevalkit.json", lambda item, text: {"index": item.id, "answer": "the right one", "prediction": text}),
        ("lmms.jsonl", lambda item, text: {"doc_id": item.id, "target": "x", "filtered_resps": [text]}),
        (
            "template.jsonl",
            lambda item, text: {"id": item.id, "text": text, "prompt": f"USER: <image>\n{item.text} A:"},
        ),
        ("without_suffix.jsonl", lambda item, text: {"id": item.id, "text": text, "prompt": "<image>\nSay"}),
    ],
)
def test_files_of_other_tools(tmp_path, name, record):
    texts = {item.id: f"{item.text[-1]}\n" for item in ITEMS[1:]}
    records = [record(item, texts[item.id]) for item in reversed(ITEMS[1:])]
    read = read_predictions(written(tmp_path / name, records), ITEMS, "letters")
    assert read.texts == texts and read.about is None and len(read.items) == len(ITEMS)
    assert read_predictions(written(tmp_path / "by_id.json", texts), ITEMS, "letters").texts == texts


@pytest.mark.parametrize(("make", "task"), [(mme_folder, "mme"), (textvqa_folder, "textvqa"), (pope_folder, "pope")])
def test_llavas_files_whose_ids_are_pictures(tmp_path, make, task):
    right, chosen = make(tmp_path), benchmark(task)
    items = chosen.items(tmp_path)
    # LLaVA's scripts copy question_id and text of the question files, which number images in MME and TextVQA.
    (questions,) = tmp_path.rglob("llava_*.jsonl")
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    records = [
        {"question_id": one["question_id"], "prompt": one["text"], "text": right[item.id], "model_id": "llava"}
        for one, item in zip(asked, items, strict=True)
    ]
    found = score_file(written(tmp_path / "answers.jsonl", records[::-1]), chosen, items)
    assert found.report.metrics[found.report.headline].score == pytest.approx(
        100 if task != "mme" else found.headline["value"]
    )
    assert set(found.report.right.values()) == {1.0} or task == "textvqa"
    assert read_predictions(tmp_path / "answers.jsonl", items, task).texts == right


BAD = [
    (
        [{"id": "q1", "text": "b"}, {"id": "q1", "text": "b"}],
        r"line 2: a second prediction for question 'q1', after .*line 1",
    ),
    (
        [{"id": "q1", "text": "b"}, {"id": 17, "text": "b"}],
        r"line 2: letters has no question '17'; it has 7, such as 'q0'",
    ),
    ([{"text": "b"}], "line 1: the id is None; .*question_id"),
    ([{"id": True, "text": "b"}], "line 1: the id is True"),
    ([{"id": "q1", "words": "b"}], "line 1: the answer is None"),
    ([{"id": "q1", "text": 3}], "line 1: the answer is 3"),
    ([{"id": "q1", "filtered_resps": ["a", "b"]}], r"the answer is \['a', 'b'\]"),
    (["yes"], "line 1: str found; an object"),
    ([{"id": "q1", "text": "b", "prompt": "Say x"}], r"'q1' is to 'Say x', but letters asks 'Say b'"),
    ([{"question_id": item.id, "text": item.text} for item in ITEMS], "so this is a file of questions"),
    ([], "no predictions found"),
]


@pytest.mark.parametrize(("records", "told"), BAD)
def test_a_wrong_file_is_told_with_its_place(tmp_path, records, told):
    with pytest.raises(DataError, match=told):
        read_predictions(written(tmp_path / "wrong.jsonl", records), ITEMS, "letters")


def test_an_object_that_names_a_question_twice_is_told(tmp_path):
    # The last one counted, without a word.
    path = tmp_path / "twice.json"
    path.write_text('{"q1": "a", "q2": "c", "q1": "b"}')
    with pytest.raises(DataError, match=r"key 'q1': a second prediction for question 'q1'"):
        read_predictions(path, ITEMS, "letters")


def test_a_file_that_was_cut_off_is_told_with_its_line(tmp_path):
    path = written(tmp_path / "cut.jsonl", [{"id": item.id, "text": "x"} for item in ITEMS])
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DataError, match=r"cut\.jsonl, line 7: not valid JSON.*cut off"):
        read_predictions(path, ITEMS, "letters")
    for name, told in (("no.jsonl", "does not exist"), ("no.xlsx", "read from .jsonl"), ("bad.json", "not valid JSON")):
        (tmp_path / "bad.json").write_text('[{"id": ')
        with pytest.raises(DataError, match=told):
            read_predictions(tmp_path / name, ITEMS, "letters")


def test_our_own_file_knows_its_benchmark_and_its_questions(tmp_path):
    out = tmp_path / "letters.jsonl"
    Writer(part_path(out, 0), about()).add(map(prediction, ITEMS))
    join_parts(out, about(), ITEMS)
    with pytest.raises(DataError, match="predictions on 'letters', not on 'pope'"):
        read_predictions(out, ITEMS, "pope")
    with pytest.raises(DataError, match="answers to other questions"):
        read_predictions(out, ITEMS[::-1], "letters")
    # An unfinished part is scored as it is: what is missing is wrong.
    Writer(part_path(out, 0), about()).add(map(prediction, ITEMS[:3]))
    assert score_file(part_path(out, 0), Letters(), ITEMS).headline["value"] == pytest.approx(300 / 7)
    limited = subset(ITEMS, 3)
    told = about(questions=questions_digest(limited), settings={"limit": 3})
    Writer(tmp_path / "few.jsonl", told).add(map(prediction, limited))
    few = score_file(tmp_path / "few.jsonl", Letters(), ITEMS)
    assert few.headline["value"] == 100 and few.questions == len(limited) < 7
    assert any("of 7 questions were used" in note for note in few.report.notes)


def test_scores_by_two_rules_are_not_compared(tmp_path):
    # A question's digest says nothing of its references and scorers, so that ANLS was compared with exact match.
    pope_folder(tmp_path)
    (tmp_path / "own").mkdir()
    rows = [{"id": number, "question": f"Q {number}?", "answer": "a kite"} for number in range(4)]
    written(tmp_path / "own" / "questions.jsonl", rows)

    def model(called: str, task: str, strict: bool = False) -> Model:
        chosen = benchmark(task)
        items = chosen.items(tmp_path)
        path = written(tmp_path / "answers.json", dict.fromkeys((item.id for item in items), "Yes"))
        found = score_file(path, chosen, items, strict_original=strict)
        write_scores(tmp_path / f"{called}.scores.json", found.content)
        return called, read_scores(tmp_path / f"{called}.scores.json")

    compare([model("a", "own:anls"), model("b", "own:anls")])
    compare([model("a", "pope"), model("b", "pope")])
    for one, other in (
        (model("a", "own:anls"), model("b", "own")),
        (model("a", "pope"), model("b", "pope", strict=True)),
    ):
        with pytest.raises(DataError, match=r"ways of scoring \(--scorer, --strict-original\)"):
            compare([one, other])
    before = model("a", "own")
    written(tmp_path / "own" / "questions.jsonl", [row | {"answer": "the kite"} for row in rows])
    with pytest.raises(DataError, match="right answers"):
        compare([before, model("b", "own")])


def test_the_mean_of_six_and_its_interval():
    def one(value: float, reach: float) -> dict[str, float]:
        return {"value": value, "low": value - reach, "high": value + 2 * reach}

    names = ("gqa", "sqa", "textvqa", "pope", "mme", "mmbench")
    six = {name: one(10.0 * number, 3.0) for number, name in enumerate(names)}
    # Six independent means of equal width: a sixth of it, times the root of six.
    assert mean_of_six(six) == pytest.approx((25, 25 - 3 / 6**0.5, 25 + 6 / 6**0.5))
    assert mean_of_six({name: six[name] for name in names[1:]}) is None


def test_scoring_imports_no_torch():
    code = "import sys, align_ti.evaluation.scored; assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
