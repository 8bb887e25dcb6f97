"""Whether two models fit each other, the processor and the data: vocabularies, image tokens, layout, weights, parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Objective
from align_ti.data.collator import Collator
from align_ti.data.roles import VISUAL, image_id, model_inputs
from align_ti.errors import AlignTIError
from align_ti.models import families
from align_ti.models.loading import first_line
from align_ti.models.overrides import Projection
from align_ti.models.pairing import shared_tokens
from align_ti.preflight.verdicts import Verdict
from align_ti.terms.readings import view
from align_ti.training.passes import places_of

Models = Mapping[str, PreTrainedModel]
"""The models by name: `student`, and `teacher` where there is one."""


def read_by(name: str, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch as the named model reads it: a teacher with a processor of its own has its own."""
    own: Mapping[str, Any] = batch.get("teacher", batch) if name == "teacher" else batch
    return own


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on a device, the teacher's own part too."""
    return {
        name: on_device(value, device) if isinstance(value, Mapping) else value.to(device)
        for name, value in batch.items()
    }


def refusal(check: Callable[[], object]) -> str | None:
    """The message of a check that refuses, or None."""
    try:
        check()
    except AlignTIError as error:
        return str(error)
    return None


def fit_verdicts(
    models: Models, processor: ProcessorMixin, teacher_processor: ProcessorMixin | None, objective: Objective
) -> list[Verdict]:
    """What can be said of the models without running them."""
    verdicts = [
        vocabularies(models, processor, teacher_processor),
        image_tokens(models, processor, teacher_processor),
        layout(models, objective),
    ]
    return [*verdicts, *(finite_weights(name, model) for name, model in models.items()), parts(models["student"])]


def vocabularies(models: Models, processor: ProcessorMixin, teacher_processor: ProcessorMixin | None) -> Verdict:
    """Whether both models and the tokenizer mean the same token by the same id."""
    sizes = {name: Projection(model).out_features for name, model in models.items()}
    tokens = len(processor.tokenizer)
    problem = None
    if "teacher" in models:
        problem = refusal(lambda: shared_tokens(models["student"], models["teacher"], processor, teacher_processor))
    small = [name for name, size in sizes.items() if size < tokens and (name == "student" or teacher_processor is None)]
    if problem is None and processor.tokenizer.pad_token_id is None:
        problem = "the tokenizer has no pad token, so records of different lengths cannot share a batch"
    if problem is None and small:
        problem = f"the {small[0]}'s output head has {sizes[small[0]]} rows, but the tokenizer has {tokens} tokens"
    heads = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return Verdict(
        name="vocabularies",
        state="fail" if problem else "pass",
        measured=(problem or f"the tokenizer has {tokens} tokens").rstrip("."),
        expected=f"the same id for each token in both models, and a row of the output head for each token (rows: {heads})",
        way_out="choose a student and a teacher of one tokenizer family, whose tokenizer has a pad token",
        values={"tokenizer": tokens, **{f"head_{name}": size for name, size in sizes.items()}},
    )


def image_tokens(models: Models, processor: ProcessorMixin, teacher_processor: ProcessorMixin | None = None) -> Verdict:
    """Whether each model and the processor that it is read by use one token id for an image."""
    ids = {"processor": image_id(processor)} | {name: families.image_token(model) for name, model in models.items()}
    if teacher_processor is not None:
        ids["teacher's processor"] = image_id(teacher_processor)
        apart = ids["processor"] != ids["student"] or ids["teacher's processor"] != ids["teacher"]
    else:
        apart = len(set(ids.values())) > 1
    return Verdict(
        name="image_tokens",
        state="fail" if apart else "pass",
        measured="the image token is " + ", ".join(f"{found} in the {name}" for name, found in ids.items()),
        expected="the same id in a model and its processor",
        way_out="use the processor that belongs to the models, or choose models with the same processor",
        values=ids,
    )


def layout(models: Models, objective: Objective) -> Verdict:
    """Whether the models' layers are of a kind that the objective can follow."""
    found = [refusal(partial(families.check_layout, model)) for model in models.values()]
    if "teacher" in models:
        found += [
            refusal(partial(term.check, models["student"], models["teacher"])) for term in objective.terms.values()
        ]
    problem = next((message for message in found if message is not None), None)
    return Verdict(
        name="layout",
        state="fail" if problem else "pass",
        measured=problem.rstrip(".") if problem else "attention masks, positions and logits are of a supported kind",
        expected="models whose forward pass the loss reproduces exactly",
        way_out="choose other models, or leave out the term that the message names",
    )


