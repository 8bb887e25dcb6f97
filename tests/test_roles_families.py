"""Roles, batches and questions with the real processor of every family."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import chain, groupby
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedModel

from align_ti.config import Evaluation
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.rendering import render
from align_ti.data.roles import INSTRUCTION, OTHER, PER_TOKEN, RESPONSE, VISUAL, encode, image_id
from align_ti.errors import DataError
from align_ti.evaluation.runner import GREEDY, answer
from align_ti.evaluation.tasks import question
from tests.family_processors import FAMILIES, PARTS, llama3_tokenizer, llava, special_ids, thinking

WIDE = Image.effect_noise((14, 6), 60).convert("RGB")
TALL = Image.effect_noise((9, 21), 60).convert("RGB")
SMALL = Image.effect_noise((7, 8), 60).convert("RGB")
PICTURES = (WIDE, TALL, SMALL)

END = {
    "llava-llama3": "<|eot_id|>",
    "llava-vicuna": "</s>",
    "llava-next": "</s>",
    "smolvlm": "<end_of_utterance>",
    "idefics3": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",
}
"""What ends a turn, where it is not ChatML's `<|im_end|>`."""

every_family = pytest.mark.parametrize("family", list(FAMILIES))


@cache
def processor_of(family: str):
    return FAMILIES[family]()


