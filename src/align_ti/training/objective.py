"""The loss: two forward passes, rows and weights of each term, one projection for all of them.

teacher and student read the gold tokens -> (captured attention -> visual weights) and (candidates -> branches over the
kept caches) -> rows and weights -> divergence -> weighted terms -> loss
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.config import Objective, Tpa
from align_ti.data.roles import INSTRUCTION, NO_LABEL, RESPONSE, VISUAL, model_inputs
from align_ti.errors import BatchError, ConfigError
from align_ti.interactions.correspondence import Correspondence, check_grids, check_visual, correspond, resampled
from align_ti.interactions.estimators import draw_weighted
from align_ti.interactions.transitions import Candidates, Transitions, draw, plan_transitions, sampling_distribution
from align_ti.interactions.visual import aligned_samples, visual_weights
from align_ti.losses.weighted import Rows, RowWeights, rows_at_a_time, weighted_row_loss
from align_ti.models import families
from align_ti.models.attention import Watch, watching
from align_ti.models.branches import Branches
from align_ti.models.continuation import Reading, check_branching, continue_branches, read, read_packed
from align_ti.models.pairing import Pairing, check_pair, shared_tokens
from align_ti.models.recomputation import reuse_possible
from align_ti.models.standins import Projection, tower_once
from align_ti.phases import phase

DRAWN_LOGITS = {"cpu": 2**24, "accelerator": 2**25}
"""Logits that candidates are drawn from at a time; drawing holds several tensors of their size in float32 or wider."""

Masses = dict[str, Shaped[Tensor, ""]]
"""What each term's total is divided by: sft and kd response tokens, iva samples with visual and instruction tokens, tpa response
positions that keep a candidate."""


@dataclass(frozen=True, slots=True)
class DistillationOutput:
    """The loss of a batch and what it is made of.

    `loss` is a scalar with gradient into the student only. `terms` are unweighted means over this batch, detached; `totals` and
    `masses` are what they are made of, so that batches can be joined exactly. `branch_share` is the share of kept candidates
    that needed a row of their own, or None without TPA.
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    totals: dict[str, Float[Tensor, ""]]
    masses: Masses
    branch_share: Float[Tensor, ""] | None


@dataclass(frozen=True, slots=True)
class Pass:
    """What one model made of gold tokens and branches."""

    gold: Float[Tensor, "batch seq hidden"]
    branches: Float[Tensor, "branches hidden"] | None


@dataclass(frozen=True, slots=True)
class View:
    """What one model reads: its inputs, positions among them, and the role of each of its tokens."""

    model: PreTrainedModel
    inputs: dict[str, Any]
    roles: Int[Tensor, "batch seq"]


def view(model: PreTrainedModel, batch: Mapping[str, Any]) -> View:
    """A batch as the model reads it, on the model's device."""
    moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    inputs = model_inputs(moved)
    return View(model, {**inputs, "position_ids": families.position_ids(model, inputs)}, moved["roles"])


