"""Where one training step's time goes, from the trainer itself, as JSON and a bar chart beside it.

    OMP_NUM_THREADS=1 python -m benchmarks.phases --folder runs/phases --out results/phases.json

Cases: `demo` is the demo's setting (its models, data, batch size and loader), each of its methods for some steps. `cpu` is the larger
shape of `benchmarks.shapes`, random weights on ready-made batches: Align-TI with candidates drawn, of which nearly all need a row of
their own in a student that has learnt nothing, and with given candidates of which a quarter need one (so nothing is drawn there).
Other work on the machine lengthens every phase.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from align_ti.cli import quiet
from align_ti.config import Iva, Objective
from align_ti.data.collator import EncodedConversations
from align_ti.data.sources import read_conversations
from align_ti.demo import LABELS, TRAINING, method_recipe, objectives
from align_ti.digits.files import write_benchmark
from align_ti.models.loading import load_processor
from align_ti.pipeline.training import distil
from align_ti.report.plots import phase_bars
from align_ti.runs import provenance, read_json, write_json, write_text
from align_ti.training.trainer import AlignTITrainer
from align_ti.training.watch import WARM_UP, StepPhases
from benchmarks import shapes

SHARE = 0.25
"""Share of the given candidates that need a row of their own."""

Told = dict[str, Any]
"""The content of `phases.json` of one run."""


class Batches(Dataset[dict[str, Any]]):
    """Ready-made batches, one after the other and from the first again."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.batches[index % len(self.batches)])


def of_batches(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    objective: Objective,
    steps: int,
) -> Told:
    """The phases of training on ready-made batches; a batch may hold its own `candidates`, which are then not drawn."""
    phases, on_cpu = StepPhases(), student.device.type == "cpu"
    with TemporaryDirectory() as folder:
        trainer = AlignTITrainer(
            model=student,
            teacher_model=teacher,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=WARM_UP + steps,
                per_device_train_batch_size=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=on_cpu,
                dataloader_pin_memory=False,
            ),
            objective=objective,
            train_dataset=Batches(batches, WARM_UP + steps),
            data_collator=lambda samples: dict(samples[0]),
            phases=phases,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    told = phases.summary()
    assert told is not None
    return told


def demo_case(folder: Path, steps: int) -> dict[str, Told]:
    """The phases of each of the demo's methods, by its label."""
    data, runs = folder / "data", folder / "runs"
    if not data.is_dir():
        write_benchmark(data)
    shutil.rmtree(runs, ignore_errors=True)
    records = read_conversations(data / "train.json")
    train = EncodedConversations(records, load_processor(str(data / "student")), cache=True)
    for index in range(len(train)):
        # As in the demo, where records are prepared before training.
        train[index]
    training = TRAINING.model_copy(update={"max_steps": WARM_UP + steps, "phases": True})
    told = {}
    # Which layer is read is of no account for the time.
    for name, objective in objectives(0).items():
        run = distil(method_recipe(runs / name, data, objective, 0, training), data=train, check=False)
        told[LABELS[name]] = read_json(run.phases)
    return told


def cpu_case(folder: Path, steps: int) -> dict[str, Told]:
    """The phases of Align-TI at the larger CPU shape, with candidates drawn and given."""
    shape, objective = shapes.CPU, Objective(iva=Iva(layer=4))
    batches = [shapes.make_batch(shape, seed) for seed in range(2)]
    given = [
        {**batch, "candidates": shapes.make_candidates(batch, shape, objective.tpa.candidates, SHARE, seed)}
        for seed, batch in enumerate(batches)
    ]
    drawn = of_batches(*shapes.make_pair(shape), batches, objective, steps)
    return {
        "candidates drawn": drawn,
        f"candidates given, {SHARE:.0%} with a row": of_batches(*shapes.make_pair(shape), given, objective, steps),
    }


CASES = {"demo": demo_case, "cpu": cpu_case}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/phases"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["demo"])
    parser.add_argument("--steps", type=int, default=30, help=f"steps that count, after {WARM_UP} that do not")
    chosen = parser.parse_args()
    quiet()
    content: dict[str, Any] = {
        "cases": {},
        "threads": torch.get_num_threads(),
        "load_average_at_start": [round(value, 2) for value in os.getloadavg()],
    }
    for case in chosen.cases:
        told = CASES[case](chosen.folder, chosen.steps)
        content["cases"][case] = told
        write_text(chosen.out.with_name(f"{chosen.out.stem}-{case}.svg"), phase_bars(told))
        for name, one in told.items():
            print(case, name, f"{1000 * one['step']['mean_seconds']:.1f} ms", flush=True)
    write_json(chosen.out, {**content, "provenance": provenance()})


if __name__ == "__main__":
    main()
