"""The authors' checkpoint layout becomes a LLaVA folder that computes the same as the official forward, which is written here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from align_ti.checkpoints.released import import_released
from align_ti.cli import app
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.roles import RESPONSE, encode
from align_ti.errors import ModelError, RunError
from tests import towers

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
"""The prompt of the authors' evaluation: one turn is this, `USER: `, image, line break, question, ` ASSISTANT:`."""


def write_official(
    root, kind="qwen2", layer=-2, aspect="pad", tied=False, free=6, eos="<|endoftext|>", shards=1, **changes
):
    """A random checkpoint in the authors' layout, with its tower beside it; returns its parts."""
    tower_folder, folder = towers.write_tower(root / "tower"), root / "llava-official"
    tower = SiglipVisionModel.from_pretrained(tower_folder).eval()
    torch.manual_seed(3)
    words = towers.tokenizer(eos=eos, pad="<|extra_0|>")
    words.unk_token = "<|extra_0|>"
    config = towers.text_config(kind, len(words) + free, tied)
    language = towers.larger({"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}[kind](config))
    projector = towers.larger(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32)))
    weights = {name: weight.clone() for name, weight in language.state_dict().items()}
    if tied:
        del weights["lm_head.weight"]
    weights |= {
        f"model.mm_projector.image_spatial_proj.{name}": value for name, value in projector.state_dict().items()
    }
    folder.mkdir()
    write_shards(folder, weights, shards)
    settings = {
        **config.to_dict(),
        "rope_theta": 1_000.0,
        "model_type": f"llava_{kind}",
        "architectures": [f"LlavaQ{kind[1:]}ForCausalLM"],
        "mm_image_tower": str(tower_folder),
        "mm_video_tower": None,
        "image_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 16,
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": aspect,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tokenizer_model_max_length": 2048,
        "use_mm_proj": True,
        **changes,
    }
    del settings["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(settings))
    words.save_pretrained(folder)
    language.config.rope_parameters["rope_theta"] = 1_000.0
    language = type(language)(language.config)
    language.load_state_dict(weights, strict=False)
    return SimpleNamespace(
        folder=folder, tower_folder=tower_folder, tower=tower, language=language.eval(), projector=projector, words=words,
        layer=layer, weights=weights,
    )  # fmt: skip


def write_shards(folder, weights, shards=1):
    """The weights as one file, or as shards with an index."""
    for old in folder.glob("model*"):
        old.unlink()
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    names, index = sorted(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def expand_to_square(picture):
    """The image in the middle of a square of the mean colour."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def official_pixels(official, pictures, aspect):
    """What the authors' tower reads: the square image if it is padded, else the stretched one."""
    pictures = [expand_to_square(picture) for picture in pictures] if aspect == "pad" else pictures
    return AutoImageProcessor.from_pretrained(official.tower_folder)(pictures, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def official_logits(official, prompt, pictures, aspect):
    """The authors' forward: text in pieces between images, the tower's hidden states whole, projected and spliced in."""
    embed, pieces = official.language.get_input_embeddings(), prompt.split("<image>")
    row = []
    for index, piece in enumerate(pieces):
        if index:
            pixels = official_pixels(official, [pictures[index - 1]], aspect)
            states = official.tower(pixels, output_hidden_states=True).hidden_states[official.layer]
            row.append(official.projector(states[0]))
        row.append(embed(torch.tensor(official.words(piece)["input_ids"], dtype=torch.long)))
    return official.language(inputs_embeds=torch.cat(row)[None]).logits[0]


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(31, 17), picture(14, 40, seed=1)]


@torch.no_grad()
def check_equal(official, out, aspect):
    """The imported model says what the official forward says, with one image, two, and none."""
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(out)
    for count in (0, 1, 2):
        content = [{"type": "image"}] * count + [{"type": "text", "text": "How many are there?\nAnswer with 7."}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        assert prompt == SYSTEM + "USER: " + "<image>\n" * count + "How many are there?\nAnswer with 7. ASSISTANT:"
        inputs = processor(text=[prompt], images=PICTURES[:count] or None, return_tensors="pt")
        wanted = official_logits(official, prompt, PICTURES, aspect)
        found = model.eval()(**inputs).logits[0]
        assert wanted.std() > 0.3
        # float32 through two stacks in other shapes: up to 2e-5 was seen, by processor. Another layer or row is off by tenths.
        torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_official_forward(tmp_path, kind, layer, aspect, tied):
    official = write_official(tmp_path, kind, layer, aspect, tied, shards=2 if tied else 1)
    report = import_released(str(official.folder), tmp_path / "out")
    check_equal(official, tmp_path / "out", aspect)
    assert report.visual_tokens == towers.PATCHES
    assert report.image_token == len(official.words)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert sum(report.parameters.values()) == model.num_parameters()


def test_the_verb_writes_the_folder_and_says_what_is_in_it(tmp_path):
    official = write_official(tmp_path)
    done = CliRunner().invoke(app, ["import", str(official.folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "visual tokens per image" in done.output and "images are padded to a square" in done.output
    check_equal(official, tmp_path / "out", "pad")


def test_a_full_vocabulary_gets_a_row_for_the_image_token(tmp_path):
    for tied in (True, False):
        official = write_official(tmp_path / str(tied), free=0, tied=tied)
        report = import_released(str(official.folder), tmp_path / str(tied) / "out")
        check_equal(official, tmp_path / str(tied) / "out", "pad")
        assert report.image_token == len(official.words)


@pytest.mark.parametrize("aspect", ["pad", "square", None])
@pytest.mark.parametrize("size", [(31, 17), (17, 31), (1, 40), (12, 12)])
def test_pixels_are_those_of_the_authors_preparation(tmp_path, aspect, size):
    official = write_official(tmp_path, aspect=aspect)
    import_released(str(official.folder), tmp_path / "out")
    found = AutoProcessor.from_pretrained(tmp_path / "out").image_processor([picture(*size)], return_tensors="pt")
    assert torch.equal(torch.as_tensor(found["pixel_values"]), official_pixels(official, [picture(*size)], aspect))


def test_a_turn_is_learnt_with_its_end_and_the_next_follows_at_once(tmp_path):
    official = write_official(tmp_path, eos="<|im_end|>")
    report = import_released(str(official.folder), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    turns = (
        Turn("user", "<image>\nHow many?"),
        Turn("assistant", "7"),
        Turn("user", "What?"),
        Turn("assistant", "None."),
    )
    sample = encode(Conversation(turns, (PICTURES[0],)), processor)
    shown = processor.tokenizer.decode(sample["input_ids"]).replace("<image>" * towers.PATCHES, "<image>")
    assert shown == (
        f"{SYSTEM}USER: <image>\nHow many? ASSISTANT: 7<|endoftext|>USER: What? ASSISTANT: None.<|endoftext|>"
    )
    learnt = processor.tokenizer.decode(sample["input_ids"][sample["roles"] == RESPONSE])
    assert learnt == " 7<|endoftext|> None.<|endoftext|>"
    # An instruct model underneath may also end a turn in its own way.
    stops = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").generation_config
    ids = [official.words.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert stops.eos_token_id == ids == list(report.end_tokens)
    assert (stops.max_new_tokens, stops.do_sample) == (128, False)


def inside(official, change=lambda weight: weight):
    """Weights of a vision tower as a checkpoint of the authors' holds them: its tower's, each changed by the function."""
    return {
        f"model.image_tower.vision_tower.vision_model.{name}": change(weight.clone())
        for name, weight in official.tower.state_dict().items()
    }


def test_tower_weights_inside_a_checkpoint_and_other_heads_are_left_out_and_named(tmp_path):
    official = write_official(tmp_path)
    own = inside(official, lambda weight: weight * 0)
    extra = {"mtp_model.layers.0.weight": torch.ones(3), "mtp_model.norm.weight": torch.ones(3)}
    write_shards(official.folder, official.weights | own | extra, shards=3)
    report = import_released(str(official.folder), tmp_path / "out")
    assert "left out: 2 weights of a head that predicts several tokens" in " ".join(report.notes)
    assert f"left out: {len(own)} tower weights of the checkpoint's own" in " ".join(report.notes)
    check_equal(official, tmp_path / "out", "pad")


def test_tower_weights_that_differ_from_the_folder_s_are_said_with_the_size_of_the_difference(tmp_path, caplog):
    # A tower that was trained on was replaced by the published one without a word about the difference.
    official = write_official(tmp_path)
    changed = {"embeddings.patch_embedding.bias": 0.5, "post_layernorm.weight": -0.25}
    own = inside(official)
    for name, step in changed.items():
        own[f"model.image_tower.vision_tower.vision_model.{name}"][0] += step
    write_shards(official.folder, official.weights | own)
    done = CliRunner().invoke(app, ["import", str(official.folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    size = sum(float(weight.double().norm()) ** 2 for weight in official.tower.state_dict().values()) ** 0.5
    told = (
        f"2 of {len(own)} differ from the tower's folder: largest difference 0.5, norm of all differences "
        f"{(0.5**2 + 0.25**2) ** 0.5 / size:.3g} of the folder's"
    )
    assert told in " ".join(done.output.split()) and "--own-tower" in done.output
    assert [record.levelname for record in caplog.records if told in record.getMessage()] == ["WARNING"]
    check_equal(official, tmp_path / "out", "pad")


@pytest.mark.parametrize("change", [lambda weight: weight, lambda weight: weight.bfloat16()])
def test_tower_weights_that_equal_the_folder_s_or_are_these_rounded_are_no_difference(tmp_path, caplog, change):
    official = write_official(tmp_path)
    write_shards(official.folder, official.weights | inside(official, change))
    notes = import_released(str(official.folder), tmp_path / "out").notes
    assert any(
        "tower weights of the checkpoint's own" in note and "they equal the tower's folder" in note for note in notes
    )
    assert not [record for record in caplog.records if record.name.startswith("align_ti")]


def test_the_checkpoint_s_own_tower_is_taken_where_it_is_asked_for(tmp_path):
    official = write_official(tmp_path)
    torch.manual_seed(11)
    with torch.no_grad():
        for weight in official.tower.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    write_shards(official.folder, official.weights | inside(official), shards=2)
    arguments = ["import", str(official.folder), "--out", str(tmp_path / "out"), "--own-tower"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "tower weights: the checkpoint's own" in done.output and "differ from the tower's folder" in done.output
    # The official forward here reads the changed tower.
    check_equal(official, tmp_path / "out", "pad")
    import_released(str(official.folder), tmp_path / "folder")
    towers_of = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).model.vision_tower for name in ("out", "folder")
    ]
    assert not torch.equal(*(next(one.parameters()) for one in towers_of))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.clear(), r"own tower cannot be taken: \d+ weight.* is missing.*leave --own-tower out"),
        (
            lambda own: own.pop(min(own)),
            r"1 weight\(s\) do not fit the tower's config, first model.image_tower.*is missing",
        ),
        (lambda own: own.update({min(own): torch.ones(3, 3)}), r"has shape \(3, 3\) instead of"),
        (lambda own: own.update({"model.image_tower.lora.weight": torch.ones(3)}), r"lora.weight is unknown"),
    ],
)
def test_an_own_tower_that_is_not_whole_is_refused_and_without_the_option_said(tmp_path, change, message):
    official = write_official(tmp_path)
    own = inside(official)
    change(own)
    write_shards(official.folder, official.weights | own)
    with pytest.raises(ModelError, match=message):
        import_released(str(official.folder), tmp_path / "out", own_tower=True)
    notes = " ".join(import_released(str(official.folder), tmp_path / "out").notes)
    assert ("do not fit it, first" in notes) == bool(own)


def test_own_tower_weights_of_which_none_fits_are_not_called_equal(tmp_path):
    official = write_official(tmp_path)
    write_shards(official.folder, official.weights | {"model.image_tower.other.weight": torch.ones(3)})
    notes = " ".join(import_released(str(official.folder), tmp_path / "out").notes)
    assert "none can be compared with the tower's folder" in notes and "other.weight is unknown" in notes
    assert "they equal" not in notes


def test_the_tower_can_be_named_where_the_checkpoint_names_none_that_is_here(tmp_path):
    official = write_official(tmp_path, mm_image_tower="google/nowhere")
    with pytest.raises(ModelError, match=r"google/nowhere: the vision tower cannot be loaded .*--vision-tower"):
        import_released(str(official.folder), tmp_path / "out")
    import_released(str(official.folder), tmp_path / "out", str(official.tower_folder))
    check_equal(official, tmp_path / "out", "pad")


def test_weights_are_under_the_names_that_older_readers_know(tmp_path):
    official = write_official(tmp_path, shards=2)
    import_released(str(official.folder), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    names = {name for file in files for name in load_file(file)}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert "vision_tower.vision_model.post_layernorm.weight" in names
    assert "language_model.lm_head.weight" in names and "language_model.model.norm.weight" in names


def test_the_tower_takes_the_precision_of_the_checkpoint(tmp_path):
    official = write_official(tmp_path)
    write_shards(official.folder, {name: weight.bfloat16() for name, weight in official.weights.items()})
    assert import_released(str(official.folder), tmp_path / "out").dtype == "bfloat16"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def broken(official, change):
    """The checkpoint with its weights changed by the function."""
    change(official.weights)
    write_shards(official.folder, official.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 weight.* do not fit config.json: model.norm.weight is missing"),
        (lambda w: w.pop("model.mm_projector.image_spatial_proj.2.bias"), "image_spatial_proj.2.bias is missing"),
        (lambda w: w.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda w: w.update({"model.mm_projector.video.0.weight": torch.ones(1)}), "video.0.weight is unknown"),
        (lambda w: w.update({"model.layers.7.mlp.up_proj.weight": torch.ones(1)}), "model.layers.7.* is unknown"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight has shape \(31,\) instead of \(32,\)",
        ),
        (
            lambda w: w.update({"model.embed_tokens.weight": torch.ones(9, 32)}),
            r"embed_tokens.weight has shape \(9, 32\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    official = write_official(tmp_path)
    broken(official, change)
    with pytest.raises(ModelError, match=message):
        import_released(str(official.folder), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_phi"}, "model_type is 'llava_phi'; accepted: llava_qwen2, llava_qwen3"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer is None"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer is -9; the tower has 3 layers"),
        ({"mm_image_tower": None}, "mm_image_tower is None; .* name it with --vision-tower"),
        ({"image_projector_type": "linear"}, "image_projector_type is 'linear'; 'mlp2x_gelu' is accepted"),
        ({"s2": True}, "s2 is True; False is accepted"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_hidden_size": 1152}, "tower is 16 wide, the checkpoint's mm_hidden_size is 1152"),
    ],
)
def test_settings_that_a_llava_model_cannot_express_are_refused(tmp_path, changes, message):
    official = write_official(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        import_released(str(official.folder), tmp_path / "out")


def test_files_that_are_no_safe_checkpoint_are_refused(tmp_path):
    official = write_official(tmp_path, shards=2)
    shard = official.folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:50])
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors: damaged"):
        import_released(str(official.folder), tmp_path / "out")
    shard.unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors does not exist"):
        import_released(str(official.folder), tmp_path / "out")
    index = official.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../tower/model.safetensors"}}))
    with pytest.raises(ModelError, match="lies outside the folder"):
        import_released(str(official.folder), tmp_path / "out")
    write_shards(official.folder, official.weights)
    (official.folder / "model.safetensors").rename(official.folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"are pickles \(pytorch_model.bin\).*convert them"):
        import_released(str(official.folder), tmp_path / "out")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (
            ("tokenizer.json",),
            r"no file holds a vocabulary.*made up a tokenizer of 2 token.*tokenizer.json, or all of vocab.json",
        ),
        (("tokenizer.json", "tokenizer_config.json"), r"made up a tokenizer of 1 token.*copy them"),
        (("tokenizer_config.json",), r"no file names the tokenizer's special tokens.*tokenizer_config.json"),
    ],
)
def test_a_checkpoint_without_its_tokenizer_s_files_is_refused(tmp_path, gone, message):
    # transformers makes a tokenizer of its special tokens alone, and a student that knew two tokens was written.
    official = write_official(tmp_path)
    for name in gone:
        (official.folder / name).unlink()
    with pytest.raises(ModelError, match=message):
        import_released(str(official.folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["hidden_act", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta"]
)
def test_a_setting_that_no_weight_shows_is_not_replaced_by_a_default(tmp_path, name):
    official = write_official(tmp_path, **{name: None})
    with pytest.raises(
        ModelError, match=rf"config.json: does not say {name}, so transformers would take defaults of Qwen2Config"
    ):
        import_released(str(official.folder), tmp_path / "out")


def test_a_tokenizer_without_the_authors_stop_is_refused(tmp_path):
    official = write_official(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = official.folder / name
        file.write_text(file.read_text().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(ModelError, match=r"the tokenizer has no <\|endoftext\|>"):
        import_released(str(official.folder), tmp_path / "out")


def test_a_folder_that_holds_something_and_a_path_to_nothing_are_refused(tmp_path):
    official = write_official(tmp_path)
    with pytest.raises(RunError, match="not empty"):
        import_released(str(official.folder), official.tower_folder)
    with pytest.raises(ModelError, match="no such folder, and the hub gave none"):
        import_released(str(tmp_path / "nothing"), tmp_path / "out")