def distillation_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Mapping[str, Any],
    objective: Objective,
    candidates: Candidates | Int[Tensor, "batch seq candidates"] | None = None,
    generator: torch.Generator | None = None,
    step_masses: Callable[[Masses], Masses] | None = None,
    pairing: Pairing | None = None,
) -> DistillationOutput:
    """The Align-TI loss of a batch.

    Args:
        student: the model to train, on any attention implementation.
        teacher: the model to imitate, in eval mode; read without gradient. May be None if only sft has weight.
        batch: the models' own inputs, with `labels` (-100 outside responses) and `roles` [batch, seq]: 0 other, 1 visual,
            2 instruction, 3 response; `pictures` (the number of each visual token's picture) is read if it is there. A teacher
            with a processor of its own finds its inputs and `roles` under `teacher`, with the same responses.
        objective: terms and weights. `iva.layer` must be a number here (`score_layers` finds it).
        candidates: tokens to try in place of `input_ids`, read where roles is response; given, nothing is drawn. A plain
            tensor: those that are not left out share the position's weight.
        generator: draws the candidates; on the device of the model that they are drawn from.
        step_masses: turns this batch's masses into those of the whole optimizer step, for gradient accumulation and data
            parallelism; by default the batch is the step.
        pairing: what `pair_up` found about the two models; by default heads of one size are taken to have the same tokens.

    Raises:
        BatchError: the batch contradicts itself.
        ConfigError: `iva.layer` is "auto".
        ModelError: the models do not fit each other.

    Source: Align-TI (arXiv:2602.09483), L = L_sft + w_kd L_kd + w_iva L_iva + w_tpa L_tpa.
    """
    terms = objective.active
    check_models(student, teacher, objective, shared_inputs="teacher" not in batch)
    compared = teacher if objective.needs_teacher else None
    if pairing is None:
        pairing = Pairing() if compared is None else Pairing(shared_tokens(student, compared))
    ours = view(student, batch)
    theirs = None if compared is None else view(compared, batch.get("teacher", batch))
    labels, roles = batch["labels"], ours.roles
    check_batch(ours.inputs["input_ids"], labels, roles, families.real_tokens(ours.inputs))
    check_known(labels, pairing, Projection(student).out_features)
    if candidates is not None:
        # A trainer moves tensors to its device, but not what candidates with weights are wrapped in.
        candidates = candidates.to(roles.device)
        check_candidates(candidates, roles, Projection(student).out_features)
    found = None if theirs is None or "teacher" not in batch else places_of(ours, theirs, objective)

    with tower_once(student, compared if pairing.one_tower else None):
        plan, student_pass, teacher_pass, attention = run_passes(
            ours, theirs, objective, candidates, generator, pairing, found
        )
    every_mass = batch_masses(labels, roles, plan)
    masses = {name: every_mass[name] for name in terms}
    whole = masses if step_masses is None else step_masses(masses)
    weights = gold_weights(labels, roles, objective, attention, plan, batch.get("pictures"))
    with phase("divergence"):
        student_rows, teacher_rows, row_labels, row_weights = gather_rows(
            weights, plan, labels, student_pass, teacher_pass
        )
        dtype = torch.promote_types(student_rows.dtype, torch.float32)
        # A mass is a count; where it is 0 the total is 0 too, and dividing by 1 keeps it so.
        result = weighted_row_loss(
            Rows(
                student=student_rows,
                student_head=Projection(student),
                teacher=teacher_rows,
                teacher_head=None if compared is None else Projection(compared),
                labels=row_labels,
                shared=pairing.shared,
            ),
            {
                name: RowWeights(
                    weights=row_weights[name],
                    coefficient=getattr(objective, name).weight / whole[name].to(dtype).clamp(min=1),
                    temperature={"sft": None, "kd": objective.kd.temperature}.get(name, 1.0),
                )
                for name in terms
            },
            objective.chunk_rows,
        )
    return DistillationOutput(
        loss=result.loss,
        terms={name: result.totals[name] / masses[name].to(dtype).clamp(min=1) for name in terms},
        totals=dict(result.totals),
        masses=masses,
        branch_share=None if plan is None else len(plan.branches) / plan.kept.clamp(min=1),
    )


def check_models(
    student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, *, shared_inputs: bool = True
) -> None:
    """Refuse models for which a term of the objective is not defined or would not be exact.

    Raises:
        ConfigError: no teacher where one is needed, or `iva.layer` is "auto".
        ModelError: the models do not fit each other, or a term does not fit them.
    """
    terms = objective.active
    families.check_layout(student)
    if objective.needs_teacher:
        if teacher is None:
            raise ConfigError(
                f"the objective has {', '.join(terms)}, but no teacher was given; give one or use sft alone."
            )
        check_pair(student, teacher, shared_inputs=shared_inputs)
        if "tpa" in terms:
            check_branching(student)
            check_branching(teacher)
    if "iva" in terms and objective.iva.layer == "auto":
        raise ConfigError(
            "objective.iva.layer is 'auto', which needs a sample of the training data; score_layers(teacher, groups) gives "
            "each layer's score: take the highest, or use AlignTITrainer, which does so."
        )


