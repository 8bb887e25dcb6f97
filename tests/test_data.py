"""Records become conversations, tokens get roles, and whatever is wrong is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.conversation import Conversation, Turn, open_picture
from align_ti.data.groups import same_image_groups
from align_ti.data.roles import INSTRUCTION, OTHER, RESPONSE, VISUAL, encode
from align_ti.data.sources import read_conversations
from align_ti.digits.models import IMAGE_TOKENS, build_processor
from align_ti.errors import DataError

PROCESSOR = build_processor()
PICTURE = Image.new("RGB", (48, 48), (10, 20, 30))


def conversation(*texts: str, images: int = 1, system: str = "") -> Conversation:
    turns = [Turn("system", system)] if system else []
    turns += [Turn("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(texts)]
    return Conversation(tuple(turns), (PICTURE,) * images)


def words(sample, role: int) -> str:
    return PROCESSOR.tokenizer.decode(sample["input_ids"][sample["roles"] == role])


# --- roles ------------------------------------------------------------------------------------------------------------


def test_roles_of_one_turn():
    sample = encode(conversation("<image>Read every digit.", "Top left red one."), PROCESSOR)
    assert words(sample, INSTRUCTION) == "Read every digit."
    assert words(sample, RESPONSE) == "Top left red one.<|end|>"
    assert words(sample, VISUAL) == "<image>" * IMAGE_TOKENS
    assert words(sample, OTHER) == "<|user|><|end|><|assistant|>"
    assert torch.equal(sample["labels"] != -100, sample["roles"] == RESPONSE)
    assert torch.equal(sample["labels"][sample["roles"] == RESPONSE], sample["input_ids"][sample["roles"] == RESPONSE])


def test_roles_of_several_turns_images_and_a_system_prompt():
    sample = encode(
        conversation("<image>One? <image>Two?", "First.", "Third?", "Second.", images=2, system="Be short."), PROCESSOR
    )
    assert words(sample, INSTRUCTION) == "One? Two?Third?"
    assert words(sample, RESPONSE) == "First.<|end|>Second.<|end|>"
    assert int((sample["roles"] == VISUAL).sum()) == 2 * IMAGE_TOKENS
    assert "Be short." in words(sample, OTHER)
    assert sample["pixel_values"].shape[0] == 2


def test_a_text_only_record_and_an_empty_instruction():
    text_only = encode(conversation("Hello?", "Yes.", images=0), PROCESSOR)
    assert "pixel_values" not in text_only
    assert not (text_only["roles"] == VISUAL).any()
    silent = encode(conversation("<image>", "An image."), PROCESSOR)
    assert not (silent["roles"] == INSTRUCTION).any()


@given(
    question=st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=30),
    answer=st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=30).filter(str.strip),
)
def test_any_words_get_their_roles(question, answer):
    """Words that look like the template's own markers may be refused, but never mislabelled."""
    if any(mark in question + answer for mark in ("<image>", "<|", "<pad>")):
        return
    sample = encode(conversation("<image>" + question, answer), PROCESSOR)
    assert words(sample, INSTRUCTION) == question
    assert words(sample, RESPONSE) == answer + "<|end|>"


def processor_with(template: str):
    other = build_processor()
    other.chat_template = template
    return other


def test_a_template_that_strips_words_is_read_right():
    stripped = processor_with(PROCESSOR.chat_template.replace("part['text']", "part['text'] | trim"))
    sample = encode(conversation("<image>  Read it. ", " Done.  "), stripped)
    assert words(sample, INSTRUCTION) == "Read it."
    assert words(sample, RESPONSE) == "Done.<|end|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("part['text']", "part['text'] | upper"), "changes the words"),
        (("part['text']", "part['text'] ~ part['text']"), "2 times"),
        (("part['text']", "'fixed'"), "0 times"),
    ],
)
def test_a_template_that_makes_roles_ambiguous_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        encode(conversation("<image>read it", "done"), processor_with(PROCESSOR.chat_template.replace(*change)))


def test_a_template_that_never_ends_a_response_is_refused():
    endless = processor_with(PROCESSOR.chat_template.replace("{{- '<|end|>' -}}", "{{- ' ' -}}"))
    record = conversation("<image>Read it.", "Red one.")
    with pytest.raises(DataError, match="never learn to stop"):
        encode(record, endless)


def test_a_response_is_never_cut():
    record = conversation("<image>Read every digit.", "Top left red one.")
    length = len(encode(record, PROCESSOR)["input_ids"])
    assert len(encode(record, PROCESSOR, length)["input_ids"]) == length
    with pytest.raises(DataError, match=rf"{length} tokens, but max_length is {length - 1}.*response would be cut"):
        encode(record, PROCESSOR, length - 1)


