"""Scores, intervals, answers and divergence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align_ti.config import Evaluation
from align_ti.data.conversation import Conversation, StoredPicture, Turn
from align_ti.errors import DataError
from align_ti.evaluation.fidelity import along_responses
from align_ti.evaluation.runner import answer, evaluate
from align_ti.evaluation.scoring import accuracy, by_kind, is_right
from align_ti.evaluation.tasks import question
from align_ti.models.loading import load_model, load_processor
from tests import small


@pytest.mark.parametrize(
    ("given_answer", "expected", "right"),
    [
        ("It is red.", "It is red.", True),
        ("  it  IS red ", "It is red.", True),
        ("It is red..", "It is red.", False),
        ("It is blue.", "It is red.", False),
        ("", "It is red.", False),
        ("red", "It is red.", False),
    ],
)
def test_exact_match(given_answer, expected, right):
    assert is_right(given_answer, expected) is right


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 10))
def test_the_interval_holds_the_share(right, per_picture):
    pictures = [str(index // per_picture) for index in range(len(right))]
    score = accuracy(right, pictures)
    assert score.per_cent == pytest.approx(100 * sum(right) / len(right))
    assert 0 <= score.low <= score.high <= 100
    assert score == accuracy(right, pictures)


def test_questions_about_one_picture_widen_the_interval():
    right = [index % 4 < 2 for index in range(400)]
    apart = accuracy(right, [str(index) for index in range(400)])
    together = accuracy(sorted(right), [str(index // 8) for index in range(400)])
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_scores_by_kind():
    scores = by_kind([True, False, True], ["a", "a", "b"], ["x", "y", "x"])
    assert {kind: score.per_cent for kind, score in scores.items()} == {
        "overall": pytest.approx(200 / 3),
        "x": 100.0,
        "y": 0.0,
    }
    with pytest.raises(ValueError, match="equal numbers"):
        accuracy([], [])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    small.write_pair(folder)
    records = small.write_records(folder)
    models = (load_model(str(folder / name), "float32") for name in ("student", "teacher"))
    return *models, load_processor(str(folder / "student")), records


def test_answers_do_not_depend_on_the_batch(pair):
    _, teacher, processor, records = pair
    questions = [question(record) for record in records[:6]]
    settings = [Evaluation(batch_size=size, max_new_tokens=6) for size in (1, 4)]
    assert answer(teacher, processor, questions, settings[0]) == answer(teacher, processor, questions, settings[1])


def test_evaluation_gives_every_answer_and_counts_cut_ones(pair):
    student, _, processor, records = pair
    seen = []
    result = evaluate(student, processor, records, Evaluation(batch_size=5, max_new_tokens=3), seen.append)
    assert len(result["answers"]) == len(records) == sum(seen) == result["accuracy"]["overall"]["questions"]
    assert set(result["accuracy"]) == {"overall", "digit", "colour", "count", "add"}
    assert 0 <= result["cut"] <= len(records)
    assert result["answers"][0]["image"].endswith("train-0.png")


def test_divergence_equals_its_definition_and_is_zero_from_oneself(pair):
    student, teacher, processor, records = pair
    from align_ti.data.roles import encode, model_inputs

    settings = Evaluation(batch_size=5)
    values = []
    for record in records:
        sample = {n: v if n == "pixel_values" else v[None] for n, v in encode(record, processor).items()}
        with torch.no_grad():
            s, t = (m(**model_inputs(sample)).logits[0].log_softmax(-1) for m in (student, teacher))
        rows = (sample["labels"][0] != -100).nonzero().flatten() - 1
        values += (t.exp() * (t - s)).sum(-1)[rows].tolist()
    expected = sum(values) / len(values)
    along = along_responses(student, teacher, processor, records, settings)
    assert along.kl.mean() == pytest.approx(expected, rel=1e-5)
    itself = along_responses(teacher, teacher, processor, records, settings)
    assert itself.kl.mean() == pytest.approx(0, abs=1e-7)
    assert itself.agrees.all()


def test_images_in_a_table_are_one_cluster_by_their_bytes():
    # Each record was a cluster of its own, so that intervals were far too narrow.
    turns = (Turn("user", "<image>What?"), Turn("assistant", "so"))
    one, two, other = (
        question(
            Conversation(turns, (StoredPicture(f"row {row}", lambda content=content: content),), place=f"row {row}")
        )
        for row, content in enumerate((b"image", b"image", b"another"))
    )
    assert one.picture == two.picture != other.picture


def test_a_models_own_penalties_do_not_change_its_answers(pair):
    _, model, processor, records = pair
    told = [question(one) for one in records[:3]]
    plain = answer(model, processor, told, Evaluation(max_new_tokens=6))
    model.generation_config.repetition_penalty, model.generation_config.num_beams = 9.0, 2
    try:
        assert answer(model, processor, told, Evaluation(max_new_tokens=6)) == plain
    finally:
        model.generation_config.repetition_penalty, model.generation_config.num_beams = 1.0, 1


def test_a_question_without_an_answer_is_refused():
    with pytest.raises(DataError, match="no answer to compare"):
        question(Conversation((Turn("user", "Q?"),)))
