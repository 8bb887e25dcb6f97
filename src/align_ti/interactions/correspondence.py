"""Where the rows of a student stand in the teacher's own sequence, when each model has a processor of its own.

Both sequences hold the same responses; what stands around them (template, image tokens) may differ. A row of the student is compared
with the teacher's row of the same response token, or of the same visual token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align_ti.data.roles import RESPONSE, VISUAL
from align_ti.errors import BatchError

Grid = tuple[int, int]
"""Rows and columns of visual tokens."""


@dataclass(frozen=True, slots=True)
class Correspondence:
    """The teacher's position of each of the student's positions that is compared; 0 where none is.

    `visual` and `teacher_visual` mark visual tokens, [batch, seq] each. `mixing` holds, for each sample, what turns the teacher's
    visual tokens into the student's where their numbers differ: [visual, teacher_visual], a weighted mean over the part of the
    image that a token covers. None: one by one.
    """

    places: Int[Tensor, "batch seq"]
    visual: Tensor
    teacher_visual: Tensor
    mixing: list[Tensor] | None = None

    def to_student(
        self, values: Float[Tensor, "batch teacher_seq ..."], *, sums: bool = False
    ) -> Float[Tensor, "batch seq ..."]:
        """Values at the teacher's positions, laid out as the student's sequence.

        Where visual tokens are mixed, the student's hold means of the teacher's, or, with `sums`, shares of them, so that an
        image's total stays what it is: attention is shared out, hidden states are not.
        """
        places = self.places.to(values.device)
        sample = torch.arange(len(places), device=values.device)[:, None]
        moved = values[sample, places]
        visual, teacher_visual = self.visual.to(values.device), self.teacher_visual.to(values.device)
        for index, weights in enumerate(self.mixing or ()):
            seen = values[index][teacher_visual[index]]
            if len(seen):
                mixed = weights / weights.sum(0) if sums else weights
                moved[index, visual[index]] = torch.tensordot(mixed.to(seen), seen, dims=1)
        return moved


def correspond(
    ids: Int[Tensor, "batch seq"],
    roles: Int[Tensor, "batch seq"],
    teacher_ids: Int[Tensor, "batch teacher_seq"],
    teacher_roles: Int[Tensor, "batch teacher_seq"],
    *,
    with_visual: bool,
) -> Correspondence:
    """The places of response rows, of the rows that predict them, and, if asked for, of visual rows where their numbers agree.

    Raises:
        BatchError: the two sequences hold different responses.
    """
    places = torch.zeros_like(ids)
    ours, theirs = (of == RESPONSE for of in (roles, teacher_roles))
    for sample in range(len(ids)):
        mine, its = (part[sample].nonzero().squeeze(-1) for part in (ours, theirs))
        words, other = ids[sample, mine], teacher_ids[sample, its]
        if not torch.equal(words, other):
            raise BatchError(
                f"sample {sample}: the response is {words[:8].tolist()}... to the student and {other[:8].tolist()}... to the teacher; "
                "both templates must give the same response tokens, end of turn included; choose models of one tokenizer."
            )
        places[sample, mine - 1], places[sample, mine] = its - 1, its
        if not torch.equal(places[sample, mine - 1], its - 1):
            raise BatchError(f"sample {sample}: the turns of student and teacher end at different response tokens.")
        if with_visual:
            seen, shown = (of[sample].eq(VISUAL).nonzero().squeeze(-1) for of in (roles, teacher_roles))
            if len(seen) == len(shown):
                places[sample, seen] = shown
    return Correspondence(places, roles == VISUAL, teacher_roles == VISUAL)


def resampled(
    found: Correspondence, grids: Sequence[Sequence[Grid]], teacher_grids: Sequence[Sequence[Grid]]
) -> Correspondence:
    """With the teacher's visual tokens resampled to the student's grids, image by image.

    Raises:
        BatchError: the two see different numbers of images or tiles.
    """
    mixing = []
    for sample, (ours, theirs) in enumerate(zip(grids, teacher_grids, strict=True)):
        if len(ours) != len(theirs):
            raise BatchError(
                f"sample {sample}: the student reads {len(ours)} image(s) or tiles, the teacher {len(theirs)}; equal numbers can be "
                "resampled; leave out the terms that resample, such as IVA (objective.iva.weight: 0)."
            )
        blocks = [
            torch.kron(*(overlap(*sizes) for sizes in zip(one, other, strict=True)))
            for one, other in zip(ours, theirs, strict=True)
        ]
        mixing.append(torch.block_diag(*blocks) if blocks else torch.zeros(0, 0, dtype=torch.float64))
    return Correspondence(found.places, found.visual, found.teacher_visual, mixing)


def overlap(cells: int, teacher_cells: int) -> Float[Tensor, "cells teacher_cells"]:
    """The share of each of `cells` equal parts of a line that each of `teacher_cells` equal parts covers; rows sum to 1."""
    ends, others = (torch.arange(count + 1, dtype=torch.float64) / count for count in (cells, teacher_cells))
    common = torch.minimum(ends[1:, None], others[1:]) - torch.maximum(ends[:-1, None], others[:-1])
    return common.clamp(min=0) * cells


def check_visual(
    roles: Int[Tensor, "batch seq"],
    teacher_roles: Int[Tensor, "batch teacher_seq"],
    term: str = "iva",
    *,
    resample: bool = True,
) -> None:
    """Refuse different numbers of visual tokens, for which no row of the teacher is the student's.

    Raises:
        BatchError: the first sample is named.
    """
    ours, theirs = ((of == VISUAL).sum(-1) for of in (roles, teacher_roles))
    wrong = (ours != theirs).nonzero()
    if len(wrong):
        sample = int(wrong[0])
        raise BatchError(
            f"sample {sample}: {int(ours[sample])} visual tokens for the student, {int(theirs[sample])} for the teacher; "
            f"objective.{term} compares equal numbers; {ways_out(term, resample=resample)}"
        )


def check_grids(
    grids: Sequence[Sequence[Grid]],
    teacher_grids: Sequence[Sequence[Grid]],
    term: str = "iva",
    *,
    resample: bool = True,
) -> None:
    """Refuse equal numbers of visual tokens on different grids: one by one they would show different parts of the image.

    Raises:
        BatchError: the first sample is named.
    """
    for sample, (ours, theirs) in enumerate(zip(grids, teacher_grids, strict=True)):
        if list(ours) != list(theirs):
            raise BatchError(
                f"sample {sample}: the student's visual tokens form grids {list(ours)} (rows, columns), the teacher's {list(theirs)}; "
                f"objective.{term} compares equal grids; {ways_out(term, resample=resample)}"
            )


def ways_out(term: str, *, resample: bool) -> str:
    """What to do about visual tokens that cannot be compared one by one; not every term can resample them."""
    leave = f"leave the term out (objective.{term}.weight: 0)."
    if not resample:
        return leave
    return f"set objective.{term}.resample: true to resample the teacher's on the image grid, or {leave}"
