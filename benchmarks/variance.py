"""Variance of TPA's estimators against the rows that they cost, on the benchmark's pair along a training.

    OMP_NUM_THREADS=1 python -m benchmarks.variance --folder runs/variance --out results/variance.json

One Align-TI training on the demo's benchmark, with checkpoints. At each, for the response positions of some records,
the divergence behind *every* token of the vocabulary is computed, so the estimators can be tried many times without a
model. What counts of a position is m (estimate - L): m is 1 where it keeps a candidate, L the term's value. Its
variance over draws, averaged over positions, is what the variance of the term is proportional to (to first order in the
number of positions). A row is a distinct candidate that is neither left out nor gold.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.cli import quiet
from align_ti.config import Data, Objective, Recipe, Student, Teacher, Tpa
from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.roles import RESPONSE
from align_ti.data.sources import read_conversations
from align_ti.demo import TRAINING
from align_ti.digits.files import write_benchmark
from align_ti.interactions.candidates import left_out_tokens
from align_ti.interactions.estimators import draw_weighted
from align_ti.losses.divergence import forward_kl
from align_ti.models.branches import Branches
from align_ti.models.continuation import continue_branches, read
from align_ti.models.loading import load_model, load_processor
from align_ti.models.overrides import Projection
from align_ti.models.pairing import Pairing
from align_ti.pipeline.training import distil
from align_ti.runs import provenance, write_json
from align_ti.terms.readings import view
from benchmarks.demo_settings import SHORT, SIZES

STEPS = (0, 50, 150, 300, 600)
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8)
MORE_COUNTS = (12, 16, 24, 32)
"""For draws that follow probability, where a larger n costs few rows."""

WAYS = {
    "with_replacement": ("with_replacement", 0),
    "without_replacement": ("without_replacement", 0),
    "gold and tail": ("top_and_tail", 0),
    "gold, top 1 and tail": ("top_and_tail", 1),
    "gold, top 2 and tail": ("top_and_tail", 2),
    "stratified": ("stratified", 0),
    "threshold": ("threshold", 0),
}
"""Estimators by name: the option `objective.tpa.draw` and `enumerated`. "threshold" is no option, only
measured: distinct tokens with the weights q / (1 - exp(-q t)), t the arrival of the first token not drawn (Kool et al.,
arXiv:1903.06059), which do not sum to 1."""

REFERENCE = 4
"""The paper's number of candidates, drawn with replacement: what others are compared with."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Response positions: the student's distribution, the divergence behind every token, the gold token; and what is left out."""

    probability: Float[Tensor, "rows vocab"]
    divergence: Float[Tensor, "rows vocab"]
    gold: Int[Tensor, " rows"]
    left_out: tuple[int, ...]

    @property
    def kept(self) -> Float[Tensor, "rows vocab"]:
        return self.probability.index_fill(-1, torch.tensor(self.left_out), 0.0)

    @property
    def value(self) -> float:
        """L, the term itself with n = 4: the sum over positions over the expected number of positions that count."""
        share = self.kept.sum(-1)
        counts = 1 - (1 - share).clamp(min=0) ** REFERENCE
        mean = (self.kept * self.divergence).sum(-1) / share.clamp(min=1e-30)
        return float((counts * mean).sum() / counts.sum())


@torch.no_grad()
def exhaustive(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Any], chunk: int = 64) -> Positions:
    """Every token of the vocabulary tried at every response position."""
    both = [view(model, batch) for model in (student, teacher)]
    ids = both[0].inputs["input_ids"]
    sample, step = (both[0].roles == RESPONSE).nonzero(as_tuple=True)
    first = [read(of.model, of.inputs, keep_cache=True) for of in both]
    heads = [Projection(of.model) for of in both]
    probability = heads[0](first[0].hidden[sample, step - 1]).double().softmax(-1)
    parts = []
    for tokens in torch.arange(probability.shape[-1]).split(chunk):
        many = len(tokens)
        branches = Branches.of(
            sample.repeat_interleave(many), tokens.repeat(len(sample)), step.repeat_interleave(many), len(ids)
        )
        logits = [
            head(continue_branches(of.model, of.inputs, reading, branches))
            for head, of, reading in zip(heads, both, first, strict=True)
        ]
        parts.append(forward_kl(*logits).double().view(len(sample), many))
    left_out = left_out_tokens(student, Tpa(), Pairing())
    return Positions(probability, torch.cat(parts, -1), ids[sample, step], left_out)


# --- one estimator ----------------------------------------------------------------------------------------------------


def plain_exactly(at: Positions, count: int) -> tuple[float, float]:
    """Rows and variance of draws with replacement, by formula."""
    kept = at.kept
    share = kept.sum(-1).clamp(max=1.0)
    q = kept / share.clamp(min=1e-30)[:, None]
    mean = (q * at.divergence).sum(-1)
    spread = (q * (at.divergence - mean[:, None]) ** 2).sum(-1)
    sizes = torch.arange(1.0, count + 1, dtype=torch.float64)
    chances = torch.distributions.Binomial(count, share[:, None]).log_prob(sizes[None]).exp()
    off, counts = mean - at.value, chances.sum(-1)
    second = (chances * (spread[:, None] / sizes + off[:, None] ** 2)).sum(-1)
    rows = (1 - (1 - kept) ** count).scatter(-1, at.gold[:, None], 0.0).sum(-1)
    return float(rows.mean()), float((second - (counts * off) ** 2).mean())


def threshold(q: Float[Tensor, "rows vocab"], count: int) -> tuple[Tensor, Tensor]:
    """Distinct tokens of each row with threshold weights."""
    arrival, tokens = (torch.empty_like(q).exponential_() / q).topk(count + 1, largest=False)
    chosen = q.gather(-1, tokens[:, :count])
    weights = chosen / -torch.expm1(-chosen * arrival[:, count:])
    return tokens[:, :count], torch.where(chosen > 0, weights, 0.0)


def tried(at: Positions, way: tuple[str, int], count: int, repeats: int) -> tuple[float, float]:
    """Rows and variance over many draws at each position."""
    draw, enumerated = way
    value, rows, variances = at.value, [], []
    for row in range(len(at.gold)):
        probability = at.probability[row].expand(repeats, -1)
        gold = at.gold[row].expand(repeats)
        if draw == "threshold":
            share = at.kept[row].sum()
            tokens, weights = threshold((at.kept[row] / share).expand(repeats, -1), count)
            # As plain draws do, a position counts with the probability that some try is kept.
            weights = weights * (torch.rand(repeats, 1) < 1 - (1 - share) ** count)
        else:
            tokens, weights = draw_weighted(probability, gold, count, at.left_out, draw, enumerated=enumerated)
        off = at.divergence[row][tokens] - value
        variances.append((weights * off).sum(-1).var())
        needed = torch.where((weights > 0) & (tokens != at.gold[row]), tokens, -1).sort(-1).values
        rows.append(((needed.diff(dim=-1, prepend=torch.full((repeats, 1), -1)) > 0).sum(-1)).double().mean())
    return float(torch.stack(rows).mean()), float(torch.stack(variances).mean())


def curve(at: Positions, way: tuple[str, int], repeats: int) -> dict[str, dict[str, float]]:
    """Rows and variance by number of candidates."""
    counts = [*COUNTS, *(MORE_COUNTS if way[0] in ("with_replacement", "stratified") else ())]
    points = {}
    for count in counts:
        if count <= way[1]:
            continue
        found = plain_exactly(at, count) if way[0] == "with_replacement" else tried(at, way, count, repeats)
        points[str(count)] = {"rows": round(found[0], 4), "variance": float(f"{found[1]:.4g}")}
    return points


def relative(points: dict[str, dict[str, float]], to: dict[str, float]) -> float | None:
    """Variance at as many rows as the reference has, over its variance; None where the curve does not reach so few or so many."""
    rows, variance = (np.array([point[name] for point in points.values()]) for name in ("rows", "variance"))
    if not rows.min() <= to["rows"] <= rows.max():
        return None
    order = rows.argsort()
    at = np.interp(np.log(to["rows"]), np.log(rows[order]), np.log(variance[order]))
    return round(float(np.exp(at)) / to["variance"], 3)


# --- the training -----------------------------------------------------------------------------------------------------


def trained(folder: Path) -> None:
    """An Align-TI training with its checkpoints kept, 600 steps of 32 records on 250 images; goes on where it stopped."""
    data = folder / "data"
    if not data.is_dir():
        write_benchmark(data, sizes=SIZES)
    recipe = Recipe(
        out=str(folder / "align_ti"),
        seed=0,
        student=Student(path=str(data / "student")),
        teacher=Teacher(path=str(data / "teacher"), dtype="float32"),
        data=Data(train=str(data / "train.json"), cache="memory"),
        objective=Objective(),
        training=TRAINING.model_copy(update={**SHORT, "save_steps": 50, "save_total_limit": 12}),
    )
    distil(recipe, check=False)


def checkpoints(folder: Path, records: int) -> Iterator[tuple[int, Positions]]:
    """The response positions of some training records at each checkpoint."""
    data = folder / "data"
    processor = load_processor(str(data / "student"))
    encoded = EncodedConversations(read_conversations(data / "train.json"), processor)
    chosen = random.Random(1).sample(range(len(encoded)), records)
    batch = Collator(processor.tokenizer.pad_token_id)([encoded[index] for index in chosen])
    teacher = load_model(str(data / "teacher"), "float32").eval()
    for step in STEPS:
        path = data / "student" if step == 0 else folder / "align_ti" / f"checkpoint-{step}"
        yield step, exhaustive(load_model(str(path), "float32").eval(), teacher, batch)


def plot(table: dict[str, dict[str, Any]], out: Path) -> None:
    """Variance against rows, one panel for each checkpoint, one line for each estimator."""
    figure = Figure(figsize=(4 * len(table), 4), layout="constrained")
    for ax, (step, found) in zip(np.ravel(figure.subplots(1, len(table))), table.items(), strict=True):
        for name, points in found["estimators"].items():
            ax.plot(*zip(*((p["rows"], p["variance"]) for p in points.values()), strict=True), marker=".", label=name)
        ax.set(xscale="log", yscale="log", xlabel="rows a position", title=f"step {step}")
    figure.axes[0].set_ylabel("variance of a position")
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/variance"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--records", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=400)
    chosen = parser.parse_args()
    quiet()
    trained(chosen.folder)
    torch.manual_seed(0)
    table: dict[str, dict[str, Any]] = {}
    for step, at in checkpoints(chosen.folder, chosen.records):
        curves = {name: curve(at, way, chosen.repeats) for name, way in WAYS.items()}
        reference = curves["with_replacement"][str(REFERENCE)]
        table[str(step)] = {
            "positions": len(at.gold),
            "value": round(at.value, 4),
            "probability_of_gold": round(float(at.probability.gather(-1, at.gold[:, None]).mean()), 4),
            "estimators": curves,
            "variance_at_equal_rows": {name: relative(points, reference) for name, points in curves.items()},
            "variance_at_equal_candidates": {
                name: round(points[str(REFERENCE)]["variance"] / reference["variance"], 3)
                for name, points in curves.items()
            },
        }
        print(step, table[str(step)]["variance_at_equal_rows"], flush=True)
    content = {"reference": {"draw": "with_replacement", "candidates": REFERENCE}, "repeats": chosen.repeats}
    write_json(chosen.out, {**content, "steps": table, "provenance": provenance()})
    plot(table, chosen.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
