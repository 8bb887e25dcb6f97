"""Real processors of every family, tiny and made offline: real classes, small images, and each family's chat conventions.

Tokenizers are trained here on a few sentences; images are a few pixels wide; the templates behave as the published ones do
(default system prompts, trimming, folded system prompts, think blocks). Video processors need torchvision, which the tests do
without: the processor is constructed as ever, only its check of that one argument is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import transformers.models.smolvlm.processing_smolvlm as smolvlm
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

CORPUS = (
    "What is in the picture? It is a red bicycle in front of the old house.",
    "Read every digit.\n\nTop left: seven.\nBottom right: two.",
    "How many birds are there? There are three birds  and two boats.",
    "Describe both pictures. The first one shows a river, the second one a road.",
    "system\nuser\nassistant\nmodel USER: ASSISTANT: User: Assistant: You are a helpful assistant.",
)

SIDE = 8
"""Pixels along one side of a tile, in every family."""

WORD = Regex(r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def byte_level(special: list[str], plain: tuple[str, ...] = (), *, nfc: bool = False, trim: bool = False, **names: Any):
    """A byte-level BPE as Qwen and Llama 3 have it. `trim` leaves blanks out of the offsets, as Llama 3 and SmolLM2 do."""
    tokenizer = Tokenizer(BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORD, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    begin = names.get("bos_token")
    finish(tokenizer, special, plain)
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if begin is not None:
        steps.append(begins_with(tokenizer, begin))
    tokenizer.post_processor = processors.Sequence(steps)
    return wrap(tokenizer, **names)


def byte_fallback(special: list[str], plain: tuple[str, ...] = (), *, prefix: bool, **names: Any):
    """A BPE with blanks as "▁" and bytes for what it does not know, as Llama 2 (with a prefix) and Gemma have it."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learner.train_from_iterator(CORPUS, BpeTrainer(vocab_size=200, show_progress=False))
    state = json.loads(learner.to_str())["model"]
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for token in sorted(state["vocab"], key=state["vocab"].get):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else blanks
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    finish(tokenizer, special, plain)
    tokenizer.post_processor = begins_with(tokenizer, names["bos_token"])
    return wrap(tokenizer, **names)


def finish(tokenizer: Tokenizer, special: list[str], plain: tuple[str, ...]) -> None:
    """Special tokens, and tokens that are matched whole but are plain words."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])


def begins_with(tokenizer: Tokenizer, token: str) -> processors.TemplateProcessing:
    """Puts the token in front where special tokens are asked for."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def wrap(tokenizer: Tokenizer, **names: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **names
    )


QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def qwen_tokenizer(*more: str, **names: Any) -> PreTrainedTokenizerFast:
    return byte_level(
        QWEN_SPECIAL + list(more),
        ("<think>", "</think>"),
        nfc=True,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        **names,
    )


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>"],
        trim=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<pad>",
    )


def llama2_tokenizer() -> PreTrainedTokenizerFast:
    return byte_fallback(
        ["<s>", "</s>", "<image>", "<pad>"], prefix=True, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def smol_tokenizer() -> PreTrainedTokenizerFast:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", "<pad>"]
    return byte_level(special + places, trim=True, eos_token="<end_of_utterance>", pad_token="<pad>")


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    pictures = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return byte_fallback(
        [*special, *pictures.values()],
        ("\n\n", "\n\n\n", "\n\n\n\n"),
        prefix=False,
        bos_token="<bos>",
        eos_token="<end_of_turn>",
        pad_token="<pad>",
        extra_special_tokens=pictures,
    )


# --- chat templates ---------------------------------------------------------------------------------------------------

PARTS = """
{%%- macro parts(content) -%%}
{%%- if content is string -%%}{{- content -}}
{%%- else -%%}{%%- for part in content -%%}
{%%- if part['type'] == 'image' -%%}{{- '%s' -}}{%%- else -%%}{{- part['text'] -}}{%%- endif -%%}
{%%- endfor -%%}{%%- endif -%%}
{%%- endmacro -%%}"""
"""The words and images of one turn, in reading order."""


def chatml(picture: str, default_system: str = "") -> str:
    """ChatML; a default system prompt stands where none is given."""
    return (
        PARTS % picture
        + "{%- for message in messages -%}"
        + (
            "{%- if loop.first and message['role'] != 'system' -%}"
            f"{{{{- '<|im_start|>system\\n{default_system}<|im_end|>\\n' -}}}}"
            "{%- endif -%}"
            if default_system
            else ""
        )
        + "{{- '<|im_start|>' + message['role'] + '\\n' + parts(message['content']) + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


def thinking(picture: str, opened: str = "") -> str:
    """ChatML whose last answer shows its thoughts, empty ones too, while earlier answers lose theirs (Qwen3, Qwen3.5).

    `opened` is what the prompt for an answer opens where thinking is not switched off.
    """
    return (
        PARTS % picture + "{%- set last = namespace(query=0) -%}"
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set last.query = loop.index0 -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- for message in messages -%}"
        "{%- set content = parts(message['content']) | trim -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- set thoughts = '' -%}"
        "{%- if '</think>' in content -%}"
        "{%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}"
        "{%- endif -%}"
        "{%- if loop.index0 > last.query -%}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' -}}{%- endif -%}"
        "{%- endif -%}"
        "{{- content + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
        "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}"
        f"{{%- else -%}}{{{{- '{opened}' -}}}}{{%- endif -%}}"
        "{%- endif -%}"
    )


IMAGES_FIRST = """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + ' ' -}}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- '\\n' + part['text'] -}}{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
"""LLaVA-OneVision: the images of a turn in front of its words."""

LLAMA3 = (
    PARTS % "<image>"
    + """
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + parts(message['content']) | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""
)

