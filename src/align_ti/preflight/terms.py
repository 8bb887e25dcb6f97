"""Whether every term is alive, and whether the loss computes what a plain re-computation does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.config import Objective
from align_ti.data.roles import NO_LABEL, OTHER, RESPONSE, model_inputs
from align_ti.errors import AlignTIError
from align_ti.interactions.candidates import CandidateOptions, left_out_tokens
from align_ti.models.continuation import read
from align_ti.models.loading import first_line
from align_ti.models.overrides import Projection
from align_ti.models.pairing import Pairing
from align_ti.preflight.pair import Models, on_device, read_by
from align_ti.preflight.verdicts import Verdict
from align_ti.terms.base import Term
from align_ti.terms.plain import Sample, own_logits
from align_ti.training.gradients import only
from align_ti.training.objective import distillation_loss
from align_ti.training.passes import candidate_options

SMALL_SHARE = 1e-3
"""A term whose gradient is a smaller share of all terms' gradients hardly moves the student."""

PADDING = 8
"""Padding tokens behind the sample that the loss is given, so that padding in a mean would show."""

POSITIONS, TRIED = 3, 3
"""Response positions, and candidates at each, that TPA is computed for once more: a full forward of both models for each."""

TOLERANCE = {
    torch.float64: (1e-5, 1e-7),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 2e-3),
    torch.bfloat16: (5e-2, 1e-2),
}
"""How far the loss may be from the plain re-computation: relative, and absolute in nats, by the coarser dtype of the pair."""

PROJECTION = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""How far a projected row may be from the model's own logits, relative to the largest of them."""

MISHAPS = (AlignTIError, RuntimeError, ValueError, IndexError)
"""What a model or the loss may raise when something does not fit; the check says it as a verdict."""


def coarsest(models: Models) -> torch.dtype:
    """The dtype of the pair with the fewest digits; float32 has no more than float16 where products are allowed to be shortened."""
    dtype: torch.dtype = max((model.dtype for model in models.values()), key=lambda dtype: torch.finfo(dtype).eps)
    shortened = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if shortened and models["student"].device.type == "cuda" else dtype


# --- every term is alive ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Life:
    """What one term alone gives: its value, its mass, its gradient's norm in the loss, and what went wrong if something did."""

    value: float = 0.0
    mass: float = 0.0
    gradient: float = 0.0
    error: str = ""


def term_verdicts(
    models: Models,
    batch: Mapping[str, Any],
    objective: Objective,
    precision: Callable[[], AbstractContextManager[Any]],
    pairing: Pairing,
    scale: float,
    seed: int,
) -> list[Verdict]:
    """For each term alone: finite, not zero, with gradient, and with a share of the gradient.

    The loss is multiplied by `scale` for the backward pass, and norms are divided by it: float16 loses small gradients otherwise, as in
    training without a scaler.
    """
    lives = {
        name: live(models, batch, only(objective, name), name, precision, pairing, scale, seed)
        for name in objective.active
    }
    whole = sum(life.gradient for life in lives.values())
    return [
        alive(objective.terms[name], life, life.gradient / whole if whole > 0 else 0.0) for name, life in lives.items()
    ]


def live(
    models: Models,
    batch: Mapping[str, Any],
    objective: Objective,
    name: str,
    precision: Callable[[], AbstractContextManager[Any]],
    pairing: Pairing,
    scale: float,
    seed: int,
) -> Life:
    """The term on the batch, as in training, and the norm of its gradient."""
    student = models["student"]
    generator = torch.Generator(student.device).manual_seed(seed)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    student.train()
    try:
        with precision():
            teacher = models.get("teacher")
            out = distillation_loss(student, teacher, batch, objective, generator=generator, pairing=pairing)
        if out.loss.requires_grad:
            (out.loss * scale).backward()
        norms = [parameter.grad.float().norm() for parameter in trained if parameter.grad is not None]
        norm = float(torch.stack(norms).norm()) / scale if norms else 0.0
        return Life(float(out.terms[name]), float(out.masses[name]), norm)
    except torch.OutOfMemoryError:
        raise
    except MISHAPS as error:
        return Life(error=first_line(error))
    finally:
        student.eval()
        for parameter in trained:
            parameter.grad = None


