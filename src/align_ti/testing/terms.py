"""The rules of a term."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.config import Objective
from align_ti.errors import BatchError
from align_ti.registry import names
from align_ti.terms.base import Term
from align_ti.terms.plain import Sample
from align_ti.testing import tiny
from align_ti.testing.rules import holds
from align_ti.training.objective import DistillationOutput, distillation_loss

Batch = dict[str, Tensor]

Plain = Callable[[Sample], float | None]
"""A term's value on one sample, written down once more: the plain twin."""

VALUE, GRADIENT = 1e-6, 1e-5
"""How far values and gradients in float64 may be apart, relative: parts of a model compute in float32 whatever its precision."""

HALF = 0.05
"""How far a term of bfloat16 models may be from the same models' in float64, relative to the term or 0.01, whichever is larger. A
bfloat16 hidden state has two to three digits, and a term adds up many."""


def check_term(term: Term, plain: Plain | None = None, *, fixed_parts: bool = False) -> None:
    """Holds a term to the rules, on tiny random models in float64 and batches of every composition.

    Its value on one sample equals the plain twin; it is 0 where the student equals the teacher; its gradient is that of finite
    differences, and flows into the student alone; padding on either side, gradient checkpointing, and the cut of a step into batches
    change nothing; where the teacher reads a sequence of its own its rows are found, or it is refused by name; bfloat16 models give it
    to a stated error; and a recipe holds it.

    Args:
        term: the term, with a layer chosen if it needs one.
        plain: its plain twin; by default the term's own `plain`, if it has one.
        fixed_parts: the term holds a part of itself fixed on purpose (as `adaptive_kl` does its weight), so that its gradient is not
            that of finite differences.

    Raises:
        AssertionError: the first rule that does not hold, with the numbers.
    """
    holds(term.name in names("term"), f"no recipe knows the term {term.name!r}; put @align_ti.register above its class")
    # A schedule changes options from step to step; the rules are those of a step.
    term = term.without_schedule()
    objective = Objective.only(chunk_rows=None, **{term.name: term})
    student, teacher = tiny.model(1), tiny.model(2, hidden=48, layers=3)
    for name in tiny.COMPOSITIONS:
        check_composition(objective, term, student, teacher, name, plain or term.plain)
    if not fixed_parts:
        check_finite_differences(objective, term)
    check_checkpointing(objective, term, teacher)
    check_own_sequence(objective, term, student, teacher)
    check_half_precision(objective, term)
    again = Objective.model_validate(objective.model_dump(mode="json"))
    holds(again == objective, f"{term.name} reads back from a recipe as {again!r}, not {objective!r}")


def check_composition(
    objective: Objective, term: Term, student: PreTrainedModel, teacher: PreTrainedModel, name: str, plain: Plain
) -> None:
    """The rules that every batch of one composition shows."""
    batch = tiny.batch(tiny.COMPOSITIONS[name], seed=3)
    whole, gradient = value_and_gradient(objective, student, teacher, batch)
    where = f"{term.name} on {name!r}"
    holds(bool(whole.loss.isfinite()), f"{where} is {float(whole.loss)}")
    for side, extra in (("right", 5), ("left", 3)):
        moved = value_and_gradient(objective, student, teacher, tiny.batch(tiny.COMPOSITIONS[name], 3, side, extra))
        same(moved, (whole, gradient), f"{where} with padding on the {side}")
    check_cut_steps(objective, student, teacher, batch, (whole, gradient), where)
    if term.needs_teacher:
        twin = copy.deepcopy(student)
        value = float(run(objective, student, twin, batch).terms[term.name])
        holds(abs(value) < 1e-9, f"{where} is {value} where the student equals the teacher; 0 is expected")
        holds(
            all(parameter.grad is None for parameter in teacher.parameters()),
            f"{where} has a gradient into the teacher",
        )
    for index, one in enumerate(samples_of(batch)):
        if int((one["roles"] == tiny.RESPONSE).sum()):
            check_plain(objective, term, student, teacher, one, plain, f"{where}, sample {index}")


def check_plain(
    objective: Objective,
    term: Term,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    one: Batch,
    plain: Plain,
    where: str,
) -> None:
    """The value on one sample is that of the plain twin, if there is one."""
    candidates = {}
    given = None
    if term.candidate_options is not None:
        given = tiny.candidates(one, seed=5)
        left_out = (tiny.END, tiny.IMAGE)
        steps = (one["roles"][0] == tiny.RESPONSE).nonzero().flatten().tolist()
        candidates = {step: [t for t in given[0, step].tolist() if t not in left_out] for step in steps}
        candidates = {step: tried for step, tried in candidates.items() if tried}
        if not candidates:
            return
    expected = plain(
        Sample(
            {"student": student, "teacher": teacher}, dict.fromkeys(("student", "teacher"), one), candidates=candidates
        )
    )
    if expected is None:
        return
    found = float(run(objective, student, teacher, one, given).terms[term.name])
    apart = abs(found - expected)
    holds(apart <= 1e-9 + VALUE * abs(expected), f"{where} is {found} by the loss and {expected} by its plain twin")


