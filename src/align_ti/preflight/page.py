"""Verdicts and samples as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from align_ti.data.roles import ROLE_NAMES
from align_ti.preflight.samples import Rendering
from align_ti.preflight.verdicts import Verdict
from align_ti.report.pictures import data_url
from align_ti.runs import write_text


def write_page(path: Path, verdicts: Sequence[Verdict], renderings: Sequence[Rendering]) -> None:
    """Writes the page; everything from models and data is escaped, and images are encoded anew."""
    environment = Environment(
        loader=PackageLoader("align_ti.preflight", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shares = next((verdict.values for verdict in verdicts if verdict.name == "roles"), None)
    page = environment.get_template("check.html.j2").render(
        verdicts=verdicts,
        counts={state: sum(v.state == state for v in verdicts) for state in ("pass", "warn", "fail")},
        shares=None if shares is None else {role: shares[role] for role in ROLE_NAMES},
        samples=[(one, [data_url(picture) for picture in one.pictures]) for one in renderings],
    )
    write_text(path, page)
