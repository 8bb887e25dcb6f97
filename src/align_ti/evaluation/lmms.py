"""Requests of lmms-eval as our own questions, answered as `align-ti evaluate` answers them. Imports lmms-eval only in `manifest`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Evaluation, Generation
from align_ti.data.answers import Key
from align_ti.data.conversation import IMAGE_TAG, Conversation, Turn
from align_ti.data.records import without_line_ends
from align_ti.data.roles import encode
from align_ti.errors import DataError
from align_ti.evaluation.generation import choices
from align_ti.evaluation.runner import Advance, answer, chunks, ignore, said
from align_ti.evaluation.tasks import Question

Documents = Mapping[str, Mapping[str, Any]]
"""The documents of each task and split."""


@runtime_checkable
class Request(Protocol):
    """What is read of one of lmms-eval's requests to generate."""

    @property
    def args(self) -> tuple[str, Mapping[str, Any], Callable[[Any], Any] | None, Any, str, str]:
        """The words, the task's options of generation, what gives a document's images, the document's number, task and split."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as a question, and how its task wants it answered."""

    question: Question
    settings: Generation
    stops: tuple[str, ...]
    """The answer ends before the first of these."""
    key: Key


def manifest() -> Any:
    """What lmms-eval's registry reads from the entry point `align_ti` of the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="align_ti", simple_class_path="align_ti.evaluation.lmms_model.AlignTI")


def answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    documents: Documents,
    defaults: Generation,
    advance: Advance = ignore,
) -> list[str]:
    """The model's answer to each request: greedy, or drawn where the task asks for a temperature.

    Args:
        model: the model.
        processor: its processor.
        requests: lmms-eval's.
        documents: what they are about.
        defaults: what holds where a task says nothing; batch size and seed.
        advance: called with the number of requests done.

    Raises:
        DataError: a request is of a kind that the model cannot answer (videos, sound, beams), or cannot be asked.
    """
    repeats: Counter[tuple[str, str, str]] = Counter()
    every = [asked(request, documents, defaults, repeats) for request in requests]
    found: dict[int, str] = {}
    for settings in dict.fromkeys(one.settings for one in every):
        indices = [index for index, one in enumerate(every) if one.settings == settings]
        texts = alike(model, processor, [every[index] for index in indices], settings, advance)
        found |= dict(zip(indices, texts, strict=True))
    return [found[index] for index in range(len(every))]


def alike(
    model: PreTrainedModel, processor: ProcessorMixin, requests: Sequence[Asked], settings: Generation, advance: Advance
) -> list[str]:
    """The answers to requests of one way of answering."""
    if settings.temperature == 0:
        plain = Evaluation(batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens)
        given = answer(model, processor, [one.question for one in requests], plain, advance)
    else:
        given = []
        for part in chunks(requests, settings.batch_size):
            samples = [encode(one.question.conversation, processor, train=False, ask=True) for one in part]
            choose = choices(settings, [one.key for one in part], 0)
            given += said(model, processor, samples, settings.max_new_tokens, choose)
            advance(len(part))
    return [stopped(text, one.stops) for one, (text, _) in zip(requests, given, strict=True)]


def asked(
    request: Request, documents: Documents, defaults: Generation, repeats: Counter[tuple[str, str, str]]
) -> Asked:
    """A request as a question. Images that the words have no tags for stand in front of them.

    Args:
        request: the request.
        documents: what it is about.
        defaults: what holds where the task says nothing.
        repeats: how often each document was asked before, so that a repeated question has draws of its own.

    Raises:
        DataError: the request cannot be asked.
    """
    words, options, visuals_of, number, task, split = request.args
    place = f"task {task}, split {split}, document {number}"
    images = pictures(visuals_of(documents[task][split][number]) if visuals_of else None, place)
    words = without_line_ends(words) if IMAGE_TAG in words else IMAGE_TAG * len(images) + words
    question = Question(
        Conversation((Turn("user", words),), images, place=place), expected="", kind=task, picture=place
    )
    document = (task, split, str(number))
    repeats[document] += 1
    key = Key(f"{task}/{split}", str(number), f"time {repeats[document]}")
    return Asked(question, generation(options, defaults, place), stops(options), key)


def pictures(visuals: Any, place: str) -> tuple[Image.Image, ...]:
    """A document's visuals, which have to be images.

    Raises:
        DataError: one is not.
    """
    found = tuple(visuals or ())
    for one in found:
        if not isinstance(one, Image.Image):
            raise DataError(
                f"{place}: a visual is of type {type(one).__name__!r}, as videos and sound are; images are accepted; leave the task "
                "out."
            )
    return found


def generation(options: Mapping[str, Any], defaults: Generation, place: str) -> Generation:
    """A task's options of generation as ours.

    Raises:
        DataError: it asks for beams, which the answers of `align-ti evaluate` do not have.
    """
    if int(options.get("num_beams") or 1) > 1:
        raise DataError(
            f"{place}: the task asks for {options['num_beams']} beams; 1 is accepted; give --gen_kwargs num_beams=1, or leave the task "
            "out."
        )
    draws = bool(options.get("do_sample", True))
    temperature = options.get("temperature")
    if temperature is None:
        # transformers' default where a task asks for draws and names no temperature.
        temperature = 1.0 if options.get("do_sample") else defaults.temperature
    changed: dict[str, Any] = {"temperature": float(temperature) if draws else 0.0}
    if (limit := options.get("max_new_tokens")) is not None:
        changed["max_new_tokens"] = int(limit)
    if changed["temperature"] > 0:
        # 0 and 1 are how others write that all tokens may be drawn.
        changed["top_k"] = int(options.get("top_k") or 0) or None
        changed["top_p"] = float(options.get("top_p") or 0) or None
    return Generation(**{**defaults.model_dump(), **changed})


def stops(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The words that end an answer, by the task's `until`."""
    until = options.get("until") or ()
    return tuple(word for word in ([until] if isinstance(until, str) else until) if word)


def stopped(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the words that end an answer."""
    for word in stops:
        text = text.partition(word)[0]
    return text.strip()
