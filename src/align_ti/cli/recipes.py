"""The verbs about shipped recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from align_ti.cli.terminal import console
from align_ti.config import ENGINE_CONFIGS, shipped
from align_ti.errors import ConfigError


def list_recipes() -> None:
    """List every shipped recipe, and every config for `accelerate launch`, with its first line."""
    for title, folder in (("recipe", "recipes"), ("accelerate config", ENGINE_CONFIGS)):
        table = Table(title, "description")
        for name, text in shipped(folder).items():
            table.add_row(name, text.splitlines()[0].lstrip("# "))
        console.print(table)


def show_recipe(name: Annotated[str, typer.Argument(help="The name of a shipped recipe or config.")]) -> None:
    """Print a recipe or a config."""
    typer.echo(recipe_text(name))


def copy_recipe(
    name: Annotated[str, typer.Argument(help="The name of a shipped recipe or config.")],
    to: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
) -> None:
    """Copy a recipe, or a config for `accelerate launch`, to a file of your own, to change it there."""
    text = recipe_text(name)
    if to.exists():
        raise ConfigError(f"{to} exists; nothing was written; choose another name.")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text, encoding="utf-8")
    console.print(f"written: {to}")


def recipe_text(name: str) -> str:
    """The text of a shipped recipe or config."""
    known = shipped() | shipped(ENGINE_CONFIGS)
    if name not in known:
        raise ConfigError(f"there is no recipe or config {name!r}; shipped: {', '.join(known)}.")
    return known[name]
