"""A LLaVA model from parts: the parts unchanged, loadable by plain transformers, ready to be trained."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from align_ti.checkpoints.compose import compose
from align_ti.checkpoints.templates import PICTURES
from align_ti.cli import app
from align_ti.config import Composition, Recipe
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.roles import INSTRUCTION, RESPONSE, VISUAL, encode
from align_ti.errors import ConfigError, ModelError, RunError
from align_ti.pipeline.parts import load_parts
from tests import towers


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """One folder for each kind of tower and language model."""
    root = tmp_path_factory.mktemp("parts")
    for kind in ("siglip", "clip"):
        towers.write_tower(root / kind, kind)
        towers.write_tower(root / f"{kind}-both", kind, both=True)
    towers.write_language_model(root / "qwen2")
    towers.write_language_model(root / "qwen3", "qwen3", template=towers.THINKING, tied=True)
    towers.write_language_model(root / "llama", "llama", free=0, template=None, eos="<|endoftext|>", pad=None)
    return root


def made(parts, out, vision="siglip", text="qwen2", **options):
    return compose(Composition(vision=str(parts / vision), text=str(parts / text), out=str(out), **options))


def conversation(*texts, pictures=1):
    turns = tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))
    picture = Image.linear_gradient("L").convert("RGB").resize((33, 20))
    return Conversation(turns, (picture,) * pictures)


def words(sample, processor, role):
    return processor.tokenizer.decode(sample["input_ids"][sample["roles"] == role])


@pytest.mark.parametrize("vision", ["siglip", "siglip-both", "clip", "clip-both"])
@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama"])
def test_the_parts_are_in_the_folder_as_they_were(parts, tmp_path, vision, text):
    report = made(parts, tmp_path / "out", vision, text)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tower = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}[vision.partition("-")[0]]
    for name, weight in tower.from_pretrained(parts / vision).state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], weight)
    language = AutoModelForCausalLM.from_pretrained(parts / text)
    rows = language.get_output_embeddings().weight.shape[0]
    ids = torch.randint(0, rows, (1, 7), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids=ids).logits[..., :rows], language(input_ids=ids).logits)
    assert report.image_token == model.config.image_token_index
    assert sum(report.parameters.values()) == model.num_parameters()
    assert report.visual_tokens == towers.PATCHES


def test_a_picture_becomes_the_hidden_states_behind_the_projector(parts, tmp_path):
    for vision, drop in (("siglip", 0), ("clip", 1)):
        made(parts, tmp_path / vision, vision, feature_layer=-2)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / vision).eval()
        pixels = torch.randn(1, 3, towers.SIZE, towers.SIZE, generator=torch.Generator().manual_seed(0))
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, drop:]
        projector = model.model.multi_modal_projector
        plain = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(states)))
        torch.testing.assert_close(torch.stack(model.get_image_features(pixels).pooler_output), plain)


def test_the_image_token_takes_a_free_row_or_a_new_one(parts, tmp_path):
    for text, rows in (("qwen2", 0), ("llama", 1)):
        before = json.loads((parts / text / "config.json").read_text())["vocab_size"]
        report = made(parts, tmp_path / text, text=text)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / text)
        assert model.get_output_embeddings().weight.shape[0] == before + rows
        assert model.get_input_embeddings().weight.shape[0] == before + rows == model.config.text_config.vocab_size
        processor = AutoProcessor.from_pretrained(tmp_path / text)
        assert processor.tokenizer.convert_tokens_to_ids("<image>") == report.image_token == processor.image_token_id
        assert processor.tokenizer.pad_token is not None


def test_the_seed_fixes_the_projector_and_leaves_other_draws_alone(parts, tmp_path):
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made(parts, tmp_path / name, text="llama", seed=seed)
    assert torch.equal(torch.rand(3), first)
    states = [AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in "abc"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(*(s["model.multi_modal_projector.linear_1.weight"] for s in (states[0], states[2])))


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama"])
def test_the_folder_is_ready_to_be_trained(parts, tmp_path, text):
    made(parts, tmp_path / "student", text=text)
    recipe = Recipe.model_validate(
        {
            "out": str(tmp_path / "run"),
            "student": {"path": str(tmp_path / "student")},
            "data": {"train": "unused.json"},
            "objective": {name: {"weight": 0.0} for name in ("kd", "iva", "tpa")},
        }
    )
    loaded = load_parts(recipe)
    sample = encode(
        conversation("<image>\nHow many are there?", "7 of them", "And here?\n<image>", "None.", pictures=2),
        loaded.processor,
    )
    assert int((sample["roles"] == VISUAL).sum()) == 2 * towers.PATCHES
    asked, answered = (words(sample, loaded.processor, role) for role in (INSTRUCTION, RESPONSE))
    assert asked.split() == ["How", "many", "are", "there?And", "here?"]
    end = "<|endoftext|>" if text == "llama" else "<|im_end|>"
    assert answered.replace(" ", "") == f"7ofthem{end}None.{end}"
    batch = {name: sample[name][None] for name in ("input_ids", "attention_mask", "labels")}
    assert loaded.student(**batch, pixel_values=sample["pixel_values"]).loss.isfinite()
    end_ids = loaded.student.generation_config.eos_token_id
    assert loaded.processor.tokenizer.convert_tokens_to_ids(end) == end_ids[0]
    assert loaded.processor.tokenizer.convert_tokens_to_ids("<|endoftext|>") in end_ids


def test_an_answer_is_asked_for_in_the_form_it_is_learnt_in(parts, tmp_path):
    # A hybrid reasoning model's own template shows answers behind an empty thought and asks for them without one.
    made(parts, tmp_path / "out", text="qwen3")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": "None."}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert processor.apply_chat_template(answered, tokenize=False) == prompt + "None.<|im_end|>\n"
    with pytest.raises(ModelError, match=r"asks for an answer with .* but shows answers behind"):
        made(parts, tmp_path / "other", text="qwen3", chat_template=str(write(tmp_path, towers.THINKING)))


def write(folder, template):
    """The template as a file, with images but without any care for thoughts."""
    path = folder / "template.jinja"
    path.write_text(PICTURES + template)
    return path


def test_pictures_stand_where_they_stood_with_one_line_break(parts, tmp_path):
    made(parts, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")

    def shown(*content):
        return processor.apply_chat_template([{"role": "user", "content": list(content)}], tokenize=False)

    picture, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    frame = "<|im_start|>user\n{}<|im_end|>\n"
    assert shown(picture, text("Q")) == shown(picture, text("\nQ")) == frame.format("<image>\nQ")
    assert shown(picture, picture, text("Q ")) == frame.format("<image>\n<image>\nQ ")
    assert shown(picture, text("\n"), picture, text("\n\nQ")) == frame.format("<image>\n<image>\n\nQ")
    assert shown(text("Q\n"), picture) == frame.format("Q\n<image>")
    assert processor.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False) == frame.format("Q")
    for words in ("<image>\nQ ", "<image>\n\nQ", "Q\n<image>", "<image>Q"):
        encode(conversation(words, "A"), processor)


def test_the_blank_before_an_answer_is_learnt_where_the_prompt_ends_without_one(parts, tmp_path):
    # The blank in front of a number is a token of its own, and no part of the prompt "ASSISTANT:"; it had no role, so a student
    # was never taught to say it.
    made(parts, tmp_path / "out", chat_template="vicuna")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    for answer in ("7", "None."):
        sample = encode(conversation("<image>\nHow many are there?", answer), processor)
        assert words(sample, processor, RESPONSE) == f" {answer}<|im_end|>"
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many are there?"}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        ids = processor.tokenizer(prompt)["input_ids"]
        assert len(ids) - 1 + towers.PATCHES == int((sample["roles"] == RESPONSE).nonzero()[0])


def test_the_verb_writes_the_folder_and_says_what_is_in_it(parts, tmp_path):
    options = ["--vision", str(parts / "clip"), "--text", str(parts / "llama"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["compose", *options])
    assert done.exit_code == 0, done.output
    assert "visual tokens per image" in done.output and "now 381" in done.output
    AutoProcessor.from_pretrained(tmp_path / "out")
    again = CliRunner().invoke(app, ["compose", *options])
    assert isinstance(again.exception, RunError)


def test_a_folder_that_holds_something_is_left_as_it_is(parts, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        made(parts, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_stopped_composition_leaves_nothing(parts, tmp_path):
    with pytest.raises(ModelError):
        made(parts, tmp_path / "out", feature_layer=9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": "qwen2"}, "vision tower is of type 'qwen2'; accepted: siglip"),
        ({"vision": "none"}, "vision tower cannot be loaded"),
        ({"text": "none"}, "language model cannot be loaded"),
        ({"feature_layer": 4}, "tower has 3 layers, so -4 to 3 are accepted"),
        ({"feature_layer": -5}, "compose.feature_layer is -5"),
        ({"select_strategy": "default"}, "a patch would be lost"),
        ({"chat_template": "none.jinja"}, "a Jinja file or 'vicuna' is accepted"),
    ],
)
def test_what_does_not_fit_is_refused(parts, tmp_path, options, message):
    with pytest.raises(ModelError, match=message):
        made(parts, tmp_path / "out", **options)


def test_a_language_model_that_scales_its_logits_is_refused(parts, tmp_path):
    # A LLaVA model has its own head without the scale: the composed model would have had other distributions than its language model.
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for scale in (4.0, 1.0):
        config = GraniteConfig(vocab_size=400, **sizes, num_key_value_heads=2, logits_scaling=scale, eos_token_id=2)
        GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
        towers.tokenizer().save_pretrained(tmp_path / "granite")
        if scale == 4.0:
            with pytest.raises(ModelError, match="caps or scales its logits"):
                made(parts, tmp_path / "out", text=tmp_path / "granite", chat_template="vicuna")
    assert made(parts, tmp_path / "out", text=tmp_path / "granite", chat_template="vicuna").visual_tokens == 9


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "shows the words of a assistant turn 0 times"),
        (towers.CHATML.replace("'<|im_end|>\\n'", "'\\n'"), "no special token right behind the response"),
        ("{{ raise_exception('no images') }}", "cannot render the record"),
        ("{{ no", "cannot render the record"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused(parts, tmp_path, template, message):
    path = write(tmp_path, template)
    with pytest.raises(ModelError, match=message):
        made(parts, tmp_path / "out", chat_template=str(path))


def test_options_are_checked_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"compose.dtype is 'int8'"):
        Composition(vision="a", text="b", out="c", dtype="int8")


def test_the_precision_is_the_language_models_or_as_asked(parts, tmp_path):
    assert made(parts, tmp_path / "a").dtype == "float32"
    assert made(parts, tmp_path / "b", dtype="bfloat16").dtype == "bfloat16"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "b", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_full_keeps_the_class_token(parts, tmp_path):
    assert made(parts, tmp_path / "out", "clip", select_strategy="full").visual_tokens == towers.PATCHES + 1
