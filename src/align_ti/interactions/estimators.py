"""TPA: other ways to draw candidates, with the weights that keep what is expected of the estimate.

Each estimator turns one distribution q over tokens into a few tokens and weights, so that for any function f of a token the sum of
weight * f has the expectation of f under q, and the weights sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align_ti.models.families import widest_float

Draw = Literal["without_replacement", "top_and_tail", "stratified"]
Weighted = tuple[Int[Tensor, "rows slots"], Float[Tensor, "rows slots"]]
"""Tokens and their weights; a slot of weight 0 is empty, and a token may stand in several slots."""


@torch.no_grad()
def draw_weighted(
    probability: Float[Tensor, "rows vocab"],
    gold: Int[Tensor, " rows"],
    count: int,
    left_out: Iterable[int],
    draw: Draw,
    *,
    enumerated: int = 0,
    generator: torch.Generator | None = None,
) -> Weighted:
    """Candidates of each row and their weights, which sum to 1, or to 0 where every try is left out.

    As many of `count` tries as plain draws would keep, J ~ Binomial(count, probability of the tokens that are not left out), go into
    an estimator over the kept tokens alone. So a row counts as often as with plain draws, and a row that most likely ends the turn
    costs as little: the expectation is (1 - P(left out)^count) * E[f(u) | u kept].

    Args:
        probability: what plain draws would draw from (`sampling_distribution`).
        gold: the response's own token, whose row costs nothing.
        count: n, tries at each row.
        left_out: token ids that are no candidates.
        draw: the estimator.
        enumerated: for top_and_tail, how many of the tries go to the most probable tokens.
        generator: on the device of `probability`.
    """
    banned = [token for token in sorted(set(left_out)) if token < probability.shape[-1]]
    kept = probability.index_fill(-1, torch.tensor(banned, dtype=torch.long, device=probability.device), 0.0)
    total = kept.sum(-1, keepdim=True)
    tries = uniform((len(kept), count), kept, generator) < total / probability.sum(-1, keepdim=True)
    tokens = gold[:, None].repeat(1, count + 1)
    weights = torch.zeros(tokens.shape, dtype=kept.dtype, device=kept.device)
    for size in range(1, count + 1):
        rows = (tries.sum(-1) == size).nonzero().squeeze(-1)
        if len(rows) == 0:
            continue
        q, its_gold = kept[rows] / total[rows], gold[rows]
        if draw == "without_replacement":
            found = without_replacement(q, size, generator)
        elif draw == "top_and_tail":
            found = top_and_tail(q, its_gold, size, min(enumerated, size - 1), generator)
        else:
            found = stratified(q, its_gold, size, generator)
        width = found[0].shape[-1]
        tokens[rows, :width], weights[rows, :width] = found[0], found[1].to(weights.dtype)
    return tokens, weights


def uniform(
    shape: tuple[int, ...], like: Float[Tensor, "rows vocab"], generator: torch.Generator | None
) -> Float[Tensor, "rows count"]:
    """Numbers in [0, 1), in the dtype and on the device of `like`."""
    return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)


# --- without replacement ----------------------------------------------------------------------------------------------


def without_replacement(q: Float[Tensor, "rows vocab"], count: int, generator: torch.Generator | None) -> Weighted:
    """`count` distinct tokens, each drawn from q without those before it, weighed by `set_weights`.

    Where q has no more than `count` tokens the sum is exact. The tokens with the smallest E / q, E exponential, are such a draw: it is
    the Gumbel-top-k draw of log q.

    Source: Kool et al. (arXiv:1903.06059), the draw; Kool et al. (arXiv:2002.06043), the unordered set estimator.
    """
    tiny = torch.finfo(q.dtype).tiny
    arrival = torch.empty_like(q).exponential_(generator=generator).clamp(min=tiny) / q
    tokens = arrival.topk(min(count, q.shape[-1]), largest=False).indices
    outside = q.scatter(-1, tokens, 0.0).sum(-1)
    wide = widest_float(q.device)
    return tokens, set_weights(q.gather(-1, tokens).to(wide), outside.to(wide))


def set_weights(chosen: Float[Tensor, "rows count"], outside: Float[Tensor, " rows"]) -> Float[Tensor, "rows count"]:
    """The weights of a set of tokens drawn without replacement; they sum to 1 if all probabilities do.

    w(u) = q(u) P(S | u came first) / P(S), where P(S) is the probability of drawing the set S in any order. It averages, over the
    orders in which the set may have come, the estimate that takes all but the last token exactly. P is found from the whole set down:
    F(D), the probability that the rest of S follows once D is drawn, is the sum over u in S without D of q(u) / (1 - q(D)) * F(D + u).
    Complements are summed, not subtracted, so a token that holds nearly everything costs no digits. 2^count subsets are visited.

    Args:
        chosen: the probabilities of the drawn tokens.
        outside: the probability of all others; 0: the set holds everything, and the weights are the probabilities.

    Source: Murthy (1957); Kool et al. (arXiv:2002.06043), the unordered set estimator.
    """
    count = chosen.shape[-1]
    whole = (1 << count) - 1
    follows = {whole: torch.ones_like(outside)}
    for drawn in range(whole - 1, -1, -1):
        free = [index for index in range(count) if not drawn >> index & 1]
        left = outside + chosen[:, free].sum(-1)
        ways = sum((chosen[:, index] * follows[drawn | 1 << index] for index in free), torch.zeros_like(outside))
        follows[drawn] = ways / left.clamp(min=torch.finfo(left.dtype).tiny)
    first = torch.stack([chosen[:, index] * follows[1 << index] for index in range(count)], dim=-1)
    weights = first / first.sum(-1, keepdim=True).clamp(min=torch.finfo(first.dtype).tiny)
    return torch.where(outside[:, None] > 0, weights, chosen)


# --- the top exactly, the tail drawn ----------------------------------------------------------------------------------


def top_and_tail(
    q: Float[Tensor, "rows vocab"],
    gold: Int[Tensor, " rows"],
    count: int,
    enumerated: int,
    generator: torch.Generator | None,
) -> Weighted:
    """The most probable tokens and the gold token with their probabilities; the tail by draws that share what is left.

    `enumerated` of the `count` tokens are the most probable but the gold token, which comes on top, for its row costs nothing. The
    others are drawn with replacement from the rest of q.
    """
    others = q.scatter(-1, gold[:, None], 0.0)
    top_q, top = others.topk(min(enumerated, q.shape[-1]))
    tail = others.scatter(-1, top, 0.0)
    mass = tail.sum(-1, keepdim=True)
    # Where nothing is left, anything may be drawn: its weight is 0.
    drawn = torch.multinomial(
        torch.where(mass > 0, tail / mass, 1.0), count - enumerated, replacement=True, generator=generator
    )
    share = (mass / drawn.shape[-1]).expand(drawn.shape)
    return torch.cat([gold[:, None], top, drawn], -1), torch.cat([q.gather(-1, gold[:, None]), top_q, share], -1)


# --- evenly spread draws ----------------------------------------------------------------------------------------------


def stratified(
    q: Float[Tensor, "rows vocab"], gold: Int[Tensor, " rows"], count: int, generator: torch.Generator | None
) -> Weighted:
    """Draws spread evenly over q: as many of `count` for the gold token as its probability asks for, the others one to a stratum.

    R, the draws for tokens other than the gold one, is r = count * (1 - q(gold)) rounded up or down at random, so that its mean is r.
    These tokens are sorted by probability, their mass cut into R equal parts, and one token drawn in each. Each weighs 1 / count
    where r is below 1, else (1 - q(gold)) / R; the gold token weighs what is left to 1. So draws follow probability, as plain draws
    do: a sure student costs no row.

    Source: stratified resampling, Douc and Cappé (arXiv:cs/0507025).
    """
    wide = widest_float(q.device)
    others, order = q.scatter(-1, gold[:, None], 0.0).sort(dim=-1, descending=True)
    cumulative, its_q = others.to(wide).cumsum(-1), q.gather(-1, gold[:, None]).to(wide)
    mass = cumulative[:, -1:] / (cumulative[:, -1:] + its_q)
    asked = count * mass
    draws = torch.floor(asked + uniform((len(q), 1), q, generator))
    slot = torch.arange(count, device=q.device)
    point = (slot + uniform((len(q), count), q, generator)) / draws.clamp(min=1) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, point.contiguous(), right=True)
    # Rounding may carry a point past the last token that has probability.
    last = ((others > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    weight = torch.where(asked < 1, torch.full_like(asked, 1 / count), mass / draws.clamp(min=1)) * (slot < draws)
    tokens = order.gather(-1, place.minimum(last))
    rest = torch.where(its_q > 0, 1 - weight.sum(-1, keepdim=True), 0.0).clamp(min=0)
    return torch.cat([gold[:, None], tokens], -1), torch.cat([rest, weight], -1)
