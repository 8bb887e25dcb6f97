"""The loss: what the terms need is read of both models, and their rows and scalars are added up.

batch -> passes (training.passes) -> each term's rows and weights, or its scalar -> one projection for all rows -> weighted terms ->
loss
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.config import Objective
from align_ti.data.batch import Tokens, check_batch, next_labels
from align_ti.errors import BatchError, ConfigError
from align_ti.interactions.candidates import check_candidates
from align_ti.interactions.transitions import Candidates, Transitions
from align_ti.losses.weighted import Rows, RowWeights, weighted_row_loss
from align_ti.models import families
from align_ti.models.overrides import Projection, tower_once
from align_ti.models.pairing import Pairing, check_pair, shared_tokens
from align_ti.models.sharding import nothing_of, run_part_gathered
from align_ti.notebooks import paragraph, table
from align_ti.phases import phase
from align_ti.terms.base import WeightedRows
from align_ti.terms.readings import Readings, view
from align_ti.training.cached_pass import restored_pass
from align_ti.training.passes import Terms, candidate_options, places_of, run_passes

Masses = dict[str, Shaped[Tensor, ""]]
"""Each term's mass, the divisor of its total, such as response tokens or samples; a term's file defines it."""


@dataclass(frozen=True, slots=True)
class DistillationOutput:
    """The loss of a batch and its components.

    `loss` is a scalar with gradient into the student only. `terms` are unweighted means over this batch, detached; `totals` and
    `masses` are their numerators and divisors, so that batches can be combined exactly. `branch_share` is the share of kept
    candidates that needed a row of their own, or None if no term has candidates. `weights` are the terms' weights in the loss.
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    totals: dict[str, Float[Tensor, ""]]
    masses: Masses
    branch_share: Float[Tensor, ""] | None
    weights: dict[str, float] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        """The terms as a table: unweighted mean, weight, their product, and the total and mass that the mean is made of."""
        rows = []
        for name, mean in self.terms.items():
            weight = self.weights.get(name)
            numbers = (float(mean), weight, None if weight is None else weight * float(mean))
            sums = (float(self.totals[name]), float(self.masses[name]))
            rows.append([name, *("" if number is None else f"{number:.4g}" for number in (*numbers, *sums))])
        rows.append(["loss", "", "", f"{float(self.loss):.4g}", "", ""])
        share = self.branch_share
        told = "" if share is None else f"{float(share):.1%} of the candidates needed a row of their own."
        columns = ("term", "unweighted", "weight", "weighted", "total", "mass")
        return table(columns, rows) + (paragraph(told) if told else "")


def distillation_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Mapping[str, Any],
    objective: Objective,
    candidates: Candidates | Int[Tensor, "batch seq candidates"] | None = None,
    generator: torch.Generator | None = None,
    step_masses: Callable[[Masses], Masses] | None = None,
    pairing: Pairing | None = None,
    *,
    in_step: bool = False,
) -> DistillationOutput:
    """The loss of a batch: a weighted sum of the objective's terms.

    Args:
        student: the model to train, on any attention implementation.
        teacher: the model to imitate, in eval mode; read without gradient. May be None if only sft has weight.
        batch: the models' own inputs, with `labels` (-100 outside responses) and `roles` [batch, seq]: 0 other, 1 visual,
            2 instruction, 3 response; `pictures` (the number of each visual token's image) and `student_written` (response tokens
            that the student generated itself) are used if present. For a teacher with its own processor `teacher` holds its inputs
            and `roles`, with the same responses.
        objective: terms and weights. `iva.layer` must be a number here (`score_layers` finds it).
        candidates: tokens to try in place of `input_ids` at response positions; if given, nothing is sampled. In a plain tensor,
            the candidates of a position that are not left out share its weight.
        generator: samples the candidates; on the device of the model that they are sampled from.
        step_masses: turns this batch's masses into those of the whole optimizer step, for gradient accumulation and data
            parallelism; by default the batch is the step.
        pairing: the result of `pair_up` for the two models; by default heads of equal size are assumed to have the same tokens.
        in_step: several processes exchange weights or gradients inside the models' passes, so all have to run the same passes,
            whatever their batches contain.

    Raises:
        BatchError: the batch is inconsistent.
        ConfigError: `iva.layer` is "auto".
        ModelError: the models do not fit each other, or a term does not fit them.

    Source: Align-TI (arXiv:2602.09483), L = L_sft + w_kd L_kd + w_iva L_iva + w_tpa L_tpa.
    """
    terms: Terms = objective.terms
    readings = read_batch(student, teacher, batch, objective, candidates, generator, pairing, in_step=in_step)
    tokens = readings.tokens
    masses = term_masses(terms, tokens, readings.plan)
    whole = masses if step_masses is None else step_masses(masses)
    with phase("divergence"):
        loss, totals = added_up(terms, readings, whole, objective.chunk_rows)
        if in_step:
            loss = loss + nothing_of(readings.student.hidden, readings.student.branches)
    plan = readings.plan
    return DistillationOutput(
        loss=loss,
        terms={name: total / masses[name].to(total).clamp(min=1) for name, total in totals.items()},
        totals=totals,
        masses=masses,
        branch_share=None if plan is None else (plan.branch_weights != 0).sum() / plan.kept.clamp(min=1),
        weights={name: term.weight for name, term in terms.items()},
    )


