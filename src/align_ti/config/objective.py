"""The objective's options: the terms, their weights and schedules."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from align_ti.options import Options, checked, placed, sentence
from align_ti.registry import lookup, names, suggestion

DEFAULT_TERMS = ("sft", "kd", "iva", "tpa")
"""The terms of Align-TI, which every objective has by default; any other term is used only if it is named."""


class Objective(Options):
    """The loss: a weighted sum of terms, each defined in a file of `align_ti.terms` or in one of yours.

    Each term is an option under its name: `Objective(kd=Kd(temperature=2.0))`, `objective.kd.temperature`. The four terms of
    Align-TI have weight 1 by default; others are used only if they are named. `Objective.only(...)` contains only the named terms.

    Source: Align-TI (arXiv:2602.09483), L = L_sft + w_kd L_kd + w_iva L_iva + w_tpa L_tpa.
    """

    model_config = ConfigDict(extra="allow")
    where: ClassVar[str] = "objective"
    chunk_rows: int | None = Field(default=None, ge=1)
    """Rows (compared positions) projected to the vocabulary at a time; by default as many as hold 2^24 logits on a CPU, 2^27
    elsewhere. No effect on the result."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="before")
    @classmethod
    def _terms_by_name(cls, options: Any) -> Any:
        if not isinstance(options, Mapping):
            return options
        given = {name: options.get(name, {}) for name in DEFAULT_TERMS} | dict(options)
        terms, errors = {}, []
        for name in [name for name in given if name not in cls.model_fields]:
            if name not in names("term"):
                errors.append(
                    sentence(f"is no known option; {suggestion('term', str(name))}", (str(name),), given[name])
                )
                continue
            try:
                terms[name] = checked(lookup("term", name), given[name], name)
            except ValidationError as error:
                errors += [placed(cls, item, ()) for item in error.errors()]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        order = {name: place for place, name in enumerate(names("term"))}
        return {
            **{name: value for name, value in given.items() if name in cls.model_fields},
            **dict(sorted(terms.items(), key=lambda term: order[term[0]])),
        }

    @model_validator(mode="after")
    def _some_term(self) -> Objective:
        if not self.active:
            raise ValueError("every weight is 0, so there is nothing to learn; give one term a weight above 0")
        for progress in self.moments():
            if not self.at_progress(progress).active:
                raise ValueError(
                    f"by the schedules every weight is 0 at {progress:.0%} of training, where there is nothing to learn; keep one "
                    "term's weight above 0 there"
                )
        return self

    @classmethod
    def only(cls, *, chunk_rows: int | None = None, **terms: Any) -> Objective:
        """An objective of the named terms alone: terms of Align-TI that are not named have weight 0."""
        return cls(**{name: {"weight": 0.0} for name in DEFAULT_TERMS} | terms, chunk_rows=chunk_rows)

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """The names of all accepted options, the terms' included."""
        return (*names("term"), *cls.model_fields)

    @classmethod
    def section(cls, name: str) -> type[Options] | None:
        """The options of a term."""
        return lookup("term", name) if name in names("term") else super().section(name)

    @property
    def terms(self) -> dict[str, Any]:
        """The terms with a weight above 0, by name: those of Align-TI first, others in the order of the registry."""
        every: dict[str, Any] = self.__pydantic_extra__ or {}
        return {name: term for name, term in every.items() if term.weight > 0}

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the terms with a weight above 0, in the order of `terms`."""
        return tuple(self.terms)

    @property
    def scheduled(self) -> bool:
        """Whether any term has options that change along training."""
        return any(term.schedule for term in self.terms.values())

    def at_progress(self, progress: float) -> Objective:
        """The objective with the options that its terms have at this fraction of training, and no schedules."""
        if not self.scheduled:
            return self
        return self.model_copy(update={name: term.at_progress(progress) for name, term in self.terms.items()})

    def without_schedules(self) -> Objective:
        """The objective with the terms' own options all along."""
        if not self.scheduled:
            return self
        return self.model_copy(update={name: term.without_schedule() for name, term in self.terms.items()})

    def moments(self) -> list[float]:
        """Fractions of training at which every set of active terms occurs: the start and the middle of each part between two times of
        schedules."""
        courses = [course for term in self.terms.values() for course in term.schedule.values()]
        times = sorted({0.0, 1.0, *(time for course in courses for time in (course.begin, course.end))})
        return [moment for begin, end in pairwise(times) for moment in (begin, (begin + end) / 2)]

    def stages(self) -> list[tuple[float, Objective]]:
        """The parts of training in which a step does the same work: the fraction of training that each takes, and the objective in
        the middle of it, without schedules.

        Weights change no work unless they are 0. Any other option may: where one changes gradually, the middle counts for the part.
        """
        spans, objectives = self.spans()
        return [
            (sum(end - begin for begin, end, stage in spans if stage == number), objective)
            for number, objective in enumerate(objectives)
        ]

    def spans(self) -> tuple[list[tuple[float, float, int]], list[Objective]]:
        """Training in order, as begin, end and number of the stage that lies between them; and the stages' objectives."""
        moments = self.moments()
        spans: list[tuple[float, float, int]] = []
        objectives: list[Objective] = []
        for begin, middle in zip(moments[::2], moments[1::2], strict=True):
            inside = self.at_progress(middle)
            same = [number for number, other in enumerate(objectives) if other.same_work(inside)]
            if not same:
                objectives.append(inside)
            spans.append((begin, 2 * middle - begin, same[0] if same else len(objectives) - 1))
        return spans, objectives

    @property
    def changes_work(self) -> bool:
        """Whether steps at different times of training may do different work."""
        first, *others = [self.at_progress(moment) for moment in self.moments()]
        return not all(other.same_work(first) for other in others)

    def same_work(self, other: Objective) -> bool:
        """Whether a step of another objective does the same work: the same terms with the same options, weights apart."""
        one, two = (
            {name: term.model_copy(update={"weight": 1.0}) for name, term in of.terms.items()} for of in (self, other)
        )
        return one == two

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(term.needs_teacher for term in self.terms.values())

    @property
    def needs_layer(self) -> tuple[str, ...]:
        """The names of the terms whose layer is chosen by layer scores (IRS) before training."""
        return tuple(name for name, term in self.terms.items() if term.needs_layer)

    def at_layer(self, layer: int) -> Objective:
        """The objective with this layer for every term that needs one."""
        return self.model_copy(update={name: self.terms[name].at_layer(layer) for name in self.needs_layer})
