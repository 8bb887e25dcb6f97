"""A model answers training records; its file is training data, and takes the place of a recipe's own responses."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from align_ti.cli import app
from align_ti.config import Data, Evaluation, Generation, Recipe, Source, Teacher
from align_ti.data.answers import Answers, Key, Made, begun, key_of, own_generator, prompt_digest, takes_teacher
from align_ti.data.answers import answered as with_answer
from align_ti.data.conversation import IMAGE_TAG, Conversation, Turn
from align_ti.data.mixing import read_mixture
from align_ti.data.records import with_line_ends, without_line_ends
from align_ti.data.roles import RESPONSE
from align_ti.data.sources import Refused, image_root, read_conversations, read_source
from align_ti.digits.files import copy_model
from align_ti.errors import ConfigError, DataError, InterruptedRunError, RunError
from align_ti.evaluation.chat import Chat
from align_ti.evaluation.generation import OwnDraws, answer_records, asking_order
from align_ti.evaluation.runner import answer
from align_ti.evaluation.tasks import Question, question
from align_ti.models.loading import load_model, load_processor
from align_ti.pipeline.checking import check_recipe
from align_ti.pipeline.generating import generate_answers, made_by
from align_ti.pipeline.records import training_data
from align_ti.pipeline.training import distil
from align_ti.runs import RunFolder, read_json
from tests import family_processors, small
from tests.test_family_chain import records as family_records
from tests.test_family_chain import tiny_model

GREEDY = Generation(batch_size=5, max_new_tokens=40)
DRAWN = Generation(batch_size=5, max_new_tokens=6, temperature=1.0, top_p=0.98, seed=3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The shipped teacher, which says something and stops; random models; the benchmark's records and some of other shapes."""
    path = tmp_path_factory.mktemp("answers")
    small.write_pair(path)
    small.write_records(path)
    # The shipped teacher is right about all of them; so gold and its answers would be the same.
    records = json.loads((path / "train.json").read_text())
    for record in records:
        record["conversations"][1]["value"] = f"gold {record['id']}"
    (path / "train.json").write_text(json.dumps(records))
    copy_model("teacher", path / "able")
    human, gpt = ({"from": name} for name in ("human", "gpt"))
    shapes = [
        {
            "id": "turns",
            "image": "train-0.png",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {**human, "value": "<image>\nHow many digits are red?"},
                {**gpt, "value": "gold one"},
                {**human, "value": "Read all digits."},
                {**gpt, "value": "gold two"},
            ],
        },
        {"id": "text", "conversations": [{**human, "value": "How many?"}, {**gpt, "value": "gold three"}]},
        {
            "id": "later",
            "image": ["train-1.png", "train-2.png"],
            "conversations": [
                {**human, "value": "What colour is the digit at the top left?\n<image>"},
                {**gpt, "value": "gold four"},
                {**human, "value": "And here?\n\n<image>"},
                {**gpt, "value": "gold five"},
            ],
        },
        {"id": "asked", "image": "train-0.png", "conversations": [{**human, "value": "<image>Read all digits."}]},
    ]
    (path / "shapes.json").write_text(json.dumps(shapes))
    return path


def able(folder: Path) -> Teacher:
    return Teacher(path=str(folder / "able"), dtype="float32")


def babbling(folder: Path) -> Teacher:
    """A random model: drawn from, it is cut or says nothing."""
    return Teacher(path=str(folder / "teacher"), dtype="float32")


@pytest.fixture(scope="module")
def answered(folder) -> Path:
    """The benchmark's records, answered greedily."""
    out = folder / "answers.jsonl"
    made = generate_answers(able(folder), folder / "train.json", out, GREEDY)
    assert (made.records, made.lines, made.cut, made.left_out, made.images) == (12, 12, 0, (), None)
    return out


def recipe(folder: Path, **data: object) -> Recipe:
    data.setdefault("train", str(folder / "train.json"))
    return Recipe.model_validate(small.recipe(folder, data=data))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(conversation: Conversation) -> list[str]:
    return [turn.text for turn in conversation.turns if turn.speaker == "assistant"]


