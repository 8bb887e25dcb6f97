"""What each divergence and each term costs: a training step of SFT + KD with it, against SFT + KD alone.

    python -m benchmarks.objectives --out results/objectives.json

The models and the batch are those of `benchmarks.step` on a processor, in float32. All variants run in one process, in turn,
another one first in each round; ratios are taken within a round. A divergence takes the place of KD's forward KL; a term is added to
SFT + KD at its default weight. So both say what a choice costs beside vanilla KD, not what it is worth.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from align_ti.cli import quiet
from align_ti.config import DEFAULT_TERMS, Objective
from align_ti.registry import names
from align_ti.runs import write_json
from benchmarks.rounds import check_device, machine, mib_of, ratios, seconds_by_round, summary
from benchmarks.shapes import CPU
from benchmarks.variants import Bench, Variant, make_bench, our_loss, watched_layer

BASELINE = "kd"
"""SFT + KD by forward KL."""


def objectives(bench: Bench) -> dict[str, Objective]:
    """SFT + KD, the same by each other divergence, and with each other term."""
    found = {BASELINE: Objective.only(sft={}, kd={})}
    for name in names("divergence"):
        if name != "forward_kl":
            found[f"kd by {name}"] = Objective.only(sft={}, kd={"divergence": name})
    for name in names("term"):
        if name not in {"sft", "kd"}:
            options = {"layer": watched_layer(bench)} if name == "iva" else {}
            found[f"+ {name}"] = Objective.only(sft={}, kd={}, **{name: options})
    found["all of Align-TI"] = Objective(iva={"layer": watched_layer(bench)})
    assert set(DEFAULT_TERMS) <= set(found["all of Align-TI"].active)
    return found


def measured(variants: Mapping[str, Variant], rounds: int) -> dict[str, Any]:
    """For each variant its seconds by round and its memory, and both against the baseline."""
    works = {name: variant.step for name, variant in variants.items()}
    for work in works.values():
        work()
    mib = {name: [mib_of(work) for _ in range(2)] for name, work in works.items()}
    seconds = seconds_by_round(works, dict.fromkeys(works, rounds))
    memory = {
        name: None if None in values else statistics.median(value for value in values if value is not None)
        for name, values in mib.items()
    }
    return {
        name: {
            "seconds_by_round": seconds[name],
            "seconds": summary(seconds[name]),
            "time": ratios(seconds[name], seconds[BASELINE]),
            "mib": memory[name],
            "memory": None if None in (memory[name], memory[BASELINE]) else round(memory[name] / memory[BASELINE], 3),
        }
        for name in works
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    quiet()
    check_device("cpu")
    start = machine("cpu")
    bench = make_bench(CPU)
    variants = {name: Variant(name, bench, our_loss(bench, objective)) for name, objective in objectives(bench).items()}
    results = measured(variants, chosen.rounds)
    write_json(chosen.out, {"variants": results, "rounds": chosen.rounds, **start})
    table = Table("SFT + KD", "seconds", "x time", "MiB", "x memory", title="a step, against SFT + KD by forward KL")
    for name, one in results.items():
        table.add_row(
            name,
            f"{one['seconds']['median']:.2f}",
            f"{one['time']['median']:.2f} ({one['time']['lower']:.2f}-{one['time']['upper']:.2f})",
            "" if one["mib"] is None else f"{one['mib']:.0f}",
            "" if one["memory"] is None else f"{one['memory']:.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