def conversation(*texts: str, system: str = "") -> Conversation:
    turns = [Turn("system", system)] if system else []
    turns += [Turn("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(texts)]
    tags = sum(text.count("<image>") for text in texts)
    return Conversation(tuple(turns), (PICTURES * 2)[:tags], "data.json, record 3")


def runs(sample, processor, role: int) -> list[str]:
    """The decoded text of each stretch of neighbouring tokens of the role."""
    pairs = zip(sample["roles"].tolist(), sample["input_ids"].tolist(), strict=True)
    stretches = [(key, [token for _, token in group]) for key, group in groupby(pairs, key=lambda pair: pair[0])]
    return [processor.tokenizer.decode(tokens) for key, tokens in stretches if key == role]


RECORDS = {
    "one turn": conversation("<image>What is in the picture?", "It is a red bicycle."),
    "several turns": conversation(
        "<image>What is it?", "A river.", "And here?\n<image>", "A road,\n\ntoo.", "Why?", "No."
    ),
    "system prompt": conversation("<image>What is it?", "A river.", system="Be short and kind."),
    "text only": conversation("How many birds are there?", "Three birds.", "And boats?", "Two."),
    "text only, system prompt": conversation("How many?", "Three.", system="Be short."),
    "image last": conversation("What is in the picture?<image>", "A house."),
    "image alone": conversation("<image>", "A house."),
    "image in the middle": conversation("Before <image> behind", "A house."),
    "adjacent images": conversation("<image><image><image>Which?", "The first."),
    "images apart": conversation("One <image>, two <image> and three <image>.", "Yes."),
    "unicode": conversation("<image>Was ist das? 中文 🚲🏳️‍🌈 \u00e9e\u0301", "Ein Rad 🚲, größer als 3\u00a0m. हिन्दी"),
    "blank lines": conversation("<image>\n\nOne.\n\n\nTwo.", "A.\n\n\n\nB.\n \n  C."),
}


def pieces_of(record: Conversation, speaker: str) -> list[str]:
    """The words between images, a turn after the other."""
    parts = [part for turn in record.turns if turn.speaker == speaker for part in turn.text.split("<image>")]
    return [part for part in parts if part]


def same(decoded: list[str], words: list[str], end: str = "") -> None:
    """Each stretch holds its words whole and nothing but blanks beside them.

    A tokenizer may join blanks of the template to words; templates may trim blanks.
    """
    assert all(text.endswith(end) for text in decoded)
    found = [unicodedata.normalize("NFC", text.removesuffix(end)).strip() for text in decoded]
    assert found == [unicodedata.normalize("NFC", text).strip() for text in words if text.strip()]


def check_roles(family: str, record: Conversation) -> None:
    processor = processor_of(family)
    sample = encode(record, processor)
    pictures_first = family == "llava-onevision"
    asked = pieces_of(record, "user")
    decoded = [text for text in runs(sample, processor, INSTRUCTION) if text.strip()]
    if pictures_first:  # the pieces of a turn then follow one another
        assert "".join("".join(decoded).split()) == "".join(unicodedata.normalize("NFC", "".join(asked)).split())
    else:
        same(decoded, asked)
    same(runs(sample, processor, RESPONSE), pieces_of(record, "assistant"), END.get(family, "<|im_end|>"))
    visual = sample["input_ids"] == special_ids(processor)["image"]
    assert torch.equal(sample["roles"] == VISUAL, visual)
    assert torch.equal(sample["labels"] != -100, sample["roles"] == RESPONSE)
    assert int(visual.sum()) == features(family, sample)
    system = "".join(turn.text for turn in record.turns if turn.speaker == "system")
    assert system.strip() in "".join(runs(sample, processor, OTHER))


def features(family: str, sample) -> int:
    """How many features the images give, from what the model is given of them and not from the tokens."""
    if "pixel_values" not in sample:
        return 0
    pixels = sample["pixel_values"]
    if family in {"qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5"}:
        return int(sample["image_grid_thw"].prod(-1).sum()) // 4
    if family in {"smolvlm", "idefics3"}:
        return 4 * int(pixels.flatten(2).any(-1).sum())
    if family in {"llava-next", "llava-onevision"}:
        return anyres_features(family, sample)
    return 4 * len(pixels)


def anyres_features(family: str, sample) -> int:
    """A 2 x 2 base, the tiles' grid cut to the image's shape, and a line end for each of its rows."""
    total = 0
    for height, width in sample["image_sizes"].tolist():
        if family == "llava-onevision" and len(sample["image_sizes"]) > 1:
            total += 4 + 1
            continue
        from transformers.image_processing_utils import select_best_resolution

        grid = processor_of(family).image_processor.image_grid_pinpoints
        best_height, best_width = select_best_resolution((height, width), grid)
        rows, columns = best_height // 4, best_width // 4
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
        total += 4 + rows * columns + rows
    return total


@every_family
@pytest.mark.parametrize("record", list(RECORDS))
def test_words_pictures_and_answers_have_their_roles(family, record):
    check_roles(family, RECORDS[record])


LETTERS = st.characters(exclude_categories=("Cs", "Cc", "Co", "Cn"), exclude_characters="▁\u27e6\u27e7<")
WORDS = st.text(st.one_of(LETTERS, st.sampled_from(" \n\n.a")), min_size=1, max_size=12)
ANSWERS = WORDS.filter(str.strip)


@every_family
@settings(max_examples=8, phases=[Phase.generate])
@given(
    first=WORDS,
    second=WORDS,
    third=ANSWERS,
    answers=st.tuples(ANSWERS, ANSWERS),
    system=st.sampled_from(["", "Be kind. "]),
)
def test_any_words_have_their_roles(family, first, second, third, answers, system):
    record = conversation(f"{first}<image>{second}<image>", answers[0], third, answers[1], system=system)
    check_roles(family, record)


@every_family
def test_words_tell_apart_what_is_beside_them_by_characters(family):
    """Every character of the words lies in a token of their role, counted in the text that the processor tokenizes."""
    processor, record = processor_of(family), RECORDS["several turns"]
    text, words = render(record, processor)
    assert [text[one.start : one.stop].strip() for one in words] == [
        part.strip() for turn in record.turns for part in turn.text.split("<image>") if part
    ]
    assert [one.speaker for one in words] == ["user", "assistant", "user", "assistant", "user", "assistant"]


# --- what stands beside words -----------------------------------------------------------------------------------------


@every_family
def test_the_line_end_behind_a_turn_and_the_frame_of_a_picture_are_other(family):
    processor = processor_of(family)
    sample = encode(RECORDS["adjacent images"], processor)
    ids = special_ids(processor)
    for name in ("image_start", "image_end"):
        if name in ids and ids[name] in sample["input_ids"].tolist():
            assert set(sample["roles"][sample["input_ids"] == ids[name]].tolist()) == {OTHER}
    last = (sample["roles"] == RESPONSE).nonzero().max()
    assert sample["input_ids"][last] == ids["eos"]
    behind = sample["input_ids"][last + 1 :]
    assert not processor.tokenizer.decode(behind).strip()
    assert set(sample["roles"][last + 1 :].tolist()) <= {OTHER}


def test_words_that_merge_with_the_frame_of_a_picture_keep_their_role():
    # Gemma puts line ends around an image and has one token for several of them: the token that holds a line end of the words
    # has the words' role, and no other line end has it.
    processor = FAMILIES["gemma3"]()
    processor.chat_template = processor.chat_template.replace("part['text'] | trim", "part['text']")
    sample = encode(conversation("One.\n<image>\nTwo.", "Three."), processor)
    assert runs(sample, processor, INSTRUCTION) == ["One.\n\n\n", "\n\n\nTwo."]
    apart = encode(conversation("One.<image>Two.", "Three."), processor)
    assert runs(apart, processor, INSTRUCTION) == ["One.", "Two."]
    assert runs(apart, processor, OTHER)[1:3] == ["\n\n<start_of_image>", "<end_of_image>\n\n"]


def test_tokens_of_blanks_alone_keep_their_role():
    # Llama 3 and SmolLM2 leave blanks out of a token's offsets, so a token of blank lines alone stood for no character and an answer's
    # blank lines were neither learned nor counted.
    processor = processor_of("llava-llama3")
    sample = encode(conversation("<image>One.  \n\n  Two.", "A.   \n\n\n   B."), processor)
    assert runs(sample, processor, RESPONSE) == ["A.   \n\n\n   B.<|eot_id|>"]
    assert runs(sample, processor, INSTRUCTION) == ["One.  \n\n  Two."]


def test_a_special_token_that_swallows_blanks_takes_no_words():
    from tokenizers import AddedToken

    tokenizer = llama3_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False, lstrip=True, rstrip=True)])
    processor = llava(tokenizer, processor_of("llava-llama3").chat_template, tower="clip")
    sample = encode(conversation("One  <image>  two", "Three."), processor)
    assert [text.strip() for text in runs(sample, processor, INSTRUCTION)] == ["One", "two"]
    assert int((sample["roles"] == VISUAL).sum()) == 4


