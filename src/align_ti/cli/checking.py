"""The verb that checks a recipe's own models and records, and `train --dry-run`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from align_ti.cli.arguments import AllowExtensions, Changes, RecipePath
from align_ti.cli.terminal import bars, console, quiet
from align_ti.config import ENGINES, Recipe, find_recipe, read_recipe
from align_ti.errors import CheckError, ConfigError

if TYPE_CHECKING:
    from align_ti.preflight.report import Report


def check(
    recipe: RecipePath,
    changes: Changes = None,
    devices: Annotated[
        int, typer.Option(min=1, help="Number of devices used for training, for the expected memory and time.")
    ] = 1,
    engine: Annotated[
        str, typer.Option(help="ddp, fsdp2, zero2 or zero3: what spreads the run over several devices.")
    ] = "ddp",
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON instead of a table.")] = False,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Check a recipe's models and its first records before a long run.

    The checks: images reach both models, vocabularies and image tokens agree, every term has a gradient, the loss equals a
    plain reference computation, no response is truncated; with the expected memory and time. check.json and check.html are
    written to the run folder.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engine is {engine!r}; accepted: {', '.join(ENGINES)}; name one of them.")
    spread_by: Any = engine
    quiet()  # first, since a recipe's terms import what libraries speak of
    checked = read_recipe(find_recipe(recipe), changes or [], allow_extensions=allow_extensions)
    from align_ti.pipeline.checking import check_recipe
    from align_ti.preflight import verdicts
    from align_ti.runs import RunFolder

    with contextlib.nullcontext() if as_json else console.status("checking"):
        found = check_recipe(checked, devices, spread_by)
    run = RunFolder(Path(checked.out))
    if as_json:
        typer.echo(json.dumps(verdicts.as_json(found.verdicts), indent=2, ensure_ascii=False))
    else:
        show_check(found)
        console.print(f"page: {run.check_page}")
    if (message := verdicts.failed(found.verdicts, str(run.check))) is not None:
        raise CheckError(message)


def show_troubles(report: Report) -> None:
    """What a check before training has to say: verdicts that are no pass, and how many there are of each."""
    from align_ti.preflight.table import verdict_table

    console.print(verdict_table(report.verdicts, all_of_them=False))


def show_check(report: Report) -> None:
    """The verdicts of a check as a table, and the first sample with its roles coloured."""
    from align_ti.preflight.table import role_legend, sample_text, verdict_table

    console.print(verdict_table(report.verdicts))
    if report.renderings:
        console.print(role_legend())
        console.print(sample_text(report.renderings[0]))


def dry(recipe: Recipe) -> None:
    """Load and check everything that a run needs, and say what it would do."""
    from align_ti.data.mixing import read_mixture
    from align_ti.data.roles import ROLE_NAMES
    from align_ti.pipeline.measuring import read_tasks
    from align_ti.pipeline.parts import load_parts
    from align_ti.pipeline.records import read_questions, training_data

    mixture = None if recipe.data.stream else read_mixture(recipe.data, recipe.seed)
    questions = read_questions(recipe.data)
    for conversation in questions:
        conversation.check_files()
    tasks = read_tasks(recipe)
    parts = load_parts(recipe)
    with bars() as advance:
        data, story = training_data(
            recipe,
            parts.processor,
            advance=lambda done, total: advance("check the records", done, total),
            mixture=mixture,
            teacher_processor=parts.own_processor,
        )
    for conversation in [] if mixture is None or story["skipped"] else mixture.conversations:
        conversation.check_files()
    sample = next(iter(data))
    trained = parts.trained()
    table = Table("item", "value", title="dry run: nothing is trained")
    table.add_row(
        "student",
        f"{recipe.student.path}: {sum(count for count, _ in trained.values()) / 1e6:.2f} M of "
        f"{sum(every for _, every in trained.values()) / 1e6:.2f} M trained",
    )
    for part, (count, every) in trained.items():
        table.add_row(f"  {part}", f"{count / 1e6:.2f} M of {every / 1e6:.2f} M trained" if count else "frozen")
    if parts.teacher is not None and recipe.teacher is not None:
        table.add_row("teacher", f"{recipe.teacher.path}: {parts.teacher.num_parameters() / 1e6:.2f} M, frozen")
    add_data(table, story, len(questions))
    roles = ", ".join(f"{int((sample['roles'] == number).sum())} {name}" for number, name in enumerate(ROLE_NAMES))
    table.add_row("first record", f"{len(sample['input_ids'])} tokens: {roles}")
    terms = ", ".join(
        f"{name} x {term.weight:g}{' (scheduled)' * bool(term.schedule)}"
        for name, term in recipe.objective.terms.items()
    )
    table.add_row("objective", terms)
    for task in tasks:
        table.add_row("benchmark", f"{task.benchmark.title}: {len(task.items)} questions")
    table.add_row("run folder", recipe.out)
    console.print(table)


def add_data(table: Table, story: dict[str, Any], questions: int) -> None:
    """The rows about data: each source, then all records, then why the first of them are skipped."""
    for source in story.get("sources", []):
        renamed = f", {source['other_extension']} images under another extension" if source["other_extension"] else ""
        table.add_row(f"source {source['path']}", f"{source['taken']} of {source['records']} records used{renamed}")
    if "stream" in story:
        table.add_row("records", f"streamed from {story['stream']}; {questions} for evaluation")
        return
    table.add_row(
        "records",
        f"{story['used']} for training, {questions} for evaluation; {story['skipped']} skipped, {story['truncated']} truncated",
    )
    if story["responses"]["teacher"]:
        table.add_row(
            "responses",
            f"{story['responses']['teacher']} generated by the teacher, {story['responses']['gold']} recorded",
        )
    for reason in story["first_reasons"]:
        table.add_row("skipped", reason)
