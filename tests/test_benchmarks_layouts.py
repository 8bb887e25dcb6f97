"""The benchmarks' files: layouts as published, and what is said about missing, damaged and other files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from align_ti.data.conversation import open_picture
from align_ti.errors import ConfigError, DataError
from align_ti.evaluation.benchmarks import BENCHMARKS, PAPER, benchmark
from align_ti.evaluation.benchmarks.textvqa import question_of
from align_ti.evaluation.predictions import questions_digest
from tests import benchmark_folders as folders
from tests.benchmark_folders import MAKERS

FOLDERS = {"sqa": "scienceqa", "mme": "MME", "digits_validation": "digits"}
"""The task's folder where it is not called by the benchmark's name."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every benchmark's folder, and the right answers by name. Tests that change files copy it."""
    evals = tmp_path_factory.mktemp("playground") / "data" / "eval"
    return evals, {name: make(evals) for name, make in MAKERS.items()}


def copied(made, tmp_path: Path, name: str) -> Path:
    """A copy of one task's folder, to be changed."""
    folder = FOLDERS.get(name, name)
    shutil.copytree(made[0] / folder, tmp_path / folder)
    return tmp_path / folder


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_questions_in_their_own_order_with_readable_pictures(made, name):
    evals, answers = made
    items = benchmark(name).items(evals)
    assert [item.id for item in items] == list(answers[name])
    for item in items:
        assert item.place.startswith(str(evals))
        assert item.cluster
        assert item.text.strip() and "<image>" not in item.text
        assert all(open_picture(image, item.place).size[0] > 1 for image in item.images)
        json.dumps(item.reference)
    assert any(item.images for item in items)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_task_s_own_folder_does_as_well(made, name):
    evals, _ = made
    expected = [(item.id, item.place) for item in benchmark(name).items(evals)]
    given = benchmark(name).items(evals / FOLDERS.get(name, name))
    assert [(item.id, item.place) for item in given] == expected
    if name != "own":
        assert [(item.id, item.place) for item in benchmark(name).items(evals.parent)] == expected


@pytest.mark.parametrize("name", PAPER)
def test_the_prompts_are_the_protocol_s(made, name):
    items = benchmark(name).items(made[0])
    suffix = (
        "\nAnswer with the option's letter from the given choices directly."
        if name in ("sqa", "mmbench")
        else "\nAnswer the question using a single word or phrase."
    )
    assert all(item.text.endswith(suffix) for item in items)
    assert benchmark(name).max_new_tokens == (1024 if name in ("sqa", "mmbench") else 128)


def test_prompts_word_by_word(made):
    first = {name: {item.id: item for item in benchmark(name).items(made[0])} for name in PAPER}
    assert first["sqa"]["5"].text.startswith(
        "Context: Figure: two solids.\nWhich is larger?\nA. a sphere\nB. a cube\nAnswer"
    )
    assert first["sqa"]["11"].images == () and first["sqa"]["11"].text.startswith("Which word is a noun?\nA. run")
    assert first["textvqa"]["00c359f294f7dcd9 what time is it?"].text.split("\n")[1] == "Reference OCR token: "
    hinted = first["mmbench"]["252"].text
    assert hinted.startswith('The hint says "yes",\tmaybe.\nWhich is right?\nA. red\nB. green\nC. blue\nAnswer')
    # A hint that the original's reader takes for missing.
    assert first["mmbench"]["263"].text.startswith("Is it heavy?\nA. heavy\nB. light\nAnswer")


def test_align_ti_s_own_layout_of_gqa(tmp_path):
    answers = folders.gqa_folder(tmp_path, data="")
    items = benchmark("gqa").items(tmp_path)
    assert [item.id for item in items] == list(answers)
    assert items[0].images == (tmp_path / "gqa" / "images" / "n161313.jpg",)


def test_questions_need_no_pictures_to_be_scored(made, tmp_path):
    folder = copied(made, tmp_path, "gqa")
    shutil.rmtree(folder / "data" / "images")
    items = benchmark("gqa").items(tmp_path)
    with pytest.raises(DataError, match=r"n161313\.jpg does not exist"):
        open_picture(items[0].images[0], items[0].place)


# --- missing and damaged files ----------------------------------------------------------------------------------------

