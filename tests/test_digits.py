"""The benchmark: real scans, disjoint splits, right answers, the same files from the same seed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch

from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.roles import encode
from align_ti.data.sources import read_conversations
from align_ti.digits.files import Sizes, write_benchmark
from align_ti.digits.models import STUDENT, build_model, build_processor
from align_ti.digits.pretraining import dialogue_batch, pixels, save
from align_ti.digits.questions import KINDS, NUMBERS, all_phrases, ask
from align_ti.digits.scans import load_scans
from align_ti.digits.scenes import COLOURS, WORDS, draw_scene
from align_ti.errors import ConfigError, RunError

SPLITS = ("train", "validation", "test")


def test_splits_share_no_scan_and_use_all():
    used = [set(load_scans(split).index.tolist()) for split in SPLITS]
    assert sum(map(len, used)) == len(set.union(*used)) == 1797
    assert all(len(split) > 150 for split in used)


def test_scenes_follow_the_seed_and_differ_otherwise():
    scans = load_scans("train")
    one, two, other = (draw_scene(scans, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.figures == two.figures
    assert one.picture.tobytes() == two.picture.tobytes()
    assert one.picture.tobytes() != other.picture.tobytes()


def test_neither_colour_nor_place_alone_tells_the_digit():
    scans, random = load_scans("train"), np.random.default_rng(0)
    figures = [figure for _ in range(400) for figure in draw_scene(scans, random).figures]
    for key in ("colour", "place"):
        for value in {getattr(figure, key) for figure in figures}:
            digits = [figure.digit for figure in figures if getattr(figure, key) == value]
            assert max(np.bincount(digits)) / len(digits) < 0.25


def answer_again(kind: str, question: str, figures) -> str:
    """The right answer worked out from the question's words alone, apart from the code that made it."""
    text = question.lower().rstrip("?.")
    at = {f"{figure.place}": figure for figure in figures}
    named = sorted((text.find(place), place) for place in at if place in text)
    if kind == "digit":
        return f"It is a {WORDS[at[named[0][1]].digit]}."
    if kind == "colour":
        return f"It is {at[named[0][1]].colour}."
    if kind == "count":
        colour = next(colour for colour in COLOURS if f"are {colour}" in text)
        number = sum(figure.colour == colour for figure in figures)
        return f"{NUMBERS[number].capitalize()} {'digit is' if number == 1 else 'digits are'} {colour}."
    if kind == "where":
        (place,) = [p for p, f in at.items() if text.endswith(f"{f.colour} {WORDS[f.digit]}")]
        return f"It is at the {place}."
    if kind == "row":
        row = text.split()[2]
        names = [f"{f.colour} {WORDS[f.digit]}" for p, f in at.items() if p.startswith(row)]
        return (", then ".join(names).capitalize() or "Nothing") + "."
    if kind == "reading":
        return ", ".join(f"{p} {f.colour} {WORDS[f.digit]}" for p, f in at.items()).capitalize() + "."
    first, second = (at[place] for _, place in named)
    if kind == "add":
        return f"{WORDS[first.digit].capitalize()} plus {WORDS[second.digit]} is {NUMBERS[first.digit + second.digit]}."
    if first.digit == second.digit:
        return f"Neither, both are {WORDS[first.digit]}."
    more, less = sorted((first, second), key=lambda figure: -figure.digit)
    return f"The {WORDS[more.digit]} at the {more.place} is larger than {WORDS[less.digit]}."


def test_every_answer_is_right():
    scans, random = load_scans("test"), np.random.default_rng(3)
    seen = set()
    for _ in range(200):
        scene = draw_scene(scans, random)
        for question in ask(scene, random):
            assert question.answer == answer_again(question.kind, question.text, scene.figures)
            seen.add(question.kind)
    assert seen == set(KINDS)


def test_every_word_of_questions_and_answers_is_one_token():
    tokenizer, random = build_processor().tokenizer, np.random.default_rng(0)
    assert len(all_phrases()) > 100
    for _ in range(50):
        for question in ask(draw_scene(load_scans("train"), random), random):
            for text in (question.text, question.answer):
                expected = len(text.replace(",", " ,").replace("?", " ?").replace(".", " .").split())
                assert len(tokenizer.tokenize(text)) == expected, text


def test_pretraining_sees_what_the_ordinary_data_path_gives():
    """The fast path of pretraining equals processor, roles and collator."""
    processor, kinds = build_processor(), tuple(KINDS)
    scenes = [draw_scene(load_scans("train"), np.random.default_rng(seed)) for seed in range(16)]
    fast = dialogue_batch(scenes, np.random.default_rng(5), processor, kinds)
    random, records = np.random.default_rng(5), []
    for index, scene in enumerate(scenes):
        (question,) = ask(scene, random, (kinds[index % len(kinds)],)) or ask(scene, random, ("reading",))
        turns = (Turn("user", "<image>" + question.text), Turn("assistant", question.answer))
        records.append(Conversation(turns, (scene.picture,)))
    batch = Collator(processor.tokenizer.pad_token_id)([encode(record, processor) for record in records])
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(fast[name], batch[name]), name
    torch.testing.assert_close(pixels(scenes), batch["pixel_values"])


