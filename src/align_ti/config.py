"""Every option of a run, declared once; reads a recipe strictly. Imports no torch.

A recipe is a YAML file with the sections of `Recipe`. `read_recipe` reports every error of a file in one message, each with the
option's full name, what was found, what is accepted, and the nearest known key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from align_ti.errors import ConfigError
from align_ti.options import Knobs, checked, explain, placed, sentence
from align_ti.registry import load_extension, lookup, names, suggestion

# --- the objective ----------------------------------------------------------------------------------------------------


DEFAULT_TERMS = ("sft", "kd", "iva", "tpa")
"""The terms of Align-TI, which every objective has by default; any other term is used only if it is named."""


class Objective(Knobs):
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
    def section(cls, name: str) -> type[Knobs] | None:
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
        """Fractions of training that show every set of terms with weight: the times of all schedules, and one between each two."""
        courses = [course for term in self.terms.values() for course in term.schedule.values()]
        times = sorted({0.0, 1.0, *(time for course in courses for time in (course.begin, course.end))})
        return [moment for begin, end in pairwise(times) for moment in (begin, (begin + end) / 2)]

    def stages(self) -> list[tuple[float, Objective]]:
        """The parts of training in which a step does the same work: the fraction of training that each takes, and the objective in
        the middle of it, without schedules.

        Weights change no work unless they are 0. Any other option may: where one changes gradually, the middle counts for the part.
        """
        moments = self.moments()
        found: list[tuple[float, Objective]] = []
        for begin, middle in zip(moments[::2], moments[1::2], strict=True):
            inside, share = self.at_progress(middle), 2 * (middle - begin)
            same = [place for place, (_, other) in enumerate(found) if other.same_work(inside)]
            if same:
                found[same[0]] = (found[same[0]][0] + share, found[same[0]][1])
            else:
                found.append((share, inside))
        return found

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


# --- a run ------------------------------------------------------------------------------------------------------------


PARTS = ("vision_tower", "projector", "language_model")
"""The parts of a model that `student.freeze` knows by name."""


class Lora(Knobs):
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


class Student(Knobs):
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


class Teacher(Knobs):
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


def path_or_sources(value: Any) -> str:
    """Which of its two forms `data.train` has; the names are dropped from messages."""
    return "path-of-one" if isinstance(value, str) else "list-of-sources"


class Source(Knobs):
    """One of several sources of training data."""

    where: ClassVar[str] = "data.train"
    path: str = Field(min_length=1)
    """A file (.json, .jsonl, .parquet), a folder (of `save_to_disk`, or of parquet files), or a hub name (owner/name)."""
    images: str | None = None
    """The root folder of image names; by default data.images, then the data file's own folder."""
    format: Literal["auto", "llava", "messages", "prompt_completion", "plain"] = "auto"
    """The format of a record. auto: by its keys (conversations, messages, prompt and completion). plain: a LLaVA record of two
    turns whose question is reduced to its image, as in LLaVA's pretraining on captions."""
    split: str | None = None
    """The split to use, if the source has several."""
    subset: str | None = None
    """The configuration (subset) of a hub dataset, if it has several."""
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """This source's share of the mix, relative to the other weights. The mix is as large as possible without using a record
    twice."""
    count: int | None = Field(default=None, ge=1)
    """Number of records, drawn with the seed and without replacement; by default all of them."""
    find_extension: bool = False
    """Look for a missing image under another extension (.jpg, .jpeg, .png, .gif, .webp, .bmp). Exactly one such file has to
    exist; the number of images found in this way is reported."""


Train = Annotated[
    Annotated[str, Field(min_length=1), Tag("path-of-one")] | Annotated[tuple[Source, ...], Tag("list-of-sources")],
    Discriminator(path_or_sources),
]


class OnPolicy(Knobs):
    """On-policy batches: with some probability the student answers in place of the data, and both models read its answer.

    The last response of every record of the batch is replaced; no gradient flows through the sampling of its tokens.

    Source: GKD (arXiv:2306.13649), the student data fraction lambda.
    """

    where: ClassVar[str] = "data.on_policy"
    probability: float = Field(default=0.5, gt=0, le=1)
    """Probability that the student answers a micro-batch (lambda); 1: all of them."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum number of tokens of one answer; an answer that reaches it is kept as it is, and counted as truncated."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Sampling temperature of the answer; no effect on the divergence. 1: the student's own distribution. TRL's GKD trainer
    uses 0.9."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from the k most probable tokens only."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the smallest set of most probable tokens that together reach this probability."""


