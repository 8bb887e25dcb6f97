"""TPA: which tokens are tried in place of each response token, and how much the row behind each of them counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align_ti.errors import BatchError
from align_ti.models.branches import Branches
from align_ti.models.families import widest_float


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens to try at each response position, and how much each counts in the position's estimate.

    Without `weights`, candidates that are not left out share the position's weight of 1. With them, each counts as given, one of
    weight 0 is no candidate, and a position without weight does not count.
    """

    tokens: Int[Tensor, "batch seq candidates"]
    # Its shape is checked below, for users' own weights too.
    weights: Float[Tensor, "..."] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights.shape != self.tokens.shape:
            raise BatchError(
                f"the weights of candidates are {tuple(self.weights.shape)}, their tokens {tuple(self.tokens.shape)}; equal shapes "
                "[batch, seq, n] are accepted."
            )

    def to(self, device: torch.device) -> Candidates:
        """The same on a device."""
        return Candidates(self.tokens.to(device), None if self.weights is None else self.weights.to(device))


@torch.no_grad()
def draw(
    logits: Float[Tensor, "rows vocab"],
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "rows count"]:
    """`count` tokens of each row's distribution (`sampling_distribution`), drawn with replacement."""
    probability = sampling_distribution(logits, temperature, top_k, top_p)
    return torch.multinomial(probability, count, replacement=True, generator=generator)


@torch.no_grad()
def sampling_distribution(
    logits: Float[Tensor, "rows vocab"], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "rows vocab"]:
    """The probabilities that candidates are drawn by, in float32 or wider.

    `top_k` is applied before `top_p`. A token as probable as the k-th is kept, so ties are never cut at random.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if temperature == 1 else logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        probability = ranked.softmax(-1)
        # A token is cut if those before it reach top_p already; the most probable one always stays.
        cut = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), float("-inf"))
    return logits.softmax(-1)


@dataclass(frozen=True, slots=True)
class Transitions:
    """What TPA compares: branches with weights, and the gold rows that need no branch.

    `mass` is K, the number of response positions that keep at least one candidate; all weights together sum to it where those of a
    position sum to 1. `kept` counts the candidates that were not left out.
    """

    branches: Branches
    branch_weights: Float[Tensor, " branches"]
    gold_weights: Float[Tensor, "batch seq"]
    mass: Int[Tensor, ""]
    kept: Int[Tensor, ""]


def plan_transitions(
    candidates: Candidates | Int[Tensor, "batch seq candidates"],
    response: Bool[Tensor, "batch seq"],
    input_ids: Int[Tensor, "batch seq"],
    left_out: Iterable[int],
    known: int | None = None,
) -> Transitions:
    """Rows and weights of the term, without any row that can be saved.

    At each response position, candidates in `left_out`, and ids from `known` on, are dropped; the others share the position's weight of
    1, or count as their own weights say. Equal candidates become one row with their weights added. A candidate equal to the gold token
    needs no row of its own: the gold pass holds its next-token distribution at that very position.

    Source: Align-TI (arXiv:2602.09483), the Monte Carlo estimate of the TPA term.
    """
    sample, step = response.nonzero(as_tuple=True)
    given = candidates if isinstance(candidates, Candidates) else Candidates(candidates)
    tried = given.tokens[sample, step]
    kept = ~torch.isin(tried, torch.tensor(sorted(set(left_out)), dtype=tried.dtype, device=tried.device))
    if known is not None:
        kept &= tried < known
    if given.weights is None:
        share = kept.to(widest_float(tried.device)) / kept.sum(-1, keepdim=True).clamp(min=1)
    else:
        share = given.weights[sample, step].to(widest_float(tried.device)) * kept
        kept = share > 0
    same = tried[:, :, None] == tried[:, None, :]
    first = ~same.tril(-1).any(-1)
    weight = torch.where(first, (same * share[:, None, :]).sum(-1), 0.0)

    is_gold = tried == input_ids[sample, step][:, None]
    gold_weights = torch.zeros(input_ids.shape, dtype=share.dtype, device=input_ids.device)
    gold_weights[sample, step] = torch.where(is_gold, weight, 0.0).sum(-1)

    # By weight: of equal candidates the first may be one of weight 0.
    row, column = ((weight > 0) & ~is_gold).nonzero(as_tuple=True)
    return Transitions(
        branches=Branches.of(sample[row], tried[row, column], step[row], len(input_ids)),
        branch_weights=weight[row, column],
        gold_weights=gold_weights,
        mass=kept.any(-1).sum(),
        kept=kept.sum(),
    )