VICUNA = (
    PARTS % "<image>\\n"
    + """
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- parts(message['content']) + ' ' -}}
{%- elif message['role'] == 'user' -%}{{- 'USER: ' + parts(message['content']) + ' ' -}}
{%- else -%}{{- 'ASSISTANT: ' + parts(message['content']) + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"""
)

INST = (
    PARTS % "<image>\\n"
    + """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- '<<SYS>>\\n' + parts(message['content']) + '\\n<</SYS>>\\n\\n' -}}
{%- elif message['role'] == 'user' -%}{{- '[INST] ' + parts(message['content']) + ' [/INST]' -}}
{%- else -%}{{- ' ' + parts(message['content']) + eos_token -}}{%- endif -%}
{%- endfor -%}"""
)

UTTERANCES = """
{{- '<|im_start|>' -}}
{%- for message in messages -%}
{{- message['role'] | capitalize -}}
{%- if message['content'][0]['type'] == 'image' -%}{{- ':' -}}{%- else -%}{{- ': ' -}}{%- endif -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""
"""SmolVLM and Idefics3: a blank behind the speaker unless an image comes first."""

GEMMA = """
{{- bos_token -}}
{%- set folded = namespace(words='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set folded.words = message['content'][0]['text'] + '\\n\\n' -%}
{%- else -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + folded.words -}}
{%- set folded.words = '' -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<start_of_image>' -}}{%- else -%}{{- part['text'] | trim -}}{%- endif -%}
{%- endfor -%}
{{- '<end_of_turn>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""
"""Gemma 3: the system prompt is folded into the first user turn, every piece of text is trimmed."""

QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
HELPFUL = "You are a helpful assistant."


# --- processors -------------------------------------------------------------------------------------------------------


@contextmanager
def without_video() -> Iterator[None]:
    """Processors may be constructed without a video processor, and SmolVLM's without the package that reads frame counts out."""
    check = ProcessorMixin.check_argument_for_proper_class

    def checked(self: ProcessorMixin, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else check(self, name, argument)

    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", checked),
        mock.patch.object(smolvlm, "num2words", smolvlm.num2words or str),
    ):
        yield


NO_VIDEO = SimpleNamespace(num_frames=1, fps=1, model_input_names=[])
"""Stands where SmolVLM's processor reads two numbers for videos even if there is none."""


def clip() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def siglip() -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})


def llava(tokenizer: PreTrainedTokenizerFast, template: str, *, tower: str) -> LlavaProcessor:
    has_class_token = tower == "clip"
    return LlavaProcessor(
        image_processor=clip() if has_class_token else siglip(),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default" if has_class_token else "full",
        num_additional_image_tokens=int(has_class_token),
        chat_template=template,
    )


def llava_next() -> LlavaNextProcessor:
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    return LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=llama2_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=INST,
    )


def llava_onevision(tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaOnevisionProcessor:
    pictures = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16]]
    )
    with without_video():
        return LlavaOnevisionProcessor(
            image_processor=pictures,
            tokenizer=tokenizer or qwen_tokenizer("<image>", "<video>"),
            video_processor=None,
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            chat_template=IMAGES_FIRST,
        )


def qwen_vl(
    kind: type[ProcessorMixin], template: str, tokenizer: PreTrainedTokenizerFast | None = None
) -> ProcessorMixin:
    pictures = Qwen2VLImageProcessorPil(patch_size=2, merge_size=2, size={"shortest_edge": 32, "longest_edge": 96})
    with without_video():
        tokenizer = tokenizer or qwen_tokenizer()
        return kind(image_processor=pictures, tokenizer=tokenizer, video_processor=None, chat_template=template)


