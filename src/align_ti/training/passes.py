"""The forward passes of a step: each model reads what the terms need of it, once.

teacher and student read the gold tokens -> candidates are drawn -> both read them over the kept caches
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.data.roles import INSTRUCTION, VISUAL
from align_ti.errors import BatchError, ConfigError
from align_ti.interactions.candidates import CandidateOptions, Source, draw_candidates, plan_candidates
from align_ti.interactions.correspondence import Correspondence, check_grids, check_visual, correspond, resampled
from align_ti.interactions.transitions import Candidates
from align_ti.interactions.visual import aligned_samples
from align_ti.models import families
from align_ti.models.attention import AttentionRows, Watch, capturing, watched_by
from align_ti.models.branches import Branches
from align_ti.models.continuation import Reading, continue_branches, read, read_packed
from align_ti.models.pairing import Pairing
from align_ti.phases import phase
from align_ti.terms.base import Term, refuse_own_sequence
from align_ti.terms.readings import Passed, Readings, Reads, View, view

Terms = Mapping[str, Term]
"""The terms that have weight, by name."""


def candidate_options(terms: Terms) -> CandidateOptions | None:
    """How candidates are drawn, if a term compares rows of them.

    Raises:
        ConfigError: two terms do.
    """
    found = {name: term.candidate_options for name, term in terms.items() if term.candidate_options is not None}
    if len(found) > 1:
        raise ConfigError(
            f"the terms {' and '.join(found)} each draw candidates; one such term at a time is accepted; give all but one a "
            "weight of 0."
        )
    return next(iter(found.values()), None)


def run_passes(
    ours: View,
    theirs: View | None,
    terms: Terms,
    tokens: Tokens,
    candidates: Candidates | Int[Tensor, "batch seq candidates"] | None,
    generator: torch.Generator | None,
    pairing: Pairing,
    found: Correspondence | None,
    *,
    in_step: bool = False,
) -> Readings:
    """Everything that the models compute for the terms.

    With `in_step` each model makes the same passes whatever the batch holds: other processes may wait for this one in them.
    """
    options = candidate_options(terms)
    source = None if options is None or candidates is not None else options.source
    ours_wanted = united(term.reads_of_student(ours.model) for term in terms.values())
    theirs_wanted = (
        Reads() if theirs is None else united(term.reads_of_teacher(theirs.model) for term in terms.values())
    )
    plan, teacher_first, teacher_pass, unweighted = None, None, None, False
    with reading_attention(ours, ours_wanted) as our_watch, reading_attention(theirs, theirs_wanted) as their_watch:
        with phase("student forward"):
            student_first = first_pass(ours, options, ours_wanted, drawn_from=source == "student")
        if theirs is not None:
            with torch.no_grad(), phase("teacher forward"):
                teacher_first = first_pass(theirs, options, theirs_wanted, drawn_from=source == "teacher")
        if options is not None:
            with phase("candidates"):
                if candidates is None:
                    drawn_from = {"student": (ours, student_first), "teacher": (theirs, teacher_first), "gold": None}
                    candidates = draw_candidates(
                        as_source(drawn_from[options.source]),
                        ours.model,
                        tokens.ids,
                        tokens.response,
                        options,
                        generator,
                        pairing,
                    )
                plan = plan_candidates(
                    ours.model, {"roles": tokens.roles, "input_ids": tokens.ids}, candidates, options, pairing
                )
                if unweighted := in_step and not plan.branches:
                    # A branch of weight 0, so that this process runs the same passes as the others, which wait for it.
                    plan = replace(plan, branches=one_branch(ours), branch_weights=plan.branch_weights.new_zeros(1))
        with phase(second_phase("student", student_first)):
            branches = None if plan is None else plan.branches
            student_pass = second_pass(ours, student_first, ours_wanted, branches)
        if theirs is not None:
            if plan is not None:
                branches = one_branch(theirs) if unweighted else branches_for(theirs, plan.branches, found)
            with torch.no_grad(), phase(second_phase("teacher", teacher_first)):
                teacher_pass = second_pass(theirs, teacher_first, theirs_wanted, branches)
    return Readings(
        tokens,
        made_of(ours, student_pass, our_watch),
        None if theirs is None or teacher_pass is None else made_of(theirs, teacher_pass, their_watch, found),
        plan,
        pairing,
    )


def one_branch(of: View) -> Branches:
    """One branch, at the last token of the first sample."""
    place = of.real[0].nonzero()[-1]
    return Branches(of.inputs["input_ids"][0, place], place, (1, *(0 for _ in of.roles[1:])))


def united(wanted: Any) -> Reads:
    """All that several terms read of a model."""
    return reduce(or_, wanted, Reads())


def made_of(
    of: View, made: tuple[Reading, Tensor | None], watch: Watch | None, found: Correspondence | None = None
) -> Passed:
    """The model's pass as terms see it."""
    reading, branches = made
    length = of.roles.shape[1]
    attention = {
        wanted: rows.of_keys(length, of.roles.device) for wanted, rows in ({} if watch is None else watch.found).items()
    }
    return Passed(of, reading.hidden, branches, reading.layers, attention, found)


def reading_attention(of: View | None, wanted: Reads) -> AbstractContextManager[Watch | None]:
    """Reads the attention that terms want of a model, if they want any."""
    if of is None or not wanted.attention:
        return nullcontext()
    return capturing(of.model, {rows: marked(of, rows) for rows in sorted(wanted.attention)})


