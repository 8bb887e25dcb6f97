"""The checkpoints that the paper's authors published, as ordinary LLaVA folders.

Theirs need modelling code that was not released whole. The model itself is a LLaVA model: the SigLIP tower's hidden states at one
layer, whole; Linear, GELU, Linear; Qwen2 or Qwen3. So names are mapped and nothing is computed. As in their code, the vision tower
is read from its own folder; tower weights inside a checkpoint are compared with it, and taken in its place where that is asked for.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BaseImageProcessor,
    LlavaConfig,
    LlavaImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from align_ti.checkpoints.parts import (
    Made,
    check_feature_layer,
    count_parameters,
    empty_model,
    greedy_generation,
    image_id,
    load_pictures,
    load_tokenizer,
    load_tower,
    precision,
    set_precision,
)
from align_ti.checkpoints.templates import check_template, vicuna
from align_ti.errors import ModelError
from align_ti.models.llava import build_config, build_processor
from align_ti.models.loading import first_line
from align_ti.runs import new_folder

logger = logging.getLogger(__name__)

TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {"llava_qwen2": Qwen2Config, "llava_qwen3": Qwen3Config}

STOP = "<|endoftext|>"
"""What ends an answer in the authors' prompts."""

ANSWER_TOKENS = 128
"""Tokens of an answer at most, as in the authors' evaluation."""

FIXED = {
    "image_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_video_tower": None,
    "s2": False,
}
"""Settings of a checkpoint that have one value which a LLaVA model can express; all published ones have it."""

