"""Reads attention weights on the way past, through transformers' attention interface, while every layer stays on SDPA.

The registered function hands each layer's query, key and value on to the SDPA function of transformers. At a layer that is being
read it also computes the softmax weights of the query rows that matter: a few rows of one layer instead of whole matrices of
every layer, as `output_attentions` would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align_ti.errors import ModelError
from align_ti.models.families import attention_modules, full_attention_layers, language_model
from align_ti.phases import phase

NAME = "align_ti_sdpa"
"""Our entry in transformers' attention interface: SDPA that can be watched and accepts boolean 4-D masks."""


@dataclass(slots=True)
class Watch:
    """What to read during a forward pass, and what was read.

    `means[layer]` is [batch, seq]: the attention that the marked queries pay to each token, averaged over heads and over the
    sample's marked queries; rows of samples without a marked query are 0.
    """

    queries: Bool[Tensor, "batch seq"]
    layers: tuple[int, ...]
    modules: tuple[nn.Module, ...] = ()
    means: dict[int, Float[Tensor, "batch seq"]] = field(default_factory=dict)

    def look(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        softcap: float | None,
    ) -> None:
        """Keeps the mean attention if this module is watched; the first pass that reaches it counts.

        That pass reads the marked tokens at its start; tokens behind them (branches of the packed form) are no queries.
        """
        for layer, watched in zip(self.layers, self.modules, strict=True):
            if module is watched and layer not in self.means:
                behind = query.shape[2] - self.queries.shape[1]
                queries = nn.functional.pad(self.queries, (0, behind)).to(query.device)
                # A model spread over devices reads each layer on its own.
                with phase("capture"):
                    mean = mean_attention(query, key, mask, queries, scaling, softcap)
                self.means[layer] = mean.to(self.queries.device)


_WATCH: ContextVar[Watch | None] = ContextVar("align_ti_watch", default=None)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA, with a look at the weights where a watch is set.

    Raises:
        ModelError: the layer has attention sinks, which take weight from every token and are not followed.
    """
    if options.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__} has attention sinks, which are not followed; leave IVA and TPA out (weight: 0)."
        )
    watch, softcap = _WATCH.get(), options.get("softcap")
    if watch is not None:
        watch.look(module, query, key, attention_mask, options.get("scaling"), softcap)
    forward: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward if softcap is None else capped
    return forward(module, query, key, value, attention_mask, **options)


def capped(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_options: Any,
) -> tuple[Float[Tensor, "batch seq heads head_dim"], None]:
    """Attention with a soft cap on its scores, which SDPA does not know: cap * tanh(score / cap)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = masked(torch.tanh(scores / softcap) * softcap, mask)
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (nn.functional.dropout(weights, dropout) @ value).transpose(1, 2).contiguous(), None


def masked(scores: Float[Tensor, "batch heads seq keys"], mask: Tensor | None) -> Float[Tensor, "batch heads seq keys"]:
    """Scores with what is not seen at the lowest number: `mask` is None for causal, bool (True: seen), or additive.

    Not at minus infinity, so that a padding row that sees nothing is no not-a-number.
    """
    if mask is None:
        rows, keys = scores.shape[-2:]
        mask = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril(keys - rows)
    mask = mask[..., : scores.shape[-1]]
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.no_grad()
def mean_attention(
    query: Float[Tensor, "batch heads seq head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    mask: Tensor | None,
    queries: Bool[Tensor, "batch seq"],
    scaling: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch keys"]:
    """The softmax attention that each sample's marked queries pay to every key, averaged over heads and those queries.

    The softmax runs over all keys that a query sees, in float32 or wider. `mask` is the layer's own: None for causal,
    bool (True: seen), or additive. `softcap` is the layer's own cap on its scores.

    Source: Align-TI (arXiv:2602.09483), alpha of the IVA term.
    """
    count = queries.sum(-1)
    width = max(int(count.max()), 1)
    # The marked queries of each sample, moved to the front in order; what follows them in shorter samples counts 0.
    index = queries.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
    marked = queries.gather(1, index)
    rows = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # which would compute the product in half precision
        scores = (rows.to(wide) @ keys.to(wide).mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        seen = torch.arange(key.shape[2], device=key.device) <= index[..., None]
        scores = masked(scores, seen[:, None])
    else:
        mask = mask.expand(query.shape[0], -1, -1, -1)
        scores = masked(scores, mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])))
    weights = torch.where(marked[:, None, :, None], scores.softmax(-1), 0.0)
    return weights.mean(1).sum(1) / count.clamp(min=1)[:, None]


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention that the language model runs on."""
    config: Any = language_model(model).config
    return str(config._attn_implementation)


@contextmanager
def running_on(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The language model runs on this attention inside the block, and on its own again after it."""
    configs: dict[int, Any] = {
        id(module.config): module.config for module in language_model(model).modules() if hasattr(module, "config")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def own_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The language model runs on our attention entry inside the block, and on its own again after it."""
    return running_on(model, NAME)


@contextmanager
def watching(model: PreTrainedModel, queries: Bool[Tensor, "batch seq"], layers: tuple[int, ...]) -> Iterator[Watch]:
    """Reads the mean attention of the marked queries at the given layers during the forward passes inside the block.

    Raises:
        ModelError: a layer has no full attention to read, or the block ran no forward pass that reached it. An attention
            that was not captured would train happily with a term of 0.
    """
    modules, readable = attention_modules(model), full_attention_layers(model)
    for layer in layers:
        if layer not in readable:
            raise ModelError(
                f"layer {layer} of {type(model).__name__} has no full attention to read; layers with it: "
                f"{', '.join(map(str, readable)) or 'none'}; "
                + (
                    "choose one of them (objective.iva.layer)."
                    if readable
                    else "leave IVA out (objective.iva.weight: 0)."
                )
            )
    watch = Watch(queries=queries, layers=layers, modules=tuple(modules[layer] for layer in layers))
    token = _WATCH.set(watch)
    try:
        with own_attention(model):
            yield watch
    finally:
        _WATCH.reset(token)
    missing = [layer for layer in layers if layer not in watch.means]
    if missing:
        raise ModelError(
            f"the attention of layer(s) {missing} of {type(model).__name__} was not captured: its attention does not go "
            "through transformers' attention interface; leave IVA out (objective.iva.weight: 0) or use another teacher."
        )
