"""A recipe: the sections of a run, and what they need of each other."""

from __future__ import annotations

from pydantic import Field, model_validator

from align_ti.config.data import Data
from align_ti.config.engines import Refusal, refusals
from align_ti.config.evaluation import Evaluation
from align_ti.config.models import Student, Teacher
from align_ti.config.objective import Objective
from align_ti.config.training import Scores, Training
from align_ti.options import Options


class Recipe(Options):
    """One run: student, teacher, data, objective, training and evaluation."""

    out: str = Field(min_length=1)
    """The run folder."""
    extensions: tuple[str, ...] = ()
    """Python files that register divergences or terms of your own (`align_ti.register`). They run only if that is allowed:
    `--allow-extensions` on the command line, `read_recipe(..., allow_extensions=True)` in Python."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Random seed of data order, initialisation and sampling."""
    check: bool = True
    """Check models and first records before training; a failed verdict stops the run."""
    student: Student
    teacher: Teacher | None = None
    """May be omitted if only the sft term has weight."""
    data: Data
    objective: Objective = Field(default_factory=Objective)
    training: Training = Training()
    layer_scores: Scores = Scores()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _what_a_stream_needs(self) -> Recipe:
        if self.data.stream:
            if self.training.max_steps == -1:
                raise ValueError(
                    "training.max_steps is -1, but data.stream is true and the length of a stream is unknown; give a number of steps"
                )
            for name in self.objective.needs_layer:
                raise ValueError(
                    f"objective.{name}.layer is 'auto', but data.stream is true and a stream cannot be sampled; give a number "
                    "(`align-ti "
                    "score-layers` finds it)"
                )
            if self.training.group_by_length:
                raise ValueError(
                    "training.group_by_length is true, but data.stream is true and lengths to come are unknown; set one to false"
                )
        return self

    @model_validator(mode="after")
    def _what_a_teacher_cache_holds(self) -> Recipe:
        if self.data.teacher_cache is not None and (found := not_cacheable(self)) is not None:
            raise ValueError(f"data.teacher_cache is given, but {found}, or leave data.teacher_cache out")
        return self

    @model_validator(mode="after")
    def _somebody_to_compare_with(self) -> Recipe:
        if self.data.on_policy is not None and (found := nothing_compared(self.objective)) is not None:
            raise ValueError(
                f"data.on_policy is given, but {found}, and nothing else is learned from the student's own answers; give such a term "
                "a weight there (objective.kd.weight: 1, without a schedule), or leave data.on_policy out"
            )
        return self

    @model_validator(mode="after")
    def _teacher_where_needed(self) -> Recipe:
        if self.teacher is None and self.objective.needs_teacher:
            raise ValueError(
                f"teacher is missing; name one, or give {listed(self.objective)} a weight of 0 to train by sft alone"
            )
        return self


def not_cacheable(recipe: Recipe) -> str | None:
    """Why a teacher cache cannot be used with the recipe, and how to fix it; None if it can."""
    terms = {name: term for name, term in recipe.objective.terms.items() if term.needs_teacher}
    more = [name for name, term in terms.items() if not term.cacheable]
    if more:
        weights = ", ".join(f"objective.{name}.weight: 0" for name in more)
        return (
            f"{' and '.join(more)} ask(s) the teacher more than a cache holds (hidden states of response and visual rows, IVA's "
            f"attention); leave it out ({weights})"
        )
    if not terms:
        return "no term with weight compares with a teacher; give kd or iva a weight"
    if recipe.data.on_policy is not None:
        return "data.on_policy lets the student answer, which no cache knows beforehand; leave data.on_policy out"
    return None


def nothing_compared(objective: Objective) -> str | None:
    """Where in training no term compares with a teacher, in words; None: nowhere."""
    if not objective.needs_teacher:
        return "no term with weight compares with a teacher"
    for progress in objective.moments():
        if not objective.at_progress(progress).needs_teacher:
            return f"at {progress:.0%} of training no term compares with a teacher"
    return None


def refused_by(engine: str, recipe: Recipe) -> list[Refusal]:
    """The recipe's options that an engine cannot train with."""
    training = recipe.training
    return list(
        refusals(
            engine,
            muon=training.optimizer == "muon",
            half="bf16" if training.bf16 else "fp16" if training.fp16 else None,
            on_policy=recipe.data.on_policy is not None,
            gradient_shares=training.gradient_shares_every > 0,
        )
    )


def listed(objective: Objective) -> str:
    """The terms that need a teacher, in words."""
    *most, last = (name for name, term in objective.terms.items() if term.needs_teacher)
    return f"{', '.join(most)} and {last}" if most else last
