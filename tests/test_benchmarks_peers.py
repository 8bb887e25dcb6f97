"""The benchmark of peers: our side does the work that it says, TRL is given the same samples, and a missing TRL is told."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks import peers
from benchmarks.peer_runs import Work, measured, rollout, shape_work
from benchmarks.shapes import CPU, Decoder, Shape, Tower

from align_ti.data.roles import NO_LABEL

SMALL = Decoder(hidden=16, layers=1, heads=2, key_heads=1, head_dim=8, intermediate=16)
TINY: Shape = replace(
    CPU,
    student=SMALL,
    teacher=replace(SMALL, layers=2),
    tower=Tower(hidden=16, layers=1, heads=2, intermediate=16),
    vocabulary=50,
    side=2,
    instruction=3,
    response=4,
)


def plain_kd(work: Work) -> float:
    """The forward KL of the first batch from both models' full logits."""
    total, count = 0.0, 0
    for sample in work.samples[: work.batch]:
        inputs = {"input_ids": sample["input_ids"][None], "pixel_values": sample["pixel_values"]}
        with torch.no_grad():
            student, teacher = (model(**inputs).logits[0, :-1] for model in (work.student, work.teacher))
        rows = sample["labels"][1:] != NO_LABEL
        log_p, log_q = teacher.log_softmax(-1)[rows], student.log_softmax(-1)[rows]
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += int(rows.sum())
    return total / count


def test_our_run_does_the_plain_work_and_measures_it(tmp_path):
    work = shape_work(3, TINY)
    expected = plain_kd(work)
    result = measured("align_ti_kd", work, str(tmp_path))
    assert len(result["losses"]) == 3
    assert result["losses"][0] == pytest.approx(expected, rel=1e-4)
    assert result["samples_per_second"] > 0


def test_a_rollout_holds_the_samples_tokens():
    samples = shape_work(1, TINY).samples
    samples = [samples[0], {**samples[1], **{name: samples[1][name][:-2] for name in ("input_ids", "labels")}}]
    batch = rollout(samples, pad=2)
    both = {part: torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], 1) for part in ("ids", "mask")}
    for row, sample in enumerate(samples):
        assert torch.equal(both["ids"][row][both["mask"][row] == 1], sample["input_ids"])
        labels = sample["labels"][sample["labels"] != NO_LABEL]
        assert torch.equal(batch["completion_ids"][row][batch["completion_mask"][row] == 1], labels)
    assert int(batch["num_items_in_batch"]) == 4 + 2


def test_a_missing_trl_is_told_with_the_way_out(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else found(name, *rest))
    monkeypatch.setattr(sys, "argv", ["peers", "--out", str(tmp_path / "peers.json")])
    with pytest.raises(SystemExit, match=r"pip install --no-deps --target build/peers -r requirements/peers.txt"):
        peers.main()
    assert not (tmp_path / "peers.json").exists()


def test_other_work_is_not_compared():
    def runs(theirs: float) -> dict[str, list[dict[str, list[float]]]]:
        return {"align_ti_kd": [{"losses": [2.0]}], "trl_gold": [{"losses": [theirs]}]}

    peers.check_same_work("cpu", runs(2.001))
    with pytest.raises(SystemExit, match="trl_gold"):
        peers.check_same_work("cpu", runs(2.1))


def one_run(speed: float, memory: float | None) -> dict[str, float | None]:
    return {"samples_per_second": speed, "processor_seconds_per_sample": 2 / speed, "peak_memory_mib": memory}


def test_ratios_are_of_the_same_round():
    ours = [one_run(speed, 50.0) for speed in (4.0, 2.0, 6.0)]
    theirs = [one_run(speed, 100.0) for speed in (2.0, 1.0, 6.0)]
    found = peers.against(ours, theirs)
    assert found["our_speed_over_theirs"] == {"median": 2.0, "min": 1.0, "max": 2.0}
    assert found["our_processor_time_over_theirs"] == {"median": 0.5, "min": 0.5, "max": 1.0}
    assert found["our_memory_over_theirs"]["median"] == 0.5
    assert peers.against(ours, [one_run(1.0, None)] * 3)["our_memory_over_theirs"] is None
