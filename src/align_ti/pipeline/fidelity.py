"""How near a student is to its teacher: along the right answers and its own, and by the measures that the terms of Align-TI train on.

It stands here, not in `evaluation`, because IVA's and TPA's measures are the objective's own: its passes, rows and weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Evaluation, Objective, Scores
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation
from align_ti.data.lengths import paired
from align_ti.data.roles import encode
from align_ti.errors import BatchError, ConfigError, DataError, ModelError
from align_ti.evaluation.benchmarks.base import Report
from align_ti.evaluation.fidelity import along_own, along_responses, own_answers, per_record
from align_ti.evaluation.metrics import Metric
from align_ti.evaluation.predictions import whole_clusters
from align_ti.evaluation.results import scored, without_common_folder
from align_ti.evaluation.runner import Advance, chunks, ignore
from align_ti.evaluation.tasks import question
from align_ti.interactions.layer_scores import best_layer, score_on_records
from align_ti.losses.measures import Measure
from align_ti.losses.weighted import CHUNK_LOGITS, rows_at_a_time, vocabulary
from align_ti.models.pairing import pair_up
from align_ti.terms.base import WeightedRows
from align_ti.terms.readings import Readings
from align_ti.training.objective import gather_rows, read_batch

BENCHMARK = "fidelity"
"""What the measures are called among scores."""

UNMEASURED = (BatchError, ConfigError, DataError, ModelError)
"""What says that a measure is not defined for a pair of models or for these records."""

MEASURES = {"iva": "visual_kl", "tpa": "transition_kl"}
"""The terms whose own measure is taken, and the name that it gets."""


def fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    answers: Sequence[tuple[str, bool]],
    settings: Evaluation,
    *,
    teacher_processor: ProcessorMixin | None = None,
    layer: int | None = None,
    called: tuple[str, str] = ("student", "teacher"),
    advance: Advance = ignore,
) -> dict[str, Any]:
    """The measures with their 95 % intervals, resampling images; what could not be measured, and why; and scores to compare by.

    KL is KL(teacher || student) in nats over the tokens that both know: `response_kl` a response token, `visual_kl` a record (IVA's
    weighted mean over visual tokens), `transition_kl` a response position (TPA's mean behind tokens that the student would try),
    `own_kl` a token of the student's own answers. `top1_agreement` and `own_agreement` are the shares of tokens, in per cent, where
    both find the same token the most probable. `by_position` has both along the last response, right (`gold`) and `own`.

    Args:
        student: the model that is measured.
        teacher: the model that it is measured by.
        processor: the student's processor.
        conversations: held-out records.
        answers: the student's own last answer to each, and whether it was cut.
        settings: how many records are read at a time.
        teacher_processor: the teacher's, where it reads inputs of its own.
        layer: the teacher's layer whose attention weighs visual tokens; by default the one with the highest IRS on these records.
        called: the two models' names for people.
        advance: is told the records that were read.

    Raises:
        DataError: the two models read different response tokens.
    """
    clusters = clusters_of(conversations)
    along = along_responses(student, teacher, processor, conversations, settings, advance, teacher_processor)
    metrics = {
        "response_kl": along.metric("kl", clusters),
        "top1_agreement": along.metric("agrees", clusters),
    }
    by_position = {"gold": along.by_position(clusters)}
    unmeasured: dict[str, str] = {}

    chosen = whole_clusters(clusters, settings.fidelity_records)
    records, their_clusters = [conversations[index] for index in chosen], [clusters[index] for index in chosen]
    terms: dict[str, dict[str, Any]] = {"tpa": {}}
    if not records:
        terms, unmeasured = {}, dict.fromkeys([*MEASURES.values(), "own_kl"], "evaluation.fidelity_records is 0.")
    else:
        try:
            if layer is None:
                layer = chosen_layer(teacher, teacher_processor or processor, records)
            terms = {"iva": {"layer": layer, "resample": True}, **terms}
        except UNMEASURED as error:
            unmeasured["visual_kl"] = str(error)
    of_terms = partial(term_measures, student, teacher, processor, records, their_clusters, settings, teacher_processor)
    try:
        metrics |= of_terms(terms) if terms else {}
    except UNMEASURED:
        # One of them is not defined here; the other may be.
        for name, options in terms.items():
            try:
                metrics |= of_terms({name: options})
            except UNMEASURED as error:
                unmeasured[MEASURES[name]] = str(error)
    read_by = [processor, *([] if teacher_processor is None else [teacher_processor])]
    own = own_answers(read_by, records, [answers[index] for index in chosen])
    if own.conversations:
        own_along = along_own(
            along_responses(student, teacher, processor, own.conversations, settings, ignore, teacher_processor), own
        )
        metrics["own_kl"] = own_along.metric("kl", their_clusters)
        metrics["own_agreement"] = own_along.metric("agrees", their_clusters)
        by_position["own"] = own_along.by_position(their_clusters)
    elif records:
        unmeasured["own_kl"] = "no answer of the student's own can stand in a conversation."
    notes = [f"{name} could not be measured: {reason}" for name, reason in unmeasured.items()]
    if own.left_out:
        notes.append(
            f"{own.left_out} of {len(records)} self-generated answers are empty or contain special tokens as text; they are excluded."
        )
    # A teacher of less precision is another one to be compared with.
    precision = [] if teacher.dtype == torch.float32 else [str(teacher.dtype)]
    scores = scored(
        BENCHMARK,
        Report(metrics, "response_kl", {}, notes),
        called[0],
        digest_of(conversations, clusters, called[1], [layer, chosen, *precision]),
        title=f"fidelity to {called[1]}",
    )
    shown_metrics = {
        name: {key: told[key] for key in ("value", "low", "high", "unit")} for name, told in scores["metrics"].items()
    }
    return {
        **shown_metrics,
        "by_position": by_position,
        "layer": layer,
        "unmeasured": unmeasured,
        "notes": notes,
        "scores": scores,
    }


def clusters_of(conversations: Sequence[Conversation]) -> list[str]:
    """A name for each record's image that is the same wherever the data lie, and tells images apart."""
    pictures = [question(one).picture for one in conversations]
    number = {picture: index for index, picture in enumerate(dict.fromkeys(pictures))}
    files = [one.images[0] if one.images and isinstance(one.images[0], Path) else None for one in conversations]
    named = without_common_folder([None if file is None else str(file) for file in files])
    return [f"{number[picture]} {name}".strip() for picture, name in zip(pictures, named, strict=True)]


def digest_of(conversations: Sequence[Conversation], clusters: Sequence[str], teacher: str, how: Sequence[Any]) -> str:
    """What two models' measures have to share to be compared: records, teacher, and how it was measured."""
    told = [[[turn.speaker, turn.text] for turn in one.turns] for one in conversations]
    return hashlib.sha256(json.dumps([told, list(clusters), teacher, how]).encode()).hexdigest()[:32]


def chosen_layer(teacher: PreTrainedModel, processor: ProcessorMixin, conversations: Sequence[Conversation]) -> int:
    """The teacher's layer with the highest IRS on the records.

    Raises:
        DataError: no image has two instructions.
    """
    return best_layer(score_on_records(teacher, processor, conversations, **Scores().model_dump()))


@torch.no_grad()
def term_measures(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    clusters: Sequence[str],
    settings: Evaluation,
    teacher_processor: ProcessorMixin | None,
    terms: Mapping[str, Any],
) -> dict[str, Metric]:
    """Terms' own measures on held-out records: the objective's passes, rows and weights, the sums record by record.

    Candidates are drawn with a fixed seed, so they are the same at each call.

    Args:
        student: the model that is measured.
        teacher: the model that it is measured by.
        processor: the student's processor.
        conversations: the records.
        clusters: the cluster of each record.
        settings: how many records are read at a time.
        teacher_processor: the teacher's, where it reads inputs of its own.
        terms: the options of each term of `MEASURES` that is wanted.

    Raises:
        AlignTIError: a term is not defined for the two models or for a record.
        DataError: no record has a row of a term.
    """
    student.eval(), teacher.eval()
    own_pad = None if teacher_processor is None else teacher_processor.tokenizer.pad_token_id
    collate = Collator(processor.tokenizer.pad_token_id, teacher_pad_token=own_pad)
    pairing = pair_up(student, teacher, processor, teacher_processor)
    objective, generator = Objective.only(**terms), torch.Generator(student.device).manual_seed(0)
    found: dict[str, list[Measured]] = {name: [] for name in objective.terms}
    for indices in chunks(range(len(conversations)), settings.batch_size):
        samples: list[dict[str, Any]] = [encode(conversations[index], processor) for index in indices]
        if teacher_processor is not None:
            theirs = [encode(conversations[index], teacher_processor) for index in indices]
            samples = [paired(sample, other) for sample, other in zip(samples, theirs, strict=True)]
        readings = read_batch(student, teacher, collate(samples), objective, generator=generator, pairing=pairing)
        for name, (values, weights, sample) in rows_measured(readings, objective).items():
            found[name].append((values * weights, weights, np.array(indices)[sample]))
    metrics = {}
    for name, parts in found.items():
        totals, masses, record = (np.concatenate(of) for of in zip(*parts, strict=True))
        if not masses.sum():
            raise DataError(
                f"none of the {len(conversations)} records has a position that {name} compares; records with a response, and for iva "
                "with an instruction after an image, are accepted."
            )
        metrics[MEASURES[name]] = per_record(totals, masses, record, clusters)
    return metrics


Measured = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What is measured at each row, the row's weight, and what it belongs to."""


def rows_measured(readings: Readings, objective: Objective) -> dict[str, Measured]:
    """What each term measures at its rows, their weights, and their samples in the batch."""
    parts: dict[str, WeightedRows] = {name: term.total(readings) for name, term in objective.terms.items()}
    rows, weights, sample = gather_rows(parts, readings)
    assert rows.teacher is not None
    assert rows.teacher_head is not None
    # Terms of one measure compare the rows that they share once.
    values: dict[Measure, list[np.ndarray]] = {part.measure: [np.zeros(0)] for part in parts.values()}
    count = rows_at_a_time(CHUNK_LOGITS, vocabulary(rows.student_head), rows.student.device)
    for start in range(0, len(rows.student), count):
        chunk = slice(start, start + count)
        ours, theirs = rows.student_head(rows.student[chunk]), rows.teacher_head(rows.teacher[chunk])
        for measure, found in values.items():
            measured, _ = measure(ours, theirs.to(ours.device), rows.labels[chunk], rows.shared, slope=False)
            found.append(measured.double().cpu().numpy())
    return {
        name: (np.concatenate(values[part.measure]), weights[name].double().cpu().numpy(), sample.cpu().numpy())
        for name, part in parts.items()
    }