def test_the_benchmark_on_disk_is_read_by_the_ordinary_path_and_repeats(tmp_path):
    sizes = Sizes(train=3, validation=2, test=2, questions=8)
    for folder in ("one", "two"):
        write_benchmark(tmp_path / folder, seed=4, sizes=sizes)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for split in SPLITS:
        records = read_conversations(tmp_path / "one" / f"{split}.json")
        assert {record.kind for record in records} == set(KINDS)
        used = {
            scan for record in json.loads((tmp_path / "one" / f"{split}.json").read_text()) for scan in record["scans"]
        }
        assert used <= set(load_scans(split).index.tolist())
    with pytest.raises(RunError, match="not empty"):
        write_benchmark(tmp_path / "one", sizes=sizes)


def test_training_images_have_as_many_types_of_questions_as_asked_for(tmp_path):
    write_benchmark(tmp_path / "data", sizes=Sizes(train=40, validation=1, test=1, questions=2))
    records = read_conversations(tmp_path / "data" / "train.json")
    asked, kinds = Counter(record.images[0] for record in records), Counter(record.kind for record in records)
    # A scene whose digits all look alike in name and colour has no "where".
    assert len(asked) == 40 and set(asked.values()) <= {1, 2} and len(records) >= 78
    assert set(kinds) == set(KINDS) and max(kinds.values()) <= 20
    assert len(read_conversations(tmp_path / "data" / "test.json")) >= len(KINDS) - 1


def test_types_of_training_questions_come_in_the_proportions_of_a_mix(tmp_path):
    sizes = Sizes(train=60, validation=1, test=1, questions=6, mix={"count": 4, "reading": 0})
    write_benchmark(tmp_path / "data", sizes=sizes)
    content = json.loads((tmp_path / "data" / "train.json").read_text())
    kinds = Counter(one["kind"] for one in content)
    # Of 360 draws 144 are of count, of which an image asks each colour once, and 36 of each other type.
    assert 80 < kinds["count"] <= 160 and kinds["reading"] == 0
    assert all(15 < kinds[kind] < 60 for kind in set(KINDS) - {"count", "reading"})
    asked = [(one["image"], one["conversations"][0]["value"]) for one in content]
    assert len(set(asked)) == len(asked) and max(Counter(one["image"] for one in content).values()) <= 6
    assert len({one["id"] for one in content}) == len(content)
    # What is asked about test images does not depend on it.
    write_benchmark(tmp_path / "plain", sizes=replace(sizes, mix={}))
    assert (tmp_path / "plain" / "test.json").read_bytes() == (tmp_path / "data" / "test.json").read_bytes()
    for wrong in ({"mix": {"counting": 2}}, {"mix": {"count": -1}}, {"questions": 0}):
        with pytest.raises(ConfigError, match=r"sizes of the digits benchmark: .* accepted: .*digit, colour, count"):
            Sizes(**wrong)


def test_shipped_models_are_small_safe_and_share_one_tower():
    from safetensors import safe_open

    assets = files("align_ti.digits") / "assets"
    size, towers, parameters = 0, [], {}
    for part in ("teacher", "student"):
        kinds = {path.name.rpartition(".")[2] for path in (assets / part).iterdir()}
        assert kinds <= {"json", "jinja", "safetensors"}
        size += sum(len(path.read_bytes()) for path in (assets / part).iterdir())
        with safe_open(str(assets / part / "model.safetensors"), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parameters[part] = sum(tensor.numel() for tensor in tensors.values())
        towers.append({name: tensor for name, tensor in tensors.items() if "vision_tower" in name})
    assert size <= 8 * 2**20
    assert 1e6 <= parameters["teacher"] <= 3e6
    assert parameters["student"] <= parameters["teacher"] / 4
    assert towers[0].keys() == towers[1].keys()
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])


def test_shipped_models_have_the_names_of_weights_that_every_reader_knows(tmp_path):
    # They were saved as transformers 5.23 does, and 5.5 left their towers at random numbers with a warning.
    from safetensors import safe_open

    processor = build_processor()
    save(build_model(STUDENT, processor.tokenizer), processor, tmp_path / "made")
    assets = files("align_ti.digits") / "assets"
    for folder in (tmp_path / "made", assets / "teacher", assets / "student"):
        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            tower = [name for name in file.keys() if "vision_tower" in name]  # noqa: SIM118
        assert len(tower) == 69 and all("vision_tower.vision_model." in name for name in tower)