def test_a_folded_system_prompt_is_not_the_users():
    processor = processor_of("gemma3")
    sample = encode(conversation("\n<image> Hi ", " Yes ", system="Be short \n"), processor)
    assert runs(sample, processor, INSTRUCTION) == ["Hi"]
    assert "Be short" in "".join(runs(sample, processor, OTHER))


def test_the_image_token_is_the_one_that_features_replace():
    for family in FAMILIES:
        assert image_id(processor_of(family)) == special_ids(processor_of(family))["image"], family


def test_words_that_the_processor_puts_beside_crops_are_other():
    processor = FAMILIES["gemma3"]()
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 2}
    processor.images_kwargs = processor.images_kwargs | crops
    sample = encode(conversation("Here <image> it is", "A river."), processor)
    assert runs(sample, processor, INSTRUCTION) == ["Here", "it is"]
    assert "crops to help you see better" in "".join(runs(sample, processor, OTHER))
    assert len(sample["pixel_values"]) > 1
    assert int((sample["roles"] == VISUAL).sum()) == 4 * len(sample["pixel_values"])


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_pictures_that_are_not_split_have_no_rows(family):
    processor = FAMILIES[family]()
    processor.image_processor.do_image_splitting = False
    sample = encode(conversation("One<image>two<image>", "Three."), processor)
    assert runs(sample, processor, INSTRUCTION) == ["One", "two"]
    assert int((sample["roles"] == VISUAL).sum()) == 4 * sample["pixel_values"].shape[1] == 8


