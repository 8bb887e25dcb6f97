"""What training worked on: the tokens of its batches, and the FLOPs of its first steps; both go on after a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align_ti.data.roles import RESPONSE
from align_ti.flops import FlopCount
from align_ti.models.families import real_tokens
from align_ti.runs import RunFolder, write_json
from align_ti.training.watch import WARM_UP

FILE = "work.json"
"""In a checkpoint: what training had worked on when it was written."""


@dataclass(slots=True)
class Worked:
    """Sums over all processes since the run's first step.

    `tokens` are those of the student's sequences, visual ones included and padding left out; `response_tokens` are those of responses
    among them. `flops` were counted in `flops_steps` steps, which had `flops_tokens` tokens.
    """

    tokens: int = 0
    response_tokens: int = 0
    flops: int = 0
    flops_tokens: int = 0
    flops_steps: int = 0


class TrainingWork(TrainerCallback):
    """Counts the tokens that a run is trained on, and the FLOPs of its first steps, for `AlignTITrainer(work=...)`.

    FLOPs are counted in the steps that the time of a step leaves out (`WARM_UP`), so that counting, which slows a step, affects no
    reported time. Losses and weights are the same numbers with and without it.

    Args:
        run: the folder whose checkpoints keep the sums; None: none are kept.
    """

    def __init__(self, run: RunFolder | None = None) -> None:
        self.run = run
        self.flops = True
        """Whether FLOPs are counted."""
        self.worked: Worked | None = Worked()
        """Up to the last exchange between the processes; None of a run that goes on from a checkpoint without sums."""
        self.here: Tensor | None = None
        """This process since then: all tokens, response tokens, and all tokens of steps whose FLOPs are counted."""
        self.count = FlopCount()
        self.steps = 0
        """Steps whose FLOPs were counted, since the run's first."""

    def go_on(self, checkpoint: Path) -> None:
        """Takes up the sums that a checkpoint kept."""
        try:
            kept = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.worked, self.flops = None, False
            return
        self.worked = Worked(**kept)
        self.steps = self.worked.flops_steps

    @property
    def counts_flops(self) -> bool:
        """Whether the FLOPs of the step that is made now are counted."""
        return self.flops and self.steps < WARM_UP

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside the block are a step's passes."""
        if not self.counts_flops:
            yield
            return
        with self.count:
            yield

    def add(self, batch: Mapping[str, Any]) -> None:
        """Counts the tokens of a batch that is trained on. A sample without a response, which fills a batch up, is none."""
        response = batch["roles"] == RESPONSE
        # It lies on the batch's device until the processes exchange it, so that no step waits for it.
        every = (real_tokens(batch) & response.any(-1, keepdim=True)).sum()
        found = torch.stack([every, response.sum(), every * int(self.counts_flops)])
        self.here = found if self.here is None else self.here + found

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps += self.counts_flops

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        worked = self.exchanged(args)
        if self.run is not None and worked is not None and state.is_world_process_zero:
            checkpoint = self.run.root / f"checkpoint-{state.global_step}"
            if checkpoint.is_dir():
                write_json(checkpoint / FILE, asdict(worked))

    def exchanged(self, args: TrainingArguments) -> Worked | None:
        """The sums over all processes up to now; all of them have to ask."""
        mine = [*([0, 0, 0] if self.here is None else self.here.tolist()), self.count.total]
        self.here, self.count = None, FlopCount()
        # Numbers of Python, since FLOPs of many processes are more than 64 bits hold.
        rows = gather_object([mine]) if args.world_size > 1 else [mine]
        tokens, response, counted, flops = (sum(column) for column in zip(*rows, strict=True))
        if self.worked is not None:
            before = self.worked
            self.worked = Worked(
                before.tokens + tokens,
                before.response_tokens + response,
                before.flops + flops,
                before.flops_tokens + counted,
                self.steps,
            )
        return self.worked

    def summary(self, args: TrainingArguments, steps: int) -> dict[str, Any]:
        """The run's part of `cost.json`; None for what is not known. All processes have to ask.

        `flops` is the work of the whole run: what was counted, times the run's tokens over those of the counted steps.
        """
        worked = self.exchanged(args)
        if worked is None:
            return dict.fromkeys(("tokens", "response_tokens", "flops", "flops_per_step"))
        flops = worked.flops * worked.tokens / worked.flops_tokens if worked.flops_tokens else None
        return {
            "tokens": worked.tokens,
            "response_tokens": worked.response_tokens,
            "flops": None if flops is None else round(flops),
            "flops_per_step": None if flops is None else round(flops / steps),
        }
