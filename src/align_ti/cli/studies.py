"""The verb that compares variants of a recipe over seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from align_ti.cli.arguments import AllowExtensions, Changes
from align_ti.cli.terminal import bars, console, quiet
from align_ti.errors import ConfigError
from align_ti.report.progress import duration

if TYPE_CHECKING:
    from align_ti.studies.design import Study
    from align_ti.studies.planned import Planned


def study(
    file: Annotated[Path, typer.Argument(help="A study file (.yaml): base, variants, seeds.", metavar="STUDY")],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Measure the cost of a step (after cost_after training steps), print runs, time and disk; do nothing else.",
        ),
    ] = False,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Run part I of N, each on its own machine in a shared folder.")
    ] = "1/1",
    retry: Annotated[bool, typer.Option("--retry", help="Go on with failed runs.")] = False,
    changes: Changes = None,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Train variants of a recipe with several seeds at equal compute, and report their differences with intervals.

    Finished runs are not repeated, so the same command resumes after a stop; started twice, the processes divide the runs between
    them. Writes study.json and study.html into the study's folder.

    A study file:

        out: runs/studies/kd
        base: digits                  # a recipe, or the name of a shipped one
        seeds: [0, 1, 2, 3, 4]
        equal: steps                  # or time, flops, nothing
        variants:
          kd: {objective.iva.weight: 0, objective.tpa.weight: 0}
          align_ti: {}
    """
    part = shard_of(shard)
    quiet()
    from align_ti.studies.design import read_study
    from align_ti.studies.planned import planned
    from align_ti.studies.running import Shard, run_study

    checked = read_study(file, changes or [], allow_extensions=allow_extensions)
    announce_costs(checked)
    if dry_run:
        with bars() as advance:
            plan = planned(checked, advance)
        show_plan(checked, plan)
        return
    with bars() as advance:
        content = run_study(checked, shard=Shard(*part), retry=retry, advance=advance, said=console.print)
    show_study(content)
    from align_ti.report.study import write_study_page

    console.print(f"study: {checked.out / 'study.json'}\npage: {write_study_page(checked.out)}")


def shard_of(text: str) -> tuple[int, int]:
    """The part and the number of parts.

    Raises:
        ConfigError: not of the form I/N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard is {text!r}; accepted: I/N with 1 <= I <= N, such as 2/4.")
    return int(match[1]), int(match[2])


def announce_costs(checked: Study) -> None:
    """Say what is trained to measure costs before the first run, if costs are not known yet."""
    from align_ti.studies.costs import steps_to_measure, to_time
    from align_ti.studies.folder import StudyFolder

    missing = to_time(checked, StudyFolder(checked.out))
    if missing:
        after = f", the first {checked.file.cost_after:,} of them before the measurement (cost_after)"
        counts = sorted({steps_to_measure(checked, name) for name in missing})
        console.print(
            f"measuring the cost of a step: {len(missing)} variant(s) are trained for {'up to ' * (len(counts) > 1)}{counts[-1]:,} "
            f"steps each{after if checked.file.cost_after else ''}"
        )


def show_plan(checked: Study, plan: Planned) -> None:
    """The runs of a study, and what they will take."""
    table = Table("variant", "runs", "done", "steps", "s / step", "GFLOP / step", "time per run")
    for name, row in plan.rows.items():
        table.add_row(
            checked.label(name),
            str(row.runs),
            str(row.done),
            f"{row.cost.steps:,}",
            f"{row.cost.seconds_per_step:.3f}",
            f"{row.cost.flops_per_step / 1e9:.2f}",
            duration(row.cost.steps * row.cost.seconds_per_step),
        )
    console.print(table)
    console.print(f"equal: {checked.file.equal}; seeds: {', '.join(map(str, checked.file.seeds))}")
    after = f" after {checked.file.cost_after:,} steps of training (cost_after)" if checked.file.cost_after else ""
    console.print(
        f"cost of a step: measured{after}, {plan.cost_steps:,} steps per variant in total, about {duration(plan.cost_seconds)}; "
        "kept in costs.json, not repeated"
    )
    console.print(f"remaining: {plan.left} runs, {duration(plan.seconds)} of training{plan.measuring}")
    console.print(f"disk: {plan.working / 2**20:,.0f} MiB per active run, {plan.kept / 2**20:,.0f} MiB at the end")


def show_study(content: dict[str, Any]) -> None:
    """The variants and the differences of a study; what is missing or has failed."""
    table = Table("variant", content["title"], "seeds", "steps", "training, s", "gap closed")
    for name, row in content["variants"].items():
        table.add_row(
            content["labels"][name],
            between(row["accuracy"]["mean"], row["accuracy"]["low"], row["accuracy"]["high"], "%"),
            str(len(row["per_seed"])),
            f"{row['steps']:,}",
            f"{row['seconds']:,.0f}",
            ""
            if row["gap_closed"] is None
            else between(row["gap_closed"], row["gap_closed_interval"][0], row["gap_closed_interval"][1], "%"),
        )
    console.print(table)
    if content["differences"]:
        table = Table("difference", "points (95 % CI)", "corrected CI", "relative", "corrected p")
        for one in content["differences"]:
            table.add_row(
                f"{content['labels'][one['of']]} - {content['labels'][one['to']]}",
                between(one["mean"], one["low"], one["high"], "", sign=True),
                f"{ends(one['corrected_low'], one['corrected_high'], '+.1f')}",
                "" if one["relative"] is None else f"{one['relative']:+.1f} %",
                f"{one['corrected_p']:.3g}",
            )
        console.print(table)
    for one in content["failed"]:
        console.print(
            f"failed: {content['labels'][one['variant']]}, seed {one['seed']}: {one['error']} (--retry goes on with it)"
        )
    if any(len(one["per_seed"]) == 1 for one in content["variants"].values()):
        console.print(
            "variants with a single seed have no estimate of run-to-run variance; their intervals do not include it."
        )
    if content["missing"]:
        console.print(
            f"missing: {len(content['missing'])} runs, of other parts (--shard) or under way in other processes; "
            "`align-ti study` without --shard trains those that no other process is at."
        )


def between(value: float, low: float | None, high: float | None, unit: str, sign: bool = False) -> str:
    """A number with its interval."""
    form = "+.1f" if sign else ".1f"
    return f"{value:{form}} {unit}".strip() + f" ({ends(low, high, form)})"


def ends(low: float | None, high: float | None, form: str) -> str:
    """The ends of an interval, or that they are not known."""
    return "interval unknown" if low is None or high is None else f"{low:{form}} to {high:{form}}"
