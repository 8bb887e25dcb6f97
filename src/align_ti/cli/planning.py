"""The verb that tells what a run will take."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from align_ti.cli.arguments import AllowExtensions, Changes, RecipePath
from align_ti.cli.terminal import console, quiet
from align_ti.config import find_recipe, read_recipe

if TYPE_CHECKING:
    from align_ti.planning.plan import Plan


def plan(
    recipe: RecipePath,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices used for training.")] = 1,
    memory: Annotated[float | None, typer.Option(min=0.01, help="Memory of one device in GB (10^9 bytes).")] = None,
    engine: Annotated[
        str | None, typer.Option(help="one, ddp, fsdp2, zero2 or zero3. By default one device alone, or ddp.")
    ] = None,
    shard_teacher: Annotated[
        bool, typer.Option("--shard-teacher", help="Shard the teacher too. By default as in teacher.sharded.")
    ] = False,
    tokens: Annotated[int | None, typer.Option(min=3, help="Tokens per record. By default data.max_length.")] = None,
    visual: Annotated[
        int | None, typer.Option(min=0, help="Visual tokens among them. By default those of one image.")
    ] = None,
    response: Annotated[int | None, typer.Option(min=1, help="Response tokens among them.")] = None,
    row_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of TPA's candidates computed in a row of their own.")
    ] = 1.0,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Plan for training on CPUs, which use smaller chunks of rows.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    changes: Changes = None,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Estimate what a run needs on each device, before anything is loaded: memory by component, and bytes sent per step.

    Only the models' configs are read. With --memory, names what to change first if the run does not fit.
    """
    quiet()
    checked = read_recipe(find_recipe(recipe), changes or [], allow_extensions=allow_extensions)
    from align_ti.planning.memory import Layout
    from align_ti.planning.plan import make_plan

    spread = engine or ("one" if devices == 1 else "ddp")
    sharded = shard_teacher or (checked.teacher is not None and checked.teacher.sharded and devices > 1)
    layout = Layout(engine=spread, devices=devices, shard_teacher=sharded)
    sizes: dict[str, Any] = {"tokens": tokens, "visual": visual, "response": response, "row_share": row_share}
    limit = None if memory is None else int(memory * 1e9)
    made = make_plan(checked, layout, limit=limit, accelerator=not cpu, **sizes)
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=2))
    else:
        show_plan(made, limit)


def show_plan(plan: Plan, limit: int | None) -> None:
    """Memory of a device and bytes sent as tables, then what was assumed, and what to change if it does not fit."""
    from align_ti.planning.plan import FILLED, NOTHING_FITS, shown_mapping

    layout = plan.case.layout
    table = Table("component", "GB", title=f"memory per device: {layout.engine}, {layout.devices} device(s)")
    for name, size in shown_mapping(plan.memory.parts):
        table.add_row(name, size)
    table.add_section()
    table.add_row("total", f"{plan.memory.total / 1e9:,.3f}")
    console.print(table)
    if plan.traffic.parts:
        sent = Table("data", "GB", title="sent per device and optimizer step")
        for name, size in shown_mapping(plan.traffic.parts):
            sent.add_row(name, size)
        console.print(sent)
    if plan.assumed:
        console.print("assumed: " + "; ".join(plan.assumed) + ".")
    if limit is None:
        return
    if plan.memory.total <= FILLED * limit:
        console.print(f"fits in {FILLED:.0%} of {limit / 1e9:g} GB.")
        return
    console.print(
        f"does not fit in {FILLED:.0%} of {limit / 1e9:g} GB; the rest is reserved for the allocator and libraries."
    )
    options = Table("option (alone)", "GB", "saved", "fits")
    for one in plan.advice:
        saved = plan.memory.total - one.total
        options.add_row(one.change, f"{one.total / 1e9:,.3f}", f"{saved / 1e9:,.3f}", "yes" if one.fits else "no")
    console.print(options)
    console.print(f"change first: {plan.first}." if plan.first else NOTHING_FITS)