def smolvlm_processor() -> SmolVLMProcessor:
    pictures = SmolVLMImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": SIDE})
    with without_video():
        return SmolVLMProcessor(
            image_processor=pictures,
            tokenizer=smol_tokenizer(),
            video_processor=NO_VIDEO,
            image_seq_len=4,
            chat_template=UTTERANCES,
        )


def idefics3() -> Idefics3Processor:
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": SIDE})
    return Idefics3Processor(
        image_processor=pictures, tokenizer=smol_tokenizer(), image_seq_len=4, chat_template=UTTERANCES
    )


INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def internvl(tokenizer: PreTrainedTokenizerFast | None = None) -> InternVLProcessor:
    pictures = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_patches=3)
    with without_video():
        return InternVLProcessor(
            image_processor=pictures,
            tokenizer=tokenizer or qwen_tokenizer(*INTERNVL_NAMES.values(), extra_special_tokens=INTERNVL_NAMES),
            video_processor=None,
            image_seq_length=4,
            chat_template=chatml("<IMG_CONTEXT>\\n"),
        )


def gemma3() -> Gemma3Processor:
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=gemma_tokenizer(),
        image_seq_length=4,
        chat_template=GEMMA,
    )


def of_one_tokenizer() -> dict[str, ProcessorMixin]:
    """Processors of different families around one tokenizer that has the special tokens of all of them."""

    def tokenizer() -> PreTrainedTokenizerFast:
        return qwen_tokenizer("<image>", *INTERNVL_NAMES.values(), extra_special_tokens=INTERNVL_NAMES)

    return {
        "internvl": internvl(tokenizer()),
        "qwen2-vl": qwen_vl(Qwen2VLProcessor, chatml(QWEN_PICTURE, HELPFUL), tokenizer()),
        "qwen2.5-vl": qwen_vl(Qwen2_5_VLProcessor, chatml(QWEN_PICTURE, HELPFUL), tokenizer()),
        "llava-qwen2": llava(tokenizer(), chatml("<image>\\n", HELPFUL), tower="siglip"),
        "llava-onevision": llava_onevision(tokenizer()),
    }


FAMILIES: dict[str, Callable[[], ProcessorMixin]] = {
    "llava-llama3": lambda: llava(llama3_tokenizer(), LLAMA3, tower="clip"),
    "llava-vicuna": lambda: llava(llama2_tokenizer(), VICUNA, tower="clip"),
    "llava-qwen2": lambda: llava(qwen_tokenizer("<image>"), chatml("<image>\\n", HELPFUL), tower="siglip"),
    "llava-qwen3": lambda: llava(qwen_tokenizer("<image>"), thinking("<image>"), tower="siglip"),
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "qwen2-vl": lambda: qwen_vl(Qwen2VLProcessor, chatml(QWEN_PICTURE, HELPFUL)),
    "qwen2.5-vl": lambda: qwen_vl(Qwen2_5_VLProcessor, chatml(QWEN_PICTURE, HELPFUL)),
    "qwen3-vl": lambda: qwen_vl(Qwen3VLProcessor, chatml(QWEN_PICTURE)),
    "qwen3.5": lambda: qwen_vl(Qwen3VLProcessor, thinking(QWEN_PICTURE, "<think>\\n")),
    "smolvlm": smolvlm_processor,
    "idefics3": idefics3,
    "internvl": internvl,
    "gemma3": gemma3,
}
"""A fresh processor of each family."""

SPECIAL = {
    "image": ("<image_soft_token>", "<IMG_CONTEXT>", "<image>", "<|image_pad|>"),
    "image_start": ("<start_of_image>", "<img>", "<|vision_start|>", "<fake_token_around_image>"),
    "image_end": ("<end_of_image>", "</img>", "<|vision_end|>", "<fake_token_around_image>"),
    "video": ("<video>", "<|video_pad|>"),
}
"""Names of special tokens over the families; the first that a tokenizer has is its own."""


def special_ids(processor: ProcessorMixin) -> dict[str, int]:
    """The ids that a model's config needs, by name: `image`, `image_start`, `image_end` and `video` where the family has them,
    `eos`, `pad`, `bos` where there is one, and `vocabulary`, the number of ids."""
    tokenizer = processor.tokenizer
    ids = tokenizer.get_vocab()
    found = {name: next((ids[token] for token in tokens if token in ids), None) for name, tokens in SPECIAL.items()}
    found |= {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id}
    return {name: value for name, value in found.items() if value is not None} | {"vocabulary": len(tokenizer)}
