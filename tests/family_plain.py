"""The plain twins for any family: each sample alone, each candidate in a full forward of the model's own, from the definitions.

Nothing here shares code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.family_models import END, IMAGE

PER_TOKEN = ("input_ids", "roles", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids")


def samples(batch: dict[str, Tensor], pictures: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Each sample alone and without padding, with its own images as the family's `sample` made them."""
    alone = []
    for index, owned in enumerate(pictures):
        real = batch["attention_mask"][index].bool()
        one = {name: batch[name][index][real][None] for name in PER_TOKEN if name in batch}
        alone.append({**one, "pictures": owned})
    return alone


class Twin:
    """A model asked about one sequence at a time."""

    def __init__(self, family, model) -> None:
        self.family, self.model = family, model

    def inputs(self, sample: dict, ids: Tensor) -> dict[str, Tensor]:
        """What the model reads of the first tokens of a sample: images behind the cut belong to later turns."""
        left, pictures = int((ids == IMAGE).sum()), []
        for picture in sample["pictures"]:
            if left > 0:
                pictures.append(picture)
                left -= self.family.visual_tokens(picture)
        known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.family.join([pictures])}
        if self.family.token_types:
            known[self.family.token_types] = self.family.marks(ids, sample["roles"][:, : ids.shape[1]])
        return known

    def logits(self, sample: dict, ids: Tensor | None = None) -> Tensor:
        """After every token: [seq, vocab]."""
        return self.model(**self.inputs(sample, sample["input_ids"] if ids is None else ids)).logits[0]

    def focus(self, sample: dict, layer: int) -> Tensor | None:
        """alpha of each visual token, from the attention matrices that an eager model returns."""
        visual, instruction = (sample["roles"][0] == role for role in (1, 2))
        if not visual.any() or not instruction.any():
            return None
        before = self.model.get_decoder().config._attn_implementation
        self.model.set_attn_implementation("eager")
        with torch.no_grad():
            found = self.model(**self.inputs(sample, sample["input_ids"]), output_attentions=True).attentions
        self.model.set_attn_implementation(before)
        kinds = getattr(self.model.get_decoder().config, "layer_types", None)
        # A family of mixed layers lists the matrices of its attention layers alone.
        if kinds is not None and len(found) < len(kinds):
            layer = [index for index, kind in enumerate(kinds) if "linear" not in kind].index(layer)
        return found[layer][0].mean(0)[instruction].mean(0)[visual]


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0, tokens: slice | Tensor = slice(None)) -> Tensor:
    log_p, log_q = ((logits[..., tokens] / temperature).log_softmax(-1) for logits in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2


def responses(sample: dict) -> list[int]:
    return (sample["roles"][0] == 3).nonzero().flatten().tolist()


def sft(student: Twin, parts: list[dict]) -> Tensor:
    values = []
    for sample in parts:
        log_p = student.logits(sample).log_softmax(-1)
        values += [-log_p[step - 1, sample["input_ids"][0, step]] for step in responses(sample)]
    return torch.stack(values).mean()


def kd(
    student: Twin, teacher: Twin, parts: list[dict], temperature: float = 1.0, others: list[dict] | None = None, **of
) -> Tensor:
    values = []
    for sample, other in zip(parts, others or parts, strict=True):
        ours, theirs = student.logits(sample), teacher.logits(other)
        for step, place in zip(responses(sample), responses(other), strict=True):
            values.append(kl(theirs[place - 1], ours[step - 1], temperature, **of))
    return torch.stack(values).mean()


def iva(
    student: Twin, teacher: Twin, parts: list[dict], layer: int, others: list[dict] | None = None, mix=None, **of
) -> Tensor:
    """`mix` turns the teacher's values at one sample's visual tokens into values at the student's."""
    values = []
    for sample, other in zip(parts, others or parts, strict=True):
        alpha = teacher.focus(other, layer)
        if alpha is None or alpha.sum() == 0:
            continue
        rows, places = ((part["roles"][0] == 1).nonzero().flatten() for part in (sample, other))
        theirs = teacher.logits(other)[places]
        if mix is not None:
            alpha, theirs = mix(alpha[:, None])[:, 0], mix(theirs)
        weights = alpha / alpha.sum()
        values.append((weights * kl(theirs, student.logits(sample)[rows], **of)).sum())
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def tpa(
    student: Twin,
    teacher: Twin,
    batch: dict,
    parts: list[dict],
    candidates: Tensor,
    left_out=(END, IMAGE),
    others=None,
    **of,
) -> Tensor:
    """One full forward of both models for every candidate, duplicates and gold tokens too."""
    values = []
    for index, (sample, other) in enumerate(zip(parts, others or parts, strict=True)):
        tried = candidates[index][batch["attention_mask"][index].bool()]
        for step, place in zip(responses(sample), responses(other), strict=True):
            rows = []
            for token in tried[step].tolist():
                if token in left_out:
                    continue
                ours, theirs = sample["input_ids"][:, : step + 1].clone(), other["input_ids"][:, : place + 1].clone()
                ours[0, step] = theirs[0, place] = token
                rows.append(kl(teacher.logits(other, theirs)[place], student.logits(sample, ours)[step], **of))
            if rows:
                values.append(torch.stack(rows).mean())
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)