FILES = [
    ("gqa", "llava_gqa_testdev_balanced.jsonl", r"eval\.zip"),
    ("gqa", "data/testdev_balanced_questions.json", r"questions1\.2\.zip"),
    ("sqa", "llava_test_CQM-A.json", r"eval\.zip"),
    ("sqa", "problems.json", "lupantech/ScienceQA"),
    ("sqa", "pid_splits.json", "lupantech/ScienceQA"),
    ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", r"eval\.zip"),
    ("textvqa", "TextVQA_0.5.1_val.json", "dl.fbaipublicfiles.com"),
    ("pope", "llava_pope_test.jsonl", r"eval\.zip"),
    ("pope", "coco/coco_pope_random.json", "e3e39262c85a6a83f26cf5094022a782cb0df58d"),
    ("mme", "llava_mme.jsonl", r"eval\.zip"),
    ("mmbench", "mmbench_dev_20230712.tsv", "download.openmmlab.com"),
    ("digits", "test.json", "align-ti digits --out"),
]


@pytest.mark.parametrize(("name", "file", "origin"), FILES)
def test_a_missing_file_is_named_with_the_place_it_comes_from(made, tmp_path, name, file, origin):
    folder = copied(made, tmp_path, name)
    (folder / file).unlink()
    with pytest.raises(DataError, match=origin) as caught:
        benchmark(name).items(tmp_path)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize(("name", "file", "origin"), FILES)
def test_a_file_that_is_cut_off_is_named(made, tmp_path, name, file, origin):
    folder = copied(made, tmp_path, name)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) - 9])
    with pytest.raises(DataError, match=r"cut off") as caught:
        benchmark(name).items(tmp_path)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize(("name", "file", "origin"), FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"7", b"\xff\xfe\x00", b'[{"a": 1}]', b'{"data": [{}]}', b"[" * 99999, b"1" * 4999],
    ids=lambda content: content[:9],
)
def test_a_file_of_something_else_is_named(made, tmp_path, name, file, origin, content):
    folder = copied(made, tmp_path, name)
    (folder / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        benchmark(name).items(tmp_path)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_that_is_none(tmp_path, name):
    with pytest.raises(DataError, match="nothing"):
        benchmark(name).items(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "file", "old"),
    [
        ("gqa", "llava_gqa_testdev_balanced.jsonl", '"image": "n161313.jpg"'),
        ("sqa", "llava_test_CQM-A.json", '"image": "5/image.png"'),
        ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", '"image": "003a8ae2ef43b901.jpg"'),
        ("pope", "llava_pope_test.jsonl", '"image": "COCO_val2014_000000310196.jpg"'),
        ("mme", "llava_mme.jsonl", '"image": "existence/000000006040.jpg"'),
        ("digits", "test.json", '"image": "images/test-00000.png"'),
        ("own", "questions.jsonl", '"image": "pictures/0.png"'),
    ],
)
@pytest.mark.parametrize("path", ["../../../etc/passwd", "/etc/passwd", "https://example.org/x.png"])
def test_no_picture_outside_the_folder(made, tmp_path, name, file, old, path):
    folder = copied(made, tmp_path, name)
    change(folder / file, old, f'"image": "{path}"')
    if name == "pope":
        for split in ("adversarial", "popular", "random"):
            change(folder / "coco" / f"coco_pope_{split}.json", old, f'"image": "{path}"')
    with pytest.raises(DataError, match=r"outside the image root|is an address"):
        benchmark(name).items(tmp_path)


def test_no_answers_outside_the_folder(made, tmp_path):
    folder = copied(made, tmp_path, "mme")
    change(folder / "llava_mme.jsonl", '"question_id": "existence/', '"question_id": "../')
    with pytest.raises(DataError, match="outside the image root"):
        benchmark("mme").items(tmp_path)


