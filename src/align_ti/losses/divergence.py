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


def forward_kl_with_slope(
    student: Float[Tensor, "rows vocab"], teacher: Float[Tensor, "rows vocab"], temperature: float = 1.0
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """`forward_kl` of each row and its slope: the gradient with respect to the student's logits, divided by the temperature.

    With p and q the softened distributions: d/dz = temperature * (q - p), and the slope is q - p.
    """
    log_p, log_q = softened(teacher, temperature), softened(student, temperature)
    wide = torch.promote_types(log_p.dtype, log_q.dtype)
    log_p, log_q = log_p.to(wide), log_q.to(wide)
    p = log_p.exp()
    # The log probabilities are spent here, so that their memory holds what is made of them.
    terms = log_p.sub_(log_q).mul_(p)
    values = terms.sum(-1)
    # 0 * inf, at a token that is ruled out, is to be 0. It is rare and the mask costs two passes, but asking an accelerator costs more.
    if terms.device.type != "cpu" or not bool(values.isfinite().all()):
        values = terms.masked_fill_(p == 0, 0.0).sum(-1)
    return values * temperature**2, log_q.exp_().sub_(p)


def softened(logits: Float[Tensor, "rows vocab"], temperature: float) -> Float[Tensor, "rows vocab"]:
    """Log probabilities at this temperature, in new memory, in float32 or wider."""
    wide = at_least_float32(logits)
    return (wide if temperature == 1 else wide / temperature).log_softmax(-1)


def negative_log_likelihood_with_slope(
    logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """`negative_log_likelihood` of each row and its gradient with respect to the logits: the distribution less 1 at the label."""
    log_q, index = softened(logits, 1.0), labels[:, None]
    values = -log_q.gather(-1, index).squeeze(-1)
    return values, log_q.exp_().scatter_add_(-1, index, log_q.new_full(index.shape, -1.0))