def id_of(conversation: Conversation) -> str:
    """The id of a record of shapes.json, read from there or from its answer."""
    return next(name for name in ("turns", "text", "later", "asked") if f"'{name}'" in conversation.place)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_each_record_alone_and_the_file_is_training_data(folder, answered):
    model, processor = load_model(str(folder / "able"), "float32"), load_processor(str(folder / "able"))
    gold = {one.place: one for one in read_conversations(folder / "train.json")}
    written = read_conversations(answered)
    assert len(written) == len(gold)
    for line, one in zip(lines_of(answered), written, strict=True):
        record = gold[f"{folder / 'train.json'}, {line['generated']['record']}"]
        alone = answer(model, processor, [question(record)], Evaluation(batch_size=1, max_new_tokens=40))
        assert one.turns == (record.turns[0], Turn("assistant", alone[0][0]))
        assert (one.images, one.kind) == (record.images, record.kind)
        assert not line["generated"]["cut"] and line["id"] == f"train.json, {line['generated']['record']}"
    data, story = training_data(recipe(folder, train=str(answered)), processor)
    assert story["used"] == 12 and story["responses"] == {"gold": 12, "teacher": 0, "without_answer": 0}
    assert (data[0]["roles"] == RESPONSE).any()


def test_batches_change_nothing(folder, answered):
    out = folder / "one-by-one.jsonl"
    generate_answers(able(folder), folder / "train.json", out, GREEDY.model_copy(update={"batch_size": 1}))
    assert out.read_bytes() == answered.read_bytes()


def test_turns_pictures_and_system_turns_stay_and_every_answer_follows_the_models_own(folder):
    out = folder / "shapes.jsonl"
    generate_answers(able(folder), folder / "shapes.json", out, GREEDY)
    model, processor = load_model(str(folder / "able"), "float32"), load_processor(str(folder / "able"))
    by_id = {id_of(one): one for one in read_conversations(folder / "shapes.json")}
    found = {id_of(one): one for one in read_conversations(out)}
    assert set(found) == set(by_id)
    for name, record in by_id.items():
        asked = [turn for turn in record.turns if turn.speaker != "assistant"]
        assert [turn for turn in found[name].turns if turn.speaker != "assistant"] == asked
        assert found[name].images == record.images
        turns: tuple[Turn, ...] = ()
        for turn in asked:
            turns = (*turns, turn)
            if turn.speaker == "user":
                shown = sum(one.text.count(IMAGE_TAG) for one in turns)
                part = Question(Conversation(turns, record.images[:shown]), "", "", "")
                [(said, _)] = answer(model, processor, [part], Evaluation(batch_size=1, max_new_tokens=40))
                turns = (*turns, Turn("assistant", said))
        assert found[name].turns == turns
    # A conversation as people have it, which remembers by itself.
    chat = Chat(model, processor, (folder / "train-0.png",), max_new_tokens=40)
    assert len(found["asked"].turns) == 2 and chat.ask("Read all digits.")[0] == found["asked"].turns[1].text


@given(st.lists(st.sampled_from([IMAGE_TAG, "\n", "\r\n", "\r", "a"]), max_size=9).map("".join))
def test_line_ends_beside_pictures_survive_writing_and_reading(text):
    assert without_line_ends(with_line_ends(text)) == text


def test_pictures_are_named_from_the_image_root_wherever_the_file_is(folder, tmp_path):
    records = json.loads((folder / "train.json").read_text())[:3]
    # An absolute name, a way round, and a link inside the root.
    records[0]["image"] = str(folder / "train-0.png")
    records[1]["image"] = "sub/../train-0.png"
    (folder / "sub").mkdir()
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = Source(path=str(tmp_path / "data.json"), images=str(folder))
    out = tmp_path / "deep" / "answers.jsonl"
    made = generate_answers(babbling(folder), source, out, DRAWN.model_copy(update={"temperature": 1.5, "seed": 1}))
    assert made.lines == 3 and made.images == folder
    assert {line["image"] for line in lines_of(out)} == {"train-0.png"}
    assert all(one.images[0].is_file() for one in read_conversations(out, folder))
    with pytest.raises(DataError, match=r"train-0\.png does not exist"):
        read_conversations(out)[0].check_files()


def table(folder: Path, path: Path, count: int = 3) -> None:
    content = (folder / "train-0.png").read_bytes()
    turns = [{"from": "human", "value": "<image>Read all digits."}, {"from": "gpt", "value": "gold"}]
    rows = [{"image": {"bytes": content, "path": None}, "conversations": turns} for _ in range(count)]
    datasets.Dataset.from_list(rows).to_parquet(path)


