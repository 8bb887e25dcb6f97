"""Two passes over one sequence: the gold tokens, then single tokens tried in place of a gold token.

A *branch* is one such token. It sees the gold tokens before the one that it replaces, and itself; never the gold token it
replaces, what follows, or another branch; and it has the position of the token it replaces. Two forms give the same hidden
states: `continue_branches` runs branches alone over the cache of the gold pass; `read_packed` runs gold tokens and branches in
one pass (the ribbon), for models that keep no cache.

Source: Align-TI (arXiv:2602.09483), the ribbon mask of its TPA term.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from align_ti.errors import ModelError
from align_ti.models.attention import own_attention
from align_ti.models.branches import Branches, Layout
from align_ti.models.caches import read_only
from align_ti.models.families import (
    backbone,
    cross_attention_layers,
    language_model,
    layer_kinds,
    layers_that_cannot_branch,
    position_ids,
    real_tokens,
    sliding_window,
)
from align_ti.models.overrides import override_forward
from align_ti.models.recomputation import keeping_cache


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of the gold tokens: hidden states before the head, the cache if it was asked for, and hidden states behind the
    layers that were asked for."""

    hidden: Float[Tensor, "batch seq hidden"]
    cache: DynamicCache | None
    layers: Mapping[int, Float[Tensor, "batch seq hidden"]] = field(default_factory=dict)


def read(
    model: PreTrainedModel, inputs: Mapping[str, Any], *, keep_cache: bool, layers: Collection[int] = ()
) -> Reading:
    """One pass over the gold tokens.

    Args:
        model: the model.
        inputs: its inputs.
        keep_cache: whether candidates will continue from here.
        layers: layers whose hidden states are wanted, by index from 0; as transformers gives them, so those of the last layer are what
            the head reads, behind the closing norm.

    Raises:
        ModelError: a cache was asked for and the model gave none.
    """
    # Made without the model's config, so that no sliding-window layer drops old keys.
    cache = DynamicCache() if keep_cache else None
    with keeping_cache(model):
        out = backbone(model)(
            **{**inputs, "position_ids": position_ids(model, inputs)},
            past_key_values=cache,
            use_cache=keep_cache,
            return_dict=True,
            **({"output_hidden_states": True} if layers else {}),
        )
    if cache is not None and (out.past_key_values is not cache or cache.get_seq_length() == 0):
        raise ModelError(
            f"{type(model).__name__} kept no cache for the second pass (a gradient checkpointing of its own switches it off); use the "
            "packed form (objective.tpa.form: packed)."
        )
    return Reading(hidden=out.last_hidden_state, cache=cache, layers=behind_layers(model, out, layers))


def behind_layers(model: PreTrainedModel, out: Any, layers: Collection[int]) -> dict[int, Tensor]:
    """The hidden states behind the layers that were asked for.

    Raises:
        ModelError: the model has no such layer, or does not give hidden states.
    """
    if not layers:
        return {}
    states = getattr(out, "hidden_states", None)
    if states is None:
        raise ModelError(
            f"{type(model).__name__} gives no hidden states of its layers; leave out the term that reads them (weight: 0)."
        )
    # The first entry is what the first layer is given.
    count = len(states) - 1
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise ModelError(
            f"{type(model).__name__} has no layer {wrong[0]}; layers 0 to {count - 1} are accepted; choose one of them."
        )
    return {layer: states[layer + 1] for layer in layers}


def continue_branches(
    model: PreTrainedModel, inputs: Mapping[str, Any], reading: Reading, branches: Branches
) -> Float[Tensor, "branches hidden"]:
    """The hidden state of each branch, from a pass over the branches alone; the reading's cache stays as it is.

    Gradient flows into the branches and, through the cached keys and values, into the gold pass.
    """
    assert reading.cache is not None, "the gold pass was read without keep_cache"
    rows = branches.in_rows(keys=inputs["input_ids"].shape[1])
    masks = {kind: branch_rows(model, inputs, rows, kind)[:, None] for kind in set(layer_kinds(model))}
    marks = {name: torch.zeros_like(rows.tokens) for name in TOKEN_MARKS if name in inputs}
    with own_attention(model), keeping_cache(model):
        out = backbone(model)(
            **marks,
            input_ids=rows.tokens,
            attention_mask=for_layers(masks),
            position_ids=branch_positions(model, inputs, rows),
            past_key_values=read_only(reading.cache, rows),
            use_cache=True,
            return_dict=True,
        )
    return rows.flat(out.last_hidden_state)


def read_packed(
    model: PreTrainedModel, inputs: Mapping[str, Any], branches: Branches, layers: Collection[int] = ()
) -> tuple[Reading, Float[Tensor, "branches hidden"]]:
    """What `read` gives of the gold tokens, and the hidden states of branches, from one pass over both."""
    rows = branches.a_row_each()
    length, width = inputs["input_ids"].shape[1], rows.width
    masks = {}
    for kind, gold in gold_rows(model, inputs).items():
        gold = torch.nn.functional.pad(gold, (0, width))
        masks[kind] = torch.cat([gold, branch_rows(model, inputs, rows, kind)], dim=1)[:, None]
    # What marks image tokens marks none among the branches.
    marks = {name: torch.nn.functional.pad(inputs[name], (0, width)) for name in TOKEN_MARKS if name in inputs}
    packed = {
        **inputs,
        **marks,
        "input_ids": torch.cat([inputs["input_ids"], rows.tokens], dim=1),
        "attention_mask": for_layers(masks),
        "position_ids": torch.cat([position_ids(model, inputs), branch_positions(model, inputs, rows)], dim=-1),
    }
    with own_attention(model), keeping_cache(model):
        options = {"output_hidden_states": True} if layers else {}
        out = backbone(model)(**packed, use_cache=False, return_dict=True, **options)
    hidden: Tensor = out.last_hidden_state
    behind = {layer: states[:, :length] for layer, states in behind_layers(model, out, layers).items()}
    return Reading(hidden[:, :length], None, behind), rows.flat(hidden[:, length:])


