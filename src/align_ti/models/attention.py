"""Reads attention weights on the way past, through transformers' attention interface, while every layer stays on SDPA.

The registered function hands each layer's query, key and value on to the SDPA function of transformers. At a layer that is being
read it also computes the softmax weights of the query rows that matter: a few rows of one layer instead of whole matrices of
every layer, as `output_attentions` would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align_ti.errors import ModelError
from align_ti.models.families import attention_modules, full_attention_layers, language_model
from align_ti.phases import phase

NAME = "align_ti_sdpa"
"""Our entry in transformers' attention interface: SDPA that can be watched and accepts boolean 4-D masks."""


@dataclass(frozen=True, slots=True, order=True)
class AttentionRows:
    """Which attention is read: at one layer, the rows whose queries are tokens of these roles."""

    layer: int
    roles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention that was read, averaged over heads, a row for each query that was asked for.

    `index` is the sequence index of each query. Samples with fewer queries than others are filled up with rows of 0, which `marked`
    tells.
    """

    weights: Float[Tensor, "batch queries keys"]
    index: Int[Tensor, "batch queries"]
    marked: Bool[Tensor, "batch queries"]

    def mean(self) -> Float[Tensor, "batch keys"]:
        """The attention to each key, averaged over the sample's queries; 0 for a sample without any."""
        return self.weights.sum(1) / self.marked.sum(-1).clamp(min=1)[:, None]

    def of_keys(self, count: int, device: torch.device) -> Attention:
        """The same over the first keys alone, on a device."""
        return Attention(self.weights[..., :count].to(device), self.index.to(device), self.marked.to(device))


@dataclass(slots=True)
class Watch:
    """What to read during a forward pass, and what was read.

    Attention of a pass with gradient has a gradient.
    """

    queries: Mapping[AttentionRows, Bool[Tensor, "batch seq"]]
    modules: Mapping[int, nn.Module] = field(default_factory=dict)
    found: dict[AttentionRows, Attention] = field(default_factory=dict)

    @property
    def means(self) -> dict[int, Float[Tensor, "batch seq"]]:
        """The mean over queries of what was read, by layer; for a watch over one kind of query."""
        return {wanted.layer: attention.mean() for wanted, attention in self.found.items()}

    def look(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        softcap: float | None,
    ) -> None:
        """Keeps the attention if this module is watched; the first pass that reaches it counts.

        That pass reads the marked tokens at its start; tokens behind them (branches of the packed form) are no queries.
        """
        for wanted, marked in self.queries.items():
            if module is self.modules.get(wanted.layer) and wanted not in self.found:
                behind = query.shape[2] - marked.shape[1]
                # A model spread over devices reads each layer on its own.
                queries = nn.functional.pad(marked, (0, behind)).to(query.device)
                with phase("capture"):
                    read = attention_rows(query, key, mask, queries, scaling, softcap)
                self.found[wanted] = read.of_keys(read.weights.shape[-1], marked.device)


_WATCHES: ContextVar[tuple[Watch, ...]] = ContextVar("align_ti_watches", default=())


def current_watches() -> tuple[Watch, ...]:
    """What is being read right now."""
    return _WATCHES.get()


@contextmanager
def watched_by(*watches: Watch) -> Iterator[None]:
    """Inside the block these watches, and no others, read."""
    token = _WATCHES.set(watches)
    try:
        yield
    finally:
        _WATCHES.reset(token)


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
    softcap = options.get("softcap")
    for watch in current_watches():
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

    Not at minus infinity, so that a padding row that sees nothing is not NaN.
    """
    if mask is None:
        rows, keys = scores.shape[-2:]
        mask = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril(keys - rows)
    mask = mask[..., : scores.shape[-1]]
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_rows(
    query: Float[Tensor, "batch heads seq head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    mask: Tensor | None,
    queries: Bool[Tensor, "batch seq"],
    scaling: float | None = None,
    softcap: float | None = None,
) -> Attention:
    """The softmax attention that each sample's marked queries pay to every key, averaged over heads.

    The softmax runs over all keys that a query sees, in float32 or wider. `mask` is the layer's own: None for causal,
    bool (True: seen), or additive. `softcap` is the layer's own cap on its scores.
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
    return Attention(weights.mean(1), index, marked)


def mean_attention(
    query: Float[Tensor, "batch heads seq head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    mask: Tensor | None,
    queries: Bool[Tensor, "batch seq"],
    scaling: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch keys"]:
    """`attention_rows`, averaged over each sample's marked queries.

    Source: Align-TI (arXiv:2602.09483), alpha of the IVA term.
    """
    return attention_rows(query, key, mask, queries, scaling, softcap).mean()


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


def watching(
    model: PreTrainedModel, queries: Bool[Tensor, "batch seq"], layers: tuple[int, ...]
) -> AbstractContextManager[Watch]:
    """Reads the attention of the marked queries at the given layers, as `capturing` does; `means` has it by layer."""
    return capturing(model, {AttentionRows(layer, ()): queries for layer in layers})


@contextmanager
def capturing(model: PreTrainedModel, queries: Mapping[AttentionRows, Bool[Tensor, "batch seq"]]) -> Iterator[Watch]:
    """Reads attention during the forward passes inside the block, each at its layer and of its marked queries.

    Raises:
        ModelError: a layer has no full attention to read, or the block ran no forward pass that reached it. An attention
            that was not captured would train happily with a term of 0.
    """
    modules, readable = attention_modules(model), full_attention_layers(model)
    for wanted in queries:
        if wanted.layer not in readable:
            raise ModelError(
                f"layer {wanted.layer} of {type(model).__name__} has no full attention to read; layers with it: "
                f"{', '.join(map(str, readable)) or 'none'}; "
                + (
                    "choose one of them (such as objective.iva.layer), or leave out the term that reads it (weight: 0)."
                    if readable
                    else "leave out the term that reads it (such as objective.iva.weight: 0)."
                )
            )
    watch = Watch(queries, {wanted.layer: modules[wanted.layer] for wanted in queries})
    with watched_by(*current_watches(), watch), own_attention(model):
        yield watch
    missing = sorted({wanted.layer for wanted in queries if wanted not in watch.found})
    if missing:
        raise ModelError(
            f"the attention of layer(s) {missing} of {type(model).__name__} was not captured: its attention does not go "
            "through transformers' attention interface; leave out the term that reads it (such as objective.iva.weight: 0) or "
            "use another "
            "model."
        )