def test_pictures_inside_a_table_are_written_beside_the_file_as_they_are(folder, tmp_path):
    table(folder, tmp_path / "data.parquet")
    out = tmp_path / "answers.jsonl"
    made = generate_answers(able(folder), tmp_path / "data.parquet", out, GREEDY)
    assert made.lines == 3 and made.images is None
    (picture,) = {one.images[0] for one in read_conversations(out)}
    assert picture.parent == tmp_path / "answers-pictures" and picture.suffix == ".png"
    assert picture.read_bytes() == (folder / "train-0.png").read_bytes()
    mixture = read_mixture(Data(train=str(tmp_path / "data.parquet"), responses="teacher", answers=str(out)))
    assert [texts(one) for one in mixture.conversations] == [texts(one) for one in read_conversations(out)]
    # Another image in the table: the words are the same, the answer is not.
    content = (folder / "train-1.png").read_bytes()
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "data.parquet"), split="train").to_list()
    rows[1]["image"]["bytes"] = content
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"row 2: the answer in .*line 2 is to other text or images"):
        read_mixture(Data(train=str(tmp_path / "data.parquet"), responses="teacher", answers=str(out)))


def test_sources_with_answers_have_names_of_their_own(folder, answered, tmp_path):
    # Answers are found by the file's name: one that had no answer took the other's.
    (tmp_path / "train.json").write_text((folder / "train.json").read_text())
    sources = [{"path": str(at / "train.json"), "images": str(folder)} for at in (folder, tmp_path)]
    with pytest.raises(DataError, match="have the same; a name of its own"):
        read_mixture(Data(train=sources, responses="teacher", answers=str(folder / "answers.jsonl")))


def test_pictures_of_two_kinds_in_one_source_are_refused(folder, tmp_path):
    content = (folder / "train-0.png").read_bytes()
    turns = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
    rows = [
        {"image": {"bytes": inside, "path": name}, "conversations": turns}
        for inside, name in ((content, None), (None, "a.png"))
    ]
    (tmp_path / "a.png").write_bytes(content)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"row 2 names a file as its image, .*row 1 holds the bytes"):
        generate_answers(able(folder), tmp_path / "data.parquet", tmp_path / "answers.jsonl", GREEDY)
    assert not (tmp_path / "answers.jsonl").exists()


# --- stopped and gone on with -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(folder) -> Path:
    """Drawn answers of the random model, some of them empty."""
    out = folder / "drawn.jsonl"
    made = generate_answers(babbling(folder), folder / "train.json", out, DRAWN)
    assert made.records == 12 and 4 <= made.lines <= 11 and made.lines + len(made.left_out) == 12
    assert 0 < made.cut <= made.lines and all("is empty" in one.reason for one in made.left_out)
    return out


def keys_in_order(source: Path) -> list[Key]:
    records = read_conversations(source)
    return [key_of(records[index], Source(path=str(source))) for index in asking_order(records)]


def test_a_file_cut_at_any_byte_keeps_its_whole_lines(folder, drawn, tmp_path):
    content, order, out = drawn.read_bytes(), keys_in_order(folder / "train.json"), tmp_path / "drawn.jsonl"
    made = made_by(babbling(folder), DRAWN)
    whole = [order.index(Key(*(line["generated"][name] for name in Key._fields))) for line in lines_of(drawn)]
    for stop in range(0, len(content) + 1, 7):
        out.write_bytes(content[:stop])
        found = begun(out, order, made)
        lines = content[:stop].count(b"\n")
        assert found.lines == lines and found.position == (whole[lines - 1] + 1 if lines else 0)
        assert out.read_bytes() == b"".join(content.splitlines(keepends=True)[:lines])


@pytest.mark.parametrize("name", ["answers", "drawn"])
def test_a_killed_command_goes_on_to_the_same_file(folder, answered, drawn, tmp_path, name):
    whole, settings, model = (answered, GREEDY, able(folder)) if name == "answers" else (drawn, DRAWN, babbling(folder))
    content, out, seen = whole.read_bytes(), tmp_path / f"{name}.jsonl", []
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    # Before the first line, inside it, at its end, inside and at the end of a batch, before the last line end, at the end.
    for stop in (0, 5, ends[0] - 1, ends[0], ends[2] + 300, ends[-2], ends[-1] - 1, ends[-1]):
        out.write_bytes(content[:stop])
        seen.clear()
        made = generate_answers(
            model, folder / "train.json", out, settings, advance=lambda done, total: seen.append(done)
        )
        assert out.read_bytes() == content, stop
        assert made.lines == len(ends) and seen == sorted(seen) and seen[-1] == 12
        assert (seen[0] > 0) == (stop >= ends[0])


