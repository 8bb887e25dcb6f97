"""Single levers, each with and without: what the choices of the fast path rest on.

    python -m benchmarks.levers --out results/levers.json

- divergence: value and gradient of KL over 1,024 rows of 32,000 logits: by autograd, written down over whole chunks, in blocks that
  stay in a cache, and compiled.
- chunk: the row loss of 2,048 rows by the number of rows projected at a time.
- attention: one layer's attention of the candidates, forward and backward: under one dense mask, in rows with the gold keys of their
  sample, and as two parts merged by log-sum-exp (private operators of PyTorch on a CPU, here alone).
- packing: the second passes with one row of candidates for each sample, and with rows of one width, several a sample: slots that are
  padding, and time.

Seconds are the median of several calls in turn; other work on the machine makes them void.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align_ti.cli import quiet
from align_ti.config import Tpa
from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.sources import read_conversations
from align_ti.demo import TRAINING
from align_ti.digits.files import write_benchmark
from align_ti.interactions.candidates import plan_candidates
from align_ti.losses import weighted
from align_ti.losses.divergence import forward_kl
from align_ti.losses.divergences.forward_kl import ForwardKl
from align_ti.losses.measures import Measured, Softened
from align_ti.losses.weighted import Rows, RowWeights, weighted_row_loss
from align_ti.models import attention
from align_ti.models import branches as layout
from align_ti.models.branches import Branches
from align_ti.models.continuation import continue_branches, read
from align_ti.models.loading import load_model, load_processor
from align_ti.runs import write_json
from align_ti.terms.readings import view
from align_ti.training.passes import candidates_for
from benchmarks import shapes
from benchmarks.rounds import machine, seconds_by_round, summary

VOCABULARY, CHUNK = 32_000, 512
Work = Callable[[], Any]
Cases = list[tuple[dict[str, Any], Branches]]
BestWidth = Callable[[tuple[int, ...], int], int]


def timed(works: dict[str, Work], rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of the seconds of each, in turn, after one call that does not count."""
    for work in works.values():
        work()
    seconds = seconds_by_round(works, dict.fromkeys(works, rounds))
    return {name: summary(values) for name, values in seconds.items()}


def divergence(rounds: int) -> dict[str, Any]:
    """Value and gradient of the divergence at the logits."""
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 1024, VOCABULARY)
    labels = torch.zeros(1024, dtype=torch.long)

    def with_slope(mine: Tensor, its: Tensor) -> Measured:
        return Softened(ForwardKl())(mine, its, labels[: len(mine)], slice(None), slope=True)

    compiled = torch.compile(with_slope, dynamic=True)

    def by_autograd() -> None:
        for mine, its in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
            leaf = mine.detach().requires_grad_()
            torch.autograd.grad(forward_kl(leaf, its).sum(), leaf)

    def written(rows: int, function: Callable[[Tensor, Tensor], Any]) -> None:
        for mine, its in zip(student.split(rows), teacher.split(rows), strict=True):
            function(mine, its)

    block = weighted.rows_at_a_time(weighted.BLOCK_LOGITS, VOCABULARY, student.device)
    return timed(
        {
            "by autograd": by_autograd,
            f"written down, {CHUNK} rows at a time": lambda: written(CHUNK, with_slope),
            f"written down, {block} rows at a time": lambda: written(block, with_slope),
            f"compiled, {CHUNK} rows at a time": lambda: written(CHUNK, compiled),
        },
        rounds,
    )


def chunk(rounds: int) -> dict[str, Any]:
    """The row loss by rows projected at a time."""
    torch.manual_seed(0)
    rows = Rows(
        student=torch.randn(2048, 256, requires_grad=True),
        student_head=nn.Linear(256, VOCABULARY, bias=False),
        teacher=torch.randn(2048, 512),
        teacher_head=nn.Linear(512, VOCABULARY, bias=False).requires_grad_(False),
        labels=torch.zeros(2048, dtype=torch.long),
    )
    terms = {"kl": RowWeights(weights=torch.rand(2048), coefficient=torch.tensor(1.0), measure=Softened(ForwardKl()))}

    def loss(size: int) -> Work:
        return lambda: weighted_row_loss(rows, terms, size)

    return timed({f"{size} rows": loss(size) for size in (64, 128, 256, 512, 1024)}, rounds)


