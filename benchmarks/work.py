"""The work of a step, counted instead of timed: FLOPs of matrix products, bytes read and written, and number of operations.

    python -m benchmarks.work --out results/work.json

Counts do not depend on what else the machine does. Beside them stand its ceilings, measured in the same run: float32 products and a
stream through memory. Their quotients are the floor that a step's time can be held against. Conventions: an attention kernel counts its
whole rectangle, causal or not; every operation reads its inputs from memory and writes its outputs there, caches left aside; operations
that gather rows read what they give.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from align_ti.cli import quiet
from align_ti.flops import FORMULAS
from align_ti.runs import write_json
from benchmarks.rounds import check_device, dtype_of, machine, seconds_of
from benchmarks.step import SHAPES, sizes
from benchmarks.variants import VARIANTS, Variant, make_variants

aten = torch.ops.aten
GATHERING = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""Operations that read no more of their first input than they give."""

UNTOUCHING = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
}
"""Operations that touch no memory, although their schema does not say so."""


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What was done: FLOPs of matrix products, bytes that these read and wrote, bytes of all other operations, and operations."""

    flops: int = 0
    product_bytes: int = 0
    other_bytes: int = 0
    operations: int = 0
    bytes_by_operation: Counter[str] = dataclasses.field(default_factory=Counter, compare=False)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.product_bytes + other.product_bytes,
            self.other_bytes + other.other_bytes,
            self.operations + other.operations,
            self.bytes_by_operation + other.bytes_by_operation,
        )

    @property
    def bytes(self) -> int:
        """All bytes read and written."""
        return self.product_bytes + self.other_bytes


class Traffic(TorchDispatchMode):
    """Sums the bytes of tensors that go into and come out of every operation that is more than a view."""

    def __init__(self, products: Iterable[Any]) -> None:
        super().__init__()
        self.products = set(products)
        self.product_bytes = self.other_bytes = self.operations = 0
        self.by_operation: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if is_view(func) or packet in UNTOUCHING:
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if packet in GATHERING:
            given[0] = made[0]
        moved = sum(size(tensor) for tensor in [*given, *made])
        self.operations += 1
        self.by_operation[str(packet)] += moved
        if packet in self.products:
            self.product_bytes += moved
        else:
            self.other_bytes += moved
        return out


def is_view(func: Any) -> bool:
    """Whether an operation only looks at its input in another way."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor; what is repeated without being stored again counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count(call: Callable[[], Any]) -> tuple[Any, Work]:
    """What the call gives, and the work it did."""
    flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with flops, Traffic(flops.flop_registry) as traffic:
        out = call()
    work = Work(
        flops.get_total_flops(), traffic.product_bytes, traffic.other_bytes, traffic.operations, traffic.by_operation
    )
    return out, work


def phases(variant: Variant) -> dict[str, Work]:
    """The work of a step's parts. Our forward holds the head's backward: it takes the gradient of each chunk of rows at once."""
    loss, forward = count(variant.loss)
    _, backward = count(loss.backward)
    optimizer = variant.bench.optimizer
    _, update = count(optimizer.step)
    optimizer.zero_grad(set_to_none=True)
    return {"forward": forward, "backward": backward, "optimizer": update}


def whole(parts: dict[str, Work]) -> Work:
    """The work of the whole step."""
    return sum(parts.values(), Work())


def best_seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """The shortest of several calls, the first left out: a ceiling is what the machine can do."""
    call()
    return min(seconds_of(call) for _ in range(repeats))


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOPs a second of a product of the size of a layer of the teacher, and bytes a second of a copy that no cache holds."""
    rows, inner, columns = (1880, 512, 2304) if device == "cpu" else (8192, 4096, 12_288)
    left, right = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
    source = torch.ones(2**28 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = torch.empty(rows, columns, dtype=dtype, device=device)
    flops = 2 * rows * inner * columns / best_seconds(lambda: torch.mm(left, right, out=product))
    moved = 2 * source.numel() / best_seconds(lambda: target.copy_(source))
    return {"flops_per_second": flops, "bytes_per_second": moved, "rows": rows, "inner": inner, "columns": columns}


def floors(work: Work, ceiling: dict[str, float]) -> dict[str, float]:
    """Seconds below which a step of this work cannot stay on this machine.

    `products` is what the products take at their ceiling, `other_bytes` what all other operations take at the stream's; `sum` has them
    one after the other, as unfused operations run, `overlapped` at the same time.
    """
    products = work.flops / ceiling["flops_per_second"]
    other = work.other_bytes / ceiling["bytes_per_second"]
    floor = {"products": products, "other_bytes": other, "sum": products + other, "overlapped": max(products, other)}
    return {name: round(seconds, 4) for name, seconds in floor.items()}


def described(parts: dict[str, Work], ceiling: dict[str, float], baseline: Work | None) -> dict[str, Any]:
    """One variant's entry of the results."""
    step = whole(parts)
    counts = ("flops", "product_bytes", "other_bytes", "operations")
    entry: dict[str, Any] = {
        name: {of: getattr(work, of) for of in counts} for name, work in {**parts, "step": step}.items()
    }
    entry["most_bytes_by_operation"] = dict(step.bytes_by_operation.most_common(12))
    entry["floor_seconds"] = floors(step, ceiling)
    if baseline is not None:
        entry["against_vanilla_kd"] = {
            of: round(getattr(step, of) / getattr(baseline, of), 4) for of in ("flops", "bytes", "operations")
        }
    return entry


def shown(results: dict[str, Any]) -> Table:
    """The counts of each step and its floor."""
    table = Table(
        "variant",
        "GFLOP",
        "x",
        "GiB",
        "x",
        "operations",
        "floor s",
        title="counted work of a step; x: against vanilla KD",
    )
    for name, entry in results.items():
        step, ratio = entry["step"], entry.get("against_vanilla_kd", {})
        moved = (step["product_bytes"] + step["other_bytes"]) / 2**30
        table.add_row(
            name,
            f"{step['flops'] / 1e9:.1f}",
            f"{ratio.get('flops', '')}",
            f"{moved:.2f}",
            f"{ratio.get('bytes', '')}",
            str(step["operations"]),
            f"{entry['floor_seconds']['sum']:.3f}",
        )
    return table


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    countable = tuple(name for name in VARIANTS if not name.endswith("compiled"))
    parser.add_argument("--variants", nargs="+", choices=countable, default=list(countable), metavar="NAME")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    quiet()
    check_device(chosen.device)
    start = machine(chosen.device)
    dtype = dtype_of(chosen.device)
    ceiling = ceilings(chosen.device, dtype)
    made = make_variants(tuple(chosen.variants), SHAPES[chosen.shape], chosen.device, dtype)
    works = {variant.name: phases(variant) for variant in made}
    baseline = whole(works["vanilla_kd"]) if "vanilla_kd" in works else None
    results = {name: described(parts, ceiling, baseline) for name, parts in works.items()}
    content = {
        "variants": results,
        "ceilings": ceiling,
        **sizes(SHAPES[chosen.shape], {variant.name: variant for variant in made}),
        "dtype": str(dtype).removeprefix("torch."),
        "not_measured": [
            "compiled and fused kernels: operations are counted as eager PyTorch dispatches them",
            "what caches save, and how far each single operation is from its ceiling",
            *(["an accelerator"] if chosen.device == "cpu" else []),
        ],
        **start,
    }
    write_json(chosen.out, content)
    Console(width=110).print(shown(results))


if __name__ == "__main__":
    main()
