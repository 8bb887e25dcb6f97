"""The pages that are generated from the code: options of a recipe, the command line, the Python names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer.core
import typer.main
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.cli import get_docs_for_click

import align_ti
from align_ti.cli import app
from align_ti.config import Recipe, shipped
from align_ti.options import Options
from align_ti.registry import lookup, names
from align_ti.terms.schedule import Schedule


def recipes() -> str:
    """Every option of a recipe: its type, default and meaning, section by section."""
    parts = [
        "# Recipes",
        "A recipe is a YAML file. `align-ti recipes list` lists the shipped ones, and `--set section.option=value` changes "
        "an option of any. This page is generated from the declarations in `align_ti.config`, `align_ti.terms` and "
        "`align_ti.losses.divergences`; an option that is not here is refused.",
        group("", Recipe, "## The top level"),
    ]
    parts += [group(name, declared, f"## {name}") for name, declared in sections("", Recipe) if name != "objective"]
    parts.append("## objective")
    objective = Recipe.section("objective")
    assert objective is not None
    parts.append(group("objective", objective, ""))
    for name in names("term"):
        parts.append(group(f"objective.{name}", lookup("term", name), f"### objective.{name}"))
    parts.append("## Divergences")
    parts.append(
        "A term's `divergence` is one of these names, or a name with options: `divergence: {name: skew_kl, alpha: 0.1}`."
    )
    parts += [group(name, lookup("divergence", name), f"### {name}") for name in names("divergence")]
    parts.append(group("schedule", Schedule, "## Schedules"))
    parts.append(
        "A term's `schedule` has one for each of its real numbers that is to change: "
        "`schedule: {weight: {final: 0.0, begin: 0.5, end: 0.5}}`."
    )
    parts.append("## The shipped recipes")
    parts += [f"### {name}.yaml\n\n```yaml\n{text}\n```" for name, text in shipped().items()]
    return "\n\n".join(parts)


def sections(place: str, declared: type[Options]) -> Iterator[tuple[str, type[Options]]]:
    """The groups of options below one, each by its full name, a group before those in it."""
    for name in declared.model_fields:
        inner = declared.section(name)
        if inner is not None:
            yield f"{place}{name}", inner
            yield from sections(f"{place}{name}.", inner)


def group(place: str, declared: type[Options], heading: str) -> str:
    """One group of options: what it is, and a table of its options."""
    lines = [heading, prose(inspect.getdoc(declared) or "")]
    if declared.model_fields:
        rows = ["| option | accepted | default | meaning |", "|---|---|---|---|"]
        for name, field in declared.model_fields.items():
            inner = declared.section(name)
            full = f"{place}.{name}" if place else name
            takes = accepted(field) if inner is None else f"[{full}](#{slug(full)})"
            if name == "divergence":
                takes = "[a divergence](#divergences)"
            if name == "schedule":
                takes = "[schedules](#schedules) by option"
            meaning = field.description or ("" if inner is None else (inspect.getdoc(inner) or "").split("\n\n")[0])
            rows.append(f"| `{name}` | {takes} | {default(field)} | {cell(meaning)} |")
        lines.append("\n".join(rows))
    return "\n\n".join(line for line in lines if line)


def prose(docstring: str) -> str:
    """A docstring as Markdown: its angle brackets are text."""
    return docstring.replace("<", "&lt;")


def slug(heading: str) -> str:
    """The anchor of a heading, as Markdown's table of contents makes it."""
    return re.sub(r"[^\w\s-]", "", heading).strip().lower()


def cell(text: str) -> str:
    """Text that stands in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def accepted(field: FieldInfo) -> str:
    """What an option takes, in words, with its limits."""
    limits = []
    for rule in field.metadata:
        for sign, words in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if getattr(rule, sign, None) is not None:
                limits.append(f"{words} {getattr(rule, sign):.10g}")
    return cell(", ".join([kind(field.annotation), *limits]))


KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null"}


def kind(annotation: Any) -> str:
    """A type as a reader of YAML knows it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(kind(member) for member in inner)
    if origin is tuple:
        return f"list of {kind(inner[0])}"
    if origin is dict:
        return "options by name"
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return "section"
    return KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default(field: FieldInfo) -> str:
    """An option's default; an option that has none is needed."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "**needed**"
    if isinstance(value, Options):
        return f"`{value.name}`" if "name" in type(value).__dict__ else ""  # type: ignore[attr-defined]
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def command_line() -> str:
    """Every verb with its arguments and options, as `--help` tells them."""
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    context = typer.Context(command)
    lines = ["# Command line", command.help or "", "| verb | what it does |", "|---|---|"]
    pages = []
    for name, verb in command.commands.items():
        first = " ".join(inspect.cleandoc(verb.help or "").split("\n\n")[0].split())
        lines.append(f"| [`{name}`](#align-ti-{name}) | {cell(first)} |")
        pages.append(get_docs_for_click(obj=verb, ctx=context, indent=1, call_prefix="align-ti"))
    return "\n\n".join(["\n\n".join(lines[:2]), "\n".join(lines[2:]), *pages]).replace("<image>", "&lt;image&gt;")


HOMES = {
    "config": "Recipes and the objective",
    "terms": "Terms",
    "losses": "Divergences",
    "registry": "Registering your own",
    "data": "Data",
    "models": "Models",
    "interactions": "Layer scores",
    "training": "Loss and trainer",
    "pipeline": "A whole run",
    "errors": "Errors",
}
"""The parts that have public names, in the order of the page."""


def python_names() -> str:
    """Every public name with its signature and docstring, by the part that it is from."""
    of = {name: align_ti._HOME[name].partition(".")[0] for name in align_ti.__all__ if name in align_ti._HOME}
    parts = [
        "# Python",
        'The names of `align_ti`, each from its docstring. Annotations give shapes: `Float[Tensor, "rows vocab"]` '
        "is a tensor of two axes.",
    ]
    for home, title in HOMES.items():
        parts.append(f"## {title}")
        parts += [f"::: align_ti.{name}" for name, place in of.items() if place == home]
    missing = set(of.values()) - set(HOMES)
    if missing:
        raise ValueError(f"website/references.py has no title for {', '.join(sorted(missing))}; add it to HOMES.")
    return "\n\n".join(parts)


REFERENCES: dict[str, Callable[[], str]] = {
    "reference/recipes.md": recipes,
    "reference/cli.md": command_line,
    "reference/api.md": python_names,
}
"""Each page by its place in the site."""
