"""The verbs about shipped recipes, and how a recipe is found by its name."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from align_ti.cli.terminal import console
from align_ti.errors import ConfigError

ENGINES = "recipes/engines"
"""Where the configs for `accelerate launch` lie."""


def list_recipes() -> None:
    """Name every shipped recipe, and every config for `accelerate launch`, with its first line."""
    for title, folder in (("recipe", "recipes"), ("config of accelerate", ENGINES)):
        table = Table(title, "what it is")
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


def shipped(folder: str = "recipes") -> dict[str, str]:
    """The shipped recipes, or configs, by name."""
    found = sorted(
        (item for item in (files("align_ti") / folder).iterdir() if item.name.endswith(".yaml")),
        key=lambda item: item.name,
    )
    return {item.name.removesuffix(".yaml"): item.read_text(encoding="utf-8") for item in found}


def recipe_text(name: str) -> str:
    """The text of a shipped recipe or config."""
    known = shipped() | shipped(ENGINES)
    if name not in known:
        raise ConfigError(f"there is no recipe or config {name!r}; shipped: {', '.join(known)}.")
    return known[name]


def find_recipe(path: Path) -> Path:
    """The recipe file: as given, or a shipped recipe of that name."""
    # A folder of that name, such as the benchmark's own, is no recipe.
    if not path.is_file() and str(path) in shipped():
        with as_file(files("align_ti") / "recipes" / f"{path}.yaml") as file:
            return Path(file)
    return path