def finite_weights(name: str, model: PreTrainedModel) -> Verdict:
    """Whether every weight is a number."""
    bad = [key for key, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    return Verdict(
        name=f"weights.{name}",
        state="fail" if bad else "pass",
        measured=f"{len(bad)} weight tensor(s) of the {name} contain NaN or infinity"
        + (f", first {bad[0]}" if bad else ""),
        expected="0",
        way_out="load another checkpoint, or another dtype: float16 overflows where bfloat16 does not",
        values={"tensors": len(bad)},
    )


def parts(student: PreTrainedModel) -> Verdict:
    """What is trained, frozen and saved, in parameters of each part."""
    counts = part_counts(student)
    trained, all_of = (sum(count[which] for count in counts.values()) for which in ("trained", "all"))
    size = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    named = "; ".join(
        f"{part} {millions(count['all'])} "
        + ("trained" if count["trained"] == count["all"] else "frozen" if not count["trained"] else "partly trained")
        for part, count in counts.items()
    )
    return Verdict(
        name="parts",
        state="pass" if trained else "fail",
        measured=f"{named}; {millions(trained)} of {millions(all_of)} parameters are trained; the saved student "
        f"has {size / 2**20:.4g} MiB",
        expected="at least one trained parameter",
        way_out="freeze fewer parts (student.freeze)",
        values={"parts": counts, "trained": trained, "saved_bytes": size},
    )


def part_counts(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Parameters and trained parameters of each part; a weight that two parts share is counted in the first."""
    seen: set[nn.Parameter] = set()
    counts = {}
    for name, module in [*families.backbone(model).named_children(), ("head", families.head(model))]:
        own = [parameter for parameter in module.parameters() if parameter not in seen]
        seen.update(own)
        if own:
            counts[name] = {
                "all": sum(parameter.numel() for parameter in own),
                "trained": sum(parameter.numel() for parameter in own if parameter.requires_grad),
            }
    return counts


def millions(count: int) -> str:
    """A number of parameters for people."""
    return f"{count / 1e6:.4g} M"


def comparable_rows(
    models: Models, samples: Sequence[Mapping[str, Any]], collate: Collator, objective: Objective
) -> Verdict:
    """Whether a student and a teacher that read inputs of their own read the same responses, and images that can be compared."""
    problems, device = [], models["student"].device
    for sample in samples:
        batch = on_device(collate([sample]), device)
        ours, theirs = view(models["student"], batch), view(models["teacher"], batch["teacher"])
        problems.append(refusal(partial(places_of, ours, theirs, objective.terms)))
    bad = [problem for problem in problems if problem is not None]
    return Verdict(
        name="rows",
        state="fail" if bad else "pass",
        measured=f"in {len(bad)} of {len(samples)} records the positions of student and teacher cannot be matched"
        + (f", first: {bad[0].rstrip('.')}" if bad else ""),
        expected="one teacher position for each student position",
        way_out="choose models whose chat templates end a turn alike, or set the option that the message names",
        values={"records": len(samples), "not_comparable": len(bad)},
    )


# --- visual tokens, which need the towers to run ----------------------------------------------------------------------


@torch.no_grad()
def visual_tokens(name: str, model: PreTrainedModel, batch: Mapping[str, Any]) -> Verdict:
    """Whether the model's tower gives as many vectors as the batch has visual tokens."""
    batch = on_device(read_by(name, batch), model.device)
    expected, error, given = int((batch["roles"] == VISUAL).sum()), None, None
    try:
        given = tower_vectors(model, batch)
        model(**model_inputs(batch))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as raised:
        error = first_line(raised)
    wrong = error is not None or given != expected
    return Verdict(
        name=f"visual_tokens.{name}",
        state="fail" if wrong else "pass",
        measured=f"the {name}'s vision tower gives {'an unknown number of' if given is None else given} feature vectors for {expected} "
        "visual tokens of the batch" + (f", and its forward pass fails with: {error}" if error else ""),
        expected="one feature vector for each visual token",
        way_out="choose towers with the same image size, patch size and feature selection, and the processor that belongs to them",
        values={"tokens": expected, "vectors": given},
    )


def tower_vectors(model: PreTrainedModel, batch: Mapping[str, Any]) -> int:
    """Vectors that the tower and projector give for the batch's images."""
    read: Any = model.get_image_features
    accepted = inspect.signature(read).parameters
    inputs = {key: value for key, value in model_inputs(batch).items() if key in accepted and key != "input_ids"}
    out = read(**inputs, return_dict=True)
    features = getattr(out, "pooler_output", out)
    tensors = [features] if isinstance(features, Tensor) else list(features)
    return sum(tensor.shape[:-1].numel() for tensor in tensors)
