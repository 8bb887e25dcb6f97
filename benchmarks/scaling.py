"""How time and memory of a step grow with visual tokens, response length, candidates, vocabulary and batch.

    python -m benchmarks.scaling --out results/scaling.json

One axis at a time, from the processor's shape with one sample a batch; candidates needing a row: a quarter of 4, but all of them along
the axis of n. Vanilla KD stands beside ours wherever an estimate says that it fits. A figure of the curves lies beside the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from align_ti.cli import quiet
from align_ti.report.drawing import COLOURS, STYLE
from align_ti.runs import write_json
from benchmarks.rounds import check_device, dtype_of, machine, mib_of, seconds_by_round, summary
from benchmarks.shapes import CPU, Shape
from benchmarks.variants import Bench, Variant, align_ti, make_bench, make_variant

BASE = dataclasses.replace(CPU, batch=1)
SHARE, COUNT = 0.25, 4
LIMIT_GIB = 12.0
"""Memory that a point may take unless told otherwise; a larger one is left out rather than killed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """Where a point is measured, how often, and how much memory it may take."""

    device: str = "cpu"
    rounds: int = 3
    limit_gib: float = LIMIT_GIB


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One shape with the candidates of a position and the share of them that need a row."""

    shape: Shape = BASE
    count: int = COUNT
    share: float = SHARE


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """What varies: the points by their size, and how far linear growth can be expected of the method."""

    label: str
    points: dict[int, Point]
    expected: str


def shapes_of(field: str, values: Sequence[int]) -> dict[int, Point]:
    """Points of the base shape with one of its fields varied."""
    return {value: Point(dataclasses.replace(BASE, **{field: value})) for value in values}


AXES = {
    "visual": Axis(
        "visual tokens",
        {point.shape.visual: point for point in shapes_of("side", (14, 20, 27, 38, 54)).values()},
        "linear, and quadratic in the attention of tower and decoders",
    ),
    "response": Axis(
        "response tokens",
        shapes_of("response", (32, 150, 300, 600, 1024)),
        "linear, and quadratic in the attention of the decoders",
    ),
    "candidates": Axis(
        "candidates a position (n), each with a row",
        {count: Point(count=count, share=1.0) for count in (1, 2, 4, 8, 16)},
        "linear above the cost of the gold pass",
    ),
    "vocabulary": Axis("vocabulary", shapes_of("vocabulary", (32_000, 64_000, 128_000, 256_000)), "linear"),
    "batch": Axis("samples a batch", shapes_of("batch", (1, 2, 4, 8)), "linear"),
}


def estimated_gib(name: str, point: Point) -> float:
    """About what a step takes at its peak, weights and optimizer included, in GiB: to be safe, not to be exact."""
    shape = point.shape
    weights = shape.vocabulary * (shape.student.hidden * 5 + shape.teacher.hidden) + 2**27
    tokens = shape.batch * (shape.visual + shape.instruction + shape.response + 1)
    rows = point.share * point.count * shape.batch * shape.response
    # The logits of both models, the student's log-probabilities, their gradient and two copies on the way.
    logits = 6 * tokens * shape.vocabulary if name == "vanilla_kd" else 4 * 2**23
    activations = (tokens + rows) * shape.student.layers * (8 * shape.student.hidden + 4 * shape.student.intermediate)
    masks = (0 if name == "vanilla_kd" else rows / shape.batch) * (tokens + rows) * 2
    return 4 * (weights + logits + activations + masks) / 2**30


def variants_of(point: Point, setting: Setting) -> Iterator[tuple[str, Variant | None]]:
    """Both ways of a step at a point; None where it would not fit."""
    bench: Bench | None = None
    for name in ("align_ti", "vanilla_kd"):
        if estimated_gib(name, point) > setting.limit_gib:
            yield name, None
            continue
        bench = bench or make_bench(point.shape, setting.device, dtype_of(setting.device))
        yield name, align_ti(bench, point.share, point.count) if name == "align_ti" else make_variant(name, bench)


def measured(point: Point, setting: Setting) -> dict[str, Any]:
    """Seconds and memory of both ways at a point."""
    variants = dict(variants_of(point, setting))
    works = {name: variant.step for name, variant in variants.items() if variant is not None}
    for work in works.values():
        work()
    mib = {name: mib_of(work) for name, work in works.items()}
    seconds = seconds_by_round(works, dict.fromkeys(works, setting.rounds))
    result: dict[str, Any] = {}
    for name in variants:
        if name in works:
            result[name] = {"seconds": summary(seconds[name]), "seconds_by_round": seconds[name], "mib": mib[name]}
        else:
            gib = round(estimated_gib(name, point), 1)
            result[name] = {"left_out": f"about {gib} GiB, more than the {setting.limit_gib} GiB that a point may take"}
    return result


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of size that the values grow with, over the upper half of the sizes: 1 is linear."""
    start = len(sizes) // 2
    # Three points at least, where there are that many: a slope through two of them is their noise.
    start = max(0, min(start, len(sizes) - 3))
    slope, _ = statistics.linear_regression([math.log(x) for x in sizes[start:]], [math.log(y) for y in values[start:]])
    return slope


