"""The verb that lists terms and divergences."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.table import Table

from align_ti.cli.terminal import console, quiet
from align_ti.registry import Kind, lookup, names


def terms(
    name: Annotated[
        str | None, typer.Argument(help="A term or divergence; prints its definition and every option.", metavar="NAME")
    ] = None,
) -> None:
    """List the loss terms and divergences that a recipe may use, or print one with its options and source.

    objective: {kd: {divergence: {name: skew_kl, alpha: 0.1}}, llava_kd_rdist: {weight: 0.5}}
    """
    quiet()
    if name is not None:
        show_one(name)
        return
    kinds: tuple[Kind, ...] = ("term", "divergence")
    for kind in kinds:
        table = Table(title=f"{kind}s", title_justify="left")
        table.add_column("name")
        table.add_column("description")
        for known in names(kind):
            table.add_row(known, first_paragraph(lookup(kind, known)))
        console.print(table)


def show_one(name: str) -> None:
    """A term or divergence as its docstring tells it, with every option, its default and its meaning.

    Raises:
        ConfigError: nothing has that name.
    """
    kind: Kind = "divergence" if name in names("divergence") else "term"
    found = lookup(kind, name)
    console.print(f"{kind} {name}\n\n{inspect.getdoc(found)}\n", highlight=False)
    table = Table("option", "default", "meaning")
    for option, field in found.model_fields.items():
        table.add_row(
            option, str(getattr(field.default, "name", field.default)), " ".join((field.description or "").split())
        )
    if found.model_fields:
        console.print(table)


def first_paragraph(documented: type) -> str:
    """The first paragraph of a class's docstring, as one line."""
    return " ".join(inspect.getdoc(documented).split("\n\n")[0].split()) if documented.__doc__ else ""  # type: ignore[union-attr]
