"""Whether every term is alive, and whether the loss computes what a plain re-computation does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.config import Objective
from align_ti.data.roles import NO_LABEL, OTHER, RESPONSE, model_inputs
from align_ti.errors import AlignTIError
from align_ti.models.continuation import read
from align_ti.models.loading import first_line
from align_ti.models.pairing import Pairing
from align_ti.models.standins import Projection
from align_ti.preflight import plain
from align_ti.preflight.pair import Models, on_device, read_by
from align_ti.preflight.verdicts import Verdict
from align_ti.training.objective import distillation_loss, left_out_tokens

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


def only(objective: Objective, name: str) -> Objective:
    """The objective with one term alone, at its weight."""
    off = {
        other: getattr(objective, other).model_copy(update={"weight": 0.0})
        for other in ("sft", "kd", "iva", "tpa")
        if other != name
    }
    return objective.model_copy(update=off)


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
    return [alive(name, life, life.gradient / whole if whole > 0 else 0.0) for name, life in lives.items()]


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
    except MISHAPS as error:
        return Life(error=first_line(error))
    finally:
        student.eval()
        for parameter in trained:
            parameter.grad = None


def alive(name: str, life: Life, share: float) -> Verdict:
    """The verdict on one term's life."""
    finite = life.value == life.value and abs(life.value) != float("inf") and life.gradient < float("inf")
    idle = life.mass == 0 and not life.error
    dead = life.error or not finite or (not idle and (life.value == 0 or not life.gradient > 0))
    measured = (
        f"{name} cannot be computed: {life.error.rstrip('.')}"
        if life.error
        else f"no row of the batch counts in {name}"
        if idle
        else f"{name} is {life.value:.4g} nats with a gradient of norm {life.gradient:.3g}, {share:.2%} of all terms' norms"
    )
    return Verdict(
        name=f"term.{name}",
        state="fail" if dead else "warn" if idle or share < SMALL_SHARE else "pass",
        measured=measured,
        expected=f"finite, not 0, with gradient, and {SMALL_SHARE:.1%} of the norms at least",
        way_out=WAYS_OUT[name] if dead or idle else f"raise objective.{name}.weight, or set it to 0 to save its cost",
        values={"value": life.value, "mass": life.mass, "gradient_norm": life.gradient, "gradient_share": share},
    )


WAYS_OUT = {
    "sft": "see that responses are there (roles) and that something which reaches them is trained (parts)",
    "kd": "see that the teacher differs from the student, and that something which reaches the responses is trained (parts)",
    "iva": "see that an instruction stands behind a picture (roles), choose another objective.iva.layer, or objective.iva.weight: 0",
    "tpa": "see that candidates are not all left out (objective.tpa.left_out), or objective.tpa.weight: 0",
}


# --- our rows are the model's own -------------------------------------------------------------------------------------


@torch.no_grad()
def projection(name: str, model: PreTrainedModel, batch: Mapping[str, Any]) -> Verdict:
    """Whether rows that the loss projects are the logits of the model's own forward pass."""
    batch = on_device(read_by(name, batch), model.device)
    inputs = model_inputs(batch)
    rows = ((batch["roles"][0] == RESPONSE).nonzero().flatten() - 1).tolist()
    own = plain.own_logits(model, inputs)[0, rows]
    ours = Projection(model)(read(model, inputs, keep_cache=False).hidden[0, rows]).to(own.dtype)
    scale = float(own.abs().max())
    apart = float((ours - own).abs().max()) / max(scale, torch.finfo(own.dtype).tiny)
    limit = PROJECTION.get(coarsest({"student": model}), PROJECTION[torch.bfloat16])
    return Verdict(
        name=f"projection.{name}",
        state="pass" if apart <= limit else "fail",
        measured=f"projected rows of the {name} differ from its own logits by {apart:.2g} of the largest, {scale:.3g}",
        expected=f"at most {limit:g}: rounding",
        way_out=f"the {name}'s forward pass does something to its logits (a soft cap, a scale) that the loss does not; use another "
        "model, or report its family",
        values={"difference": apart, "limit": limit, "largest_logit": scale},
    )


# --- the loss equals a plain re-computation ---------------------------------------------------------------------------


def fused_verdicts(
    models: Models, batch: Mapping[str, Any], objective: Objective, pairing: Pairing, pad_tokens: Mapping[str, int]
) -> list[Verdict]:
    """For each term, whether the loss on one sample equals the plain re-computation on it."""
    relative, absolute = TOLERANCE.get(coarsest(models), TOLERANCE[torch.bfloat16])
    verdicts = []
    for name in objective.active:
        if name == "iva" and objective.iva.resample and "teacher" in batch:
            verdicts.append(not_compared())
            continue
        try:
            ours, expected = (
                both_tpa(models, batch, objective, pairing, pad_tokens)
                if name == "tpa"
                else (
                    fused(models, padded(batch, pad_tokens), objective, name, pairing),
                    again(models, batch, objective, name, pairing),
                )
            )
        except MISHAPS as error:
            verdicts.append(unequal(name, f"{name} cannot be compared: {first_line(error).rstrip('.')}", relative, {}))
            continue
        same = abs(ours - expected) <= absolute + relative * abs(expected)
        said = f"{name} on one sample is {ours:.6g} by the loss and {expected:.6g} by plain re-computation"
        verdicts.append(unequal(name, said, relative, {"loss": ours, "plain": expected}, same=same))
    return verdicts


