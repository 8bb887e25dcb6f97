"""Likelihood and divergences as plain functions of logits, for evaluation and for use by hand."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align_ti.losses.divergences.base import Divergence
from align_ti.losses.divergences.forward_kl import ForwardKl
from align_ti.losses.measures import Softened, softened


def divergence(
    student: Float[Tensor, "rows vocab"],
    teacher: Float[Tensor, "rows vocab"],
    between: Divergence,
    temperature: float = 1.0,
) -> Float[Tensor, " rows"]:
    """The divergence of each row in nats, both softened by the temperature, times the temperature squared."""
    labels = torch.zeros(len(student), dtype=torch.long, device=student.device)
    return Softened(between, temperature)(student, teacher, labels, slice(None), slope=False)[0]


def forward_kl(
    student: Float[Tensor, "rows vocab"], teacher: Float[Tensor, "rows vocab"], temperature: float = 1.0
) -> Float[Tensor, " rows"]:
    """KL(teacher || student) of each row in nats, both softened by the temperature, times the temperature squared.

    Source: Hinton et al. (arXiv:1503.02531); Align-TI (arXiv:2602.09483), every divergence of its objective.
    """
    return divergence(student, teacher, ForwardKl(), temperature)


def negative_log_likelihood(
    logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """-log p(label) of each row in nats.

    Source: Align-TI (arXiv:2602.09483), the SFT term.
    """
    return -softened(logits).gather(-1, labels[:, None]).squeeze(-1)
