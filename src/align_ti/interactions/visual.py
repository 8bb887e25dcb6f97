"""IVA: how much each visual row counts, from where the teacher's instruction tokens look."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def visual_weights(
    attention: Float[Tensor, "batch seq"],
    visual: Bool[Tensor, "batch seq"],
    instruction: Bool[Tensor, "batch seq"],
    images: Literal["together", "separately"] = "together",
    pictures: Int[Tensor, "batch seq"] | None = None,
    share: float = 1.0,
) -> Float[Tensor, "batch seq"]:
    """w_i = alpha_i / sum of alpha over the sample's visual tokens; 0 elsewhere.

    The weights of a sample sum to 1, or to 0 if no instruction token sees a visual one. An image behind the last instruction
    token is not looked at and has no weight. With `separately` each image is normalised on its own, and all images that are looked
    at count the same. `pictures` holds the number of each visual token's image, from 1; without it an image is a run of adjacent
    visual tokens. With a `share` below 1, the most looked-at tokens that together hold it are kept, and renormalised.

    Source: Align-TI (arXiv:2602.09483), the weights of the IVA term.
    """
    seen = seen_visual(visual, instruction)
    alpha = torch.where(seen, attention, 0.0)
    if images == "separately":
        alpha = alpha / picture_totals(alpha, seen, pictures).masked_fill(~seen, 1.0)
    weights = alpha / alpha.sum(-1, keepdim=True).masked_fill(~seen.any(-1, keepdim=True), 1.0)
    if share == 1:
        return weights
    weights = most_looked_at(weights, share)
    return weights / weights.sum(-1, keepdim=True).masked_fill(~seen.any(-1, keepdim=True), 1.0)


def most_looked_at(weights: Float[Tensor, "batch seq"], share: float) -> Float[Tensor, "batch seq"]:
    """The weights with all but the fewest set to 0 that together reach this share of a sample's sum."""
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    # A token is dropped if those before it reach the share already; the first always stays.
    dropped = ranked.cumsum(-1) - ranked >= share * ranked.sum(-1, keepdim=True)
    return weights.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)


def seen_visual(visual: Bool[Tensor, "batch seq"], instruction: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """The visual tokens with an instruction token behind them; attention is causal, so no instruction looks at the others."""
    behind = instruction.flip(-1).long().cumsum(-1).flip(-1) > 0
    return visual & behind


def picture_totals(
    alpha: Float[Tensor, "batch seq"],
    visual: Bool[Tensor, "batch seq"],
    pictures: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """At each visual token the sum of alpha over its image; 0 elsewhere."""
    if pictures is None:
        before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        pictures = (visual & ~before).long().cumsum(-1)
    number = pictures * visual
    totals = alpha.new_zeros(alpha.shape[0], alpha.shape[1] + 1).scatter_add(1, number, alpha)
    return totals.gather(1, number) * visual


def aligned_samples(
    visual: Bool[Tensor, "batch seq"], instruction: Bool[Tensor, "batch seq"]
) -> Bool[Tensor, " batch"]:
    """The samples that count in IVA: those where an instruction token sees a visual one. Their number is the term's mass."""
    return seen_visual(visual, instruction).any(-1)
