"""Chat templates that place images, and the check that one can be trained on."""

from __future__ import annotations

from PIL import Image
from transformers import LlavaConfig, ProcessorMixin

from align_ti.data.conversation import Conversation, Turn
from align_ti.data.rendering import messages
from align_ti.data.roles import RESPONSE, VISUAL, encode
from align_ti.errors import DataError, ModelError

PICTURES = """{#- Content in parts becomes text: <image> for an image, and a line break between it and what follows. -#}
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is not iterable -%}
{%- set plain.messages = plain.messages + [message] -%}
{%- else -%}
{%- set words = namespace(text='', after_picture=false) -%}
{%- for part in message['content'] -%}
{%- set piece = '<image>' if part['type'] == 'image' else part['text'] -%}
{%- if words.after_picture -%}
{%- set piece = piece if piece[:1] == '\\n' else '\\n' + piece -%}
{%- endif -%}
{%- set words.text = words.text + piece -%}
{%- set words.after_picture = part['type'] == 'image' -%}
{%- endfor -%}
{%- set plain.messages = plain.messages + [dict(message, content=words.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""
"""Put before a template that knows text alone, it makes one that places images."""

WITHOUT_THINKING = "{%- set enable_thinking = enable_thinking | default(false) -%}\n"
"""Put before the template of a hybrid reasoning model: asked and trained in the same form, without thoughts."""

VICUNA = """{{- (messages[0]['content'] if messages[0]['role'] == 'system' else 'A chat between a curious user and an artificial \
intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions.') + ' ' -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}
{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' + message['content'] + END -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"""


def vicuna(end: str) -> str:
    """The form of LLaVA-1.5 and of the paper's authors, each answer ended by the given special token."""
    return PICTURES + VICUNA.replace("END", repr(end))


def with_pictures(template: str) -> str:
    """A language model's own template, extended to place images."""
    return (WITHOUT_THINKING if "enable_thinking" in template else "") + PICTURES + template


def check_template(processor: ProcessorMixin, config: LlavaConfig, name: str) -> int:
    """The token that ends an answer, after encoding sample conversations as training does.

    Raises:
        ModelError: the template does not let roles be told apart, ends an answer without a special token, asks in another form
            than it shows answers in, or processor and tower do not agree on an image.
    """
    picture = Image.new("RGB", (40, 30), (90, 120, 30))
    asked, answered = Turn("user", "<image>\nHow many are there?"), Turn("assistant", "7 of them")
    more = (Turn("user", "And here?\n<image>"), Turn("assistant", "None."))
    single = Conversation((asked, answered), (picture,), place=name)
    double = Conversation((asked, answered, *more), (picture, picture), place=name)
    try:
        samples = [encode(single, processor), encode(double, processor)]
    except DataError as error:
        raise ModelError(f"{error} (--chat-template names another one: a file, or vicuna).") from error
    for count, sample in enumerate(samples, start=1):
        visual = int((sample["roles"] == VISUAL).sum())
        if visual != count * config.image_seq_length:
            raise ModelError(
                f"{name}: {count} image(s) became {visual} visual tokens; {config.image_seq_length} each are accepted, as the tower "
                "gives them; the chat template must show every image once as <image>, in order."
            )
    size = getattr(config.vision_config, "image_size", None)
    if tuple(samples[0]["pixel_values"].shape[-2:]) != (size, size):
        raise ModelError(
            f"{name}: the image processor makes images of {tuple(samples[0]['pixel_values'].shape[-2:])} pixels, the tower reads "
            f"{size} x {size}; fix preprocessor_config.json in the tower's folder."
        )
    check_prompt(single, processor, name)
    return int(samples[0]["input_ids"][samples[0]["roles"] == RESPONSE][-1])


def check_prompt(conversation: Conversation, processor: ProcessorMixin, name: str) -> None:
    """Refuse a template that asks for an answer in another form than it shows one in: trained on one, the model is asked in the other.

    Raises:
        ModelError: what stands before the answer is not the generation prompt.
    """
    shown: str = processor.apply_chat_template(messages(conversation), tokenize=False)
    prompt: str = processor.apply_chat_template(messages(conversation)[:-1], tokenize=False, add_generation_prompt=True)
    answer = conversation.turns[-1].text
    if not (shown.startswith(prompt) and shown[len(prompt) :].lstrip().startswith(answer)):
        before = shown[: shown.find(answer)]
        raise ModelError(
            f"{name}: the chat template asks for an answer with {prompt[-40:]!r}, but shows answers behind {before[-40:]!r}; one form "
            "is accepted, or the model is trained in one and asked in the other; name another template (--chat-template)."
        )
