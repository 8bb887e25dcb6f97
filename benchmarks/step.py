"""Time and memory of one training step: ours against vanilla KD, common implementation and against the released design.

    python -m benchmarks.step --out results/step.json

A step is forward, backward, AdamW and the clearing of gradients, on models with random weights and a batch of the given shape. All
variants run in one process, in turn, another one first in each round; ratios are taken within a round. Memory is measured in rounds of
its own: the peak above what models, batch and optimizer state take. Other work on the machine makes the times void.

With `--keep-freed-memory` the C library keeps what is freed, for all variants alike, as `AlignTITrainer` has it on a CPU. By default
it gives it back to the system, as it does for people who run the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from align_ti.allocator import keep_freed_memory
from align_ti.cli import quiet
from align_ti.runs import write_json
from benchmarks.rounds import check_device, dtype_of, machine, mib_of, ratios, seconds_by_round, summary
from benchmarks.shapes import ACCELERATOR, CPU, Shape, parameters
from benchmarks.variants import VARIANTS, Variant, make_variants

SHAPES = {"cpu": CPU, "accelerator": ACCELERATOR}
BASELINE = "vanilla_kd"
SAME_LOSS = (("vanilla_kd", "ours_kd"), ("released_design", "align_ti_1.00"))
"""Pairs of variants that compute one number."""

TARGETS = {
    "cpu": (
        ("ours_kd", "vanilla_kd", "time", 0.75),
        ("ours_kd", "vanilla_kd", "memory", 0.6),
        ("align_ti_0.25", "vanilla_kd", "time", 1.15),
        ("align_ti_0.25", "vanilla_kd", "memory", 0.8),
        ("align_ti_1.00", "vanilla_kd", "time", 2.0),
        ("align_ti_1.00", "vanilla_kd", "memory", 0.8),
        ("align_ti_1.00", "released_design", "time", 0.35),
        ("align_ti_1.00", "released_design", "memory", 0.25),
    ),
    "accelerator": (
        ("align_ti_0.25", "vanilla_kd", "time", 1.10),
        ("align_ti_0.25", "vanilla_kd", "memory", 0.6),
    ),
}
"""For each shape: a variant, what it is compared with, of what, and the largest ratio that is accepted."""

ON_A_PROCESSOR = (
    "an accelerator: its kernels, bfloat16, memory of its own",
    "real sizes (SigLIP-so400m + Qwen3-0.6B from Qwen3-8B, vocabulary 151,936): --shape accelerator",
)
NEVER = (
    "the data loader and the moving of batches (benchmarks/loader.py)",
    "several devices",
    "gradient checkpointing",
    "padding: every sample has the same length",
    "the share of candidates that need a row in a real training run: it is set here",
)


def losses_of(variants: Mapping[str, Variant], dtype: torch.dtype) -> dict[str, float]:
    """The loss of each variant in nats, from one step of each, which warms it up too.

    Raises:
        SystemExit: two variants that compute one number do not agree.
    """
    losses = {name: float(variant.step()) for name, variant in variants.items()}
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-6}.get(dtype, 2e-2)
    for one, other in SAME_LOSS:
        if one in losses and other in losses and abs(losses[one] / losses[other] - 1) > tolerance:
            raise SystemExit(
                f"{one} has loss {losses[one]}, {other} {losses[other]}; they are one number, so nothing was measured."
            )
    return losses


def measured(variants: Mapping[str, Variant], rounds: int, slow_rounds: int, memory_rounds: int) -> dict[str, Any]:
    """For each variant: memory of its rounds, then seconds of its rounds."""
    works = {name: variant.step for name, variant in variants.items()}
    slow = {name: min(rounds, slow_rounds) if name.startswith("released") else rounds for name in works}
    mib = {name: [mib_of(work) for _ in range(memory_rounds)] for name, work in works.items()}
    seconds = seconds_by_round(works, slow)
    return {
        name: {
            "seconds_by_round": seconds[name],
            "seconds": summary(seconds[name]),
            "mib_by_round": mib[name],
            "mib": None if None in mib[name] else statistics.median(value for value in mib[name] if value is not None),
        }
        for name in works
    }


def compared(results: Mapping[str, Any], name: str, against: str, of: str) -> dict[str, float] | None:
    """The ratio of two variants' time or memory with its quartiles, if both were measured."""
    if name not in results or against not in results:
        return None
    one, other = results[name], results[against]
    if of == "time":
        return ratios(one["seconds_by_round"], other["seconds_by_round"])
    if one["mib"] is None or other["mib"] is None:
        return None
    return {"median": round(one["mib"] / other["mib"], 5)}


