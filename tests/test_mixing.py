"""Sources are mixed, records checked, cut, skipped and cached, and nothing of it happens silently."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from align_ti.cli import shipped
from align_ti.config import Data, Recipe, Source, read_recipe
from align_ti.data.cache import SampleCache, checksum
from align_ti.data.checking import check_records, digest, limit_reached
from align_ti.data.collator import EncodedConversations
from align_ti.data.conversation import Conversation, StoredPicture, Turn
from align_ti.data.lengths import LengthGrouped, estimated_lengths, fit, last_response
from align_ti.data.mixing import numbers_taken, read_mixture
from align_ti.data.roles import RESPONSE, VISUAL, encode
from align_ti.data.sources import read_conversations
from align_ti.digits.models import build_processor
from align_ti.errors import CacheError, ConfigError, DataError, RequeueError, RunError
from align_ti.models.loading import load_processor
from align_ti.pipeline.records import errors_of_workers, training_data
from align_ti.pipeline.training import distil, training_arguments
from align_ti.runs import RunFolder, read_json
from tests import small

PROCESSOR = build_processor()


def write(folder: Path, name: str, count: int, image: bool = False) -> str:
    records = [
        {
            "id": f"{name}-{number}",
            **({"image": "a.png"} if image else {}),
            "conversations": [
                {"from": "human", "value": "<image>" * image + "Q" * (number % 7 + 1)},
                {"from": "gpt", "value": "A."},
            ],
        }
        for number in range(count)
    ]
    Image.new("RGB", (48, 48)).save(folder / "a.png")
    (folder / name).write_text(json.dumps(records))
    return str(folder / name)


# --- mixing -----------------------------------------------------------------------------------------------------------


def names(mixture) -> list[str]:
    return [one.place.rpartition("'")[0].rpartition("'")[2] for one in mixture.conversations]


def test_one_path_is_everything_in_order(tmp_path):
    mixture = read_mixture(Data(train=write(tmp_path, "a.json", 5)))
    assert names(mixture) == [f"a.json-{number}" for number in range(5)]
    (report,) = mixture.sources
    assert (report.records, report.refused, report.taken) == (5, 0, 5)


def test_counts_are_drawn_by_the_seed_and_by_nothing_else(tmp_path):
    one, two = write(tmp_path, "a.json", 20), write(tmp_path, "b.json", 20)
    draw = [{"path": one, "count": 5}, {"path": two}]
    first = names(read_mixture(Data(train=draw), seed=3))
    assert first == names(read_mixture(Data(train=draw), seed=3))
    assert len(set(first)) == 25 and len([name for name in first if name.startswith("a")]) == 5
    # A source's own draw stays when another one changes.
    assert first[:5] == names(read_mixture(Data(train=[draw[0]]), seed=3))
    assert any(first[:5] != names(read_mixture(Data(train=draw), seed=seed))[:5] for seed in (4, 5))


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.5, 8)), min_size=1, max_size=5))
def test_weights_are_shares_and_no_record_is_taken_twice(sources):
    sizes = [size for size, _ in sources]
    try:
        taken = numbers_taken([Source(path="x", weight=weight) for _, weight in sources], sizes)
    except DataError:
        assert min(sizes) < max(sizes) or len({weight for _, weight in sources}) > 1
        return
    assert all(count <= size for count, size in zip(taken, sizes, strict=True))
    assert any(count == size for count, size in zip(taken, sizes, strict=True))
    total = min(size / weight for size, weight in sources)
    assert all(abs(count - weight * total) < 1 + 1e-6 for count, (_, weight) in zip(taken, sources, strict=True))


def test_each_source_has_its_own_image_root(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = write(tmp_path / "one", "a.json", 1, image=True), write(tmp_path / "two", "b.json", 1, image=True)
    mixture = read_mixture(Data(train=[{"path": one}, {"path": two, "images": str(tmp_path / "one")}]))
    assert [one.images[0].parent.name for one in mixture.conversations] == ["one", "one"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([{"path": "a", "weight": 1.0}, {"path": "b", "count": 2}], "both weight and count"),
        ([{"path": "a", "weight": 1.0, "count": 2}], "both weight and count"),
        ([{"path": "a", "weight": 1.0}, {"path": "b"}], "none for 'b'"),
        ([], "list of sources"),
    ],
)
def test_two_ways_of_mixing_are_refused(train, message):
    with pytest.raises(ConfigError, match=message):
        Data(train=train)


def test_a_count_beyond_the_source_and_a_weight_of_nothing_are_refused(tmp_path):
    path, large = write(tmp_path, "a.json", 3), write(tmp_path, "b.json", 40)
    with pytest.raises(DataError, match=r"a\.json: count is 4, but it has 3 usable records"):
        read_mixture(Data(train=[{"path": path, "count": 4}]))
    with pytest.raises(DataError, match=r"a\.json: weight 0\.001 leaves none of its 3 records"):
        read_mixture(Data(train=[{"path": path, "weight": 0.001}, {"path": large, "weight": 1.0}]))


def test_the_shipped_mix_is_changed_by_number(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(shipped()["mobilevlm"])
    changed = read_recipe(
        path, ["data.train.0.images=elsewhere", "data.train.0.count=5", "data.cache=disk", "data.cache_dir=c"]
    )
    (source,) = changed.data.sources
    assert (source.images, source.count, changed.data.cache_dir) == ("elsewhere", 5, "c")
    for change, message in (
        ("data.train.1.path=x", "'1' is no entry of a list of 1"),
        ("data.train.first.path=x", "'first' is no entry"),
        ("data.train.0.path.deep=x", "path is no section"),
        ("data.train.0.cuont=5", "did you mean 'count'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_recipe(path, [change])


# --- cutting ----------------------------------------------------------------------------------------------------------


def dialogue(*texts: str, images: int = 1) -> Conversation:
    turns = tuple(Turn("user" if index % 2 == 0 else "assistant", words) for index, words in enumerate(texts))
    return Conversation(turns, (Image.new("RGB", (48, 48)),) * images)


def test_only_the_end_of_the_last_response_is_cut():
    sample = encode(dialogue("<image>Read it.", "Red one.", "And now?", "Blue two, then green three."), PROCESSOR)
    start, length = last_response(sample["roles"]), len(sample["input_ids"])
    assert PROCESSOR.tokenizer.decode(sample["input_ids"][start:]).startswith("Blue two")
    end = PROCESSOR.tokenizer.convert_tokens_to_ids("<|end|>")
    for limit in range(start + 1, length):
        short = fit(sample, limit, "truncate", "here")
        assert len(short["input_ids"]) == len(short["labels"]) == len(short["attention_mask"]) == limit
        assert torch.equal(short["input_ids"], sample["input_ids"][:limit])
        assert int((short["roles"] == VISUAL).sum()) == int((sample["roles"] == VISUAL).sum())
        assert short["roles"][-1] == RESPONSE and short["labels"][-1] != end
        assert torch.equal(short["pixel_values"], sample["pixel_values"])
    with pytest.raises(DataError, match="nothing of the response would be left"):
        fit(sample, start, "truncate", "here")
    with pytest.raises(DataError, match=f"here: {length} tokens, but max_length is {length - 1}.*too_long: truncate"):
        fit(sample, length - 1, "error", "here")
    assert fit(sample, length, "error", "here") is sample


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> SampleCache:
    return SampleCache(tmp_path / "cache", PROCESSOR)


def records(folder: Path, count: int = 4) -> list[Conversation]:
    return read_conversations(write(folder, "a.json", count, image=True))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_cached_samples_are_the_same_and_the_record_is_processed_once(tmp_path, cache, monkeypatch):
    conversations = records(tmp_path)
    fresh = [encode(one, PROCESSOR) for one in conversations]
    first = EncodedConversations(conversations, PROCESSOR, disk=cache)
    assert all(equal(first[index], fresh[index]) for index in range(4))
    monkeypatch.setattr("align_ti.data.collator.encode", lambda *_: pytest.fail("processed again"))
    second = EncodedConversations(conversations, PROCESSOR, 2048, disk=SampleCache(cache.folder, PROCESSOR))
    assert all(equal(second[index], fresh[index]) for index in range(4))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_entry_is_made_again_with_a_warning(tmp_path, cache, damage, caplog):
    (conversation, *_) = records(tmp_path)
    data = EncodedConversations([conversation], PROCESSOR, disk=cache)
    good, path = data[0], cache.path(conversation)
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    path.write_bytes({"cut": content[:-9], "flipped": flipped, "empty": b"", "text": b"not tensors"}[damage])
    with caplog.at_level(logging.WARNING):
        assert equal(data[0], good)
    assert cache.rebuilt == 1 and "is damaged" in caplog.text and "1 so far" in caplog.text
    assert path.read_bytes() == content
    assert equal(data[0], good) and cache.rebuilt == 1


def test_the_key_changes_with_everything_the_sample_depends_on(tmp_path, cache):
    (one, *_) = records(tmp_path)
    key = cache.path(one).name
    assert cache.path(one).name == key
    other_words = Conversation((Turn("user", "<image>Other?"), one.turns[1]), one.images)
    assert cache.path(other_words).name != key
    os.utime(one.images[0], ns=(1, 1))
    assert cache.path(one).name != key
    changed = build_processor()
    changed.chat_template = changed.chat_template + " "
    key = cache.path(one).name
    assert SampleCache(cache.folder, changed).path(one).name != key
    # Where the record stands does not matter: another file with the same record shares the sample.
    assert cache.path(Conversation(one.turns, one.images, "elsewhere")).name == key


def test_pictures_in_tables_and_in_memory_are_told_by_their_content(cache):
    turns = (Turn("user", "<image>Q"), Turn("assistant", "A"))
    keys = {
        cache.path(Conversation(turns, (image,))).name
        for image in (
            StoredPicture("x", lambda: b"one"),
            StoredPicture("x", lambda: b"two"),
            Image.new("RGB", (2, 2), "red"),
            Image.new("RGB", (2, 2), "blue"),
            Image.new("L", (2, 2)),
        )
    }
    assert len(keys) == 5
    assert cache.path(Conversation(turns, (StoredPicture("y", lambda: b"one"),))).name in keys


@given(st.lists(st.integers(0, 255), min_size=2, max_size=20), st.data())
def test_the_checksum_sees_every_change(values, data):
    sample = {"a": torch.tensor(values), "b": torch.tensor([1.5])}
    index = data.draw(st.integers(0, len(values) - 1))
    changed = sample["a"].clone()
    changed[index] += 1
    marks = [sample, {**sample, "a": changed}, {**sample, "a": sample["a"].int()}, {"c": sample["a"], "b": sample["b"]}]
    assert len({checksum(mark) for mark in marks}) == 4


def test_workers_share_a_cache_and_leave_no_drafts(tmp_path, cache):
    data = EncodedConversations(records(tmp_path, 6) * 3, PROCESSOR, disk=cache)
    samples = list(DataLoader(data, batch_size=None, num_workers=2))
    assert all(equal(samples[index], data[index]) for index in range(len(data)))
    files = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert len(files) == 6 and all(path.suffix == ".safetensors" for path in files)


def test_a_cache_that_cannot_be_written_says_so(tmp_path, cache):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"data\.cache_dir: .*file.* cannot be made"):
        SampleCache(tmp_path / "file", PROCESSOR)
    (one, *_) = records(tmp_path)
    path = cache.path(one)
    path.parent.write_text("in the way")
    with pytest.raises(CacheError, match=r"cannot be written .*data\.cache: none"):
        cache.save(path, encode(one, PROCESSOR))


# --- checking and skipping --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    small.write_pair(folder)
    small.write_records(folder)
    return folder


def with_bad_records(folder: Path) -> str:
    good = json.loads((folder / "train.json").read_text())
    Image.new("RGB", (48, 48)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
    bad = [
        {**good[0], "id": "no answer", "conversations": good[0]["conversations"][:1]},
        {
            **good[0],
            "id": "two tags",
            "conversations": [{"from": "human", "value": "<image><image>Q"}, {"from": "gpt", "value": "A"}],
        },
        {**good[0], "id": "cut", "image": "cut.png"},
        {**good[0], "id": "gone", "image": "gone.png"},
        {"id": "long", "conversations": [{"from": "human", "value": "Q " * 300}, {"from": "gpt", "value": "A"}]},
    ]
    mixed = [bad[0], *good[:5], bad[1], bad[2], *good[5:], bad[3], bad[4]]
    (folder / "mixed.json").write_text(json.dumps(mixed))
    return str(folder / "mixed.json")


def recipe(folder: Path, out: Path, train: object, data: dict[str, object] | None = None, **training: object) -> Recipe:
    content = small.recipe(folder)
    content["out"] = str(out)
    content["data"] = {"train": train, "max_length": 200, **(data or {})}
    content["training"] |= training
    content["objective"] = {"iva": {"layer": 0}}
    return Recipe.model_validate(content)


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_skipped_listed_and_counted(pair, tmp_path, cache, workers):
    settings = {"on_bad_record": "skip", "max_skipped": 5, "cache": cache}
    settings |= {"cache_dir": str(tmp_path / "cache")} if cache == "disk" else {}
    wanted = recipe(pair, tmp_path / "run", with_bad_records(pair), settings, dataloader_num_workers=workers)
    run, ticks = RunFolder(tmp_path / "run"), []
    data, story = training_data(
        wanted, load_processor(str(pair / "student")), run, lambda done, total: ticks.append((done, total))
    )
    assert (story["records"], story["skipped"], story["used"], len(data)) == (17, 5, 12, 12)
    assert ticks[-1] == (16, 16)
    listed = [json.loads(line) for line in run.skipped.read_text().splitlines()]
    for name, reason in {
        "no answer": "last turn is by the user",
        "two tags": "2 <image> tag(s)",
        "cut": "cannot be read",
        "gone": "does not exist",
        "long": "tokens, but max_length is 200",
    }.items():
        (one,) = [line for line in listed if f"id '{name}'" in line["reason"]]
        assert reason in one["reason"] and "mixed.json, record" in one["place"]
    assert read_json(run.data) == story
    assert data.lengths() == [len(data[index]["input_ids"]) for index in range(12)]
    assert all(int((data[index]["roles"] == RESPONSE).sum()) for index in range(12))


def test_too_many_bad_records_stop_the_run(pair, tmp_path):
    train, processor = with_bad_records(pair), load_processor(str(pair / "student"))
    for limit, message in (
        (4, "5 of 17 records cannot be used, but data.max_skipped is 4"),
        (0, "1 of 17"),
        (0.2, "5 of 17"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            training_data(recipe(pair, tmp_path, train, {"on_bad_record": "skip", "max_skipped": limit}), processor)
        assert "The first:\n  " in str(caught.value)
    training_data(recipe(pair, tmp_path, train, {"on_bad_record": "skip", "max_skipped": 0.3}), processor)


def test_a_full_disk_is_no_bad_record(pair, tmp_path, monkeypatch):
    # Good records were skipped because their samples could not be kept, and the findings of that were used by every later run.
    def full(*_: object) -> None:
        raise CacheError("data.cache_dir: no room")

    monkeypatch.setattr(SampleCache, "save", full)
    train, processor = with_bad_records(pair), load_processor(str(pair / "student"))
    skipping = {"on_bad_record": "skip", "max_skipped": 0.9, "cache": "disk", "cache_dir": str(tmp_path / "kept")}
    with pytest.raises(CacheError, match="no room"):
        training_data(recipe(pair, tmp_path, train, skipping), processor)


@given(st.integers(0, 100), st.integers(1, 100), st.integers(0, 100))
def test_the_limit_is_a_count_or_a_share(skipped, records, limit):
    assert limit_reached(skipped, records, limit) == (skipped > limit)
    if 0 < limit < 100:
        assert limit_reached(skipped, records, limit / 100) == (skipped > limit / 100 * records)


def test_what_was_checked_is_used_again_unless_the_data_changed(pair, tmp_path, monkeypatch):
    processor, run = load_processor(str(pair / "student")), RunFolder(tmp_path / "run")
    wanted = recipe(pair, run.root, with_bad_records(pair), {"on_bad_record": "skip", "max_skipped": 5})
    first, _ = training_data(wanted, processor, run)
    monkeypatch.setattr("align_ti.pipeline.records.check_records", lambda *_, **__: pytest.fail("checked again"))
    again, story = training_data(wanted, processor, run)
    assert digest(again.conversations) == digest(first.conversations) and story["skipped"] == 5
    assert again.lengths() == first.lengths()
    content = json.loads((pair / "mixed.json").read_text())
    (pair / "mixed.json").write_text(json.dumps(content[:-1]))
    with pytest.raises(RunError, match="training data have changed"):
        training_data(wanted, processor, run)


def stop_at(wanted: Recipe, last: int) -> Path:
    """The checkpoint of a run that a scheduler stopped at a step."""

    def send(step: int, _steps: int) -> None:
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RequeueError):
        distil(wanted, steps=send)
    found = RunFolder(Path(wanted.out)).last_checkpoint()
    assert found is not None and found.name == f"checkpoint-{last}"
    return found


def test_a_run_does_not_resume_with_other_records(pair, tmp_path):
    # Without a check beforehand the order of another number of records was taken, and some were repeated or missed.
    content = json.loads((pair / "train.json").read_text())
    (pair / "own.json").write_text(json.dumps(content))
    wanted = recipe(pair, tmp_path / "run", str(pair / "own.json"), max_steps=2)
    stop_at(wanted, 1)
    (pair / "own.json").write_text(json.dumps(content[1:]))
    with pytest.raises(RunError, match="training data have changed since this run began"):
        distil(wanted)
    (pair / "own.json").write_text(json.dumps(content))
    assert distil(wanted).student.is_dir()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_stream_resumes_where_it_was_after_several_passes(pair, tmp_path, accumulate):
    # A resumed run began its pass anew, and the last micro-batches of a pass were no step of their own but part of the next.
    steps = {"max_steps": 12 // accumulate, "gradient_accumulation_steps": accumulate}
    stopped, whole = (
        recipe(pair, tmp_path / name, str(pair / "train.json"), {"stream": True, "shuffle_buffer": 3}, **steps)
        for name in ("stopped", "whole")
    )
    seen = stop_at(stopped, 8 // accumulate)
    batch = stopped.training.per_device_train_batch_size
    assert int(seen.name.split("-")[1]) * accumulate * batch > 1.5 * len(json.loads((pair / "train.json").read_text()))
    one, other = (load_file(distil(of).student / "model.safetensors") for of in (stopped, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_records_are_cut_listed_and_counted(pair, tmp_path):
    processor, run = load_processor(str(pair / "student")), RunFolder(tmp_path / "run")
    conversations = read_conversations(pair / "train.json")
    longest = max(len(encode(one, processor)["input_ids"]) for one in conversations)
    wanted = recipe(pair, run.root, str(pair / "train.json"), {"too_long": "truncate", "max_length": longest - 1})
    data, story = training_data(wanted, processor, run)
    cut = [json.loads(line) for line in run.truncated.read_text().splitlines()]
    assert story["truncated"] == len(cut) > 0 and story["skipped"] == 0 and not run.skipped.exists()
    assert all(line["tokens"] == longest and line["kept"] == longest - 1 for line in cut)
    assert max(data.lengths()) == longest - 1
    hopeless = recipe(pair, run.root / "2", str(pair / "train.json"), {"too_long": "truncate", "max_length": 20})
    with pytest.raises(DataError, match="nothing of the response would be left"):
        training_data(hopeless, processor)


def test_a_run_trains_on_what_is_left(pair, tmp_path):
    settings = {"on_bad_record": "skip", "max_skipped": 5}
    run = distil(recipe(pair, tmp_path / "run", with_bad_records(pair), settings, max_steps=2, group_by_length=True))
    assert run.student.is_dir() and read_json(run.data)["used"] == 12


def test_a_bad_record_found_in_a_worker_gives_the_plain_message(pair, tmp_path):
    # Through a DataLoader the message was a traceback of the worker.
    wanted = recipe(pair, tmp_path / "run", with_bad_records(pair).replace("mixed", "late"), dataloader_num_workers=1)
    late = json.loads((pair / "mixed.json").read_text())[7:8]
    (pair / "late.json").write_text(json.dumps(late * 4))
    with pytest.raises(DataError) as caught:
        distil(wanted)
    assert str(caught.value).startswith(str(pair / "late.json")) and "cut.png cannot be read" in str(caught.value)
    with pytest.raises(DataError, match=r"^plain$"), errors_of_workers():
        raise DataError("plain")


def test_a_streamed_run_trains_and_needs_its_steps(pair, tmp_path):
    run = distil(recipe(pair, tmp_path / "run", str(pair / "train.json"), {"stream": True}, max_steps=4))
    assert run.student.is_dir()
    with pytest.raises(Exception, match=r"training\.max_steps is -1, but data\.stream is true"):
        recipe(pair, tmp_path / "2", "x", {"stream": True}, max_steps=-1)


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_lengths_are_estimated_without_decoding(tmp_path):
    write(tmp_path, "a.json", 60, image=True)
    conversations = read_conversations(tmp_path / "a.json") + [
        dialogue("word " * count, "yes " * count, images=0) for count in range(1, 40)
    ]
    data = EncodedConversations(conversations, PROCESSOR)
    true = torch.tensor([float(len(data[index]["input_ids"])) for index in range(len(data))])
    estimate = torch.tensor([float(length) for length in data.lengths()])
    assert torch.corrcoef(torch.stack([true, estimate]))[0, 1] > 0.9
    measured = [(one, data[index]) for index, one in enumerate(conversations[:2])]
    gone = Conversation(conversations[0].turns, (Path("gone.png"),))
    assert estimated_lengths([gone], measured)[0] > 0


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 8), st.integers(0, 2))
def test_grouped_batches_hold_every_record_once_and_repeat_by_epoch(lengths, batch, seed):
    sampler = LengthGrouped(lengths, batch, seed)
    sampler.set_epoch(3)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and order == list(sampler)
    fresh = LengthGrouped(lengths, batch, seed)
    fresh.set_epoch(3)
    assert list(fresh) == order


def test_grouping_saves_padding(pair, tmp_path):
    lengths = torch.randint(10, 400, (512,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(order: list[int]) -> int:
        batches = [[lengths[index] for index in order[at : at + 8]] for at in range(0, 512, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(list(LengthGrouped(lengths, 8, 0))) < padding(list(range(512))) / 4


def test_the_option_reaches_transformers_under_either_name(pair, tmp_path):
    arguments = training_arguments(recipe(pair, tmp_path / "run", "x", group_by_length=True))
    assert "group_by_length" in (getattr(arguments, "train_sampling_strategy", ""), "group_by_length")
    assert getattr(arguments, "group_by_length", True)


def test_the_pass_finds_what_single_records_say(tmp_path):
    conversations = [*records(tmp_path), dialogue("<image>No answer?")]
    found = check_records(EncodedConversations(conversations, PROCESSOR))
    assert found.usable == [0, 1, 2, 3] and len(found.refused) == 1
    assert found.lengths == [len(encode(one, PROCESSOR)["input_ids"]) for one in conversations[:4]]


def test_the_numbers_of_the_documentation_are_those_of_the_kept_run():
    root = Path(__file__).parent.parent
    kept, text = json.loads((root / "results" / "loader.json").read_text()), (root / "docs" / "data.md").read_text()
    for cache, speeds in kept["images_per_second"].items():
        speed = " | ".join(f"{speeds[workers]:.0f}" for workers in "012")
        assert f"| {cache} | {speed} | {kept['processor_milliseconds_per_image'][cache]:.2f} |" in text
    taken = kept["records_per_second_taken_by_training"]
    assert (
        f"took {taken['sft']:.0f} records a second with SFT, {taken['kd']:.0f} with SFT + KD and {taken['align_ti']:.0f}"
        in text
    )