def alive(term: Term, life: Life, share: float) -> Verdict:
    """The verdict on one term's life."""
    name, unit = term.name, f" {term.unit}" if term.unit else ""
    finite = life.value == life.value and abs(life.value) != float("inf") and life.gradient < float("inf")
    idle = life.mass == 0 and not life.error
    dead = life.error or not finite or (not idle and (life.value == 0 or not life.gradient > 0))
    measured = (
        f"{name} cannot be computed: {life.error.rstrip('.')}"
        if life.error
        else f"no position of the batch enters {name}"
        if idle
        else f"{name} is {life.value:.4g}{unit} with a gradient of norm {life.gradient:.3g}, {share:.2%} of the sum "
        "of all terms' gradient norms"
    )
    return Verdict(
        name=f"term.{name}",
        state="fail" if dead else "warn" if idle or share < SMALL_SHARE else "pass",
        measured=measured,
        expected=f"finite, not 0, with a gradient, and at least {SMALL_SHARE:.1%} of that sum",
        way_out=term.fix if dead or idle else f"raise objective.{name}.weight, or set it to 0 to save its cost",
        values={"value": life.value, "mass": life.mass, "gradient_norm": life.gradient, "gradient_share": share},
    )


# --- our rows are the model's own -------------------------------------------------------------------------------------


@torch.no_grad()
def projection(name: str, model: PreTrainedModel, batch: Mapping[str, Any]) -> Verdict:
    """Whether rows that the loss projects are the logits of the model's own forward pass."""
    batch = on_device(read_by(name, batch), model.device)
    inputs = model_inputs(batch)
    rows = ((batch["roles"][0] == RESPONSE).nonzero().flatten() - 1).tolist()
    own = own_logits(model, inputs)[0, rows]
    ours = Projection(model)(read(model, inputs, keep_cache=False).hidden[0, rows]).to(own.dtype)
    scale = float(own.abs().max())
    apart = float((ours - own).abs().max()) / max(scale, torch.finfo(own.dtype).tiny)
    limit = PROJECTION.get(coarsest({"student": model}), PROJECTION[torch.bfloat16])
    return Verdict(
        name=f"projection.{name}",
        state="pass" if apart <= limit else "fail",
        measured=f"the logits that the loss projects differ from the {name}'s own by {apart:.2g} of the largest logit, {scale:.3g}",
        expected=f"at most {limit:g} (rounding error)",
        way_out=f"the {name}'s forward pass does something to its logits (a soft cap, a scale) that the loss does not; use another "
        "model, or report its family",
        values={"difference": apart, "limit": limit, "largest_logit": scale},
    )


# --- the loss equals a plain re-computation ---------------------------------------------------------------------------


def fused_verdicts(
    models: Models, batch: Mapping[str, Any], objective: Objective, pairing: Pairing, pad_tokens: Mapping[str, int]
) -> list[Verdict]:
    """For each term, whether the loss on one sample equals the plain re-computation on it, if the term has one."""
    relative, absolute = TOLERANCE.get(coarsest(models), TOLERANCE[torch.bfloat16])
    verdicts = []
    for name, term in objective.terms.items():
        sample = Sample(models, {name: read_by(name, batch) for name in ("student", "teacher")}, pairing.shared)
        try:
            if term.candidate_options is not None:
                ours, expected = with_candidates(sample, batch, objective, name, pairing, pad_tokens)
            else:
                expected = term.plain(sample)
                if expected is None:
                    verdicts.append(not_compared(name))
                    continue
                ours = fused(models, padded(batch, pad_tokens), objective, name, pairing)
        except torch.OutOfMemoryError:
            raise
        except MISHAPS as error:
            verdicts.append(unequal(name, f"{name} cannot be compared: {first_line(error).rstrip('.')}", relative, {}))
            continue
        if expected is None:
            verdicts.append(not_compared(name))
            continue
        same = abs(ours - expected) <= absolute + relative * abs(expected)
        said = f"{name} on one sample is {ours:.6g} in the loss and {expected:.6g} in the reference computation"
        verdicts.append(unequal(name, said, relative, {"loss": ours, "plain": expected}, same=same))
    return verdicts


def not_compared(name: str) -> Verdict:
    """Says that the term, as it is set, has no plain re-computation."""
    return Verdict(
        name=f"fused.{name}",
        state="warn",
        measured=f"{name} has no reference computation for these options and models",
        expected="a comparison",
        way_out="nothing to do for a built-in term, which the tests compare on tiny models; test your own with "
        "align_ti.testing.check_term",
    )


