"""The tables of the pages (`PAGES`) that quote results, from the files under results/: none is typed by hand.

python -m benchmarks.tables            # writes them into the page
python -m benchmarks.tables --check    # fails if the page says anything else
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align_ti.report.tables import PARTS
from benchmarks.quality import tables as study_tables

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
SCALING = ROOT / "docs" / "scaling.md"
CACHE = ROOT / "docs" / "teacher-cache.md"
QUALITY = ROOT / "docs" / "quality.md"
STUDIES = ROOT / "docs" / "quality-studies.md"
PAGES = (PAGE, README, SCALING, CACHE, QUALITY, STUDIES)
"""The pages that have tables."""

RESULTS = ROOT / "results"

METHODS = ("sft", "kd", "kd_iva", "kd_tpa", "align_ti")
"""The variants that are the paper's methods, where a study has others too."""

HIGHEST = ("kd", "align_ti", "llava_kd", "compodistill")
"""Vanilla KD and the three variants of `menu` with the highest means."""

WORDS = {
    "vanilla_kd": "vanilla KD, common implementation",
    "ours_kd": "our vanilla KD (SFT + KD)",
    "align_ti_1.00": "Align-TI, every candidate with a row",
    "align_ti_0.50": "Align-TI, half of them",
    "align_ti_0.25": "Align-TI, a quarter",
    "align_ti_0.25_two_towers": "a quarter, the tower run for each model",
    "align_ti_0.25_iva_share_0.5": "a quarter, `iva.share: 0.5`",
    "align_ti_0.25_compiled": "a quarter, `torch_compile`",
    "align_ti_0.25_teacher_bfloat16": "a quarter, teacher in bfloat16",
    "released_design": "the released design",
    "released_design_given": "the released design, without its drawing of candidates",
    "align_ti_kd": "ours, KD alone",
    "align_ti_full": "ours, all of Align-TI (more work)",
    "trl_gold": "TRL `GOLDTrainer`",
    "trl_distillation_update": "the update of TRL's `DistillationTrainer`",
}

SIZES = {
    "visual": "visual tokens",
    "response": "response tokens",
    "candidates": "candidates n",
    "vocabulary": "vocabulary",
}


def read(name: str) -> Any:
    """One file of results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where none was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def step_table(name: str = "step.json") -> str:
    """Time and memory of every variant."""
    variants = read(name)["variants"]
    return table(
        ("a step", "seconds", "quartiles", "x vanilla KD", "peak MiB", "x vanilla KD"),
        (
            (
                WORDS[name],
                number(one["seconds"]["median"]),
                f"{one['seconds']['lower']:.2f} - {one['seconds']['upper']:.2f}",
                number(one["against_vanilla_kd"]["time"]["median"]),
                number(one["mib"], 0),
                number(one["against_vanilla_kd"]["memory"]["median"]),
            )
            for name, one in variants.items()
        ),
    )


SHORT = ("vanilla_kd", "ours_kd", "align_ti_0.25", "align_ti_1.00", "released_design")
"""The variants that the README shows."""


def short_table() -> str:
    """Time and memory against vanilla KD of a few variants."""
    variants = read("step.json")["variants"]
    return table(
        ("a training step", "time", "memory"),
        (
            (WORDS[name], *(number(variants[name]["against_vanilla_kd"][of]["median"]) for of in ("time", "memory")))
            for name in SHORT
        ),
    )


def targets_table(name: str = "step.json") -> str:
    """What was aimed at, and what was found."""
    return table(
        ("target", "of", "at most", "found", "met"),
        (
            (
                f"{WORDS[row['variant']]} / {WORDS[row['against']]}",
                row["of"],
                f"{row['accepted']}",
                "-" if row["found"] is None else number(row["found"]["median"], 3),
                {True: "yes", False: "no", None: "not measured"}[row["met"]],
            )
            for row in read(name)["targets"]
        ),
    )


SETTINGS = {
    "step.json": "float32, default memory handling",
    "step-bfloat16.json": "bfloat16, the same",
    "step-kept.json": "float32, freed memory kept for all",
}
"""The runs of the benchmark `step`, and what differs between them."""


def settings_table() -> str:
    """The ratios that targets are about, in each setting."""
    targets = [(row["variant"], row["against"], row["of"]) for row in read("step.json")["targets"]]
    found = {
        name: {(row["variant"], row["against"], row["of"]): row["found"] for row in read(name)["targets"]}
        for name in SETTINGS
    }
    rows = []
    for variant, against, of in targets:
        ratios = [found[name][variant, against, of] for name in SETTINGS]
        numbers = (number(None if ratio is None else ratio["median"]) for ratio in ratios)
        rows.append((f"{WORDS[variant]} / {WORDS[against]}: {of}", *numbers))
    return table(("ratio", *SETTINGS.values()), rows)


def work_table() -> str:
    """Counted work, the floor that follows, and how far the measured step is from it."""
    work, step = read("work.json")["variants"], read("step.json")["variants"]
    return table(
        ("a step", "GFLOP", "x vanilla KD", "GB moved beside products", "floor, s", "measured, s", "measured / floor"),
        (
            (
                WORDS[name],
                number(one["step"]["flops"] / 1e9, 0),
                number(one.get("against_vanilla_kd", {}).get("flops")),
                number(one["step"]["other_bytes"] / 1e9, 1),
                number(one["floor_seconds"]["sum"]),
                number(step[name]["seconds"]["median"] if name in step else None),
                number(step[name]["seconds"]["median"] / one["floor_seconds"]["sum"] if name in step else None),
            )
            for name, one in work.items()
        ),
    )


def phases_table(case: str) -> str:
    """Where a step's time goes, by phase and method."""
    told = read("phases.json")["cases"][case]
    names = list(dict.fromkeys(name for one in told.values() for name in one["phases"]))
    rows = [
        (
            name,
            *(
                number(1000 * one["phases"][name]["mean_seconds"], 1) if name in one["phases"] else ""
                for one in told.values()
            ),
        )
        for name in names
    ]
    whole = ("the step", *(number(1000 * one["step"]["mean_seconds"], 1) for one in told.values()))
    return table(("ms a step (mean)", *told), [*rows, whole])


