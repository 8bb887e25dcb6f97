"""The example notebook runs from its first cell to its last, and what is committed of its outputs is fit to be read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.notebook import executed

PATH = Path(__file__).parent.parent / "examples" / "digits.ipynb"


def outputs(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def shown(notebook: dict, kind: str) -> list[str]:
    """Every output of a kind."""
    return ["".join(output["data"][kind]) for output in outputs(notebook) if kind in output.get("data", {})]


def test_the_notebook_runs_and_shows_roles_focus_and_transitions():
    made = executed(json.loads(PATH.read_text(encoding="utf-8")))
    html = shown(made, "text/html")
    assert sum("visual tokens]" in one for one in html) == 1
    assert sum("unweighted" in one for one in html) == 2
    assert sum("memory per device" in one for one in html) == 1
    # Image, scores of layers, focus maps, curves of terms, transitions.
    assert len(shown(made, "image/png")) == 5
    terms = "".join("".join(one["text"]) for one in outputs(made) if one["output_type"] == "stream")
    before, after = zip(*(map(float, pair) for pair in re.findall(r"([\d.]+) -> +([\d.]+)", terms)), strict=True)
    assert len(before) == 4 and sum(after) < sum(before)


def test_the_committed_outputs_are_small_whole_and_of_no_machine():
    text = PATH.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert len(text) < 300_000
    assert len(shown(notebook, "image/png")) == 5
    assert not any(output["output_type"] == "error" for output in outputs(notebook))
    assert not re.search(r"/tmp/|/work/|/home/|/root/", text)
    assert "<script" not in "".join(shown(notebook, "text/html"))
