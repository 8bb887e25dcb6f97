"""One training run of the benchmark `peers`, in a process of its own: a rival's trainer on what all rivals share.

Samples are tensors before the clock starts, so nothing is measured of anybody's data preparation. TRL is imported where a run needs it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from align_ti.cli import quiet
from align_ti.config import Iva, Kd, Objective, Sft, Student, Tpa
from align_ti.data.collator import Collator
from align_ti.data.roles import NO_LABEL, encode
from align_ti.data.sources import read_conversations
from align_ti.models.loading import freeze, load_model, load_processor
from align_ti.runs import write_json
from align_ti.training.memory import peak_memory
from align_ti.training.trainer import AlignTITrainer
from benchmarks.shapes import CPU, Shape, make_batch, make_pair

SEED = 0
DIGITS_BATCH = 32
LAYERS = {"digits": 4, "cpu": 4}
"""The teacher's layer that IVA reads: the demo's in the digits pair, the middle one of eight in the other."""

COMMON: dict[str, Any] = {
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": SEED,
}
"""Options of transformers' TrainingArguments that all runs share; TRL alone would switch bf16 and gradient checkpointing on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every rival is given: models, samples in the order in which they are to be trained on, and how many make a batch."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    samples: Sequence[dict[str, Tensor]]
    batch: int
    rate: float
    layer: int

    @property
    def pad(self) -> int:
        """The id of the pad token."""
        return int(self.tokenizer.pad_token_id)


