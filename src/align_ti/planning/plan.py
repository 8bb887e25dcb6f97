"""The plan of a run: memory of a device, bytes sent, and the first option to change if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from align_ti.config import Lora, Recipe, not_cacheable, refused_by
from align_ti.config.engines import DEEPSPEED
from align_ti.errors import ConfigError
from align_ti.models import families
from align_ti.models.adapters import unwrapped
from align_ti.notebooks import paragraph, table
from align_ti.planning.memory import Layout, Memory, Model, changed, memory_of, model_of
from align_ti.planning.sizes import Pair, pretend_pair
from align_ti.planning.step import Batch
from align_ti.planning.traffic import Traffic, traffic_of
from align_ti.training.passes import candidate_options

FILLED = 0.9
"""Share of a device that a plan may fill: an allocator's blocks, libraries and longer records need the rest, as in `align-ti check`."""

NOTHING_FITS = "none of these options makes it fit: use smaller models or devices with more memory."
"""What is said where no option helps."""

VISUAL, RESPONSE = 576, 256
"""Visual tokens of a record where the config does not tell, and response tokens where nobody does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run that is planned: what the options of advice change."""

    recipe: Recipe
    batch: Batch
    layout: Layout


@dataclass(frozen=True, slots=True)
class Advice:
    """An option that takes less memory: what to set, and the bytes of a device with it alone."""

    change: str
    total: int
    fits: bool | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take on each device."""

    case: Case
    memory: Memory
    traffic: Traffic
    assumed: tuple[str, ...]
    advice: tuple[Advice, ...] = ()
    first: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "layout": asdict(self.case.layout),
            "batch": asdict(self.case.batch),
            "memory_bytes": {**self.memory.parts, "total": self.memory.total},
            "sent_bytes_per_step": {**self.traffic.parts, "total": self.traffic.total},
            "assumed": list(self.assumed),
            "options": [asdict(one) for one in self.advice],
            "first_option": self.first,
        }

    def _repr_html_(self) -> str:
        """What `align-ti plan` prints: memory by part, bytes sent, what was assumed, and what to change if it does not fit."""
        layout = self.case.layout
        parts = [*shown_mapping(self.memory.parts), ("total", f"{self.memory.total / 1e9:,.3f}")]
        shown = [table(("component", "GB"), parts, f"memory per device: {layout.engine}, {layout.devices} device(s)")]
        if self.traffic.parts:
            sent = shown_mapping(self.traffic.parts)
            shown.append(table(("data", "GB"), sent, "sent per device and optimizer step"))
        if self.assumed:
            shown.append(paragraph(f"assumed: {'; '.join(self.assumed)}."))
        if self.advice:
            total = self.memory.total
            options = [
                (
                    one.change,
                    f"{one.total / 1e9:,.3f}",
                    f"{(total - one.total) / 1e9:,.3f}",
                    "yes" if one.fits else "no",
                )
                for one in self.advice
            ]
            shown.append(
                table(("option (alone)", "GB", "saved", "fits"), options, "does not fit: options that save memory")
            )
            shown.append(paragraph(f"change first: {self.first}." if self.first else NOTHING_FITS))
        return "".join(shown)


def batch_of(
    recipe: Recipe,
    pair: Pair,
    *,
    tokens: int | None = None,
    visual: int | None = None,
    response: int | None = None,
    records: int | None = None,
    row_share: float = 1.0,
) -> tuple[Batch, tuple[str, ...]]:
    """The micro-batch that is planned for, and what of it was assumed."""
    assumed = []
    if tokens is None:
        tokens = recipe.data.max_length
        assumed.append(f"every record has {tokens} tokens (data.max_length; --tokens)")
    if visual is None:
        told = families.tokens_per_tile(unwrapped(pair.student))
        visual = min(VISUAL if told is None else told, tokens // 2)
        assumed.append(f"{visual} of them are visual ({'one image' if told else 'not given by the config'}; --visual)")
    if response is None:
        response = max(1, min(RESPONSE, (tokens - visual) // 2))
        assumed.append(f"{response} of them are response (--response)")
    if row_share == 1.0 and candidate_options(recipe.objective.terms) is not None:
        assumed.append("every candidate is computed in its own row, the upper bound (--row-share)")
    records = recipe.training.per_device_train_batch_size if records is None else records
    return Batch(records=records, tokens=tokens, visual=visual, response=response, row_share=row_share), tuple(assumed)


def make_plan(
    recipe: Recipe,
    layout: Layout,
    *,
    limit: int | None = None,
    accelerator: bool = True,
    counted: Models | None = None,
    **sizes: Any,
) -> Plan:
    """The plan of a recipe; with a limit of bytes, what to change if it does not fit.

    Args:
        recipe: the run.
        layout: engine and devices.
        limit: bytes of a device.
        accelerator: chunks of rows as on an accelerator; else as on a CPU.
        counted: what was counted for other plans, to be used again.
        sizes: tokens, visual, response, records and row_share, as `batch_of` takes them.

    Raises:
        ConfigError: the teacher is to be sharded, but is quantised or has a place of its own; or the engine cannot
            train with an option of the recipe.
    """
    for refusal in refused_by(layout.engine, recipe):
        raise ConfigError(str(refusal))
    if layout.shard_teacher and not can_shard(recipe):
        raise ConfigError(
            "the teacher is to be sharded (teacher.sharded, --shard-teacher), but teacher.quantization or teacher.device is given; "
            "only floating-point weights on the student's device are accepted; leave out one of the two."
        )
    pair = pretend_pair(recipe)
    batch, assumed = batch_of(recipe, pair, **sizes)
    case = Case(recipe=recipe, batch=batch, layout=layout)
    counted = Models(accelerator) if counted is None else counted
    model = counted.of(case, pair)
    memory = memory_of(model, layout)
    traffic = traffic_of(
        model,
        layout,
        recipe.training.gradient_accumulation_steps,
        draws=candidate_options(recipe.objective.terms) is not None,
        terms=len(recipe.objective.active),
    )
    if recipe.objective.scheduled:
        assumed = (*assumed, "every term has its own options all along, without its schedule")
    plan = Plan(case, memory, traffic, (*assumed, *model.counted.notes))
    if limit is None or memory.total <= FILLED * limit:
        return plan
    advice, first = advise(case, counted, FILLED * limit, memory.total)
    return replace(plan, advice=advice, first=first)


class Models:
    """Counts each recipe and batch once, whatever layouts they are looked at under."""

    def __init__(self, accelerator: bool) -> None:
        self.accelerator = accelerator
        self._made: dict[tuple[str, Batch], Model] = {}

    def of(self, case: Case, pair: Pair | None = None) -> Model:
        """The sizes and the counted step of a case."""
        key = (case.recipe.model_dump_json(), case.batch)
        if key not in self._made:
            self._made[key] = model_of(case.recipe, case.batch, accelerator=self.accelerator, pair=pair)
        return self._made[key]

    def bytes_of(self, case: Case) -> int:
        """Bytes of a device in a case."""
        return memory_of(self.of(case), case.layout).total


# --- what to change ---------------------------------------------------------------------------------------------------

Change = Callable[[Case], tuple[str, Case] | None]
"""Gives what to set and the changed case, or None where there is nothing to change."""


def checkpointing(case: Case) -> tuple[str, Case] | None:
    """Recompute the student's layers: costs time alone."""
    if case.recipe.training.gradient_checkpointing:
        return None
    recipe = changed(case.recipe, training={"gradient_checkpointing": True})
    return "training.gradient_checkpointing: true", replace(case, recipe=recipe)


