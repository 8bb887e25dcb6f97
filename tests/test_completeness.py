"""A folder from which something was removed is refused, or what transformers fills in is said by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align_ti.checkpoints.compose import compose
from align_ti.checkpoints.parts import load_tower
from align_ti.config import Composition
from align_ti.errors import ModelError
from align_ti.models.completeness import check_tokenizer, has_file
from align_ti.models.loading import load_model, load_processor
from tests import family_processors, towers


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A composed model with its parts beside it; nothing is missing."""
    root = tmp_path_factory.mktemp("whole")
    towers.write_tower(root / "siglip")
    for kind in ("qwen2", "llama"):
        towers.write_language_model(root / kind, kind)
    made(root, root / "model")
    return root


@pytest.fixture
def parts(whole, tmp_path) -> Path:
    """A copy to take things out of."""
    return Path(shutil.copytree(whole, tmp_path / "parts"))


def made(root: Path, out: Path, text: str = "qwen2", **options):
    return compose(Composition(vision=str(root / "siglip"), text=str(root / text), out=str(out), **options))


def edit(file: Path, change) -> None:
    """Changes the object in a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).unlink()
    return str(folder)


def reshape(folder: Path, part: str) -> str:
    """Gives the first weight with this in its name another shape."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if part in name)
    save_file({**weights, name: torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_a_language_model_without_its_vocabulary_is_refused(parts, tmp_path):
    # transformers gives Qwen2's class a vocabulary of its special tokens, and a student with two tokens was composed of it.
    without(parts / "qwen2", "tokenizer.json")
    with pytest.raises(
        ModelError, match=r"qwen2: no file holds a vocabulary.*2 token.*vocab.json, merges.txt.*copy them"
    ):
        made(parts, tmp_path / "out", chat_template="vicuna")


def test_a_vocabulary_and_merges_in_files_of_their_own_are_accepted(parts, tmp_path):
    model = json.loads((parts / "qwen2" / "tokenizer.json").read_text())["model"]
    without(parts / "qwen2", "tokenizer.json")
    (parts / "qwen2" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) for merge in model["merges"]]
    (parts / "qwen2" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    assert made(parts, tmp_path / "out").image_token == 380


@pytest.mark.parametrize(("text", "eos"), [("qwen2", "<|endoftext|>"), ("llama", "None")])
def test_special_tokens_that_no_file_names_are_refused(parts, tmp_path, text, eos):
    # Without tokenizer_config.json the end of an answer was another token than the model's, or none.
    without(parts / text, "tokenizer_config.json")
    with pytest.raises(
        ModelError, match=rf"special tokens.*eos_token '?{eos.replace('|', '.')}'?.*tokenizer_config.json"
    ):
        made(parts, tmp_path / "out", text)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (("tokenizer.json",), "cannot be loaded .*no tokenizer.json is there"),
        # Here the class that makes one up is taken, and the processor found no token in it: a traceback.
        (("tokenizer.json", "config.json"), "cannot be loaded .*no tokenizer.json is there"),
        (("tokenizer_config.json",), "special tokens, so transformers took eos_token None"),
    ],
)
def test_a_processor_whose_tokenizer_is_not_there_is_refused(parts, gone, message):
    with pytest.raises(ModelError, match=message):
        load_processor(without(parts / "model", *gone))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gemma3", "GemmaTokenizer"), ("idefics3", "GPT2Tokenizer"), ("llava-next", "LlamaTokenizer")],
)
def test_a_processor_that_is_content_with_a_made_up_tokenizer_is_refused(tmp_path, family, kind):
    family_processors.FAMILIES[family]().save_pretrained(tmp_path / "model")
    assert load_processor(str(tmp_path / "model")).tokenizer.get_vocab()
    edit(tmp_path / "model" / "tokenizer_config.json", lambda content: content.update(tokenizer_class=kind))
    with pytest.raises(ModelError, match=rf"model: no file holds a vocabulary.*\({kind}\)"):
        load_processor(without(tmp_path / "model", "tokenizer.json"))


def test_a_tokenizer_of_the_hub_s_copy_is_looked_up_there(whole, tmp_path, monkeypatch):
    copy = tmp_path / "models--lab--words"
    shutil.copytree(whole / "qwen2", copy / "snapshots" / "1234")
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained("lab/words")
    check_tokenizer("lab/words", words)
    assert has_file("lab/words", "generation_config.json") and not has_file("lab/words", "other.json")
    assert not has_file("no such/repository/name", "config.json")
    without(copy / "snapshots" / "1234", "tokenizer_config.json")
    with pytest.raises(ModelError, match="lab/words: no file names the tokenizer's special tokens"):
        check_tokenizer("lab/words", words)


