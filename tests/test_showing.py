"""What the report shows of the inside of models: the same numbers as by the plainest way, and notes where there is nothing to show."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from align_ti.config import Teacher
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.groups import same_image_groups
from align_ti.data.lengths import last_response
from align_ti.data.roles import encode, model_inputs
from align_ti.interactions.layer_scores import score_layers
from align_ti.models.loading import load_model, load_processor
from align_ti.pipeline.showing import CANDIDATES, NEXT, STEPS, chosen_records, show_inside, visible
from align_ti.runs import RunFolder, read_json
from tests import small


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    small.write_pair(folder)
    return folder


@pytest.fixture(scope="module")
def records(pair) -> list[Conversation]:
    return small.write_records(pair, pictures=2)


@pytest.fixture(scope="module")
def shown(pair, records, tmp_path_factory) -> RunFolder:
    """Teacher and student, shown along two answers and two images."""
    run = RunFolder(tmp_path_factory.mktemp("run"))
    models = {"teacher": named(pair, "teacher"), "before": named(pair, "student")}
    show_inside(run, models, records, all_wrong(records), count=2, layer=0)
    return run


def all_wrong(records: list[Conversation]) -> dict[str, list[bool]]:
    """A teacher that is always right, and a student that never is."""
    return {"teacher": [True] * len(records), "before": [False] * len(records)}


def named(folder: Path, name: str) -> Teacher:
    return Teacher(path=str(folder / name), dtype="float32")


def test_what_comes_next_is_what_the_model_says_behind_the_candidate(pair, records, shown):
    told, processor = read_json(shown.transitions), load_processor(str(pair / "student"))
    assert not told["notes"] and len(told["answers"]) == 2
    models = {
        "teacher": load_model(str(pair / "teacher"), "float32"),
        "before": load_model(str(pair / "student"), "float32"),
    }
    chosen = [records[index] for index in chosen_records(records, all_wrong(records), 2)]
    for answer, record in zip(told["answers"], chosen, strict=True):
        assert 1 <= len(answer["steps"]) <= STEPS
        assert (answer["question"], answer["answer"]) == (
            record.turns[0].text.replace("<image>", ""),
            record.turns[1].text,
        )
        batch = Collator(processor.tokenizer.pad_token_id)([encode(record, processor)])
        start, inputs = last_response(batch["roles"][0]), model_inputs(batch)
        for place, step in enumerate(answer["steps"][:2]):
            assert [one["own"] for one in step["candidates"]] == [True] + [False] * (CANDIDATES - 1)
            for candidate in step["candidates"]:
                # Bytes that are no text by themselves read alike, so one of the tokens that read so has to fit.
                tokens = tokens_of(processor, candidate["token"])
                assert any(fits(candidate, token, inputs, start + place, models, processor) for token in tokens)


def fits(candidate: dict, token: int, inputs: dict, place: int, models: dict, processor) -> bool:
    """Whether all that is told of a candidate is what the models say of this token, each in one pass over the words up to it."""
    ids, behind = inputs["input_ids"][:, : place + 1].clone(), {}
    ids[0, -1] = token
    for name, model in models.items():
        with torch.no_grad():
            logits = model(**cut(inputs, ids)).logits[0].double()
        behind[name] = logits[-1].log_softmax(-1)
        if candidate["probability"][name] != pytest.approx(float(logits[-2].softmax(-1)[token]), abs=1e-3):
            return False
    assert 1 <= len(candidate["next"]) <= NEXT
    for one in candidate["next"]:
        following = tokens_of(processor, one["token"])
        said = [{name: float(row[number].exp()) for name, row in behind.items()} for number in following]
        if not any(one["probability"] == pytest.approx(each, abs=1e-3) for each in said):
            return False
    kl = float((behind["teacher"].exp() * (behind["teacher"] - behind["before"])).sum())
    return candidate["kl"] == {"before": pytest.approx(kl, rel=1e-3, abs=1e-3)}


def cut(inputs: dict, ids: torch.Tensor) -> dict:
    """The inputs with other tokens, and nothing behind them."""
    length = ids.shape[1]
    kept = {name: value[:, :length] if name == "attention_mask" else value for name, value in inputs.items()}
    return {**kept, "input_ids": ids}


def tokens_of(processor, text: str) -> list[int]:
    """The tokens that read so."""
    return [number for number in range(len(processor.tokenizer)) if visible(processor, number) == text]


def test_where_models_look_has_the_layers_that_are_scored(pair, records, shown):
    told, processor = read_json(shown.looks), load_processor(str(pair / "teacher"))
    assert not told["notes"]
    groups, collate = same_image_groups(records, 2, 4), Collator(processor.tokenizer.pad_token_id)
    batches = [collate([encode(one, processor, train=False) for one in group]) for group in groups]
    scores = score_layers(load_model(str(pair / "teacher"), "float32"), batches)
    assert {
        int(layer): pytest.approx(value, abs=1e-4) for layer, value in told["models"]["teacher"]["scores"].items()
    } == scores
    assert told["models"]["teacher"]["layer"] == 0
    students = told["models"]["before"]["scores"]
    assert str(told["models"]["before"]["layer"]) == max(students, key=students.get)
    for picture, group in zip(told["pictures"], groups, strict=True):
        assert picture["instructions"] == [one.turns[-1].text.replace("<image>", "") for one in group]
        assert (shown.shown / picture["picture"]).is_file()
        for one in picture["models"].values():
            assert len(one["weights"]) == len(group)
            for weights in one["weights"]:
                assert len(weights) == math.prod(one["grid"])
                assert sum(weights) == pytest.approx(1, abs=1e-3)


def test_nothing_is_written_if_nothing_is_asked_for(pair, records, tmp_path):
    show_inside(RunFolder(tmp_path), {"teacher": named(pair, "teacher")}, records, {}, count=0)
    assert not list(tmp_path.iterdir())


def test_records_without_a_second_instruction_are_told_in_a_note(pair, records, tmp_path):
    run, one = (
        RunFolder(tmp_path),
        [dataclasses.replace(records[0], turns=(*records[0].turns[:1], Turn("assistant", "Red.")))],
    )
    show_inside(run, {"student": named(pair, "student")}, one, {"student": [True]}, count=3)
    assert "two different instructions" in read_json(run.looks)["notes"][0]
    # Without a teacher there is nothing to diverge from.
    (answer,) = read_json(run.transitions)["answers"]
    assert all(not candidate["kl"] for step in answer["steps"] for candidate in step["candidates"])


def test_answers_are_chosen_where_most_was_learnt_from_different_kinds(records):
    right = {name: [False] * len(records) for name in ("teacher", "before", "student")}
    first, second = 2, next(index for index, one in enumerate(records) if one.kind != records[2].kind)
    for index in (first, second, first + 4):
        right["teacher"][index] = right["student"][index] = True
    assert records[first + 4].kind == records[first].kind
    assert set(chosen_records(records, right, 2)) == {first, second}
    assert len(chosen_records(records, right, 100)) == len(records)
