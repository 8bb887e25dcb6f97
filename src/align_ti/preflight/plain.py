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

from align_ti.data.roles import INSTRUCTION, RESPONSE, VISUAL
from align_ti.models.families import attention_modules, language_model


@torch.no_grad()
def own_logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "batch seq vocab"]:
    """The logits that the model's own forward pass gives, in float32 or wider."""
    logits: Tensor = model(**inputs).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kl_of_rows(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """sum p_T (log p_T - log p_S) of each row, times the squared temperature."""
    shared = min(teacher.shape[-1], student.shape[-1])
    log_t = torch.log_softmax(teacher[..., :shared] / temperature, dim=-1)
    log_s = torch.log_softmax(student[..., :shared] / temperature, dim=-1)
    # Where the teacher's probability is 0 the product is 0, and not 0 times infinity.
    return torch.where(log_t.exp() > 0, log_t.exp() * (log_t - log_s), 0.0).sum(-1) * temperature**2


def sft(student: Float[Tensor, "seq vocab"], ids: Int[Tensor, " seq"], roles: Int[Tensor, " seq"]) -> float:
    """Mean cross-entropy of the response tokens, each predicted by the row before it."""
    steps = [step for step in range(1, len(ids)) if roles[step] == RESPONSE]
    rows = torch.stack([student[step - 1] for step in steps])
    return float(nn.functional.cross_entropy(rows, ids[steps]))


def kd(
    student: Float[Tensor, "seq vocab"],
    teacher: Float[Tensor, "seq teacher_vocab"],
    roles: Int[Tensor, " seq"],
    temperature: float,
) -> float:
    """Mean KL at the rows before the response tokens."""
    before = [step - 1 for step in range(1, len(roles)) if roles[step] == RESPONSE]
    return float(kl_of_rows(teacher[before], student[before], temperature).mean())


def iva(
    student: Float[Tensor, "seq vocab"],
    teacher: Float[Tensor, "seq teacher_vocab"],
    focus: Float[Tensor, " seq"],
    roles: Int[Tensor, " seq"],
    *,
    separately: bool,
) -> float:
    """KL at the visual rows, unshifted, each weighted by its share of the attention that the instruction pays."""
    values = kl_of_rows(teacher, student)
    runs = visual_runs(roles.tolist())
    if not separately:
        runs = [[step for run in runs for step in run]]
    seen = [run for run in runs if float(focus[run].sum()) > 0]
    return float(sum((focus[run] / focus[run].sum() * values[run]).sum() for run in seen) / max(len(seen), 1))


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
            teacher(**inputs)
    finally:
        handle.remove()
    matrix = matrices[0][0].to(torch.promote_types(matrices[0].dtype, torch.float32))
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
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Mapping[str, Any],
    candidates: Mapping[int, Sequence[int]],
) -> float:
    """Mean over positions, and over the candidates of each, of the KL behind a candidate: one full forward for every candidate.

    The candidate is put in place of the gold token; tokens behind it are not seen by its row, since attention is causal.
    """
    positions = []
    for step, tried in candidates.items():
        values = []
        for token in tried:
            ids = inputs["input_ids"].clone()
            ids[0, step] = token
            rows = [own_logits(model, {**inputs, "input_ids": ids})[0, step] for model in (teacher, student)]
            values.append(float(kl_of_rows(rows[0], rows[1])))
        positions.append(sum(values) / len(values))
    return sum(positions) / len(positions)
