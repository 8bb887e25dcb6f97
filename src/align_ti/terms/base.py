"""What every term of the objective is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.data.batch import Tokens
from align_ti.errors import BatchError, ConfigError
from align_ti.interactions.transitions import Transitions
from align_ti.losses.divergences.base import AnyDivergence
from align_ti.losses.divergences.forward_kl import ForwardKl
from align_ti.losses.measures import Measure, Softened
from align_ti.options import Options, checked
from align_ti.terms.readings import Readings, Reads
from align_ti.terms.schedule import Schedule

if TYPE_CHECKING:
    from align_ti.interactions.candidates import CandidateOptions
    from align_ti.terms.plain import Sample


@dataclass(frozen=True, slots=True)
class WeightedRows:
    """Rows of the student, their weights, and the divergence that is measured on them.

    A row is compared with the teacher's row of the same token; or, with `teacher_rows`, with the one at that index of the
    teacher's own sequence. A row of weight 0 is not part of the term. `branch_weights` are the weights of the rows of
    candidates.
    """

    weights: Float[Tensor, "batch seq"]
    measure: Measure
    branch_weights: Float[Tensor, " branches"] | None = None
    teacher_rows: Int[Tensor, "batch seq"] | None = None


class Term(Options):
    """One term of the objective: its options, and its computation from what the two models produced.

    A term's value is its total divided by its mass; totals and masses are added up over accumulated batches and processes
    before the division, so a term is the same number however a step is split into batches. A term of your own derives from this
    class, sets `name`, declares its options as fields, and defines `mass` and `total`; and `reads_of_student` and
    `reads_of_teacher` if it needs more than the last hidden states. `align_ti.testing.check_term` tests it.
    """

    kind: ClassVar[Literal["term"]] = "term"
    name: ClassVar[str]
    """Its name in recipes and in the log."""
    needs_teacher: ClassVar[bool] = True
    """Whether it compares the student with a teacher."""
    one_sequence: ClassVar[bool] = False
    """Whether it is defined only if both models read the same inputs."""
    visual: ClassVar[Literal["none", "equal"]] = "none"
    """How visual tokens are compared if the teacher has its own inputs: none: not one by one; equal: one by one, which needs
    equal numbers."""
    needs_visual: ClassVar[bool] = False
    """Whether it concerns visual tokens, so that a sample without an image contributes nothing."""
    cacheable: ClassVar[bool] = False
    """Whether everything that it reads of the teacher is in the cache of `align-ti cache`: last hidden states of the rows that
    predict responses and of visual tokens, and the mean attention of instruction tokens at one layer."""
    unit: ClassVar[str] = ""
    """The unit of its value, if it has one."""
    fix: ClassVar[str] = "check that parameters which influence the term's positions are trained (parts)"
    """What to look at if the check finds that the term is 0 or has no gradient."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """The term's factor in the loss; a term with weight 0 is not computed."""
    schedule: dict[str, Schedule] = Field(default={})
    """The term's real numbers that change along training, such as {weight: {initial: 1, final: 0, begin: 0.5, end: 0.8}}; begin and
    end are fractions of training."""

    def __hash__(self) -> int:
        return hash(repr(self))

    @model_validator(mode="after")
    def _numbers_change(self) -> Term:
        numbers = [name for name, field in type(self).model_fields.items() if holds_number(field.annotation)]
        for name, course in self.schedule.items():
            if name not in numbers:
                raise ValueError(
                    f"schedule names {name!r}; accepted: the term's own real numbers ({', '.join(numbers)})"
                )
            own = getattr(self, name)
            if not isinstance(own, float):
                raise ValueError(
                    f"schedule.{name} is given, but {name} is {own!r}; set it to a number: evaluation and the check use "
                    "that number in place of the schedule"
                )
            for end, value in (("initial", course.value(0.0, own)), ("final", course.final)):
                try:
                    checked(type(self), {**dict(self), name: value, "schedule": {}})
                except ValidationError as error:
                    accepted = (
                        str(error.errors()[0]["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
                    )
                    raise ValueError(f"schedule.{name}.{end} is {value:g}; accepted: {accepted}") from None
        if "weight" in self.schedule and self.weight == 0:
            raise ValueError(
                "schedule.weight is given, but weight is 0, so the term is never computed; to begin without it, give the weight that "
                "it will have and schedule.weight with initial: 0"
            )
        if "weight" in self.schedule and not any(self.schedule["weight"].value(end, self.weight) for end in (0.0, 1.0)):
            raise ValueError("by schedule.weight the weight is 0 throughout; give the term weight: 0 and no schedule")
        return self

    @classmethod
    def __pydantic_init_subclass__(cls) -> None:  # type: ignore[override]  # classes of terms take no options
        """Messages about a term's options name it as a recipe does."""
        super().__pydantic_init_subclass__()
        if "schedule" in inspect.get_annotations(cls):
            raise ConfigError(
                f"{cls.__name__} has an option named schedule, which every term has already; give another name."
            )
        if "name" in cls.__dict__:
            cls.where = f"objective.{cls.name}"

    # --- what it needs ------------------------------------------------------------------------------------------------

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuses models for which the term is not defined.

        Raises:
            ModelError: the message names the part of the model that does not fit.
        """

    def reads_of_student(self, model: PreTrainedModel) -> Reads:
        """What the term reads of the student in addition to its last hidden states."""
        return Reads()

    def reads_of_teacher(self, model: PreTrainedModel) -> Reads:
        """What the term reads of the teacher in addition to its last hidden states."""
        return Reads()

    @property
    def visual_rows(self) -> Literal["none", "equal", "resampled"]:
        """`visual`, or resampled if the term has an option `resample` that is true."""
        return "resampled" if getattr(self, "resample", False) else self.visual

    @property
    def candidate_options(self) -> CandidateOptions | None:
        """How candidates are drawn, for a term that compares rows of candidates."""
        return None

    @property
    def needs_layer(self) -> bool:
        """Whether the term's layer still has to be selected by layer scores (IRS)."""
        return False

    def at_layer(self, layer: int) -> Term:
        """The term with the selected layer."""
        return self.model_copy(update={"layer": layer})

    def at_progress(self, progress: float) -> Term:
        """The term with the options that it has at this fraction of training, and no schedule."""
        now = {name: course.value(progress, getattr(self, name)) for name, course in self.schedule.items()}
        return self.model_copy(update={**now, "schedule": {}}) if self.schedule else self

    def without_schedule(self) -> Term:
        """The term with its own options all along."""
        return self.model_copy(update={"schedule": {}}) if self.schedule else self

    # --- what it is ---------------------------------------------------------------------------------------------------

    def mass(self, tokens: Tokens, plan: Transitions | None) -> Shaped[Tensor, ""]:
        """The divisor of the total, counted before any model has read the batch; `plan` is given if a term has candidates."""
        raise NotImplementedError(f"{type(self).__name__} defines no mass")

    def total(self, readings: Readings) -> WeightedRows | Float[Tensor, ""]:
        """The term's sum over the batch: rows with weights, which are projected to the vocabulary with those of all other
        terms; or a scalar with gradient, in float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} defines no total")

    def plain(self, sample: Sample) -> float | None:
        """The term's value on one sample by a plain reference computation that shares no code with `total`; None if there is no
        such computation."""
        return None


class Compares(Term):
    """A term that compares next-token distributions by a divergence."""

    unit: ClassVar[str] = "nats"

    divergence: AnyDivergence = ForwardKl()
    """How far the student's distribution is from the teacher's: a name (forward_kl, reverse_kl, jensen_shannon, skew_kl,
    skew_reverse_kl, adaptive_kl, alpha_beta, total_variation), or a section with name and options."""

    @property
    def measure(self) -> Softened:
        """What is measured on each row."""
        return Softened(self.divergence)


def holds_number(annotation: Any) -> bool:
    """Whether an option holds a real number, alone or as a member of a union."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return annotation is float or any(holds_number(inner) for inner in members)


def per_sample(rows: Shaped[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Weights under which the marked rows of each sample count 1 together."""
    return rows / rows.sum(-1, keepdim=True).clamp(min=1)


def cosine_distance(one: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """1 - cos of two tensors of equal shape taken as vectors; 1 if one of them is 0 everywhere."""
    return 1 - torch.nn.functional.cosine_similarity(wide(one).flatten(), wide(other).flatten(), dim=0)


def wide(values: Tensor) -> Tensor:
    """Values in float32 or wider, for sums that half precision would lose."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def refuse_own_sequence(name: str) -> BatchError:
    """The refusal of a term that compares token by token, for a teacher that reads inputs of its own."""
    return BatchError(
        f"objective.{name} compares the two models token by token over the whole sequence, but the teacher reads inputs of its own; "
        f"choose a teacher with the student's processor, or leave the term out (objective.{name}.weight: 0)."
    )
