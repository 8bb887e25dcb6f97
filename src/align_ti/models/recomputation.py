"""Gradient checkpointing that keeps the cache: layers are recomputed in backward, and candidates still reuse the gold pass.

transformers takes the cache away from a layer that is checkpointed, since recomputing it would write there twice. Here a layer
writes into a fork of the cache instead, each time anew, and what it wrote is handed out of the checkpoint beside its hidden states. So
the second pass reads the first one's keys and values, gradient and all, and no gold token is read a third time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from align_ti.models.attention import attention_of, current_watches, running_on, watched_by
from align_ti.models.caches import fork, keep_only, layers_read, put, states, written
from align_ti.models.families import language_model
from align_ti.models.overrides import override_forward


def recomputed_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The language model's layers that backward recomputes, or none if checkpointing is off."""
    return [
        layer
        for layer in language_model(model).modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training
    ]


def reuse_possible(model: PreTrainedModel) -> bool:
    """Whether the gold pass can keep a cache: not where a model recomputes its layers in a way of its own."""
    on = any(getattr(module, "gradient_checkpointing", False) for module in language_model(model).modules())
    return not (model.training and on) or bool(recomputed_layers(model))


@contextmanager
def keeping_cache(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, layers under gradient checkpointing are given the cache that the model is called with."""
    layers = recomputed_layers(model)
    flagged = [module for module in language_model(model).modules() if getattr(module, "gradient_checkpointing", False)]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(override_forward(layer, partial(recomputing, model, layer, layer.forward)))
        stack.enter_context(switched_off(*(flagged if layers else ())))
        yield


@contextmanager
def switched_off(*modules: nn.Module) -> Iterator[None]:
    """Inside the block the modules do not checkpoint by themselves."""
    before = [module.gradient_checkpointing for module in modules]
    try:
        for module in modules:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module, flag in zip(modules, before, strict=True):
            module.gradient_checkpointing = flag


def recomputing(
    model: PreTrainedModel, layer: GradientCheckpointingLayer, forward: Callable[..., Any], *given: Any, **options: Any
) -> Any:
    """The layer's forward, recomputed in backward; the cache among its options grows by what the layer writes.

    Backward comes after every block around this call has ended, so the recomputation brings along what it needs of them: the attention
    that the model runs on, and the cache as it was.
    """
    kept: Any = layer._gradient_checkpointing_func
    # The other kind of checkpoint sees no gradient through what a function merely refers to, such as the cache.
    through: Any = partial(checkpoint, **{**getattr(kept, "keywords", {}), "use_reentrant": False})
    attention, cache = attention_of(model), options.pop("past_key_values", None)
    before = fork(cache) if isinstance(cache, DynamicCache) else None
    # Attention that is read in a layer is computed once more when the layer is, and then kept by nobody.
    watches = current_watches()
    copies = tuple(replace(watch, found=dict(watch.found)) for watch in watches)
    runs = iter((watches,))

    def run(*inputs: Any) -> tuple[Any, list[int], list[int], list[Tensor]]:
        own = {} if before is None else {"past_key_values": fork(before)}
        with running_on(model, attention), switched_off(layer), watched_by(*next(runs, copies)):
            out = forward(*inputs, **options, **own)
        if before is None:
            return out, [], [], []
        grown, read = written(before, own["past_key_values"]), layers_read(own["past_key_values"])
        return out, grown, read, [state for index in grown for state in states(own["past_key_values"], index)]

    out, grown, read, found = through(run, *given)
    if before is not None and (grown or read):
        # A layer needs only what it wrote and what it read; otherwise every layer would keep the states of all others until backward.
        keep_only(before, grown + read)
    for index, keys, values in zip(grown, found[::2], found[1::2], strict=True):
        assert isinstance(cache, DynamicCache)
        put(cache, index, keys, values)
    return out
