"""Runs models for a measurement and leaves no trace of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserved(*models: nn.Module) -> Iterator[None]:
    """Inside the block models may be run in any mode and take gradients; after it they and all random states are as before.

    Kept and put back: each module's train or eval mode, gradients, buffers, attention implementation, and the random states of
    Python, numpy and torch. Weights are not copied: no measurement writes them.
    """
    kept = [_Kept(model) for model in models]
    python, array = random.getstate(), np.random.get_state()
    devices = sorted({tensor.device.index for one in kept for tensor in one.grads if tensor.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        for one in kept:
            one.restore()
        if devices:
            torch.cuda.empty_cache()


class _Kept:
    """What a measurement may change in a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = {module: module.training for module in model.modules()}
        self.grads: dict[Tensor, Tensor | None] = {parameter: parameter.grad for parameter in model.parameters()}
        self.buffers = {buffer: buffer.clone() for buffer in model.buffers()}
        configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self.attention = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
        for parameter in self.grads:
            parameter.grad = None

    def restore(self) -> None:
        for module, mode in self.modes.items():
            module.training = mode
        for parameter, gradient in self.grads.items():
            parameter.grad = gradient
        for buffer, before in self.buffers.items():
            buffer.copy_(before)
        for config, implementation in self.attention:
            if implementation is not None:
                config._attn_implementation = implementation
