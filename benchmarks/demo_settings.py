"""Chooses the demo's learning rate on the validation split: one demo for each rate, accuracy of every method, as JSON.

    python benchmarks/demo_settings.py --runs runs/settings --out results/demo-settings.json

The rate with the highest accuracy averaged over the three methods is taken, so that none of them is favoured. It was chosen with 250
images and 600 steps of 32; images, batch and steps were chosen at that rate afterwards (benchmarks/quality/budget.yaml).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from align_ti.cli import quiet
from align_ti.demo import TRAINING, objectives, run_demo
from align_ti.digits.files import Sizes
from align_ti.runs import provenance, write_json

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SIZES = Sizes(train=250)
SHORT = {
    "optimizer": "adamw",
    "max_steps": 600,
    "per_device_train_batch_size": 32,
    "warmup_steps": 30,
    "logging_steps": 20,
    "save_steps": 200,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    quiet()
    table = {}
    for rate in RATES:
        training = TRAINING.model_copy(update={**SHORT, "learning_rate": rate})
        summary = run_demo(chosen.runs / f"{rate:g}", chosen.seed, sizes=SIZES, training=training, split="validation")
        accuracy = {name: summary["accuracy"][name]["overall"] for name in objectives(0)}
        table[f"{rate:g}"] = {**accuracy, "mean": round(sum(accuracy.values()) / len(accuracy), 2)}
        print(rate, table[f"{rate:g}"], flush=True)
    best = max(table, key=lambda rate: table[rate]["mean"])
    content = {
        "split": "validation",
        "seed": chosen.seed,
        "steps": SHORT["max_steps"],
        "accuracy": table,
        "chosen": best,
    }
    write_json(chosen.out, {**content, "provenance": provenance()})


if __name__ == "__main__":
    main()
