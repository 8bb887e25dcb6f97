"""What spreads a run over several devices, and which options of a run that excludes. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]
"""ddp: every device holds all. fsdp2, zero3: weights, gradients and optimizer are sharded. zero2: gradients and optimizer are."""

ENGINES: tuple[Engine, ...] = get_args(Engine)
"""All of them."""

DEEPSPEED: tuple[Engine, ...] = ("zero2", "zero3")
"""The engines that are DeepSpeed's."""

SHARDED_WEIGHTS: tuple[Engine, ...] = ("fsdp2", "zero3")
"""The engines under which a device holds a part of the student's weights."""


class Refusal(NamedTuple):
    """An option that an engine cannot train with."""

    option: str
    reason: str
    accepted: str

    def __str__(self) -> str:
        return f"{self.option}, and {self.reason}; accepted: {self.accepted}."


def refusals(
    engine: str, *, muon: bool, half: Literal["bf16", "fp16"] | None, on_policy: bool, gradient_shares: bool
) -> Iterator[Refusal]:
    """The options of a run that an engine cannot train with.

    Args:
        engine: one of `ENGINES`; any other word, such as `one`, refuses nothing.
        muon: whether the optimizer is Muon (training.optimizer).
        half: the kind of mixed precision that is on (training.bf16, training.fp16).
        on_policy: whether the student answers some batches (data.on_policy).
        gradient_shares: whether each term's share in the gradient is measured (training.gradient_shares_every).
    """
    if muon and engine in DEEPSPEED:
        yield Refusal(
            f"training.optimizer is muon under {engine}",
            "DeepSpeed flattens into one vector the matrices that Muon reads",
            "training.optimizer: adamw, or another engine (fsdp2, ddp) or one device",
        )
    if half is not None and engine in DEEPSPEED:
        yield Refusal(
            f"training.{half} is true under {engine}",
            "DeepSpeed would make the weights themselves half precision, and the student would be saved so",
            f"training.{half}: false, or fsdp2, which keeps float32 weights (`align-ti recipes copy fsdp2 fsdp2.yaml`), ddp or one "
            "device",
        )
    if on_policy and engine in SHARDED_WEIGHTS:
        yield Refusal(
            f"data.on_policy is given under {engine}",
            "the student's weights are sharded, so processes whose answers differ in length would wait for each other",
            "no data.on_policy, or ddp, zero2 or one device",
        )
    if gradient_shares and engine in (*DEEPSPEED, "fsdp2"):
        yield Refusal(
            f"training.gradient_shares_every is given under {engine}",
            "FSDP and DeepSpeed shard each gradient during backward",
            "training.gradient_shares_every: 0, or ddp or one device",
        )
