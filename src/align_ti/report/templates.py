"""The templates of pages: whatever comes from data is escaped."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def environment() -> Environment:
    """Templates of this folder; only figures that are drawn here are markup."""
    made = Environment(
        loader=PackageLoader("align_ti.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.filters["unbroken"] = unbroken
    return made


def unbroken(text: str) -> str:
    """The text without a line break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=%|(?:h|min|s|MiB|points|nats|[A-Z]FLOP)\b)", "\N{NO-BREAK SPACE}", text)


def rendered(template: str, **content: Any) -> Markup:
    """A part of a page."""
    return Markup(environment().get_template(template).render(content))
