"""What a run records of its cost: tokens, FLOPs, each term's share in the gradient; and that recording changes nothing in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from align_ti.config import Recipe
from align_ti.data.roles import RESPONSE
from align_ti.errors import ConfigError, InterruptedRunError
from align_ti.flops import FORMULAS
from align_ti.models.loading import load_model, load_processor
from align_ti.phases import OTHER, Stopwatch, outside_of_steps, phase
from align_ti.pipeline.training import distil
from align_ti.report.page import write_report
from align_ti.runs import RunFolder, read_lines
from align_ti.training.gradients import norm_of
from align_ti.training.trainer import AlignTITrainer
from align_ti.training.watch import WARM_UP
from align_ti.training.work import FILE, TrainingWork
from tests import small
from tests.launching import on_processes

STEPS = WARM_UP + 1
OBJECTIVE = {"iva": {"layer": 1}}
TERMS = ("sft", "kd", "iva", "tpa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    return path


def recipe(folder: Path, out: Path, accumulate: int = 1, steps: int = STEPS, **training: object) -> Recipe:
    content = small.recipe(folder, out=str(out), objective=OBJECTIVE)
    content["training"] |= {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulate,
        "max_grad_norm": 1e9,
        **training,
    }
    return Recipe.model_validate(content)


def logged(run: RunFolder) -> list[dict[str, float]]:
    """The steps' own lines, without what the machine adds."""
    return [
        {name: value for name, value in line.items() if name not in {"time", "memory_mib"}}
        for line in run.read_metrics()
    ]


class Spy(TrainingWork):
    """Adds the tokens up by itself, record by record."""

    tokens = response_tokens = 0

    def add(self, batch) -> None:
        super().add(batch)
        for mask, roles in zip(batch["attention_mask"].tolist(), batch["roles"].tolist(), strict=True):
            type(self).tokens += sum(mask)
            type(self).response_tokens += roles.count(RESPONSE)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_is_measured_is_the_same_to_the_last_digit(folder, tmp_path, monkeypatch, accumulate):
    monkeypatch.setattr("align_ti.pipeline.training.TrainingWork", Spy)
    Spy.tokens = Spy.response_tokens = 0
    found: list[list[torch.Tensor]] = []
    monkeypatch.setattr("align_ti.training.trainer.norm_of", lambda of: (norm_of(of), found.append(of))[0])
    measured = distil(recipe(folder, tmp_path / "measured", accumulate, gradient_shares_every=3, phases=True))
    cost = json.loads(measured.cost.read_text())
    assert (cost["tokens"], cost["response_tokens"]) == (Spy.tokens, Spy.response_tokens)
    assert cost["tokens"] > cost["response_tokens"] > 0
    assert cost["flops"] > 0 and cost["flops_per_step"] == pytest.approx(cost["flops"] / STEPS, abs=0.5)
    assert "flops_not_counted" not in cost

    plain = distil(recipe(folder, tmp_path / "plain", accumulate, flops=False))
    untold = json.loads(plain.cost.read_text())
    assert untold["flops"] is None and untold["flops_not_counted"] == "training.flops is false"
    assert untold["tokens"] == cost["tokens"]
    one, two = (load_file(run.student / "model.safetensors") for run in (measured, plain))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(logged(measured)) == STEPS and logged(measured) == logged(plain)

    shares = [line for line in read_lines(measured.metrics) if "kd_gradient_share" in line]
    assert [line["step"] for line in shares] == [1, 3, 6]
    for number, line in enumerate(shares):
        assert "loss" not in line and sum(line[f"{term}_gradient_share"] for term in TERMS) == pytest.approx(1)
        norms = [line[f"{term}_gradient_norm"] for term in TERMS]
        whole = next(of["grad_norm"] for of in logged(measured) if of["step"] == line["step"])
        assert all(norm > 0 for norm in norms)
        # The step's own gradient is the sum of the terms'.
        own = found[len(TERMS) * number :][: len(TERMS)]
        assert norm_of([sum(parts) for parts in zip(*own, strict=True)]) == pytest.approx(whole, rel=1e-4)
    assert not any("gradient_share" in key for line in read_lines(plain.metrics) for key in line)
    # Measuring belongs to no phase: in all steps together less is counted than the run took.
    told = json.loads(measured.phases.read_text())
    assert told["step"]["mean_seconds"] == pytest.approx(
        sum(one["mean_seconds"] for one in told["phases"].values()), abs=1e-4
    )
    page = write_report(measured.root).read_text()
    assert "Share of each term in the gradient norms" in page and "During training it was measured 3 times" in page


def test_flops_are_those_that_pytorchs_counter_finds_in_the_same_steps(folder, tmp_path):
    runs = {}
    for steps in (1, 2):
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        with counter:
            runs[steps] = distil(recipe(folder, tmp_path / str(steps), 2, steps=steps))
        # All steps are counted, so nothing is estimated; what else a run computes has products too (none with a layer given).
        assert json.loads(runs[steps].cost.read_text())["flops"] == counter.get_total_flops() > 0


