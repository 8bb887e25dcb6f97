"""What a check says: pass, warn or fail, with what was measured, what is expected, and the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One check's result.

    `name` is the check's name in docs/check.md, such as `pixels.teacher`; `values` are the measured numbers for other programs.
    """

    name: str
    state: State
    measured: str
    expected: str
    way_out: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state != "pass" and not self.way_out:
            raise ValueError(f"the verdict {self.name} is {self.state!r} without a way out; every warning needs one.")

    @property
    def sentence(self) -> str:
        """What was measured and what is expected; where something is wrong, the way out too."""
        said = f"{self.measured}; expected: {self.expected}"
        return f"{said}." if self.state == "pass" else f"{said}; {self.way_out}."


def as_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The content of `check.json`: the worst state, and every verdict."""
    return {
        "state": worst(verdicts),
        "verdicts": [
            {
                "name": verdict.name,
                "state": verdict.state,
                "measured": verdict.measured,
                "expected": verdict.expected,
                "way_out": verdict.way_out,
                "values": dict(verdict.values),
            }
            for verdict in verdicts
        ],
    }


def worst(verdicts: Sequence[Verdict]) -> State:
    """The worst state among the verdicts; pass if there are none."""
    order: tuple[State, ...] = ("pass", "warn", "fail")
    return max((verdict.state for verdict in verdicts), key=order.index, default="pass")


def failed(verdicts: Sequence[Verdict], report: str) -> str | None:
    """A message that names every failed verdict, or None if there is none; `report` is where all verdicts are."""
    bad = [verdict for verdict in verdicts if verdict.state == "fail"]
    if not bad:
        return None
    lines = "\n".join(f"  {verdict.name}: {verdict.sentence}" for verdict in bad)
    return (
        f"{len(bad)} check(s) failed, so training does not start:\n{lines}\n"
        f"All verdicts are in {report}. Fix the failed checks and run again, or train anyway with --no-check (check: false)."
    )
