"""What every benchmark declares: its questions and its scores. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from align_ti.data.conversation import Picture
from align_ti.evaluation.metrics import Metric


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark as its protocol asks it."""

    id: str
    """Unique in the benchmark; predictions are joined by it."""
    text: str
    """The user's words behind the images, suffix included."""
    images: tuple[Picture, ...]
    """Files are looked for when they are asked about, so that scoring needs none."""
    cluster: str
    """What fails together and is resampled together (usually the image)."""
    kind: str = ""
    """A label for scoring by group: a split, a category, a kind of question; empty if there is none."""
    reference: Any = None
    """What scoring needs to know of the right answer; JSON's types."""
    place: str = ""
    """File and record, for error messages."""


@dataclass(frozen=True, slots=True)
class Report:
    """The scores of one model on one benchmark."""

    metrics: Mapping[str, Metric]
    """By name, in the order in which they are shown."""
    headline: str
    """The metric that tables show, in the unit in which the paper averages it."""
    right: Mapping[str, float]
    """Each item's worth (0 to 1) by id, for pairing and for showing examples."""
    notes: Sequence[str] = field(default_factory=tuple)
    """Sentences about what a reader has to know: missing predictions counted as wrong, denominators that were 0."""


class Benchmark(ABC):
    """A benchmark: one file, one class without state."""

    name: ClassVar[str]
    """The name on the command line."""
    title: ClassVar[str]
    """The name for people."""
    max_new_tokens: ClassVar[int] = 128
    """Tokens of one answer at most, by the protocol."""

    @abstractmethod
    def items(self, folder: Path) -> list[Item]:
        """The questions in their own order, from the files that LLaVA's evaluation guide prescribes under `folder`.

        Raises:
            DataError: a file is missing, of another version, or does not fit the others.
        """

    @abstractmethod
    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        """The scores of the predictions (text by item id). A missing prediction is wrong, and a note counts them.

        Args:
            items: the questions.
            predictions: the answers.
            strict_original: score as the original script does, defects included, where ours differs on purpose.
        """
