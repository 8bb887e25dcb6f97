"""The plain twin of every fast path: loops of full forwards, written from the definitions in docs/method.md.

Nothing here shares code with the package.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

END, IMAGE = 38, 39


def unpadded(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One sample of the batch alone, without padding, with its own images."""
    real = batch["attention_mask"][index].bool()
    sample = {name: batch[name][index][real][None] for name in ("input_ids", "roles", "labels")}
    if "pixel_values" in batch:
        counts = [int((ids == IMAGE).sum()) // 4 for ids in batch["input_ids"]]
        start = sum(counts[:index])
        if counts[index]:
            sample["pixel_values"] = batch["pixel_values"][start : start + counts[index]]
    return sample


def logits(model, sample: dict[str, Tensor], ids: Tensor | None = None) -> Tensor:
    """Log-probabilities after every token of one sample: [seq, vocab]."""
    pixels = {"pixel_values": sample["pixel_values"]} if "pixel_values" in sample else {}
    return model(input_ids=sample["input_ids"] if ids is None else ids, **pixels).logits[0].log_softmax(-1)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum(-1)


def samples(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [unpadded(batch, index) for index in range(len(batch["input_ids"]))]


def sft(student, batch) -> Tensor:
    values = []
    for sample in samples(batch):
        log_p = logits(student, sample)
        for t in (sample["roles"][0] == 3).nonzero().flatten():
            values.append(-log_p[t - 1, sample["input_ids"][0, t]])
    return torch.stack(values).mean()


def kd(student, teacher, batch, temperature: float = 1.0) -> Tensor:
    values = []
    for sample in samples(batch):
        s = (logits(student, sample) / temperature).log_softmax(-1)
        t = (logits(teacher, sample) / temperature).log_softmax(-1)
        for step in (sample["roles"][0] == 3).nonzero().flatten():
            values.append(kl(t[step - 1], s[step - 1]) * temperature**2)
    return torch.stack(values).mean()


def eager_focus(model, sample, layer: int) -> Tensor | None:
    """alpha of each visual token, from the attention matrices that an eager model returns."""
    visual, instruction = (sample["roles"][0] == role for role in (1, 2))
    if not visual.any() or not instruction.any():
        return None
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    out = model(
        input_ids=sample["input_ids"], pixel_values=sample["pixel_values"], output_attentions=True, return_dict=True
    )
    model.set_attn_implementation(before or "sdpa")
    return out.attentions[layer][0].mean(0)[instruction].mean(0)[visual]


def iva(student, teacher, batch, layer: int, separately: bool = False, share: float = 1.0) -> Tensor:
    values = []
    for sample in samples(batch):
        alpha = eager_focus(teacher, sample, layer)
        if alpha is None:
            continue
        alpha = alpha.detach()
        if alpha.sum() == 0:  # every image stands behind the instruction, which cannot look at it
            continue
        if separately:
            alpha = torch.cat([part / part.sum() if part.sum() > 0 else part for part in alpha.split(4)])
        weights = alpha / alpha.sum()
        if share < 1:
            held = torch.zeros(())
            for token in weights.argsort(descending=True):
                held, weights[token] = held + weights[token], weights[token] if held < share else 0.0
            weights = weights / weights.sum()
        rows = (sample["roles"][0] == 1).nonzero().flatten()
        values.append((weights * kl(logits(teacher, sample)[rows], logits(student, sample)[rows])).sum())
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def tpa(student, teacher, batch, candidates, left_out=(END, IMAGE)) -> Tensor:
    """One full forward of both models for every candidate, duplicates and gold tokens too."""
    kept = (candidates != left_out[0]) & (candidates != left_out[1])
    return weighted_tpa(student, teacher, batch, candidates, kept / kept.sum(-1, keepdim=True).clamp(min=1).double())


def weighted_tpa(student, teacher, batch, candidates, weights) -> Tensor:
    """The same with a weight for each candidate; a position where none has weight does not count."""
    values = []
    for index, sample in enumerate(samples(batch)):
        real = batch["attention_mask"][index].bool()
        for step in (sample["roles"][0] == 3).nonzero().flatten():
            rows = []
            for token, weight in zip(candidates[index][real][step], weights[index][real][step], strict=True):
                if weight == 0:
                    continue
                ids = sample["input_ids"][:, : step + 1].clone()
                ids[0, step] = token
                # Images behind the cut belong to later turns.
                seen = {"input_ids": ids}
                if "pixel_values" in sample and (pictures := int((ids == IMAGE).sum()) // 4):
                    seen["pixel_values"] = sample["pixel_values"][:pictures]
                rows.append(weight * kl(logits(teacher, seen)[step], logits(student, seen)[step]))
            if rows:
                values.append(torch.stack(rows).sum())
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def irs(model, groups, layers: int) -> dict[int, float]:
    scores = {}
    for layer in range(layers):
        similar = []
        for group in groups:
            focus = [eager_focus(model, sample, layer) for sample in samples(group)]
            similar += [torch.cosine_similarity(a, b, dim=0) for a, b in combinations(focus, 2)]
        scores[layer] = 1 - float(torch.stack(similar).mean())
    return scores
