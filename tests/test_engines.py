"""The same numbers from every engine: one process, DDP, FSDP 2, a sharded teacher; ranks whose batches differ in everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from align_ti.config import Iva, Objective
from tests import small
from tests.launching import on_processes
from tests.test_trainer import saved, trainer

WITH_IVA = Objective(iva=Iva(layer=1))

WORKER = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.test_engines import engine, WITH_IVA
from tests.test_trainer import trainer
from align_ti.models.loading import load_model
from align_ti.processes import part_in_order
folder, out, name, batch, accumulate = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
with engine(name) as options:
    run = trainer(folder, out, batch, accumulate, objective=WITH_IVA, **options)
run.train()
weights = run.accelerator.get_state_dict(run.model_wrapped)
if run.is_world_process_zero():
    whole = load_model(str(folder / "student"), "float32")
    whole.load_state_dict(weights)
    whole.save_pretrained(out / "final")
    (out / "log.json").write_text(json.dumps(run.state.log_history))
part_in_order()
"""


def engine(name: str):
    """Tells accelerate, which offers FSDP on accelerators alone, that this machine's CPU is one; else nothing."""
    from contextlib import contextmanager

    @contextmanager
    def prepared():
        yield {
            "before": as_accelerator if name.startswith("fsdp2") else None,
            "shard_teacher": name.endswith("teacher"),
        }

    return prepared()


def as_accelerator() -> None:
    import os

    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("engines")
    small.write_pair(path)
    small.write_records(path)
    return path


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The weights and the log of one process that takes all samples at once."""
    out = tmp_path_factory.mktemp("alone")
    run = trainer(folder, out, 4, 1, objective=WITH_IVA)
    run.train()
    return saved(run, out), [line for line in run.state.log_history if "tpa" in line]


@pytest.mark.parametrize(
    ("processes", "name", "batch", "accumulate"),
    [
        (2, "ddp", 1, 2),
        (2, "fsdp2", 2, 1),
        (2, "fsdp2", 1, 2),
        (4, "fsdp2", 1, 1),
        (2, "fsdp2-teacher", 2, 1),
        (2, "ddp-teacher", 2, 1),
    ],
)
def test_every_engine_gives_the_numbers_of_one_process(folder, alone, tmp_path, processes, name, batch, accumulate):
    on_processes(processes, WORKER, folder, tmp_path, name, batch, accumulate)
    weights, log = alone
    found = load_file(tmp_path / "final" / "model.safetensors")
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert float((value - found[key]).norm()) < 1e-5 * (1 + float(value.norm())), key
    lines = [line for line in json.loads((tmp_path / "log.json").read_text()) if "tpa" in line]
    for one, other in zip(log, lines, strict=True):
        for term in ("loss", "grad_norm", "sft", "kd", "iva", "tpa"):
            assert one[term] == pytest.approx(other[term], rel=1e-4), term