def unequal(name: str, measured: str, relative: float, values: Mapping[str, float], *, same: bool = False) -> Verdict:
    """The verdict on one term's equality."""
    return Verdict(
        name=f"fused.{name}",
        state="pass" if same else "fail",
        measured=measured,
        expected=f"equal within {relative:.0e}",
        way_out="the loss does not compute this term for these models; do not train with it: report it with check.json",
        values=values,
    )


@torch.no_grad()
def fused(
    models: Models,
    batch: Mapping[str, Any],
    objective: Objective,
    name: str,
    pairing: Pairing,
    candidates: Tensor | None = None,
) -> float:
    """One term's mean over the batch as the loss computes it."""
    student = models["student"]
    out = distillation_loss(
        student,
        models.get("teacher"),
        batch,
        # Packed, gold rows are read in one pass with the branches, under the mask of both.
        objective if is_packed(objective) else only(objective, name),
        candidates,
        torch.Generator(student.device).manual_seed(0),
        pairing=pairing,
    )
    return float(out.terms[name])


def is_packed(objective: Objective) -> bool:
    """Whether candidates are read packed by choice."""
    options = candidate_options(objective.terms)
    return options is not None and options.form == "packed"


def padded(batch: Mapping[str, Any], pad_tokens: Mapping[str, int], name: str = "student") -> dict[str, Any]:
    """The sample with padding behind it, in the sequence of each model."""
    fill = {"input_ids": pad_tokens[name], "labels": NO_LABEL, "roles": OTHER}
    length = batch["input_ids"].shape[1]
    return {
        key: padded(value, pad_tokens, key)
        if isinstance(value, Mapping)
        else torch.nn.functional.pad(value, (0, PADDING), value=fill.get(key, 0))
        if value.dim() == 2 and value.shape[1] == length
        else value
        for key, value in batch.items()
    }


def with_candidates(
    sample: Sample,
    batch: Mapping[str, Any],
    objective: Objective,
    name: str,
    pairing: Pairing,
    pad_tokens: Mapping[str, int],
) -> tuple[float, float | None]:
    """A term over a few response positions and fixed candidates: by the loss, and by its plain re-computation."""
    options = objective.terms[name].candidate_options
    tried = few_candidates(sample, options, pairing)
    candidates = batch["input_ids"][..., None].repeat(1, 1, TRIED)
    for step, tokens in tried.items():
        candidates[0, step] = torch.tensor(tokens, device=candidates.device)
    candidates = torch.nn.functional.pad(candidates, (0, 0, 0, PADDING))
    few = only_responses(batch, [sample.rank(step) for step in tried])
    ours = fused(sample.models, padded(few, pad_tokens), objective, name, pairing, candidates)
    return ours, objective.terms[name].plain(replace(sample, candidates=tried))


def only_responses(batch: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The sample with no response but the tokens of these ranks, counted from the first response token."""

    def masked(part: Mapping[str, Any]) -> dict[str, Any]:
        others: Tensor = part["roles"] == RESPONSE
        others[0, others[0].nonzero().squeeze(-1)[kept]] = False
        fill = {"roles": OTHER, "labels": NO_LABEL}
        return {name: value.masked_fill(others, fill[name]) if name in fill else value for name, value in part.items()}

    few = masked(batch)
    return {**few, "teacher": masked(few["teacher"])} if "teacher" in few else few


def few_candidates(sample: Sample, options: CandidateOptions, pairing: Pairing) -> dict[int, list[int]]:
    """For the first response positions, the gold token and the likeliest others, none of which is left out.

    Raises:
        ValueError: every response position holds a token that is left out.
    """
    left_out = set(left_out_tokens(sample.models["student"], options, pairing))
    logits, ids = sample.logits("student", shared=False), sample.ids("student")
    tried: dict[int, list[int]] = {}
    for step in sample.response_steps("student"):
        gold = int(ids[step])
        if gold not in left_out and len(tried) < POSITIONS:
            likely: Int[Tensor, " most"] = (
                logits[step - 1].topk(min(TRIED + len(left_out) + 1, logits.shape[-1])).indices
            )
            others = [token for token in likely.tolist() if token not in left_out and token != gold]
            tried[step] = [gold, *others[: TRIED - 1]]
    if not tried:
        raise ValueError(
            "every response token of the sample is excluded from the candidates; at least one other token is needed."
        )
    return tried