def test_a_record_without_an_answer_is_refused_for_training_only():
    record = conversation("<image>Read it.")
    with pytest.raises(DataError, match="last turn is by the user"):
        encode(record, PROCESSOR)
    assert not (encode(record, PROCESSOR, train=False)["roles"] == RESPONSE).any()


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_holds_every_sample_and_nothing_else(side):
    records = [
        conversation("<image>Read it.", "Red one."),
        conversation("Hello?", "Yes, hello to you.", images=0),
        conversation("<image>One? <image>", "Two.", images=2),
    ]
    samples = [encode(record, PROCESSOR) for record in records]
    batch = Collator(PROCESSOR.tokenizer.pad_token_id, side)(samples)
    for index, sample in enumerate(samples):
        real = batch["attention_mask"][index].bool()
        for name in ("input_ids", "roles", "labels"):
            assert torch.equal(batch[name][index][real], sample[name])
        assert bool((batch["roles"][index][~real] == OTHER).all() and (batch["labels"][index][~real] == -100).all())
    assert batch["pixel_values"].shape[0] == 3


def test_kept_samples_are_encoded_once():
    kept = EncodedConversations([conversation("<image>Read it.", "Red one.")], PROCESSOR, cache=True)
    assert kept[0] is kept[0]
    fresh = EncodedConversations(kept.conversations, PROCESSOR)
    assert fresh[0] is not fresh[0]
    assert torch.equal(fresh[0]["input_ids"], kept[0]["input_ids"])


def test_groups_share_a_picture_and_differ_in_the_instruction():
    records = [conversation("<image>One?", "1.", "Two?", "2."), conversation("<image>Three?", "3.")]
    other = Conversation((Turn("user", "<image>Alone?"), Turn("assistant", "Yes.")), (Image.new("RGB", (4, 4)),))
    groups = same_image_groups([*records, other], images=5, instructions=2, seed=0)
    assert len(groups) == 1
    assert len({one.turns[0].text for one in groups[0]}) == 2
    assert all(one.images == (PICTURE,) for one in groups[0])
    # Words wholly before the image cannot look at it; scoring such a group was refused in the middle of a run.
    before = Conversation((Turn("user", "Before?<image>"), Turn("assistant", "Yes.")), (PICTURE,))
    asked = same_image_groups([*records, before], images=5, instructions=9)
    assert {one.turns[0].text.replace("<image>", "") for one in asked[0]} == {"One?", "Two?", "Three?"}
    with pytest.raises(DataError, match="two different instructions"):
        same_image_groups([other], images=5, instructions=2)


# --- files ------------------------------------------------------------------------------------------------------------

GOOD = {
    "id": 7,
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    PICTURE.save(tmp_path / "sub" / "b.jpg")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def read(folder: Path, *records: object, lines: bool = False) -> list[Conversation]:
    path = folder / ("data.jsonl" if lines else "data.json")
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(list(records)), encoding="utf-8")
    return read_conversations(path)


@pytest.mark.parametrize("lines", [False, True])
def test_good_records_are_read(folder, lines):
    multi = {
        "image": ["a.png", "sub/b.jpg"],
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "One <image>\nor two\n<image>?"},
            {"from": "gpt", "value": "Both."},
        ],
    }
    text_only = [
        {"image": value, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
        for value in (None, "")
    ]
    first, second, *rest = read(folder, GOOD, multi, *text_only, lines=lines)
    assert first.turns == (Turn("user", "<image>Q?"), Turn("assistant", "A."))
    assert "id 7" in first.place
    assert second.turns[1].text == "One <image>or two<image>?"
    assert [picture.size for picture in second.pictures()] == [(48, 48)] * 2
    assert all(record.images == () for record in rest)


def turns(*pairs: tuple[str, str]) -> dict[str, object]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs]}