def read_batch(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Mapping[str, Any],
    objective: Objective,
    candidates: Candidates | Int[Tensor, "batch seq candidates"] | None = None,
    generator: torch.Generator | None = None,
    pairing: Pairing | None = None,
    *,
    in_step: bool = False,
) -> Readings:
    """What both models make of a batch, as far as the objective's terms need it; the arguments are those of `distillation_loss`.

    Raises:
        BatchError: the batch is inconsistent.
        ConfigError: `iva.layer` is "auto".
        ModelError: the models do not fit each other, or a term does not fit them.
    """
    terms: Terms = objective.terms
    check_models(student, teacher, objective, shared_inputs="teacher" not in batch)
    compared = teacher if objective.needs_teacher else None
    if pairing is None:
        pairing = Pairing() if compared is None else Pairing(shared_tokens(student, compared))
    ours = view(student, batch)
    # What a teacher cache keeps replaces the teacher's pass.
    kept = None if compared is None else restored_pass(compared, batch, terms)
    theirs = kept.view if kept is not None else None
    if compared is not None and theirs is None:
        theirs = view(compared, batch.get("teacher", batch))
    check_batch(ours.inputs["input_ids"], batch["labels"].to(ours.roles.device), ours.roles, ours.real)
    tokens = Tokens.of(batch, ours.roles.device)
    check_known(tokens.labels, pairing, Projection(student).out_features)
    if candidates is not None:
        # A trainer moves tensors to its device, but not what candidates with weights are wrapped in.
        candidates = candidates.to(tokens.roles.device)
        check_candidates(candidates, tokens.roles, Projection(student).out_features)
    found = None if theirs is None or "teacher" not in batch else places_of(ours, theirs, terms)

    with tower_once(student, compared if pairing.shared_tower else None):
        running = theirs if kept is None else None
        readings = run_passes(ours, running, terms, tokens, candidates, generator, pairing, found, in_step=in_step)
    return readings if kept is None else replace(readings, teacher=replace(kept, correspondence=found))


def term_masses(terms: Terms, tokens: Tokens, plan: Transitions | None) -> Masses:
    """What each term's total over a batch is a sum of."""
    return {name: term.mass(tokens, plan) for name, term in terms.items()}