def targets_of(results: Mapping[str, Any], shape: str) -> list[dict[str, Any]]:
    """Each target of the shape with what was found; `met` is None where it was not measured."""
    rows = []
    for name, against, of, accepted in TARGETS[shape]:
        found = compared(results, name, against, of)
        met = None if found is None else found["median"] <= accepted
        rows.append({"variant": name, "against": against, "of": of, "accepted": accepted, "found": found, "met": met})
    return rows


def shown(results: Mapping[str, Any], targets: list[dict[str, Any]]) -> list[Table]:
    """Two tables: what each variant took, and the targets."""
    times = Table(
        "variant", "seconds", "quartiles", "x vanilla KD", "MiB", "x vanilla KD", title="a step: medians over rounds"
    )
    for name, result in results.items():
        seconds, time, memory = result["seconds"], *(result["against_vanilla_kd"][of] for of in ("time", "memory"))
        times.add_row(
            name,
            f"{seconds['median']:.3f}",
            f"{seconds['lower']:.3f}-{seconds['upper']:.3f}",
            "" if time is None else f"{time['median']:.3f} ({time['lower']:.3f}-{time['upper']:.3f})",
            "" if result["mib"] is None else f"{result['mib']:.0f}",
            "" if memory is None else f"{memory['median']:.3f}",
        )
    goals = Table("variant", "against", "of", "target", "found", "met", title="targets")
    words = {True: "yes", False: "NO", None: "not measured"}
    for row in targets:
        found = "" if row["found"] is None else f"{row['found']['median']:.3f}"
        goals.add_row(row["variant"], row["against"], row["of"], f"{row['accepted']}", found, words[row["met"]])
    return [times, goals]


def sizes(shape: Shape, variants: Mapping[str, Variant]) -> dict[str, Any]:
    """The shape and the number of parameters of each model."""
    bench = next(iter(variants.values())).bench
    return {
        "shape": {**dataclasses.asdict(shape), "visual": shape.visual},
        "parameters": {
            "student": parameters(bench.student),
            "teacher": parameters(bench.teacher),
            "vision_tower": parameters(bench.student.model.vision_tower),
        },
    }


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default bfloat16 on an accelerator")
    parser.add_argument("--keep-freed-memory", action="store_true", help="for all variants, on a processor")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=2, help="rounds of the released design")
    parser.add_argument("--memory-rounds", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    quiet()
    check_device(chosen.device)
    if chosen.keep_freed_memory and not keep_freed_memory():
        raise SystemExit(
            "--keep-freed-memory: this C library does not, or the environment says otherwise; leave it out."
        )
    start = machine(chosen.device)
    shape = SHAPES[chosen.shape]
    dtype = dtype_of(chosen.device, chosen.dtype)
    made = make_variants(tuple(chosen.variants), shape, chosen.device, dtype)
    variants = {variant.name: variant for variant in made}
    losses = losses_of(variants, dtype)
    results = measured(variants, chosen.rounds, chosen.slow_rounds, chosen.memory_rounds)
    for name, result in results.items():
        result["against_vanilla_kd"] = {of: compared(results, name, BASELINE, of) for of in ("time", "memory")}
        result["loss"], result["share"] = losses[name], variants[name].share
    targets = targets_of(results, chosen.shape)
    content = {
        "variants": results,
        "targets": targets,
        **sizes(shape, variants),
        "dtype": str(dtype).removeprefix("torch."),
        "freed_memory_kept": chosen.keep_freed_memory,
        "rounds": {"time": chosen.rounds, "slow": chosen.slow_rounds, "memory": chosen.memory_rounds},
        "not_measured": [*(ON_A_PROCESSOR if chosen.device == "cpu" else ()), *NEVER],
        **start,
    }
    write_json(chosen.out, content)
    for table in shown(results, targets):
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
