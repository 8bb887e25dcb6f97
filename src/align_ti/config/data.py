"""The options of the training and evaluation data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from align_ti.options import Options


def path_or_sources(value: Any) -> str:
    """Which of its two forms `data.train` has; the names are dropped from messages."""
    return "path-of-one" if isinstance(value, str) else "list-of-sources"


class Source(Options):
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


class OnPolicy(Options):
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


class Data(Options):
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
