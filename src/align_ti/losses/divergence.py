"""What is measured on one row: one position whose next-token distribution is compared."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def at_least_float32(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    """Logits in float32, or in float64 if they are: a softmax in half precision loses the tail of the vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def forward_kl(
    student: Float[Tensor, "rows vocab"], teacher: Float[Tensor, "rows vocab"], temperature: float = 1.0
) -> Float[Tensor, " rows"]:
    """KL(teacher || student) of each row in nats, both softened by the temperature, times the temperature squared.

    The square keeps the gradient's size when the temperature changes.

    Source: Hinton et al. (arXiv:1503.02531); Align-TI (arXiv:2602.09483), every divergence of its objective.
    """
    log_p = (at_least_float32(teacher) / temperature).log_softmax(-1)
    log_q = (at_least_float32(student) / temperature).log_softmax(-1)
    p = log_p.exp()
    # A token that the teacher rules out entirely (log 0) costs nothing, not 0 * inf.
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return terms.sum(-1) * temperature**2


def negative_log_likelihood(
    logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """-log p(label) of each row in nats.

    Source: Align-TI (arXiv:2602.09483), the SFT term.
    """
    return -at_least_float32(logits).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