def test_draws_are_each_records_own(folder, drawn, tmp_path):
    for size in (1, 12):
        out = tmp_path / f"{size}.jsonl"
        generate_answers(babbling(folder), folder / "train.json", out, DRAWN.model_copy(update={"batch_size": size}))
        assert out.read_bytes() == drawn.read_bytes()
    generate_answers(
        babbling(folder), folder / "train.json", tmp_path / "4.jsonl", DRAWN.model_copy(update={"seed": 4})
    )
    other = {line["id"]: line["conversations"] for line in lines_of(tmp_path / "4.jsonl")}
    same = {line["id"]: line["conversations"] for line in lines_of(drawn)}
    assert other != same and other.keys() & same.keys()


def test_ctrl_c_keeps_what_is_written(folder, answered, tmp_path):
    out = tmp_path / "answers.jsonl"

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="stopped after 5 of 12 records"):
        generate_answers(able(folder), folder / "train.json", out, GREEDY, advance=stop)
    assert len(lines_of(out)) == 5
    generate_answers(able(folder), folder / "train.json", out, GREEDY)
    assert out.read_bytes() == answered.read_bytes()


def test_a_second_writer_is_noticed(folder, answered, tmp_path):
    # A command that was started again while its first process still ran: the lines of both came into one file, out of turn.
    out = tmp_path / "answers.jsonl"

    def meanwhile(done: int, total: int) -> None:
        if done == 5:
            other = tmp_path / "other.jsonl"
            generate_answers(able(folder), folder / "train.json", other, GREEDY)
            out.write_bytes(other.read_bytes())

    with pytest.raises(RunError, match="one process may write to it at a time"):
        generate_answers(able(folder), folder / "train.json", out, GREEDY, advance=meanwhile)
    assert out.read_bytes() == answered.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes\n", "no line of `align-ti generate`"),
        (b"my notes", "no line of `align-ti generate`"),
        (b'{"id": 1, "conversations": []}\n', "no line of `align-ti generate`"),
        (b'{"generated": {"model": "m"}}\n{"generated"', "line 1: the file has answers with other settings"),
    ],
)
def test_a_file_that_is_not_its_own_is_left_as_it_is(folder, tmp_path, content, message):
    out = tmp_path / "answers.jsonl"
    out.write_bytes(content)
    with pytest.raises(RunError, match=message):
        generate_answers(able(folder), folder / "train.json", out, GREEDY)
    assert out.read_bytes() == content


def test_answers_made_otherwise_or_to_other_data_are_not_mixed_in_one_file(folder, answered, tmp_path):
    out = tmp_path / "answers.jsonl"
    shutil.copy(answered, out)
    before = out.read_bytes()
    longer = GREEDY.model_copy(update={"max_new_tokens": 41})
    for teacher, source, settings, message in (
        (
            babbling(folder),
            folder / "train.json",
            GREEDY,
            "with other settings .model is .*able' there and .*teacher' here",
        ),
        (able(folder), folder / "train.json", longer, "max_new_tokens is 40 there and 41 here"),
        (able(folder), folder / "train.json", DRAWN, "temperature is 0.0 there and 1.0 here; seed is None there and 3"),
        (
            able(folder),
            folder / "shapes.json",
            GREEDY,
            "belongs to record .* of train.json, but that record is missing, changed",
        ),
    ):
        with pytest.raises(RunError, match=message):
            generate_answers(teacher, source, out, settings)
    records = json.loads((folder / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records[1:]))
    source = Source(path=str(tmp_path / "train.json"), images=str(folder))
    with pytest.raises(RunError, match="the data changed after generation"):
        generate_answers(able(folder), source, out, GREEDY)
    assert out.read_bytes() == before
    # What has no effect on answers does not matter: the size of batches, the folder, the seed of no draw.
    (tmp_path / "train.json").write_text(json.dumps(records))
    generate_answers(able(folder), source, out, GREEDY.model_copy(update={"batch_size": 3, "seed": 9}))
    assert out.read_bytes() == before


