"""How near a student is to its teacher along responses: the right answers, or those that the student gave itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Evaluation
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.lengths import last_response
from align_ti.data.roles import NO_LABEL, encode, model_inputs
from align_ti.errors import DataError
from align_ti.evaluation.metrics import Metric, Value, quotient, ratio
from align_ti.evaluation.runner import Advance, chunks, ignore
from align_ti.evaluation.statistics import interval, told
from align_ti.losses.divergence import forward_kl
from align_ti.losses.weighted import CHUNK_LOGITS, rows_at_a_time
from align_ti.models.continuation import read
from align_ti.models.overrides import Projection
from align_ti.models.pairing import shared_tokens

SINGLE_POSITIONS = 16
"""Positions of a response that are told one by one; those behind them are told in ranges that double."""

POSITION_RESAMPLES = 2000
"""Bootstrap resamples of the interval at a position: there are many, each is looked at beside the others."""


@dataclass(frozen=True, slots=True)
class Along:
    """The two models' next-token distributions at every response token, over the tokens that both know."""

    kl: Float[np.ndarray, " tokens"]
    """KL(teacher || student) in nats."""
    agrees: Bool[np.ndarray, " tokens"]
    """Whether both find the same token the most probable."""
    record: Int[np.ndarray, " tokens"]
    """The record that the token belongs to."""
    position: Int[np.ndarray, " tokens"]
    """Its place in the record's last response, from 1; 0 in an earlier one."""

    def metric(self, of: str, clusters: Sequence[str], chosen: Bool[np.ndarray, " tokens"] | None = None) -> Metric:
        """The mean over tokens of `kl` (nats) or `agrees` (per cent).

        Args:
            of: which of the two.
            clusters: the cluster of each record.
            chosen: the tokens that count; all by default.
        """
        kept = np.ones(len(self.kl), dtype=bool) if chosen is None else chosen
        values = np.asarray(getattr(self, of), dtype=float)[kept]
        value, unit = (quotient, "nats") if of == "kl" else (ratio, "%")
        return per_record(values, np.ones(len(values)), self.record[kept], clusters, value, unit)

    def by_position(self, clusters: Sequence[str]) -> list[dict[str, Any]]:
        """KL and agreement at each position of the last responses, far ones in ranges, each with its 95 % interval."""
        table, start = [], 1
        last = int(self.position.max(initial=0))
        while start <= last:
            stop = start if start <= SINGLE_POSITIONS else 2 * (start - 1)
            chosen = (self.position >= start) & (self.position <= stop)
            # Records that are too short for the position are no clusters of its.
            inside = set(self.record[chosen].tolist())
            there = [name if number in inside else None for number, name in enumerate(clusters)]
            told_of = {
                name: told(interval(self.metric(of, only(there), chosen), resamples=POSITION_RESAMPLES))
                for name, of in (("kl", "kl"), ("agreement", "agrees"))
            }
            table.append({"position": start, "to": min(stop, last), **told_of, "tokens": int(chosen.sum())})
            start = stop + 1
        return table


def only(clusters: Sequence[str | None]) -> list[str]:
    """The clusters, where records without one are put to the first: they add nothing."""
    first = next(name for name in clusters if name is not None)
    return [first if name is None else name for name in clusters]


def per_record(
    totals: Float[np.ndarray, " parts"],
    masses: Float[np.ndarray, " parts"],
    record: Int[np.ndarray, " parts"],
    clusters: Sequence[str],
    value: Value = quotient,
    unit: str = "nats",
) -> Metric:
    """What parts of records add to a total and to what it is divided by, as sums over clusters.

    Args:
        totals: what each part adds.
        masses: what it is counted as.
        record: the record that it belongs to.
        clusters: the cluster of each record.
        value: gives the score of the two sums.
        unit: the score's unit.
    """
    names = tuple(dict.fromkeys(clusters))
    number = {name: index for index, name in enumerate(names)}
    place = np.array([number[name] for name in clusters])[record]
    sums = [np.bincount(place, weights=weights, minlength=len(names)) for weights in (totals, masses)]
    return Metric(np.stack(sums, axis=-1), value, names, unit)