class Data(Knobs):
    """The training and evaluation data."""

    where: ClassVar[str] = "data"
    train: Train
    """A file, folder or hub dataset of training conversations, or a list of such sources."""
    eval: str | None = None
    """A file, folder or hub dataset to evaluate on."""
    eval_split: str | None = None
    """The split of `eval` to use, if it has several."""
    images: str | None = None
    """The root folder of image names; by default the data file's own folder."""
    max_length: int = Field(default=2048, ge=2)
    """Maximum number of tokens of one record, visual tokens included."""
    too_long: Literal["error", "truncate"] = "error"
    """What happens to a record longer than max_length. error: it is a bad record. truncate: the end of its last response is
    removed, end-of-turn token included; a record that would lose every response token is still bad."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What happens to a record that cannot be used. error: the run stops. skip: every record is checked before training, and
    those that are left out are listed with their reasons in `skipped.jsonl` in the run folder."""
    max_skipped: int | float = 0.01
    """Maximum of skipped records, above which the run stops: a number of records, or below 1 a share of all records read."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Where processed records are kept; useful if they are seen more than once. true means memory, false none."""
    cache_dir: str | None = None
    """The folder of the disk cache; several runs may share it."""
    responses: Literal["gold", "teacher", "mixed"] = "gold"
    """The source of the responses to learn. gold: the recorded ones. teacher: the answers in `answers`, which
    `align-ti generate` wrote. mixed: for each record the teacher's answers with probability teacher_share, decided by seed and
    record alone."""
    answers: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """The file of the teacher's answers, or a list of such files. Needed unless responses is gold."""
    teacher_share: float = Field(default=0.5, ge=0, le=1)
    """The share of records that use the teacher's answers, if responses is mixed."""
    stream: bool = False
    """Read one source sequentially instead of as a whole, for data that does not fit into memory. Needs training.max_steps."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """Size of a stream's shuffle buffer in records; 1 keeps its order."""
    on_policy: OnPolicy | None = None
    """Let the student answer some of the batches. By default it learns from the recorded answers only."""
    teacher_cache: str | None = Field(default=None, min_length=1)
    """The folder that `align-ti cache` wrote: KD and IVA use the stored teacher outputs of each record, and the teacher does
    not run."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The training data as a list of sources."""
        return (Source(path=self.train),) if isinstance(self.train, str) else self.train

    @model_validator(mode="before")
    @classmethod
    def _other_spellings(cls, options: Any) -> Any:
        if not isinstance(options, Mapping):
            return options
        changed = dict(options)
        train = options.get("train", "")
        if not isinstance(train, str | list | tuple) or train in ([], ()):
            raise ValueError(f"train is {train!r}; accepted: a path, or a list of sources each with a path; give one")
        if isinstance(train, list):
            changed["train"] = tuple(train)
        if isinstance(options.get("cache"), bool):
            changed["cache"] = "memory" if options["cache"] else "none"
        answers = options.get("answers")
        if not isinstance(answers, str | list | tuple | None):
            raise ValueError(f"answers is {answers!r}; accepted: a path, or a list of paths; give one")
        if answers is not None:
            changed["answers"] = (answers,) if isinstance(answers, str) else tuple(answers)
        return changed

    @model_validator(mode="after")
    def _limit_is_a_count_or_a_share(self) -> Data:
        if not (self.max_skipped >= 0 and (isinstance(self.max_skipped, int) or self.max_skipped < 1)):
            raise ValueError(
                f"max_skipped is {self.max_skipped}; accepted: a number of records (0, 1, ...) or a share of them below 1 (0.01)"
            )
        return self

    @model_validator(mode="after")
    def _one_way_of_mixing(self) -> Data:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and any(source.count is not None for source in self.sources):
            raise ValueError("train has both weight and count; one way of mixing is accepted; give weights or counts")
        if any(weighted) and not all(weighted):
            missing = self.sources[weighted.index(False)].path
            raise ValueError(
                f"train has a weight for some sources but none for {missing!r}; every source needs one, or none has"
            )
        return self

    @model_validator(mode="after")
    def _cache_has_its_folder(self) -> Data:
        if self.cache == "disk" and self.cache_dir is None:
            raise ValueError(
                "cache is 'disk' but cache_dir is missing; name a folder that processed records are kept in"
            )
        if self.cache != "disk" and self.cache_dir is not None:
            raise ValueError(f"cache_dir is given but cache is {self.cache!r}; set cache: disk, or leave cache_dir out")
        return self

    @model_validator(mode="after")
    def _answers_where_they_are_used(self) -> Data:
        if self.responses != "gold" and self.answers is None:
            raise ValueError(
                f"responses is {self.responses!r} but answers is missing; name the file that `align-ti generate` wrote, or set "
                "responses: gold"
            )
        if self.responses == "gold" and self.answers is not None:
            raise ValueError(
                "answers is given but responses is 'gold', which reads none; set responses: teacher or mixed, or leave answers out"
            )
        if self.responses != "mixed" and self.teacher_share != type(self).model_fields["teacher_share"].default:
            raise ValueError(
                f"teacher_share is {self.teacher_share:g} but responses is {self.responses!r}, where nothing is shared out; set "
                "responses: mixed, or leave teacher_share out"
            )
        return self

    @model_validator(mode="after")
    def _what_a_stream_can(self) -> Data:
        if self.stream:
            if len(self.sources) > 1 or self.sources[0].weight is not None or self.sources[0].count is not None:
                raise ValueError(
                    "stream reads one whole source; a mix is not accepted; set stream: false, or give one path"
                )
            for name, accepted in (
                ("on_bad_record", "error"),
                ("too_long", "error"),
                ("cache", "none"),
                ("responses", "gold"),
            ):
                if getattr(self, name) != accepted:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, which needs all records before training, and stream is true; set "
                        f"{name}: {accepted}, or stream: false"
                    )
        return self