class Ready(Dataset[dict[str, Tensor]]):
    """Samples that are tensors already."""

    def __init__(self, samples: Sequence[dict[str, Tensor]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


def digits_work(steps: int, data: Path) -> Work:
    """The demo's pair on its real images, written to `data` by `write_benchmark`, in an order fixed by the seed."""
    processor = load_processor(str(data / "student"))
    conversations = read_conversations(data / "train.json")
    order = np.random.default_rng(SEED).permutation(len(conversations))[: steps * DIGITS_BATCH]
    student = load_model(str(data / "student"), "float32")
    freeze(student, Student(path=str(data / "student")).freeze)
    teacher = load_model(str(data / "teacher"), "float32").requires_grad_(False).eval()
    return Work(
        student=student.train(),
        teacher=teacher,
        tokenizer=processor.tokenizer,
        samples=[encode(conversations[index], processor) for index in order],
        batch=DIGITS_BATCH,
        rate=1e-3,
        layer=LAYERS["digits"],
    )


def shape_work(steps: int, shape: Shape = CPU) -> Work:
    """A pair with random weights, and random tokens and images of the shape."""
    student, teacher = make_pair(shape)
    samples = []
    for step in range(steps):
        batch = make_batch(shape, step)
        samples += [
            {name: value[row : row + 1] if name == "pixel_values" else value[row] for name, value in batch.items()}
            for row in range(shape.batch)
        ]
    return Work(
        student=student,
        teacher=teacher,
        tokenizer=bare_tokenizer(),
        samples=samples,
        batch=shape.batch,
        rate=1e-4,
        layer=LAYERS["cpu"],
    )


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the special tokens of `shapes`, which is all that a trainer asks of one when samples are tensors."""
    special = {"<s>": 0, "</s>": 1, "<pad>": 2, "<image>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(special, unk_token="<pad>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def options(work: Work, out: str) -> dict[str, Any]:
    """The arguments that every trainer gets."""
    return {
        **COMMON,
        "output_dir": out,
        "per_device_train_batch_size": work.batch,
        "max_steps": len(work.samples) // work.batch,
        "learning_rate": work.rate,
        "use_cpu": not torch.accelerator.is_available(),
    }


# --- the rivals -------------------------------------------------------------------------------------------------------


def align_ti(work: Work, out: str, objective: Objective) -> Trainer:
    """This project's trainer; records come in the order of `work`."""
    return AlignTITrainer(
        model=work.student,
        teacher_model=work.teacher,
        args=TrainingArguments(**options(work, out), train_sampling_strategy="sequential"),
        objective=objective,
        train_dataset=Ready(work.samples),
        data_collator=Collator(work.pad),
    )


def vanilla_kd(work: Work, out: str) -> Trainer:
    """Ours, with the forward KL over response tokens alone."""
    objective = Objective(sft=Sft(weight=0.0), kd=Kd(), iva=Iva(weight=0.0), tpa=Tpa(weight=0.0))
    return align_ti(work, out, objective)


def full_objective(work: Work, out: str) -> Trainer:
    """Ours, with all four terms: more work than anybody else does."""
    return align_ti(work, out, Objective(sft=Sft(), kd=Kd(), iva=Iva(layer=work.layer), tpa=Tpa()))


def gold(work: Work, out: str) -> Trainer:
    """TRL's GOLDTrainer, off-policy (lmbda 0), forward KL (beta 0), temperature 1, with a collator that hands it the ready tensors.

    Its dataset, which has to be one of `datasets`, is the samples' numbers. Its sampler always shuffles, so the numbers are laid out
    such that the shuffle puts them into the order of `work`.
    """
    import datasets
    from trl.experimental.gold import GOLDConfig, GOLDTrainer
    from trl.trainer.utils import RepeatSampler

    drawn = list(RepeatSampler(work.samples, mini_repeat_count=1, batch_size=work.batch, seed=SEED))
    place = {index: position for position, index in enumerate(drawn)}
    numbers = datasets.Dataset.from_dict({"number": [place[index] for index in range(len(drawn))]})
    collate = Collator(work.pad)

    def tensors(rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        batch = collate([work.samples[row["number"]] for row in rows])
        # Every other tensor of a batch would go to the models as an argument.
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}

    return GOLDTrainer(
        model=work.student,
        teacher_model=work.teacher,
        args=GOLDConfig(
            **options(work, out),
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=numbers,
        processing_class=work.tokenizer,
        data_collator=tensors,
    )


def distillation_update(work: Work, out: str) -> Trainer:
    """The update of TRL's DistillationTrainer, forward KL (beta 0): its loss never holds logits in full.

    The trainer writes its responses itself and has no option to take given ones. So the method that writes them is replaced by one
    that returns the gold responses; models, loss and optimizer step are TRL's own.
    """
    from trl import DistillationConfig, DistillationTrainer

    class OnGoldResponses(DistillationTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: list[dict[str, Tensor]]) -> dict[str, Any]:
            return self._as_tensors(rollout(inputs, work.pad))

        def _as_tensors(self, batch: dict[str, Any]) -> dict[str, Any]:
            device = self.accelerator.device
            return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    return OnGoldResponses(
        model=work.student,
        teacher_model=work.teacher,
        args=DistillationConfig(**options(work, out), beta=0.0, temperature=1.0, shuffle_dataset=False),
        train_dataset=work.samples,
        processing_class=work.tokenizer,
    )


def rollout(samples: Sequence[dict[str, Tensor]], pad: int) -> dict[str, Any]:
    """The samples as DistillationTrainer lays out its own responses: prompts filled up on the left, responses on the right.

    Each sample has one response, at its end, and one image.
    """
    starts = [int((sample["labels"] != NO_LABEL).nonzero()[0]) for sample in samples]
    prompts = [sample["input_ids"][:start] for sample, start in zip(samples, starts, strict=True)]
    responses = [sample["input_ids"][start:] for sample, start in zip(samples, starts, strict=True)]
    batch: dict[str, Any] = {}
    for name, rows, side in (("prompt", prompts, "left"), ("completion", responses, "right")):
        ones = [torch.ones_like(row) for row in rows]
        batch[f"{name}_ids"] = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
        batch[f"{name}_mask"] = pad_sequence(ones, batch_first=True, padding_value=0, padding_side=side)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples])
    batch["num_images"] = [1] * len(samples)
    return batch


RIVALS: dict[str, Callable[[Work, str], Trainer]] = {
    "align_ti_kd": vanilla_kd,
    "trl_gold": gold,
    "trl_distillation_update": distillation_update,
    "align_ti_full": full_objective,
}
"""Who is measured; `align_ti_kd` is what the others are compared with, `align_ti_full` does more work than it."""


# --- measuring --------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """The moment at which each step ended, the processor time spent until then, and the loss that was logged for it."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.busy: list[float] = []
        self.losses: list[float] = []
        self.branch_shares: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.busy.append(time.process_time())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
        if "branch_share" in logs:
            self.branch_shares.append(float(logs["branch_share"]))


def measured(rival: str, work: Work, out: str) -> dict[str, Any]:
    """Samples a second and processor seconds a sample, both of the median step, the first left out; peak memory above that of
    models and samples; losses.

    The processor seconds are those of all threads. Other work on the machine changes them less than the speed, so they tell when
    that is not to be trusted.
    """
    set_seed(SEED)
    trainer, clock = RIVALS[rival](work, out), Clock()
    trainer.add_callback(clock)
    with peak_memory() as peak:
        trainer.train()
    seconds, busy = (statistics.median(np.diff(times).tolist()) for times in (clock.ends, clock.busy))
    result = {
        "samples_per_second": work.batch / seconds,
        "processor_seconds_per_sample": busy / work.batch,
        "peak_memory_mib": peak.mib,
        "memory": peak.of,
        "losses": clock.losses,
    }
    if clock.branch_shares:
        result["branch_share"] = sum(clock.branch_shares) / len(clock.branch_shares)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", choices=RIVALS, required=True)
    parser.add_argument("--pair", choices=LAYERS, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--data", type=Path, help="the digits benchmark, for that pair")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    quiet()
    logging.getLogger("trl").setLevel(logging.ERROR)
    work = digits_work(chosen.steps, chosen.data) if chosen.pair == "digits" else shape_work(chosen.steps)
    with tempfile.TemporaryDirectory() as folder:
        write_json(chosen.out, measured(chosen.rival, work, folder))


if __name__ == "__main__":
    main()
