"""Makes the parts that are shipped in `assets`: the shared vision tower, the teacher, and the student's start.

    python -m align_ti.digits.pretraining tower   --out DIR [--steps N]
    python -m align_ti.digits.pretraining teacher --out DIR [--steps N]
    python -m align_ti.digits.pretraining polish  --out DIR --seed 1
    python -m align_ti.digits.pretraining student --out DIR [--steps N]
    python -m align_ti.digits.pretraining large   --out DIR [--steps N]

`large` is a student of 3.5 times the size, for docs/quality.md; it is not shipped. Each stage draws fresh scenes from the training
scans for every batch, so the number of steps, not the data, is the limit. The benchmark itself never imports this module.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, SiglipVisionModel

from align_ti.digits.files import copy_model
from align_ti.digits.models import (
    IMAGE_TOKENS,
    LARGE,
    PATCH,
    STUDENT,
    TEACHER,
    build_model,
    build_processor,
    tower_config,
)
from align_ti.digits.questions import KINDS, ask
from align_ti.digits.scans import Split, load_scans
from align_ti.digits.scenes import CELL, COLOURS, GRID, Scene, draw_scene
from align_ti.models.saving import save_model

CURRICULA = {
    # Readings twice, since they teach every place at once.
    "teacher": ("reading", *KINDS),
    # What the teacher is slowest to learn: finding a digit by its name, and weighing two.
    "polish": (*KINDS, "where", "where", "where", "compare", "compare"),
    "student": ("reading",),
    "large": ("reading",),
}
"""The kinds of questions that the batches of a stage cycle through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """How long and how fast one stage trains."""

    steps: int
    batch: int
    learning_rate: float


STAGES = {
    "tower": Stage(steps=4000, batch=64, learning_rate=2e-3),
    "teacher": Stage(steps=4000, batch=64, learning_rate=1.5e-3),
    "polish": Stage(steps=2000, batch=64, learning_rate=1e-3),
    "student": Stage(steps=3000, batch=64, learning_rate=2e-3),
    "large": Stage(steps=3000, batch=64, learning_rate=2e-3),
}

MODELS = {
    "teacher": ("teacher", TEACHER),
    "polish": ("teacher", TEACHER),
    "student": ("student", STUDENT),
    "large": ("large", LARGE),
}
"""The folder that a stage's model is saved in, and the size of its language model."""