class Training(Knobs):
    """Optimiser, schedule, batches and logging; names are those of transformers' TrainingArguments."""

    where: ClassVar[str] = "training"
    max_steps: int = Field(default=-1, ge=-1)
    """Number of optimizer steps; -1: as many as num_train_epochs needs."""
    num_train_epochs: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Passes over the data, if max_steps is -1."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the weights of linear layers, AdamW for the rest (embeddings, head, norms, biases), with the same
    learning rate and weight decay. Muon needs PyTorch 2.9; not under DeepSpeed."""
    learning_rate: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule."""
    warmup_steps: float = Field(default=0.03, ge=0, allow_inf_nan=False)
    """Steps of linear warm-up; below 1: a share of all steps."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    """AdamW's decay rate of the squared-gradient average; lower (0.98) for runs of few steps."""
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Maximum gradient norm (gradient clipping)."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Records per forward pass on one device."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step. Terms are normalised over the whole step."""
    gradient_checkpointing: bool = False
    """Recompute the student's layers in backward: less memory, more time."""
    bf16: bool = False
    """Train under bfloat16 autocast."""
    fp16: bool = False
    """Train under float16 autocast."""
    torch_compile: bool = False
    """Compile the parts of the language model that treat each token separately (MLPs and norms), student and teacher; the first
    steps wait for the compiler."""
    dataloader_num_workers: int = Field(default=0, ge=0)
    """Worker processes that prepare records."""
    group_by_length: bool = False
    """Batch records of similar length: less padding, a little less randomness. Lengths are estimated from the text and the
    number of images, or exact if the records were checked before training."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between two lines of the log."""
    save_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    phases: bool = False
    """Measure where the time of each step goes and write it to phases.json; on an accelerator this slows the run a little."""
    flops: bool = True
    """Count the FLOPs of the first five steps, which the time of a step leaves out, and estimate the run's from them. Not counted with
    torch_compile, data.on_policy, quantised weights, attention other than eager and sdpa, or DeepSpeed."""
    gradient_shares_every: int = Field(default=0, ge=0)
    """Steps between two measurements of each term's own gradient, for its share in all of them; 0: none. A measurement takes about as
    long as a step for every term. Not under FSDP or DeepSpeed."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the log goes besides the run folder."""

    @model_validator(mode="after")
    def _steps_and_precision(self) -> Training:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0; give 1 or more, or -1 to train for num_train_epochs")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true; one of them is accepted; set the other to false")
        return self


class Scores(Knobs):
    """The sample of training data on which layers are scored (IRS, the instruction-relevance score)."""

    where: ClassVar[str] = "layer_scores"
    images: int = Field(default=64, ge=1)
    """Number of images with two or more instructions."""
    instructions: int = Field(default=4, ge=2)
    """Maximum number of instructions used for each image."""


class Evaluation(Knobs):
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


class Generation(Knobs):
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


class Composition(Knobs):
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


class Recipe(Knobs):
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


def listed(objective: Objective) -> str:
    """The terms that need a teacher, in words."""
    *most, last = (name for name, term in objective.terms.items() if term.needs_teacher)
    return f"{', '.join(most)} and {last}" if most else last