def straight(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """The line a + b * size through all values, and the share of their variance that it explains (R2)."""
    slope, intercept = statistics.linear_regression(sizes, values)
    mean = statistics.fmean(values)
    total = sum((value - mean) ** 2 for value in values)
    left = sum((value - intercept - slope * size) ** 2 for size, value in zip(sizes, values, strict=True))
    return {"a": intercept, "b": slope, "r2": 1.0 if total == 0 else 1 - left / total}


def growth(points: dict[str, Any], name: str) -> dict[str, Any]:
    """How time and memory of one way grow along an axis; empty with fewer than three points."""
    there = {int(size): point[name] for size, point in points.items() if "seconds" in point[name]}
    series = {
        "seconds": {size: found["seconds"]["median"] for size, found in there.items()},
        "mib": {size: found["mib"] for size, found in there.items() if found["mib"]},
    }
    fits = {}
    for of, values in series.items():
        if len(values) >= 3:
            sizes, found = list(values), list(values.values())
            line = {key: float(f"{value:.5g}") for key, value in straight(sizes, found).items()}
            fits[of] = {"exponent": round(exponent(sizes, found), 3), **line}
    return fits


def drawn(results: dict[str, Any]) -> Figure:
    """Small multiples, one column an axis: time above, memory below; ours and vanilla KD."""
    looks = {
        "align_ti": ("Align-TI", COLOURS["align_ti"], "o"),
        "vanilla_kd": ("vanilla KD, full logits", COLOURS["kd"], "s"),
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(results), 5.6), layout="constrained")
        grid = figure.subplots(2, len(results), squeeze=False, sharex="col")
        for column, (axis, result) in enumerate(results.items()):
            for name, (label, colour, marker) in looks.items():
                there = {int(size): point[name] for size, point in result["points"].items() if "seconds" in point[name]}
                seconds = [found["seconds"]["median"] for found in there.values()]
                mib = [math.nan if found["mib"] is None else found["mib"] for found in there.values()]
                grid[0][column].plot(list(there), seconds, color=colour, marker=marker, label=label)
                grid[1][column].plot(list(there), mib, color=colour, marker=marker, linestyle="--", label=label)
            for row in range(2):
                grid[row][column].set_ylim(bottom=0)
                grid[row][column].set_xlim(left=0)
            grid[1][column].set_xlabel(AXES[axis].label.partition(",")[0])
        grid[0][0].set_ylabel("seconds a step")
        grid[1][0].set_ylabel("peak MiB above models")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def along(axis: Axis, setting: Setting, known: dict[Point, Any]) -> dict[str, Any]:
    """The points of an axis, of which those measured for another one are taken over, and their growth."""
    points = {}
    for size, point in axis.points.items():
        if point not in known:
            known[point] = measured(point, setting)
            # Models of the last point are gone before those of the next are made.
            gc.collect()
        points[str(size)] = known[point]
        found = {name: result.get("seconds", {}).get("median") for name, result in known[point].items()}
        print(axis.label, size, found, flush=True)
    return {
        "label": axis.label,
        "expected": axis.expected,
        "points": points,
        "growth": {name: growth(points, name) for name in ("align_ti", "vanilla_kd")},
    }


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--axes",
        nargs="+",
        choices=tuple(AXES),
        default=list(AXES),
        metavar="AXIS",
        help="others are kept as the file has them",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="on an accelerator models are in bfloat16"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-gib", type=float, default=LIMIT_GIB)
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    quiet()
    check_device(chosen.device)
    start = machine(chosen.device)
    setting = Setting(chosen.device, chosen.rounds, chosen.limit_gib)
    known: dict[Point, Any] = {}
    kept = json.loads(chosen.out.read_text(encoding="utf-8"))["axes"] if chosen.out.exists() else {}
    found = kept | {
        name: {**along(AXES[name], setting, known), **start, "rounds": chosen.rounds} for name in chosen.axes
    }
    results = {name: found[name] for name in AXES if name in found}
    content = {
        "axes": results,
        "base": {**dataclasses.asdict(BASE), "visual": BASE.visual, "share": SHARE, "candidates": COUNT},
        "dtype": str(dtype_of(chosen.device)).removeprefix("torch."),
        "limit_gib": chosen.limit_gib,
        "not_measured": [
            *(["an accelerator"] if chosen.device == "cpu" else []),
            "real sizes of models",
            "two sizes varied at once",
            "several images a sample, padding",
            "the data loader",
        ],
        **start,
    }
    write_json(chosen.out, content)
    drawn(results).savefig(chosen.out.with_suffix(".png"), dpi=120, metadata={"Software": None})
    for name, result in results.items():
        print(name, {way: {of: fit["exponent"] for of, fit in fits.items()} for way, fits in result["growth"].items()})


if __name__ == "__main__":
    main()