def check_cut_steps(
    objective: Objective,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    whole: tuple[DistillationOutput, dict[str, Tensor]],
    where: str,
) -> None:
    """Samples one by one, divided by the masses of the whole step, give the whole batch's loss and gradient."""
    student.zero_grad(set_to_none=True)
    total = 0.0
    tried = tiny.candidates(batch, seed=5)
    for index, one in enumerate(samples_of(batch, padding=True)):
        out = distillation_loss(
            student, teacher, one, objective, tried[index : index + 1], step_masses=lambda _: whole[0].masses
        )
        if out.loss.requires_grad:
            out.loss.backward()
        total += float(out.loss)
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    holds(
        abs(total - float(whole[0].loss)) <= 1e-9 + VALUE * abs(total),
        f"{where} is {float(whole[0].loss)} as one batch and {total} as batches of one sample",
    )
    same_gradients(gradients, whole[1], f"{where} as batches of one sample")


DIRECTIONS, STEP, SLACK = 3, 3e-4, 0.1
"""Random directions that the gradient is tried along; the length of a step, large beside the last digit of the student's norms, which
compute in float32, and small beside the loss's bends; and how far the slopes may be apart, in units of a random direction's own slope
(the gradient's norm over the root of the number of parameters). Built-in terms are within 0.01; a part without gradient is off by 1."""


def check_finite_differences(objective: Objective, term: Term) -> None:
    """The loss changes along random directions of all parameters as its gradient says, so that no part of it is lost."""
    student, teacher = tiny.model(1), tiny.model(2, hidden=48, layers=3)
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"], seed=3)
    _, gradient = value_and_gradient(objective, student, teacher, batch)
    norm = float(sum(grad.square().sum() for grad in gradient.values())) ** 0.5
    holds(norm > 0, f"{term.name} has no gradient into the student")
    parameters = dict(student.named_parameters())
    usual = norm / sum(parameter.numel() for parameter in parameters.values()) ** 0.5
    for seed in range(DIRECTIONS):
        random = torch.Generator().manual_seed(seed)
        along = {name: torch.randn(p.shape, generator=random, dtype=p.dtype) for name, p in parameters.items()}
        length = float(sum(part.square().sum() for part in along.values())) ** 0.5
        expected = sum(float((grad * along[name]).sum()) for name, grad in gradient.items()) / length
        ahead, back = (moved_loss(objective, student, teacher, batch, along, side * STEP / length) for side in (1, -1))
        measured = (ahead - back) / (2 * STEP)
        holds(
            abs(measured - expected) <= SLACK * usual,
            f"{term.name} changes by {measured:.6g} along a random direction by finite differences, by {expected:.6g} as its gradient "
            f"says; {SLACK:.0%} of {usual:.3g} is accepted; a part of it has no gradient, or is held fixed on purpose "
            "(fixed_parts=True)",
        )


