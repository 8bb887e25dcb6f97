"""Can the student learn one kind of question at all, and at which learning rate? It is trained by SFT on that kind alone.

    python -m benchmarks.quality.alone [--kinds count where] [--rates 4e-3 1e-3] [--steps 3000]
    python -m benchmarks.quality.alone --optimizer muon --kinds count --rates 4e-3 1e-3 --steps 1500

Fresh training scenes in every batch, the shipped start, the tower frozen; accuracy on scenes of the validation scans every 100
steps, counted as right where each token of the answer is the most likely one behind the tokens before it. Each run is written to
results/quality/alone.json as it ends; a run that is there is not made again. A run takes 6 to 10 minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from align_ti.digits.files import copy_model
from align_ti.digits.pretraining import build_processor, dialogue_batch, schedule
from align_ti.digits.scans import Split, load_scans
from align_ti.digits.scenes import draw_scene
from align_ti.runs import provenance, read_json, write_json
from align_ti.training.optimizers import MuonAdamW, hidden_matrices

OUT = Path("results/quality/alone.json")
BATCH, EVERY, HELD_OUT = 32, 100, 300


def batches(kind: str, split: Split, size: int, seed: int, processor: LlavaProcessor) -> Iterator[dict[str, Tensor]]:
    """Questions of one kind about fresh scenes, without end."""
    random, scans = np.random.default_rng(seed), load_scans(split)
    while True:
        yield dialogue_batch([draw_scene(scans, random) for _ in range(size)], random, processor, (kind,))


@torch.no_grad()
def right(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> float:
    """Per cent of answers with every token the most likely one."""
    labels = batch["labels"][:, 1:]
    likely = model(**batch).logits[:, :-1].argmax(-1)
    return 100 * float(((likely == labels) | (labels == -100)).all(-1).float().mean())


def learn(kind: str, rate: float, steps: int, seed: int, optimizer_name: str) -> dict[str, Any]:
    """One run: its loss and accuracy along training."""
    torch.manual_seed(seed)
    processor = build_processor()
    with tempfile.TemporaryDirectory() as folder:
        copy_model("student", Path(folder))
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = hidden_matrices(model) if optimizer_name == "muon" else []
    optimizer = MuonAdamW(trained, matrices=matrices, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    held_out = next(batches(kind, "validation", HELD_OUT, 9, processor))
    training, curve, losses = batches(kind, "train", BATCH, seed, processor), list[dict[str, float]](), list[float]()
    for step in range(1, steps + 1):
        loss = model(**next(training)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % EVERY == 0:
            curve.append({"step": step, "loss": float(np.mean(losses[-EVERY:])), "accuracy": right(model, held_out)})
            print(kind, optimizer_name, rate, *(f"{name} {value:.3f}" for name, value in curve[-1].items()), flush=True)
    return {
        "kind": kind,
        "optimizer": optimizer_name,
        "learning_rate": rate,
        "steps": steps,
        "batch": BATCH,
        "seed": seed,
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["count", "where"])
    parser.add_argument("--rates", nargs="+", type=float, default=[4e-3, 1e-3])
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Any] = read_json(OUT) if OUT.exists() else {"runs": []}
    for kind in chosen.kinds:
        for rate in chosen.rates:
            wanted = (kind, rate, chosen.steps, chosen.seed, chosen.optimizer)
            names = ("kind", "learning_rate", "steps", "seed", "optimizer")
            if any(tuple(one[name] for name in names) == wanted for one in kept["runs"]):
                continue
            kept["runs"].append(learn(*wanted))
            write_json(OUT, {**kept, "provenance": provenance()})


if __name__ == "__main__":
    main()