def peers_table() -> str:
    """Ours against TRL's trainers: the same work, rounds in turn."""
    rows = []
    for pair, content in read("peers.json")["pairs"].items():
        for name, one in content["runs"].items():
            ratios = [one.get(f"our_{of}_over_theirs") for of in ("speed", "processor_time", "memory")]
            rows.append(
                (
                    f"{pair}: {WORDS.get(name, name)}",
                    number(one["samples_per_second"]["median"]),
                    number(one["peak_memory_mib"]["median"], 0),
                    *(number(ratio["median"] if ratio else None) for ratio in ratios),
                )
            )
    return table(
        ("pair: trainer", "samples/s", "peak MiB", "our speed / its", "our CPU time / its", "our memory / its"), rows
    )


def scaling_table() -> str:
    """How time and memory grow along each axis."""
    rows = []
    for name, axis in read("scaling.json")["axes"].items():
        points = [size for size, point in axis["points"].items() if "seconds" in point["align_ti"]]
        fits = axis["growth"]["align_ti"]
        first, last = (axis["points"][size]["align_ti"] for size in (points[0], points[-1]))
        rows.append(
            (
                f"{SIZES.get(name, name)} {points[0]} - {points[-1]}",
                f"{first['seconds']['median']:.2f} - {last['seconds']['median']:.2f}",
                f"{first['mib']:.0f} - {last['mib']:.0f}",
                number(fits.get("seconds", {}).get("exponent")),
                number(fits.get("mib", {}).get("exponent")),
                number(fits.get("seconds", {}).get("r2"), 3),
            )
        )
    return table(("axis", "seconds", "MiB", "growth of time", "growth of memory", "R2 of a straight line"), rows)


def variance_table() -> str:
    """The variance of the TPA estimators at the rows that plain draws of 4 cost."""
    steps = read("variance.json")["steps"]
    names = list(dict.fromkeys(name for one in steps.values() for name in one["variance_at_equal_rows"]))
    rows = (
        (
            step,
            number(one["estimators"]["with_replacement"]["4"]["rows"]),
            *(number(one["variance_at_equal_rows"].get(name)) for name in names),
        )
        for step, one in steps.items()
    )
    return table(("training step", "rows a position", *names), rows)


def levers_table() -> str:
    """Each single lever with and without."""
    found = read("levers.json")
    groups = [
        ("KL and its gradient, 1,024 rows", found["divergence"]),
        ("the row loss of 2,048 rows, chunks of", found["chunk"]),
    ]
    groups += [(f"attention of {count} candidates a sample", ways) for count, ways in found["attention"].items()]
    rows = [
        (f"{label}: {way}", number(1000 * one["median"], 0), f"{1000 * one['lower']:.0f} - {1000 * one['upper']:.0f}")
        for label, ways in groups
        for way, one in ways.items()
    ]
    return table(("optimisation", "ms", "quartiles"), rows)


