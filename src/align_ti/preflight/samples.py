"""The first records as the student will read them: roles, responses that are cut, and a rendering that people can read."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from align_ti.data.conversation import Conversation
from align_ti.data.lengths import TooLong, fit, paired
from align_ti.data.roles import INSTRUCTION, RESPONSE, ROLE_NAMES, VISUAL, encode
from align_ti.data.spans import Span, spans
from align_ti.errors import DataError
from align_ti.preflight.verdicts import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Sample:
    """A record and its tensors; those of a teacher with a processor of its own are under `teacher`."""

    record: Conversation
    tensors: dict[str, Any]

    @property
    def length(self) -> int:
        """Tokens of the record, visual ones included."""
        return len(self.tensors["roles"])

    @property
    def looked_at(self) -> bool:
        """Whether an instruction token stands behind a visual one, so that IVA has a weight to read."""
        roles = self.tensors["roles"].tolist()
        return VISUAL in roles and INSTRUCTION in roles[roles.index(VISUAL) :]


@dataclass(frozen=True, slots=True)
class FirstRecords:
    """What became of the first records: usable samples, and a sentence for each that is not."""

    read: int
    usable: list[Sample]
    unreadable: list[str]
    too_long: list[str]
    cut: list[str]


def read_first(
    conversations: Sequence[Conversation],
    processor: ProcessorMixin,
    count: int,
    max_length: int | None = None,
    too_long: TooLong = "error",
    teacher_processor: ProcessorMixin | None = None,
) -> FirstRecords:
    """The first `count` records, encoded as for training; for the teacher too if it has a processor of its own."""
    found = FirstRecords(min(count, len(conversations)), [], [], [], [])
    for index in range(found.read):
        record = conversations[index]
        try:
            tensors = fit(encode(record, processor), max_length, too_long, record.place)
            if teacher_processor is not None:
                tensors = paired(tensors, encode(record, teacher_processor))
            sample = Sample(record, tensors)
        except DataError as error:
            (found.too_long if fits_without_limit(record, processor) else found.unreadable).append(str(error))
            continue
        found.usable.append(sample)
        if missing := missing_answer(sample, processor):
            found.cut.append(f"{record.place}: the response tokens do not contain {missing!r:.60}")
    return found


def fits_without_limit(record: Conversation, processor: ProcessorMixin) -> bool:
    """Whether the record is refused for its length alone."""
    try:
        encode(record, processor)
    except DataError:
        return False
    return True


def missing_answer(sample: Sample, processor: ProcessorMixin) -> str | None:
    """The first answer that the response tokens do not spell in full, whatever cut it; None if all are there."""
    tensors = sample.tensors
    spelled = plain_text(processor.tokenizer.decode(tensors["input_ids"][tensors["roles"] == RESPONSE]))
    answers = (turn.text for turn in sample.record.turns if turn.speaker == "assistant")
    return next((answer for answer in answers if plain_text(answer) not in spelled), None)


def plain_text(text: str) -> str:
    """The text without what tokenizers change: spaces, case, and forms of one character."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


# --- verdicts on the data ---------------------------------------------------------------------------------------------


def data_verdicts(found: FirstRecords, needs_pictures: bool, may_cut: bool = False) -> list[Verdict]:
    """Whether the first records can be read, keep their responses, and have tokens of the roles that the terms need."""
    verdicts = [readable(found), whole_responses(found, may_cut)]
    return [*verdicts, role_shares(found, needs_pictures)] if found.usable else verdicts


def readable(found: FirstRecords) -> Verdict:
    """Whether every record becomes tokens with roles."""
    bad = found.unreadable
    return Verdict(
        name="records",
        state="fail" if bad else "pass",
        measured=f"{len(bad)} of the first {found.read} records cannot be used" + (f", first: {bad[0]}" if bad else ""),
        expected="0, since training stops at such a record",
        way_out="fix or remove them",
        values={"read": found.read, "unreadable": len(bad)},
    )


def whole_responses(found: FirstRecords, may_cut: bool) -> Verdict:
    """Whether every response is there in full; a recipe that cuts long ones (data.too_long: truncate) is only told how many."""
    bad = [*found.too_long, *found.cut]
    return Verdict(
        name="responses",
        state="fail" if found.too_long or (bad and not may_cut) else "warn" if bad else "pass",
        measured=f"of the first {found.read} records {len(found.too_long)} are too long and {len(found.cut)} have truncated responses"
        + (f", first: {bad[0]}" if bad else ""),
        expected="0 and 0: from truncated responses a student learns to stop early",
        way_out="raise data.max_length, shorten these records, or disable the tokenizer's truncation",
        values={"read": found.read, "too_long": len(found.too_long), "cut": len(found.cut)},
    )


def role_shares(found: FirstRecords, needs_pictures: bool) -> Verdict:
    """Which share of the tokens has which role."""
    roles = torch.cat([sample.tensors["roles"] for sample in found.usable])
    shares = {name: float((roles == number).float().mean()) for number, name in enumerate(ROLE_NAMES)}
    looked_at = sum(sample.looked_at for sample in found.usable)
    thin, blind = shares["response"] < 0.005, needs_pictures and looked_at == 0
    length = len(roles) / len(found.usable)
    return Verdict(
        name="roles",
        state="fail" if shares["response"] == 0 else "warn" if thin or blind else "pass",
        measured=f"{length:.0f} tokens per record: "
        + ", ".join(f"{share:.1%} {name}" for name, share in shares.items())
        + f"; {looked_at} of {len(found.usable)} records have an instruction after an image",
        expected="at least 0.5 % response tokens, and an instruction after an image if a term uses visual tokens",
        way_out="look at the samples in check.html: the chat template or the data drop responses or images",
        values={**shares, "tokens_per_record": length, "looked_at": looked_at},
    )


# --- other images ---------------------------------------------------------------------------------------------------


def with_other_pictures(samples: Sequence[Sample], index: int) -> Conversation:
    """A record with the images of the next records in place of its own, at its own sizes; noise where none differs."""
    own = samples[index].record.pictures()
    around = [*samples[index + 1 :], *samples[:index]]
    others = _pictures(around)
    replaced = []
    for number, picture in enumerate(own):
        same_size = (other.resize(picture.size) for other in others)
        differing = (other for other in same_size if other.tobytes() != picture.tobytes())
        replaced.append(next(differing, None) or noise(picture.size, number))
    return dataclasses.replace(samples[index].record, images=tuple(replaced))


def _pictures(samples: Sequence[Sample]) -> Iterator[Image.Image]:
    for sample in samples:
        yield from sample.record.pictures()


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- renderings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rendering:
    """A sample as people read it."""

    place: str
    spans: tuple[Span, ...]
    pictures: tuple[Image.Image, ...]


def rendering(sample: Sample, processor: ProcessorMixin) -> Rendering:
    """The sample's text in spans of one role each."""
    ids, roles = sample.tensors["input_ids"].tolist(), sample.tensors["roles"].tolist()
    return Rendering(sample.record.place, spans(ids, roles, processor.tokenizer), tuple(sample.record.pictures()))