def test_bad_records_stop_the_command_or_are_left_out(folder, tmp_path):
    records = json.loads((folder / "train.json").read_text())[:4]
    records[1]["image"] = "broken.png"
    (folder / "broken.png").write_bytes(b"no image")
    records[2]["conversations"] = []
    (tmp_path / "bad.json").write_text(json.dumps(records))
    source, out = Source(path=str(tmp_path / "bad.json"), images=str(folder)), tmp_path / "bad.jsonl"
    with pytest.raises(DataError, match=r"record 3, id 2: no turns found"):
        generate_answers(able(folder), source, out, GREEDY)
    skip = GREEDY.model_copy(update={"on_bad_record": "skip"})
    made = generate_answers(able(folder), source, out, skip)
    assert (made.records, made.lines) == (4, 2)
    assert sorted(one.place.partition(", ")[2] for one in made.left_out) == ["record 2, id 1", "record 3"]
    assert any("broken.png cannot be read" in one.reason for one in made.left_out)
    (tmp_path / "bad.json").write_text(json.dumps([records[0], records[1]]))
    with pytest.raises(DataError, match=r"record 2, id 1: image .*broken\.png cannot be read"):
        generate_answers(able(folder), source, tmp_path / "other.jsonl", GREEDY)
    with pytest.raises(ConfigError, match=r"ends in \.jsonl"):
        generate_answers(able(folder), source, tmp_path / "other.json", GREEDY)


def test_an_answer_with_special_words_is_no_response(folder, monkeypatch):
    # Read as training data, such words are refused; a second turn could not be asked behind them.
    monkeypatch.setattr(
        "align_ti.evaluation.generation.said", lambda model, processor, samples, limit, choose: [("so <|end|>", False)]
    )
    processor = load_processor(str(folder / "able"))
    record = read_conversations(folder / "shapes.json")[0]
    [found] = answer_records(load_model(str(folder / "able")), processor, [record], [Key("a", "b", "c")], GREEDY)
    assert isinstance(found, Refused) and "'<|end|>'" in found.reason and "as the model answers it" in found.reason


# --- draws ------------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.29, 0.01])
    count = 2000
    numbers = torch.tensor([[(index + 0.5) / count] for index in range(count)], dtype=torch.float64)
    scores = probabilities.log().expand(count, -1)
    drawn = OwnDraws(numbers)(torch.zeros(count, 1, dtype=torch.long), scores).argmax(-1)
    counts = Counter(drawn.tolist())
    assert all(abs(counts[token] - p * count) <= 1 for token, p in enumerate(probabilities.tolist()))
    # The edges draw what has probability, and each step has its own number.
    edges = OwnDraws(torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64))
    steps = [edges(torch.zeros(1, 1, dtype=torch.long), scores[:1]).argmax().item() for _ in range(2)]
    assert steps == [0, 4]


def test_a_sharp_draw_is_greedy_and_top_k_of_one_too(folder, answered, tmp_path):
    for name, options in {"cold": {"temperature": 1e-4}, "one": {"temperature": 2.0, "top_k": 1}}.items():
        out = tmp_path / f"{name}.jsonl"
        generate_answers(
            able(folder), folder / "train.json", out, Generation(batch_size=12, max_new_tokens=40, **options)
        )
        assert [line["conversations"] for line in lines_of(out)] == [
            line["conversations"] for line in lines_of(answered)
        ]


@pytest.mark.parametrize("name", ["idefics3", "gemma3", "qwen2.5-vl", "internvl"])
def test_other_families_answer_in_a_batch_as_alone(name):
    processor = family_processors.FAMILIES[name]()
    model = tiny_model(name, processor, 3)
    model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
    records = family_records()
    keys = [Key("a", str(index), prompt_digest(one)) for index, one in enumerate(records)]
    for settings in (Generation(max_new_tokens=4), Generation(max_new_tokens=4, temperature=0.7, top_k=20)):
        together = answer_records(model, processor, records, keys, settings)
        alone = [
            answer_records(model, processor, [one], [key], settings)[0] for one, key in zip(records, keys, strict=True)
        ]
        assert together == alone
        assert not any(isinstance(one, Refused) for one in together)
    turns = together[0].conversation.turns
    assert [turn.speaker for turn in turns] == ["user", "assistant"] * 2 and turns[2] == records[0].turns[2]


# --- joined -----------------------------------------------------------------------------------------------------------


def test_a_recipe_takes_the_teachers_responses(folder, answered, tmp_path):
    processor, run = load_processor(str(folder / "student")), RunFolder(tmp_path)
    asked = recipe(folder, responses="teacher", answers=str(answered))
    data, story = training_data(asked, processor, run)
    written = {line["generated"]["record"]: line["conversations"][1]["value"] for line in lines_of(answered)}
    gold = read_conversations(folder / "train.json")
    assert len(data) == 12
    for index, (one, before) in enumerate(zip(data.conversations, gold, strict=True)):
        record = before.place.partition(", ")[2]
        assert one.turns == (before.turns[0], Turn("assistant", written[record])) and one.responses == "teacher"
        assert one.images == before.images and f"{before.place}, answered in {answered}, line" in one.place
        learned = data[index]["input_ids"][data[index]["roles"] == RESPONSE]
        assert processor.tokenizer.decode(learned) == f"{written[record]}<|end|>"
    assert read_json(run.data) == story and story["responses"] == {"gold": 0, "teacher": 12, "without_answer": 0}


