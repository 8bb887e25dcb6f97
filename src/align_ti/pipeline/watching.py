"""The student measured on benchmarks while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from align_ti.config import Evaluation
from align_ti.errors import ConfigError
from align_ti.evaluation.benchmarks import benchmark
from align_ti.evaluation.predictions import conversation_of
from align_ti.evaluation.runner import said_to
from align_ti.evaluation.statistics import interval
from align_ti.models.adapters import unwrapped
from align_ti.pipeline.asking import Task, batches, read_task
from align_ti.training.trainer import AlignTITrainer


class TaskWatch(TrainerCallback):
    """Asks the student a sample of each benchmark's questions every so many steps, and logs the headlines.

    The log gets `task_NAME` with `task_NAME_low` and `task_NAME_high`, the ends of the 95 % interval where it is known. The answers are
    greedy, and the student is afterwards as it was, so that it is trained as if nobody had asked. After the last step only benchmarks
    are asked that are not among `evaluation.tasks`, on which the finished student is measured anyway.

    Args:
        settings: the benchmarks, the steps between two measurements, and how many questions.
        processor: the student's processor.

    Raises:
        ConfigError, DataError: a benchmark is not known, or its files cannot be used.
    """

    def __init__(self, settings: Evaluation, processor: ProcessorMixin) -> None:
        self.settings, self.processor = settings, processor
        self.trainer: AlignTITrainer | None = None
        # The sample of those that the finished student is asked.
        limits = [limit for limit in (settings.sample, settings.limit) if limit is not None]
        self.tasks = [read_task(benchmark(name), Path(settings.data or ""), min(limits)) for name in settings.watched]

    def attach(self, trainer: AlignTITrainer) -> None:
        """Tells whose student is asked.

        Raises:
            ConfigError: its weights lie in parts on the processes.
        """
        if trainer.shards_weights:
            raise ConfigError(
                "evaluation.every is given, but the student's weights are sharded (FSDP or DeepSpeed ZeRO-3), and processes whose "
                "answers differ in length would wait for each other; leave evaluation.every out, or use DDP, ZeRO-2 or one GPU."
            )
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        every = self.settings.every
        if every is None or self.trainer is None or self.trainer.model is None:
            return
        last = state.global_step >= state.max_steps
        # At the end only what nobody else asks the finished student.
        tasks = [task for task in self.tasks if not last or task.benchmark.name not in self.settings.tasks]
        if (state.global_step % every and not last) or not tasks or (control.should_training_stop and not last):
            return
        due = control.should_log
        self.trainer.log(self.measure(unwrapped(self.trainer.model), self.trainer, tasks))
        # Any log counts as the step's own, whose terms are still to come.
        control.should_log = due

    def measure(
        self, student: PreTrainedModel, trainer: AlignTITrainer, tasks: Sequence[Task] | None = None
    ) -> dict[str, float]:
        """The headlines of the benchmarks, by default of all, by name; the same on all processes."""
        was = {module: module.training for module in student.modules()}
        found: dict[str, float] = {}
        try:
            for task in self.tasks if tasks is None else tasks:
                found |= self.headline(task, self.answers(student, task, trainer))
        finally:
            for module, training in was.items():
                module.training = training
        return found

    def answers(self, student: PreTrainedModel, task: Task, trainer: AlignTITrainer) -> dict[str, str]:
        """The answers by the questions' ids; the processes share the batches out, each question once."""
        conversations = [conversation_of(item) for item in task.items]
        index, count = trainer.args.process_index, trainer.args.world_size
        mine: list[tuple[str, str]] = []
        for batch in list(batches(conversations, self.settings.batch_size))[index::count]:
            with trainer.accelerator.autocast():
                asked = [conversations[number] for number in batch]
                answers = said_to(student, self.processor, asked, task.tokens(self.settings.task_max_new_tokens))
            mine += [(task.items[number].id, text) for number, (text, _) in zip(batch, answers, strict=True)]
        return dict(gather_object(mine) if count > 1 else mine)

    def headline(self, task: Task, texts: dict[str, str]) -> dict[str, float]:
        """The benchmark's headline and the ends of its interval, by their names in the log."""
        report = task.benchmark.score(task.items, texts)
        told, name = interval(report.metrics[report.headline]), f"task_{task.benchmark.name}"
        ends = {f"{name}_low": told.low, f"{name}_high": told.high}
        return {name: told.value, **{key: value for key, value in ends.items() if value == value}}
