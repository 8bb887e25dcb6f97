"""Every verb under its name, and the entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from align_ti.cli.checking import check
from align_ti.cli.data import cache, digits, generate
from align_ti.cli.demo import demo
from align_ti.cli.evaluation import compare, evaluate, score
from align_ti.cli.models import chat, compose, import_checkpoint, score_layers
from align_ti.cli.planning import plan
from align_ti.cli.recipes import copy_recipe, list_recipes, show_recipe
from align_ti.cli.studies import study
from align_ti.cli.terms import terms
from align_ti.cli.training import report, train
from align_ti.cli.watching import watch
from align_ti.errors import AlignTIError, InterruptedRunError, RequeueError
from align_ti.processes import part_in_order


def print_version(asked: bool) -> bool:
    """Prints the version, if it was asked for, and ends; otherwise gives back what the option holds."""
    if asked:
        typer.echo(f"align-ti {version('align-ti')}")
        raise typer.Exit
    return asked


app = typer.Typer(
    name="align-ti",
    help="Train a small vision-language model to imitate a large one.\n\nStart with: align-ti demo --out runs/demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
recipes = typer.Typer(
    help="Shipped recipes, and configs for accelerate launch: list, show, copy.", no_args_is_help=True
)
app.add_typer(recipes, name="recipes")

VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "watch": watch,
    "cache": cache,
    "plan": plan,
    "check": check,
    "terms": terms,
    "score-layers": score_layers,
    "evaluate": evaluate,
    "score": score,
    "compare": compare,
    "study": study,
    "generate": generate,
    "chat": chat,
    "report": report,
    "digits": digits,
    "compose": compose,
    "import": import_checkpoint,
}
"""Every verb under its name, in the order of `--help`."""

RECIPE_VERBS: dict[str, Callable[..., None]] = {"list": list_recipes, "show": show_recipe, "copy": copy_recipe}
"""The verbs of `align-ti recipes`."""


@app.callback()
def options(
    asked: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What may stand in front of a verb."""


for typed, verb in VERBS.items():
    app.command(typed)(verb)
for typed, verb in RECIPE_VERBS.items():
    recipes.command(typed)(verb)


def main() -> None:
    """The entry point: an error that a user can meet is one message, not a traceback."""
    try:
        app()
    except SystemExit as end:
        if not end.code:
            part_in_order()
        raise
    except AlignTIError as error:
        if isinstance(error, RequeueError):
            part_in_order()  # all processes stop at the same step
        Console(stderr=True).print(f"[bold red]error[/] {type(error).__name__}", highlight=False)
        print(error, file=sys.stderr)
        sys.exit(75 if isinstance(error, RequeueError) else 130 if isinstance(error, InterruptedRunError) else 2)
