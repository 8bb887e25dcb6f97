"""The options of student and teacher, and those of `align-ti compose`."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from align_ti.options import Options

PARTS = ("vision_tower", "projector", "language_model")
"""The parts of a model that `student.freeze` knows by name."""


class Lora(Options):
    """Low-rank adapters (LoRA, DoRA): the weights of a wrapped layer are frozen, and two small matrices beside them are
    trained.

    A model part with a wrapped layer is trained through its adapters alone; other parts are trained in full unless they are
    frozen. The finished student has the adapters merged.

    Source: Hu et al. (arXiv:2106.09685); DoRA: Liu et al. (arXiv:2402.09353).
    """

    where: ClassVar[str] = "student.lora"
    rank: int = Field(default=16, ge=1)
    """Rank of the two matrices."""
    alpha: int = Field(default=32, ge=1)
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """Linear layers to wrap, by the end of their name (q_proj) or a pattern over it (language_model.layers.1*.q_proj); frozen layers
    are left out. By default every linear layer of the language model that is not frozen."""
    dora: bool = False
    """Train the magnitude of each weight vector separately from its direction (DoRA)."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which keeps high ranks stable."""


class Student(Options):
    """The model that is trained."""

    where: ClassVar[str] = "student"
    path: str = Field(min_length=1)
    """A folder or hub name of a vision-language model that transformers loads."""
    freeze: tuple[str, ...] = ("vision_tower",)
    """What is frozen: model parts (vision_tower, projector, language_model), or patterns over parameter names, such as
    language_model.layers.0.*."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights during training. float16 is for frozen weights only (with adapters)."""
    lora: Lora | None = None
    """Train adapters instead of the language model's own weights."""

    @field_validator("freeze")
    @classmethod
    def _parts_or_patterns(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in PARTS and "." not in name and "*" not in name:
                near = difflib.get_close_matches(name, PARTS, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"{name!r} is no part of a model; {hint}accepted: {', '.join(PARTS)}, or a pattern over parameter names such as "
                    "language_model.layers.0.*"
                )
        return names


class Teacher(Options):
    """The model to imitate; frozen and in eval mode."""

    where: ClassVar[str] = "teacher"
    path: str = Field(min_length=1)
    """A folder or hub name of a vision-language model with the student's tokenizer. If its processor produces different inputs
    from a record than the student's, each model reads its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto: as they were saved."""
    quantization: dict[str, Any] | None = Field(default=None, min_length=1)
    """Options of one of transformers' quantization methods, such as {load_in_4bit: true} or {quant_method: quanto, weights: int8}."""
    device: str | None = Field(default=None, pattern=r"^(auto|cpu|mps|(cuda|xpu|npu)(:\d+)?)$")
    """The teacher's device: cpu, cuda:1, ..., or auto: spread over all accelerators. By default the student's device."""
    sharded: bool = False
    """Spread the teacher's weights over all processes, and gather each layer when it is called; no effect with one process."""


class Composition(Options):
    """A new LLaVA model from a vision tower and a language model."""

    where: ClassVar[str] = "compose"
    vision: str = Field(min_length=1)
    """A folder or hub name of a SigLIP or CLIP checkpoint: the vision tower alone, or both towers."""
    text: str = Field(min_length=1)
    """A folder or hub name of a causal language model."""
    out: str = Field(min_length=1)
    """The folder to write: new or empty."""
    feature_layer: int = -2
    """The hidden state of the tower that the projector reads: 0 its embeddings, -1 after its last layer, -2 before it (as in
    LLaVA-1.5)."""
    select_strategy: Literal["full", "default"] | None = None
    """full: every position; default: all but the first, which is CLIP's class token. By default full for SigLIP, default for CLIP."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the saved weights; auto: the language model's."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Random seed of the projector's initialisation."""
    chat_template: str | None = None
    """A Jinja file, or vicuna. By default the language model's own template, extended to place images, or vicuna if it has
    none."""
