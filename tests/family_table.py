"""The table of docs/families.md, from what the models themselves say and do: `python -m tests.family_table` writes it.

A tiny random model of each family is built from its config, and each term is computed on it. That the values are right is what
tests/test_families.py proves.
"""

from __future__ import annotations

from pathlib import Path

import torch

from align_ti.config import Iva, Kd, Objective, Sft, Tpa
from align_ti.errors import ModelError
from align_ti.models.continuation import own_masks
from align_ti.models.families import (
    full_attention_layers,
    layer_kinds,
    layers_that_cannot_branch,
    position_ids,
    tower,
    visual_tokens_per_picture,
)
from align_ti.models.overrides import Projection
from align_ti.training.objective import distillation_loss
from tests.family_models import COMPOSITIONS, FAMILIES, Family, candidates

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
START, STOP = "<!-- families: start -->", "<!-- families: stop -->"

NAMES = {
    "llava-siglip-qwen3": "LLaVA, SigLIP and Qwen3",
    "llava-siglip-qwen2": "LLaVA, SigLIP and Qwen2",
    "llava-clip-llama": "LLaVA, CLIP and Llama",
    "llava-siglip-mistral": "LLaVA, SigLIP and Mistral",
    "llava-siglip-granite": "LLaVA, SigLIP and Granite",
    "llava-siglip-gemma2": "LLaVA, SigLIP and Gemma 2 (eager)",
    "llava-onevision": "LLaVA-OneVision",
    "qwen2-vl": "Qwen2-VL",
    "qwen2.5-vl": "Qwen2.5-VL",
    "qwen3-vl": "Qwen3-VL",
    "qwen3.5": "Qwen3.5",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "internvl": "InternVL",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "paligemma": "PaliGemma",
}


def columns(family: Family) -> dict[str, str]:
    """What the table says of a family."""
    model, teacher = family.model(1), family.model(2)
    batch = family.batch(COMPOSITIONS[family.compositions[0]])
    inputs = {name: value for name, value in batch.items() if name not in {"roles", "labels"}}
    fixed = visual_tokens_per_picture(model)
    return {
        "visual tokens": "varying" if fixed is None else "fixed",
        "positions": "3 axes" if position_ids(model, inputs).dim() == 3 else "1 axis",
        "attention": attention(model, inputs),
        "logits": logits(model),
        "sft, kd": works(model, teacher, batch, sft=Sft(), kd=Kd()),
        "iva": iva(model, teacher, batch),
        "tpa": tpa(model, teacher, batch),
        "one tower": "no" if tower(model) is None else "yes",
    }


def attention(model, inputs) -> str:
    """The kinds of layers, and whether some tokens attend to later ones."""
    short = {"full_attention": "full", "sliding_attention": "sliding", "linear_attention": "linear"}
    found = ", ".join(short.get(kind, kind) for kind in dict.fromkeys(sorted(layer_kinds(model))))
    ahead = any(mask.triu(1).any() for mask in own_masks(model, inputs).values())
    return f"{found}; {'some tokens attend to later ones' if ahead else 'causal'}"


def logits(model) -> str:
    """Whether logits are the head's output."""
    plain = Projection(model).linear is not None
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return f"{'head output unchanged' if plain else 'capped or scaled'}, {'tied' if tied else 'untied'}"


def works(model, teacher, batch, **terms) -> str:
    """ "yes" if the terms are computed and not zero, else the reason."""
    off = {"sft": Sft(weight=0.0), "kd": Kd(weight=0.0), "iva": Iva(weight=0.0), "tpa": Tpa(weight=0.0)}
    out = distillation_loss(model, teacher, batch, Objective(**{**off, **terms}), candidates(batch))
    assert all(torch.isfinite(value) and value > 0 for value in out.terms.values())
    return "yes"


def iva(model, teacher, batch) -> str:
    """The layers that can be read."""
    layers, kinds = full_attention_layers(teacher), layer_kinds(teacher)
    if not layers:
        return "no: all layers slide"
    works(model, teacher, batch, iva=Iva(layer=layers[0]))
    return "all layers" if len(layers) == len(kinds) else "full-attention layers"


def tpa(model, teacher, batch) -> str:
    """The forms that candidates can be tried in."""
    try:
        return ", ".join(form for form in ("reuse", "packed") if works(model, teacher, batch, tpa=Tpa(form=form)))
    except ModelError:
        return (
            f"no: {', '.join(sorted(set(layers_that_cannot_branch(model).values()))).replace('_', ' ')} keeps one state"
        )


def table() -> str:
    """The table in Markdown."""
    rows = {NAMES[name]: columns(family) for name, family in FAMILIES.items()}
    names = list(next(iter(rows.values())))
    lines = [f"| family | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {name} | {' | '.join(row[column] for column in names)} |" for name, row in rows.items()]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table in its place."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{table()}\n\n{STOP}{rest.split(STOP)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
