"""What a cache of the teacher's k largest probabilities would lose: bias of forward KL and error of its gradient, by k.

    make demo
    python -m benchmarks.topk --run runs/demo --out results/topk.json

Rows are those that KD (response) and IVA (visual) compare, of held-out records; the students are the demo's: the start, and those that
its methods have trained. Two ways to use k probabilities of a row: "rest": what is left is one more token, in both distributions
(forward KL of the coarser distributions, never larger than the exact one); "renormalised": what is left is dropped and both
distributions are made to sum to 1 over the k tokens. The error of the gradient with respect to the student's logits is its norm over
that of the exact gradient, over all rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from align_ti.cli import quiet
from align_ti.data.collator import Collator
from align_ti.data.roles import RESPONSE, VISUAL, encode, model_inputs
from align_ti.data.sources import read_conversations
from align_ti.models.loading import load_model, load_processor
from align_ti.runs import provenance, write_json

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
STUDENTS = {"start": "data/student", "sft": "sft/student", "kd": "kd/student", "align_ti": "align_ti/student"}
"""Folders of a demo."""


@torch.no_grad()
def rows(model: Any, processor: Any, records: list[Any]) -> dict[str, Float[Tensor, "rows vocab"]]:
    """Logits in double precision of the response rows (those that predict a response token) and of the visual rows."""
    found: dict[str, list[Tensor]] = {"response": [], "visual": []}
    collate = Collator(processor.tokenizer.pad_token_id)
    for record in records:
        batch = collate([encode(record, processor, train=True)])
        logits, roles = model(**model_inputs(batch)).logits[0].double(), batch["roles"][0]
        found["response"].append(logits[:-1][roles[1:] == RESPONSE])
        found["visual"].append(logits[roles == VISUAL])
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def coarse(
    teacher: Float[Tensor, "rows vocab"], student: Float[Tensor, "rows vocab"], count: int, rest: bool
) -> tuple[float, Tensor]:
    """Mean forward KL over the teacher's `count` largest probabilities, and its gradient at the student's logits, times the rows."""
    student = student.clone().requires_grad_()
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    top = p.topk(count, dim=-1)
    chosen, theirs = top.values, log_q.gather(-1, top.indices)
    if rest:
        others = torch.ones_like(p, dtype=torch.bool).scatter(-1, top.indices, False)
        left = (p * others).sum(-1, keepdim=True)
        mass = log_q.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
        chosen, theirs = torch.cat([chosen, left], -1), torch.cat([theirs, mass], -1)
    else:
        chosen, theirs = chosen / chosen.sum(-1, keepdim=True), theirs.log_softmax(-1)
    value = torch.where(chosen > 0, chosen * (chosen.clamp(min=1e-300).log() - theirs), 0.0).sum(-1)
    (slope,) = torch.autograd.grad(value.sum(), student)
    return float(value.mean().detach()), slope


def measured(teacher: Float[Tensor, "rows vocab"], student: Float[Tensor, "rows vocab"]) -> dict[str, Any]:
    """Exact forward KL in nats a row, and for each k and way the bias in per cent of it and the gradient's relative error."""
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    exact = float((p * (teacher.log_softmax(-1) - log_q)).sum(-1).mean())
    slope = log_q.exp() - p
    result: dict[str, Any] = {"rows": len(p), "exact_nats": round(exact, 4), "ways": {}}
    for way in ("rest", "renormalised"):
        found = {}
        for count in (k for k in COUNTS if k < p.shape[-1]):
            value, its = coarse(teacher, student, count, way == "rest")
            kept = float(p.topk(count, dim=-1).values.sum(-1).mean())
            found[str(count)] = {
                "bias_per_cent": round(100 * (value / exact - 1), 2),
                "gradient_error": round(float((its - slope).norm() / slope.norm()), 4),
                "mass_kept": round(kept, 4),
            }
        result["ways"][way] = found
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    quiet()
    data = chosen.run / "data"
    records = read_conversations(data / "test.json", data)[: chosen.records]
    processor = load_processor(str(data / "teacher"))
    teacher = rows(load_model(str(data / "teacher"), "float32"), processor, records)
    table = {}
    for name, folder in STUDENTS.items():
        student = rows(load_model(str(chosen.run / folder), "float32"), processor, records)
        table[name] = {kind: measured(teacher[kind], student[kind]) for kind in teacher}
        print(name, {kind: table[name][kind]["ways"]["rest"]["8"] for kind in teacher}, flush=True)
    vocabulary = next(iter(teacher.values())).shape[-1]
    write_json(
        chosen.out,
        {"records": len(records), "vocabulary": vocabulary, "students": table, "provenance": provenance()},
    )


if __name__ == "__main__":
    main()
