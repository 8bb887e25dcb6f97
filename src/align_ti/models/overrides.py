"""One module's forward replaced for a moment: how a model's own code is used in parts without a line of it being changed.

The *projection* is the model's own forward over hidden states that are there already, so that whatever a family does behind its head
(a soft cap, a scale, a cut) belongs to the distribution without a table of families. A *shared tower* computes features that two
models read once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from align_ti.errors import ModelError
from align_ti.models.families import backbone, head, tower
from align_ti.models.placement import is_quantized


@contextmanager
def override_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block a call of the module runs the given function; hooks and wrappers of the module stay."""
    kept = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if kept is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = kept


class _Given:
    """What a backbone returns, with hidden states alone in it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Projection:
    """From hidden states to logits, as the model's own forward does it behind its backbone."""

    model: PreTrainedModel

    def __call__(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """The logits of each row, with every transform that the family applies to them."""
        given, ids = _Given(hidden[None]), torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with override_forward(backbone(self.model), lambda *_args, **_options: given):
            # The class's own function: a wrapper around the instance (autocast, a data-parallel redirect) is for whole passes.
            out = type(self.model).forward(self.model, input_ids=ids, return_dict=True)
        logits: Tensor = out.logits[0]
        return logits

    @property
    def linear(self) -> nn.Linear | None:
        """The head's linear layer if the projection is exactly that layer, else None.

        Found by a probe, not by the model's type: the layer gets the hidden states themselves, and its output is the result.
        """
        layer = head(self.model)
        if not isinstance(layer, nn.Linear):
            return None
        weight = layer.weight
        given = torch.linspace(-1, 2, layer.in_features, dtype=weight.dtype, device=weight.device)[None]
        # Over all magnitudes, so that a cap or a cut anywhere shows.
        size = torch.logspace(-3, 4, layer.out_features, device=weight.device)
        sign = 1 - 2 * (torch.arange(layer.out_features, device=weight.device) % 2)
        made = (size * sign).to(weight.dtype)[None, None]
        seen: list[Tensor] = []

        def noted(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return made.clone()

        with torch.no_grad(), override_forward(layer, noted):
            out = self(given)
        untouched = len(seen) == 1 and torch.equal(seen[0].flatten(), given.flatten())
        return layer if untouched and out.shape == made[0].shape and torch.equal(out, made[0]) else None

    def parameters(self) -> list[nn.Parameter]:
        """The head's parameters, tied ones included."""
        return list(head(self.model).parameters())

    @property
    def out_features(self) -> int:
        """Number of logits of a row, padding of the vocabulary included."""
        features = getattr(head(self.model), "out_features", None)
        return features if isinstance(features, int) else int(self.parameters()[0].shape[0])


def linear_head(model: PreTrainedModel, why: str) -> nn.Linear:
    """The linear layer that the model's projection to the vocabulary is no more than.

    Raises:
        ModelError: it is more than that; `why` says who asks and what to do.
    """
    found = Projection(model).linear
    if found is None or type(found.weight) is not nn.Parameter:
        raise ModelError(f"the head of {type(model).__name__} is more than one linear layer of plain weights; {why}.")
    return found


def same_frozen_tower(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Whether both models have one vision tower: the same class, config and weights, frozen, and with no dropout to draw."""
    ours, theirs = tower(student), tower(teacher)
    if is_quantized(student) or is_quantized(teacher):
        # Quantised weights are of types of their own, which do not compare.
        return False
    if ours is None or theirs is None or type(ours) is not type(theirs):
        return False
    if any(parameter.requires_grad for parameter in ours.parameters()) or draws(ours):
        return False
    mine, its = ours.state_dict(), theirs.state_dict()
    return settings(ours) == settings(theirs) and (
        mine.keys() == its.keys() and all(same(mine[name], its[name]) for name in mine)
    )


def settings(module: nn.Module) -> dict[str, Any]:
    """What a tower's config says of its computation."""
    config: Any = getattr(module, "config", None)
    told = {} if config is None else config.to_dict()
    return {
        name: value
        for name, value in told.items()
        if not name.startswith("_") and name not in {"dtype", "torch_dtype", "transformers_version"}
    }


def draws(module: nn.Module) -> bool:
    """Whether the module has dropout, so that two passes differ."""
    told = settings(module)
    return any(told.get(name) for name in told if "dropout" in name or "drop_path" in name) or any(
        isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules()
    )


def same(one: Any, other: Any) -> bool:
    """Whether two arguments or weights are equal in everything: tensors by device, type and value."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.device == other.device and one.dtype == other.dtype and one.shape == other.shape
        return alike and bool(torch.equal(one, other))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)


@contextmanager
def tower_once(student: PreTrainedModel, teacher: PreTrainedModel | None) -> Iterator[None]:
    """Inside the block the two models' towers, which `same_frozen_tower` found to be one, compute each input once."""
    towers = [part for model in (student, teacher) if model is not None and (part := tower(model)) is not None]
    if len(towers) < 2:
        yield
        return
    forward = towers[0].forward
    kept: list[tuple[Any, Any]] = []

    def remembered(*arguments: Any, **options: Any) -> Any:
        for given, out in kept:
            if same(given, (arguments, options)):
                # A shallow copy, since models put their own projected features into the output.
                return copy.copy(out)
        out = forward(*arguments, **options)
        kept.append(((arguments, options), copy.copy(out)))
        return out

    with override_forward(towers[0], remembered), override_forward(towers[1], remembered):
        yield