def moved_loss(
    objective: Objective,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    along: Mapping[str, Tensor],
    step: float,
) -> float:
    """The loss of the student a step away; afterwards it is where it was."""
    parameters = dict(student.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(along[name], alpha=step)
        loss = float(run(objective, student, teacher, batch).loss)
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    return loss


def check_checkpointing(objective: Objective, term: Term, teacher: PreTrainedModel) -> None:
    """Gradient checkpointing changes neither value nor gradient."""
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"], seed=3)
    plainly = value_and_gradient(objective, tiny.model(1).train(), teacher, batch)
    student = tiny.model(1)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    same(value_and_gradient(objective, student.train(), teacher, batch), plainly, f"{term.name} under checkpointing")


def check_own_sequence(objective: Objective, term: Term, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """A teacher that reads another template around the same images and words gives a number, or a refusal that names the term."""
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"], seed=3)
    own = {
        name: torch.nn.functional.pad(value, (1, 0), value=fill(name))
        for name, value in batch.items()
        if value.dim() == 2
    }
    own["attention_mask"][:, 0] = 1
    both: dict[str, Any] = {**batch, "teacher": {**batch, **own}}
    try:
        out = run(objective, student, teacher, both)
    except BatchError as refused:
        holds(
            f"objective.{term.name}" in str(refused),
            f"{term.name} refuses a teacher with a sequence of its own without its name: {refused}",
        )
        return
    holds(bool(out.loss.isfinite()), f"{term.name} is {float(out.loss)} for a teacher with a sequence of its own")
    # The same sequence behind masked padding is a sequence of its own with the same numbers: rows have to be found, not counted.
    pushed = {
        "teacher": {**batch, **{name: pad_left(name, value) for name, value in batch.items() if value.dim() == 2}}
    }
    alone, found = (float(run(objective, student, teacher, of).loss.detach()) for of in (batch, {**batch, **pushed}))
    holds(
        abs(alone - found) <= 1e-9 + VALUE * abs(alone),
        f"{term.name} is {alone}, but {found} where the same sequence of the teacher stands behind padding",
    )
    if term.needs_teacher and term.candidate_options is None:
        sample = {name: value[:1] for name, value in both.items() if isinstance(value, Tensor)}
        sample["pixel_values"] = both["pixel_values"][:1]
        theirs = {name: value[:1] for name, value in both["teacher"].items()}
        value = float(run(objective, student, teacher, {**sample, "teacher": theirs}).terms[term.name])
        expected = term.plain(Sample({"student": student, "teacher": teacher}, {"student": sample, "teacher": theirs}))
        holds(
            expected is None or abs(value - expected) <= 1e-9 + VALUE * abs(expected),
            f"{term.name} is {value} for a teacher with a sequence of its own, {expected} by its plain twin",
        )


def pad_left(name: str, value: Tensor) -> Tensor:
    """Two tokens of padding in front."""
    return torch.nn.functional.pad(value, (2, 0), value={"input_ids": tiny.PAD, "labels": -100}.get(name, 0))


def fill(name: str) -> int:
    """A template token: neither image nor words."""
    return {"input_ids": 7, "labels": -100}.get(name, 0)


def check_half_precision(objective: Objective, term: Term) -> None:
    """bfloat16 models give float64's value of the same weights to a stated error, and a finite gradient."""
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"], seed=3)
    low = [tiny.model(1).bfloat16(), tiny.model(2, hidden=48, layers=3).bfloat16()]
    exact = [copy.deepcopy(model).double() for model in low]
    halved = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    widened = {name: value.double() if value.is_floating_point() else value for name, value in halved.items()}
    out, gradient = value_and_gradient(objective, low[0], low[1], halved)
    expected = float(run(objective, exact[0], exact[1], widened).terms[term.name])
    apart = abs(float(out.terms[term.name]) - expected)
    holds(
        apart <= HALF * max(abs(expected), 0.01),
        f"{term.name} of bfloat16 models is {float(out.terms[term.name])}, {expected} in float64; {HALF:.0%} is accepted",
    )
    holds(
        all(bool(grad.isfinite().all()) for grad in gradient.values()),
        f"{term.name} of bfloat16 models has no finite gradient",
    )


# --- running ----------------------------------------------------------------------------------------------------------


def run(
    objective: Objective,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Mapping[str, Any],
    candidates: Tensor | None = None,
) -> DistillationOutput:
    """The loss of a batch, with fixed candidates."""
    if candidates is None:
        candidates = placed_candidates(batch)
    return distillation_loss(student, teacher, batch, objective, candidates)


def placed_candidates(batch: Mapping[str, Any]) -> Tensor:
    """The same candidates for the same tokens, wherever padding has moved them."""
    real = batch["attention_mask"].bool()
    tried = torch.zeros((*real.shape, 3), dtype=torch.long)
    length = int(real.sum(-1).max())
    shortest: dict[str, Tensor] = {"input_ids": torch.zeros(len(real), length, dtype=torch.long)}
    for row, (ids, kept) in enumerate(zip(batch["input_ids"], real, strict=True)):
        shortest["input_ids"][row, : int(kept.sum())] = ids[kept]
    drawn = tiny.candidates(shortest, seed=5)
    for row, kept in enumerate(real):
        tried[row, kept] = drawn[row, : int(kept.sum())]
    return tried


def value_and_gradient(
    objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Any]
) -> tuple[DistillationOutput, dict[str, Tensor]]:
    """The loss, and its gradient in every parameter that has one."""
    student.zero_grad(set_to_none=True)
    out = run(objective, student, teacher, batch)
    if out.loss.requires_grad:
        out.loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return out, found


def samples_of(batch: Batch, padding: bool = False) -> list[Batch]:
    """The batch's samples alone, without their padding unless it is asked for, each with its own images."""
    counts = [int((ids == tiny.IMAGE).sum()) // tiny.VISUAL_TOKENS for ids in batch["input_ids"]]
    found = []
    for index, count in enumerate(counts):
        real = (
            torch.ones_like(batch["attention_mask"][index]).bool() if padding else batch["attention_mask"][index].bool()
        )
        one = {name: value[index][real][None] for name, value in batch.items() if value.dim() == 2}
        if count:
            one["pixel_values"] = batch["pixel_values"][sum(counts[:index]) : sum(counts[: index + 1])]
        found.append(one)
    return found


def same(
    found: tuple[DistillationOutput, dict[str, Tensor]],
    expected: tuple[DistillationOutput, dict[str, Tensor]],
    what: str,
) -> None:
    """Goes on if two losses and their gradients are equal."""
    one, other = float(found[0].loss), float(expected[0].loss)
    holds(abs(one - other) <= 1e-9 + VALUE * abs(other), f"{what} is {one}, without it {other}")
    same_gradients(found[1], expected[1], what)


def same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Goes on if two gradients are equal in every parameter, beside the norm of the whole."""
    whole = float(sum(gradient.square().sum() for gradient in expected.values())) ** 0.5
    for name in {**found, **expected}:
        one, other = (of.get(name) for of in (found, expected))
        zero = torch.zeros(())
        apart = float(((zero if one is None else one) - (zero if other is None else other)).norm())
        holds(
            apart <= GRADIENT * (0.0 if other is None else float(other.norm())) + GRADIENT * whole + 1e-12,
            f"the gradient of {what} differs in {name} by {apart:.3g} of {whole:.3g}",
        )
