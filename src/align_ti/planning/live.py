"""Bytes that are alive during a piece of work, by the phase that made them: exact, whatever the allocator or other processes do."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align_ti.errors import ConfigError
from align_ti.flops import flops_of
from align_ti.phases import OTHER, Stopwatch

aten = torch.ops.aten
GRADIENTS = "gradients"
"""What gradients of parameters are counted under."""

INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
"""Operations whose result, or need of memory, depends on the values of a mask."""


class Place(Stopwatch):
    """A stopwatch that is asked for the phase that is open, not for its time."""

    @property
    def now(self) -> str:
        """The innermost open phase."""
        return self._open[-1] if self._open else OTHER


class Live(TorchDispatchMode):
    """Counts the storages that operations inside the block make, until they are freed.

    `peak` is what was alive by phase when most was; `peak_apart` when most was beside the gradients of parameters; `flops` is the work
    of each phase. Memory inside a
    kernel, and what an allocator rounds up or leaves between blocks, is not seen. Tensors without memory (fake ones) count as if they
    had it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = Place()
        self.by_phase: Counter[str] = Counter()
        self.total = 0
        self.flops: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_apart: Counter[str] = Counter()
        self._most = self._most_apart = -1
        self._known: dict[int, tuple[Any, list[str]]] = {}

    @contextmanager
    def counting(self, parameters: Iterable[nn.Parameter] = ()) -> Iterator[Live]:
        """Inside the block everything counts; gradients of these parameters count apart."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._has_gradient)
            for parameter in parameters
            if parameter.requires_grad
        ]
        try:
            with self.place.running(), self:
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops[self.place.now] += flops_of(func, args, kwargs or {}, out)
        # Views, and what is written in place, are memory of before.
        if all(returned.alias_info is None for returned in func._schema.returns):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known or not size:
            return
        # A list, since a storage may turn out to be a gradient.
        phase = [self.place.now]

        def freed(_: Any) -> None:
            self.by_phase[phase[0]] -= size
            self.total -= size
            del self._known[key]

        self._known[key] = (weakref.ref(storage, freed), phase)
        self.by_phase[phase[0]] += size
        self.total += size
        self._note()

    def _has_gradient(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if id(storage) in self._known:
            phase = self._known[id(storage)][1]
            self.by_phase[phase[0]] -= storage.nbytes()
            phase[0] = GRADIENTS
            self.by_phase[GRADIENTS] += storage.nbytes()

    def _note(self) -> None:
        if self.total > self._most:
            self._most, self.peak = self.total, Counter(self.by_phase)
        apart = self.total - self.by_phase[GRADIENTS]
        if apart > self._most_apart:
            self._most_apart, self.peak_apart = apart, Counter(self.by_phase)


class Pretended(Live):
    """The same for work on weights that are not there: tokens, roles and masks are real, everything computed from weights is not.

    Masks are turned into indices while their values are known, and a test of computed values for being finite passes.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in INDEXING:
            args = (args[0], [place for index in args[1] for place in as_indices(index)], *args[2:])
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].dtype != torch.bool:
                raise ConfigError(
                    "a term or model branches on a value computed from weights, which a plan does not have; leave the term out "
                    "of the plan (--set objective.NAME.weight=0); sft, kd, iva and tpa are accepted."
                )
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)


def as_indices(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A mask as the indices of its true places, one tensor for each of its axes; anything else as it is."""
    if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
        return index.nonzero().unbind(1)
    return (index,)
