"""Whether images reach the answers of both models, and whether each record of a batch is read with its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.data.collator import Collator
from align_ti.data.roles import RESPONSE, VISUAL, encode, model_inputs
from align_ti.preflight.pair import on_device, read_by
from align_ti.preflight.samples import Sample, with_other_pictures
from align_ti.preflight.verdicts import Verdict
from align_ti.terms.plain import own_logits

SEEN = 10.0
"""A change of the answer counts as clear from this many times the rounding of the model's precision."""

ROUNDING = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""What a log-probability may move, on average and in nats, when a record is read in a batch and not alone.

Kernels for other shapes round differently, and by processor: sound float32 models were seen to move by 1e-6 to 7e-4, most with random
weights and linear attention, which make a last digit large. Another record's image moves by tenths and more.
"""


@dataclass(frozen=True, slots=True)
class Change:
    """Mean changes of a log-probability, in nats, over the response rows behind an image.

    `pictures`: other images in place of the record's own. `repeat`: the same call again. `batch`: the record in a batch.
    `digit`: the last digit of the model's dtype, at the size of a log-probability.
    """

    pictures: float
    repeat: float
    batch: float
    digit: float

    @property
    def rounding(self) -> float:
        """What the answer moves by for its precision alone."""
        return max(self.batch, self.digit)


def pixel_verdicts(
    models: Mapping[str, PreTrainedModel], samples: Sequence[Sample], processors: Mapping[str, ProcessorMixin]
) -> list[Verdict]:
    """For each model, whether pixels matter and whether a batch changes nothing; `samples` have images."""
    views = {
        name: [Sample(sample.record, dict(read_by(name, sample.tensors))) for sample in samples] for name in models
    }
    measured = {name: measure(model, views[name], processors[name]) for name, model in models.items()}
    verdicts = [pixels_matter(name, change) for name, change in measured.items()]
    return verdicts + [batch_alone(name, models[name], change) for name, change in measured.items()]


def measure(model: PreTrainedModel, samples: Sequence[Sample], processor: ProcessorMixin) -> Change:
    """The mean change over the samples, for each thing that is changed."""
    collate, device = Collator(processor.tokenizer.pad_token_id), model.device
    together = on_device(collate([sample.tensors for sample in samples]), device)
    logits = own_logits(model, model_inputs(together))
    changes: list[tuple[float, float, float, float]] = []
    for index, sample in enumerate(samples):
        own = on_device(collate([sample.tensors]), device)
        other = on_device(collate([encode(with_other_pictures(samples, index), processor)]), device)
        rows = answer_rows(sample).to(device)
        alone, again, changed = (
            own_logits(model, model_inputs(batch))[0, rows].log_softmax(-1) for batch in (own, own, other)
        )
        joined = logits[index, rows].log_softmax(-1)
        digit = torch.finfo(model.dtype).eps * float(alone.abs().mean())
        changes.append((moved(alone, changed), moved(alone, again), moved(alone, joined), digit))
    return Change(*(sum(column) / len(changes) for column in zip(*changes, strict=True)))


def answer_rows(sample: Sample) -> Tensor:
    """The rows that predict response tokens behind an image."""
    roles = sample.tensors["roles"]
    steps = torch.arange(len(roles))
    first = int((roles == VISUAL).nonzero()[0])
    behind: Tensor = (roles == RESPONSE) & (steps > first)
    return behind.nonzero().flatten() - 1


def moved(one: Float[Tensor, "rows vocab"], two: Float[Tensor, "rows vocab"]) -> float:
    """The mean absolute difference of two log-probabilities."""
    return float((one - two).abs().mean())


def pixels_matter(name: str, change: Change) -> Verdict:
    """Whether other images change the model's answer.

    The same shapes run through the same kernels, so a model that sees nothing gives the same bits, or what a repeated call
    differs by on kernels that do not repeat themselves: no more than that is a failure. More than that, but less than ten times
    what the record moves by in a batch, is rounding as likely as sight: an untrained projector in half precision, or a nearly
    blind model.
    """
    blind = not change.pictures > 3 * change.repeat
    faint = not change.pictures > SEEN * change.rounding
    return Verdict(
        name=f"pixels.{name}",
        state="fail" if blind else "warn" if faint else "pass",
        measured=f"other images change the {name}'s log-probabilities by {change.pictures:.2g} nats on average, a repeated pass "
        f"by {change.repeat:.2g}, rounding by {change.rounding:.2g}",
        expected=f"a change of more than {SEEN:g} times the rounding error",
        way_out=f"images do not influence the {name}'s answers: check the weights of its vision tower and projector"
        if blind
        else "continue if the projector is untrained; otherwise check the weights of vision tower and projector",
        values={"pictures": change.pictures, "repeat": change.repeat, "rounding": change.rounding},
    )


def batch_alone(name: str, model: PreTrainedModel, change: Change) -> Verdict:
    """Whether a record in a batch gives what it gives alone: its own images, and padding that is not seen."""
    limit = ROUNDING.get(model.dtype, ROUNDING[torch.bfloat16])
    # A model whose images change little must not pass by the absolute limit with another record's image.
    mixed = change.batch > 0.3 * change.pictures and change.batch > 0.05 * limit
    wrong = not change.batch <= limit or mixed
    return Verdict(
        name=f"batch.{name}",
        state="fail" if wrong else "pass",
        measured=f"the {name}'s log-probabilities change by {change.batch:.2g} nats on average when a record is run in a batch, and by "
        f"{change.pictures:.2g} with other images",
        expected=f"rounding error alone (at most {limit:g} in {str(model.dtype).removeprefix('torch.')})",
        way_out="records of a batch get each other's images or attend to padding: check the versions of processor and model",
        values={"batch": change.batch, "limit": limit},
    )