# --- reading ----------------------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """Safe YAML that reads 2e-5 as a number, which YAML 1.1 takes for text, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_recipe(path: Path, changes: Iterable[str] = (), *, allow_extensions: bool = False) -> Recipe:
    """The recipe in a YAML file, with changes of the form `section.key=value` applied to it.

    Args:
        path: the file.
        changes: `section.key=value`, each value read as YAML.
        allow_extensions: run the Python files that the recipe names under `extensions`, so that their divergences and terms are
            known.

    Raises:
        ConfigError: one message with every error of the file; or it names extensions, and they are not allowed.
    """
    path = Path(path)
    content = read_mapping(path, "recipe", "sections such as student and data")
    for change in changes:
        lay_over(content, change)
    run_extensions(path, content.get("extensions"), allowed=allow_extensions)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(Recipe, error)}") from None


def read_mapping(path: Path, called: str, accepted: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        called: what the file is, for messages.
        accepted: what its top level holds.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: the {called} does not exist; `align-ti recipes list` names those that are shipped."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}; fix it.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); a YAML file is accepted.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level is {type(content).__name__}; {accepted} are accepted.")
    return content


ENGINES = "recipes/engines"
"""Where the configs for `accelerate launch` lie."""


def shipped(folder: str = "recipes") -> dict[str, str]:
    """The text of each shipped recipe, or config, by its name."""
    found = sorted(
        (item for item in (files("align_ti") / folder).iterdir() if item.name.endswith(".yaml")),
        key=lambda item: item.name,
    )
    return {item.name.removesuffix(".yaml"): item.read_text(encoding="utf-8") for item in found}


def find_recipe(path: Path) -> Path:
    """The recipe file: as given, or a shipped recipe of that name."""
    # A folder of that name, such as the benchmark's own, is no recipe.
    if not path.is_file() and str(path) in shipped():
        with as_file(files("align_ti") / "recipes" / f"{path}.yaml") as file:
            return Path(file)
    return path


def run_extensions(path: Path, named: Any, *, allowed: bool) -> None:
    """Runs the files that a recipe names under `extensions`. A recipe alone cannot run code: somebody has to allow it.

    Raises:
        ConfigError: they are not allowed, or one cannot be run.
    """
    if not named or not isinstance(named, list) or not all(isinstance(file, str) for file in named):
        return  # nothing to run, or a mistake that the recipe's own check names
    if not allowed:
        raise ConfigError(
            f"{path}: extensions names {', '.join(named)}, which would run code of that file; read it, and allow it by "
            "--allow-extensions (in Python read_recipe(..., allow_extensions=True)), or leave extensions out."
        )
    for file in named:
        load_extension(Path(file))


def lay_over(content: dict[str, Any], change: str) -> None:
    """Write one `section.key=value` into the recipe's content; the value is read as YAML."""
    name, equals, value = change.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set {change!r} is not of the form section.key=value, such as objective.tpa.candidates=2.")
    try:
        put(content, name.strip(), yaml.load(value, Loader), f"--set {change!r}")
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change!r}: the value is not valid YAML: {error}") from error


def put(content: dict[str, Any], name: str, value: Any, told: str) -> None:
    """Write one option into a recipe's content by its full name, such as objective.tpa.candidates.

    Args:
        content: the recipe's content; changed.
        name: the option.
        value: its value, in YAML's types.
        told: what says so, for messages.

    Raises:
        ConfigError: a part of the name is no section.
    """
    *sections, key = name.split(".")
    place: Any = content
    for section in sections:
        entry = list_entry(place, section, told)
        inner = place[entry] if isinstance(place, list) else place.setdefault(entry, {})
        if not isinstance(inner, dict | list):
            raise ConfigError(f"{told}: {section} is no section but {inner!r}; give the name of a key in a section.")
        place = inner
    place[list_entry(place, key, told)] = value


def list_entry(place: dict[str, Any] | list[Any], key: str, told: str) -> Any:
    """The key as it is in a section, and as a number in a list, such as the 0 of data.train.0.path."""
    if isinstance(place, dict):
        return key
    if not key.isdigit() or int(key) >= len(place):
        raise ConfigError(f"{told}: {key!r} is no entry of a list of {len(place)}; accepted: 0 to {len(place) - 1}.")
    return int(key)


_MOVED = ("Sft", "Kd", "Iva", "Tpa")


def __getattr__(name: str) -> Any:
    # The options of Align-TI's terms stand in their terms' files, which import torch; their names are known here too.
    if name in _MOVED:
        return lookup("term", name.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