def test_a_run_learns_from_them_and_its_check_sees_them(folder, answered, tmp_path):
    asked = recipe(folder, responses="teacher", answers=str(answered))
    training = asked.training.model_copy(update={"max_steps": 1})
    run = distil(asked.model_copy(update={"out": str(tmp_path / "run"), "training": training}))
    assert read_json(run.data)["responses"] == {"gold": 0, "teacher": 12, "without_answer": 0}
    found = check_recipe(asked.model_copy(update={"out": str(tmp_path / "check")}))
    said = lines_of(answered)[-1]["conversations"][1]["value"]
    shown = RunFolder(tmp_path / "check").check_page.read_text()
    assert found.renderings and "answered in" in shown and "gold 0" not in shown and said in shown


def test_mixed_responses_are_decided_record_by_record(folder, answered):
    gold = read_conversations(folder / "train.json")
    source = Source(path=str(folder / "train.json"))
    for seed in (0, 1):
        asked = recipe(folder, responses="mixed", answers=str(answered), teacher_share=0.4)
        data, story = training_data(asked.model_copy(update={"seed": seed}), load_processor(str(folder / "student")))
        expected = [takes_teacher(one, source, seed, 0.4) for one in gold]
        assert [one.responses == "teacher" for one in data.conversations] == expected
        assert [one == before for one, before in zip(data.conversations, gold, strict=True)] == [
            not teacher for teacher in expected
        ]
        assert story["responses"] == {"gold": 12 - sum(expected), "teacher": sum(expected), "without_answer": 0}
    for share, name in ((0.0, "gold"), (1.0, "teacher")):
        data, _ = training_data(
            recipe(folder, responses="mixed", answers=str(answered), teacher_share=share),
            load_processor(str(folder / "student")),
        )
        assert {one.responses for one in data.conversations} == {name}


def test_the_share_is_met_and_depends_on_seed_and_record_alone():
    def chosen(seed: int, share: float, path: str = "data/x.json") -> set[int]:
        source = Source(path=path)
        record = Conversation((Turn("user", "Q"), Turn("assistant", "A")))
        places = (replace(record, place=f"{path}, record {index}") for index in range(4000))
        return {index for index, one in enumerate(places) if takes_teacher(one, source, seed, share)}

    some = chosen(0, 0.3)
    # Four standard deviations of a binomial.
    assert abs(len(some) - 1200) < 4 * (4000 * 0.3 * 0.7) ** 0.5
    assert some == chosen(0, 0.3, "elsewhere/x.json") and some < chosen(0, 0.6)
    for other in (chosen(1, 0.3), chosen(0, 0.3, "data/y.json")):
        assert abs(len(some & other) - 360) < 4 * (4000 * 0.09 * 0.91) ** 0.5
    # Fixed for all time: a recipe chooses the same records in every release.
    assert own_generator(7, "x.json", "record 1").random() == pytest.approx(PINNED, abs=0)


PINNED = 0.5604249556787753
"""numpy keeps the streams of its generators; the digest is ours."""


def test_several_sources_take_their_answers_from_several_files(folder, answered, tmp_path):
    out = tmp_path / "shapes.jsonl"
    generate_answers(able(folder), folder / "shapes.json", out, GREEDY)
    sources = [{"path": str(folder / "train.json"), "count": 5}, {"path": str(folder / "shapes.json")}]
    mixture = read_mixture(Data(train=sources, responses="teacher", answers=[str(answered), str(out)]))
    assert [one.responses for one in mixture.conversations] == ["teacher"] * 9
    assert [texts(one) for one in mixture.conversations if "'later'" in one.place] == [
        texts(one) for one in read_conversations(out) if "'later'" in one.place
    ]
    # A record whose gold answer is missing has one now.
    assert len(mixture.conversations[-1].turns) == 2
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(answered.read_bytes() + out.read_bytes())
    again = read_mixture(Data(train=sources, responses="teacher", answers=str(joined)))
    assert [one.turns for one in again.conversations] == [one.turns for one in mixture.conversations]
    with pytest.raises(DataError, match=r"shapes\.json, record 1, id 'turns': no answer in .*, which has 0 answer"):
        read_mixture(Data(train=sources, responses="teacher", answers=str(answered)))


