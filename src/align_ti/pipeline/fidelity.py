"""How near a student is to its teacher: along the right answers and its own, and by the measures that the terms of Align-TI train on.

It stands here, not in `evaluation`, because IVA's and TPA's measures are the objective's own: its passes, rows and weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Evaluation, Objective, Scores
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation
from align_ti.data.groups import same_image_groups
from align_ti.data.lengths import paired
from align_ti.data.roles import encode
from align_ti.errors import BatchError, ConfigError, DataError, ModelError
from align_ti.evaluation.benchmarks.base import Report
from align_ti.evaluation.fidelity import ROWS, along_own, along_responses, own_answers, per_record
from align_ti.evaluation.metrics import Metric
from align_ti.evaluation.results import scored, without_common_folder
from align_ti.evaluation.runner import Advance, chunks, ignore
from align_ti.evaluation.tasks import question
from align_ti.interactions.layer_scores import score_layers
from align_ti.models.pairing import pair_up
from align_ti.terms.base import Term, WeightedRows
from align_ti.terms.readings import Readings
from align_ti.training.objective import gather_rows, read_batch

BENCHMARK = "fidelity"
"""What the measures are called among scores."""

UNMEASURED = (BatchError, ConfigError, DataError, ModelError)
"""What says that a measure is not defined for a pair of models or for these records."""

MEASURES = {"visual_kl": "iva", "transition_kl": "tpa"}
"""The terms whose own measure is taken, by the name that it gets."""


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
    """The measures with their 95 % intervals, resampling pictures; what could not be measured, and why; and scores to compare by.

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

    def measured(name: str, measure: Callable[[], Metric]) -> None:
        try:
            metrics[name] = measure()
        except UNMEASURED as error:
            unmeasured[name] = str(error)

    def by_term(**options: Any) -> Metric:
        objective = Objective.only(**options)
        return term_measure(
            student, teacher, processor, conversations, clusters, objective, settings, teacher_processor
        )

    def visual() -> Metric:
        nonlocal layer
        layer = layer if layer is not None else chosen_layer(teacher, teacher_processor or processor, conversations)
        return by_term(iva={"layer": layer, "resample": True})

    measured("visual_kl", visual)
    measured("transition_kl", lambda: by_term(tpa={}))
    read_by = [processor, *([] if teacher_processor is None else [teacher_processor])]
    own = own_answers(read_by, conversations, answers)
    if own.conversations:
        own_along = along_own(
            along_responses(student, teacher, processor, own.conversations, settings, ignore, teacher_processor), own
        )
        metrics["own_kl"] = own_along.metric("kl", clusters)
        metrics["own_agreement"] = own_along.metric("agrees", clusters)
        by_position["own"] = own_along.by_position(clusters)
    else:
        unmeasured["own_kl"] = "no answer of the student's own can stand in a conversation."
    notes = [f"{name} could not be measured: {reason}" for name, reason in unmeasured.items()]
    if own.left_out:
        notes.append(
            f"{own.left_out} of {len(answers)} answers of its own are empty or hold special tokens as words, and are left out."
        )
    scores = scored(
        BENCHMARK,
        Report(metrics, "response_kl", {}, notes),
        called[0],
        digest_of(conversations, clusters, called[1], layer),
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
    """A name for each record's picture that is the same wherever the data lie, and tells pictures apart."""
    pictures = [question(one).picture for one in conversations]
    number = {picture: index for index, picture in enumerate(dict.fromkeys(pictures))}
    files = [one.images[0] if one.images and isinstance(one.images[0], Path) else None for one in conversations]
    named = without_common_folder([None if file is None else str(file) for file in files])
    return [f"{number[picture]} {name}".strip() for picture, name in zip(pictures, named, strict=True)]


def digest_of(conversations: Sequence[Conversation], clusters: Sequence[str], teacher: str, layer: int | None) -> str:
    """What two models' measures have to share to be compared: records, teacher and layer."""
    told = [[[turn.speaker, turn.text] for turn in one.turns] for one in conversations]
    return hashlib.sha256(json.dumps([told, list(clusters), teacher, layer]).encode()).hexdigest()[:32]


def chosen_layer(teacher: PreTrainedModel, processor: ProcessorMixin, conversations: Sequence[Conversation]) -> int:
    """The teacher's layer with the highest IRS on the records.

    Raises:
        DataError: no picture has two instructions.
    """
    settings, collate = Scores(), Collator(processor.tokenizer.pad_token_id)
    groups = same_image_groups(conversations, settings.images, settings.instructions)
    batches = (collate([encode(one, processor, train=False) for one in group]) for group in groups)
    moved = ({name: value.to(teacher.device) for name, value in batch.items()} for batch in batches)
    scores = score_layers(teacher, moved)
    return max(scores, key=lambda index: scores[index])


@torch.no_grad()
def term_measure(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    clusters: Sequence[str],
    objective: Objective,
    settings: Evaluation,
    teacher_processor: ProcessorMixin | None = None,
) -> Metric:
    """A term's own measure on held-out records: the objective's passes, rows and weights, the sums record by record.

    Candidates are drawn with a fixed seed, so they are the same at each call.

    Raises:
        AlignTIError: the term is not defined for the two models or for a record.
        DataError: no record has a row of the term.
    """
    student.eval(), teacher.eval()
    own_pad = None if teacher_processor is None else teacher_processor.tokenizer.pad_token_id
    collate = Collator(processor.tokenizer.pad_token_id, teacher_pad_token=own_pad)
    pairing = pair_up(student, teacher, processor, teacher_processor)
    (name,) = objective.terms
    generator = torch.Generator(student.device).manual_seed(0)
    totals, masses, record = [], [], []
    for indices in chunks(range(len(conversations)), settings.batch_size):
        samples: list[dict[str, Any]] = [encode(conversations[index], processor) for index in indices]
        if teacher_processor is not None:
            theirs = [encode(conversations[index], teacher_processor) for index in indices]
            samples = [paired(sample, other) for sample, other in zip(samples, theirs, strict=True)]
        readings = read_batch(student, teacher, collate(samples), objective, generator=generator, pairing=pairing)
        values, weights, sample = rows_measured(readings, name, objective.terms[name])
        totals.append(values * weights)
        masses.append(weights)
        record.append(np.array(indices)[sample])
    if not any(mass.sum() for mass in masses):
        raise DataError(
            f"none of the {len(conversations)} records has a row that {name} compares; records with a response, and for iva with an "
            "instruction behind a picture, are accepted."
        )
    return per_record(np.concatenate(totals), np.concatenate(masses), np.concatenate(record), clusters)


def rows_measured(readings: Readings, name: str, term: Term) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a term measures at each of its rows, the row's weight, and its sample in the batch."""
    part = term.total(readings)
    assert isinstance(part, WeightedRows)
    rows, weights, sample = gather_rows({name: part}, readings)
    assert rows.teacher is not None
    assert rows.teacher_head is not None
    values = [np.zeros(0)]
    for start in range(0, len(rows.student), ROWS):
        chunk = slice(start, start + ROWS)
        ours, theirs = rows.student_head(rows.student[chunk]), rows.teacher_head(rows.teacher[chunk])
        measured, _ = part.measure(ours, theirs.to(ours.device), rows.labels[chunk], rows.shared, slope=False)
        values.append(measured.double().cpu().numpy())
    return np.concatenate(values), weights[name].double().cpu().numpy(), sample.cpu().numpy()
