"""Models whose weights lie in parts on several processes: parts of a model run as calls of its modules, and a teacher that is sharded.

FSDP 2 and DeepSpeed ZeRO-3 gather a module's weights in hooks around its call, and learn of its gradients there too. The loss uses
backbone and head by themselves, so it runs as a call of the whole model, and its rows as a call of the head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from align_ti.errors import ModelError
from align_ti.models.placement import is_quantized, stays

Result = TypeVar("Result")


def run_in_forward(wrapper: nn.Module, module: nn.Module, function: Callable[..., Result], *given: Any) -> Result:
    """The function's result, as that of one call of the wrapper, whose forward pass ends in the module's.

    Hooks and wrappers around the module see one pass with these arguments and this result; inside the function the module's forward is
    its own again. Tensors with gradient that the hooks are to know of have to be in the result, in tuples, lists or dictionaries.
    """
    kept = module.__dict__.get("forward")

    def redirected(*arguments: Any, **_: Any) -> Result:
        restore()
        return function(*arguments)

    def restore() -> None:
        if kept is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = kept

    module.__dict__["forward"] = redirected
    try:
        # Without any argument, data parallelism on GPUs would not pass the call on.
        result: Result = wrapper(*given) if given else wrapper(redirected=True)
        return result
    finally:
        restore()


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of the model lie in parts on several processes (FSDP 2, ZeRO-3)."""
    return any(isinstance(part, FSDPModule) for part in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def run_gathered(model: nn.Module | None, function: Callable[[], Result]) -> Result:
    """The function's result, run as one call of a model that may be sharded, whose gradient nobody asks for in this call.

    The hooks see no result, since nothing is to be gathered for a backward pass.
    """
    if model is None or not is_sharded(model):
        return function()
    results: list[Result] = []

    def run() -> tuple[()]:
        results.append(function())
        return ()

    run_in_forward(model, model, run)
    return results[0]


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Spreads a frozen model's weights over all processes, by FSDP 2: each layer is gathered when it is called, and let go.

    Whatever trains the student goes on as it does: the teacher has neither gradients nor optimizer state.

    Raises:
        ModelError: quantised weights or a place of its own, which cannot be sharded, or no names of the model's layers.
    """
    if is_quantized(model) or stays(model):
        raise ModelError(
            "teacher.sharded is true, but the teacher is quantised or has a place of its own; weights on the student's device in a "
            "floating type are accepted; leave out one of the two."
        )
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"teacher.sharded is true, but {type(model).__name__} does not name its layers (_no_split_modules); leave it out: the "
            "teacher is then whole on every process."
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in reversed(layers):  # inner ones first
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def run_part_gathered(part: nn.Module, function: Callable[..., Result], *given: Any) -> Result:
    """The function's result, as that of one call of a part of the model if its weights are gathered for that; else simply called.

    Inside, the part has no hooks: its weights are there already, and however often the function uses them, no other process has to.
    """
    if not is_sharded(part):
        return function(*given)

    def without_hooks(*arguments: Any) -> Result:
        kept = {name: part.__dict__[name] for name in HOOKS}
        part.__dict__.update({name: OrderedDict() for name in HOOKS})
        try:
            return function(*arguments)
        finally:
            part.__dict__.update(kept)

    return run_in_forward(part, part, without_hooks, *given)


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where a module of torch keeps the hooks around its call."""


def nothing_of(*passes: Tensor | None) -> Tensor:
    """0, with a gradient of 0 at what each pass made: backward goes through all of them, whatever of it a process weighs."""
    return torch.stack([made.reshape(-1)[:1].float().sum() * 0 for made in passes if made is not None]).sum()
