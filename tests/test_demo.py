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


class Stages(dict[str, tuple[int, int]]):
    """How far each stage of a demo came."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        self[stage] = (done, total)


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    """A demo whose methods were trained one after the other: its folder, summary and stages."""
    out, stages = tmp_path_factory.mktemp("demo") / "in turn", Stages()
    return out, run_demo(out, seed=1, sizes=SIZES, training=SHORT, advance=stages), stages


def test_the_demo_measures_every_method_and_goes_on_where_it_stopped(in_turn):
    out, summary, stages = in_turn
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


def test_methods_that_are_trained_side_by_side_end_as_those_in_turn(in_turn, tmp_path, monkeypatch):
    before, told, stages = *in_turn[:2], Stages()
    out = tmp_path / "side by side"
    summary = run_demo(out, seed=1, sizes=SIZES, training=SHORT, jobs=2, advance=stages)
    own = dict.fromkeys(("spent_seconds", "seconds_per_step", "peak_memory_mib", "provenance"))
    assert {**summary, **own} == {**told, **own}
    assert stages["train: Align-TI"] == stages["train: SFT"] == (7, 7)
    assert "train and measure, 2 at a time" in summary["spent_seconds"]
    for method in objectives(0):
        weights = [folder / method / "student" / "model.safetensors" for folder in (before, out)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (out / "cache").exists()
    # Nothing is left to do, so no process is started.
    monkeypatch.setattr("align_ti.demo.side_by_side", None)
    assert {**run_demo(out, seed=1, sizes=SIZES, training=SHORT, jobs=2), **own} == {**told, **own}


def test_the_three_methods_differ_in_their_terms_alone():
    chosen = objectives(3)
    assert [objective.active for objective in chosen.values()] == [("sft",), ("sft", "kd"), ("sft", "kd", "iva", "tpa")]
    assert chosen["align_ti"].iva.layer == 3
    for objective in chosen.values():
        assert {getattr(objective, name).weight for name in objective.active} == {1.0}
