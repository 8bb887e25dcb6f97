"""Every term once more, from full logits of the models' own forward pass: plain loops over one sample.

Written from the definitions in docs/method.md. It shares no code with the loss, so that one of the two being wrong shows. The models
are called as anybody calls them, `model(**inputs).logits`, so whatever a family does to its logits is in the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from align_ti.data.roles import INSTRUCTION, RESPONSE, VISUAL, model_inputs
from align_ti.models.families import attention_modules, language_model


@torch.no_grad()
def own_logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "batch seq vocab"]:
    """The logits that the model's own forward pass gives, in float32 or wider."""
    asked = inputs["input_ids"].device
    logits: Tensor = model(**moved(inputs, model.device)).logits
    return logits.to(asked, torch.promote_types(logits.dtype, torch.float32))


def moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The inputs on a device: a teacher may be on another than the student."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def kl_of_rows(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """sum p_T (log p_T - log p_S) of each row, times the squared temperature."""
    log_t, log_s = (torch.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    # Where the teacher's probability is 0 the product is 0, and not 0 times infinity.
    return torch.where(log_t.exp() == 0, 0.0, log_t.exp() * (log_t - log_s)).sum(-1) * temperature**2


def sft(student: Float[Tensor, "seq vocab"], ids: Int[Tensor, " seq"], roles: Int[Tensor, " seq"]) -> float:
    """Mean cross-entropy of the response tokens, each predicted by the row before it."""
    steps = [step for step in range(1, len(ids)) if roles[step] == RESPONSE]
    rows = torch.stack([student[step - 1] for step in steps])
    return float(nn.functional.cross_entropy(rows, ids[steps]))


Roles = tuple[Int[Tensor, " seq"], Int[Tensor, " teacher_seq"]]
"""The roles of the student's tokens and of the teacher's: two sequences that hold the same responses."""


def kd(
    student: Float[Tensor, "seq shared"], teacher: Float[Tensor, "teacher_seq shared"], roles: Roles, temperature: float
) -> float:
    """Mean KL at the rows before the response tokens."""
    ours, theirs = ([step - 1 for step in range(1, len(of)) if of[step] == RESPONSE] for of in roles)
    return float(kl_of_rows(teacher[theirs], student[ours], temperature).mean())


def iva(
    student: Float[Tensor, "seq shared"],
    teacher: Float[Tensor, "teacher_seq shared"],
    focus: Float[Tensor, " teacher_seq"],
    roles: Roles,
    *,
    separately: bool,
    pictures: Int[Tensor, " seq"] | None = None,
    share: float = 1.0,
) -> float:
    """KL at the visual rows, unshifted, each weighted by its share of the attention that the instruction pays."""
    ours, theirs = ([step for step in range(len(of)) if of[step] == VISUAL] for of in roles)
    values, weights = kl_of_rows(teacher[theirs], student[ours]), focus[theirs]
    runs = (visual_runs(roles[0].tolist()) if pictures is None else by_picture(pictures)) if separately else [ours]
    ranks = [[ours.index(step) for step in run] for run in runs]
    seen = [run for run in ranks if float(weights[run].sum()) > 0]
    counted = {rank: float(weights[rank] / weights[run].sum()) / len(seen) for run in seen for rank in run}
    kept, reached = 0.0, 0.0
    for rank in sorted(counted, key=lambda rank: -counted[rank]):
        # The most looked-at tokens that together hold the share; those behind them count nothing.
        if share < 1 and reached >= share:
            break
        kept, reached = kept + counted[rank] * float(values[rank]), reached + counted[rank]
    return kept / reached if counted else 0.0


def response_ranks(roles: Int[Tensor, " seq"], steps: Sequence[int]) -> list[int]:
    """Which response tokens, counted from the first, stand at these places."""
    places = [step for step in range(len(roles)) if roles[step] == RESPONSE]
    return [places.index(step) for step in steps]


def by_picture(pictures: Int[Tensor, " seq"]) -> list[list[int]]:
    """The positions of each picture's visual tokens."""
    return [
        [step for step, number in enumerate(pictures.tolist()) if number == wanted]
        for wanted in sorted(set(pictures.tolist()) - {0})
    ]


def visual_runs(roles: Sequence[int]) -> list[list[int]]:
    """The positions of each picture: runs of adjacent visual tokens."""
    runs: list[list[int]] = []
    for step, role in enumerate(roles):
        if role == VISUAL:
            if step == 0 or roles[step - 1] != VISUAL:
                runs.append([])
            runs[-1].append(step)
    return runs


@torch.no_grad()
def instruction_focus(
    teacher: PreTrainedModel, inputs: Mapping[str, Any], roles: Int[Tensor, " seq"], layer: int
) -> Float[Tensor, " seq"]:
    """The attention that instruction tokens pay to every token, from the matrix that eager attention gives at one layer."""
    matrices: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        matrices.append(output[1])

    handle = attention_modules(teacher)[layer].register_forward_hook(keep)
    try:
        with eager(teacher):
            teacher(**moved(inputs, teacher.device))
    finally:
        handle.remove()
    matrix = matrices[0][0].to(roles.device, torch.promote_types(matrices[0].dtype, torch.float32))
    return matrix.mean(0)[roles == INSTRUCTION].mean(0)


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """The language model runs on eager attention inside the block, which hands its matrix out."""
    found: dict[int, Any] = {id(m.config): m.config for m in language_model(model).modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in found.items()}
    try:
        for config in found.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in found.items():
            config._attn_implementation = before[key]


def tpa(
    models: Mapping[str, PreTrainedModel],
    views: Mapping[str, Mapping[str, Any]],
    candidates: Mapping[int, Sequence[int]],
    shared: slice | Tensor,
) -> float:
    """Mean over positions, and over the candidates of each, of the KL behind a candidate: one full forward for every candidate.

    The candidate is put in place of the gold token; tokens behind it are not seen by its row, since attention is causal. `candidates`
    are by the student's positions; the teacher's are those of the same response tokens.
    """
    ranks, positions = response_ranks(views["student"]["roles"][0], list(candidates)), []
    for rank, tried in zip(ranks, candidates.values(), strict=True):
        values = []
        for token in tried:
            rows = {}
            for name, model in models.items():
                inputs, roles = model_inputs(views[name]), views[name]["roles"][0]
                step = [place for place in range(len(roles)) if roles[place] == RESPONSE][rank]
                ids = inputs["input_ids"].clone()
                ids[0, step] = token
                rows[name] = own_logits(model, {**inputs, "input_ids": ids})[0, step, shared]
            values.append(float(kl_of_rows(rows["teacher"], rows["student"])))
        positions.append(sum(values) / len(values))
    return sum(positions) / len(positions)
