"""Which of the teacher's visual tokens is which of the student's, where their numbers differ: by what they say, not by where
they are."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

COMPARED_LOGITS = 2**22
"""Logits of one model that exist at a time while distances are added up."""


@torch.no_grad()
def match_rows(
    student: Float[Tensor, "rows hidden"],
    student_head: nn.Linear,
    teacher: Float[Tensor, "teacher_rows teacher_hidden"],
    teacher_head: nn.Linear,
    shared: slice | Int[Tensor, " shared"],
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Pairs of rows of the two models, one to one, so that the sum of L1 distances between their logits is smallest.

    There are as many pairs as the model with fewer rows has rows; the others stay alone. Distances are added up over parts of the
    vocabulary, so logits in full never exist.

    Source: EM-KD (arXiv:2511.21106), its matching of vision tokens.
    """
    device = student.device
    cost = torch.zeros(len(student), len(teacher), dtype=torch.float64, device=device)
    heads = []
    for of in (student_head, teacher_head):
        chosen = shared if isinstance(shared, slice) else shared.to(of.weight.device)
        heads.append((of.weight[chosen], None if of.bias is None else of.bias[chosen]))
    tokens = max(1, COMPARED_LOGITS // max(len(student), len(teacher), 1))
    for start in range(0, len(heads[0][0]), tokens):
        part = slice(start, start + tokens)
        ours, theirs = (
            nn.functional.linear(of.to(wide), weight[part].to(wide), None if bias is None else bias[part].to(wide))
            for of, (weight, bias) in zip((student, teacher), heads, strict=True)
            if (wide := torch.promote_types(of.dtype, torch.float32))
        )
        common = torch.promote_types(ours.dtype, theirs.dtype)
        cost += torch.cdist(ours.to(common), theirs.to(device, common), p=1)
    rows, others = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(rows, device=device), torch.as_tensor(others, device=device)