def autocast(case: Case) -> tuple[str, Case] | None:
    """Activations in bfloat16, weights as they are."""
    training = case.recipe.training
    if training.bf16 or training.fp16 or case.recipe.student.dtype != "float32" or case.layout.engine in DEEPSPEED:
        return None
    return "training.bf16: true", replace(case, recipe=changed(case.recipe, training={"bf16": True}))


def smaller_batch(case: Case) -> tuple[str, Case] | None:
    """Micro-batches of one record, as many as make the same step."""
    records, training = case.batch.records, case.recipe.training
    if records == 1:
        return None
    accumulated = training.gradient_accumulation_steps * records
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulated}
    recipe = changed(case.recipe, training=changes)
    told = f"training.per_device_train_batch_size: 1 with training.gradient_accumulation_steps: {accumulated}"
    return told, replace(case, recipe=recipe, batch=replace(case.batch, records=1))


def half_teacher(case: Case) -> tuple[str, Case] | None:
    """The teacher's weights in bfloat16."""
    teacher = case.recipe.teacher
    if teacher is None or teacher.dtype == "bfloat16" or teacher.quantization is not None:
        return None
    if case.recipe.data.teacher_cache is not None:
        return None  # a cache is of one precision
    return "teacher.dtype: bfloat16", replace(case, recipe=changed(case.recipe, teacher={"dtype": "bfloat16"}))


def quantised_teacher(case: Case) -> tuple[str, Case] | None:
    """The teacher's linear layers in four bits; its distributions change a little."""
    teacher = case.recipe.teacher
    if teacher is None or teacher.quantization is not None or case.recipe.data.teacher_cache is not None:
        return None
    made = whole_teacher(case)
    recipe = changed(made.recipe, teacher={"quantization": {"load_in_4bit": True}})
    return "teacher.quantization: {load_in_4bit: true}" + no_longer_sharded(case), replace(made, recipe=recipe)


def cached_teacher(case: Case) -> tuple[str, Case] | None:
    """The teacher's head alone, beside what a cache keeps of its pass: the loss stays the same."""
    recipe = case.recipe
    if recipe.teacher is None or recipe.data.teacher_cache is not None or not_cacheable(recipe) is not None:
        return None
    made = whole_teacher(case)
    told = "data.teacher_cache: FOLDER, which `align-ti cache RECIPE --out FOLDER` writes" + no_longer_sharded(case)
    return told, replace(made, recipe=changed(made.recipe, data={"teacher_cache": "FOLDER"}))