def test_no_labels_outside_the_folder(made, tmp_path):
    # The category names the file of labels, and was put into its path as it is.
    folder = copied(made, tmp_path, "pope")
    (folder / "coco" / "coco_pope_x").mkdir()
    shutil.copy(folder / "coco" / "coco_pope_random.json", tmp_path / "elsewhere.json")
    change(folder / "llava_pope_test.jsonl", '"category": "random"', '"category": "x/../../../elsewhere"')
    with pytest.raises(DataError, match=r"line 17: category 'x/.*accepted: adversarial, popular, random"):
        benchmark("pope").items(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gqa", "llava_gqa_testdev_balanced.jsonl"),
        ("textvqa", "llava_textvqa_val_v051_ocr.jsonl"),
        ("pope", "llava_pope_test.jsonl"),
        ("mme", "llava_mme.jsonl"),
        ("mmbench", "mmbench_dev_20230712.tsv"),
        ("own", "questions.jsonl"),
    ],
)
def test_a_question_that_stands_twice(made, tmp_path, name, file):
    folder = copied(made, tmp_path, name)
    lines = (folder / file).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / file).write_text("".join([*lines, lines[-1]]), encoding="utf-8")
    with pytest.raises(DataError, match="stands in"):
        benchmark(name).items(tmp_path)


# --- other versions ---------------------------------------------------------------------------------------------------


def test_gqa_with_the_answers_of_another_split(made, tmp_path):
    folder = copied(made, tmp_path, "gqa")
    change(folder / "data" / "testdev_balanced_questions.json", '"201640614"', '"0999"')
    with pytest.raises(DataError, match=r"line 2: question '201640614' is not in .*6 questions.*questions1\.2\.zip"):
        benchmark("gqa").items(tmp_path)


@pytest.mark.parametrize("groups", [[1], "animal", 3])
def test_gqa_with_groups_of_another_form(made, tmp_path, groups):
    folder = copied(made, tmp_path, "gqa")
    change(folder / "data" / "testdev_balanced_questions.json", '{"global": "animal"}', json.dumps(groups))
    with pytest.raises(DataError, match=r"question '202225915': 'groups' is .*an object is accepted"):
        benchmark("gqa").items(tmp_path)


def test_pope_s_later_labels_are_joined_by_picture_and_object(made, tmp_path):
    """The repository's later random split has 90 more labels, in between."""
    folder = copied(made, tmp_path, "pope")
    path = folder / "coco" / "coco_pope_random.json"
    lines = path.read_text().splitlines(keepends=True)
    extra = json.dumps(
        {"question_id": 9, "image": "COCO_val2014_1.jpg", "text": "Is there a bed in the image?", "label": "no"}
    )
    path.write_text("".join([*lines[:1], extra + "\n", *lines[1:]]).replace("imange", "image"))
    task = benchmark("pope")
    items = task.items(tmp_path)
    report = task.score(items, made[1]["pope"])
    assert report.metrics["f1"].score == 100
    assert any("coco_pope_random.json holds 9 labels for 8 questions" in note for note in report.notes)
    by_order = task.score(items, made[1]["pope"], strict_original=True)
    assert by_order.metrics["random accuracy"].score < 50
    assert by_order.metrics["popular accuracy"].score == 100


def test_pope_with_labels_of_other_questions(made, tmp_path):
    folder = copied(made, tmp_path, "pope")
    change(folder / "coco" / "coco_pope_random.json", "a snowboard", "a surfboard")
    with pytest.raises(
        DataError, match=r"coco_pope_random\.json has no label for .*holds 8 labels, there are 8 random questions.*e3e3"
    ):
        benchmark("pope").items(tmp_path)


def test_pope_with_labels_that_contradict_each_other(made, tmp_path):
    folder = copied(made, tmp_path, "pope")
    path = folder / "coco" / "coco_pope_random.json"
    first = path.read_text().splitlines()[0]
    path.write_text(path.read_text() + first.replace('"yes"', '"no"') + "\n")
    with pytest.raises(DataError, match=r"line 9: 'snowboard' in .* is labelled yes and no"):
        benchmark("pope").items(tmp_path)
    change(path, '"label": "no"', '"label": "No"')
    with pytest.raises(DataError, match="the label is 'No'; 'yes' and 'no' are accepted"):
        benchmark("pope").items(tmp_path)


def test_files_beside_pope_s_labels_do_not_matter(made, tmp_path):
    folder = copied(made, tmp_path, "pope")
    (folder / "coco" / ".DS_Store").write_bytes(b"\0")
    assert len(benchmark("pope").items(tmp_path)) == 24