def test_tokens_and_flops_survive_a_stop(folder, tmp_path):
    def stop(step: int, _steps: int) -> None:
        if step == 3:
            import signal

            signal.raise_signal(signal.SIGINT)

    whole = distil(recipe(folder, tmp_path / "whole"))
    with pytest.raises(InterruptedRunError):
        distil(recipe(folder, tmp_path / "run"), steps=stop)
    kept = json.loads((tmp_path / "run" / "checkpoint-3" / FILE).read_text())
    assert kept["flops_steps"] == 3 and kept["tokens"] == kept["flops_tokens"] > 0
    listed = json.loads((tmp_path / "run" / "checkpoint-3" / "whole.json").read_text())
    assert FILE in listed
    resumed = distil(recipe(folder, tmp_path / "run"))
    names = ("tokens", "response_tokens", "flops", "flops_per_step")
    one, two = (json.loads(run.cost.read_text()) for run in (whole, resumed))
    assert [one[name] for name in names] == [two[name] for name in names]


def test_a_checkpoint_without_sums_leaves_them_unknown(tmp_path):
    work = TrainingWork(RunFolder(tmp_path))
    work.go_on(tmp_path)
    work.add({"roles": torch.tensor([[2, 3]]), "input_ids": torch.tensor([[5, 6]])})
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert set(work.summary(args, 4).values()) == {None} and not work.counts_flops


def test_padding_and_samples_that_fill_up_are_no_tokens(tmp_path):
    work = TrainingWork()
    roles = torch.tensor([[2, 3, 3, 0], [2, 2, 3, 3], [1, 1, 2, 0]])
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    work.add({"roles": roles, "input_ids": roles, "attention_mask": real})
    work.count.total, work.steps = 700, 1
    told = work.summary(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), 2)
    # The third sample has no response.
    assert told == {"tokens": 7, "response_tokens": 4, "flops": 700, "flops_per_step": 350}


def test_time_outside_of_steps_is_in_no_phase():
    now = [0.0]
    stopwatch = Stopwatch(lambda: now[0])
    with stopwatch.running(), phase("data"):
        now[0] += 1
        with outside_of_steps():
            now[0] += 10
            with phase("forward"):
                now[0] += 100
        now[0] += 2
    lap = stopwatch.lap()
    assert lap.phases == {"data": 3.0, OTHER: 0.0} and lap.seconds == 3.0


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled", "reentrant"])
def test_shares_are_refused_where_a_terms_own_gradient_cannot_be_had(folder, tmp_path, monkeypatch, engine):
    options = {}
    if engine == "reentrant":
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    made = {
        "model": load_model(str(folder / "student"), "float32"),
        "args": TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options),
        "objective": Recipe.model_validate(small.recipe(folder)).objective.only(sft={}),
        "processing_class": load_processor(str(folder / "student")),
        "train_dataset": [],
        "gradient_shares_every": 2,
    }
    if engine == "reentrant":
        with pytest.raises(ConfigError, match="checkpointing is reentrant"):
            AlignTITrainer(**made)
        return
    trainer = AlignTITrainer(**made)
    monkeypatch.setattr(trainer, engine, True)
    with pytest.raises(
        ConfigError, match=r"training\.gradient_shares_every is given under .* FSDP and DeepSpeed shard"
    ):
        trainer.check_sharding()


WORKER = """
import json, sys
import torch
torch.set_num_threads(1)
from align_ti.config import Recipe
from align_ti.pipeline.training import distil
from align_ti.processes import part_in_order
distil(Recipe.model_validate(json.loads(sys.argv[1])))
part_in_order()
"""


def test_two_processes_find_what_one_does(folder, tmp_path):
    # Candidates that are no draws: those differ between processes.
    content = small.recipe(folder, objective={"iva": {"layer": 1}, "tpa": {"top_k": 1, "candidates": 2}})
    content["training"] |= {"max_steps": 2, "gradient_shares_every": 2}
    runs = {}
    for processes, batch in ((1, 4), (2, 2)):
        runs[processes] = RunFolder(tmp_path / str(processes))
        content |= {"out": str(runs[processes].root)}
        content["training"] |= {"per_device_train_batch_size": batch}
        if processes == 1:
            distil(Recipe.model_validate(content))
        else:
            on_processes(processes, WORKER, json.dumps(content))
    one, two = (json.loads(run.cost.read_text()) for run in runs.values())
    assert (one["tokens"], one["response_tokens"]) == (two["tokens"], two["response_tokens"])
    # Each process pads to its own longest record.
    assert two["flops"] == pytest.approx(one["flops"], rel=0.3)
    measured = [[line for line in read_lines(run.metrics) if "kd_gradient_norm" in line] for run in runs.values()]
    assert [line["step"] for line in measured[0]] == [line["step"] for line in measured[1]] == [1, 2]
    for alone, both in zip(*measured, strict=True):
        for term in TERMS:
            assert both[f"{term}_gradient_norm"] == pytest.approx(alone[f"{term}_gradient_norm"], rel=2e-3), term