@torch.no_grad()
def along_responses(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    settings: Evaluation,
    advance: Advance = ignore,
    teacher_processor: ProcessorMixin | None = None,
) -> Along:
    """KL(teacher || student) and agreement at every response token of the records, over the tokens that both know.

    A teacher with a processor of its own reads each record by it.

    Raises:
        DataError: the two read different response tokens.
    """
    student.eval(), teacher.eval()
    shared = shared_tokens(student, teacher, processor, teacher_processor)
    heads = Projection(student), Projection(teacher)
    count = rows_at_a_time(CHUNK_LOGITS, heads[1].out_features, student.device)
    kl, agrees, record, position = [], [], [], []
    for indices in chunks(range(len(conversations)), settings.batch_size):
        part = [conversations[index] for index in indices]
        inputs = collated(processor, part)
        ours = response_rows(student, inputs)
        theirs = response_rows(teacher, inputs if teacher_processor is None else collated(teacher_processor, part))
        if ours.words != theirs.words:
            raise DataError(
                f"{part[0].place} or one of the {len(part) - 1} records behind it: student and teacher read different response tokens, "
                "so their distributions cannot be compared; choose models of one tokenizer and end of turn."
            )
        for rows, other in zip(ours.hidden.split(count), theirs.hidden.split(count), strict=True):
            logits = heads[0](rows)[:, shared], heads[1](other).to(rows.device)[:, shared]
            kl.append(forward_kl(*logits).double().cpu())
            agrees.append((logits[0].argmax(-1) == logits[1].argmax(-1)).cpu())
        record += [indices[sample] for sample in ours.sample]
        position += ours.position
        advance(len(part))
    return Along(torch.cat(kl).numpy(), torch.cat(agrees).numpy(), np.array(record), np.array(position))


@dataclass(frozen=True, slots=True)
class ResponseRows:
    """The rows of one model that predict response tokens."""

    hidden: Float[Tensor, "rows hidden"]
    words: list[int]
    """The tokens that they predict."""
    sample: list[int]
    position: list[int]
    """Each token's place in the last response of its sample, from 1; 0 in an earlier one."""


def collated(processor: ProcessorMixin, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
    """The records as one batch of tensors."""
    collate = Collator(processor.tokenizer.pad_token_id)
    return collate([encode(conversation, processor) for conversation in conversations])


def response_rows(model: PreTrainedModel, batch: dict[str, Tensor]) -> ResponseRows:
    """The rows of a batch that predict response tokens."""
    starts = torch.tensor([last_response(roles) for roles in batch["roles"]])
    batch = {name: value.to(model.device) for name, value in batch.items()}
    labels = batch["labels"][:, 1:]
    predicts = labels != NO_LABEL
    hidden: Tensor = read(model, model_inputs(batch), keep_cache=False).hidden[:, :-1][predicts]
    sample, step = predicts.nonzero().cpu().unbind(-1)
    position = (step + 2 - starts[sample]).clamp(min=0)
    return ResponseRows(hidden, labels[predicts].tolist(), sample.tolist(), position.tolist())


@dataclass(frozen=True, slots=True)
class OwnAnswers:
    """Records with a model's own last answers in place of the right ones, as far as these can be read back."""

    conversations: list[Conversation]
    record: list[int]
    """Which record each is."""
    cut: list[bool]
    """Whether the answer was cut at the token limit, so that its end is not the model's."""
    left_out: int
    """Answers that cannot stand in a conversation: empty ones, and those with special tokens as words."""


def own_answers(
    processors: Sequence[ProcessorMixin], conversations: Sequence[Conversation], answers: Sequence[tuple[str, bool]]
) -> OwnAnswers:
    """The records as the model answered them.

    Args:
        processors: those that have to read them.
        conversations: the records.
        answers: the last answer of each, and whether it was cut.
    """
    found = OwnAnswers([], [], [], 0)
    for number, (conversation, (text, cut)) in enumerate(zip(conversations, answers, strict=True)):
        turns = (*conversation.turns[:-1], Turn("assistant", text))
        try:
            own = replace(conversation, turns=turns)
            for processor in processors:
                encode(own, processor)
        except DataError:
            continue
        found.conversations.append(own)
        found.record.append(number)
        found.cut.append(cut)
    return replace(found, left_out=len(conversations) - len(found.conversations))


def along_own(along: Along, own: OwnAnswers) -> Along:
    """What was measured along the model's own last answers, by the numbers of the records; ends that it did not say are left out."""
    record, last = np.array(own.record, dtype=int)[along.record], np.zeros(len(own.record), dtype=int)
    np.maximum.at(last, along.record, along.position)
    unsaid = np.array(own.cut, dtype=bool)[along.record] & (along.position == last[along.record])
    kept = (along.position > 0) & ~unsaid
    return Along(along.kl[kept], along.agrees[kept], record[kept], along.position[kept])