def not_compared() -> Verdict:
    """Says that resampled rows have no plain re-computation here."""
    return Verdict(
        name="fused.iva",
        state="warn",
        measured="iva resamples the teacher's visual rows, which the plain re-computation does not",
        expected="a comparison",
        way_out="none is needed: the tests compare resampled rows on tiny models",
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
        objective if objective.tpa.form == "packed" else only(objective, name),
        candidates,
        torch.Generator(student.device).manual_seed(0),
        pairing=pairing,
    )
    return float(out.terms[name])


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


def again(models: Models, batch: Mapping[str, Any], objective: Objective, name: str, pairing: Pairing) -> float:
    """One term other than tpa by plain re-computation."""
    ours, theirs = read_by("student", batch), read_by("teacher", batch)
    student = plain.own_logits(models["student"], model_inputs(ours))[0]
    if name == "sft":
        return plain.sft(student, ours["input_ids"][0], ours["roles"][0])
    student, roles = student[..., pairing.shared], (ours["roles"][0], theirs["roles"][0])
    teacher = plain.own_logits(models["teacher"], model_inputs(theirs))[0][..., pairing.shared]
    if name == "kd":
        return plain.kd(student, teacher, roles, objective.kd.temperature)
    layer = objective.iva.layer
    assert isinstance(layer, int)
    focus = plain.instruction_focus(models["teacher"], model_inputs(theirs), roles[1], layer)
    pictures = None if "pictures" not in ours else ours["pictures"][0]
    separately = objective.iva.images == "separately"
    return plain.iva(
        student, teacher, focus, roles, separately=separately, pictures=pictures, share=objective.iva.share
    )


def both_tpa(
    models: Models,
    batch: Mapping[str, Any],
    objective: Objective,
    pairing: Pairing,
    pad_tokens: Mapping[str, int],
) -> tuple[float, float]:
    """TPA over a few response positions and fixed candidates: by the loss, and by one full forward for each candidate."""
    tried = few_candidates(models["student"], batch, objective, pairing)
    candidates = batch["input_ids"][..., None].repeat(1, 1, TRIED)
    for step, tokens in tried.items():
        candidates[0, step] = torch.tensor(tokens, device=candidates.device)
    candidates = torch.nn.functional.pad(candidates, (0, 0, 0, PADDING))
    few = only_responses(batch, list(tried))
    ours = fused(models, padded(few, pad_tokens), objective, "tpa", pairing, candidates)
    views = {name: read_by(name, batch) for name in models}
    return ours, plain.tpa(models, views, tried, pairing.shared)


def only_responses(batch: Mapping[str, Any], steps: Sequence[int]) -> dict[str, Any]:
    """The sample with no response but the tokens at these places of the student's sequence."""
    kept = plain.response_ranks(batch["roles"][0], steps)

    def masked(part: Mapping[str, Any]) -> dict[str, Any]:
        others: Tensor = part["roles"] == RESPONSE
        others[0, others[0].nonzero().squeeze(-1)[kept]] = False
        fill = {"roles": OTHER, "labels": NO_LABEL}
        return {name: value.masked_fill(others, fill[name]) if name in fill else value for name, value in part.items()}

    few = masked(batch)
    return {**few, "teacher": masked(few["teacher"])} if "teacher" in few else few


def few_candidates(
    student: PreTrainedModel, batch: Mapping[str, Any], objective: Objective, pairing: Pairing
) -> dict[int, list[int]]:
    """For the first response positions, the gold token and the likeliest others, none of which is left out.

    Raises:
        ValueError: every response position holds a token that is left out.
    """
    left_out = set(left_out_tokens(student, objective.tpa, pairing))
    logits, ids = plain.own_logits(student, model_inputs(batch))[0], batch["input_ids"][0]
    tried: dict[int, list[int]] = {}
    for step in (batch["roles"][0] == RESPONSE).nonzero().flatten().tolist():
        gold = int(ids[step])
        if gold not in left_out and len(tried) < POSITIONS:
            likely: Int[Tensor, " most"] = (
                logits[step - 1].topk(min(TRIED + len(left_out) + 1, logits.shape[-1])).indices
            )
            others = [token for token in likely.tolist() if token not in left_out and token != gold]
            tried[step] = [gold, *others[: TRIED - 1]]
    if not tried:
        raise ValueError("every response token of the sample is left out of tpa; its row needs one that is not.")
    return tried