def added_up(
    terms: Terms, readings: Readings, masses: Masses, chunk_rows: int | None
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The loss, and each term's total over the batch, detached."""
    device = readings.device.type
    with torch.autocast(device, enabled=False):  # sums and products of a term are taken as its file writes them
        parts = {name: term.total(readings) for name, term in terms.items()}
    rows = {name: part for name, part in parts.items() if isinstance(part, WeightedRows)}
    scalars = {name: part for name, part in parts.items() if not isinstance(part, WeightedRows)}
    dtype = torch.promote_types(readings.student.hidden.dtype, torch.float32)
    # A mass is a count; where it is 0 the total is 0 too, and dividing by 1 keeps it so.
    coefficients = {name: term.weight / masses[name].to(dtype).clamp(min=1) for name, term in terms.items()}
    losses = [coefficients[name] * total.to(readings.device, dtype) for name, total in scalars.items()]
    totals = {name: total.detach().to(readings.device, dtype) for name, total in scalars.items()}
    if rows:
        gathered, weights, _ = gather_rows(rows, readings)
        weighted = {
            name: RowWeights(weights=weights[name], coefficient=coefficients[name], measure=part.measure)
            for name, part in rows.items()
        }

        def projected(student: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            result = weighted_row_loss(replace(gathered, student=student), weighted, chunk_rows)
            return result.loss, dict(result.totals)

        loss, found = run_part_gathered(families.head(readings.student.view.model), projected, gathered.student)
        losses.append(loss)
        totals |= found
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0], {name: totals[name] for name in terms}


def gather_rows(
    terms: Mapping[str, WeightedRows], readings: Readings
) -> tuple[Rows, dict[str, Float[Tensor, " rows"]], Int[Tensor, " rows"]]:
    """The rows that have weight in any term, with each term's weights, and the sample that each row belongs to.

    Gold rows come first, each beside the teacher's row of the same token; then candidates; then, for each term that names rows of the
    teacher itself, its own.
    """
    student, teacher, plan = readings.student, readings.teacher, readings.plan
    labels = next_labels(readings.tokens.labels)
    paired = {name: part.weights for name, part in terms.items() if part.teacher_rows is None}
    blocks: list[tuple[Tensor, Tensor | None, Tensor, dict[str, Tensor], Tensor]] = []

    def rows_of(of: Tensor, chosen: Tensor) -> Tensor:
        return of[chosen.to(of.device)]

    if paired:
        chosen = torch.stack([weight != 0 for weight in paired.values()]).any(0)
        theirs = None if teacher is None else rows_of(teacher.aligned(teacher.hidden), chosen)
        weights = {name: weight[chosen] for name, weight in paired.items()}
        blocks.append((student.hidden[chosen], theirs, labels[chosen].clamp(min=0), weights, chosen.nonzero()[:, 0]))
    branching = {name: part.branch_weights for name, part in terms.items() if part.branch_weights is not None}
    if branching and plan is not None and student.branches is not None:
        theirs = None if teacher is None else teacher.branches
        of_none = labels.new_zeros(len(student.branches))
        blocks.append((student.branches, theirs, of_none, branching, plan.branches.samples))
    for name, part in terms.items():
        if part.teacher_rows is not None and teacher is not None:
            chosen = part.weights != 0
            sample, _ = chosen.nonzero(as_tuple=True)
            device = teacher.hidden.device
            theirs = teacher.hidden[sample.to(device), part.teacher_rows[chosen].to(device)]
            own = {name: part.weights[chosen]}
            blocks.append((student.hidden[chosen], theirs, labels[chosen].clamp(min=0), own, sample))

    def spread(name: str) -> Float[Tensor, " rows"]:
        dtype = terms[name].weights.dtype
        nothing = [torch.zeros(len(block[0]), dtype=dtype, device=readings.device) for block in blocks]
        return joined([block[3].get(name, none) for block, none in zip(blocks, nothing, strict=True)])

    compared = [block[1] for block in blocks if block[1] is not None]
    rows = Rows(
        student=joined([block[0] for block in blocks]),
        student_head=Projection(student.view.model),
        teacher=joined(compared) if teacher is not None else None,
        teacher_head=None if teacher is None else Projection(teacher.view.model),
        labels=joined([block[2] for block in blocks]),
        shared=readings.pairing.shared,
    )
    return rows, {name: spread(name) for name in terms}, joined([block[4] for block in blocks])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts one behind the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def check_models(
    student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, *, shared_inputs: bool = True
) -> None:
    """Refuse models for which a term of the objective is not defined or would not be exact.

    Raises:
        ConfigError: no teacher where one is needed, `iva.layer` is "auto", or two terms draw candidates.
        ModelError: the models do not fit each other, or a term does not fit them.
    """
    terms: Terms = objective.terms
    families.check_layout(student)
    candidate_options(terms)
    if objective.needs_teacher:
        if teacher is None:
            raise ConfigError(
                f"the objective has {', '.join(terms)}, but no teacher was given; give one or use sft alone."
            )
        check_pair(student, teacher, shared_inputs=shared_inputs)
        for term in terms.values():
            term.check(student, teacher)
    for name in objective.needs_layer:
        raise ConfigError(
            f"objective.{name}.layer is 'auto', which needs a sample of the training data; score_layers(teacher, groups) gives "
            "each layer's score: take the highest, or use AlignTITrainer, which does so."
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