def places_of(ours: View, theirs: View, objective: Objective) -> Correspondence:
    """Where the student's rows stand in the teacher's own sequence.

    Raises:
        BatchError: different responses, or visual tokens that cannot be compared.
    """
    visual = "iva" in objective.active
    ids, roles = (of.to(ours.roles.device) for of in (theirs.inputs["input_ids"], theirs.roles))
    found = correspond(ours.inputs["input_ids"], ours.roles, ids, roles, with_visual=visual)
    if not visual:
        return found
    seen, shown = (aligned_samples(of == VISUAL, of == INSTRUCTION) for of in (ours.roles, roles))
    if not torch.equal(seen, shown):
        sample = int((seen != shown).nonzero()[0])
        raise BatchError(
            f"sample {sample}: the picture stands before the instruction for one model and behind it for the other, where attention "
            "cannot look at it; choose templates of one order or leave IVA out (objective.iva.weight: 0)."
        )
    if objective.iva.resample:
        return resampled(found, *(grids_of(of) for of in (ours, theirs)))
    check_visual(ours.roles, roles)
    try:
        one, other = grids_of(ours), grids_of(theirs)
    except BatchError:
        # Neither config nor inputs tell the grids, so equal numbers are all that can be asked for.
        return found
    check_grids(one, other)
    return found


def grids_of(of: View) -> list[list[tuple[int, int]]]:
    """The grids of visual tokens that a model reads."""
    return families.visual_grids(of.model, of.inputs, of.roles == VISUAL)


def check_batch(ids: Tensor, labels: Tensor, roles: Tensor, real: Tensor) -> None:
    """Refuse a batch whose parts contradict each other, which would train silently wrong; each is to be [batch, seq].

    Raises:
        BatchError: shapes differ; an unknown role; labels that are not the response tokens; a response on padding or at the
            very start; no response at all.
    """
    if not ids.shape == labels.shape == roles.shape:
        raise BatchError(
            f"input_ids is {tuple(ids.shape)}, labels {tuple(labels.shape)}, roles {tuple(roles.shape)}; equal shapes "
            "[batch, seq] are accepted."
        )
    labelled, response = labels != NO_LABEL, roles == RESPONSE
    behind = torch.nn.functional.pad(real, (1, 0))[:, :-1]
    problems = {
        "roles holds a number other than 0 other, 1 visual, 2 instruction, 3 response": (roles < 0)
        | (roles > RESPONSE),
        "labels and roles disagree on which tokens are response (3); label exactly those": labelled != response,
        "a label differs from the token at its place; labels are not shifted, the loss does that": labelled
        & (labels != ids),
        "a response token is padding or has no token before it to predict it": response & ~(real & behind),
    }
    # One transfer from the device for all checks.
    found = torch.stack([*(problem.any() for problem in problems.values()), ~response.any()]).tolist()
    for (sentence, problem), bad in zip(problems.items(), found, strict=False):
        if bad:
            sample, step = problem.nonzero()[0].tolist()
            raise BatchError(f"sample {sample}, token {step}: {sentence}.")
    if found[-1]:
        raise BatchError(
            "the batch holds no response token, so there is nothing to learn; give each sample a response."
        )


def check_known(labels: Int[Tensor, "batch seq"], pairing: Pairing, tokens: int) -> None:
    """Refuse responses with tokens that only one of the two models knows.

    Raises:
        BatchError: the first such token is named.
    """
    unknown = pairing.unshared(tokens)
    wrong = torch.isin(labels, torch.tensor(unknown, dtype=labels.dtype, device=labels.device)) if unknown else None
    if wrong is not None and wrong.any():
        sample, step = wrong.nonzero()[0].tolist()
        raise BatchError(
            f"sample {sample}, token {step}: the response holds token {int(labels[sample, step])}, which the two models do not share; "
            "leave it out of the data or choose models of one tokenizer."
        )


