"""The main job, small: every stage, the summary that machines read, and going on where it stopped."""

from __future__ import annotations

import json
import math

import pytest

from align_ti.demo import LABELS, TRAINING, objectives, run_demo
from align_ti.digits.files import Sizes
from align_ti.digits.questions import KINDS
from align_ti.errors import RunError
from align_ti.report.page import write_report

SIZES = Sizes(train=4, validation=1, test=3)
SHORT = TRAINING.model_copy(update={"max_steps": 7, "logging_steps": 1, "per_device_train_batch_size": 4})


def test_the_demo_measures_every_method_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "demo"
    stages = {}

    def advance(stage, done, total):
        stages[stage] = (done, total)

    summary = run_demo(out, seed=1, sizes=SIZES, training=SHORT, advance=advance)
    assert all(done == total for done, total in stages.values())
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["seed"] == 1 and summary["pictures"] == 3
    for name in LABELS:
        assert set(summary["accuracy"][name]) == {"overall", *KINDS}
        low, high = summary["interval_95"][name]["overall"]
        assert 0 <= low <= summary["accuracy"][name]["overall"] <= high <= 100
    for name in ("sft", "kd", "align_ti"):
        assert summary["seconds_per_step"][name] > 0
        assert summary["divergence_nats"][name] > 0
    assert summary["layer"] == int(max(summary["layer_scores"], key=summary["layer_scores"].get))
    assert 0 < summary["branch_share"]["first"] <= 1
    # The same start and the same order of records: the first SFT value is one number for all methods.
    first = [json.loads((out / name / "metrics.jsonl").read_text().splitlines()[0])["sft"] for name in objectives(0)]
    # Chunks hold other rows with other terms, so float32 sums in another order: some units of 6e-8 on each row's logits.
    assert all(math.isclose(value, first[0], rel_tol=1e-5) for value in first)
    parts = {"draw the benchmark", "load models", "prepare training data", "measure: answers", "measure: divergence"}
    parts |= {"score the teacher's layers", "write the report", "other", "train: SFT", "train: Align-TI"}
    assert parts <= summary["spent_seconds"].keys()
    page = write_report(out).read_text()
    assert all(label in page for label in ("teacher", "SFT + vanilla KD", "Align-TI"))
    assert page.count("data:image/png") >= 8

    (out / "align_ti" / "student" / "model.safetensors").touch()
    stamp = (out / "align_ti" / "student" / "model.safetensors").stat().st_mtime_ns
    (out / "evaluation-kd.json").unlink()
    again = run_demo(out, seed=1, sizes=SIZES, training=SHORT)
    assert {**again, "spent_seconds": None} == {**summary, "spent_seconds": None}
    assert (out / "align_ti" / "student" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(RunError, match="another seed"):
        run_demo(out, seed=2, sizes=SIZES, training=SHORT)


def test_methods_that_are_trained_side_by_side_end_as_those_in_turn(tmp_path):
    tiny, short = Sizes(train=2, validation=1, test=1), SHORT.model_copy(update={"max_steps": 2})
    stages: dict[str, tuple[int, int]] = {}

    def advance(stage, done, total):
        stages[stage] = (done, total)

    in_turn = run_demo(tmp_path / "in turn", sizes=tiny, training=short)
    side_by_side = run_demo(tmp_path / "side by side", sizes=tiny, training=short, jobs=2, advance=advance)
    own = ("spent_seconds", "seconds_per_step", "peak_memory_mib", "provenance")
    assert {**side_by_side, **dict.fromkeys(own)} == {**in_turn, **dict.fromkeys(own)}
    assert stages["train: Align-TI"] == stages["train: SFT"] == (2, 2)
    assert "train and measure, 2 at a time" in side_by_side["spent_seconds"]
    for method in objectives(0):
        weights = [(tmp_path / name / method / "student" / "model.safetensors") for name in ("in turn", "side by side")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (tmp_path / "side by side" / "cache").exists()


def test_the_three_methods_differ_in_their_terms_alone():
    chosen = objectives(3)
    assert [objective.active for objective in chosen.values()] == [("sft",), ("sft", "kd"), ("sft", "kd", "iva", "tpa")]
    assert chosen["align_ti"].iva.layer == 3
    for objective in chosen.values():
        assert {getattr(objective, name).weight for name in objective.active} == {1.0}