TOKEN_MARKS = ("token_type_ids", "mm_token_type_ids")
"""Inputs of [batch, seq] that tell image tokens from words."""


def branch_positions(
    model: PreTrainedModel, inputs: Mapping[str, Any], rows: Layout
) -> Int[Tensor, "*axes rows width"]:
    """Each branch has the position of the token that it replaces, on every axis."""
    positions = rows.by_row(position_ids(model, inputs), dim=-2)
    return positions.gather(-1, rows.replaces.expand(*positions.shape[:-1], -1))


def gold_rows(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Bool[Tensor, "batch seq seq"]]:
    """Which gold tokens each gold token sees, for each kind of layer.

    A model that lets image tokens or a prefix see ahead makes its masks from marks in the inputs; those are read off the model.
    """
    length, device = inputs["input_ids"].shape[1], inputs["input_ids"].device
    steps = torch.arange(length, device=device)
    distance = steps[:, None] - steps
    # Padding rows see themselves, so that no row of the softmax is empty; nothing else sees them.
    seen = (distance >= 0) & real_tokens(inputs)[:, None, :] | torch.eye(length, dtype=torch.bool, device=device)
    rows = {kind: seen & within(model, kind, distance) for kind in set(layer_kinds(model))}
    marks = [inputs[name] for name in TOKEN_MARKS if name in inputs]
    if marks and _MAKES_MASKS.get(model, True):
        own = own_masks(model, inputs)
        if any(bool(mark.any()) for mark in marks):  # a batch of text alone does not show it
            _MAKES_MASKS[model] = bool(own)
        rows.update(own)
    return rows


_MAKES_MASKS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Whether a model was seen to make masks from marks; asking costs a pass of its vision tower."""


class _MasksAreMade(Exception):  # noqa: N818 - nothing is wrong
    """Ends a pass at the language model: what it was given is all that is asked."""


@torch.no_grad()
def own_masks(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Bool[Tensor, "batch seq seq"]]:
    """The masks that the model's backbone itself makes of the inputs, if it makes any before its language model."""
    given: list[Any] = []

    def noted(*_arguments: Any, **options: Any) -> None:
        given.append(options.get("attention_mask"))
        raise _MasksAreMade

    with own_attention(model), override_forward(language_model(model), noted), suppress(_MasksAreMade):
        backbone(model)(**{**inputs, "position_ids": position_ids(model, inputs)}, use_cache=False, return_dict=True)
    masks = given[0] if isinstance(given[0], Mapping) else dict.fromkeys(set(layer_kinds(model)), given[0])
    ids = inputs["input_ids"]
    eye = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    return {
        kind: mask[:, 0] | eye
        for kind, mask in masks.items()
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool
    }


def branch_rows(
    model: PreTrainedModel, inputs: Mapping[str, Any], rows: Layout, kind: str
) -> Bool[Tensor, "rows width keys"]:
    """Which gold tokens, and behind them which branches of its row, each branch sees in a layer of this kind.

    Those are the real gold tokens before the one that it replaces, as far back as the layer looks, and itself.
    """
    steps = torch.arange(inputs["input_ids"].shape[1], device=rows.tokens.device)
    distance = rows.replaces[..., None] - steps
    real = rows.by_row(real_tokens(inputs))
    gold = (distance > 0) & real[:, None, :] & within(model, kind, distance)
    alone = torch.eye(rows.width, dtype=torch.bool, device=gold.device).expand(len(gold), -1, -1)
    return torch.cat([gold, alone], dim=-1)


def within(model: PreTrainedModel, kind: str, distance: Int[Tensor, "*rows keys"]) -> Bool[Tensor, "*rows keys"]:
    """Whether a layer of this kind looks that far back."""
    return (
        distance < sliding_window(model) if kind == "sliding_attention" else torch.ones_like(distance, dtype=torch.bool)
    )


def for_layers(masks: dict[str, Bool[Tensor, "batch 1 rows keys"]]) -> Any:
    """The masks as models take them: the tensor itself if all layers are of one kind, else a dict by kind."""
    return next(iter(masks.values())) if len(masks) == 1 else masks


def check_branching(model: PreTrainedModel) -> None:
    """Refuse a model in which no token can be tried in place of another.

    Raises:
        ModelError: recurrent layers, or layers with cross-attention; they are named.
    """
    found = layers_that_cannot_branch(model)
    if found:
        kinds = ", ".join(sorted(set(found.values())))
        raise ModelError(
            f"TPA cannot try candidates in {type(model).__name__}: layer(s) {', '.join(map(str, found))} ({kinds}) carry one state "
            "from token to token, so neither a kept cache nor a mask can leave the gold token out for one candidate; leave TPA out "
            "(objective.tpa.weight: 0); sft, kd and iva work."
        )
    crossed = cross_attention_layers(model)
    if crossed:
        raise ModelError(
            f"TPA cannot try candidates in {type(model).__name__}: layer(s) {', '.join(map(str, crossed))} read the image by "
            "cross-attention, which is not followed for candidates; leave TPA out (objective.tpa.weight: 0); sft and kd work."
        )