def run_passes(
    ours: View,
    theirs: View | None,
    objective: Objective,
    candidates: Candidates | Int[Tensor, "batch seq candidates"] | None,
    generator: torch.Generator | None,
    pairing: Pairing,
    found: Correspondence | None,
) -> tuple[Transitions | None, Pass, Pass | None, Float[Tensor, "batch seq"] | None]:
    """Everything that the models compute: the plan of candidates, both models' passes, and the teacher's attention.

    What comes from the teacher is laid out as the student's sequence.
    """
    tpa = objective.tpa if "tpa" in objective.active else None
    layer = objective.iva.layer if "iva" in objective.active else None
    source = None if tpa is None or candidates is not None else tpa.source
    plan, teacher_first, teacher_pass = None, None, None
    with watch_instruction(theirs, layer) as watch:
        with phase("student forward"):
            student_first = first_pass(ours, tpa, drawn_from=source == "student")
        if theirs is not None:
            with torch.no_grad(), phase("teacher forward"):
                teacher_first = first_pass(theirs, tpa, drawn_from=source == "teacher")
        if tpa is not None:
            with phase("candidates"):
                if candidates is None:
                    drawn_from = {"student": (ours, student_first), "teacher": (theirs, teacher_first), "gold": None}
                    candidates = draw_candidates(drawn_from[tpa.source], ours, tpa, generator, pairing)
                plan = plan_candidates(ours.model, {**ours.inputs, "roles": ours.roles}, candidates, tpa, pairing)
        with phase(second_phase("student", student_first)):
            student_pass = second_pass(ours, student_first, None if plan is None else plan.branches)
        if theirs is not None:
            branches = None if plan is None else branches_for(theirs, plan.branches, found)
            with torch.no_grad(), phase(second_phase("teacher", teacher_first)):
                teacher_pass = second_pass(theirs, teacher_first, branches)
    attention = None if watch is None or theirs is None else watch.means[watch.layers[0]][:, : theirs.roles.shape[1]]
    device = ours.roles.device
    if found is not None and teacher_pass is not None:
        teacher_pass = Pass(found.to_student(teacher_pass.gold), teacher_pass.branches)
        attention = None if attention is None else found.to_student(attention, sums=True)
    return plan, student_pass, teacher_pass, None if attention is None else attention.to(device)


def branches_for(theirs: View, branches: Branches, found: Correspondence | None) -> Branches:
    """The branches at their places in the teacher's sequence, on its device."""
    replaces = branches.replaces if found is None else found.places[branches.samples, branches.replaces]
    device = theirs.roles.device
    return Branches(branches.tokens.to(device), replaces.to(device), branches.counts)


def watch_instruction(theirs: View | None, layer: int | str | None) -> AbstractContextManager[Watch | None]:
    """Reads where the teacher's instruction tokens look at one layer, if a layer is given."""
    if theirs is None or not isinstance(layer, int):
        return nullcontext()
    return watching(theirs.model, theirs.roles == INSTRUCTION, (layer,))


def first_pass(of: View, tpa: Tpa | None, *, drawn_from: bool) -> Reading | None:
    """The pass before candidates are known.

    In the packed form the gold tokens are read together with the branches, so here they are read only if candidates are drawn from
    this model, and then without gradient.
    """
    if tpa is None or not is_packed(of.model, tpa):
        return read(of.model, of.inputs, keep_cache=tpa is not None)
    if not drawn_from:
        return None
    with torch.no_grad(), phase("candidates"):
        return read(of.model, of.inputs, keep_cache=False)


def second_pass(of: View, first: Reading | None, branches: Branches | None) -> Pass:
    """The hidden states of gold tokens and branches, whichever way the first pass left to do."""
    if branches is not None and (first is None or first.cache is None):
        return Pass(*read_packed(of.model, of.inputs, branches))
    assert first is not None
    if not branches:
        return Pass(first.hidden, None)
    return Pass(first.hidden, continue_branches(of.model, of.inputs, first, branches))


def second_phase(whose: str, first: Reading | None) -> str:
    """The name of a model's second pass as a phase: in the packed form it is the forward pass itself."""
    return f"{whose} forward" if first is None or first.cache is None else f"{whose} second pass"


def is_packed(model: PreTrainedModel, tpa: Tpa) -> bool:
    """Whether this model takes the packed form."""
    return tpa.form == "packed" or (tpa.form == "auto" and not reuse_possible(model))


