"""All checks in their order: what needs no model to run first, then probes, then what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Objective, Recipe
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation
from align_ti.models.families import full_attention_layers
from align_ti.models.loading import first_line
from align_ti.models.pairing import Pairing, own_processor, pair_up
from align_ti.models.preservation import preserved
from align_ti.preflight.cost import Spread, cost_verdicts, does_not_run
from align_ti.preflight.pair import Models, comparable_rows, fit_verdicts, on_device, visual_tokens
from align_ti.preflight.pixels import pixel_verdicts
from align_ti.preflight.samples import FirstRecords, Sample, data_verdicts, read_first
from align_ti.preflight.terms import MISHAPS, fused_verdicts, projection, term_verdicts
from align_ti.preflight.verdicts import Verdict, worst
from align_ti.training.gradients import FLOAT16_SCALE

RECORDS = 64
"""Records that are read: the first ones, so that the check takes no epoch."""

PROBES = 2
"""Records that the probes run on."""


def run_checks(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    processor: ProcessorMixin,
    data: Sequence[Conversation],
    recipe: Recipe,
    *,
    teacher_processor: ProcessorMixin | None = None,
    spread: Spread | None = None,
    records: int = RECORDS,
) -> list[Verdict]:
    """The verdicts on two models and the first records of the data, in the order of docs/check.md.

    Nothing of it leaves a trace in the models or in random states. Checks that need what has failed already are not run; the last
    verdict says so.

    Args:
        student: the model to train, with its parts frozen already, on its device.
        teacher: the model to imitate, on the same device; None for sft alone.
        processor: the student's processor.
        data: the training records.
        recipe: the run that is meant; where IVA's layer is "auto", a middle one is used.
        teacher_processor: the teacher's processor; where it makes other inputs than the student's, the teacher reads its own.
        spread: the processes of the run, for its time and memory; by default one.
        records: how many of the first records are read.
    """
    models: Models = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    objective = with_layer(recipe.objective, teacher)
    verdicts = fit_verdicts(models, processor, teacher_processor, objective)
    own = own_processor(processor, teacher_processor)
    found = read_first(data, processor, records, recipe.data.max_length, recipe.data.too_long, own)
    verdicts += data_verdicts(
        found, any(term.needs_visual for term in objective.terms.values()), may_cut=recipe.data.too_long == "truncate"
    )
    if worst(verdicts) == "fail":
        return [*verdicts, not_run()]
    with preserved(*models.values()):
        for model in models.values():
            model.eval()
        processors = {"student": processor, "teacher": processor if own is None else own}
        over = Spread() if spread is None else spread
        try:
            return verdicts + probe(models, processors, found, objective, recipe, len(data), over)
        except torch.OutOfMemoryError as error:
            return [*verdicts, does_not_run(error, over)]


def with_layer(objective: Objective, teacher: PreTrainedModel | None) -> Objective:
    """The objective with a number for every layer that is still to be chosen."""
    if teacher is None or not objective.needs_layer:
        return objective
    layers = full_attention_layers(teacher)
    return objective.at_layer(layers[len(layers) // 2] if layers else 0)


def probe(
    models: Models,
    processors: Mapping[str, ProcessorMixin],
    found: FirstRecords,
    objective: Objective,
    recipe: Recipe,
    num_records: int,
    spread: Spread,
) -> list[Verdict]:
    """The verdicts for which the models run."""
    pad_tokens = {name: int(processor.tokenizer.pad_token_id) for name, processor in processors.items()}
    collate, device = Collator(pad_tokens["student"], teacher_pad_token=pad_tokens["teacher"]), models["student"].device
    pairing = Pairing() if "teacher" not in models else paired(models, processors)
    probes = choose_probes(found.usable)
    pictured = [sample for sample in probes if sample.record.images]
    batch = on_device(collate([sample.tensors for sample in probes]), device)
    verdicts = [visual_tokens(name, model, batch) for name, model in models.items()] if pictured else []
    if "teacher" in batch:
        verdicts.append(comparable_rows(models, [sample.tensors for sample in found.usable], collate, objective))
    if worst(verdicts) == "fail":
        return [*verdicts, not_run()]
    one = on_device(collate([probes[0].tensors]), device)
    verdicts += (
        attempt("pixels", partial(pixel_verdicts, models, pictured, processors)) if pictured else [no_pictures(found)]
    )
    for name, model in models.items():
        verdicts += attempt(f"projection.{name}", partial(projection, name, model, one))
    verdicts += fused_verdicts(models, one, objective, pairing, pad_tokens)
    precision = partial(autocast, recipe, device)
    verdicts += term_verdicts(
        models, batch, objective, precision, pairing, FLOAT16_SCALE if recipe.training.fp16 else 1.0, recipe.seed
    )
    return verdicts + cost_verdicts(
        models,
        found.usable,
        objective,
        recipe.training,
        precision,
        collate=collate,
        pairing=pairing,
        num_records=num_records,
        spread=spread,
    )


def paired(models: Models, processors: Mapping[str, ProcessorMixin]) -> Pairing:
    """How the two are compared in training."""
    ours, theirs = processors["student"], processors["teacher"]
    return pair_up(models["student"], models["teacher"], ours, None if theirs is ours else theirs)


def choose_probes(samples: Sequence[Sample]) -> list[Sample]:
    """The shortest records, those first whose instruction looks at an image, and of different images if there are some."""
    ranked = sorted(samples, key=lambda sample: (not sample.looked_at, not sample.record.images, sample.length))
    first = ranked[0]
    other = next(
        (sample for sample in ranked[1:] if sample.record.images != first.record.images and sample.looked_at), None
    )
    return [first, other] if other is not None else ranked[:PROBES]


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """The precision that the recipe trains under."""
    dtype = torch.float16 if recipe.training.fp16 else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=recipe.training.bf16 or recipe.training.fp16)


def attempt(name: str, check: Callable[[], Verdict | list[Verdict]]) -> list[Verdict]:
    """The check's verdicts, or a failure that says what it stopped with."""
    try:
        found = check()
        return found if isinstance(found, list) else [found]
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with what is checked
    except MISHAPS as error:
        return [
            Verdict(
                name=name,
                state="fail",
                measured=f"the check stopped with: {first_line(error).rstrip('.')}",
                expected="a forward pass without errors",
                way_out="fix what the message names",
            )
        ]


def not_run() -> Verdict:
    """Says that later checks are missing."""
    return Verdict(
        name="not_run",
        state="warn",
        measured="the models were not run, since a check above failed",
        expected="every check is run",
        way_out="fix the failed checks and run the check again",
    )


def no_pictures(found: FirstRecords) -> Verdict:
    """Says that pixels could not be checked."""
    return Verdict(
        name="pixels",
        state="warn",
        measured=f"none of the first {found.read} records has an image, so it was not tested whether images influence the answers",
        expected="records with images",
        way_out="put some of them first; nothing to do if the training data are text only",
    )