def marked(of: View, rows: AttentionRows) -> Tensor:
    """Where the queries stand whose attention is read: real tokens of the roles."""
    return torch.isin(of.roles, torch.tensor(rows.roles, device=of.roles.device)) & of.real


def branches_for(theirs: View, branches: Branches, found: Correspondence | None) -> Branches:
    """The branches at their places in the teacher's sequence, on its device."""
    replaces = branches.replaces if found is None else found.places[branches.samples, branches.replaces]
    device = theirs.roles.device
    return Branches(branches.tokens.to(device), replaces.to(device), branches.counts)


def first_pass(of: View, options: CandidateOptions | None, wanted: Reads, *, drawn_from: bool) -> Reading | None:
    """The pass before candidates are known.

    In the packed form the gold tokens are read together with the branches, so here they are read only if candidates are drawn from
    this model, and then without gradient.
    """
    if options is None or not options.is_packed(of.model):
        return read(of.model, of.inputs, keep_cache=options is not None, layers=wanted.layers)
    if not drawn_from:
        return None
    # The pass that counts comes later: attention is read there, with its gradient.
    with torch.no_grad(), phase("candidates"), watched_by():
        return read(of.model, of.inputs, keep_cache=False)


def second_pass(
    of: View, first: Reading | None, wanted: Reads, branches: Branches | None
) -> tuple[Reading, Tensor | None]:
    """Runs the pass that remains, over the first pass's cache or packed; gives what it made of gold tokens and of branches."""
    if branches is not None and (first is None or first.cache is None):
        return read_packed(of.model, of.inputs, branches, wanted.layers)
    assert first is not None
    if not branches:
        return first, None
    return first, continue_branches(of.model, of.inputs, first, branches)


def second_phase(whose: str, first: Reading | None) -> str:
    """The name of a model's second pass as a phase: in the packed form it is the forward pass itself."""
    return f"{whose} forward" if first is None or first.cache is None else f"{whose} second pass"


def as_source(drawn_from: tuple[View | None, Reading | None] | None) -> Source | None:
    """What candidates are drawn from."""
    if drawn_from is None:
        return None
    of, reading = drawn_from
    assert of is not None
    assert reading is not None
    return Source(of.model, of.roles, reading.hidden)


def candidates_for(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Mapping[str, Any],
    options: CandidateOptions,
    generator: torch.Generator | None = None,
    pairing: Pairing | None = None,
) -> Candidates:
    """The candidates of a batch, drawn beforehand by a pass without gradient.

    For gradient accumulation: the mass of a term with candidates over the whole step is known only when every batch of it has its
    candidates.
    """
    ours, drawn_from = view(student, batch), None
    if options.source != "gold":
        of = ours
        if options.source == "teacher":
            assert teacher is not None
            of = view(teacher, batch.get("teacher", batch))
        with torch.no_grad():
            drawn_from = Source(of.model, of.roles, read(of.model, of.inputs, keep_cache=False).hidden)
    tokens = Tokens.of(batch, ours.roles.device)
    pairing = Pairing() if pairing is None else pairing
    return draw_candidates(drawn_from, student, tokens.ids, tokens.response, options, generator, pairing)


# --- where the student's rows stand in the teacher's own sequence -----------------------------------------------------


def places_of(ours: View, theirs: View, terms: Terms) -> Correspondence:
    """Where the student's rows stand in the teacher's own sequence, as the terms compare them.

    Raises:
        BatchError: different responses, visual tokens that cannot be compared, or a term that needs one sequence.
    """
    for name, term in terms.items():
        if term.one_sequence:
            raise refuse_own_sequence(name)
    visual = {name: term.visual_rows for name, term in terms.items() if term.visual_rows != "none"}
    ids, roles = (of.to(ours.roles.device) for of in (theirs.inputs["input_ids"], theirs.roles))
    found = correspond(ours.inputs["input_ids"], ours.roles, ids, roles, with_visual=bool(visual))
    if not visual:
        return found
    equal = next((name for name, how in visual.items() if how == "equal"), None)
    if "iva" in visual:
        check_order(ours.roles, roles)
    if equal is not None:
        check_visual(ours.roles, roles, equal, resample=hasattr(terms[equal], "resample"))
    if equal is None:
        return resampled(found, *(grids_of(of) for of in (ours, theirs)))
    try:
        one, other = grids_of(ours), grids_of(theirs)
    except BatchError:
        # Neither config nor inputs tell the grids, so equal numbers are all that can be asked for.
        return found
    # Where one term resamples and another takes them one by one, the grids are equal, and both come to the same rows.
    check_grids(one, other, equal, resample=hasattr(terms[equal], "resample"))
    return found


def check_order(roles: Int[Tensor, "batch seq"], teacher_roles: Int[Tensor, "batch teacher_seq"]) -> None:
    """Refuse samples in which only one model's instruction comes after the image.

    Raises:
        BatchError: the first sample is named.
    """
    seen, shown = (aligned_samples(of == VISUAL, of == INSTRUCTION) for of in (roles, teacher_roles))
    if not torch.equal(seen, shown):
        sample = int((seen != shown).nonzero()[0])
        raise BatchError(
            f"sample {sample}: the image stands before the instruction for one model and behind it for the other, where attention "
            "cannot look at it; choose templates of one order or leave IVA out (objective.iva.weight: 0)."
        )


def grids_of(of: View) -> list[list[tuple[int, int]]]:
    """The grids of visual tokens that a model reads."""
    return families.visual_grids(of.model, of.inputs, of.roles == VISUAL)
