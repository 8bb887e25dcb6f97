"""The templates of pages: whatever comes from data is escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def environment() -> Environment:
    """Templates of this folder; only pictures that are drawn here are markup."""
    return Environment(
        loader=PackageLoader("align_ti.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def rendered(template: str, **content: Any) -> Markup:
    """A part of a page."""
    return Markup(environment().get_template(template).render(content))
