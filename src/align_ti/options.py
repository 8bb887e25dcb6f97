"""How options are declared and checked: one base class, and errors as sentences. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from align_ti.errors import ConfigError


class Options(BaseModel):
    """A group of options: frozen, keyword-only, checked at birth; an unknown or ill-typed one raises `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    where: ClassVar[str] = ""
    """The section's name in a recipe, for messages about options given in Python."""

    def __init__(self, **options: Any) -> None:
        try:
            self.__pydantic_validator__.validate_python(options, self_instance=self)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error)) from None

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, options: Any) -> Any:
        """YAML and JSON have lists where options are tuples."""
        if not isinstance(options, Mapping):
            return options
        return {
            name: tuple(value) if isinstance(value, list) and takes_tuple(cls, name) else value
            for name, value in options.items()
        }

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """The names that the group accepts."""
        return tuple(cls.model_fields)

    @classmethod
    def section(cls, name: str) -> type[Options] | None:
        """The group that an option of this name holds, however deep in unions and tuples; None if it holds a plain value."""
        return next(section_in(cls.model_fields[name].annotation), None) if name in cls.model_fields else None

    # Tells pydantic that this constructor only wraps its own, so that nested sections are validated without it and all errors
    # of a recipe arrive together.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


UNION_MEMBER = re.compile(r"^(int|float|constrained-int|constrained-float|literal\[.*\]|path-of-one|list-of-sources)$")
"""What pydantic adds to an option's path to say which member of a union it tried."""


def explain(options_class: type[Options], error: ValidationError) -> str:
    """Every error, one a line: the option's name, what was found, what is accepted, the way out."""
    lines = []
    for item in error.errors():
        parts = [str(part) for part in item["loc"] if not UNION_MEMBER.match(str(part))]
        name = ".".join([options_class.where, *parts] if options_class.where else parts)
        lines.append(explain_item(options_class, name, item["type"], parts, item))
    # A union reports each of its members; one line an option is enough.
    return "\n".join(dict.fromkeys(lines))


def explain_item(options_class: type[Options], name: str, kind: str, parts: Sequence[str], item: Any) -> str:
    """One error as a sentence."""
    message, found = str(item["msg"]), item.get("input")
    if kind == "extra_forbidden":
        nearest = difflib.get_close_matches(parts[-1], known_keys(options_class, parts[:-1]), n=1, cutoff=0.5)
        hint = (
            f"did you mean {nearest[0]!r}?"
            if nearest
            else f"known: {', '.join(known_keys(options_class, parts[:-1]))}."
        )
        return f"{name} is no known option; {hint}"
    if kind == "sentence":
        return f"{name}{'' if message.startswith(':') else ' '}{message}"
    if kind == "missing":
        return f"{name} is missing; it has no default; give it."
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{name}: {message}" if name else message
    term = re.match(r"objective\.(\w+)\.", name)
    advice = f", or objective.{term[1]}.weight: 0 to leave the term out" if term else ""
    accepted = message.removeprefix("Input should be ").replace("a valid integer", "an integer").replace("a valid", "a")
    if kind == "model_type":
        accepted = f"a section of options, such as {known_keys(options_class, parts)[0]}: ..."
    return f"{name} is {found!r}; accepted: {accepted}{advice}."


def known_keys(options_class: type[Options], parts: Sequence[str]) -> list[str]:
    """The keys of the section that the path leads to."""
    keyed = False
    for part in parts:
        # The number of a list's entry, and the key of a mapping of sections, lead to no other section.
        if not part.isdigit() and not keyed:
            inner = options_class.section(part)
            if inner is None:
                return []
            keyed = holds_mapping(options_class, part)
            options_class = inner
        else:
            keyed = False
    return list(options_class.known())


def holds_mapping(options_class: type[Options], name: str) -> bool:
    """Whether an option is a mapping, of names to sections."""
    return name in options_class.model_fields and get_origin(options_class.model_fields[name].annotation) is dict


def takes_tuple(options_class: type[Options], name: str) -> bool:
    """Whether an option takes a tuple, alone or among other forms."""

    def inside(annotation: Any) -> bool:
        return get_origin(annotation) is tuple or any(inside(inner) for inner in get_args(annotation))

    return name in options_class.model_fields and inside(options_class.model_fields[name].annotation)


def section_in(annotation: Any) -> Iterator[type[Options]]:
    """The sections that an option's annotation holds, however deep in unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        yield annotation
    for inner in get_args(annotation):
        yield from section_in(inner)


Group = TypeVar("Group", bound=Options)


def checked(group: type[Group], options: Any, *place: str) -> Group:
    """The group with these options, checked; for validators of options whose group depends on a name.

    Raises:
        ValidationError: with every error at its place below `place`.
    """
    if isinstance(options, group):
        return options
    try:
        return group.__pydantic_validator__.validate_python(options)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise ValidationError.from_exception_data(
            group.__name__, [placed(group, item, place) for item in error.errors()]
        ) from None


def placed(group: type[Options], item: Any, place: tuple[str, ...]) -> InitErrorDetails:
    """One error of a group at its place in a larger one. An unknown option is put into words here, where the group is known."""
    where, kind = item["loc"], item["type"]
    if kind == "extra_forbidden" and len(where) == 1:
        nearest = difflib.get_close_matches(where[0], group.known(), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(group.known())}."
        return sentence(f"is no known option; {hint}", (*place, *where), item["input"])
    if kind == "sentence":
        return sentence(item["msg"], (*place, *where), item["input"])
    if kind not in get_args(ErrorType):
        return sentence(f": {item['msg']}", (*place, *where), item["input"])
    details: InitErrorDetails = {"type": kind, "loc": (*place, *where), "input": item["input"]}
    if "ctx" in item:
        details["ctx"] = item["ctx"]
    return details


def sentence(text: str, place: tuple[str | int, ...], found: Any) -> InitErrorDetails:
    """An error whose words follow the option's name."""
    return {"type": PydanticCustomError("sentence", text), "loc": place, "input": found}
