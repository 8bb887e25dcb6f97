"""FLOPs of matrix products, convolutions and attention, from shapes; attention counts its whole rectangle, causal or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def attention_flops(query: Any, key: Any, value: Any, *_rest: Any, out_val: Any = None, **_options: Any) -> int:
    """FLOPs of the processor's fused attention, which PyTorch's counter has no formula for."""
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_rest: Any, out_val: Any = None, **_options: Any
) -> int:
    """FLOPs of its backward, which computes the scores again."""
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def product_flops(_total: Any, left: Any, right: Any, **_options: Any) -> int:
    """FLOPs of a product that is added to a sum in place, from shapes; the counter knows the form that makes a new tensor alone."""
    return int(2 * left[0] * left[1] * right[1])


# The counter hands tensors, not shapes, to formulas that ask for it.
attention_flops._get_raw = attention_backward_flops._get_raw = True  # type: ignore[attr-defined]
FORMULAS: dict[Any, Callable[..., int]] = {
    aten.addmm_: product_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
"""What PyTorch's counter is to know beside its own formulas."""


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of an operation; 0 of one that is no product."""
    packet = func.overloadpacket
    if packet in FORMULAS:
        ours = FORMULAS[packet]
        return (
            ours(*args, **kwargs) if hasattr(ours, "_get_raw") else ours(*(getattr(one, "shape", one) for one in args))
        )
    formula: Callable[..., Any] | None = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


class FlopCount(TorchDispatchMode):
    """Adds up the FLOPs of PyTorch's own operations inside the block, backward passes included; the operations stay as they are.

    What PyTorch has no formula for is not seen: kernels of other packages, and what a compiler has made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        """FLOPs of all blocks so far."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs or {}, out)
        return out
