"""Supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from align_ti.data.batch import Tokens
from align_ti.interactions.transitions import Transitions
from align_ti.losses.measures import NegativeLogLikelihood
from align_ti.terms.base import Term, WeightedRows
from align_ti.terms.readings import Readings

if TYPE_CHECKING:
    from align_ti.terms.plain import Sample


class Sft(Term):
    """Supervised fine-tuning: the negative log-likelihood of the response tokens.

    Tokens that the student generated itself (`data.on_policy`) are left out: they are no supervision.

    Source: Align-TI (arXiv:2602.09483), L_sft.
    """

    name: ClassVar[str] = "sft"
    needs_teacher: ClassVar[bool] = False
    unit: ClassVar[str] = "nats"
    fix: ClassVar[str] = (
        "check that there are responses (roles) and that parameters which influence them are trained (parts)"
    )

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """Response tokens."""
        return supervised(tokens).sum()

    def total(self, readings: Readings) -> WeightedRows:
        """The row before each response token has weight 1."""
        return WeightedRows(supervised(readings.tokens).float(), NegativeLogLikelihood())

    def plain(self, sample: Sample) -> float:
        """Mean cross-entropy of the response tokens, each predicted by the row before it."""
        ids, roles = sample.ids("student"), sample.roles("student")
        steps = [step for step in range(1, len(ids)) if roles[step] == sample.RESPONSE]
        rows = torch.stack([sample.logits("student", shared=False)[step - 1] for step in steps])
        return float(torch.nn.functional.cross_entropy(rows, ids[steps]))


def supervised(tokens: Tokens) -> Bool[Tensor, "batch seq"]:
    """The rows that predict a response token that somebody else than the student wrote."""
    if tokens.student_written is None:
        return tokens.predicts
    return tokens.predicts & ~torch.nn.functional.pad(tokens.student_written[:, 1:], (0, 1), value=False)
