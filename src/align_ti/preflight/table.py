"""Verdicts and samples on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from align_ti.preflight.samples import Rendering
from align_ti.preflight.verdicts import Verdict

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}
ROLE_STYLES = {"other": "dim", "visual": "magenta", "instruction": "cyan", "response": "green"}


def verdict_table(verdicts: Sequence[Verdict], *, all_of_them: bool = True) -> Table:
    """The verdicts, one a row; or only those that are no pass."""
    count = {state: sum(verdict.state == state for verdict in verdicts) for state in STYLES}
    table = Table("", "check", "measured, expected, fix", title="check before training")
    for verdict in verdicts if all_of_them else (one for one in verdicts if one.state != "pass"):
        # As text, so that brackets in it are no markup.
        table.add_row(Text(verdict.state, style=STYLES[verdict.state]), Text(verdict.name), Text(verdict.sentence))
    table.caption = ", ".join(f"{number} {state}" for state, number in count.items())
    return table


def sample_text(rendering: Rendering) -> Text:
    """A sample with its roles coloured."""
    text = Text(f"{rendering.place}\n", style="bold")
    for span in rendering.spans:
        text.append(span.text, style=f"not bold {ROLE_STYLES[span.role]}")
    return text


def role_legend() -> Text:
    """What the colours mean."""
    legend = Text("a sample as the student reads it, by token role: ")
    for role, style in ROLE_STYLES.items():
        legend.append(role, style=style).append("  ")
    return legend
