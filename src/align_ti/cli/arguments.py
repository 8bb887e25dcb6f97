"""Arguments and options that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[
    Path, typer.Argument(help="A recipe file (.yaml), or the name of a shipped recipe.", metavar="RECIPE")
]

Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one option, such as objective.tpa.candidates=2. May be repeated."
    ),
]

AllowExtensions = Annotated[
    bool,
    typer.Option(
        "--allow-extensions",
        help="Run the Python files that the recipe names under `extensions`: divergences and terms of your own.",
    ),
]
