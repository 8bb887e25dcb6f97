"""How near a student is to its teacher: each measure against a plain computation, record by record and token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from align_ti.config import Evaluation, Objective
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.roles import encode, model_inputs
from align_ti.evaluation.comparison import compare, read_models
from align_ti.evaluation.fidelity import Along, along_responses, own_answers
from align_ti.evaluation.predictions import whole_clusters
from align_ti.evaluation.statistics import interval
from align_ti.models.loading import load_model, load_processor
from align_ti.models.pairing import pair_up
from align_ti.pipeline.fidelity import clusters_of, fidelity
from align_ti.pipeline.measuring import evaluate_model, summarise
from align_ti.training.objective import distillation_loss
from align_ti.training.passes import candidates_for
from tests import small

SETTINGS = Evaluation(batch_size=32, max_new_tokens=4)
MEASURES = ["response_kl", "top1_agreement", "visual_kl", "transition_kl", "own_kl", "own_agreement"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    small.write_pair(folder)
    small.write_records(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    records = small.write_records(folder)
    # Two answers in one record, of which the last one alone has positions.
    turns = (*records[0].turns, Turn("user", "And now?"), Turn("assistant", "It is red."))
    records = [*records[:6], replace(records[6], turns=turns, images=records[0].images), *records[7:]]
    models = (load_model(str(folder / name), "float32") for name in ("student", "teacher"))
    return *models, load_processor(str(folder / "student")), records


@pytest.fixture(scope="module")
def answers(pair):
    """Answers of different lengths, one of them empty and one cut."""
    words = ["It is red.", "", "The digit is 3", "It", "I see a 5 and a 7 here."]
    return [(words[number % 5], number % 5 == 2) for number in range(len(pair[3]))]


@pytest.fixture(scope="module")
def found(pair, answers):
    student, teacher, processor, records = pair
    return fidelity(student, teacher, processor, records, answers, SETTINGS, layer=1)


@torch.no_grad()
def log_p(model, sample, **options):
    return model(**model_inputs(sample), **options)


def alone(record, processor):
    return {name: value if name == "pixel_values" else value[None] for name, value in encode(record, processor).items()}


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def plain_rows(pair, records):
    """For each record: KL and agreement at each response token, and its place in the last response."""
    student, teacher, processor, _ = pair
    table = []
    for record in records:
        sample = alone(record, processor)
        q, p = (log_p(model, sample).logits[0].log_softmax(-1) for model in (student, teacher))
        labelled = (sample["labels"][0] != -100).tolist()
        place = 0
        rows = []
        for step, is_response in enumerate(labelled):
            place = place + 1 if is_response else 0
            if is_response:
                agrees = float(q[step - 1].argmax() == p[step - 1].argmax())
                rows.append([float(kl(p[step - 1], q[step - 1])), agrees, place, step])
        last_start = max(row[3] for row in rows if row[2] == 1)
        table.append([(value, agrees, place if step >= last_start else 0) for value, agrees, place, step in rows])
    return table


def test_responses_are_measured_token_by_token(pair, found):
    rows = [row for record in plain_rows(pair, pair[3]) for row in record]
    assert found["response_kl"]["value"] == pytest.approx(np.mean([row[0] for row in rows]), rel=1e-5)
    assert found["top1_agreement"]["value"] == pytest.approx(100 * np.mean([row[1] for row in rows]))
    assert 0 < found["top1_agreement"]["value"] < 100
    gold = found["by_position"]["gold"]
    assert sum(one["tokens"] for one in gold) == sum(row[2] > 0 for row in rows) < len(rows)
    for one in gold:
        inside = [row for row in rows if one["position"] <= row[2] <= one["to"]]
        assert one["tokens"] == len(inside)
        assert one["kl"]["value"] == pytest.approx(np.mean([row[0] for row in inside]), rel=1e-5)
        assert one["agreement"]["value"] == pytest.approx(100 * np.mean([row[1] for row in inside]))
        assert one["kl"]["low"] is None or one["kl"]["low"] <= one["kl"]["value"] <= one["kl"]["high"]


def test_a_record_is_encoded_once_for_models_of_one_processor(pair):
    student, teacher, processor, records = pair
    with patch("align_ti.evaluation.fidelity.encode", wraps=encode) as encoded:
        one = along_responses(student, teacher, processor, records, SETTINGS)
        assert encoded.call_count == len(records)
        other = along_responses(student, teacher, processor, records, SETTINGS, teacher_processor=processor)
        assert encoded.call_count == 3 * len(records)
    np.testing.assert_array_equal(one.kl, other.kl)


def test_own_answers_are_read_up_to_where_the_student_said_them(pair, found, answers):
    records = pair[3]
    rows = []
    for record, (text, cut) in zip(records, answers, strict=True):
        if text:
            own = replace(record, turns=(*record.turns[:-1], Turn("assistant", text)))
            (measured,) = plain_rows(pair, [own])
            last = [row for row in measured if row[2] > 0]
            rows += last[:-1] if cut else last
    assert found["own_kl"]["value"] == pytest.approx(np.mean([row[0] for row in rows]), rel=1e-5)
    assert found["own_agreement"]["value"] == pytest.approx(100 * np.mean([row[1] for row in rows]))
    own = found["by_position"]["own"]
    assert [one["tokens"] for one in own] == [
        sum(one["position"] <= row[2] <= one["to"] for row in rows) for one in own
    ]
    empty = sum(not text for text, _ in answers)
    assert found["notes"] == [
        f"{empty} of {len(records)} self-generated answers are empty or contain special tokens as text; they are excluded."
    ]


def test_visual_rows_are_measured_as_iva_does(pair, found):
    student, teacher, processor, records = pair
    values = []
    for record in records:
        sample = alone(record, processor)
        teacher.set_attn_implementation("eager")
        read = log_p(teacher, sample, output_attentions=True, return_dict=True)
        teacher.set_attn_implementation("sdpa")
        visual, instruction = (sample["roles"][0] == role for role in (1, 2))
        alpha = read.attentions[1][0].mean(0)[instruction].mean(0)[visual]
        p, q = read.logits[0].log_softmax(-1), log_p(student, sample).logits[0].log_softmax(-1)
        values.append(float((alpha / alpha.sum() * kl(p, q)[visual]).sum()))
    assert found["visual_kl"]["value"] == pytest.approx(np.mean(values), rel=1e-5)
    assert found["layer"] == 1


def test_transition_rows_are_measured_as_tpa_does(pair, found):
    student, teacher, processor, records = pair
    batch = Collator(processor.tokenizer.pad_token_id)([encode(record, processor) for record in records])
    options, pairing = Objective.only(tpa={}).terms["tpa"], pair_up(student, teacher, processor)
    drawn = candidates_for(student, teacher, batch, options, torch.Generator().manual_seed(0), pairing).tokens
    ends = {student.generation_config.eos_token_id, student.config.image_token_id}
    values = []
    for index, record in enumerate(records[:3]):
        sample = alone(record, processor)
        for step in (sample["roles"][0] == 3).nonzero().flatten().tolist():
            behind = []
            for token in drawn[index, step].tolist():
                if token in ends:
                    continue
                ids = sample["input_ids"].clone()
                ids[0, step] = token
                q, p = (
                    log_p(model, {**sample, "input_ids": ids}).logits[0, step].log_softmax(-1)
                    for model in (student, teacher)
                )
                behind.append(float(kl(p, q)))
            if behind:
                values.append(np.mean(behind))
    measured = found["scores"]["metrics"]["transition_kl"]
    names = found["scores"]["cluster_lists"][measured["cluster_list"]]
    clusters = clusters_of(records)
    # The first image's records are the first three and a fourth, which is measured with them.
    assert clusters[:3] == [clusters[0]] * 3
    for record_sums in [measured["sums"][names.index(clusters[0])]]:
        assert record_sums[1] >= len(values)
    with torch.no_grad():
        whole = distillation_loss(student, teacher, batch, Objective.only(tpa={}), drawn, pairing=pairing)
    assert found["transition_kl"]["value"] == pytest.approx(float(whole.terms["tpa"]), rel=1e-5)
    only = [encode(record, processor) for record in records[:3]]
    part = Collator(processor.tokenizer.pad_token_id)(only)
    length = part["input_ids"].shape[1]
    with torch.no_grad():
        few = distillation_loss(student, teacher, part, Objective.only(tpa={}), drawn[:3, :length], pairing=pairing)
    assert float(few.terms["tpa"]) == pytest.approx(np.mean(values), rel=1e-5)


def test_a_model_is_faithful_to_itself(pair, answers):
    _, teacher, processor, records = pair
    found = fidelity(teacher, teacher, processor, records, answers, SETTINGS, layer=0)
    for name in MEASURES:
        wanted = 100 if name.endswith("agreement") else 0
        assert found[name]["value"] == pytest.approx(wanted, abs=1e-6), name
    for table in found["by_position"].values():
        assert all(one["agreement"]["value"] == 100 and abs(one["kl"]["value"]) < 1e-6 for one in table)


def test_batches_do_not_matter(pair, answers, found):
    student, teacher, processor, records = pair
    again = fidelity(student, teacher, processor, records, answers, Evaluation(batch_size=5), layer=1)
    # Candidates are drawn batch by batch.
    for name in set(MEASURES) - {"transition_kl"}:
        assert again[name]["value"] == pytest.approx(found[name]["value"], rel=1e-4), name
    assert again["transition_kl"]["value"] == pytest.approx(found["transition_kl"]["value"], rel=0.5)


def test_what_cannot_be_measured_is_named(pair):
    student, teacher, processor, records = pair
    one = fidelity(student, teacher, processor, records[:1], [("", False)], SETTINGS)
    assert set(one["unmeasured"]) == {"visual_kl", "own_kl"}
    assert "no image of the training data has two different instructions" in one["unmeasured"]["visual_kl"]
    assert one["notes"][0].startswith("visual_kl could not be measured: no image")
    words = [Conversation((Turn("user", "Is it red?"), Turn("assistant", "It is red.")), place="a record")]
    text = fidelity(student, teacher, processor, words, [("No.", False)], SETTINGS, layer=0)
    assert "none of the 1 records has a position that iva compares" in text["unmeasured"]["visual_kl"]
    assert text["response_kl"]["value"] > 0


def test_costly_measures_are_taken_on_some_pictures(pair, answers, found):
    student, teacher, processor, records = pair
    settings = SETTINGS.model_copy(update={"fidelity_records": 2})
    few = fidelity(student, teacher, processor, records, answers, settings, layer=1)
    (chosen,) = {clusters_of(records)[index] for index in whole_clusters(clusters_of(records), 2)}
    inside = [index for index, name in enumerate(clusters_of(records)) if name == chosen]
    assert 2 <= len(inside) < len(records)
    assert few["response_kl"] == found["response_kl"]
    alike = fidelity(
        student, teacher, processor, [records[i] for i in inside], [answers[i] for i in inside], SETTINGS, layer=1
    )
    for name in ("visual_kl", "own_kl", "own_agreement"):
        assert few[name]["value"] == pytest.approx(alike[name]["value"], rel=1e-5), name
    none = fidelity(
        student, teacher, processor, records, answers, SETTINGS.model_copy(update={"fidelity_records": 0}), layer=1
    )
    assert set(none["unmeasured"]) == {"visual_kl", "transition_kl", "own_kl"}
    assert none["top1_agreement"] == found["top1_agreement"]


def test_one_measure_is_taken_where_the_other_is_not_defined(pair, answers):
    student, teacher, processor, records = pair
    wrong = fidelity(student, teacher, processor, records[:4], answers[:4], SETTINGS, layer=99)
    assert set(wrong["unmeasured"]) == {"visual_kl"}
    assert wrong["transition_kl"]["value"] > 0


def test_far_positions_are_told_in_ranges():
    tokens = 70
    along = Along(np.ones(tokens), np.arange(tokens) < 20, np.zeros(tokens, dtype=int), np.arange(1, tokens + 1))
    table = along.by_position(["a", "b"])
    assert [(one["position"], one["to"]) for one in table[14:]] == [(15, 15), (16, 16), (17, 32), (33, 64), (65, 70)]
    assert [one["tokens"] for one in table[16:]] == [16, 32, 6]
    assert table[16]["agreement"]["value"] == 25
    assert table[0]["kl"]["clusters"] == 1
    assert table[0]["kl"]["low"] is None


def test_answers_that_cannot_be_read_back_are_left_out(pair):
    _, _, processor, records = pair
    own = own_answers(
        [processor], records[:3], [("red", False), (f"{processor.tokenizer.eos_token} red", False), ("", True)]
    )
    assert (own.record, own.left_out) == ([0], 2)


def test_evaluation_holds_the_fidelity_and_models_are_compared_by_it(folder, tmp_path):
    records = small.write_records(folder)
    made = {}
    for name in ("student", "teacher"):
        made[name] = evaluate_model(str(folder / name), records, SETTINGS, teacher=str(folder / "teacher"))
        (tmp_path / f"evaluation-{name}.json").write_text(json.dumps(made[name], allow_nan=False))
    result = made["student"]
    assert result["divergence"] == result["fidelity"]["response_kl"]["value"]
    assert isinstance(result["fidelity"]["layer"], int)
    assert set(result["fidelity"]) >= {"response_kl", "top1_agreement", "visual_kl", "transition_kl", "by_position"}
    found = compare(read_models([tmp_path]), all_metrics=True)
    row = next(row for row in found["rows"] if row["metric"] == "response_kl")
    assert (row["benchmark"], row["unit"]) == ("fidelity", "nats")
    (difference,) = row["differences"]
    assert difference["value"] == pytest.approx(-result["divergence"], abs=1e-6)
    assert difference["low"] < difference["high"] < 0
    measured = result["fidelity"]["response_kl"]
    assert measured["low"] < measured["value"] < measured["high"]
    summary = summarise("t", 0, made, {name: name for name in made}, {})
    assert summary["fidelity"]["student"]["visual_kl"]["value"] == result["fidelity"]["visual_kl"]["value"]


def test_intervals_resample_pictures(pair, found):
    clusters = clusters_of(pair[3])
    assert len(set(clusters)) == 3
    told = found["scores"]["metrics"]["response_kl"]
    assert len(told["sums"]) == told["clusters"] == 3
    along = Along(np.arange(12.0), np.ones(12, dtype=bool), np.arange(12), np.ones(12, dtype=int))
    assert interval(along.metric("kl", clusters)).clusters == 3