def sharded_teacher(case: Case) -> tuple[str, Case] | None:
    """The teacher's weights in parts on all devices, whatever trains the student: gathered again in every pass."""
    recipe, layout = case.recipe, case.layout
    if layout.devices == 1 or layout.shard_teacher or recipe.data.teacher_cache is not None or not can_shard(recipe):
        return None
    recipe = changed(recipe, teacher={"sharded": True})
    return "teacher.sharded: true (--shard-teacher)", replace(
        case, recipe=recipe, layout=replace(layout, shard_teacher=True)
    )


def can_shard(recipe: Recipe) -> bool:
    """Whether there is a teacher that can be sharded: neither quantised nor at a place of its own."""
    teacher = recipe.teacher
    return teacher is not None and teacher.quantization is None and teacher.device is None


def whole_teacher(case: Case) -> Case:
    """The case with its teacher in one piece on every device."""
    recipe = changed(case.recipe, teacher={"sharded": False})
    return replace(case, recipe=recipe, layout=replace(case.layout, shard_teacher=False))


def no_longer_sharded(case: Case) -> str:
    """What else is to be set where the teacher was sharded."""
    return " with teacher.sharded: false" if case.layout.shard_teacher else ""


def launched_by(engine: str) -> Change:
    """Another engine on the same devices."""

    def change(case: Case) -> tuple[str, Case] | None:
        now = case.layout
        if now.devices == 1 or now.engine == engine or (engine == "zero2" and now.engine != "ddp"):
            return None
        if any(refused_by(engine, case.recipe)):
            return None
        told = (
            f"--engine {engine} (to train: `accelerate launch --config_file {engine}.yaml`, which `align-ti recipes copy {engine} "
            f"{engine}.yaml` writes)"
        )
        return told, replace(case, layout=replace(now, engine=engine))

    return change


def adapters(case: Case) -> tuple[str, Case] | None:
    """Adapters in place of the language model's weights: another student is trained."""
    if case.recipe.student.lora is not None or "language_model" in case.recipe.student.freeze:
        return None
    return "student.lora: {rank: 16}", replace(case, recipe=changed(case.recipe, student={"lora": Lora(rank=16)}))


def shorter(case: Case) -> tuple[str, Case] | None:
    """Records of half the length, as far as images and responses leave room; longer ones are bad records or cut."""
    batch = case.batch
    tokens = max(batch.tokens // 2, batch.visual + batch.response + 1)
    if tokens >= batch.tokens:
        return None
    recipe = changed(case.recipe, data={"max_length": tokens})
    return f"data.max_length: {tokens}", replace(case, recipe=recipe, batch=replace(batch, tokens=tokens))


@dataclass(frozen=True, slots=True)
class Option:
    """A change that is tried; of those that choose the same thing a run has one."""

    change: Change
    chooses: str | None = None


ORDER: tuple[Option, ...] = (
    Option(checkpointing),
    Option(autocast),
    Option(smaller_batch),
    Option(cached_teacher, "the teacher's form"),
    Option(half_teacher),
    Option(quantised_teacher, "the teacher's form"),
    Option(launched_by("zero2"), "engine"),
    Option(launched_by("fsdp2"), "engine"),
    Option(sharded_teacher, "the teacher's form"),
    Option(adapters),
    Option(shorter),
)
"""What is tried, those that change least of what is learned first."""


def advise(case: Case, counted: Models, room: float, total: int) -> tuple[tuple[Advice, ...], str | None]:
    """Every option with its bytes by itself, and the first that makes the run fit; where none does, those that do so together."""
    found = []
    for option in ORDER:
        made = option.change(case)
        if made is not None:
            size = counted.bytes_of(made[1])
            found.append(Advice(made[0], size, size <= room))
    first = next((one.change for one in found if one.fits), None)
    return tuple(found), first if first is not None else together(case, counted, room, total)


def together(case: Case, counted: Models, room: float, total: int) -> str | None:
    """The options that fit when they are taken one after the other, as far as each saves something; None if all of them do not.

    A later choice of the engine or of the teacher's form takes the place of an earlier one.
    """
    taken: list[Option] = []
    for option in ORDER:
        kept = [one for one in taken if option.chooses is None or one.chooses != option.chooses]
        told, tried = taken_together(case, kept)
        made = option.change(tried)
        if made is None or (size := counted.bytes_of(made[1])) >= total:
            continue
        taken, total = [*kept, option], size
        if total <= room:
            return " and ".join([*told, made[0]])
    return None


def taken_together(case: Case, options: Sequence[Option]) -> tuple[list[str], Case]:
    """What to set for all of the options, and the case with them."""
    told = []
    for option in options:
        if (made := option.change(case)) is not None:
            told.append(made[0])
            case = made[1]
    return told, case


def shown_mapping(parts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Parts as rows of a table, in GB (10^9 bytes), largest first."""
    return [(name, f"{size / 1e9:,.3f}") for name, size in sorted(parts.items(), key=lambda part: -part[1])]
