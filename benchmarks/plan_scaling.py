"""A simulation of step time and memory from 1 to 1,024 devices: counted work and bytes over assumed speeds.

    python -m benchmarks.plan_scaling --out results/plan-scaling.json

Nothing is measured and nothing drawn, so the file is the same on every machine. docs/scaling.md has its assumptions.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from align_ti.cli import quiet
from align_ti.config import Recipe
from align_ti.planning.memory import Layout, Model, memory_of, model_of
from align_ti.planning.sizes import Pair, Sizes, on_meta, pretended
from align_ti.planning.step import Batch, Counted
from align_ti.planning.steptime import Machine, step_time
from align_ti.planning.traffic import traffic_of
from align_ti.runs import write_json
from benchmarks.shapes import Decoder, Shape, Tower, make_config

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

TEACHER = Decoder(hidden=3584, layers=28, heads=28, key_heads=4, head_dim=128, intermediate=18_944, tied=False)
"""Qwen2.5-7B's sizes."""

STUDENTS = {
    "0.5B": Decoder(hidden=896, layers=24, heads=14, key_heads=2, head_dim=64, intermediate=4864),
    "1.5B": Decoder(hidden=1536, layers=28, heads=12, key_heads=2, head_dim=128, intermediate=8960),
    "2B": Decoder(hidden=2048, layers=28, heads=16, key_heads=8, head_dim=128, intermediate=6144),
}
"""The sizes of Qwen2.5-0.5B, Qwen2.5-1.5B and Qwen3-1.7B."""

TOWER = Tower(hidden=1152, layers=27, heads=16, intermediate=4304)
"""SigLIP-so400m, frozen, for both models."""

BATCH = Batch(records=8, tokens=939, visual=729, response=150, row_share=0.25)
"""8 records on each device; a quarter of the candidates with a row of their own, as in docs/performance.md."""

BASE: dict[str, Any] = {
    "out": "run",
    "student": {"path": "student"},
    "teacher": {"path": "teacher", "dtype": "bfloat16"},
    "data": {"train": "records"},
    "training": {"bf16": True, "per_device_train_batch_size": 8, "gradient_checkpointing": True},
}


def counted(student: Decoder, records: int = BATCH.records) -> Model:
    """Sizes and work of a pair with this student."""
    shape = Shape(
        student=student,
        teacher=TEACHER,
        tower=TOWER,
        vocabulary=151_936,
        side=27,
        instruction=60,
        response=150,
        batch=records,
    )
    ours, theirs = (make_config(one, shape) for one in (student, TEACHER))
    model = on_meta(ours, "float32")
    model.model.vision_tower.requires_grad_(False)
    pair = Pair(pretended(model), pretended(on_meta(theirs, "bfloat16").requires_grad_(False)))
    return model_of(Recipe(**BASE), dataclasses.replace(BATCH, records=records), pair=pair)


def model_from(kept: dict[str, Any]) -> Model:
    """A counted model from the file."""
    made = {name: Sizes(**kept[name]) for name in ("student", "teacher")}
    return Model(**{**kept, **made, "counted": Counted(**{**kept["counted"], "notes": ()})})


def row(
    model: Model, layout: Layout, machine: Machine, units: int, micro_batches: int = 1, records: int = 8, **more: Any
) -> dict[str, Any]:
    """One simulated step."""
    if micro_batches > 1:
        model = dataclasses.replace(model, accumulated=True)
    time = step_time(model, layout, machine, micro_batches, units=units, **more)
    sent = traffic_of(model, layout, micro_batches, draws=True, terms=4)
    return {
        "engine": layout.engine,
        "devices": layout.devices,
        "seconds": round(time.total, 4),
        "shares": {part: round(time.share(part), 4) for part in ("teacher", "student", "exchange", "waiting")},
        "records_per_second": round(records * micro_batches * layout.devices / time.total, 1),
        "sent_gb": round(sent.total / 1e9, 3),
        "memory_gb": round(memory_of(model, layout).total / 1e9, 2),
    }


def layout_of(engine: str, devices: int, shard_teacher: bool = False) -> Layout:
    """The engine on so many devices; on one there is none."""
    if devices == 1:
        return Layout()
    return Layout(engine=engine, devices=devices, shard_teacher=shard_teacher)


def simulate(machine: Machine) -> dict[str, Any]:
    """Everything that the page shows."""
    growth, remedies, work, models = {}, {}, {}, {}
    for name, student in STUDENTS.items():
        model, units = counted(student), student.layers
        models[name] = dataclasses.asdict(model)
        work[name] = {phase: round(flops / 1e12, 3) for phase, flops in sorted(model.counted.flops.items())}
        growth[name] = {
            engine: [row(model, layout_of(engine, devices), machine, units) for devices in DEVICES]
            for engine in ("ddp", "fsdp2")
        }
        more = counted(student, 16)
        remedies[name] = {
            "ddp, as it is": row(model, layout_of("ddp", 1024), machine, units),
            "4 micro-batches a step": row(model, layout_of("ddp", 1024), machine, units, 4),
            "16 records on a device": row(more, layout_of("ddp", 1024), machine, units, records=16),
            "the teacher's part from a cache": row(model, layout_of("ddp", 1024), machine, units, cached_teacher=True),
            "fsdp2": row(model, layout_of("fsdp2", 1024), machine, units),
            "fsdp2, teacher sharded": row(model, layout_of("fsdp2", 1024, True), machine, units),
            "fsdp2, teacher sharded, 16 records": row(more, layout_of("fsdp2", 1024, True), machine, units, records=16),
        }
    return {
        "what": "a simulation; nothing in this file was measured",
        "machine": dataclasses.asdict(machine),
        "batch": dataclasses.asdict(BATCH),
        "teacher": dataclasses.asdict(TEACHER),
        "students": {name: dataclasses.asdict(student) for name, student in STUDENTS.items()},
        "models": models,
        "tflop_of_a_micro_batch": work,
        "growth": growth,
        "remedies": remedies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    quiet()
    write_json(chosen.out, simulate(Machine()))


if __name__ == "__main__":
    main()
