"""Whole runs by every engine: the same student folder, and checkpoints that go on with another number of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import TrainingArguments

from align_ti.config import Recipe
from align_ti.errors import RunError
from align_ti.pipeline import training
from align_ti.runs import RunFolder
from tests import small
from tests.launching import launched, torchrun

WORKER = """
import json, sys
import torch
torch.set_num_threads(1)
from tests.test_engine_runs import trained
from align_ti.processes import part_in_order
trained(sys.argv[1], json.loads(sys.argv[2]))
part_in_order()
"""


def launch_of(engine: str, *options: str) -> tuple[list[str] | None, dict[str, str]]:
    """DeepSpeed's own command, or None where torchrun starts the processes, and the variables that `accelerate launch` sets for them,
    with the shipped config of the engine."""
    config = files("align_ti") / "recipes" / "engines" / f"{engine}.yaml"
    parser = launch_command_parser()
    arguments, defaults, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(config), *options, "script.py"])
    )
    if not engine.startswith("zero"):
        return None, prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(arguments)


def told(engine: str, processes: int) -> dict[str, str]:
    """The variables, but for those by which torchrun says where processes meet and how many they are."""
    _, variables = launch_of(engine, "--num_processes", str(processes))
    found = {name: value for name, value in variables.items() if os.environ.get(name) != value}
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE", "FSDP"))} | {
        "DS_ACCELERATOR": "cpu"
    }


def trained(engine: str, recipe: dict[str, Any]) -> None:
    """One process of a run. It tells accelerate, which offers FSDP and DeepSpeed on accelerators alone, that a CPU is one."""

    def arguments(**options: Any) -> TrainingArguments:
        args = TrainingArguments(**options | {"use_cpu": not engine.startswith("zero")})
        if engine == "fsdp2":
            assert args.device.type == "cpu"  # the processes find each other here
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return args

    training.TrainingArguments = arguments  # type: ignore[assignment, misc]
    if engine.startswith("zero"):
        PartialState._prepare_backend = lambda *_arguments, **_options: ("gloo", DistributedType.NO)  # type: ignore[method-assign]
        PartialState()
    training.distil(Recipe.model_validate(recipe))
    assert AcceleratorState().distributed_type == {
        "ddp": DistributedType.MULTI_CPU,
        "fsdp2": DistributedType.FSDP,
    }.get(engine, DistributedType.DEEPSPEED)


def run(engine: str, processes: int, recipe: dict[str, Any]) -> Path:
    """The student of a run of so many processes."""
    if engine == "none":
        training.distil(Recipe.model_validate(recipe))
    else:
        done = run_as(engine, processes, recipe)
        assert done.returncode == 0, done.stderr[-6000:]
    return Path(recipe["out"]) / "student"


def run_as(engine: str, processes: int, recipe: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """A run of so many processes, however it ends."""
    # DeepSpeed is imported by each process for itself.
    start = torchrun if engine.startswith("zero") else launched
    return start(processes, WORKER, engine, json.dumps(recipe), environment=told(engine, processes))


def recipe_of(folder: Path, out: Path, batch: int, **options: Any) -> dict[str, Any]:
    """Four steps of four records, candidates the most probable tokens: draws differ between processes."""
    recipe = small.recipe(folder, out=str(out), objective={"tpa": {"top_k": 1, "candidates": 2}}, **options)
    recipe["training"] = {**recipe["training"], "per_device_train_batch_size": batch}
    return recipe


def same(one: Path, other: Path) -> None:
    """The two folders hold the same files, and weights that differ by rounding alone."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for file in one.glob("*.json"):
        assert file.read_text() == (other / file.name).read_text(), file.name
    weights, found = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == found.keys()
    for name, value in weights.items():
        assert value.dtype == found[name].dtype
        assert float((value - found[name]).norm()) < 2e-4 * (1 + float(value.norm())), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("engine-runs")
    small.write_pair(path)
    small.write_records(path)
    return path


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> Path:
    """The student of one process."""
    student = run("none", 1, recipe_of(folder, tmp_path_factory.mktemp("alone") / "run", batch=4))
    before = load_file(folder / "student" / "model.safetensors")
    after = load_file(student / "model.safetensors")
    # Far more than the tolerance of `same`.
    assert sum(float((after[name] - before[name]).norm()) for name in after if name in before) > 0.1
    return student


