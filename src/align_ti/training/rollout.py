"""On-policy batches: the student answers in place of the data, and both models read what it wrote.

On-policy is data, not a term: a batch goes in, and a batch like it comes out, whose last responses are the student's own. Tokens
are drawn without gradient, so what the student learns is the next-token distributions along its answer, not which answer to give.

Source: Agarwal et al., On-Policy Distillation of Language Models (GKD), arXiv:2306.13649.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from align_ti.config import OnPolicy
from align_ti.data.lengths import last_response
from align_ti.data.roles import (
    NO_LABEL,
    PER_TOKEN,
    RESPONSE,
    TEACHER_ATTENTION,
    TEACHER_HIDDEN,
    VISUAL,
    model_inputs,
)
from align_ti.errors import BatchError, ModelError
from align_ti.interactions.transitions import sampling_distribution
from align_ti.models import families
from align_ti.models.overrides import Projection
from align_ti.models.pairing import Pairing

OF_ONE_ANSWER = (
    "position_ids",
    "cross_attention_mask",
    "inputs_embeds",
    "candidates",
    TEACHER_HIDDEN,
    TEACHER_ATTENTION,
)
"""Fields about the recorded answer, which cannot be computed here for another one."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A batch whose last responses the student wrote, and which of its samples were cut at the limit of tokens.

    `batch` has `student_written` [batch, seq], 1 on the tokens that the student wrote, 0 elsewhere.
    """

    batch: dict[str, Any]
    cut: Bool[Tensor, " batch"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands before the last response of one sample.

    `fields` have one entry a token, padding left out; `marks` hold what other fields than ours have at the response's first token, such
    as PaliGemma's mark of tokens that are not of the prefix.
    """

    fields: dict[str, Shaped[Tensor, " prompt"]]
    marks: dict[str, Tensor]


@torch.no_grad()
def respond(
    student: PreTrainedModel,
    batch: Mapping[str, Any],
    settings: OnPolicy,
    generator: torch.Generator | None = None,
    pairing: Pairing | None = None,
) -> Rollout:
    """The batch with the last response of every sample replaced by one that the student draws, padded on the right.

    Earlier turns and images stay as they are; what stands behind the last response (the end of a template) is dropped. An answer ends
    with its first end-of-turn token, or without one where it reaches the limit. A teacher's own inputs, under `teacher`, get the
    same answers. Afterwards the student is as it was, and so is the global random state if a generator is given.

    Args:
        student: the model that answers.
        batch: as `distillation_loss` takes it, padded on either side.
        settings: how answers are drawn; `probability` is the caller's business.
        generator: draws the tokens; by default the global one does.
        pairing: what `pair_up` found: tokens that one of the two models does not know, and the teacher's image token, are not drawn.

    Raises:
        BatchError: a sample has no response, nothing before it, or an image behind it; or a field is made for the recorded answer.
        ModelError: the student's configs name no token that ends a turn.
    """
    pairing = Pairing() if pairing is None else pairing
    image_tokens = placeholders(student) | set(pairing.teacher_image_tokens)
    prompts = prompts_of(batch, image_tokens, "")
    theirs = prompts_of(batch["teacher"], image_tokens, "the teacher's ") if "teacher" in batch else None
    known = Projection(student).out_features
    never = sorted(token for token in image_tokens | set(pairing.unshared(known)) if token < known)
    answers, cut = answers_to(student, batch, prompts, settings, never, generator)
    pad = families.end_tokens(student)[0]
    made = with_answers(batch, prompts, answers, pad)
    if theirs is not None:
        made["teacher"] = with_answers(batch["teacher"], theirs, answers, pad)
    return Rollout(made, cut)


def placeholders(model: PreTrainedModel) -> set[int]:
    """The token ids that stand for no word but for a piece of an image, a video or a sound."""
    names = (f"{kind}_token_{ending}" for kind in ("image", "video", "audio") for ending in ("id", "index"))
    return {int(value) for name in names if (value := getattr(model.config, name, None)) is not None}


# --- the prompts ------------------------------------------------------------------------------------------------------


