"""What a check leaves behind: verdicts and rendered samples, as `check.json` and `check.html` in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import ProcessorMixin

from align_ti.data.conversation import Conversation
from align_ti.preflight.page import write_page
from align_ti.preflight.samples import Rendering, read_first, rendering
from align_ti.preflight.verdicts import Verdict, as_json
from align_ti.runs import RunFolder, write_json

SHOWN = 4
"""Records that are rendered."""


@dataclass(frozen=True, slots=True)
class Report:
    """The verdicts, and the first records as the student reads them."""

    verdicts: list[Verdict]
    renderings: list[Rendering]


def report_on(verdicts: list[Verdict], processor: ProcessorMixin, data: Sequence[Conversation]) -> Report:
    """The verdicts with the first records that can be rendered."""
    return Report(verdicts, [rendering(sample, processor) for sample in read_first(data, processor, SHOWN).usable])


def write_report(run: RunFolder, report: Report) -> None:
    """Writes `check.json` and `check.html`."""
    write_json(run.check, as_json(report.verdicts))
    write_page(run.check_page, report.verdicts, report.renderings)
