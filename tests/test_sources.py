"""Every format becomes the same typed record, in whatever container it comes."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from align_ti.config import Data, Source
from align_ti.data.collator import EncodedConversations
from align_ti.data.conversation import Conversation, StoredPicture, Turn
from align_ti.data.groups import same_image_groups
from align_ti.data.records import ImageRoot, read_record
from align_ti.data.sources import Refused, image_root, read_conversations, read_source
from align_ti.data.streaming import StreamedConversations, shuffled
from align_ti.digits.models import build_processor
from align_ti.errors import ConfigError, DataError

PROCESSOR = build_processor()
COLOURS = [(200, 10, 20), (20, 200, 10), (10, 20, 200)]


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for index, colour in enumerate(COLOURS):
        (tmp_path / "deep" / "er" / f"{index}.png").write_bytes(png(colour))
    return tmp_path


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


PART = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


NAMES = [f"deep/er/{index}.png" for index in range(3)]

SAME = {
    "string, images in front": ({"messages": [user("Q?"), assistant("A.")], "images": NAMES[:2]}, "<image><image>Q?"),
    "string with tags": (
        {"messages": [user("Q <image>\nor <image>?"), assistant("A.")], "images": NAMES[:2]},
        "Q <image>or <image>?",
    ),
    "structured": (
        {"messages": [user([text("Q "), PART, text("or "), PART]), assistant([text("A.")])], "images": NAMES[:2]},
        "Q <image>or <image>",
    ),
    "one image": ({"messages": [user("Q?"), assistant("A.")], "image": NAMES[0]}, "<image>Q?"),
    "images in their parts": (
        {"messages": [user([{"type": "image", "path": NAMES[1]}, text("Q?")]), assistant("A.")]},
        "<image>Q?",
    ),
    "parts and list": (
        {
            "messages": [user([PART, {"type": "image", "image": NAMES[1]}, text("Q?")]), assistant("A.")],
            "images": NAMES[:1],
        },
        "<image><image>Q?",
    ),
    "prompt and completion": ({"prompt": "Q?", "completion": "A.", "image": NAMES[0]}, "<image>Q?"),
    "conversational prompt": (
        {"prompt": [user([PART, text("Q?")])], "completion": [assistant("A.")], "images": NAMES[:1]},
        "<image>Q?",
    ),
    "text only": ({"messages": [user("Q?"), assistant("A.")], "images": []}, "Q?"),
    "LLaVA with a list under images": (
        {
            "conversations": [{"from": "human", "value": "<image>Q?<image>"}, {"from": "gpt", "value": "A."}],
            "images": NAMES[:2],
        },
        "<image>Q?<image>",
    ),
}


@pytest.mark.parametrize("case", list(SAME))
def test_formats_are_told_by_content_and_become_one_record(folder, case):
    record, question = SAME[case]
    conversation = read_record(record, "here", ImageRoot(folder))
    assert conversation.turns == (Turn("user", question), Turn("assistant", "A."))
    assert len(conversation.images) == question.count("<image>")
    assert all(picture.size == (48, 48) for picture in conversation.pictures())


def test_pictures_fill_their_places_in_reading_order(folder):
    record = {
        "messages": [
            user([PART, text("One?")]),
            assistant("1."),
            user([{"type": "image", "path": NAMES[2]}, PART]),
            assistant("2."),
        ],
        "images": NAMES[:2],
    }
    pictures = read_record(record, "here", ImageRoot(folder)).pictures()
    assert [picture.getpixel((0, 0)) for picture in pictures] == [COLOURS[0], COLOURS[2], COLOURS[1]]


def test_an_explicit_format_settles_a_record_of_two(folder):
    both = {
        "messages": [user("M?"), assistant("A.")],
        "conversations": [{"from": "human", "value": "L?"}, {"from": "gpt", "value": "A."}],
    }
    with pytest.raises(DataError, match="llava and messages at once"):
        read_record(both, "here", ImageRoot(folder))
    assert read_record(both, "here", ImageRoot(folder), "messages").turns[0].text == "M?"
    assert read_record(both, "here", ImageRoot(folder), "llava").turns[0].text == "L?"


def test_plain_reduces_the_question_to_its_picture(folder):
    record = {
        "image": NAMES[0],
        "conversations": [{"from": "human", "value": "Describe this.\n<image>"}, {"from": "gpt", "value": "A square."}],
    }
    assert read_record(record, "here", ImageRoot(folder)).turns[0].text == "Describe this.<image>"
    assert read_record(record, "here", ImageRoot(folder), "plain").turns[0].text == "<image>"


def test_a_capital_tag_is_text(folder):
    record = {"conversations": [{"from": "human", "value": "What is <Image>?"}, {"from": "gpt", "value": "A."}]}
    assert read_record(record, "here", ImageRoot(folder)).images == ()


# --- containers -------------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, object]]:
    return [
        {
            "id": f"r{index}",
            "messages": [user("Q?"), assistant("A.")],
            "images": [{"bytes": png(colour), "path": f"{index}.png"}] * index,
        }
        for index, colour in enumerate(COLOURS)
    ]


def table(typed: bool = True) -> datasets.Dataset:
    # Without a type, the images are plain {bytes, path} structs, as other writers of parquet make them.
    made = datasets.Dataset.from_list(rows())
    return made.cast_column("images", datasets.List(datasets.Image())) if typed else made


@pytest.mark.parametrize("container", ["parquet", "plain parquet", "folder of parquet", "saved", "jsonl", "json"])
def test_every_container_gives_the_same_records(folder, container):
    if container in {"json", "jsonl"}:
        records = [{**row, "images": NAMES[index : index + 1] * index} for index, row in enumerate(rows())]
        path = folder / f"data.{container}"
        path.write_text("\n".join(map(json.dumps, records)) if container == "jsonl" else json.dumps(records))
    elif container == "saved":
        path = folder / "saved"
        table().save_to_disk(path)
    else:
        path = folder / ("data" if "folder" in container else "data.parquet")
        path.mkdir() if "folder" in container else None
        table("plain" not in container).to_parquet(path / "train-00000.parquet" if path.is_dir() else path)
    read = read_conversations(path)
    assert [len(one.images) for one in read] == [0, 1, 2]
    assert read[2].turns[0].text == "<image><image>Q?"
    assert read[1].pictures()[0].getpixel((0, 0)) == COLOURS[1]
    assert str(path) in read[1].place and "id 'r1'" in read[1].place
    assert read_conversations(str(path)) is not None


def test_a_single_image_column_and_columns_that_are_empty(folder):
    made = datasets.Dataset.from_list(
        [
            {"image": {"bytes": png(COLOURS[0]), "path": None}, "prompt": "Q?", "completion": "A.", "messages": None},
            {"image": None, "prompt": None, "completion": None, "messages": [user("Q?"), assistant("A.")]},
            {"image": {"bytes": None, "path": NAMES[2]}, "prompt": "Q?", "completion": "A.", "messages": None},
        ]
    )
    made.to_parquet(folder / "data.parquet")
    read = read_conversations(folder / "data.parquet")
    assert [one.turns[0].text for one in read] == ["<image>Q?", "Q?", "<image>Q?"]
    assert isinstance(read[0].images[0], StoredPicture)
    assert read[2].pictures()[0].getpixel((0, 0)) == COLOURS[2]


def test_bytes_of_a_table_are_read_in_workers_only_when_asked_for(folder):
    table().to_parquet(folder / "data.parquet")
    data = EncodedConversations(read_conversations(folder / "data.parquet"), PROCESSOR)
    from torch.utils.data import DataLoader

    shapes = [sample.get("pixel_values") for sample in DataLoader(data, batch_size=None, num_workers=1)]
    assert [None if shape is None else shape.shape[0] for shape in shapes] == [None, 1, 2]


def test_a_broken_picture_inside_a_table_is_named(folder):
    bad = [{"messages": [user("Q?"), assistant("A.")], "images": [{"bytes": b"no image", "path": "x.png"}]}]
    datasets.Dataset.from_list(bad).to_parquet(folder / "data.parquet")
    (record,) = read_conversations(folder / "data.parquet")
    with pytest.raises(DataError, match=r"row 1, images\[0\] cannot be read"):
        record.pictures()


def test_splits_have_to_be_named_where_there_are_several(folder):
    datasets.DatasetDict({"train": table(), "test": table().select([0])}).save_to_disk(folder / "both")
    with pytest.raises(DataError, match="split is None; accepted: 'train', 'test'"):
        read_conversations(folder / "both")
    source = Source(path=str(folder / "both"), split="test")
    assert len(read_source(source, image_root(source))) == 1
    wrong = Source(path=str(folder / "both"), split="tset")
    with pytest.raises(DataError, match="split is 'tset'; accepted"):
        read_source(wrong, image_root(wrong))


def test_a_hub_name_that_cannot_be_loaded_is_named():
    with pytest.raises(DataError, match="nobody/nothing: cannot be loaded as a dataset"):
        read_conversations("nobody/nothing")


def test_pictures_in_tables_are_the_same_by_their_bytes(folder):
    made = datasets.Dataset.from_list(
        [
            {"messages": [user(question), assistant("A.")], "images": [{"bytes": png(COLOURS[0]), "path": None}]}
            for question in ("One?", "Two?")
        ]
    )
    made.to_parquet(folder / "data.parquet")
    (group,) = same_image_groups(read_conversations(folder / "data.parquet"), images=2, instructions=2)
    assert len(group) == 2


# --- names of images ------------------------------------------------------------------------------------------------


def test_another_extension_is_taken_only_on_request_and_counted(folder):
    root, found = ImageRoot(folder), ImageRoot(folder, find_extension=True)
    name = "deep/er/0.jpg"
    assert root.path(name, "here").name == "0.jpg"
    assert found.path(name, "here").name == "0.png"
    assert found.path(NAMES[1], "here").name == "1.png"
    assert found.path("deep/er/9.jpg", "here").name == "9.jpg"
    assert found.other_extension == 1
    (folder / "deep" / "er" / "0.gif").write_bytes(png(COLOURS[0]))
    with pytest.raises(DataError, match=r"0\.png, 0\.gif do"):
        found.path(name, "here")


def test_another_extension_does_not_lead_out_of_the_root(folder):
    root = folder / "root"
    root.mkdir()
    (folder / "secret.png").write_bytes(png(COLOURS[0]))
    (root / "a.png").symlink_to(folder / "secret.png")
    with pytest.raises(DataError, match="lies outside the image root"):
        ImageRoot(root, find_extension=True).path("a.jpg", "here")
    # A disk may find one file under two names.
    (root / "b.png").write_bytes(png(COLOURS[0]))
    (root / "b.PNG").hardlink_to(root / "b.png")
    assert ImageRoot(root, find_extension=True).path("b.jpg", "here").suffix.lower() == ".png"


@given(st.lists(st.sampled_from(["..", ".", "deep", "er", "0.png", "/", "/etc"]), min_size=1, max_size=6))
def test_no_name_leads_out_of_the_root(parts):
    root = Path(__file__).parent / "corpus"
    try:
        path = ImageRoot(root).path("/".join(parts), "here")
    except DataError:
        return
    assert path.resolve().is_relative_to(root.resolve())


def test_bad_records_go_to_whoever_asks_for_them(folder):
    lines = [json.dumps({"messages": [user("Q?"), assistant("A.")]}), "{", json.dumps({"id": 3, "messages": []})]
    (folder / "data.jsonl").write_text("\n".join(lines))
    source, refused = Source(path=str(folder / "data.jsonl")), []
    assert len(read_source(source, image_root(source), refused.append)) == 1
    assert [one.place.rpartition(", ")[2] for one in refused] == ["line 2", "line 3"]
    assert all(isinstance(one, Refused) and one.place in one.reason for one in refused)


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["jsonl", "parquet", "saved"])
def test_a_stream_gives_the_samples_of_the_whole(folder, container):
    path = folder / f"data.{container}"
    if container == "jsonl":
        records = [{**row, "images": NAMES[:1] * index} for index, row in enumerate(rows())]
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        table().to_parquet(path) if container == "parquet" else table().save_to_disk(path)
    whole = EncodedConversations(read_conversations(path), PROCESSOR)
    stream = StreamedConversations(Data(train=str(path), stream=True, shuffle_buffer=1), PROCESSOR)
    for one, other in zip(whole, islice(stream, len(whole)), strict=True):
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("container", ["jsonl", "one parquet file", "parquet files"])
def test_workers_share_a_stream_and_passes_differ(folder, container):
    # datasets gave each worker its share of the files, of which the stream took a share again: records were lost in silence.
    records = [{"messages": [user("Q" * (n + 1)), assistant("A.")]} for n in range(12)]
    path = folder / ("data.jsonl" if container == "jsonl" else "data.parquet")
    if container == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif container == "parquet files":
        path = folder / "parts"
        path.mkdir()
        for part in range(4):
            datasets.Dataset.from_list(records[3 * part : 3 * part + 3]).to_parquet(path / f"part-{part}.parquet")
    else:
        datasets.Dataset.from_list(records).to_parquet(path)
    stream = StreamedConversations(Data(train=str(path), stream=True, shuffle_buffer=4), PROCESSOR, seed=1)

    def lengths(workers: int = 0) -> list[int]:
        samples = DataLoader(stream, batch_size=None, num_workers=workers)
        return [len(sample["input_ids"]) for sample in islice(samples, 36)]

    alone = lengths()
    passes = [alone[at : at + 12] for at in (0, 12, 24)]
    assert [sorted(one) for one in passes] == [sorted(set(alone))] * 3 and len(set(alone)) == 12
    assert passes[0] != passes[1] != passes[2] and lengths() == alone
    shared = lengths(workers=2)
    assert [sorted(shared[at : at + 12]) for at in (0, 12, 24)] == [sorted(set(alone))] * 3


@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 3))
def test_a_shuffled_stream_loses_and_repeats_nothing(count, buffer, seed):
    records = [Conversation((Turn("user", "Q"),), place=str(number)) for number in range(count)]
    mixed = list(shuffled(iter(records), buffer, str(seed)))
    assert sorted(mixed, key=lambda one: int(one.place)) == records
    if buffer == 1:
        assert mixed == records


def test_a_stream_that_is_empty_or_bad_says_so(folder):
    (folder / "data.jsonl").write_text("")
    data = Data(train=str(folder / "data.jsonl"), stream=True)
    with pytest.raises(DataError, match="no records found"):
        list(StreamedConversations(data, PROCESSOR))
    (folder / "data.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        list(StreamedConversations(data, PROCESSOR))
    with pytest.raises(ConfigError, match="stream reads one whole source"):
        Data(train=[{"path": "a"}, {"path": "b"}], stream=True)


def test_a_folder_of_tables_of_which_some_would_be_left_out_is_refused(folder):
    # datasets reads only files named after a split as soon as one is: half of the records were gone without a word.
    (folder / "mix").mkdir()
    for name in ("train", "extra"):
        table().to_parquet(folder / "mix" / f"{name}.parquet")
    source = Source(path=str(folder / "mix"), images=str(folder))
    with pytest.raises(DataError, match=r"1 of the parquet files belong to no split \(extra.parquet\)"):
        read_source(source, image_root(source))
    (folder / "mix" / "train.parquet").rename(folder / "mix" / "other.parquet")
    assert len(read_source(source, image_root(source))) == 2 * len(rows())


def test_a_path_with_brackets_is_a_path_and_no_pattern(folder):
    # datasets takes paths for patterns, and said that an existing file holds no data.
    table().to_parquet(folder / "some [one].parquet")
    source = Source(path=str(folder / "some [one].parquet"), images=str(folder))
    assert len(read_source(source, image_root(source))) == len(rows())


def test_where_every_record_is_refused_the_first_reason_is_told(folder):
    # The message said that the file was empty.
    (folder / "bad.json").write_text(json.dumps([{"image": "a.png", "conversations": []}] * 3))
    refused: list[Refused] = []
    with pytest.raises(DataError, match=r"all 3 records cannot be used; .* the first: .*bad.json, record 1"):
        read_source(Source(path=str(folder / "bad.json")), ImageRoot(folder, False), refused.append)
    assert len(refused) == 3


def test_half_a_surrogate_pair_is_refused_by_the_record():
    # The tokenizer failed with a TypeError, whatever the recipe said of bad records.
    with pytest.raises(DataError, match=r"here: .*ud83d.* half of a surrogate pair"):
        Conversation((Turn("user", "Q"), Turn("assistant", "cut \ud83d")), place="here")


def test_a_caption_in_place_of_a_file_name_is_refused_and_not_looked_for(folder):
    # The file system's own error reached the user as a traceback.
    with pytest.raises(DataError, match=r"here: image .* cannot be opened \(File name too long\)"):
        Conversation((Turn("user", "<image>Q"), Turn("assistant", "A")), (folder / ("a" * 300),), "here").check_files()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_line_end_beside_a_tag_goes_with_it_whatever_the_system(folder, end):
    # A carriage return stayed in the instruction of data written on Windows.
    turns = [{"from": "human", "value": f"Before{end}<image>{end}Q"}, {"from": "gpt", "value": "A"}]
    record = {"image": "deep/er/0.png", "conversations": turns}
    assert read_record(record, "here", ImageRoot(folder, False)).turns[0].text == "Before<image>Q"


def test_a_data_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    # The message was about the image root, its parent folder.
    with pytest.raises(DataError, match=r"nope/x.json: the data file does not exist"):
        read_conversations(tmp_path / "nope" / "x.json")
    (tmp_path / "long.jsonl").write_text("[" + "9" * 5000 + "]")
    with pytest.raises(DataError, match="not usable JSON: Exceeds the limit"):
        read_conversations(tmp_path / "long.jsonl")
