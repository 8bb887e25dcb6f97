"""Asks a model and measures it: greedy answers, and accuracy by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, ProcessorMixin

from align_ti.config import Evaluation
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation, StoredPicture
from align_ti.data.roles import encode, model_inputs
from align_ti.evaluation.scoring import by_kind, is_right
from align_ti.evaluation.tasks import Question, question
from align_ti.models.families import end_tokens

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
}
"""The most probable token of each step: what a model's generation config says otherwise would give teacher and student two ways of
answering. Tokens that it suppresses stay so."""

Advance = Callable[[int], None]
"""Called with the number of records done, for a progress bar."""


def ignore(_done: int) -> None:
    """Progress that nobody watches."""


def chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Consecutive parts of at most the given size."""
    return (items[start : start + size] for start in range(0, len(items), size))


def placed(inputs: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The inputs on the model's device, images in its precision."""
    dtypes = {name: model.dtype if value.is_floating_point() else value.dtype for name, value in inputs.items()}
    return {name: value.to(model.device, dtypes[name]) for name, value in inputs.items()}


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    settings: Evaluation,
    advance: Advance = ignore,
) -> list[tuple[str, bool]]:
    """The model's greedy answer to each question, and whether it was cut at the token limit.

    Questions of one kind are asked together: their answers are of similar length, so a batch does not wait for one long reading.
    Each is prepared by itself, since processors differ in whether one call may mix questions with and without images.
    """
    order = sorted(range(len(questions)), key=lambda index: questions[index].kind)
    answers: dict[int, tuple[str, bool]] = {}
    for indices in chunks(order, settings.batch_size):
        part = [questions[index] for index in indices]
        asked = [one.conversation for one in part]
        answers |= zip(indices, said_to(model, processor, asked, settings.max_new_tokens), strict=True)
        advance(len(part))
    return [answers[index] for index in range(len(questions))]


def said_to(
    model: PreTrainedModel, processor: ProcessorMixin, conversations: Sequence[Conversation], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """What the model says, greedily, to each question of one batch, and whether it was cut at the token limit."""
    return said(
        model, processor, [encode(one, processor, train=False, ask=True) for one in conversations], max_new_tokens
    )


@torch.no_grad()
def said(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Mapping[str, Tensor]],
    max_new_tokens: int,
    choose: Sequence[LogitsProcessor] = (),
) -> list[tuple[str, bool]]:
    """What the model says behind each prompt of one batch, and whether it was cut at the token limit.

    Args:
        model: the model; it is set to eval mode.
        processor: its processor.
        samples: the prompts, encoded to ask.
        max_new_tokens: tokens at most.
        choose: changes the logits of each step before the most probable token is taken; nothing: greedy.
    """
    model.eval()
    inputs = placed(model_inputs(Collator(processor.tokenizer.pad_token_id, side="left")(samples)), model)
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    made = generate(
        **inputs,
        **GREEDY,
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList(choose),
    )
    made = made[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(sorted(end_tokens(model)), device=made.device)
    cut = ~torch.isin(made, ends).any(-1) & (made.shape[1] >= max_new_tokens)
    words = processor.tokenizer.batch_decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [(text.strip(), bool(short)) for text, short in zip(words, cut, strict=True)]


def stored(conversation: Conversation) -> bool:
    """Whether its first image lies inside a table, so that no path tells it from others."""
    return bool(conversation.images) and isinstance(conversation.images[0], StoredPicture)


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    settings: Evaluation,
    advance: Advance = ignore,
) -> dict[str, Any]:
    """Exact-match accuracy of the last answer of each record, overall and by kind, with every answer given.

    Returns:
        `accuracy` by kind (per cent, 95 % interval, number of questions), `cut` answers at the token limit, and `answers`.
    """
    questions = [question(conversation) for conversation in conversations]
    given = answer(model, processor, questions, settings, advance)
    right = [is_right(text, one.expected) for (text, _), one in zip(given, questions, strict=True)]
    scores = by_kind(right, [one.picture for one in questions], [one.kind for one in questions])
    return {
        "accuracy": {kind: asdict(score) for kind, score in scores.items()},
        "cut": sum(cut for _, cut in given),
        "answers": [
            {
                "place": one.conversation.place,
                "image": next((str(image) for image in one.conversation.images if isinstance(image, Path)), None),
                **({"picture": one.picture} if stored(one.conversation) else {}),
                "kind": one.kind,
                "question": one.conversation.turns[-1].text,
                "expected": one.expected,
                "answer": text,
                "right": hit,
                "cut": cut,
            }
            for one, (text, cut), hit in zip(questions, given, right, strict=True)
        ],
    }
