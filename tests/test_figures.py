"""The documentation's schemes show what the package does."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import torch
from benchmarks import figures

from align_ti.models.branches import Branches
from align_ti.models.continuation import branch_positions, branch_rows, gold_rows
from tests import tiny

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


def test_the_scheme_of_candidates_is_the_mask_and_the_positions_that_models_are_given():
    model = tiny.model(seed=0)
    length, tried = len(figures.SEQUENCE), figures.candidates()
    ids = torch.full((1, length), 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    places = torch.tensor([figures.first_response() + step - 1 for _, step in tried])
    rows = Branches.of(torch.zeros(len(tried), dtype=torch.long), places, places, batch=1).a_row_each()
    (gold,), branches = gold_rows(model, inputs).values(), branch_rows(model, inputs, rows, "full_attention")
    seen = torch.cat([torch.nn.functional.pad(gold, (0, rows.width)), branches], dim=1)[0]
    assert torch.equal(torch.from_numpy(figures.visible()), seen)
    assert torch.equal(branch_positions(model, inputs, rows)[0], places)
    with mpl.rc_context(figures.STYLE):
        labels = [label.get_text().split() for label in figures.ribbon().axes[0].get_yticklabels()]
    assert [int(place) for _, place in labels] == [*range(length), *places.tolist()]


def test_the_kept_pictures_are_those_that_the_command_draws(tmp_path):
    assert {path.stem for path in PICTURES.glob("*.svg")} == {*figures.SCHEMES, *figures.MEASURED}
    for name, draw in figures.SCHEMES.items():
        with mpl.rc_context(figures.STYLE):
            figures.save(draw(), tmp_path / f"{name}.svg")
        drawn, kept = ((folder / f"{name}.svg").read_text(encoding="utf-8") for folder in (tmp_path, PICTURES))
        assert ElementTree.fromstring(kept).tag == "{http://www.w3.org/2000/svg}svg"
        words = r"<!-- (.*) -->|>([^<>]+)</text>"
        assert re.findall(words, drawn) == re.findall(words, kept), "run python -m benchmarks.figures"
