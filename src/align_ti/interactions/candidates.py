"""Candidates: tokens that are tried in place of response tokens, drawn as a term's options say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.roles import RESPONSE
from align_ti.errors import BatchError
from align_ti.interactions.estimators import draw_weighted
from align_ti.interactions.transitions import Candidates, Transitions, draw, plan_transitions, sampling_distribution
from align_ti.models import families
from align_ti.models.overrides import Projection
from align_ti.models.pairing import Pairing
from align_ti.models.recomputation import reuse_possible
from align_ti.models.sharding import run_part_gathered
from align_ti.options import Options

DRAWN_LOGITS = {"cpu": 2**24, "accelerator": 2**25}
"""Logits that candidates are drawn from at a time; drawing holds several tensors of their size in float32 or wider."""


class CandidateOptions(Options):
    """Which candidate tokens are tried, and how the models compute them; the options of a term that compares rows of
    candidates."""

    candidates: int = Field(default=4, ge=1)
    """Tokens tried at each response position (n)."""
    source: Literal["student", "teacher", "gold"] = "student"
    """Whose distribution candidates are drawn from; gold: the answer's own next token, without sampling."""
    draw: Literal["with_replacement", "without_replacement", "top_and_tail", "stratified"] = "with_replacement"
    """How candidates are drawn and weighed; the expectation of the term is the same. with_replacement: equal weights, the paper's.
    without_replacement: distinct tokens, 8 at most. top_and_tail: the gold token and the `enumerated` most probable ones exactly, the
    others drawn from the rest. stratified: draws spread evenly over the distribution, the gold token's share exact."""
    enumerated: int = Field(default=0, ge=0)
    """How many of the candidates are the most probable tokens, with draw: top_and_tail. The gold token is not among them."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Sampling temperature of the candidates; no effect on the divergence."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from the k most probable tokens only."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the smallest set of most probable tokens that together reach this probability."""
    left_out: tuple[int, ...] | None = None
    """Token ids that have no next step and are left out when drawn. By default the tokens that end a turn, by the student's
    generation config, and its image token."""
    form: Literal["auto", "reuse", "packed"] = "auto"
    """How candidates are evaluated: over the first pass's cache, or packed with the gold tokens into one pass. auto: reuse, where
    the model keeps a cache. The result is the same number."""

    @model_validator(mode="after")
    def _draw_fits(self) -> CandidateOptions:
        if self.source == "gold" and self.draw != "with_replacement":
            raise ValueError(
                f"draw is {self.draw}, but source is gold, where nothing is drawn; leave draw out, or give source: student or teacher"
            )
        if self.enumerated and self.draw != "top_and_tail":
            raise ValueError(
                f"enumerated is {self.enumerated}, but draw is {self.draw}; give draw: top_and_tail, or leave enumerated out"
            )
        if self.enumerated >= self.candidates:
            raise ValueError(
                f"enumerated is {self.enumerated} of {self.candidates} candidates, so none is left for the tail, and the estimate "
                "would be biased; give fewer enumerated or more candidates"
            )
        if self.draw == "without_replacement" and self.candidates > 8:
            raise ValueError(
                f"candidates is {self.candidates}; draw: without_replacement takes 8 at most, as its weights go through all 2^n "
                "subsets; give fewer, or draw: stratified"
            )
        return self

    def is_packed(self, model: PreTrainedModel) -> bool:
        """Whether this model takes the packed form."""
        return self.form == "packed" or (self.form == "auto" and not reuse_possible(model))


@dataclass(frozen=True, slots=True)
class Source:
    """What candidates are drawn from: a model, the roles of its sequence, and the hidden states that it made of it."""

    model: PreTrainedModel
    roles: Int[Tensor, "batch source_seq"]
    hidden: Float[Tensor, "batch source_seq hidden"]


@torch.no_grad()
def draw_candidates(
    source: Source | None,
    student: PreTrainedModel,
    ids: Int[Tensor, "batch seq"],
    response: Bool[Tensor, "batch seq"],
    options: CandidateOptions,
    generator: torch.Generator | None,
    pairing: Pairing,
) -> Candidates:
    """Tokens to try at each of the student's response positions, drawn from a model's distribution there; the gold tokens if no
    source is given."""
    if source is None:
        return Candidates(ids[..., None].clone())
    # In both sequences the responses are the same tokens in the same order.
    sample, step = (source.roles == RESPONSE).nonzero(as_tuple=True)
    # The row that predicts a token is the position before it.
    hidden, project = source.hidden[sample, step - 1], Projection(source.model)
    # The teacher may be on another device than the generator.
    device = hidden.device if generator is None else generator.device
    on_cpu = hidden.device.type == "cpu"
    gold, chunk = (
        ids[response].to(device),
        max(1, DRAWN_LOGITS["cpu" if on_cpu else "accelerator"] // project.out_features),
    )
    # What the student has no row for is no candidate either.
    left_out = (
        *left_out_tokens(student, options, pairing),
        *range(Projection(student).out_features, project.out_features),
    )

    def draws() -> list[tuple[Tensor, Tensor]]:
        return [
            draw_as(options, project(rows).to(device), its, left_out, generator)
            for rows, its in zip(hidden.split(chunk), gold.split(chunk), strict=True)
        ]

    # One call of the head, however many chunks there are on this process.
    drawn = run_part_gathered(families.head(source.model), draws)
    tokens, weights = (laid_out(torch.cat(parts), response) for parts in zip(*drawn, strict=True))
    return Candidates(tokens, None if options.draw == "with_replacement" else weights)


def draw_as(
    options: CandidateOptions,
    logits: Float[Tensor, "rows vocab"],
    gold: Int[Tensor, " rows"],
    left_out: tuple[int, ...],
    generator: torch.Generator | None,
) -> tuple[Int[Tensor, "rows slots"], Float[Tensor, "rows slots"]]:
    """The candidates of some rows as the options say, with their weights; equal ones for plain draws, left-out tokens included."""
    sampling = (options.temperature, options.top_k, options.top_p)
    if options.draw == "with_replacement":
        tokens = draw(
            logits,
            options.candidates,
            temperature=sampling[0],
            top_k=sampling[1],
            top_p=sampling[2],
            generator=generator,
        )
        return tokens, torch.ones(tokens.shape, device=tokens.device)
    probability = sampling_distribution(logits, *sampling)
    return draw_weighted(
        probability,
        gold,
        options.candidates,
        left_out,
        options.draw,
        enumerated=options.enumerated,
        generator=generator,
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


def plan_candidates(
    student: PreTrainedModel,
    batch: Mapping[str, Any],
    candidates: Candidates | Int[Tensor, "batch seq candidates"],
    options: CandidateOptions,
    pairing: Pairing | None = None,
) -> Transitions:
    """The rows and weights that the candidates of a batch come to."""
    left_out = left_out_tokens(student, options, Pairing() if pairing is None else pairing)
    # A teacher whose vocabulary is padded further may draw ids that the student has no row for.
    known = Projection(student).out_features
    roles: Tensor = batch["roles"]
    return plan_transitions(candidates.to(roles.device), roles == RESPONSE, batch["input_ids"], left_out, known)


def left_out_tokens(student: PreTrainedModel, options: CandidateOptions, pairing: Pairing) -> tuple[int, ...]:
    """The tokens that have no next step: ends of a turn, the image token, which stands for no word, and what the teacher does not
    know."""
    unknown = pairing.unshared(Projection(student).out_features) + pairing.teacher_image_tokens
    if options.left_out is not None:
        return options.left_out + unknown
    image = families.image_token(student)
    return families.end_tokens(student) + (() if image is None else (image,)) + unknown
