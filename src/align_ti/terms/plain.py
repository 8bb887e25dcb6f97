"""What plain re-computations of terms are made of: one sample, full forward passes, whole logits and attention matrices.

It shares no computation with the loss, so that one of the two being wrong shows. The models are called as anybody calls them,
`model(**inputs).logits`, so whatever a family does to its logits is in the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from align_ti.data import roles
from align_ti.losses.divergences.base import Divergence
from align_ti.models.attention import running_on
from align_ti.models.families import attention_modules


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as each model reads it, and what the models make of it in full.

    `inputs` has the batch of one for `student` and `teacher`; both are one and the same where the two read the same sequence.
    `candidates` are tokens to try, by position in the student's sequence.
    """

    INSTRUCTION: ClassVar[int] = roles.INSTRUCTION
    RESPONSE: ClassVar[int] = roles.RESPONSE
    VISUAL: ClassVar[int] = roles.VISUAL

    models: Mapping[str, PreTrainedModel]
    inputs: Mapping[str, Mapping[str, Any]]
    shared: slice | Tensor = field(default_factory=lambda: slice(None))
    candidates: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def two_sequences(self) -> bool:
        """Whether the teacher reads inputs of its own."""
        return self.inputs["student"] is not self.inputs["teacher"]

    def ids(self, name: str) -> Int[Tensor, " seq"]:
        """The tokens of a model's sequence."""
        found: Tensor = self.inputs[name]["input_ids"][0]
        return found

    def roles(self, name: str) -> Int[Tensor, " seq"]:
        """Their roles."""
        found: Tensor = self.inputs[name]["roles"][0]
        return found

    def real(self, name: str) -> list[int]:
        """The positions that are no padding."""
        mask = self.inputs[name].get("attention_mask")
        return list(range(len(self.ids(name)))) if mask is None else mask[0].nonzero().flatten().tolist()

    def response_steps(self, name: str) -> list[int]:
        """The positions of the response tokens."""
        return [step for step, role in enumerate(self.roles(name).tolist()) if role == self.RESPONSE]

    def rank(self, step: int) -> int:
        """Which response token, counted from the first, stands at a position of the student's sequence."""
        return self.response_steps("student").index(step)

    def pictures(self) -> list[list[int]]:
        """The positions of each image's visual tokens in the student's sequence."""
        numbers = self.inputs["student"].get("pictures")
        if numbers is None:
            return visual_runs(self.roles("student").tolist())
        counted: list[int] = numbers[0].tolist()
        return [
            [step for step, number in enumerate(counted) if number == wanted] for wanted in sorted(set(counted) - {0})
        ]

    def logits(self, name: str, *, shared: bool = True) -> Float[Tensor, "seq vocab"]:
        """The logits of every position, of the tokens that both models know unless `shared` is false."""
        found = own_logits(self.models[name], roles.model_inputs(self.inputs[name]))[0]
        return found[..., self.shared] if shared else found

    def divergence(
        self,
        between: Divergence,
        teacher: tuple[str, Sequence[int]],
        student: tuple[str, Sequence[int]],
        temperature: float = 1.0,
    ) -> Float[Tensor, " rows"]:
        """The divergence of rows, each given as a model and positions in its sequence, times the squared temperature."""
        log_p, log_q = (
            torch.log_softmax(self.logits(name)[list(rows)] / temperature, dim=-1) for name, rows in (teacher, student)
        )
        wide = torch.promote_types(log_p.dtype, log_q.dtype)
        return between.values(log_p.to(wide), log_q.to(wide)) * temperature**2

    @torch.no_grad()
    def hidden(self, name: str) -> Float[Tensor, "seq hidden"]:
        """The hidden states that the model's head reads, from its own list of them."""
        model = self.models[name]
        inputs = moved(roles.model_inputs(self.inputs[name]), model.device)
        states: Tensor = model(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-1][0]
        return states.to(self.ids(name).device, torch.promote_types(states.dtype, torch.float32))

    @torch.no_grad()
    def attention(self, name: str, layer: int) -> Float[Tensor, "heads queries keys"]:
        """The attention matrix that the model's eager attention gives at one layer."""
        model, matrices = self.models[name], []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            matrices.append(output[1])

        handle = attention_modules(model)[layer].register_forward_hook(keep)
        try:
            with running_on(model, "eager"):
                model(**moved(roles.model_inputs(self.inputs[name]), model.device))
        finally:
            handle.remove()
        matrix: Tensor = matrices[0][0]
        return matrix.to(self.ids(name).device, torch.promote_types(matrix.dtype, torch.float32))

    def with_token(self, step: int, token: int) -> Sample:
        """The sample with another token in place of the response token at a position of the student's sequence, in both sequences.

        What stands behind it is not seen by its row, since attention is causal.
        """
        rank, changed = self.rank(step), {}
        for name in self.models:
            ids = self.inputs[name]["input_ids"].clone()
            ids[0, self.response_steps(name)[rank]] = token
            changed[name] = {**self.inputs[name], "input_ids": ids}
        return replace(self, inputs=changed)


def visual_runs(marked: Sequence[int]) -> list[list[int]]:
    """The positions of each image: runs of adjacent visual tokens."""
    runs: list[list[int]] = []
    for step, role in enumerate(marked):
        if role == roles.VISUAL:
            if step == 0 or marked[step - 1] != roles.VISUAL:
                runs.append([])
            runs[-1].append(step)
    return runs


@torch.no_grad()
def own_logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "batch seq vocab"]:
    """The logits that the model's own forward pass gives, in float32 or wider."""
    asked = inputs["input_ids"].device
    logits: Tensor = model(**moved(inputs, model.device)).logits
    return logits.to(asked, torch.promote_types(logits.dtype, torch.float32))


def moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The inputs on a device, for a teacher on another than the student's."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