BAD = {
    "not an object": (3, "an object is accepted"),
    "no conversations": ({"id": 1}, "keys 'id' tell no known format"),
    "conversations is text": ({"conversations": "hi"}, "'conversations' is str"),
    "no turns": ({"conversations": []}, "no turns"),
    "turn is text": ({"conversations": ["hi"]}, "turn 1"),
    "value is a number": ({"conversations": [{"from": "human", "value": 3}]}, "turn 1"),
    "unknown role": (turns(("human", "Q"), ("bot", "A")), "unknown role 'bot'"),
    "no role": ({"conversations": [{"value": "Q"}]}, "unknown role None"),
    "answer first": (turns(("gpt", "A"), ("human", "Q")), "must alternate"),
    "two questions": (turns(("human", "Q"), ("human", "Q")), "must alternate"),
    "late system turn": (turns(("human", "Q"), ("gpt", "A"), ("system", "S")), "after the first turn"),
    "empty answer": (turns(("human", "Q"), ("gpt", "")), "answer in turn 2 is empty"),
    "blank answer": (turns(("human", "Q"), ("gpt", " \n")), "answer in turn 2 is empty"),
    "tag without image": (
        turns(("human", "<image>Q"), ("gpt", "A")),
        "1 <image> tag(s) in the text but 0 image(s)",
    ),
    "image without tag": (
        {"image": "a.png", **turns(("human", "Q"), ("gpt", "A"))},
        "0 <image> tag(s) in the text but 1",
    ),
    "two tags, one image": (
        {"image": "a.png", **turns(("human", "<image><image>Q"), ("gpt", "A"))},
        "2 <image> tag(s)",
    ),
    "tag in an answer": ({"image": "a.png", **turns(("human", "Q"), ("gpt", "<image>A"))}, "user turns only"),
    "image is a number": ({**GOOD, "image": 3}, "'image' is 3"),
    "image list with null": ({**GOOD, "image": ["a.png", None]}, "'image' is"),
    "outside the root": ({**GOOD, "image": "../a.png"}, "outside the image root"),
    "absolute path": ({**GOOD, "image": "/etc/passwd"}, "outside the image root"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_record_is_refused_with_file_and_number(folder, case):
    record, message = BAD[case]
    with pytest.raises(DataError) as caught:
        read(folder, GOOD, record)
    assert message in str(caught.value)
    assert "data.json, record 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "does not exist"),
        ("cut.png", "cannot be read"),
        ("text.png", "cannot be read"),
        ("sub", "cannot be read"),
    ],
)
def test_a_picture_that_cannot_be_read_is_an_error_not_a_black_square(folder, name, message):
    (record,) = read(folder, {**GOOD, "image": name})
    with pytest.raises(DataError, match=message) as caught:
        encode(record, PROCESSOR)
    assert "record 1, id 7" in str(caught.value)


def test_an_image_is_upright_and_grey_levels_of_16_bits_are_scaled(tmp_path):
    # Both were silent: photographs lay on their side, and 16-bit images were white.
    photo, exif = Image.new("RGB", (2, 1), (250, 10, 10)), Image.Exif()
    photo.putpixel((1, 0), (10, 10, 250))
    exif[ExifTags.Base.Orientation] = 6
    photo.save(tmp_path / "photo.png", exif=exif)
    upright = open_picture(tmp_path / "photo.png", "here")
    assert upright.size == (1, 2) and upright.getpixel((0, 0)) == (250, 10, 10)
    levels = np.array([[0, 257, 30000, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    told = np.asarray(open_picture(tmp_path / "deep.png", "here"))
    assert told[0].tolist() == [[value] * 3 for value in (0, 1, 117, 255)]
    for values, kind in ((levels.astype(np.int32), "32-bit integers"), (levels / np.float32(65535), "floating-point")):
        Image.fromarray(values.astype(np.float32) if kind != "32-bit integers" else values).save(tmp_path / "raw.tiff")
        with pytest.raises(DataError, match=f"record 3: image .*raw.tiff has {kind}"):
            open_picture(tmp_path / "raw.tiff", "record 3")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", "[{]", "line 1, column 3"),
        ("d.json", "{}", "top level is dict"),
        ("d.json", "[]", "no records"),
        ("d.jsonl", "", "no records"),
        ("d.jsonl", json.dumps(GOOD) + "\n{broken\n", "line 2: not valid JSON"),
        ("d.csv", "a,b", "unknown kind of data file '.csv'"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message.replace("[", r"\[")):
        read_conversations(folder / name)


def test_the_kind_of_a_record_is_read_under_both_names(folder):
    kinds = [{**GOOD, **extra} for extra in ({"kind": "x"}, {"category": "y"}, {"kind": None}, {})]
    assert [record.kind for record in read(folder, *kinds)] == ["x", "y", "", ""]


def test_missing_files_and_folders_are_named(folder):
    (folder / "folder.json").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_conversations(folder / "folder.json")
    with pytest.raises(DataError, match="does not exist"):
        read_conversations(folder / "none.json")
    with pytest.raises(DataError, match="image root"):
        read_conversations(folder / "none.json", folder / "nowhere")
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_conversations(folder / "bytes.json")


def test_a_line_separator_inside_a_jsonl_string_ends_no_record(folder):
    text = json.dumps({**GOOD, "id": "a\u2028b"}, ensure_ascii=False)
    (folder / "d.jsonl").write_text(text, encoding="utf-8")
    assert len(read_conversations(folder / "d.jsonl")) == 1