@torch.no_grad()
def draw_candidates(
    drawn_from: tuple[View | None, Reading | None] | None,
    ours: View,
    tpa: Tpa,
    generator: torch.Generator | None,
    pairing: Pairing,
) -> Candidates:
    """Tokens to try at each of the student's response positions, drawn from a model's distribution there; the gold tokens if no
    model is given."""
    ids: Tensor = ours.inputs["input_ids"]
    if drawn_from is None:
        return Candidates(ids[..., None].clone())
    source, reading = drawn_from
    assert source is not None
    assert reading is not None
    # In both sequences the responses are the same tokens in the same order.
    sample, step = (source.roles == RESPONSE).nonzero(as_tuple=True)
    response = ours.roles == RESPONSE
    # The row that predicts a token is the position before it.
    hidden, project = reading.hidden[sample, step - 1], Projection(source.model)
    # The teacher may be on another device than the generator.
    device = hidden.device if generator is None else generator.device
    gold, chunk = ids[response].to(device), rows_at_a_time(DRAWN_LOGITS, project.out_features, hidden.device)
    # What the student has no row for is no candidate either.
    left_out = (
        *left_out_tokens(ours.model, tpa, pairing),
        *range(Projection(ours.model).out_features, project.out_features),
    )
    drawn = [
        draw_as(tpa, project(rows).to(device), its, left_out, generator)
        for rows, its in zip(hidden.split(chunk), gold.split(chunk), strict=True)
    ]
    tokens, weights = (laid_out(torch.cat(parts), response) for parts in zip(*drawn, strict=True))
    return Candidates(tokens, None if tpa.draw == "with_replacement" else weights)


def draw_as(
    tpa: Tpa,
    logits: Float[Tensor, "rows vocab"],
    gold: Int[Tensor, " rows"],
    left_out: tuple[int, ...],
    generator: torch.Generator | None,
) -> tuple[Int[Tensor, "rows slots"], Float[Tensor, "rows slots"]]:
    """The candidates of some rows as the options say, with their weights; equal ones for plain draws, left-out tokens included."""
    options = (tpa.temperature, tpa.top_k, tpa.top_p)
    if tpa.draw == "with_replacement":
        tokens = draw(
            logits, tpa.candidates, temperature=options[0], top_k=options[1], top_p=options[2], generator=generator
        )
        return tokens, torch.ones(tokens.shape, device=tokens.device)
    probability = sampling_distribution(logits, *options)
    return draw_weighted(
        probability, gold, tpa.candidates, left_out, tpa.draw, enumerated=tpa.enumerated, generator=generator
    )


def laid_out(
    values: Shaped[Tensor, "rows slots"], response: Bool[Tensor, "batch seq"]
) -> Shaped[Tensor, "batch seq slots"]:
    """Values of response positions at their places in the batch, 0 elsewhere."""
    out = torch.zeros((*response.shape, values.shape[-1]), dtype=values.dtype, device=response.device)
    out[response] = values.to(response.device)
    return out


def check_candidates(candidates: Candidates | Tensor, roles: Int[Tensor, "batch seq"], tokens: int) -> None:
    """Refuse candidates that do not fit the batch or the vocabulary; they are to be [batch, seq, n].

    Raises:
        BatchError: wrong shape, a token id outside the vocabulary at a response position, or a weight there that is none.
    """
    given = candidates if isinstance(candidates, Candidates) else Candidates(candidates)
    tried, response = given.tokens, roles == RESPONSE
    if tried.dim() != 3 or tried.shape[:2] != roles.shape or tried.shape[2] == 0:
        raise BatchError(
            f"candidates is {tuple(tried.shape)}; [batch, seq, n] with batch, seq = {tuple(roles.shape)} and n of 1 or "
            "more is accepted."
        )
    outside = ((tried < 0) | (tried >= tokens)).any(-1) & response
    if outside.any():
        sample, step = outside.nonzero()[0].tolist()
        raise BatchError(
            f"sample {sample}, token {step}: candidates {tried[sample, step].tolist()}; token ids from 0 to {tokens - 1} "
            "are accepted."
        )
    if given.weights is not None:
        wrong = ~((given.weights >= 0) & given.weights.isfinite()).all(-1) & response
        if wrong.any():
            sample, step = wrong.nonzero()[0].tolist()
            raise BatchError(
                f"sample {sample}, token {step}: weights of candidates {given.weights[sample, step].tolist()}; finite numbers of 0 or "
                "more are accepted."
            )


def candidates_for(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Mapping[str, Any],
    tpa: Tpa,
    generator: torch.Generator | None = None,
    pairing: Pairing | None = None,
) -> Candidates:
    """The candidates of a batch, drawn beforehand by a pass without gradient.

    For gradient accumulation: TPA's mass over the whole step is known only when every batch of it has its candidates.
    """
    ours, drawn_from = view(student, batch), None
    if tpa.source != "gold":
        source = ours
        if tpa.source == "teacher":
            assert teacher is not None
            source = view(teacher, batch.get("teacher", batch))
        with torch.no_grad():
            drawn_from = (source, read(source.model, source.inputs, keep_cache=False))
    return draw_candidates(drawn_from, ours, tpa, generator, Pairing() if pairing is None else pairing)