def pixels(scenes: list[Scene]) -> Float[Tensor, "scenes 3 height width"]:
    """The images as the processor would give them (a test holds the two equal), without its cost per image."""
    stacked = np.stack([np.asarray(scene.picture) for scene in scenes]).astype(np.float32)
    return torch.from_numpy((stacked / 255.0 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 3 %, then a half cosine down to 0."""
    warmup = max(1, steps * 3 // 100)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def optimize(name: str, parameters: list[nn.Parameter], losses: Iterator[Tensor], stage: Stage) -> None:
    """One AdamW step for each loss that is drawn; prints the running mean."""
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, stage.steps))
    start, mean = time.perf_counter(), None
    for step in range(stage.steps):
        loss = next(losses)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            spent = time.perf_counter() - start
            print(f"{name} step {step + 1}/{stage.steps} loss {mean:.4f} {spent / (step + 1):.3f} s/step", flush=True)


# --- the tower: name digit and colour of every cell -------------------------------------------------------------------


def cell_targets(scenes: list[Scene]) -> tuple[Int[Tensor, "scenes cells"], Int[Tensor, "scenes cells"]]:
    """The digit (10: empty) and the colour (last: empty) of each cell."""
    digits = torch.full((len(scenes), GRID * GRID), 10)
    colours = torch.full((len(scenes), GRID * GRID), len(COLOURS))
    for index, scene in enumerate(scenes):
        for figure in scene.figures:
            digits[index, figure.row * GRID + figure.column] = figure.digit
            colours[index, figure.row * GRID + figure.column] = list(COLOURS).index(figure.colour)
    return digits, colours


class CellReader(nn.Module):
    """The tower with one linear reading of each cell's patches."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(tower_config())
        side = CELL // PATCH
        self.digits = nn.Linear(side * side * self.tower.config.hidden_size, 11)
        self.colours = nn.Linear(side * side * self.tower.config.hidden_size, len(COLOURS) + 1)

    def forward(
        self, pictures: Float[Tensor, "scenes 3 height width"]
    ) -> tuple[Float[Tensor, "scenes cells 11"], Float[Tensor, "scenes cells colours"]]:
        # LLaVA reads the last layer's output before the closing norm, so that is what is trained here.
        states = self.tower(pictures, output_hidden_states=True).hidden_states[-1]
        side = CELL // PATCH
        grid = states.unflatten(1, (GRID, side, GRID, side)).permute(0, 1, 3, 2, 4, 5)
        cells = grid.flatten(3).flatten(1, 2)
        return self.digits(cells), self.colours(cells)


def train_tower(out: Path, stage: Stage, seed: int) -> None:
    """Trains the tower and saves it; prints its accuracy on held-out scans."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    reader = CellReader()

    def losses() -> Iterator[Tensor]:
        while True:
            scenes = [draw_scene(load_scans("train"), random, most=GRID * GRID) for _ in range(stage.batch)]
            digits, colours = cell_targets(scenes)
            digit_logits, colour_logits = reader(pixels(scenes))
            yield nn.functional.cross_entropy(
                digit_logits.flatten(0, 1), digits.flatten(), label_smoothing=0.05
            ) + nn.functional.cross_entropy(colour_logits.flatten(0, 1), colours.flatten())

    optimize("tower", [p for p in reader.parameters() if p.requires_grad], losses(), stage)
    for split in ("train", "validation", "test"):
        print(f"tower accuracy on {split} scans: digits {cell_accuracy(reader, split):.2%}", flush=True)
    save_file(reader.tower.state_dict(), out / "tower.safetensors")


@torch.no_grad()
def cell_accuracy(reader: CellReader, split: Split, count: int = 1000) -> float:
    """Share of digits named right on fresh scenes of the split."""
    random = np.random.default_rng(7)
    scenes = [draw_scene(load_scans(split), random) for _ in range(count)]
    digits, _ = cell_targets(scenes)
    guess = reader.eval()(pixels(scenes))[0].argmax(-1)
    there = digits != 10
    return float((guess == digits)[there].float().mean())


# --- the language side: answer questions, or caption, with the tower frozen -------------------------------------------


def dialogue_batch(
    scenes: list[Scene], random: np.random.Generator, processor: LlavaProcessor, kinds: tuple[str, ...]
) -> dict[str, Tensor]:
    """One question for each scene, as the processor and the roles would give it (a test holds them equal)."""
    tokenizer = processor.tokenizer
    texts, prompts = [], []
    for index, scene in enumerate(scenes):
        kind = kinds[index % len(kinds)]
        (question,) = ask(scene, random, (kind,)) or ask(scene, random, ("reading",))
        prompt = f"<|user|>{'<image>' * IMAGE_TOKENS}{question.text}<|end|><|assistant|>"
        texts.append(f"{prompt}{question.answer}<|end|>")
        prompts.append(len(tokenizer(prompt).input_ids))
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    behind_prompt = torch.arange(encoded.input_ids.shape[1]) >= torch.tensor(prompts)[:, None]
    answer = behind_prompt & encoded.attention_mask.bool()
    labels = encoded.input_ids.masked_fill(~answer, -100)
    return {**encoded, "labels": labels, "pixel_values": pixels(scenes)}


def train_language(name: str, out: Path, stage: Stage, seed: int) -> None:
    """Trains the teacher on every kind of question, or a student's start on captions; saves model and processor.

    `polish` goes on with the teacher that is there.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    processor = build_processor()
    part, size = MODELS[name]
    folder = out / part
    model = build_model(size, processor.tokenizer)
    if name == "polish":
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    else:
        model.model.vision_tower.load_state_dict(tower_weights(out))
    model.train()
    model.model.vision_tower.requires_grad_(False)
    kinds, scans = CURRICULA[name], load_scans("train")

    def losses() -> Iterator[Tensor]:
        while True:
            scenes = [draw_scene(scans, random) for _ in range(stage.batch)]
            yield model(**dialogue_batch(scenes, random, processor, kinds), use_cache=False).loss

    optimize(name, [p for p in model.parameters() if p.requires_grad], losses(), stage)
    save(model, processor, folder)


def tower_weights(out: Path) -> dict[str, Tensor]:
    """The weights of the tower that was trained in the folder, or else of the shipped one."""
    trained = out / "tower.safetensors"
    if trained.exists():
        return load_file(trained)
    with tempfile.TemporaryDirectory() as shipped:
        copy_model("student", Path(shipped))
        model = LlavaForConditionalGeneration.from_pretrained(shipped, dtype=torch.float32)
    weights: dict[str, Tensor] = model.model.vision_tower.state_dict()
    return weights


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Saves in half precision, which halves the wheel; loading in float32 gives every user the same numbers."""
    save_model(model.half(), folder)
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="steps instead of the stage's own number")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    stage = STAGES[chosen.stage]
    stage = Stage(steps=chosen.steps or stage.steps, batch=stage.batch, learning_rate=stage.learning_rate)
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.stage == "tower":
        train_tower(chosen.out, stage, chosen.seed)
    else:
        train_language(chosen.stage, chosen.out, stage, chosen.seed)


if __name__ == "__main__":
    main()
