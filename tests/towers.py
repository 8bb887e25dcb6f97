"""Tiny vision towers and language models in folders of their own, as the hub holds big ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SIZE, PATCH = 12, 4
PATCHES = (SIZE // PATCH) ** 2
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>")
PHRASES = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers",
    "to the user's questions. USER: ASSISTANT: How many are there? What is it? 7 of them. None. system user assistant",
]

CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

THINKING = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""
"""A hybrid reasoning model's template: an answer has an empty thought in front, a question has none unless asked for."""

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
WORDS = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def larger(model: torch.nn.Module) -> Any:
    """The model with weights that are large enough for distributions to differ clearly from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write_tower(out: Path, kind: str = "siglip", both: bool = False) -> Path:
    """A vision tower, alone or in a checkpoint that holds both towers, with its image processor."""
    torch.manual_seed(1)
    if kind == "siglip":
        pictures = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
        model = (
            SiglipModel(SiglipConfig(vision_config=VISION, text_config={**WORDS, "projection_size": 16}))
            if both
            else SiglipVisionModel(SiglipVisionConfig(**VISION))
        )
    else:
        pictures = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
        model = (
            CLIPModel(CLIPConfig(vision_config=VISION, text_config=WORDS))
            if both
            else CLIPVisionModel(CLIPVisionConfig(**VISION))
        )
    larger(model).save_pretrained(out)
    pictures.save_pretrained(out)
    return out


def tokenizer(eos: str = "<|im_end|>", pad: str | None = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits words and single digits off, as Qwen's does."""
    built = Tokenizer(BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        PHRASES,
        BpeTrainer(vocab_size=380, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token=eos, pad_token=pad)


def text_config(kind: str, rows: int, tied: bool = False) -> Any:
    """The config of a tiny language model."""
    options = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    if kind == "qwen3":
        return Qwen3Config(**options, head_dim=12)
    return {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind](**options)


def write_language_model(
    out: Path,
    kind: str = "qwen2",
    free: int = 6,
    template: str | None = CHATML,
    eos: str = "<|im_end|>",
    pad: str | None = "<|endoftext|>",
    tied: bool = False,
) -> Path:
    """A causal language model with `free` rows of embeddings that no token uses, with its tokenizer and chat template."""
    torch.manual_seed(2)
    words = tokenizer(eos, pad)
    words.chat_template = template
    classes = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM, "llama": LlamaForCausalLM}
    model = larger(classes[kind](text_config(kind, len(words) + free, tied)))
    model.generation_config.eos_token_id = words.convert_tokens_to_ids(["<|endoftext|>"])
    model.save_pretrained(out)
    words.save_pretrained(out)
    return out
