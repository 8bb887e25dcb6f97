"""Every family from records to terms: its real processor, a tiny random model, and a plain loop over records that are read alone.

Two models with processors of their own are compared through the same records.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from torch import Tensor

from align_ti.config import Iva, Kd, Sft, Tpa
from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.roles import RESPONSE, encode, image_id, model_inputs
from align_ti.models.families import end_tokens, full_attention_layers, image_token
from align_ti.models.pairing import pair_up, reads_the_same
from align_ti.training.objective import distillation_loss
from tests import family_models, family_processors
from tests.family_plain import kl
from tests.test_objective_twins import only

MODELS = {
    "llava-llama3": "llava-clip-llama",
    "llava-vicuna": "llava-clip-llama",
    "llava-qwen2": "llava-siglip-qwen2",
    "llava-qwen3": "llava-siglip-qwen3",
    "llava-onevision": "llava-onevision",
    "qwen2-vl": "qwen2-vl",
    "qwen2.5-vl": "qwen2.5-vl",
    "qwen3-vl": "qwen3-vl",
    "qwen3.5": "qwen3.5",
    "smolvlm": "smolvlm",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "gemma3": "gemma3",
}
"""The model that goes with each processor."""

CLOSE = 1e-6
"""Relative tolerance: some layers compute in float32 whatever the model's precision, and in a batch rows have other shapes."""


def picture(seed: int, size: tuple[int, int] = (20, 12)) -> Image.Image:
    pixels = torch.randint(
        0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


def records() -> list[Conversation]:
    """Two turns, two pictures, and one record without any."""
    return [
        Conversation(
            (
                Turn("user", "<image>how many?"),
                Turn("assistant", "two"),
                Turn("user", "and red"),
                Turn("assistant", "one red"),
            ),
            (picture(0),),
        ),
        Conversation((Turn("user", "say it"), Turn("assistant", "it is so"))),
        Conversation(
            (Turn("user", "<image><image>the same?"), Turn("assistant", "no")), (picture(1), picture(2, (12, 20)))
        ),
    ]


def tiny_model(name: str, processor, seed: int, **sizes):
    """A model of the family with the ids of the processor."""
    ids = family_processors.special_ids(processor)
    given = {
        "image": "image",
        "image_start": "start",
        "image_end": "stop",
        "video": "video",
        "eos": "eos",
        "pad": "pad",
    }
    known = {ours: ids[theirs] for theirs, ours in given.items() if theirs in ids}
    known["image"] = image_id(processor)
    known["vocabulary"] = -(-ids["vocabulary"] // 8) * 8
    return family_models.FAMILIES[MODELS[name]].model(
        seed, ids=dataclasses.replace(family_models.IDS, **known), **sizes
    )


def rows(model, sample: dict[str, Tensor], ids: Tensor | None = None) -> Tensor:
    """The logits after every token of one record, read alone by the model's own forward: [seq, vocab]."""
    inputs = model_inputs(Collator(0)([sample]))
    return model(**{**inputs, "input_ids": inputs["input_ids"] if ids is None else ids}).logits[0]


def responses(sample: dict[str, Tensor]) -> list[int]:
    return (sample["roles"] == RESPONSE).nonzero().flatten().tolist()


def plain_kd(student, teacher, ours: list, theirs: list, tokens) -> float:
    values = []
    for one, other in zip(ours, theirs, strict=True):
        mine, its = rows(student, one), rows(teacher, other)
        for step, place in zip(responses(one), responses(other), strict=True):
            values.append(kl(its[place - 1], mine[step - 1], tokens=tokens))
    return torch.stack(values).mean().item()


def plain_tpa(
    student, teacher, ours: list, theirs: list, tokens, tried: list[list[list[int]]], left_out: set[int]
) -> float:
    values = []
    for one, other, lists in zip(ours, theirs, tried, strict=True):
        for step, place, candidates in zip(responses(one), responses(other), lists, strict=True):
            found = []
            for token in candidates:
                if token not in left_out:
                    mine, its = one["input_ids"][None].clone(), other["input_ids"][None].clone()
                    mine[0, step] = its[0, place] = token
                    found.append(kl(rows(teacher, other, its)[place], rows(student, one, mine)[step], tokens=tokens))
            if found:
                values.append(torch.stack(found).mean())
    return torch.stack(values).mean().item()


def some_candidates(samples: list, tokens: int) -> list[list[list[int]]]:
    """For each response token of each record itself, and two others."""
    random = torch.Generator().manual_seed(0)
    return [
        [
            [int(one["input_ids"][step]), *torch.randint(0, tokens, (2,), generator=random).tolist()]
            for step in responses(one)
        ]
        for one in samples
    ]


def compare(student, teacher, processor, teacher_processor, terms: dict) -> None:
    """Terms of the batch through processors, dataset and collator equal the loops over records."""
    data = EncodedConversations(records(), processor)
    if teacher_processor is not None:
        data.teacher = EncodedConversations(records(), teacher_processor)
    pad = processor.tokenizer.pad_token_id
    collate = Collator(
        pad, teacher_pad_token=None if teacher_processor is None else teacher_processor.tokenizer.pad_token_id
    )
    batch = collate([data[index] for index in range(len(data))])
    pairing = pair_up(student, teacher, processor, teacher_processor)
    ours = [encode(one, processor) for one in records()]
    theirs = ours if teacher_processor is None else [encode(one, teacher_processor) for one in records()]
    known = min(len(processor.tokenizer), len((teacher_processor or processor).tokenizer))
    tried = some_candidates(ours, known)
    candidates = batch["input_ids"][..., None].repeat(1, 1, 3)
    candidates[batch["roles"] == RESPONSE] = torch.tensor([tokens for lists in tried for tokens in lists])
    out = distillation_loss(student, teacher, batch, only(**terms), candidates, pairing=pairing)
    left_out = {*end_tokens(student), image_token(student), *pairing.unshared(100_000)}
    with torch.no_grad():
        kd = plain_kd(student, teacher, ours, theirs, pairing.shared)
        assert out.terms["kd"].item() == pytest.approx(kd, rel=CLOSE)
        if "tpa" in terms:
            tpa = plain_tpa(student, teacher, ours, theirs, pairing.shared, tried, left_out)
            assert out.terms["tpa"].item() == pytest.approx(tpa, rel=CLOSE)
    assert all(torch.isfinite(value) and value > 0 for value in out.terms.values())


@pytest.mark.parametrize("name", list(MODELS))
def test_records_become_the_terms_of_the_family(name):
    processor = family_processors.FAMILIES[name]()
    student, teacher = tiny_model(name, processor, 1), tiny_model(name, processor, 2, hidden=48, layers=3)
    terms = {"sft": Sft(), "kd": Kd(), "iva": Iva(layer=full_attention_layers(teacher)[0])}
    if name != "qwen3.5":
        terms["tpa"] = Tpa()
    compare(student, teacher, processor, None, terms)


CROSSED = [("internvl", "qwen2.5-vl"), ("qwen2-vl", "llava-qwen2"), ("llava-qwen2", "llava-onevision")]
"""Student and teacher of one tokenizer, with processors of their own."""


@pytest.mark.parametrize(("name", "teacher_name"), CROSSED)
def test_two_families_are_compared_through_the_same_records(name, teacher_name):
    processors = family_processors.of_one_tokenizer()
    processor, other = processors[name], processors[teacher_name]
    assert not reads_the_same(processor, other)
    student, teacher = tiny_model(name, processor, 1), tiny_model(teacher_name, other, 2, hidden=48, layers=3)
    compare(student, teacher, processor, other, {"kd": Kd(), "tpa": Tpa()})
