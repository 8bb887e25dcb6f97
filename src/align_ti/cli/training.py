"""The verbs of a run: train, and the report of runs and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align_ti.cli.arguments import AllowExtensions, Changes, RecipePath
from align_ti.cli.checking import dry, show_troubles
from align_ti.cli.tables import show_phases, show_summary, show_tasks
from align_ti.cli.terminal import bars, console, quiet
from align_ti.config import find_recipe, read_recipe
from align_ti.errors import ConfigError
from align_ti.processes import launch


def train(
    recipe: RecipePath,
    changes: Changes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check recipe, data and models; do not train.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="First check models and first records, as `align-ti check` does.")
    ] = True,
    allow_extensions: AllowExtensions = False,
    processes: Annotated[
        int | None,
        typer.Option("--launch", min=1, metavar="N", help="Train on N processes of this machine (DDP), one per GPU."),
    ] = None,
) -> None:
    """Train the student of a recipe; run the same command again to resume after a stop.

    Exit codes: 0 when the student is finished, 2 after an error with a message, 1 after any other error; 130 after Ctrl-C and
    75 after SIGTERM or SIGUSR1: run the same command again.

    With data.eval in the recipe, the teacher and the student before and after training are measured on your own questions, with
    evaluation.tasks on benchmarks; with either, report.html is written, and the student's model card has the results.
    """
    quiet()  # first, since a recipe's terms import what libraries speak of
    checked = read_recipe(find_recipe(recipe), changes or [], allow_extensions=allow_extensions)
    if dry_run:
        dry(checked)
        return
    if processes is not None:
        changed = [part for change in changes or [] for part in ("--set", change)]
        options = ["--check" if check else "--no-check", *(["--allow-extensions"] if allow_extensions else [])]
        raise typer.Exit(launch(processes, ["train", str(recipe), *changed, *options]))
    from accelerate import PartialState

    from align_ti.pipeline.measuring import train_and_measure
    from align_ti.report.page import write_report
    from align_ti.runs import read_json

    with bars() as advance:
        run = train_and_measure(
            checked,
            steps=lambda done, total: advance("train", done, total),
            advance=lambda name, done, total: advance(f"evaluate: {name}", done, total),
            check=check,
            seen=show_troubles,
        )
    if not PartialState().is_main_process:
        return
    console.print(f"student: {run.student}")
    show_phases({"student": run})
    if run.summary.exists():
        show_summary(read_json(run.summary))
        console.print(f"report: {write_report(run.root)}")
    if run.benchmarks.exists():
        told = read_json(run.benchmarks)
        show_tasks({told["labels"][name]: scores for name, scores in told["benchmarks"].items()})


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs, demos or studies.", metavar="RUN|STUDY...")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write; by default report.html in the folder, if a single one is given."),
    ] = None,
) -> None:
    """Write one HTML page about runs and studies from their folders: scores, examples, attention over images, cost.

    The page is one file without external resources. Runs that answered the same questions are compared.
    """
    from align_ti.report.page import write_report

    if out is None and len(folders) > 1:
        raise ConfigError(
            f"--out is missing, and {len(folders)} folders are named; give the file of their page (--out report.html)."
        )
    console.print(f"report: {write_report(*folders, out=out)}")