# --- thoughts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava-qwen3", "qwen3.5"])
def test_inserted_thoughts_are_other_and_questions_are_asked_behind_them(family):
    processor = processor_of(family)
    sample = encode(conversation("Hi?", "Yes.", "Why?", "No."), processor)
    assert runs(sample, processor, RESPONSE) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert runs(sample, processor, OTHER)[3].endswith("assistant\n<think>\n\n</think>\n\n")
    asked = encode(conversation("Hi?", "Yes.", "Why?"), processor, train=False, ask=True)
    start = (sample["roles"] == RESPONSE).nonzero()[-3:].min()
    assert processor.tokenizer.decode(asked["input_ids"]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert torch.equal(asked["input_ids"], sample["input_ids"][: len(asked["input_ids"])]) and start >= len(
        asked["input_ids"]
    )


def test_thoughts_that_a_template_takes_out_or_moves_are_refused():
    thoughtful = "<think>\nA wheel?\n</think>\n\nA bicycle."
    for turns in [("<image>What?", thoughtful, "Why?", "No."), ("<image>What?", thoughtful)]:
        with pytest.raises(DataError, match=r"data\.json, record 3: the chat template .*so roles would be guessed"):
            encode(conversation(*turns), processor_of("qwen3.5"))
    # A template that shows words as they are shows thoughts too: they are part of the answer.
    sample = encode(conversation("<image>What?", thoughtful), processor_of("qwen3-vl"))
    assert runs(sample, processor_of("qwen3-vl"), RESPONSE) == [thoughtful + "<|im_end|>"]


def test_a_template_that_asks_otherwise_than_it_teaches_is_refused():
    processor = FAMILIES["qwen3.5"]()
    processor.chat_template = thinking("<|image_pad|>", "<think>\\n").replace("enable_thinking", "never_set")
    with pytest.raises(DataError, match=r"asks for an answer with .*never asked with"):
        encode(conversation("<image>What?", "A river."), processor)


# --- refusals ---------------------------------------------------------------------------------------------------------


def forbidden(family: str) -> list[str]:
    processor = processor_of(family)
    names = [token for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    return [name.content for name in names if name.content != "<image>"]


@every_family
def test_special_tokens_among_words_are_refused(family):
    processor = processor_of(family)
    for index, token in enumerate(forbidden(family)):
        turns = ["What is here?", "A river.", "Why so?", "It flows."]
        turns[index % 4] = turns[index % 4].replace(" ", f" {token}" if index % 3 else token)
        record = conversation(*turns, system=token if index == 5 else "")
        with pytest.raises(DataError, match=r"data\.json, record 3: the words of a .* turn hold .*" + re.escape(token)):
            encode(record, processor)


def test_a_special_token_of_words_and_template_together_is_refused():
    processor = FAMILIES["qwen3-vl"]()
    processor.chat_template = processor.chat_template.replace(
        "parts(message['content']) +", "parts(message['content']) + '|>' +"
    )
    with pytest.raises(DataError, match=r"hold '<\|im_end\|>'"):
        encode(conversation("What?<|im_end", "A river."), processor)


def test_tokens_that_are_matched_whole_but_mean_their_letters_are_words():
    processor = processor_of("qwen3-vl")
    sample = encode(conversation("Write <think>.", "<think> it is."), processor)
    assert runs(sample, processor, RESPONSE) == ["<think> it is.<|im_end|>"]


@every_family
def test_templates_that_leave_pictures_out_or_show_too_many_are_refused(family):
    for shown in ("", "{{- picture ~ picture -}}"):
        processor = FAMILIES[family]()
        placeholder = processor.image_token
        body = (
            PARTS % "PICTURE"
            + "{%- for message in messages -%}{{- parts(message['content']) + eos_token -}}{%- endfor -%}"
        )
        processor.chat_template = body.replace("{{- 'PICTURE' -}}", shown.replace("picture", f"'{placeholder}'"))
        with pytest.raises(
            DataError, match=r"data\.json, record 3: the (processor refuses|text of the chat template has)"
        ):
            encode(conversation("<image>What?", "A river."), processor)


@pytest.mark.parametrize("told", [True, False])
def test_pictures_that_the_text_does_not_show_are_refused_where_the_processor_passes_over_them(told):
    # Some versions of transformers take images without a placeholder and leave them out of the text.
    processor = FAMILIES["llava-llama3"]()
    processor.chat_template = processor.chat_template.replace("'<image>'", "''")
    processor.validate_inputs = lambda **_: None
    if not told:
        processor.get_text_with_replacements = lambda text, *_: (text, None)
    with pytest.raises(
        DataError, match=r"record 3: the text of the chat template has 0 placeholder\(s\) for 1 image\(s\)"
    ):
        encode(conversation("<image>What?", "A river."), processor)


def test_templates_that_fail_or_print_lists_are_refused():
    processor = FAMILIES["qwen3-vl"]()
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"cannot render the record.*roles must alternate"):
        encode(conversation("What?", "A river."), processor)
    processor.chat_template = "{%- for one in messages -%}{{- one['content'] | string + '<|im_end|>' -}}{%- endfor -%}"
    with pytest.raises(DataError, match="prints a turn's list of parts"):
        encode(conversation("What?", "A river."), processor)


def test_a_processor_that_says_nothing_is_followed_where_it_only_repeats_the_image_token(monkeypatch):
    # Processors of transformers before 5.15 do not tell what they put in place of an image.
    told = {
        family: encode(RECORDS["adjacent images"], processor_of(family))
        for family in ("qwen2-vl", "llava-onevision", "internvl")
    }
    for family, expected in told.items():
        processor = FAMILIES[family]()
        call = type(processor).__call__

        def silent(self, *args, call=call, **options):
            options.pop("return_text_replacement_offsets")
            return call(self, *args, **options)

        monkeypatch.setattr(type(processor), "__call__", silent)
        if family == "internvl":
            with pytest.raises(DataError, match="not those of its text with every image in its place"):
                encode(RECORDS["adjacent images"], processor)
        else:
            assert torch.equal(encode(RECORDS["adjacent images"], processor)["roles"], expected["roles"])


@every_family
def test_a_record_that_is_too_long_is_an_error(family):
    processor, record = processor_of(family), RECORDS["adjacent images"]
    length = len(encode(record, processor)["input_ids"])
    assert len(encode(record, processor, length)["input_ids"]) == length
    with pytest.raises(DataError, match=rf"{length} tokens, but max_length is {length - 1}.*response would be cut"):
        encode(record, processor, length - 1)


# --- batches ----------------------------------------------------------------------------------------------------------

MIXED = (
    conversation("<image><image>Which?", "The first."),
    conversation("How many birds are there in all?", "Three birds."),
    conversation("<image>What is in the picture?", "A house."),
)
SOLE = (
    conversation("<image>What?", "A house."),
    conversation("How many?", "Three."),
    conversation("One<image>", "Two."),
)


def called_on_all(processor, records: tuple[Conversation, ...], side: str, *, empty_lists: bool, ask: bool = False):
    """What the processor itself makes of the records in one call."""
    texts = [render(record, processor, ask=ask)[0] for record in records]
    pictures = [record.pictures() for record in records]
    bos = processor.tokenizer.bos_token
    return processor(
        text=texts,
        images=(pictures if empty_lists else list(chain.from_iterable(pictures))) if any(pictures) else None,
        padding=True,
        padding_side=side,
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
    )


EMPTY_LISTS = frozenset({"llava-onevision", "smolvlm", "idefics3", "gemma3"})
"""Families whose processors take images by sample, a sample without any included; the others take them in one list."""


@every_family
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("records", [MIXED, SOLE, MIXED[::-1], MIXED[1:2]], ids=["mixed", "sole", "reversed", "text"])
def test_a_batch_is_what_the_processor_makes_of_all_samples(family, side, records):
    processor = processor_of(family)
    batch = Collator(processor.tokenizer.pad_token_id, side)([encode(record, processor) for record in records])
    expected = dict(called_on_all(processor, records, side, empty_lists=family in EMPTY_LISTS))
    assert batch.keys() - {"roles", "labels", "pictures"} == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


@every_family
def test_a_batch_holds_every_samples_tokens_and_padding_has_no_role(family):
    processor = processor_of(family)
    samples = [encode(record, processor) for record in MIXED]
    for side in ("right", "left"):
        batch = Collator(processor.tokenizer.pad_token_id, side)(samples)
        for index, sample in enumerate(samples):
            real = batch["attention_mask"][index].bool()
            for name in PER_TOKEN & batch.keys():
                assert torch.equal(batch[name][index][real], sample[name]), name
                assert set(batch[name][index][~real].tolist()) <= {0, -100, processor.tokenizer.pad_token_id}


def test_a_sample_without_token_types_is_filled_with_those_of_text():
    processor = processor_of("gemma3")
    samples = [encode(record, processor) for record in MIXED]
    del samples[1]["token_type_ids"]
    batch = Collator(0)(samples)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert not batch["token_type_ids"][1].any() and batch["token_type_ids"][0].any()


def test_pictures_that_a_processor_does_not_fill_up_are_not_filled_up():
    # Zeros beside an image are pixels to a model that is not told of them.
    samples = [
        {name: torch.zeros(3, dtype=torch.long) for name in ("input_ids", "attention_mask", "roles", "labels")}
        | {"pixel_values": torch.ones(1, 3, size, 8)}
        for size in (8, 12)
    ]
    with pytest.raises(DataError, match=r"pixel_values .*\[1, 3, 8, 8\], \[1, 3, 12, 8\].*batch of 1"):
        Collator(0)(samples)


# --- questions --------------------------------------------------------------------------------------------------------


def listening_model(processor, reply: str):
    """A stand-in for a model that answers every question alike and keeps what it was asked."""
    model = Mock(spec=PreTrainedModel, device=torch.device("cpu"), dtype=torch.bfloat16)
    model.config = Mock()
    model.generation_config = SimpleNamespace(eos_token_id=processor.tokenizer.eos_token_id)
    tokens = processor.tokenizer(reply, add_special_tokens=False, return_tensors="pt")["input_ids"]
    end = torch.tensor([[processor.tokenizer.eos_token_id]])

    def generate(**inputs):
        answers = torch.cat([tokens, end], 1).expand(len(inputs["input_ids"]), -1)
        return torch.cat([inputs["input_ids"], answers], 1)

    model.generate = Mock(side_effect=generate)
    return model


@every_family
def test_questions_with_and_without_pictures_are_asked_in_one_batch(family):
    processor = processor_of(family)
    model = listening_model(processor, "A river.")
    questions = [question(record) for record in MIXED]
    given = answer(model, processor, questions, Evaluation(batch_size=3, max_new_tokens=40))
    assert given == [("A river.", False)] * 3
    (call,) = model.generate.call_args_list
    asked = tuple(one.conversation for one in questions)
    expected = dict(called_on_all(processor, asked, "left", empty_lists=family in EMPTY_LISTS, ask=True))
    assert call.kwargs.keys() == expected.keys() | {*GREEDY, "max_new_tokens", "logits_processor"}
    for name, value in expected.items():
        assert torch.equal(call.kwargs[name], value.bfloat16() if value.is_floating_point() else value), name