def test_mme_without_the_second_question_of_a_picture(made, tmp_path):
    folder = copied(made, tmp_path, "mme")
    lines = (folder / "llava_mme.jsonl").read_text().splitlines(keepends=True)
    (folder / "llava_mme.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=r"code_reasoning/0020\.png has 1 question\(s\); each has 2"):
        benchmark("mme").items(tmp_path)


def test_mme_with_a_category_of_another_benchmark(made, tmp_path):
    folder = copied(made, tmp_path, "mme")
    change(folder / "llava_mme.jsonl", '"code_reasoning/', '"code/')
    shutil.move(
        folder / "MME_Benchmark_release_version" / "code_reasoning", folder / "MME_Benchmark_release_version" / "code"
    )
    with pytest.raises(DataError, match="category 'code'; accepted: existence, "):
        benchmark("mme").items(tmp_path)


def test_mme_without_answers_or_with_others(made, tmp_path):
    folder = copied(made, tmp_path, "mme")
    truth = folder / "MME_Benchmark_release_version" / "artwork" / "questions_answers_YN" / "10002.txt"
    change(truth, "Is this artwork", "Was this artwork")
    with pytest.raises(
        DataError, match=r"'Is this artwork, image 0\?' is none of the questions about artwork/images/10002\.jpg"
    ):
        benchmark("mme").items(tmp_path)
    change(truth, "\tYes", "\tPerhaps")
    with pytest.raises(DataError, match=r"10002\.txt, line 1: .*Yes or No"):
        benchmark("mme").items(tmp_path)
    truth.unlink()
    with pytest.raises(DataError, match=r"10002\.txt nor .* exists; .*BradyFU"):
        benchmark("mme").items(tmp_path)
    shutil.rmtree(folder / "MME_Benchmark_release_version")
    with pytest.raises(DataError, match=r"MME_Benchmark_release_version does not exist.*BradyFU"):
        benchmark("mme").items(tmp_path)


def test_mmbench_of_another_version(tmp_path):
    answers = folders.mmbench_folder(tmp_path, "mmbench_dev_en_20231003.tsv")
    with pytest.raises(
        DataError, match=r"20230712\.tsv does not exist; found mmbench_dev_en_20231003\.tsv there; it comes from http"
    ):
        benchmark("mmbench").items(tmp_path)
    task = benchmark("mmbench")
    items = task.items(tmp_path / "mmbench" / "mmbench_dev_en_20231003.tsv")
    report = task.score(items, answers)
    assert any("mmbench_dev_en_20231003.tsv, not of mmbench_dev_20230712.tsv" in note for note in report.notes)


def test_mmbench_in_chinese_asks_in_chinese(tmp_path):
    folders.mmbench_folder(tmp_path, "mmbench_dev_cn_20231003.tsv")
    items = benchmark("mmbench").items(tmp_path / "mmbench" / "mmbench_dev_cn_20231003.tsv")
    assert all(item.text.endswith("\n请直接回答选项字母。") for item in items)


def rewrite_mmbench(folder: Path, **columns: str) -> None:
    """Put a value into columns (by name, `_` for `-`) of the first row."""
    import csv

    path = folder / "mmbench_dev_20230712.tsv"
    with path.open(newline="", encoding="utf-8") as file:
        header, first, *rest = csv.reader(file, delimiter="\t")
    for name, value in columns.items():
        first[header.index(name.replace("_", "-"))] = value
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, first, *rest])


def test_mmbench_of_a_split_without_answers(made, tmp_path):
    rewrite_mmbench(copied(made, tmp_path, "mmbench"), answer="")
    with pytest.raises(DataError, match=r"row 1, index 241: the answer is ''; a letter of ABCD"):
        benchmark("mmbench").items(tmp_path)


def test_mmbench_pictures_by_the_index_of_another_row(made, tmp_path):
    folder = copied(made, tmp_path, "mmbench")
    rewrite_mmbench(folder, image="1000241")
    first, *_ = benchmark("mmbench").items(tmp_path)
    assert open_picture(first.images[0], first.place).getpixel((0, 0)) == (241, 120, 30)
    rewrite_mmbench(folder, image="7")
    with pytest.raises(DataError, match="row 1, index 241: no image in column image"):
        benchmark("mmbench").items(tmp_path)