def plan_candidates(
    student: PreTrainedModel,
    batch: Mapping[str, Any],
    candidates: Candidates | Int[Tensor, "batch seq candidates"],
    tpa: Tpa,
    pairing: Pairing | None = None,
) -> Transitions:
    """The rows and weights that the candidates of a batch come to."""
    left_out = left_out_tokens(student, tpa, Pairing() if pairing is None else pairing)
    # A teacher whose vocabulary is padded further may draw ids that the student has no row for.
    known = Projection(student).out_features
    roles: Tensor = batch["roles"]
    return plan_transitions(candidates.to(roles.device), roles == RESPONSE, batch["input_ids"], left_out, known)


def left_out_tokens(student: PreTrainedModel, tpa: Tpa, pairing: Pairing) -> tuple[int, ...]:
    """The tokens that have no next step: ends of a turn, the image token, which stands for no word, and what the teacher does not
    know."""
    unknown = pairing.unshared(Projection(student).out_features) + pairing.wordless
    if tpa.left_out is not None:
        return tpa.left_out + unknown
    image = families.image_token(student)
    return families.end_tokens(student) + (() if image is None else (image,)) + unknown


def gold_weights(
    labels: Int[Tensor, "batch seq"],
    roles: Int[Tensor, "batch seq"],
    objective: Objective,
    attention: Float[Tensor, "batch seq"] | None,
    plan: Transitions | None,
    pictures: Int[Tensor, "batch seq"] | None = None,
) -> dict[str, Float[Tensor, "batch seq"]]:
    """How much each gold row counts in each term."""
    predicts = (next_labels(labels) != NO_LABEL).float()
    weights = {"sft": predicts, "kd": predicts}
    if attention is not None:
        visual, instruction = roles == VISUAL, roles == INSTRUCTION
        weights["iva"] = visual_weights(
            attention, visual, instruction, objective.iva.images, pictures, objective.iva.share
        )
    if plan is not None:
        weights["tpa"] = plan.gold_weights
    return {name: weights[name] for name in objective.active}


def next_labels(labels: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """At each position the label of the token after it, which is what its row predicts."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)


def batch_masses(
    labels: Int[Tensor, "batch seq"], roles: Int[Tensor, "batch seq"], plan: Transitions | None = None
) -> Masses:
    """What each term's total over this batch is a sum of; tpa's is known only once there is a plan."""
    responses = (labels != NO_LABEL).sum()
    masses = {"sft": responses, "kd": responses}
    masses["iva"] = aligned_samples(roles == VISUAL, roles == INSTRUCTION).sum()
    if plan is not None:
        masses["tpa"] = plan.mass
    return masses


def gather_rows(
    weights: Mapping[str, Float[Tensor, "batch seq"]],
    plan: Transitions | None,
    labels: Int[Tensor, "batch seq"],
    student: Pass,
    teacher: Pass | None,
) -> tuple[
    Float[Tensor, "rows hidden"], Float[Tensor, "rows teacher_hidden"] | None, Tensor, dict[str, Float[Tensor, " rows"]]
]:
    """The rows that have weight in any term: gold rows first, then branches; with their labels and each term's weights."""
    chosen = torch.stack([weight != 0 for weight in weights.values()]).any(0)

    def joined(of: Pass) -> Tensor:
        gold = of.gold[chosen.to(of.gold.device)]
        return gold if of.branches is None else torch.cat([gold, of.branches])

    count = 0 if plan is None else len(plan.branches)
    row_weights = {name: torch.nn.functional.pad(weight[chosen], (0, count)) for name, weight in weights.items()}
    if plan is not None:
        row_weights["tpa"] = torch.cat([weights["tpa"][chosen], plan.branch_weights])
    row_labels = torch.nn.functional.pad(next_labels(labels)[chosen].clamp(min=0), (0, count))
    return joined(student), None if teacher is None else joined(teacher), row_labels, row_weights