# --- image processors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["size"], r"does not say size, so transformers took .*224"),
        (["image_mean", "image_std"], r"does not say image_mean, image_std"),
        (["image_processor_type"], r"does not say image_processor_type"),
    ],
)
def test_what_an_image_processor_s_file_does_not_say_is_not_a_default(parts, tmp_path, gone, message):
    # Images were made 224 pixels large, or had another mean than the tower was trained with.
    edit(parts / "siglip" / "preprocessor_config.json", lambda content: [content.pop(name) for name in gone])
    edit(
        parts / "model" / "processor_config.json",
        lambda content: [content["image_processor"].pop(name) for name in gone],
    )
    with pytest.raises(
        ModelError, match=f"siglip: the image processor('s file {message}| cannot be loaded .*{gone[0]})"
    ):
        made(parts, tmp_path / "out")
    with pytest.raises(ModelError, match=f"model: the image processor's file {message}"):
        load_processor(str(parts / "model"))


def test_an_image_processor_that_is_not_there_is_refused(parts, tmp_path):
    without(parts / "siglip", "preprocessor_config.json")
    with pytest.raises(ModelError, match="the image processor cannot be loaded"):
        made(parts, tmp_path / "out")
    edit(parts / "model" / "processor_config.json", lambda content: content.pop("image_processor"))
    with pytest.raises(ModelError, match="the processor cannot be loaded"):
        load_processor(str(parts / "model"))


@pytest.mark.parametrize("name", ["patch_size", "vision_feature_select_strategy"])
def test_a_processor_that_cannot_count_visual_tokens_is_refused(parts, name):
    edit(parts / "model" / "processor_config.json", lambda content: content.pop(name))
    with pytest.raises(ModelError, match=f"the processor has no {name}.*write them to processor_config.json"):
        load_processor(str(parts / "model"))


def test_a_processor_without_a_chat_template_is_refused(parts):
    with pytest.raises(ModelError, match="no chat template"):
        load_processor(without(parts / "model", "chat_template.jinja"))


# --- generation configs -----------------------------------------------------------------------------------------------


def test_a_whole_model_loads_without_a_word(whole, tmp_path, caplog):
    load_model(str(whole / "model"))
    load_processor(str(whole / "model"))
    assert len(made(whole, tmp_path / "out").notes) == 2
    assert not [record for record in caplog.records if record.name.startswith("align_ti")]


@pytest.mark.parametrize("held", [False, True])
def test_a_model_whose_end_comes_from_its_config_says_so(parts, caplog, held):
    # Two tokens ended an answer; without the file one did, and no padding was known.
    file = parts / "model" / "generation_config.json"
    file.write_text("{}") if held else file.unlink()
    load_model(str(parts / "model"))
    lacking = "generation_config.json names no eos_token_id" if held else "no generation_config.json"
    assert f"{lacking}: the end of an answer is token 2, from config.json" in caplog.text


def test_a_model_that_no_file_gives_an_end_says_so(parts, caplog):
    without(parts / "model", "generation_config.json")
    edit(parts / "model" / "config.json", lambda content: content["text_config"].pop("eos_token_id"))
    load_model(str(parts / "model"))
    assert "nothing says where an answer ends" in caplog.text


def test_a_language_model_s_end_that_is_a_default_of_its_class_is_not_taken(parts, tmp_path):
    # LlamaConfig ends answers with token 2 unless told otherwise, whatever that token is.
    without(parts / "llama", "generation_config.json")
    edit(parts / "llama" / "config.json", lambda content: content.update(eos_token_id=1))
    stated = made(parts, tmp_path / "stated", "llama")
    assert any(
        "no generation_config.json: the end of an answer is token 1, from config.json" in n for n in stated.notes
    )
    assert 1 in stated.end_tokens
    edit(parts / "llama" / "config.json", lambda content: content.pop("eos_token_id"))
    edit(parts / "llama" / "tokenizer_config.json", lambda content: content.update(eos_token="<|endoftext|>"))
    report = made(parts, tmp_path / "out", "llama", chat_template="vicuna")
    assert any("token 2, from a default of LlamaConfig, named nowhere" in note for note in report.notes)
    assert report.end_tokens == (0,)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_another_shape_are_named_wherever_they_are(parts, tmp_path):
    # transformers raised an error that names no weight, which left as a traceback.
    with pytest.raises(
        ModelError, match=r"model: 1 weight.*embed_tokens.weight has shape \(3,\) instead of \(386, 32\)"
    ):
        load_model(reshape(parts / "model", "embed_tokens"))
    with pytest.raises(ModelError, match=r"siglip: 1 weight.*position_embedding.weight has shape \(3,\)"):
        load_tower(reshape(parts / "siglip", "position_embedding"))
    towers.write_tower(parts / "siglip")
    with pytest.raises(ModelError, match=r"qwen2: 1 weight.*lm_head.weight has shape \(3,\)"):
        made(parts, tmp_path / "out", text=Path(reshape(parts / "qwen2", "lm_head")).name)


@pytest.mark.parametrize(("folder", "load"), [("model", load_model), ("siglip", load_tower)])
def test_every_single_weight_is_missed(parts, folder, load):
    weights = load_file(parts / folder / "model.safetensors")
    for name in weights:
        rest = {other: value for other, value in weights.items() if other != name}
        save_file(rest, parts / folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"1 weight.* is missing"):
            load(str(parts / folder))