def test_data_that_moved_keep_their_answers_and_data_that_changed_do_not(folder, answered, tmp_path):
    records = json.loads((folder / "train.json").read_text())
    for name in {record["image"] for record in records}:
        shutil.copy(folder / name, tmp_path / name)

    def read(changed: list[dict]) -> list[Conversation]:
        (tmp_path / "train.json").write_text(json.dumps(changed))
        return read_mixture(
            Data(train=str(tmp_path / "train.json"), responses="teacher", answers=str(answered))
        ).conversations

    assert len(read(records)) == 12
    records[3]["conversations"][1]["value"] = "another gold answer, which is not read"
    assert len(read(records)) == 12
    records[3]["conversations"][0]["value"] += " Please."
    with pytest.raises(
        DataError,
        match=r"record 4, id 3: the answer in .*jsonl, line \d+ is to other text or images .*run `align-ti",
    ):
        read(records)
    records[3]["conversations"][0]["value"] = records[3]["conversations"][0]["value"].removesuffix(" Please.")
    records[3]["image"] = "train-2.png"
    with pytest.raises(DataError, match=r"record 4, id 3: the answer in .* is to other text or images"):
        read(records)


def test_cut_and_missing_answers_are_errors_or_left_out_and_counted(folder, drawn, tmp_path):
    def asked(**data: object) -> Recipe:
        return recipe(folder, responses="teacher", answers=str(drawn), **data)

    processor = load_processor(str(folder / "student"))
    with pytest.raises(
        DataError, match=r"record \d+, id \d+: (the answer in .*was cut at the token limit|no answer in)"
    ):
        training_data(asked(), processor)
    with pytest.raises(DataError, match=r"\d+ of 12 records cannot be used, but data\.max_skipped is 0\.01"):
        training_data(asked(on_bad_record="skip"), processor)
    # One whole answer among them.
    first, *others = drawn.read_text(encoding="utf-8").splitlines(keepends=True)
    out = tmp_path / "one.jsonl"
    out.write_text(first.replace('"cut": true', '"cut": false') + "".join(others), encoding="utf-8")
    run = RunFolder(tmp_path / "run")
    some = recipe(folder, responses="teacher", answers=str(out), on_bad_record="skip", max_skipped=12)
    cut = sum(line["generated"]["cut"] for line in lines_of(out))
    data, story = training_data(some, processor, run)
    assert len(data) == 12 - story["responses"]["without_answer"] == story["responses"]["teacher"]
    assert story["skipped"] == story["responses"]["without_answer"] == cut + 12 - len(lines_of(out))
    assert story["sources"][0]["taken"] == len(data) and story["sources"][0]["records"] == 12
    reasons = [json.loads(line)["reason"] for line in run.skipped.read_text().splitlines()]
    assert sum("was cut at the token limit" in reason for reason in reasons) == cut
    assert sum("no answer in" in reason for reason in reasons) == len(reasons) - cut