def prompts_of(batch: Mapping[str, Any], image_tokens: set[int], whose: str) -> list[Prompt]:
    """What stands before the last response of each sample; `whose` is for messages.

    Raises:
        BatchError: a sample has no response, nothing before it, or an image behind it; or a field is made for the recorded answer.
    """
    given = [name for name in OF_ONE_ANSWER if batch.get(name) is not None]
    if given:
        raise BatchError(
            f"{whose}{', '.join(given)} of the batch is made for the recorded answer, but the student is to write another (on_policy); "
            "leave it out of the batch, or leave on_policy out."
        )
    ids, roles, real = batch["input_ids"], batch["roles"], families.real_tokens(batch)
    pictured = (roles == VISUAL) | torch.isin(
        ids, torch.tensor(sorted(image_tokens), dtype=ids.dtype, device=ids.device)
    )
    fields = {name: batch[name] for name in PER_TOKEN if name in batch} | {"attention_mask": real.to(ids.dtype)}
    fields.setdefault("student_written", torch.zeros_like(ids))
    prompts = []
    for sample in range(len(ids)):
        place = f"sample {sample}: {whose}"
        if not bool((roles[sample] == RESPONSE).any()):
            raise BatchError(
                f"{place}batch has no response here, so there is none that the student could write in place of it (on_policy); "
                "give each sample a response, or leave on_policy out."
            )
        start = last_response(roles[sample])
        before = real[sample].clone()
        before[start:] = False
        if not bool(before.any()):
            raise BatchError(
                f"{place}response has no token before it, so there is nothing to answer; give each sample an instruction."
            )
        behind = (pictured[sample] & real[sample])[start:].nonzero()
        if len(behind):
            raise BatchError(
                f"{place}token {start + int(behind[0])} is an image's and stands behind the beginning of the last response, which the "
                "student is to write (on_policy), so the image would have no place; let images stand before the last response, or "
                "leave on_policy out."
            )
        prompts.append(
            Prompt(
                {name: value[sample][before] for name, value in fields.items()},
                {name: value[sample, start] for name, value in fields.items() if name not in WRITTEN},
            )
        )
    return prompts


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "input_ids": lambda answer: answer,
    "labels": lambda answer: answer,
    "roles": lambda answer: torch.full_like(answer, RESPONSE),
    "attention_mask": torch.ones_like,
    "student_written": torch.ones_like,
    "pictures": torch.zeros_like,
}
"""What our own fields hold on an answer. Others have there what they had on the response that it replaces."""


def with_answers(
    batch: Mapping[str, Any], prompts: Sequence[Prompt], answers: Sequence[Tensor], pad: int
) -> dict[str, Any]:
    """The batch with each prompt followed by its answer, padded on the right; what is not of tokens stays."""
    fills = {"input_ids": pad, "labels": NO_LABEL}
    fields: dict[str, Tensor] = {}
    for name in prompts[0].fields:
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            value, words = prompt.fields[name], answer.to(prompt.fields[name].device)
            own = WRITTEN[name](words) if name in WRITTEN else prompt.marks[name].expand(len(words))
            rows.append(torch.cat([value, own.to(value.dtype)]))
        fields[name] = pad_sequence(rows, batch_first=True, padding_value=fills.get(name, 0))
    return {**batch, **fields}


# --- the answers ------------------------------------------------------------------------------------------------------


class Draw(LogitsProcessor):
    """Leaves one token of each row: the one that is drawn.

    transformers draws from the global random state, and takes its options partly from the model. Here the draw is done with a
    generator of its own and exactly the options given, and choosing the most probable of what is left, as generation then does, is no
    choice any more.
    """

    def __init__(self, settings: OnPolicy, never: Sequence[int], generator: torch.Generator | None) -> None:
        self.settings, self.generator = settings, generator
        self.never = torch.tensor(never, dtype=torch.long)

    def __call__(
        self, input_ids: Int[Tensor, "rows seq"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """Scores that are finite at the drawn token alone."""
        self.never = self.never.to(scores.device)
        probability = sampling_distribution(
            scores.index_fill(-1, self.never, float("-inf")),
            self.settings.temperature,
            self.settings.top_k,
            self.settings.top_p,
        )
        device = scores.device if self.generator is None else self.generator.device
        drawn = torch.multinomial(probability.to(device), 1, generator=self.generator).to(scores.device)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


def answers_to(
    student: PreTrainedModel,
    batch: Mapping[str, Any],
    prompts: Sequence[Prompt],
    settings: OnPolicy,
    never: Sequence[int],
    generator: torch.Generator | None,
) -> tuple[list[Tensor], Bool[Tensor, " batch"]]:
    """The student's answer to each prompt up to its first end-of-turn token, and which have none since they reached the limit."""
    ends = families.end_tokens(student)
    if not ends:
        raise ModelError(
            f"{type(student).__name__} names no token that ends a turn, so its answers would never end (on_policy); an eos_token_id in "
            "its generation config is accepted; set model.generation_config.eos_token_id."
        )
    asked = {
        # Padding stands in front, so that every answer begins at the same place.
        name: pad_sequence(
            [prompt.fields[name] for prompt in prompts],
            batch_first=True,
            padding_value=ends[0] if name == "input_ids" else 0,
            padding_side="left",
        )
        for name in prompts[0].fields
    }
    inputs = model_inputs({**batch, **asked})
    asks_for = inspect.signature(type(student).forward).parameters
    if "mm_token_type_ids" in asks_for and inputs.get("image_grid_thw") is not None:
        # Without it generation counts positions as in a text.
        inputs.setdefault("mm_token_type_ids", (inputs["input_ids"] == families.image_token(student)).int())
    inputs = {name: value.to(student.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    generate: Callable[..., Tensor] = student.generate  # type: ignore[assignment]
    with in_eval_mode(student), generating_by(student, config):
        made = generate(**inputs, generation_config=config, logits_processor=[Draw(settings, never, generator)])
    made = made[:, inputs["input_ids"].shape[1] :].to(batch["input_ids"].device)
    ended = torch.isin(made, torch.tensor(ends, device=made.device))
    # Up to the first end, itself included.
    lengths = ((ended.cumsum(-1) - ended.int()) == 0).sum(-1).tolist()
    return [row[:length] for row, length in zip(made, lengths, strict=True)], ~ended.any(-1)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block the model has no dropout and recomputes no layer; afterwards each part is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Inside the block this is the model's generation config, whose options transformers takes wherever a call leaves them open."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before
