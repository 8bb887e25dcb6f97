"""Reads a recipe from YAML strictly, with changes of single options."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from align_ti.config.recipe import Recipe
from align_ti.errors import ConfigError
from align_ti.options import explain
from align_ti.registry import load_extension


class Loader(yaml.SafeLoader):
    """Safe YAML that reads 2e-5 as a number, which YAML 1.1 takes for text, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_recipe(path: Path, changes: Iterable[str] = (), *, allow_extensions: bool = False) -> Recipe:
    """The recipe in a YAML file, with changes of the form `section.key=value` applied to it.

    Args:
        path: the file.
        changes: `section.key=value`, each value read as YAML.
        allow_extensions: run the Python files that the recipe names under `extensions`, so that their divergences and terms are
            known.

    Raises:
        ConfigError: one message with every error of the file; or it names extensions, and they are not allowed.
    """
    path = Path(path)
    content = read_mapping(path, "recipe", "sections such as student and data")
    for change in changes:
        lay_over(content, change)
    run_extensions(path, content.get("extensions"), allowed=allow_extensions)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(Recipe, error)}") from None


def read_mapping(path: Path, called: str, accepted: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        called: what the file is, for messages.
        accepted: what its top level holds.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: the {called} does not exist; `align-ti recipes list` names those that are shipped."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}; fix it.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); a YAML file is accepted.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level is {type(content).__name__}; {accepted} are accepted.")
    return content


ENGINE_CONFIGS = "recipes/engines"
"""Where the configs for `accelerate launch` lie."""


def shipped(folder: str = "recipes") -> dict[str, str]:
    """The text of each shipped recipe, or config, by its name."""
    found = sorted(
        (item for item in (files("align_ti") / folder).iterdir() if item.name.endswith(".yaml")),
        key=lambda item: item.name,
    )
    return {item.name.removesuffix(".yaml"): item.read_text(encoding="utf-8") for item in found}


def find_recipe(path: Path) -> Path:
    """The recipe file: as given, or a shipped recipe of that name."""
    # A folder of that name, such as the benchmark's own, is no recipe.
    if not path.is_file() and str(path) in shipped():
        with as_file(files("align_ti") / "recipes" / f"{path}.yaml") as file:
            return Path(file)
    return path


def run_extensions(path: Path, named: Any, *, allowed: bool) -> None:
    """Runs the files that a recipe names under `extensions`. A recipe alone cannot run code: somebody has to allow it.

    Raises:
        ConfigError: they are not allowed, or one cannot be run.
    """
    if not named or not isinstance(named, list) or not all(isinstance(file, str) for file in named):
        return  # nothing to run, or a mistake that the recipe's own check names
    if not allowed:
        raise ConfigError(
            f"{path}: extensions names {', '.join(named)}, which would run code of that file; read it, and allow it by "
            "--allow-extensions (in Python read_recipe(..., allow_extensions=True)), or leave extensions out."
        )
    for file in named:
        load_extension(Path(file))


def lay_over(content: dict[str, Any], change: str) -> None:
    """Write one `section.key=value` into the recipe's content; the value is read as YAML."""
    name, equals, value = change.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set {change!r} is not of the form section.key=value, such as objective.tpa.candidates=2.")
    try:
        put(content, name.strip(), yaml.load(value, Loader), f"--set {change!r}")
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change!r}: the value is not valid YAML: {error}") from error


def put(content: dict[str, Any], name: str, value: Any, told: str) -> None:
    """Write one option into a recipe's content by its full name, such as objective.tpa.candidates.

    Args:
        content: the recipe's content; changed.
        name: the option.
        value: its value, in YAML's types.
        told: what says so, for messages.

    Raises:
        ConfigError: a part of the name is no section.
    """
    *sections, key = name.split(".")
    place: Any = content
    for section in sections:
        entry = list_entry(place, section, told)
        inner = place[entry] if isinstance(place, list) else place.setdefault(entry, {})
        if not isinstance(inner, dict | list):
            raise ConfigError(f"{told}: {section} is no section but {inner!r}; give the name of a key in a section.")
        place = inner
    place[list_entry(place, key, told)] = value


def list_entry(place: dict[str, Any] | list[Any], key: str, told: str) -> Any:
    """The key as it is in a section, and as a number in a list, such as the 0 of data.train.0.path."""
    if isinstance(place, dict):
        return key
    if not key.isdigit() or int(key) >= len(place):
        raise ConfigError(f"{told}: {key!r} is no entry of a list of {len(place)}; accepted: 0 to {len(place) - 1}.")
    return int(key)
