"""Operations on a cache of keys and values: independent copies, read-only use by rows of candidates, transfer of single layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from align_ti.models.branches import Layout


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache over the same keys and values that grows on its own; no tensor is copied or changed."""
    forked = DynamicCache()
    # A layer grows by taking new tensors in place of its own, so a shallow copy of it is enough.
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def read_only(cache: DynamicCache, rows: Layout) -> DynamicCache:
    """A cache in which each row finds its sample's keys and values. It does not grow, and the cache that it reads stays as it is."""
    made = DynamicCache()
    made.layers = [ReadOnlyLayer.of(layer, rows) for layer in cache.layers]
    return made


class ReadOnlyLayer(DynamicLayer):
    """A layer's keys and values for rows of its samples: what is added to them is handed back and not kept, for nothing comes after."""

    rows: Layout
    keys: Tensor
    values: Tensor
    used: bool

    @classmethod
    def of(cls, layer: Any, rows: Layout) -> ReadOnlyLayer:
        """A read-only layer over this one."""
        made = cls()
        vars(made).update(vars(layer), rows=rows, used=False)
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Each row's keys and values, its own behind those of its sample."""
        self.used = True
        keys, values = (
            torch.cat([self.rows.by_row(of), own], dim=-2)
            for of, own in ((self.keys, key_states), (self.values, value_states))
        )
        return keys, values


def keep_only(cache: DynamicCache, indices: list[int]) -> None:
    """Empties all other layers of the cache."""
    cache.layers = [layer if index in indices else DynamicLayer() for index, layer in enumerate(cache.layers)]


def states(cache: DynamicCache, index: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer."""
    layer: Any = cache.layers[index]
    return layer.keys, layer.values


def put(cache: DynamicCache, index: int, keys: Tensor, values: Tensor) -> None:
    """The layer's keys and values are these tensors themselves."""
    if index >= len(cache.layers):
        # Updating with nothing initialises the layer; then it takes over the tensors.
        cache.update(keys[..., :0, :], values[..., :0, :], index)
    layer: Any = cache.layers[index]
    layer.keys, layer.values = keys, values


def layers_read(cache: DynamicCache) -> list[int]:
    """The read-only layers that a pass has read."""
    return [index for index, layer in enumerate(cache.layers) if isinstance(layer, ReadOnlyLayer) and layer.used]


def written(before: DynamicCache, after: DynamicCache) -> list[int]:
    """The layers of a fork that have grown."""
    return [
        index
        for index in range(len(after.layers))
        if states(after, index)[0] is not (states(before, index)[0] if index < len(before.layers) else None)
    ]
