"""The options of evaluation, and those of `align-ti generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from align_ti.options import Options


class Evaluation(Options):
    """How answers are generated and scored."""

    where: ClassVar[str] = "evaluation"
    batch_size: int = Field(default=16, ge=1)
    """Questions answered at a time."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum number of tokens of an answer to a question of data.eval; an answer that reaches it is counted as truncated."""
    fidelity_records: int | None = Field(default=256, ge=0)
    """With a teacher: number of records on which IVA's and TPA's fidelity measures are taken and the student's own answers are
    compared, all records of each chosen image; KL and agreement on the right answers are measured on all. null: all records. 0:
    none."""
    shown: int = Field(default=4, ge=0)
    """Number of images for which the report shows each model's attention under several instructions, and of answers along which
    it shows each model's next-token distribution; each model is loaded once more for it. 0: none."""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Benchmarks (gqa, sqa, textvqa, pope, mme, mmbench, digits, own:SCORER) on which teacher, student before training and
    finished student are measured; a list, or names with commas."""
    data: str | None = Field(default=None, min_length=1)
    """The folder of the benchmarks' files, laid out as in LLaVA's evaluation guide. Required with tasks."""
    task_max_new_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens of an answer to a benchmark's question; by default each benchmark's protocol decides."""
    limit: int | None = Field(default=None, ge=1)
    """Use about this many questions of each benchmark, complete groups of them (such as all questions about an image); by
    default all."""
    every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations on the benchmarks during training; by default there are none."""
    sample: int = Field(default=64, ge=1)
    """About this many questions of each benchmark are used in such an evaluation, complete groups of them, always the same."""
    watch: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """The benchmarks of these evaluations, such as digits_validation; by default those of tasks. One that is not among tasks is
    evaluated after the last step too."""

    @model_validator(mode="before")
    @classmethod
    def _names_with_commas(cls, options: Any) -> Any:
        if not isinstance(options, Mapping):
            return options
        words = {name: options[name] for name in ("tasks", "watch") if isinstance(options.get(name), str)}
        return {
            **options,
            **{name: tuple(one.strip() for one in text.split(",") if one.strip()) for name, text in words.items()},
        }

    @model_validator(mode="after")
    def _tasks_with_their_files(self) -> Evaluation:
        for key in ("tasks", "watch"):
            names = getattr(self, key)
            if len({name.partition(":")[0] for name in names}) < len(names):
                raise ValueError(f"{key} is {', '.join(names)}; each benchmark once is accepted; take the others out")
            if names and self.data is None:
                raise ValueError(
                    f"{key} is given but data is missing; name the folder that holds the benchmarks' files"
                )
        if self.watch and self.every is None:
            raise ValueError("watch is given but every is missing; give the steps between two measurements")
        for name in ("data", "task_max_new_tokens", "limit", "every"):
            if not (self.tasks or self.watch) and getattr(self, name) is not None:
                raise ValueError(f"{name} is given but tasks is missing; name the benchmarks, or leave {name} out")
        return self

    @property
    def watched(self) -> tuple[str, ...]:
        """The benchmarks on which the student is evaluated during training."""
        return self.watch or self.tasks


class Generation(Options):
    """How a model answers training records (`align-ti generate`)."""

    where: ClassVar[str] = "generate"
    batch_size: int = Field(default=16, ge=1)
    """Records answered at a time. No effect on the answers except by rounding."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Maximum number of tokens of one answer; an answer that reaches it is marked as truncated."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0: the most probable token each time (greedy). Above: tokens are sampled at this temperature."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from the k most probable tokens only."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the smallest set of most probable tokens that together reach this probability."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Random seed; together with each record's name and text it determines the samples, so neither the batch size nor a stop
    changes them."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What happens to a record that cannot be read or turned into a prompt. error: it stops the command. skip: it is left out
    and counted."""

    @model_validator(mode="after")
    def _choices_need_a_draw(self) -> Generation:
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but temperature is 0, where nothing is drawn; give a temperature above 0, or "
                    f"leave {name} out"
                )
        return self
