"""What a batch, a loss and a plan look like in a notebook: nothing of them can become markup."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch.utils.data import DataLoader

from align_ti.config import Recipe
from align_ti.data.batch import Batch
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.roles import ROLE_NAMES, encode
from align_ti.digits.models import IMAGE_TOKENS, build_processor
from align_ti.notebooks import PAINTS, table
from align_ti.planning.memory import Layout, Memory
from align_ti.planning.plan import NOTHING_FITS, Advice, Case, Plan
from align_ti.planning.step import Batch as PlannedBatch
from align_ti.planning.traffic import Traffic
from align_ti.training.objective import DistillationOutput
from tests.test_data import PICTURE

PROCESSOR = build_processor()


def sample(words: str = "Read every digit.") -> dict[str, torch.Tensor]:
    turns = (Turn("user", f"<image>{words}"), Turn("assistant", "Top left red one."))
    return encode(Conversation(turns, (PICTURE,)), PROCESSOR)


def text_of(html: str) -> str:
    """What a reader sees, without the colours."""
    return " ".join(re.sub("<[^>]*>", " ", html).split())


def test_a_batch_shows_each_span_with_its_role_in_words_and_colour():
    html = Collator(0, tokenizer=PROCESSOR.tokenizer)([sample()])._repr_html_()
    text = text_of(html)
    assert "instruction 4 Read every digit." in text
    assert f"visual {IMAGE_TOKENS} [{IMAGE_TOKENS} visual tokens]" in text
    assert "response 6 Top left red one.&lt;|end|&gt;" in text
    assert "pixel_values [1, 3, 48, 48] torch.float32" in text
    assert set(PAINTS) == set(ROLE_NAMES)
    assert all(PAINTS[role] in html for role in ("other", "visual", "instruction", "response"))


SPANS = ["other", "visual", "instruction", "other", "response"]


def test_without_a_tokenizer_tokens_are_numbers_and_padding_is_left_out():
    one, two = sample(), sample("Read every digit, or only the red one.")
    html = Collator(0)([one, two])._repr_html_()
    instruction = one["input_ids"][one["roles"] == 2].tolist()
    assert f"instruction {len(instruction)} {' '.join(map(str, instruction))} other" in text_of(html)
    # Padding would be other tokens behind the shorter sample's response.
    assert re.findall(r"<b>([a-z]+) \d+</b>", html) == [*SPANS, *SPANS]
    assert "and 2 more samples" in text_of(Collator(0)([one] * 10)._repr_html_())


def test_the_batch_of_a_teacher_of_its_own_is_shown_too():
    html = Collator(0)([{**sample(), "teacher": sample("Read it.")}])._repr_html_()
    assert re.findall(r"<b>([a-z]+) \d+</b>", html) == [*SPANS, *SPANS]
    assert "what the teacher reads:" in html


def test_words_and_names_are_no_markup(monkeypatch):
    hostile = "<script>alert('x')</script>"
    monkeypatch.setattr(PROCESSOR.tokenizer, "decode", lambda ids: hostile + "\x1b[31m")
    batch = Collator(0, tokenizer=PROCESSOR.tokenizer)([sample()])
    one = torch.ones(())
    output = DistillationOutput(one, {hostile: one}, {hostile: one}, {hostile: one}, None, {hostile: 1.0})
    for html in (
        batch._repr_html_(),
        output._repr_html_(),
        plan(hostile)._repr_html_(),
        table([hostile], [[hostile]], hostile),
    ):
        assert "<script" not in html and "\x1b" not in html
        assert "&lt;script&gt;alert(&#x27;x&#x27;)" in html


def test_a_batch_stays_a_dict_and_leaves_its_tokenizer_behind():
    batch = Collator(0, tokenizer=PROCESSOR.tokenizer)([sample()])
    assert isinstance(batch, dict) and batch.tokenizer is PROCESSOR.tokenizer
    for made in (pickle.loads(pickle.dumps(batch)), copy.copy(batch)):
        assert type(made) is Batch and made.tokenizer is None and made.keys() == batch.keys()
    assert len(pickle.dumps(batch)) < 2 * sum(value.nbytes for value in batch.values()) + 10_000
    loaded = next(iter(DataLoader([sample()], collate_fn=Collator(0), num_workers=1)))
    assert type(loaded) is Batch and "field" in loaded._repr_html_()


def test_the_loss_shows_its_terms_with_their_weights():
    two, four = torch.tensor(2.0), torch.tensor(4.0)
    terms, masses = {"sft": torch.tensor(0.5)}, {"sft": four}
    output = DistillationOutput(torch.tensor(1.5), terms, {"sft": two}, masses, torch.tensor(0.125), {"sft": 3.0})
    text = text_of(output._repr_html_())
    assert "term unweighted weight weighted total mass sft 0.5 3 1.5 2 4 loss 1.5" in text
    assert "12.5% of the candidates needed a row of their own." in text


def plan(assumed: str = "every record has 64 tokens", first: str | None = "training.bf16: true") -> Plan:
    recipe = Recipe.model_validate(
        {"out": "run", "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train": "d"}}
    )
    layout = Layout(engine="ddp", devices=2)
    case = Case(recipe=recipe, batch=PlannedBatch(records=1, tokens=64, visual=16, response=8), layout=layout)
    advice = (Advice("training.bf16: true", 1_500_000_000, first is not None),)
    memory = Memory({"activations": 1_000_000_000, "teacher": 2_000_000_000})
    return Plan(case, memory, Traffic({"gradients": 500_000_000}), (assumed,), advice, first)


@pytest.mark.parametrize(
    ("first", "last"), [("training.bf16: true", "change first: training.bf16: true."), (None, NOTHING_FITS)]
)
def test_a_plan_shows_what_the_command_prints(first, last):
    text = text_of(plan(first=first)._repr_html_())
    assert "memory per device: ddp, 2 device(s) component GB teacher 2.000 activations 1.000 total 3.000" in text
    assert "sent per device and optimizer step data GB gradients 0.500" in text
    assert "assumed: every record has 64 tokens." in text
    assert f"training.bf16: true 1.500 1.500 {'yes' if first else 'no'}" in text
    assert text.endswith(last)