def second_pass_attention(candidates: int, rounds: int) -> dict[str, Any]:
    """Attention of this many candidates a sample over 939 gold keys and each over its own, forward and backward.

    Raises:
        AssertionError: the ways differ.
    """
    torch.manual_seed(0)
    batch, heads, key_heads, gold, size = 2, 4, 2, 939, 64
    replaces = torch.randint(789, gold, (batch, candidates)).sort().values
    mask = (torch.arange(gold) < replaces[..., None])[:, None]
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True  # type: ignore[assignment]
    query = torch.randn(batch, heads, candidates, size, requires_grad=True)
    key, value = (torch.randn(batch, key_heads, gold + candidates, size, requires_grad=True) for _ in range(2))
    alone = torch.eye(candidates, dtype=torch.bool).expand(batch, 1, -1, -1)
    whole = torch.cat([mask, alone], dim=-1)

    branches = Branches(torch.zeros(batch * candidates, dtype=torch.long), replaces.flatten(), (candidates,) * batch)
    rows = branches.in_rows(gold)
    count, width = rows.tokens.shape
    opened = (torch.arange(gold) < rows.replaces[..., None])[:, None]
    own = torch.eye(width, dtype=torch.bool).expand(count, 1, -1, -1)
    mask_of_rows = torch.cat([opened, own], dim=-1)

    def in_rows() -> Tensor:
        def laid(of: Tensor) -> Tensor:
            spread = of.new_zeros(count * width, *of.shape[1::2]).index_copy(
                0, rows.slots, of.transpose(1, 2).flatten(0, 1)
            )
            return spread.view(count, width, *of.shape[1::2]).transpose(1, 2)

        states = [torch.cat([rows.by_row(of[:, :, :gold]), laid(of[:, :, gold:])], dim=2) for of in (key, value)]
        out = attention.attend(module, laid(query), *states, mask_of_rows)[0]
        return rows.flat(out.flatten(2)).view(batch, candidates, heads, size)

    def dense() -> Tensor:
        return attention.attend(module, query, key, value, whole)[0]

    def merged() -> Tensor:
        wide = [of.repeat_interleave(heads // key_heads, dim=1) for of in (key, value)]
        states = [part for of in wide for part in (of[:, :, :gold], of[:, :, gold:])]
        return _Merged.apply(query, *states, mask).transpose(1, 2)  # type: ignore[no-any-return]

    ways = {"one dense mask": dense, "rows of 256 at most": in_rows, "merged by log-sum-exp": merged}
    found = {}
    for name, way in ways.items():
        out = way()
        found[name] = [out, *torch.autograd.grad(out.square().sum(), [query, key, value])]
    for name in ways:
        for one, other in zip(found[name], found["one dense mask"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

    def both(way: Callable[[], Tensor]) -> Work:
        return lambda: torch.autograd.grad(way().sum(), [query, key, value])

    return timed({name: both(way) for name, way in ways.items()}, rounds)


class _Merged(torch.autograd.Function):
    """Attention over common keys by PyTorch's CPU kernel, and over one own key, joined by their log-sum-exp.

    Given the joined output and its log-sum-exp, the kernel's own backward gives the gradient of the common part of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, own_key: Tensor, value: Tensor, own: Tensor, mask: Tensor
    ) -> Tensor:
        scale = query.shape[-1] ** -0.5
        closed = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, common = kernel(query, key, value, 0.0, False, attn_mask=closed, scale=scale)
        score = (query * own_key).sum(-1) * scale
        joined = torch.logaddexp(common, score)
        weight = (score - joined).exp()[..., None]
        out = torch.lerp(out, own, weight)
        ctx.save_for_backward(query, key, own_key, value, own, closed, out, joined, weight)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, own_key, value, own, closed, out, joined, weight = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_query, to_key, to_value = kernel(
            gradient.contiguous(), query, key, value, out, joined, 0.0, False, attn_mask=closed, scale=scale
        )
        of_score = (gradient * (own - out)).sum(-1, keepdim=True) * weight * scale
        return to_query + of_score * own_key, to_key, of_score * query, to_value, gradient * weight, None


def packing(rounds: int) -> dict[str, Any]:
    """Both models' second pass (the student's with backward) with one row of candidates for each sample, and with rows of one width,
    several a sample: batches of the digits training with candidates from the student as it starts, and two samples of the larger shape
    of which one has ten times the candidates of the other."""
    shape, counts = shapes.CPU, (600, 60)
    generator = torch.Generator().manual_seed(0)
    uneven = Branches.of(
        torch.arange(2).repeat_interleave(torch.tensor(counts)),
        torch.randint(shapes.FIRST_WORD, VOCABULARY, (sum(counts),), generator=generator),
        torch.cat([torch.randint(789, 939, (count,), generator=generator).sort().values for count in counts]),
        len(counts),
    )
    student, teacher = shapes.make_pair(shape)
    return {
        f"{counts[0]} and {counts[1]} candidates": packed_or_not(
            student, teacher, [(shapes.make_batch(shape), uneven)], rounds
        ),
        "digits training": packed_or_not(*digits_cases(), rounds),
    }


def digits_cases(batches: int = 6) -> tuple[PreTrainedModel, PreTrainedModel, Cases]:
    """The demo's pair with batches of its training, and candidates of the student as it starts."""
    size, tpa = TRAINING.per_device_train_batch_size, Tpa()
    with TemporaryDirectory() as folder:
        data = Path(folder)
        write_benchmark(data)
        processor = load_processor(str(data / "student"))
        encoded = EncodedConversations(read_conversations(data / "train.json")[: batches * size], processor)
        student, teacher = (load_model(str(data / name)) for name in ("student", "teacher"))
        collate = Collator(processor.tokenizer.pad_token_id)
        made = [collate([encoded[index + start] for index in range(size)]) for start in range(0, len(encoded), size)]
    generator = torch.Generator().manual_seed(0)
    drawn = [candidates_for(student, teacher, batch, tpa, generator) for batch in made]
    plans = [plan_candidates(student, batch, given, tpa) for batch, given in zip(made, drawn, strict=True)]
    return student, teacher, [(batch, plan.branches) for batch, plan in zip(made, plans, strict=True)]


def packed_or_not(student: PreTrainedModel, teacher: PreTrainedModel, cases: Cases, rounds: int) -> dict[str, Any]:
    """Seconds of all cases, and the share of slots that are padding, both ways."""
    passes = []
    for model, grad in ((student.train(), True), (teacher.eval(), False)):
        with torch.no_grad():
            for batch, branches in cases:
                of = view(model, batch)
                reading = read(model, of.inputs, keep_cache=True)
                assert reading.cache is not None
                for layer in reading.cache.layers:
                    # What is before the second pass is not part of it.
                    assert layer.keys is not None
                    assert layer.values is not None
                    layer.keys.requires_grad_(grad)
                    layer.values.requires_grad_(grad)
                passes.append((of, reading, branches, grad))

    def work() -> None:
        for of, reading, branches, grad in passes:
            with torch.set_grad_enabled(grad):
                hidden = continue_branches(of.model, of.inputs, reading, branches)
            if grad:
                hidden.sum().backward()
                student.zero_grad()

    def in_rows_of(best_width: BestWidth) -> Work:
        return patch.object(layout, "best_width", best_width)(work)

    def padded(best_width: BestWidth) -> float:
        with patch.object(layout, "best_width", best_width):
            laid = [branches.in_rows(batch["input_ids"].shape[1]) for batch, branches in cases]
        return round(statistics.mean(1 - len(rows.slots) / rows.tokens.numel() for rows in laid), 4)

    ways: dict[str, BestWidth] = {
        "a row for each sample": lambda counts, keys: max(counts),
        "rows of one width, several a sample": layout.best_width,
    }
    times = timed({name: in_rows_of(way) for name, way in ways.items()}, rounds)
    return {name: {"padded_share": padded(way), **times[name]} for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    quiet()
    start = machine("cpu")
    content = {
        "divergence": divergence(chosen.rounds),
        "chunk": chunk(chosen.rounds),
        "attention": {str(count): second_pass_attention(count, chosen.rounds) for count in (150, 600, 2400)},
        "packing": packing(chosen.rounds),
        "rounds": chosen.rounds,
        **start,
    }
    write_json(chosen.out, content)
    for name in ("divergence", "chunk"):
        print(name, {way: found["median"] for way, found in content[name].items()})
    print({count: {way: one["median"] for way, one in found.items()} for count, found in content["attention"].items()})
    print(content["packing"])


if __name__ == "__main__":
    main()
