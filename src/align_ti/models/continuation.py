"""Two passes over one sequence: the gold tokens, then single tokens tried in place of a gold token.

A *branch* is one such token. It sees the gold tokens before the one that it stands in for, and itself; never the gold token it
replaces, what follows, or another branch; and it has the position of the token it replaces. Two forms give the same hidden
states: `continue_branches` runs branches alone over the cache of the gold pass; `read_packed` runs gold tokens and branches in
one pass (the ribbon), for models that keep no cache.

Source: Align-TI (arXiv:2602.09483), the ribbon mask of its TPA term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from align_ti.errors import ModelError
from align_ti.models.attention import own_attention
from align_ti.models.families import backbone, language_model, position_ids, real_tokens


@dataclass(frozen=True, slots=True)
class Branches:
    """Tokens to try, ragged over the batch and padded on the right.

    `replaces` is the sequence index of the gold token that a branch stands in for. Unused slots hold token 0 at index 0.
    """

    tokens: Int[Tensor, "batch branches"]
    replaces: Int[Tensor, "batch branches"]
    used: Bool[Tensor, "batch branches"]

    @property
    def width(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of the gold tokens: hidden states before the head, and the cache if it was asked for."""

    hidden: Float[Tensor, "batch seq hidden"]
    cache: DynamicCache | None


def read(model: PreTrainedModel, inputs: Mapping[str, Any], *, keep_cache: bool) -> Reading:
    """One pass over the gold tokens.

    Raises:
        ModelError: a cache was asked for and the model gave none.
    """
    # Made without the model's config, so that no sliding-window layer drops old keys.
    cache = DynamicCache() if keep_cache else None
    out = backbone(model)(
        **{**inputs, "position_ids": position_ids(inputs)},
        past_key_values=cache,
        use_cache=keep_cache,
        return_dict=True,
    )
    if cache is not None and (out.past_key_values is not cache or cache.get_seq_length() == 0):
        raise ModelError(
            f"{type(model).__name__} kept no cache for the second pass (gradient checkpointing switches it off); use the "
            "packed form (objective.tpa.form: packed)."
        )
    return Reading(hidden=out.last_hidden_state, cache=cache)


def continue_branches(
    model: PreTrainedModel, inputs: Mapping[str, Any], reading: Reading, branches: Branches
) -> Float[Tensor, "batch branches hidden"]:
    """The hidden state of each branch, from a pass over the branches alone; the reading's cache stays as it is.

    Gradient flows into the branches and, through the cached keys and values, into the gold pass.
    """
    assert reading.cache is not None, "the gold pass was read without keep_cache"
    mask = torch.cat([gold_seen(inputs, branches), alone(branches)], dim=-1)
    with own_attention(model):
        out = backbone(model)(
            input_ids=branches.tokens,
            attention_mask=mask[:, None],
            position_ids=position_ids(inputs).gather(1, branches.replaces),
            past_key_values=fork(reading.cache),
            use_cache=True,
            return_dict=True,
        )
    hidden: Tensor = out.last_hidden_state
    return hidden


def read_packed(
    model: PreTrainedModel, inputs: Mapping[str, Any], branches: Branches
) -> tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch branches hidden"]]:
    """The hidden states of gold tokens and of branches, from one pass over both."""
    config: Any = language_model(model).config
    own = config._attn_implementation
    if torch.is_grad_enabled() and not reuse_possible(model) and own != "sdpa":
        # Backward recomputes the layers after our attention entry is gone, on a kernel that may read the mask otherwise.
        raise ModelError(
            f"{type(model).__name__} runs on {own!r} attention under gradient checkpointing; 'sdpa' is accepted there; load it with "
            "attn_implementation='sdpa', or switch checkpointing off."
        )
    ids, positions = inputs["input_ids"], position_ids(inputs)
    batch, length = ids.shape
    steps = torch.arange(length, device=ids.device)
    # Padding rows see themselves, so that no row of the softmax is empty; nothing else sees them.
    gold = (steps[:, None] >= steps) & real_tokens(inputs)[:, None, :] | torch.eye(
        length, dtype=torch.bool, device=ids.device
    )
    gold_rows = torch.cat([gold, gold.new_zeros(batch, length, branches.width)], dim=-1)
    branch_rows = torch.cat([gold_seen(inputs, branches), alone(branches)], dim=-1)
    packed = {
        **inputs,
        "input_ids": torch.cat([ids, branches.tokens], dim=1),
        "attention_mask": torch.cat([gold_rows, branch_rows], dim=1)[:, None],
        "position_ids": torch.cat([positions, positions.gather(1, branches.replaces)], dim=1),
    }
    with own_attention(model):
        hidden = backbone(model)(**packed, use_cache=False, return_dict=True).last_hidden_state
    return hidden[:, :length], hidden[:, length:]


def gold_seen(inputs: Mapping[str, Any], branches: Branches) -> Bool[Tensor, "batch branches seq"]:
    """Which gold tokens each branch sees: the real ones before the token it replaces."""
    steps = torch.arange(inputs["input_ids"].shape[1], device=branches.tokens.device)
    return (steps < branches.replaces[..., None]) & real_tokens(inputs)[:, None, :]


def alone(branches: Branches) -> Bool[Tensor, "batch branches branches"]:
    """Which branches each branch sees: itself. Unused slots do too, so that no row of the softmax is empty."""
    batch, width = branches.tokens.shape
    return torch.eye(width, dtype=torch.bool, device=branches.tokens.device).expand(batch, width, width)


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache over the same keys and values that grows on its own; no tensor is copied or changed."""
    forked = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values  # type: ignore[union-attr]
        assert keys is not None
        assert values is not None
        # Updating with nothing initialises the layer; then it takes over the tensors themselves.
        forked.update(keys[..., :0, :], values[..., :0, :], index)
        forked.layers[index].keys, forked.layers[index].values = keys, values  # type: ignore[union-attr]
    return forked


def reuse_possible(model: PreTrainedModel) -> bool:
    """Whether the gold pass can keep a cache: not while gradient checkpointing recomputes its layers."""
    layers = language_model(model).modules()
    return not (model.training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers))
