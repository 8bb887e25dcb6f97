"""Models of a recipe with shapes and no memory: nothing but their configs is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from align_ti.config import Recipe, Teacher
from align_ti.errors import ModelError
from align_ti.models.adapters import unwrapped, wrap_with_lora
from align_ti.models.families import backbone, tower
from align_ti.models.loading import check_precision, freeze, not_loaded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions of weights by their names in a recipe."""

PRETENDING = FakeTensorMode(allow_non_fake_inputs=True)
"""What all weights without memory belong to; those of two modes cannot be computed with together."""

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Pair:
    """Student and teacher as a recipe trains them, without memory."""

    student: PreTrainedModel | PeftModel
    teacher: PreTrainedModel | None


def read_config(path: str) -> PreTrainedConfig:
    """The config of a model in a folder or of a hub name.

    Raises:
        ModelError: there is none.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise not_loaded(path, error) from error
    return config


def on_meta(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """The vision-language model of a config on the meta device, in eval mode.

    Args:
        config: the model's config.
        dtype: precision of the weights; "auto": the one that the config names, else float32.

    Raises:
        ModelError: transformers has no vision-language model of this kind.
    """
    named = getattr(config, "dtype", None) if dtype == "auto" else DTYPES[dtype]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=named or torch.float32)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"a model of type {config.model_type!r} cannot be planned, since transformers has no vision-language model of that type; "
            "a config of one (model_type: llava, qwen2_vl, ...) is accepted; see student.path and teacher.path."
        ) from error
    model.eval()
    return model


def pretended(model: Model) -> Model:
    """The model of the meta device as one that says it is on the CPU, so that it runs as there, without memory."""
    with PRETENDING:
        model.to_empty(device="cpu")
    # Moving gave every name weights of its own.
    unwrapped(model).tie_weights()
    return model


def pretend_pair(recipe: Recipe) -> Pair:
    """The models of a recipe, frozen and wrapped as for training.

    Raises:
        ModelError: a config cannot be read, or what the recipe freezes or wraps is not there.
    """
    student = on_meta(read_config(recipe.student.path), recipe.student.dtype)
    freeze(student, recipe.student.freeze)
    teacher = None
    if recipe.teacher is not None and recipe.objective.needs_teacher:
        teacher = on_meta(read_config(recipe.teacher.path), recipe.teacher.dtype).requires_grad_(False)
    wrapped: PreTrainedModel | PeftModel = student
    if recipe.student.lora is not None:
        with torch.device("meta"):
            wrapped = wrap_with_lora(student, **recipe.student.lora.model_dump())
    check_precision(wrapped, fp16=recipe.training.fp16)
    return Pair(pretended(wrapped), None if teacher is None else pretended(teacher))


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of a model's weights.

    `largest` is the largest unit that sharding gathers at a time, `root` what belongs to no unit, `tower` the vision tower's share of
    all. `numel` counts weights, `trained_numel` and `trained_tensors` those that are trained.
    """

    weights: int
    numel: int
    trained: int
    largest: int
    root: int
    tower: int
    trained_numel: int
    trained_tensors: int

    @property
    def optimizer(self) -> int:
        """AdamW's two states, in the precision of the weights, and its count of steps for each tensor."""
        return 2 * self.trained + 4 * self.trained_tensors


def sizes_of(model: nn.Module) -> Sizes:
    """The bytes of a model's weights; units are the layers that its class says are not to be split."""
    inner: Any = unwrapped(model) if isinstance(model, PeftModel) else model
    names = set(getattr(inner, "_no_split_modules", None) or ())
    units = [module for module in model.modules() if type(module).__name__ in names]
    inside = [{id(parameter): size_of(parameter) for parameter in unit.parameters()} for unit in units]
    every = {id(parameter): size_of(parameter) for parameter in model.parameters()}
    in_units = {key for unit in inside for key in unit}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seeing = tower(inner) if isinstance(inner, PreTrainedModel) else None
    return Sizes(
        weights=sum(every.values()),
        numel=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(size_of(parameter) for parameter in trained),
        largest=max((sum(unit.values()) for unit in inside), default=0),
        root=sum(size for key, size in every.items() if key not in in_units),
        tower=0 if seeing is None else sum(size_of(parameter) for parameter in seeing.parameters()),
        trained_numel=sum(parameter.numel() for parameter in trained),
        trained_tensors=len(trained),
    )


BITS = {"load_in_4bit": 4, "load_in_8bit": 8}
"""bitsandbytes' options, and the bits of a weight under them."""


def quantised_bytes(model: PreTrainedModel, teacher: Teacher) -> int:
    """Bytes of the teacher's weights as its settings quantise them: linear layers of its backbone in fewer bits, the rest as it was.

    An estimate: scales and zero points count one sixteenth on top.
    """
    plain = sum(size_of(parameter) for parameter in model.parameters())
    if teacher.quantization is None:
        return plain
    bits = bits_of(teacher.quantization)
    linear = [layer.weight for layer in backbone(model).modules() if isinstance(layer, nn.Linear)]
    return (
        plain - sum(size_of(weight) for weight in linear) + sum(weight.numel() * bits * 17 // 128 for weight in linear)
    )


def bits_of(quantization: dict[str, Any]) -> int:
    """Bits of a weight under options of a quantization method; 8 where they do not tell."""
    for name, bits in BITS.items():
        if quantization.get(name):
            return bits
    told = str(quantization.get("weights", quantization.get("bits", quantization.get("quant_type", ""))))
    return next((bits for bits in (2, 3, 4) if told in {str(bits), f"int{bits}"} or f"int{bits}_" in told), 8)