NAMES = (
    ("model.mm_projector.image_spatial_proj.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.image_spatial_proj.2.", "multi_modal_projector.linear_2."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
"""The authors' names and those of LLaVA files, which transformers 4 and 5 both read."""

UNSEEN = ("hidden_act", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
"""Settings of the language model that shapes of weights do not tell, so that a default in their place would go unseen."""

LEFT_OUT = {"mtp_model.": "weights of a head that predicts several tokens, which answering does not use"}

TOWER = "model.image_tower."
"""Where a checkpoint holds tower weights of its own."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint: where it is and what it will be called."""

    file: Path
    name: str
    target: str
    shape: tuple[int, ...]


def import_released(path: str, out: Path, vision_tower: str | None = None, *, own_tower: bool = False) -> Made:
    """Writes a published checkpoint as a folder that plain transformers loads.

    Args:
        path: folder or hub name of the checkpoint.
        out: a new or empty folder.
        vision_tower: folder or hub name of the SigLIP tower; by default the one that the checkpoint names.
        own_tower: take the tower weights inside the checkpoint in place of the folder's, which then gives config and image processor.

    Raises:
        RunError: the folder is not empty.
        ModelError: the checkpoint is none of the authors' layout, or weights are missing, unknown, or of another shape.
    """
    with new_folder(out) as draft:
        source = local_folder(path)
        settings = read_settings(source)
        text = text_config(settings)
        tower_path = vision_tower or named_tower(settings, source)
        tower = load_siglip(tower_path, settings)
        tokenizer, ends = stopping_tokenizer(source, text)
        held, image = int(text.vocab_size), image_id(tokenizer)
        text.vocab_size = max(held, image + 1)
        layer = int(settings["mm_vision_select_layer"])
        config = build_config(tower.config, text, image_token=image, feature_layer=layer, strategy="full")
        entries, inside, left_out = plan(source, config, held)
        vision, seen = choose_tower(source, inside, tower, own=own_tower)
        pictures, shape = prepare_pictures(tower_path, settings)
        processor = build_processor(
            pictures, tokenizer, vision=tower.config, strategy="full", chat_template=tokenizer.chat_template
        )
        check_template(processor, config, path)
        dtype = write_weights(entries, vision, draft, held, text.vocab_size)
        write_config(config, dtype, draft)
        generation = greedy_generation(tokenizer, ends)
        generation.max_new_tokens = ANSWER_TOKENS
        generation.save_pretrained(draft)
        processor.save_pretrained(draft)
    return Made(
        folder=out,
        parameters=count_parameters(config),
        dtype=precision(dtype),
        image_token=config.image_token_index,
        visual_tokens=config.image_seq_length,
        end_tokens=ends,
        notes=(f"vision tower: {tower_path}", *seen, shape, *left_out),
    )


def local_folder(path: str) -> Path:
    """The checkpoint's folder; a hub name is fetched, without pickles.

    Raises:
        ModelError: there is no such folder and no such name.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: no such folder, and the hub gave none ({first_line(error)}); a folder or hub name is accepted."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: there is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); a whole checkpoint folder is accepted.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds {type(content).__name__}; a JSON object is accepted; fetch the file again.")
    return content


def read_settings(source: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        ModelError: it is of another layout, or has settings that a LLaVA model cannot express.
    """
    file = source / "config.json"
    settings = read_json(file)
    if settings.get("model_type") not in TEXT_CONFIGS:
        raise ModelError(
            f"{file}: model_type is {settings.get('model_type')!r}; accepted: {', '.join(TEXT_CONFIGS)}, the layout of the paper's "
            "authors; a model that transformers knows needs no import."
        )
    for name, accepted in FIXED.items():
        # Absent, null and false all switch a setting off.
        if (settings.get(name, accepted) or None) != (accepted or None):
            raise ModelError(
                f"{file}: {name} is {settings[name]!r}; {accepted!r} is accepted; no LLaVA model can express it."
            )
    if type(settings.get("mm_vision_select_layer")) is not int:
        raise ModelError(
            f"{file}: mm_vision_select_layer is {settings.get('mm_vision_select_layer')!r}; the number of the tower's layer that was "
            "trained with is accepted (-2 or -1 in the authors' scripts); write it there."
        )
    missing = [name for name in UNSEEN if settings.get(name) is None]
    if all(settings.get(name) is None for name in ("rope_theta", "rope_parameters")):
        missing.append("rope_theta")
    if missing:
        raise ModelError(
            f"{file}: does not say {', '.join(missing)}, so transformers would take defaults of "
            f"{TEXT_CONFIGS[settings['model_type']].__name__}; the values that the model was trained with are accepted; fetch the file "
            "again, or take them from the config.json of the language model that it was made from."
        )
    return settings


def text_config(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """The language model's config: those keys of the checkpoint's that Qwen2 or Qwen3 has."""
    kind = TEXT_CONFIGS[settings["model_type"]]
    # rope_theta and rope_scaling are older names, which transformers turns into rope_parameters.
    known = {*kind().to_dict(), "rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}
    return kind(**{name: value for name, value in settings.items() if name in known})


def named_tower(settings: Mapping[str, Any], source: Path) -> str:
    """The folder or hub name of the vision tower that the checkpoint names.

    Raises:
        ModelError: it names none.
    """
    name = settings.get("mm_image_tower")
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"{source / 'config.json'}: mm_image_tower is {name!r}; a folder or hub name is accepted; name it with --vision-tower."
        )
    return name


def load_siglip(path: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    """The vision tower that the checkpoint was trained on.

    Raises:
        ModelError: it is not there, no SigLIP tower, or of another width or depth than the checkpoint names.
    """
    try:
        tower = load_tower(path)
    except ModelError as error:
        raise ModelError(f"{error} Name the checkpoint's tower with --vision-tower.") from error
    vision = tower.config
    if vision.model_type != "siglip_vision_model":
        raise ModelError(
            f"{path}: the tower is of type {vision.model_type!r}; SigLIP is accepted, the authors' choice."
        )
    width = settings.get("mm_hidden_size", vision.hidden_size)
    if width != vision.hidden_size:
        raise ModelError(
            f"{path}: the tower is {vision.hidden_size} wide, the checkpoint's mm_hidden_size is {width}; the tower that it was "
            "trained on is accepted; name it with --vision-tower."
        )
    check_feature_layer(int(settings["mm_vision_select_layer"]), vision, "mm_vision_select_layer")
    return tower


def stopping_tokenizer(source: Path, text: PreTrainedConfig) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """The checkpoint's tokenizer with the authors' prompt as chat template, and the tokens that end an answer.

    Raises:
        ModelError: it cannot be loaded, or does not know the authors' stop.
    """
    tokenizer = load_tokenizer(str(source), text)
    if STOP not in tokenizer.get_vocab():
        raise ModelError(
            f"{source}: the tokenizer has no {STOP}, which ends an answer in the authors' prompts; Qwen's is accepted; fetch it again."
        )
    ends = (tokenizer.get_vocab()[STOP], tokenizer.eos_token_id)
    # An instruct model underneath has another eos, and then this token would not count as special: answers would have no end.
    tokenizer.eos_token = STOP
    tokenizer.chat_template = vicuna(STOP)
    return tokenizer, tuple(dict.fromkeys(token for token in ends if token is not None))


def prepare_pictures(tower: str, settings: Mapping[str, Any]) -> tuple[BaseImageProcessor, str]:
    """The tower's image processor, behind padding to a square if the checkpoint was trained so; and a sentence about it."""
    square = load_pictures(tower)
    if settings.get("image_aspect_ratio") != "pad":
        return square, "images are stretched to a square"
    options = square.to_dict()
    padded = LlavaImageProcessor(
        do_pad=True,
        do_center_crop=False,
        size=options["size"],
        image_mean=options["image_mean"],
        image_std=options["image_std"],
        resample=options["resample"],
        rescale_factor=options["rescale_factor"],
    )
    return padded, "images are padded to a square in the mean colour"


def plan(source: Path, config: LlavaConfig, rows: int) -> tuple[list[Entry], list[Entry], list[str]]:
    """Every tensor to carry over, those of the checkpoint's own tower, and what is left out, as sentences.

    Args:
        source: the checkpoint's folder.
        config: the model that is made.
        rows: the rows of embeddings and head that the checkpoint has.

    Raises:
        ModelError: a tensor is missing, unknown, or of another shape; the first ones are named.
    """
    wanted = expected(config)
    entries: list[Entry] = []
    inside: list[Entry] = []
    unknown, left = [], dict.fromkeys(LEFT_OUT, 0)
    tied = 0
    for file, name, shape in tensors(source):
        prefix = next((prefix for prefix in LEFT_OUT if name.startswith(prefix)), None)
        target = next((new + name.removeprefix(old) for old, new in NAMES if name.startswith(old)), None)
        if prefix is not None:
            left[prefix] += 1
        elif name.startswith(TOWER):
            # Older releases saved this count from 0 as a weight.
            if not name.endswith(".position_ids"):
                inside.append(Entry(file, name, tower_name(name.removeprefix(TOWER)), shape))
        elif target == "language_model.lm_head.weight" and config.tie_word_embeddings:
            tied += 1
        elif target is None or target not in wanted:
            unknown.append(name)
        else:
            entries.append(Entry(file, name, target, shape))
    wrong = [f"{name} is unknown" for name in sorted(unknown)]
    official = {target: old_name(target) for target in wanted}
    wrong += [f"{official[name]} is missing" for name in sorted(wanted.keys() - {entry.target for entry in entries})]
    for entry in entries:
        shape = (rows, *wanted[entry.target][1:]) if grows(entry.target) else wanted[entry.target]
        if entry.shape != shape:
            wrong.append(f"{entry.name} has shape {entry.shape} instead of {shape}")
    if wrong:
        raise ModelError(
            f"{source}: {len(wrong)} weight(s) do not fit config.json: {'; '.join(wrong[:3])}; a whole checkpoint of the authors' "
            "layout is accepted; fetch it again."
        )
    notes = [f"left out: {count} {LEFT_OUT[prefix]} ({prefix}*)" for prefix, count in left.items() if count]
    return entries, inside, notes + (["left out: lm_head.weight, which is tied to the embeddings"] if tied else [])


def tower_name(name: str) -> str:
    """A tower weight's name without the wrappers around it, which differ between releases."""
    return name.removeprefix("vision_tower.").removeprefix("vision_model.")


def choose_tower(
    source: Path, inside: list[Entry], tower: PreTrainedModel, *, own: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The tower weights that are written, and what is to be said of those inside the checkpoint.

    Raises:
        ModelError: the checkpoint's own are asked for and are not all there.
    """
    apart = {tower_name(name): weight for name, weight in tower.state_dict().items()}
    problems = misfits(inside, apart)
    if own:
        if problems:
            raise ModelError(
                f"{source}: the checkpoint's own tower cannot be taken: {len(problems)} weight(s) do not fit the tower's config, first "
                f"{'; '.join(problems[:3])}; a checkpoint with a whole tower ({TOWER}*) is accepted; leave --own-tower out, or name "
                "the tower that it belongs to with --vision-tower."
            )
        held = {entry.target: read_tensor(entry) for entry in inside}
        return held, [f"tower weights: the checkpoint's own; {difference(held, apart)}"]
    if not inside:
        return apart, []
    fitting = [entry for entry in inside if entry.target in apart and entry.shape == tuple(apart[entry.target].shape)]
    told = difference({entry.target: read_tensor(entry) for entry in fitting}, apart)
    more = f"; {len(problems)} do not fit it, first {problems[0]}" if problems else ""
    note = f"left out: {len(inside)} tower weights of the checkpoint's own ({TOWER}*); {told}{more}"
    if problems or told != SAME:
        note += "; the folder's are used, as in the authors' code; --own-tower takes the checkpoint's"
        logger.warning("%s: %s.", source, note)
    return apart, [note]


SAME = "they equal the tower's folder"
"""Said where nothing differs."""


def misfits(inside: list[Entry], apart: Mapping[str, Tensor]) -> list[str]:
    """What keeps the checkpoint's own tower weights from filling the tower."""
    found = {entry.target: entry for entry in inside}
    return (
        [f"{found[name].name} is unknown" for name in sorted(found.keys() - apart.keys())]
        + [f"{TOWER}...{name} is missing" for name in sorted(apart.keys() - found.keys())]
        + [
            f"{found[name].name} has shape {found[name].shape} instead of {tuple(apart[name].shape)}"
            for name in sorted(found.keys() & apart.keys())
            if found[name].shape != tuple(apart[name].shape)
        ]
    )


def read_tensor(entry: Entry) -> Tensor:
    """The entry's values."""
    with safe_open(entry.file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(entry.name)
    return tensor


def difference(own: Mapping[str, Tensor], apart: Mapping[str, Tensor]) -> str:
    """How far tower weights are from those of the folder, in the coarser precision of the two: rounding is no difference."""
    differing, largest, square, norm = 0, 0.0, 0.0, 0.0
    for name, weight in own.items():
        other = apart[name]
        coarse = max(weight.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        one, two = weight.to(coarse).double(), other.to(coarse).double()
        change = float((one - two).norm())
        if change != 0:
            differing += 1
            largest = math.nan if math.isnan(change) else max(largest, float((one - two).abs().max()))
        square, norm = square + change**2, norm + float(two.norm()) ** 2
    if not own:
        return "none can be compared with the tower's folder"
    if not differing:
        return SAME
    relative = (square / norm) ** 0.5 if norm else float("inf")
    return (
        f"{differing} of {len(own)} differ from the tower's folder: largest difference {largest:.3g}, norm of all differences "
        f"{relative:.3g} of the folder's"
    )


def expected(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model but the tower's, as LLaVA files call them."""
    found = {}
    for name, weight in empty_model(config).state_dict().items():
        if name.startswith("model.language_model."):
            found["language_model.model." + name.removeprefix("model.language_model.")] = tuple(weight.shape)
        elif name.startswith("model.multi_modal_projector."):
            found[name.removeprefix("model.")] = tuple(weight.shape)
        elif name == "lm_head.weight" and not config.tie_word_embeddings:
            found["language_model.lm_head.weight"] = tuple(weight.shape)
    return found


def old_name(target: str) -> str:
    """The authors' name of a tensor."""
    return next(old + target.removeprefix(new) for old, new in NAMES if target.startswith(new))


def grows(target: str) -> bool:
    """Whether the tensor has a row for each token."""
    return target in {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}


def tensors(source: Path) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """File, name and shape of every tensor of a checkpoint, in one file or in shards with an index; headers alone are read.

    Raises:
        ModelError: there are pickles alone, nothing at all, or a shard is missing or damaged.
    """
    index = source / "model.safetensors.index.json"
    named = read_json(index).get("weight_map", {}).values() if index.is_file() else ["model.safetensors"]
    files = sorted(set(named))
    for file in files:
        if Path(file).name != file:
            raise ModelError(f"{index}: the shard {file!r} lies outside the folder; plain file names are accepted.")
        if not (source / file).is_file():
            raise ModelError(missing_weights(source, file))
        try:
            with safe_open(source / file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping: it has keys alone)
                    yield source / file, name, tuple(opened.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ModelError(f"{source / file}: damaged ({error}); fetch it again.") from error


def missing_weights(source: Path, file: str) -> str:
    """The message for weights that are not there."""
    pickles = sorted(path.name for path in source.glob("*.bin"))
    if pickles and file == "model.safetensors":
        return (
            f"{source}: the weights are pickles ({', '.join(pickles[:3])}), which can run code when read; safetensors are accepted; "
            "where you trust the files, convert them: read each with torch's weights_only=True and write it with "
            "safetensors.torch.save_file to model.safetensors."
        )
    return (
        f"{source}: {file} does not exist; model.safetensors, or shards with their index, are accepted; fetch it again."
    )


def write_weights(entries: list[Entry], tower: Mapping[str, Tensor], out: Path, held: int, rows: int) -> torch.dtype:
    """Writes one shard for each of the checkpoint's and one for the tower; returns the precision of the language model.

    A shard at a time is in memory. Where `<image>` needs a row more than the checkpoint held, it is the mean of the others, as
    transformers does it; as an input it is never read.
    """
    files = list(dict.fromkeys(entry.file for entry in entries))
    total, weight_map, size, dtype = len(files) + 1, {}, 0, torch.float32

    def write(number: int, content: dict[str, Tensor]) -> int:
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        save_file(content, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, name))
        return sum(tensor.numel() * tensor.element_size() for tensor in content.values())

    for number, file in enumerate(files, start=1):
        with safe_open(file, "pt") as opened:
            content = {entry.target: opened.get_tensor(entry.name) for entry in entries if entry.file == file}
        for target in filter(grows, content):
            content[target] = grown(content[target], rows - held)
        dtype = content.get("language_model.model.norm.weight", torch.empty(0, dtype=dtype)).dtype
        size += write(number, content)
    vision = {"vision_tower.vision_model." + name: weight.to(dtype).contiguous() for name, weight in tower.items()}
    size += write(total, vision)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return dtype


def grown(weight: Tensor, more: int) -> Tensor:
    """The matrix with that many rows more, each the mean of those that are there."""
    return torch.cat([weight, weight.float().mean(0, keepdim=True).to(weight.dtype).expand(more, -1)])


def write_config(config: LlavaConfig, dtype: torch.dtype, out: Path) -> None:
    """Writes config.json, with one precision for all parts."""
    config.architectures = ["LlavaForConditionalGeneration"]
    set_precision(config, dtype)
    config.save_pretrained(out)
