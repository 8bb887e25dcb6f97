"""Models and processors of a recipe, loaded and checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Recipe, Teacher
from align_ti.models.adapters import wrap_with_lora
from align_ti.models.headonly import load_head
from align_ti.models.loading import check_precision, freeze, load_model, load_processor, trained_by_part
from align_ti.models.pairing import check_pair, own_processor, shared_tokens
from align_ti.models.placement import stay
from align_ti.training.optimizers import check_optimizer


@dataclass(frozen=True, slots=True)
class Parts:
    """What a recipe names, loaded and checked against each other."""

    student: PreTrainedModel | PeftModel
    teacher: PreTrainedModel | None
    processor: ProcessorMixin
    teacher_processor: ProcessorMixin | None = None

    @property
    def own_processor(self) -> ProcessorMixin | None:
        """The teacher's processor where it makes other inputs than the student's; None where both read the same."""
        return own_processor(self.processor, self.teacher_processor)

    def trained(self) -> dict[str, tuple[int, int]]:
        """Trained and all parameters of each part of the student, adapters included."""
        return trained_by_part(self.student)


def load_parts(recipe: Recipe, compare: bool = True) -> Parts:
    """Models and processors of a recipe, on the CPU; with `compare` they are refused if they do not fit each other. With a teacher
    cache the teacher is its head alone.

    Raises:
        ConfigError: this PyTorch does not have the recipe's optimizer.
        ModelError: one cannot be loaded, or they do not fit each other.
    """
    check_optimizer(recipe.training)
    processor = load_processor(recipe.student.path)
    student = load_base(recipe)
    teacher, teacher_processor = None, None
    if recipe.teacher is not None and recipe.objective.needs_teacher:
        teacher_processor = load_processor(recipe.teacher.path)
        if recipe.data.teacher_cache is None:
            teacher = load_teacher(recipe.teacher).requires_grad_(False)
        else:
            teacher = load_head(Path(recipe.data.teacher_cache) / "teacher")
        if compare:
            own = own_processor(processor, teacher_processor)
            shared_tokens(student, teacher, processor, own)
            check_pair(student, teacher, shared_inputs=own is None)
    wrapped = with_adapters(recipe, student)
    check_precision(wrapped, fp16=recipe.training.fp16)
    return Parts(wrapped, teacher, processor, teacher_processor)


def load_student(recipe: Recipe) -> PreTrainedModel | PeftModel:
    """The student as its training begins, with adapters if the recipe says so."""
    return with_adapters(recipe, load_base(recipe))


def load_base(recipe: Recipe) -> PreTrainedModel:
    """The student without adapters, frozen where the recipe says so."""
    student = load_model(recipe.student.path, recipe.student.dtype)
    freeze(student, recipe.student.freeze)
    return student


def with_adapters(recipe: Recipe, student: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """The student, wrapped by the recipe's adapters if it has any."""
    lora = recipe.student.lora
    return student if lora is None else wrap_with_lora(student, **lora.model_dump())


def load_teacher(settings: Teacher, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The teacher in the form and at the place that its settings say; by default on the given device.

    Quantised weights cannot be moved, so they go to this process's accelerator at once.

    Raises:
        ModelError: it cannot be loaded.
    """
    if settings.device is not None:
        device = settings.device
    elif settings.quantization is not None:
        device = PartialState().device
    teacher = load_model(settings.path, settings.dtype, device, settings.quantization)
    if settings.device is not None:
        stay(teacher)
    return teacher


def launched() -> PartialState:
    """The processes of this launch, on CPUs too."""
    return PartialState(cpu=not torch.accelerator.is_available())