def packing_table() -> str:
    """Rows of candidates."""
    return table(
        ("both second passes", "slots that are padding", "ms", "quartiles"),
        (
            (
                f"{case}: {way}",
                f"{100 * one['padded_share']:.0f} %",
                number(1000 * one["median"], 0),
                f"{1000 * one['lower']:.0f} - {1000 * one['upper']:.0f}",
            )
            for case, ways in read("levers.json")["packing"].items()
            for way, one in ways.items()
        ),
    )


def opened_table() -> str:
    """The step's ratios before and after the objective was opened, beside those of the first table."""
    runs = [
        read("step.json")["variants"],
        *(read("step-objective.json")[when]["variants"] for when in ("before", "after")),
    ]
    rows = (
        (f"{WORDS[name]}: {of}", *(number(run[name]["against_vanilla_kd"][of]["median"]) for run in runs))
        for name in SHORT[1:]
        for of in ("time", "memory")
    )
    return table(("x vanilla KD", "the table above", "before, other machine", "after, other machine"), rows)


def share_table() -> str:
    """The share of plain draws that needs a row, along the digits training."""
    steps = read("variance.json")["steps"]
    rows = (number(one["estimators"]["with_replacement"]["4"]["rows"] / 4) for one in steps.values())
    return table(("training step", *steps), [("share", *rows)])


def demo_table() -> str:
    """What the demo spends, and on what."""
    spent = read("demo.json")["spent_seconds"]
    return table(
        ("part of `make demo`", "seconds"),
        ((PARTS.get(name, name), number(seconds, 1)) for name, seconds in spent.items()),
    )


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.0f} %"


ENGINES = ("ddp", "fsdp2")
"""The engines whose growth is simulated."""


def plan_growth_table() -> str:
    """Simulated seconds of a step by devices."""
    growth = read("plan-scaling.json")["growth"]
    columns = [(name, engine) for name in growth for engine in ENGINES]
    counts = [one["devices"] for one in growth["0.5B"]["ddp"]]
    return table(
        ("devices", *(f"{name}, {engine}" for name, engine in columns)),
        (
            (f"{count:,}", *(number(growth[name][engine][place]["seconds"], 3) for name, engine in columns))
            for place, count in enumerate(counts)
        ),
    )


SHOWN = (1, 8, 16, 128, 1024)
"""Numbers of devices whose steps are told by part."""


def plan_row(title: str, one: dict[str, Any]) -> tuple[str, ...]:
    """A simulated step by part, with what it sends and takes."""
    shares = one["shares"]
    return (
        title,
        number(one["seconds"], 3),
        *(percent(shares[part]) for part in ("teacher", "student", "exchange", "waiting")),
        f"{one['records_per_second']:,.0f}",
        number(one["sent_gb"]),
        number(one["memory_gb"], 1),
    )


PLAN_HEAD = ("s", "teacher", "student", "exchange", "waiting", "records/s", "GB sent", "GB held")


def plan_shares_table() -> str:
    """Simulated steps by part."""
    growth = read("plan-scaling.json")["growth"]
    rows = [
        plan_row(f"{name}, {engine}, {one['devices']:,}", one)
        for name, engines in growth.items()
        for engine, steps in engines.items()
        for one in steps
        if one["devices"] in SHOWN and (one["devices"] > 1 or engine == "ddp")
    ]
    return table(("student, engine, devices", *PLAN_HEAD), rows)


def plan_remedies_table() -> str:
    """Simulated steps on 1,024 devices with one thing changed."""
    remedies = read("plan-scaling.json")["remedies"]
    rows = [plan_row(f"{name}: {what}", one) for name, ways in remedies.items() for what, one in ways.items()]
    return table(("1,024 devices", *PLAN_HEAD), rows)


def plan_work_table() -> str:
    """Counted work of a micro-batch."""
    work = read("plan-scaling.json")["tflop_of_a_micro_batch"]
    phases = [phase for phase in next(iter(work.values())) if phase != "capture"]
    return table(("TFLOP", *work), ((phase, *(number(one[phase], 1) for one in work.values())) for phase in phases))


