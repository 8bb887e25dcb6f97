"""What a batch says of its tokens, and whether its parts contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align_ti.data.roles import INSTRUCTION, NO_LABEL, RESPONSE, VISUAL
from align_ti.data.spans import spans
from align_ti.errors import BatchError
from align_ti.notebooks import marked, paragraph, table

FIELDS = ("input_ids", "labels", "roles", "pictures", "student_written")
"""The fields of a batch that `Tokens` holds."""


SHOWN, LETTERS = 8, 400
"""Samples of a batch that a notebook shows, and letters of each span of them."""


class Batch(dict[str, Any]):
    """What the collator returns: a dict of tensors, which a notebook shows with the roles of its tokens.

    `tokenizer` spells the tokens there. A batch that is pickled, copied or moved to a device is without it, so that no worker process
    sends a tokenizer with every batch.
    """

    tokenizer: PreTrainedTokenizerBase | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def _repr_html_(self) -> str:
        """The first samples without their padding, each span labelled with its role, and the shape of every field."""
        lines = []
        for index in range(min(SHOWN, len(self["input_ids"]))):
            ids, roles = self["input_ids"][index], self["roles"][index]
            real = self["attention_mask"][index].bool() if "attention_mask" in self else torch.ones_like(ids).bool()
            told = "".join(
                marked(span.role, f"{span.role} {span.tokens}", span.text[:LETTERS])
                for span in spans(ids[real].tolist(), roles[real].tolist(), self.tokenizer)
            )
            lines.append(f'<p style="line-height:1.7"><b>{index}</b> {told}</p>')
        left = len(self["input_ids"]) - len(lines)
        if left > 0:
            lines.append(paragraph(f"and {left} more samples"))
        fields = {name: value for name, value in self.items() if isinstance(value, Tensor)}
        shapes = [[name, str(list(value.shape)), str(value.dtype)] for name, value in fields.items()]
        lines.append(table(("field", "shape", "type"), shapes))
        if isinstance(self.get("teacher"), Batch):
            lines += [paragraph("what the teacher reads:"), self["teacher"]._repr_html_()]
        return "".join(lines)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The student's sequence of a batch as terms see it before any model has read it.

    `pictures` is the number of each visual token's image, from 1. `student_written` marks response tokens that the student wrote.
    """

    ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    roles: Int[Tensor, "batch seq"]
    pictures: Int[Tensor, "batch seq"] | None = None
    student_written: Bool[Tensor, "batch seq"] | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any], device: torch.device | None = None) -> Tokens:
        """The tokens of a batch, on a device."""
        moved = {name: value.to(device or value.device) for name in FIELDS if (value := batch.get(name)) is not None}
        written = moved.get("student_written")
        return cls(
            moved["input_ids"],
            moved["labels"],
            moved["roles"],
            moved.get("pictures"),
            None if written is None else written.bool(),
        )

    @property
    def visual(self) -> Bool[Tensor, "batch seq"]:
        """Where visual tokens stand."""
        return self.roles == VISUAL

    @property
    def instruction(self) -> Bool[Tensor, "batch seq"]:
        """Where instruction tokens stand."""
        return self.roles == INSTRUCTION

    @property
    def response(self) -> Bool[Tensor, "batch seq"]:
        """Where response tokens stand."""
        return self.roles == RESPONSE

    @property
    def predicts(self) -> Bool[Tensor, "batch seq"]:
        """The rows that predict a response token: the position before each."""
        return next_labels(self.labels) != NO_LABEL

    @property
    def pictured(self) -> Bool[Tensor, " batch"]:
        """The samples that hold a visual token."""
        return self.visual.any(-1)


def next_labels(labels: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """At each position the label of the token after it, which is what its row predicts."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)


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
