"""The teacher's pass, stored and restored: what `align-ti cache` keeps of a batch, and the same as terms see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.roles import INSTRUCTION, TEACHER_ATTENTION, TEACHER_HIDDEN, VISUAL, model_inputs
from align_ti.data.teacher_cache import kept_rows
from align_ti.errors import BatchError
from align_ti.models.attention import Attention, AttentionRows
from align_ti.models.families import head
from align_ti.models.headonly import has_head_only
from align_ti.terms.readings import Passed, Reads, View, view
from align_ti.training.passes import Terms, first_pass, made_of, reading_attention, united


@torch.no_grad()
def outputs_to_cache(teacher: PreTrainedModel, batch: Mapping[str, Any], layer: int | None) -> list[dict[str, Tensor]]:
    """What a cache keeps of each sample of a batch, by one pass of the teacher.

    Args:
        teacher: the model to imitate, in eval mode.
        batch: what the teacher reads, with `labels` and `roles`.
        layer: the layer whose attention IVA reads; None keeps response rows alone.
    """
    of = view(teacher, batch)
    wanted = Reads() if layer is None else Reads.of(attention=[(layer, (INSTRUCTION,))])
    with reading_attention(of, wanted) as watch:
        reading = first_pass(of, None, wanted, drawn_from=False)
    assert reading is not None
    passed = made_of(of, (reading, None), watch)
    rows = kept_rows(batch["labels"].to(of.roles.device), of.roles, visual=layer is not None).to(passed.hidden.device)
    kept = [{TEACHER_HIDDEN: hidden[chosen]} for hidden, chosen in zip(passed.hidden, rows, strict=True)]
    if layer is not None:
        focus = passed.attention_at(layer, (INSTRUCTION,)).mean()
        for sample, alpha, roles in zip(kept, focus, of.roles, strict=True):
            sample[TEACHER_ATTENTION] = alpha[(roles == VISUAL).to(alpha.device)]
    return kept


def restored_pass(teacher: PreTrainedModel, batch: Mapping[str, Any], terms: Terms) -> Passed | None:
    """The teacher's pass as the batch holds it, or None where it holds none and the teacher is to run.

    Rows that were not kept are 0; no term that a cache serves gives them weight.

    Raises:
        BatchError: the batch holds no pass and the teacher has no backbone to run, or holds less than the terms read.
    """
    read = batch.get("teacher", batch)
    if TEACHER_HIDDEN not in read:
        if has_head_only(teacher):
            raise BatchError(
                "the teacher's head alone is loaded, but the batch holds nothing that the teacher made of it; batches of a dataset "
                "with a teacher cache are accepted; set its teacher_cache, or load the whole teacher."
            )
        return None
    for name, term in terms.items():
        if term.needs_teacher and not term.cacheable:
            raise BatchError(
                f"the batch holds what a teacher cache keeps, but objective.{name} asks the teacher more; KD and IVA are accepted; "
                f"leave it out (objective.{name}.weight: 0), or train without a teacher cache."
            )
    device = next(head(teacher).parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in read.items()}
    roles, with_visual = moved["roles"], TEACHER_ATTENTION in moved
    of = View(teacher, model_inputs(moved), roles)
    rows = kept_rows(moved["labels"], roles, visual=with_visual)
    hidden = spread(moved[TEACHER_HIDDEN], rows)
    attention: dict[AttentionRows, Attention] = {}
    for wanted in united(term.reads_of_teacher(teacher) for term in terms.values()).attention:
        if not with_visual or wanted.roles != (INSTRUCTION,):
            raise BatchError(
                "the batch holds a teacher's response rows alone, but a term reads its attention; a cache with IVA's attention is "
                "accepted; make it with objective.iva.weight above 0, or leave the term out (objective.iva.weight: 0)."
            )
        alpha = spread(moved[TEACHER_ATTENTION], roles == VISUAL)
        # One row that is the mean already.
        one = torch.zeros(len(alpha), 1, dtype=torch.long, device=device)
        attention[wanted] = Attention(alpha[:, None], one, torch.ones_like(one, dtype=torch.bool))
    return Passed(of, hidden, attention=attention)


def spread(values: Tensor, places: Tensor) -> Tensor:
    """Values at the marked places of a batch, in order, and 0 elsewhere.

    Raises:
        BatchError: there are more or fewer of them than places.
    """
    if len(values) != int(places.sum()):
        raise BatchError(
            f"the batch has {len(values)} cached row(s) of the teacher, but its labels and roles select {int(places.sum())}: they "
            "changed after the cache was read; make the batch from the dataset, and leave labels and roles as they are."
        )
    out = values.new_zeros(*places.shape, *values.shape[1:])
    out[places] = values
    return out