def test_a_broken_picture_of_mmbench_is_an_error_not_its_neighbour(made, tmp_path):
    folder = copied(made, tmp_path, "mmbench")
    for image in ("iVBORw0KGgo" * 9, "A" * 101, "\u00e9" * 99):
        rewrite_mmbench(folder, image=image)
        first, *_ = items = benchmark("mmbench").items(tmp_path)
        with pytest.raises(DataError, match=r"row 1, index 241.*cannot be read"):
            open_picture(first.images[0], first.place)
    # Scores need a digest of the images.
    with pytest.raises(DataError, match=r"row 1, index 241.*cannot be read"):
        questions_digest(items)


def test_mmbench_with_an_index_that_is_none(made, tmp_path):
    folder = copied(made, tmp_path, "mmbench")
    for index in ("x", "-1", "241.0", "9" * 5000):
        change(folder / "mmbench_dev_20230712.tsv", "\n241\t", f"\n{index}\t")
        with pytest.raises(DataError, match=r"the index is .*a whole number"):
            benchmark("mmbench").items(tmp_path)
        change(folder / "mmbench_dev_20230712.tsv", f"\n{index}\t", "\n241\t")


def test_an_option_that_reads_none_ends_the_prompt_s_options_as_in_the_original(made, tmp_path):
    rewrite_mmbench(copied(made, tmp_path, "mmbench"), B="None", l2_category="")
    first, *_ = benchmark("mmbench").items(tmp_path)
    assert "\nA. a cat\nAnswer with" in first.text
    assert first.reference["choices"] == {"A": "a cat", "C": "a bird", "D": "a fish"}
    assert first.kind == ""


def test_mmbench_without_a_column(tmp_path):
    (tmp_path / "mmbench").mkdir()
    (tmp_path / "mmbench" / "mmbench_dev_20230712.tsv").write_text("index\tquestion\tA\n1\tx\ty\n")
    with pytest.raises(DataError, match=r"no column B, answer, image \(found index, question, A\)"):
        benchmark("mmbench").items(tmp_path)


def test_scienceqa_s_files_have_to_fit(made, tmp_path):
    folder = copied(made, tmp_path, "sqa")
    change(folder / "pid_splits.json", '"20"', '"20", "99"')
    with pytest.raises(
        DataError, match=r"1 of the 5 questions of .*pid_splits\.json are not in it \(the first: '99'\)"
    ):
        benchmark("sqa").items(tmp_path)
    change(folder / "pid_splits.json", '"20", "99"', '"99"')
    with pytest.raises(DataError, match=r"record 4: question '20' is not in .*pid_splits\.json"):
        benchmark("sqa").items(tmp_path)
    change(folder / "problems.json", '"11":', '"12":')
    with pytest.raises(DataError, match=r"record 2: question '11' is not in .*problems\.json"):
        benchmark("sqa").items(tmp_path)
    change(folder / "problems.json", '"answer": 1', '"answer": 7')
    with pytest.raises(DataError, match=r"problems\.json, question '5': choices .* and answer 7"):
        benchmark("sqa").items(tmp_path)


def test_textvqa_s_files_have_to_fit(made, tmp_path):
    folder = copied(made, tmp_path, "textvqa")
    annotations = folder / "TextVQA_0.5.1_val.json"
    change(annotations, "What time is it?", "What time was it?")
    with pytest.raises(DataError, match=r"line 3: 'what time is it\?' about image '00c359f294f7dcd9' is not in"):
        benchmark("textvqa").items(tmp_path)
    rows = json.loads(annotations.read_text())
    rows["data"][1]["answers"] = rows["data"][1]["answers"][:9]
    annotations.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"question 2: 9 answers; 10 texts are accepted"):
        benchmark("textvqa").items(tmp_path)
    del rows["data"][0]["answers"]
    annotations.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"question 1: no answers; .*test split"):
        benchmark("textvqa").items(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What?\nReference OCR token: A, B\nAnswer.", "what?"),
        ("Reference OCR token: A, B\nWhat?\nAnswer.", "what?"),
        ("What?\nAnswer.", "what?"),
        ("OCR tokens: A, B\nx. Question: What\nnow? Short answer:", "what\nnow?"),
        ("What?", None),
        ("a\nb\nc\nd", None),
        ("a\nb\nc", None),
        ("OCR tokens: A. Question: What?", None),
    ],
)
def test_textvqa_s_question_inside_a_prompt(prompt, question):
    if question is None:
        with pytest.raises(DataError, match=r"line 7: the prompt .* has none of the forms"):
            question_of(prompt, "line 7")
    else:
        assert question_of(prompt, "line 7") == question