def topk_table() -> str:
    """Bias and error of the gradient by k, with what is left as one token."""
    found = read("topk.json")["students"]
    names = {"start": "start", "kd": "after SFT + KD", "align_ti": "after Align-TI"}
    head = ["k", *(f"{kind}, {words}" for kind in ("response", "visual") for words in names.values())]
    rows = []
    for count in ("1", "4", "8", "16", "32", "64"):
        cells = [found[name][kind]["ways"]["rest"][count] for kind in ("response", "visual") for name in names]
        rows.append((count, *(f"{one['bias_per_cent']:.2f} % / {one['gradient_error']:.4f}" for one in cells)))
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "step": step_table,
    "short": short_table,
    "targets": targets_table,
    "settings": settings_table,
    "work": work_table,
    "phases-demo": lambda: phases_table("demo"),
    "phases-cpu": lambda: phases_table("cpu"),
    "peers": peers_table,
    "scaling": scaling_table,
    "variance": variance_table,
    "share": share_table,
    "levers": levers_table,
    "packing": packing_table,
    "demo": demo_table,
    "opened": opened_table,
    "plan-growth": plan_growth_table,
    "plan-shares": plan_shares_table,
    "plan-remedies": plan_remedies_table,
    "plan-work": plan_work_table,
    "topk": topk_table,
    "summary": partial(study_tables.summary, study_tables.shown()),
    "ablation-variants": partial(study_tables.variants, "ablation", gap=True),
    "ablation-differences": partial(study_tables.differences, "ablation"),
    "ablation-kinds": partial(study_tables.metrics, "ablation", "exact match"),
    "ablation-fidelity": partial(study_tables.metrics, "ablation", "fidelity"),
    "ablation-times": partial(study_tables.times, "ablation"),
    "muon-variants": partial(study_tables.variants, "muon", gap=True),
    "muon-methods": partial(study_tables.variants, "muon", METHODS, seconds=True, gap=True),
    "muon-differences": partial(study_tables.differences, "muon"),
    "muon-kinds": partial(study_tables.metrics, "muon", "exact match", METHODS),
    "muon-times": partial(study_tables.times, "muon"),
    "equal-time-variants": partial(study_tables.variants, "equal-time", seconds=True),
    "equal-time-differences": partial(study_tables.differences, "equal-time"),
    "equal-time-few-variants": partial(study_tables.variants, "equal-time-few", seconds=True),
    "equal-time-few-differences": partial(study_tables.differences, "equal-time-few"),
    "demo-variants": partial(study_tables.variants, "demo"),
    "demo-differences": partial(study_tables.differences, "demo"),
    "images-variants": partial(study_tables.variants, "images"),
    "images-differences": partial(study_tables.differences, "images"),
    "large-variants": partial(study_tables.variants, "large", seconds=True, gap=True),
    "large-differences": partial(study_tables.differences, "large"),
    "reviewers-variants": partial(study_tables.variants, "reviewers"),
    "reviewers-differences": partial(study_tables.differences, "reviewers"),
    "layers-variants": partial(study_tables.variants, "layers"),
    "layers-differences": partial(study_tables.differences, "layers"),
    "schedules-variants": partial(study_tables.variants, "schedules", gap=True),
    "schedules-differences": partial(study_tables.differences, "schedules"),
    "menu-variants": partial(study_tables.variants, "menu", seconds=True),
    "menu-differences": partial(study_tables.differences, "menu"),
    "menu-kinds": partial(study_tables.metrics, "menu", "exact match", HIGHEST),
    "labels-variants": partial(study_tables.variants, "labels"),
    "labels-differences": partial(study_tables.differences, "labels"),
    "few-long-variants": partial(study_tables.variants, "few-long", gap=True),
    "few-long-differences": partial(study_tables.differences, "few-long"),
    "few-long-kinds": partial(study_tables.metrics, "few-long", "exact match"),
    "few-long-times": partial(study_tables.times, "few-long"),
    "long-variants": partial(study_tables.variants, "long", gap=True),
    "long-differences": partial(study_tables.differences, "long"),
    "long-kinds": partial(study_tables.metrics, "long", "exact match"),
    "long-times": partial(study_tables.times, "long"),
    "muon-long-variants": partial(study_tables.variants, "muon-long", gap=True),
    "muon-long-differences": partial(study_tables.differences, "muon-long"),
    "muon-long-kinds": partial(study_tables.metrics, "muon-long", "exact match", METHODS[:2] + METHODS[-1:]),
    "muon-long-times": partial(study_tables.times, "muon-long"),
    "budget-variants": partial(study_tables.variants, "budget"),
    "budget-differences": partial(study_tables.differences, "budget"),
}


def filled(page: str) -> str:
    """The page with every table as the results have it."""

    def made(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([a-z-]+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        wanted = filled(page)
        if not chosen.check:
            path.write_text(wanted, encoding="utf-8")
        elif wanted != page:
            raise SystemExit(f"{path.name} is not what results/ says; run `python -m benchmarks.tables`.")


if __name__ == "__main__":
    main()
