"""The benchmark's models: real LLaVA models (SigLIP tower, MLP projector, Qwen3 language model), only small."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from align_ti.digits.questions import all_phrases
from align_ti.digits.scenes import SIZE
from align_ti.models import llava

PATCH = 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
SPECIALS = ("<pad>", "<image>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageSize:
    """The size of a language model."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int


TEACHER = LanguageSize(hidden=144, layers=5, heads=6, feed_forward=432)
STUDENT = LanguageSize(hidden=48, layers=3, heads=4, feed_forward=128)
LARGE = LanguageSize(hidden=136, layers=4, heads=4, feed_forward=428)
"""A student of 3.5 times as many parameters, tower included, which is not shipped (docs/quality.md)."""


def tower_config() -> SiglipVisionConfig:
    """The vision tower that teacher and student share, frozen."""
    return SiglipVisionConfig(
        hidden_size=80,
        intermediate_size=240,
        num_hidden_layers=4,
        num_attention_heads=5,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the benchmark's phrases; any other text still has tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=640,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_phrases(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        extra_special_tokens=[token for token in SPECIALS if token not in {"<pad>", "<|end|>"}],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer, image preparation and chat template as one real LLaVA processor."""
    pictures = SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return llava.build_processor(
        pictures, build_tokenizer(), vision=tower_config(), strategy="full", chat_template=CHAT_TEMPLATE
    )


def build_model(size: LanguageSize, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA model of the given size with fresh weights."""
    ids = tokenizer.get_vocab()
    end, pad = ids["<|end|>"], ids["<pad>"]
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=None,
    )
    config = llava.build_config(tower_config(), text, image_token=ids["<image>"], feature_layer=-1, strategy="full")
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, max_new_tokens=48, do_sample=False)
    return model
