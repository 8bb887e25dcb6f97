"""Memory of a device by part: exact bytes of what an engine keeps there, and what a counted step keeps alive beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align_ti.config import ENGINES, Recipe
from align_ti.config.engines import DEEPSPEED
from align_ti.errors import ConfigError
from align_ti.models import families
from align_ti.models.adapters import unwrapped
from align_ti.planning.live import GRADIENTS
from align_ti.planning.sizes import Pair, Sizes, pretend_pair, quantised_bytes, sizes_of
from align_ti.planning.step import Batch, Counted, step
from align_ti.training.optimizers import saved_bytes

LAYOUTS = ("one", *ENGINES)
"""one: a device by itself; or an engine."""

LIVE_PARAMETERS = 10**9
"""Weights that ZeRO-3 keeps gathered at most: DeepSpeed's own default of stage3_max_live_parameters."""

BUCKET = 5 * 10**8
"""Elements of one of ZeRO's buckets at most: DeepSpeed's own default of reduce_bucket_size."""

PARTS = {
    "student forward": "activations",
    "student second pass": "second pass",
    "teacher second pass": "second pass",
    "teacher forward": "teacher's pass",
    "capture": "teacher's pass",
    "divergence": "rows",
    GRADIENTS: GRADIENTS,
}
"""The part that a phase of a step is told under; all others are `other`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run is spread: the engine, the number of devices, and whether the teacher is sharded, whatever trains the student."""

    engine: str = "one"
    devices: int = 1
    shard_teacher: bool = False

    def __post_init__(self) -> None:
        if self.engine not in LAYOUTS:
            raise ConfigError(f"--engine is {self.engine!r}; accepted: {', '.join(LAYOUTS)}; choose one of them.")
        if self.devices < 1 or (self.engine == "one") != (self.devices == 1):
            raise ConfigError(
                f"--engine is {self.engine} with --devices {self.devices}; accepted: one for 1 device, any other for 2 or more; "
                "change one of the two."
            )
        if self.shard_teacher and self.devices == 1:
            raise ConfigError(
                "--shard-teacher is given with 1 device, but sharding needs several; accepted: --devices 2 or more; "
                "use more devices, or leave it out."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a recipe's models take and what a micro-batch keeps alive: all that does not depend on the layout."""

    student: Sizes
    teacher: Sizes | None
    teacher_bytes: int
    cache: int
    half: bool
    accumulated: bool
    own_device: bool
    counted: Counted
    cached: bool = False
    """Whether the teacher is its head alone, beside a teacher cache; it is neither sharded nor quantised."""
    saved: int = 0
    """Bytes of the optimizer's states that Muon does without."""


def model_of(recipe: Recipe, batch: Batch, *, accelerator: bool = True, pair: Pair | None = None) -> Model:
    """Sizes and counted step of a recipe."""
    pair = pretend_pair(recipe) if pair is None else pair
    settings, cached = recipe.teacher, recipe.data.teacher_cache is not None
    teacher, teacher_bytes = None, 0
    if pair.teacher is not None and settings is not None:
        teacher = sizes_of(families.head(pair.teacher) if cached else pair.teacher)
        teacher_bytes = teacher.weights if cached else quantised_bytes(pair.teacher, settings)
    return Model(
        student=sizes_of(pair.student),
        teacher=teacher,
        teacher_bytes=teacher_bytes,
        cache=cache_bytes(pair, recipe, batch),
        half=recipe.training.bf16 or recipe.training.fp16 or recipe.student.dtype != "float32",
        accumulated=recipe.training.gradient_accumulation_steps > 1,
        own_device=settings is not None and settings.device is not None and not cached,
        counted=step(recipe, batch, accelerator=accelerator, pair=pair),
        cached=cached,
        saved=saved_bytes(pair.student) if recipe.training.optimizer == "muon" else 0,
    )


def cache_bytes(pair: Pair, recipe: Recipe, batch: Batch) -> int:
    """Bytes of the student's keys and values that candidates reuse; 0 where nothing draws them or the packed form keeps none."""
    student = unwrapped(pair.student)
    options = [term.candidate_options for term in recipe.objective.terms.values() if term.candidate_options is not None]
    if not options or options[0].is_packed(student):
        return 0
    config: Any = families.language_model(student).config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = 2 if recipe.training.bf16 or recipe.training.fp16 else next(student.parameters()).element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * batch.records * batch.tokens * element)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device by part, at the moment of a step when most is held."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def memory_of(model: Model, layout: Layout) -> Memory:
    """The memory of one device under a layout."""
    student, share = model.student, 1 / layout.devices
    element = 2 if model.half else 4
    parts = {"student's weights": student.weights, "teacher's weights": 0 if model.own_device else model.teacher_bytes}
    parts |= {"gradients": student.trained, "optimizer": student.optimizer - model.saved}
    sharded = layout.engine not in {"one", "ddp"}
    if layout.engine == "ddp":
        parts["exchange"] = student.trained  # the buckets that gradients are sent from
    if layout.engine in DEEPSPEED:
        # DeepSpeed trains a float32 copy of its own, and with half precision turns the model itself into it.
        whole = student.trained_numel
        if model.half:
            parts["student's weights"] = student.numel * element
            parts["gradients"] = whole * element
        parts["optimizer"] = 12 * whole
        parts["exchange"] = 2 * element * min(BUCKET, whole)
    if layout.engine == "zero3":
        parts["gathered"] = min(parts["student's weights"], LIVE_PARAMETERS * element)
    if layout.engine == "fsdp2":
        # The unit that is computed with, the next one on its way, and what belongs to no unit; the gradient of both before it is sent.
        parts["gathered"] = min(2 * student.largest + student.root, student.weights)
        parts["exchange"] = min(student.largest + student.root, student.trained)
    if sharded:
        for name in ("gradients", "optimizer", *(("student's weights",) if layout.engine != "zero2" else ())):
            parts[name] = int(parts[name] * share)
    if layout.shard_teacher and model.teacher is not None and not model.own_device and not model.cached:
        ratio = model.teacher_bytes / max(model.teacher.weights, 1)
        gathered = (2 * model.teacher.largest + model.teacher.root) * ratio
        parts["teacher's weights"] = int(model.teacher_bytes * share)
        parts["gathered"] = parts.get("gathered", 0) + int(min(gathered, model.teacher_bytes))
    alive = named(model.counted.peak_apart if sharded else model.counted.peak, model)
    there = alive.pop(GRADIENTS, 0)
    if not sharded and not model.accumulated:
        # Gradients are made while activations are freed: at the peak only some of both are there.
        if sum(alive.values()) + there < student.trained:
            alive = {}
        else:
            parts["gradients"] = there
    return Memory({name: size for name, size in {**parts, **alive}.items() if size})


def named(counted: Mapping[str, int], model: Model) -> dict[str, int]:
    """What is alive by the parts of a plan; the cache is told apart from the activations that it belongs to."""
    found: dict[str, int] = {}
    for phase, size in counted.items():
        name = PARTS.get(phase, "other")
        if not (model.own_device and name == "teacher's pass"):
            found[name] = found.get(name, 0) + size
    cache = min(model.cache, found.get("activations", 0))
    if cache:
        found["activations"] -= cache
        found["cache"] = cache
    return found


def changed(recipe: Recipe, **sections: dict[str, Any] | None) -> Recipe:
    """The recipe with some options of its sections changed."""
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=options)
            for name, options in sections.items()
            if options is not None
        }
    )