@pytest.fixture(scope="module")
def by_two(folder, tmp_path_factory):
    """Gives the run folder of two processes by an engine; each engine trains once."""
    runs: dict[str, Path] = {}

    def made(engine: str) -> Path:
        if engine.startswith("zero") and find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed: make engines")
        if engine not in runs:
            runs[engine] = tmp_path_factory.mktemp(engine) / "run"
            run(engine, 2, recipe_of(folder, runs[engine], batch=2))
        return runs[engine]

    return made


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_student_folder_is_the_same_from_every_engine(by_two, alone, engine):
    same(by_two(engine) / "student", alone)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_first_process_checks_a_teacher_that_is_to_be_sharded(folder, tmp_path, alone, engine):
    # A bug: the first process alone ran a teacher whose layers all processes gather, and the launch failed.
    recipe = recipe_of(folder, tmp_path / "run", batch=2)
    recipe |= {"check": True, "teacher": {**recipe["teacher"], "sharded": True}}
    same(run(engine, 2, recipe), alone)
    found = json.loads((tmp_path / "run" / "check.json").read_text())
    memory = next(one for one in found["verdicts"] if one["name"] == "memory")
    assert found["state"] == "pass" and memory["state"] == "pass"
    assert "each of 2 processes holds parts" in memory["measured"] and memory["values"]["total_mib"] > 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with PyTorch 2.9")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_muon_takes_the_steps_of_one_process_on_two(folder, tmp_path, engine):
    def muon(name: str, batch: int) -> dict[str, Any]:
        made = recipe_of(folder, tmp_path / name, batch)
        made["training"] = {**made["training"], "optimizer": "muon"}
        return made

    alone = load_file(run("none", 1, muon("alone", 4)) / "model.safetensors")
    found = load_file(run(engine, 2, muon("two", 2)) / "model.safetensors")
    before = load_file(folder / "student" / "model.safetensors")
    # Muon's matrix products are in bfloat16, which FSDP adds up in another order: some per cent of the way, most where gradients are of
    # low rank. Orthogonal halves of a matrix in place of the whole would be 60 to 70 % away.
    ways = {name: float((value - before[name]).norm()) for name, value in alone.items()}
    apart = {
        name: float((value - found[name]).norm()) / ways[name] for name, value in alone.items() if ways[name] > 1e-3
    }
    assert len(apart) > 20
    assert max(apart.values()) < 0.3, apart
    assert sorted(apart.values())[len(apart) // 2] < 0.05, apart
    # A checkpoint holds the averages of both kinds of parameters.
    half(tmp_path / "two", tmp_path / "half")
    same(run(engine, 2, muon("half", 2)), tmp_path / "two" / "student")


def half(kept: Path, out: Path) -> None:
    """A copy of a run as it was when half of its steps were made."""
    shutil.copytree(kept, out)
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "checkpoint-4")
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(kept), str(out)))
    assert RunFolder(out).last_checkpoint() == out / "checkpoint-2"


@pytest.mark.parametrize(
    ("before", "after", "processes"),
    [("ddp", "none", 1), ("ddp", "ddp", 4), ("fsdp2", "fsdp2", 1), ("fsdp2", "fsdp2", 4), ("zero3", "zero3", 2)],
)
def test_a_checkpoint_of_two_processes_goes_on_with_another_number(
    folder, by_two, alone, tmp_path, before, after, processes
):
    kept, out = by_two(before), tmp_path / "run"
    half(kept, out)
    logged = (out / "metrics.jsonl").stat().st_size
    resumed = run(after, processes, recipe_of(folder, out, batch=4 // processes))
    added = (out / "metrics.jsonl").read_text()[logged:]
    assert [json.loads(line)["step"] for line in added.splitlines() if '"loss"' in line] == [3, 4]
    same(resumed, kept / "student")
    same(resumed, alone)


@pytest.mark.parametrize(
    ("before", "processes", "sentence"),
    [("fsdp2", 1, "was written by FSDP, and this run is trained by DDP or one process"), ("zero2", 1, "by DeepSpeed")],
)
def test_another_engines_checkpoint_is_refused(folder, by_two, tmp_path, before, processes, sentence):
    half(by_two(before), tmp_path / "run")
    with pytest.raises(RunError, match=sentence):
        run("none", processes, recipe_of(folder, tmp_path / "run", batch=4))


def test_deepspeeds_checkpoints_go_on_with_as_many_processes_as_wrote_them(folder, by_two, tmp_path):
    half(by_two("zero2"), tmp_path / "run")
    done = run_as("zero2", 4, recipe_of(folder, tmp_path / "run", batch=1))
    assert done.returncode != 0 and "by DeepSpeed with 2 processes, and 4 are to read it" in done.stderr


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_what_is_trained_beside_adapters_goes_on_too(folder, tmp_path, engine):
    # Under FSDP 2 checkpoints held the adapters alone, and the projector started anew without a word.
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: make engines")
    student = {"path": str(folder / "student"), "lora": {"rank": 2, "alpha": 4}, "freeze": ["vision_tower"]}
    kept = run(engine, 2, recipe_of(folder, tmp_path / "whole", batch=2, student=student)).parent
    half(kept, tmp_path / "run")
    resumed = run(engine, 2, recipe_of(folder, tmp_path / "run", batch=2, student=student))
    same(resumed, kept / "student")


def test_deepspeeds_configs_start_on_several_machines_by_torchrun():
    # By default accelerate starts other machines through pdsh, from a file of hosts that nobody was asked for.
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make engines")
    options = ("--num_processes", "4", "--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "one")
    for engine in ("zero2", "zero3"):
        command, variables = launch_of(engine, *options)
        assert command is None
        assert variables["ACCELERATE_USE_DEEPSPEED"] == "true"


def test_a_run_goes_on_only_with_steps_of_as_many_records(folder, tmp_path):
    # A run of two processes that went on with one took half of the records a step, and said nothing.
    recipe = Recipe.model_validate(recipe_of(folder, tmp_path / "run", batch=2))
    folder_of_run = RunFolder(tmp_path / "run")
    folder_of_run.claim(recipe, processes=2)
    folder_of_run.append_metrics({"step": 1, "loss": 1.0})
    with pytest.raises(RunError, match="holds a run of 4 records a step, and this one would take 2"):
        folder_of_run.claim(recipe, processes=1)
    assert folder_of_run.claim(Recipe.model_validate(recipe_of(folder, tmp_path / "run", batch=1)), processes=4)
    other = recipe_of(folder, tmp_path / "run", batch=1, seed=5)
    with pytest.raises(RunError, match=r"other settings \(seed\)"):
        folder_of_run.claim(Recipe.model_validate(other), processes=4)
