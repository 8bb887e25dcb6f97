"""The verb of the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from align_ti.cli.tables import show_phases, show_spent, show_summary
from align_ti.cli.terminal import bars, console, quiet
from align_ti.config import Training
from align_ti.errors import ConfigError
from align_ti.phases import Stopwatch


def demo(
    out: Annotated[Path, typer.Option(help="The run folder; a stopped demo resumes in it.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Random seed of images, questions, data order and sampling.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each method; by default the benchmark's.")
    ] = None,
    split: Annotated[str, typer.Option(help="Measure on 'test', or on 'validation' to choose settings.")] = "test",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Methods trained at the same time; by default as many as there are cores for."),
    ] = None,
    phases: Annotated[
        bool, typer.Option("--phases", help="Also report where the time of a training step goes.")
    ] = False,
) -> None:
    """Distil a small model on real handwriting with three methods and compare them.

    Creates the digits benchmark, measures the shipped teacher, scores its layers, trains one student by SFT, by SFT + vanilla
    KD and by Align-TI from the same start, measures all of them on held-out handwriting, writes report.html and summary.json,
    and prints how long each part took.
    """
    if split not in {"test", "validation"}:
        raise ConfigError(f"--split is {split!r}; accepted: 'test' or 'validation'.")
    stopwatch = Stopwatch(of="run")
    with stopwatch.phase("load the libraries"):
        quiet()
        import torch

        from align_ti.demo import TRAINING, objectives, run_demo
        from align_ti.runs import RunFolder

    changed: dict[str, Any] = {"phases": phases, **({} if steps is None else {"max_steps": steps})}
    training = Training(**{**TRAINING.model_dump(), **changed})
    if jobs is None:
        jobs = 1 if torch.accelerator.is_available() else min(len(objectives(0)), torch.get_num_threads())
    with bars() as advance:
        summary = run_demo(
            out, seed, training=training, split=split, jobs=jobs, advance=advance, stopwatch=stopwatch, prepare=quiet
        )
    show_summary(summary)
    show_phases({summary["labels"][name]: RunFolder(out / name) for name in objectives(0)})
    show_spent(summary["spent_seconds"])
    console.print(f"report: {RunFolder(out).report}\nsummary: {RunFolder(out).summary}")