# --- one's own --------------------------------------------------------------------------------------------------------


def own(tmp_path: Path, *records: dict, name: str = "questions.jsonl") -> Path:
    folders.write_lines(tmp_path / name, records)
    return tmp_path / name


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q", "answer": "a"}, r"line 1: 'id' is missing \(found question, answer\)"),
        ({"id": 1, "question": "q"}, "neither of 'answer' and 'answers'"),
        ({"id": 1, "question": "q", "answer": "a", "answers": ["b"]}, "answer and answers of"),
        ({"id": 1, "question": "q", "answers": []}, "'answers' is empty"),
        ({"id": 1, "question": "q", "answers": ["a", " "]}, "holds an empty text"),
        ({"id": 1, "question": "q", "answer": {"x": 1}}, "'answer' is .*text is accepted"),
        ({"id": 1, "question": "<image>\nq", "answer": "a"}, "<image> in the question"),
        ({"id": 1, "question": "q", "answr": "a"}, "unknown field 'answr'.*did you mean 'answer'"),
        ({"id": 1, "question": "q", "answer": "a", "scorer": "anl"}, "no scorer is named 'anl'.*did you mean 'anls'"),
        (
            {"id": 1, "question": "q", "answer": "two", "scorer": "numeric"},
            "line 1: numeric: the reference 'two' holds 0",
        ),
        ({"id": 1, "question": "q", "answer": "a", "image": "x.png", "images": ["y.png"]}, "image and images"),
    ],
)
def test_records_of_one_s_own_that_cannot_be_used(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        benchmark("own").items(own(tmp_path, record))


def test_numbers_of_one_s_own_are_text(tmp_path):
    # A reference with decimals was refused as no text, although `numeric` is made for it.
    folder = own(tmp_path, {"id": 1, "question": "q", "answers": [4.5, 3, "2"], "scorer": "numeric"})
    task = benchmark("own")
    (item,) = items = task.items(folder)
    assert item.reference["answers"] == ["4.5", "3", "2"]
    assert task.score(items, {"1": "about 4.5 m"}).metrics["score"].score == 100
    for value in (float("nan"), float("inf"), True, None):
        with pytest.raises(DataError, match="'answers' is "):
            task.items(own(tmp_path, {"id": 1, "question": "q", "answers": [value]}))


def test_the_file_of_one_s_own_is_found(tmp_path):
    record = {"id": "a", "question": "q", "answer": "x"}
    own(tmp_path, record, name="mine.jsonl")
    assert [item.id for item in benchmark("own").items(tmp_path)] == ["a"]
    own(tmp_path, record, name="other.jsonl")
    with pytest.raises(DataError, match=r"2 \.jsonl files \(mine\.jsonl, other\.jsonl\)"):
        benchmark("own").items(tmp_path)
    assert len(benchmark("own").items(tmp_path / "other.jsonl")) == 1


# --- names ------------------------------------------------------------------------------------------------------------


def test_an_unknown_benchmark():
    with pytest.raises(ConfigError, match=r"no benchmark is named 'mmbnch'; accepted: gqa, .*; did you mean 'mmbench'"):
        benchmark("mmbnch")
    with pytest.raises(
        ConfigError, match=r"accepted: gqa, sqa, textvqa, pope, mme, mmbench, digits, digits_validation, own$"
    ):
        benchmark("zzz")
    with pytest.raises(ConfigError, match="no benchmark is named 'gqa:anls'"):
        benchmark("gqa:anls")
    with pytest.raises(ConfigError, match=r"no scorer is named 'anl'; .*did you mean 'anls'"):
        benchmark("own:anl")
    with pytest.raises(ConfigError, match="did you mean 'pope'"):
        benchmark("POPE")


def test_names_are_those_of_the_classes():
    for name in BENCHMARKS:
        assert benchmark(name).name == name
