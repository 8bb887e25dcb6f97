"""What else people would run, written plainly: vanilla KD with both models' logits in full, and Align-TI's released design.

Each is a function from a batch to the loss, and shares no code with the package's own loss. All samples of a batch have their roles at
the same places, as `shapes.make_batch` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from align_ti.data.roles import INSTRUCTION, NO_LABEL, RESPONSE, VISUAL


def vanilla_kd(student: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    """SFT + KD of a batch, a scalar in nats: both models called as they are, PyTorch's own losses.

    Source: Hinton et al. (arXiv:1503.02531); Align-TI (arXiv:2602.09483), L_sft + L_kd.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    ours = student(**inputs, labels=batch["labels"], use_cache=False)
    with torch.no_grad():
        theirs = teacher(**inputs, use_cache=False)
    predicts = batch["labels"][:, 1:] != NO_LABEL
    divergence = functional.kl_div(
        functional.log_softmax(ours.logits[:, :-1][predicts], dim=-1),
        functional.softmax(theirs.logits[:, :-1][predicts], dim=-1),
        reduction="batchmean",
    )
    return ours.loss + divergence


@dataclass(frozen=True, slots=True)
class Ribbon:
    """A batch with its candidates interleaved: every response token is followed by the tokens to try in its place.

    `source` holds for each place of the long sequence the place in the short one, `tried` says which hold candidates.
    """

    ids: Tensor
    source: Tensor
    tried: Tensor

    @property
    def gold(self) -> Tensor:
        """The places of the short sequence's tokens in the long one."""
        return (~self.tried).nonzero().squeeze(-1)


def interleave(ids: Tensor, roles: Tensor, candidates: Tensor) -> Ribbon:
    """The long sequence of a batch; `candidates` is [batch, seq, n].

    Raises:
        ValueError: the samples have their roles at different places.
    """
    if not bool((roles == roles[:1]).all()):
        raise ValueError(
            "samples have their roles at different places; equal ones are accepted; use shapes.make_batch."
        )
    count = candidates.shape[-1]
    copies = torch.where(roles[0] == RESPONSE, 1 + count, 1)
    source = torch.arange(ids.shape[1], device=ids.device).repeat_interleave(copies)
    first = copies.cumsum(0) - copies
    number = torch.arange(len(source), device=ids.device) - first[source]
    tokens = torch.cat([ids[..., None], candidates], dim=-1)
    return Ribbon(tokens[:, source, number], source, number > 0)


def ribbon_mask(ribbon: Ribbon, dtype: torch.dtype) -> Tensor:
    """The dense additive mask, [batch, 1, seq, seq]: 0 where a token is seen, else the lowest number.

    A token sees the gold tokens before its own step and itself.

    Source: Align-TI (arXiv:2602.09483), the ribbon mask of its TPA term.
    """
    source = ribbon.source
    seen = (source[None, :] < source[:, None]) & ~ribbon.tried[None, :]
    seen |= torch.eye(len(source), dtype=torch.bool, device=source.device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=source.device).masked_fill(~seen, torch.finfo(dtype).min)
    return mask.expand(len(ribbon.ids), 1, -1, -1).contiguous()


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """The language model computes whole attention matrices inside the block, and is as it was after it; the tower stays on SDPA."""
    configs = {id(part.config): part.config for part in model.get_decoder().modules() if hasattr(part, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def read_ribbon(model: PreTrainedModel, batch: Mapping[str, Any], ribbon: Ribbon) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits of every token of the long sequence, and every layer's attention matrices."""
    with eager(model):
        out = model(
            input_ids=ribbon.ids,
            attention_mask=ribbon_mask(ribbon, model.dtype),
            position_ids=ribbon.source.expand_as(ribbon.ids),
            pixel_values=batch["pixel_values"],
            output_attentions=True,
            use_cache=False,
        )
    return out.logits, out.attentions


def released_design(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Mapping[str, Any],
    candidates: Tensor,
    layer: int,
) -> Tensor:
    """SFT + KD + IVA + TPA of a batch, a scalar in nats, as the released mask and the paper's account of its cost have it.

    One pass of each model over the interleaved sequence, a row for every candidate, eager attention, the attention matrices of every
    layer, logits in full. The candidates come from outside, so the pass that draws them is not in it; none may be a token that is
    left out.

    Source: Align-TI (arXiv:2602.09483), L = L_sft + L_kd + L_iva + L_tpa, all weights 1.
    """
    ribbon = interleave(batch["input_ids"], batch["roles"], candidates)
    ours, _ = read_ribbon(student, batch, ribbon)
    with torch.no_grad():
        theirs, attentions = read_ribbon(teacher, batch, ribbon)
    labels, roles = batch["labels"], batch["roles"][0]
    gold, tried = ribbon.gold, ribbon.tried
    predicts = labels[:, 1:] != NO_LABEL
    rows = [logits[:, gold][:, :-1][predicts] for logits in (ours, theirs)]
    sft = functional.cross_entropy(rows[0], labels[:, 1:][predicts])
    kd = row_divergence(*rows).mean()
    visual, instruction = gold[roles == VISUAL], gold[roles == INSTRUCTION]
    alpha = attentions[layer].mean(1)[:, instruction].mean(1)[:, visual]
    weights = alpha / alpha.sum(-1, keepdim=True)
    iva = (weights * row_divergence(ours[:, visual], theirs[:, visual])).sum(-1).mean()
    tpa = row_divergence(ours[:, tried], theirs[:, tried]).mean()
    return sft + kd + iva + tpa


def row_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row of logits, in nats."""
    student, teacher = functional.log_softmax(student, dim=-1), functional.softmax(teacher, dim=-1)
    return functional.kl_div(student, teacher, reduction="none").sum(-1)


@torch.no_grad()
def drawn_in_full(student: PreTrainedModel, batch: Mapping[str, Any], count: int) -> Tensor:
    """`count` tokens of the student's distribution at each position, [batch, seq, count]: a pass of its own with logits in full."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    logits = student(**inputs, use_cache=False).logits
    # The row that predicts a token is the position before it.
    before = functional.softmax(functional.pad(logits, (0, 0, 1, 0))[:, :-1].flatten(0, 1), dim=-1)
    return torch.multinomial(before, count, replacement=True).view(*batch["input_ids"].shape, count)