def test_a_run_goes_on_with_its_own_answers_only(folder, answered, tmp_path):
    processor, run, out = load_processor(str(folder / "student")), RunFolder(tmp_path / "run"), tmp_path / "a.jsonl"
    shutil.copy(answered, out)
    asked = recipe(folder, responses="teacher", answers=str(out), on_bad_record="skip")
    training_data(asked, processor, run)
    training_data(asked, processor, run)
    text = out.read_text(encoding="utf-8")
    said = lines_of(out)[0]["conversations"][1]["value"]
    out.write_text(text.replace(json.dumps(said), json.dumps(said + " Sure."), 1), encoding="utf-8")
    with pytest.raises(RunError, match="the training data have changed"):
        training_data(asked, processor, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], r"line 12: not valid JSON.* resumes an unfinished file"),
        (lambda text: text.replace('"cut"', '"kut"', 1), r"line 1: the record does not say what it answers"),
        (lambda text: text.replace('"record": "', '"record": 1, "x": "', 1), "line 1: the record does not say"),
        (
            lambda text: text + text.splitlines()[0].replace('"gpt", "value": "', '"gpt", "value": "No. ') + "\n",
            r"line 13: another answer to record \d+, id \d+ of train\.json than in .*line 1",
        ),
        (lambda text: '{"conversations": []}\n' + text, "line 1: the record does not say what it answers"),
    ],
)
def test_broken_files_of_answers_are_refused_by_line(answered, tmp_path, change, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(change(answered.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Answers([path])


def test_files_of_another_kind_are_refused(folder, answered, tmp_path):
    with pytest.raises(DataError, match=r"train\.json: data\.answers accepts what `align-ti generate` wrote"):
        Answers([folder / "train.json"])
    with pytest.raises(DataError, match="does not exist"):
        Answers([tmp_path / "none.jsonl"])
    # The same answer twice contradicts nothing.
    assert len(Answers([answered, answered]).found) == 12
    line = lines_of(answered)[0]
    line["conversations"] += [{"from": "human", "value": "More?"}, {"from": "gpt", "value": "No."}]
    path = tmp_path / "more.jsonl"
    path.write_text(json.dumps(line) + "\n")
    source = Source(path=str(folder / "train.json"))
    (record,) = (
        one for one in read_source(source, image_root(source)) if one.place.endswith(f", {line['generated']['record']}")
    )
    answers = Answers([path])
    with pytest.raises(DataError, match=r"2 answer\(s\) to 1 user turn\(s\)"):
        with_answer(record, answers.to(record, source))


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"responses": "teacher"},
            "responses is 'teacher' but answers is missing; name the file that `align-ti generate`",
        ),
        ({"responses": "mixed"}, "responses is 'mixed' but answers is missing"),
        ({"answers": "a.jsonl"}, "answers is given but responses is 'gold'"),
        (
            {"responses": "students", "answers": "a"},
            "data.responses is 'students'; accepted: 'gold', 'teacher' or 'mixed'",
        ),
        (
            {"responses": "teacher", "answers": "a", "teacher_share": 0.2},
            "teacher_share is 0.2 but responses is 'teacher'",
        ),
        ({"responses": "mixed", "answers": "a", "teacher_share": 1.2}, "data.teacher_share is 1.2"),
        ({"responses": "teacher", "answers": 3}, "answers is 3; accepted: a path, or a list of paths"),
        ({"responses": "teacher", "answers": [""]}, "data.answers.0 is ''"),
        ({"responses": "teacher", "answers": []}, "data.answers is"),
        ({"responses": "teacher", "answers": "a", "stream": True}, "responses is 'teacher', which needs all records"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Data(train="d.json", **options)


def test_one_file_and_a_list_of_files_are_accepted_and_survive_a_recipe():
    one = Data(train="d.json", responses="teacher", answers="a.jsonl")
    assert one.answers == ("a.jsonl",)
    assert Data.model_validate(one.model_dump(mode="json")) == one
    assert Data(train="d.json", responses="mixed", answers=["a", "b"], teacher_share=0.2).answers == ("a", "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, "top_p is 0.9, but temperature is 0, where nothing is drawn"),
        ({"top_k": 5}, "top_k is 5, but temperature is 0"),
        ({"temperature": -1.0}, "generate.temperature is -1.0"),
        ({"max_new_tokens": 0}, "generate.max_new_tokens is 0"),
    ],
)
def test_generation_refuses_what_has_no_effect(options, message):
    with pytest.raises(ConfigError, match=message):
        Generation(**options)


# --- the verb ---------------------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_the_verb_writes_the_file_and_says_what_is_in_it(folder, answered, tmp_path):
    out = tmp_path / "answers.jsonl"
    data = [folder / "able", folder / "train.json", "--out", out, "--dtype", "float32", "--batch-size", 5]
    done = run(*data, "--max-new-tokens", 40)
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == answered.read_bytes()
    told = " ".join(done.output.split())
    assert "for 12 of 12 records" in told and "image paths in it are relative to" in told
    done = run(
        folder / "teacher", folder / "train.json", "--out", tmp_path / "drawn.jsonl", "--dtype", "float32",
        "--max-new-tokens", 6, "--temperature", 1, "--top-p", 0.98, "--seed", 3,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "truncated at 6 tokens" in told and "record(s) were skipped" in told and "is empty" in told
    wrong = run(*data, "--top-k", 3)
    assert isinstance(wrong.exception, ConfigError) and "temperature is 0" in str(wrong.exception)


def test_what_made_an_answer_stands_in_its_line(folder, answered, drawn):
    line = lines_of(answered)[0]["generated"]
    assert line["model"] == str(folder / "able") and line["source"] == "train.json"
    assert line["settings"] == {"dtype": "float32", "max_new_tokens": 40, "temperature": 0.0}
    assert lines_of(drawn)[0]["generated"]["settings"] == {
        "dtype": "float32", "max_new_tokens": 6, "temperature": 1.0, "seed": 3, "top_p": 0.98,
    }  # fmt: skip
    assert made_by(able(folder), GREEDY) == Made(line["model"], line["settings"])
