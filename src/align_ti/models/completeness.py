"""What a model's folder has to say itself, since `from_pretrained` fills gaps with a class's defaults and says nothing.

Seen with transformers 5.23: without its files a tokenizer knows its special tokens alone; without tokenizer_config.json it has the
class's special tokens, or none; an image processor without sizes makes images of 224 pixels; without generation_config.json a model
stops at the default of its class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from align_ti.errors import ModelError
from align_ti.models.families import end_tokens

NAMES_OF_TOKENS = ("tokenizer_config.json", "special_tokens_map.json")
"""The files that name a tokenizer's special tokens."""

GENERATION = "generation_config.json"
"""The file that says where answers end."""

SIZES = ("size", "crop_size", "min_pixels", "max_pixels")
"""What image processors call the size of a prepared image."""


KINDS = ("image_processor_type", "feature_extractor_type")
"""What files call the class of an image processor."""


def has_file(path: str, name: str) -> bool:
    """Whether the folder, or the hub's copy that a load has just fetched, holds the file."""
    if Path(path).is_dir():
        return (Path(path) / name).is_file()
    try:
        return isinstance(try_to_load_from_cache(path, name), str)
    except ValueError:
        return False


def check_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a loaded tokenizer whose vocabulary or special tokens transformers made up for want of files.

    Raises:
        ModelError: it was made from no vocabulary, or nothing names its special tokens.
    """
    # T5's class makes up one token beside its special ones.
    if len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) < 2:
        files = dict.fromkeys(["tokenizer.json", *getattr(type(tokenizer), "vocab_files_names", {}).values()])
        raise ModelError(
            f"{path}: no file holds a vocabulary, so transformers made up a tokenizer of {len(tokenizer)} token(s) "
            f"({type(tokenizer).__name__}); accepted: tokenizer.json, or all of {', '.join(list(files)[1:])}; copy them from where the "
            "model comes from, or save them beside it with tokenizer.save_pretrained."
        )
    if not any(has_file(path, name) for name in NAMES_OF_TOKENS):
        raise ModelError(
            f"{path}: no file names the tokenizer's special tokens, so transformers took eos_token {tokenizer.eos_token!r} and "
            f"pad_token {tokenizer.pad_token!r} from its class; accepted: {' or '.join(NAMES_OF_TOKENS)}; copy it from where the model "
            "comes from, or save it beside the model with tokenizer.save_pretrained."
        )


def check_pictures(path: str, pictures: BaseImageProcessor) -> None:
    """Refuse a loaded image processor whose file leaves out what prepared images look like.

    Raises:
        ModelError: the class would be guessed, or size, mean or deviation would be its default.
    """
    stated: dict[str, Any] = type(pictures).get_image_processor_dict(path)[0]
    missing = []
    if not any(stated.get(name) for name in KINDS):
        # The class is guessed from the model's type, and another one crops or pads otherwise.
        missing.append(KINDS[0])
    if getattr(pictures, "do_resize", False) and not any(stated.get(name) is not None for name in SIZES):
        missing.append("size")
    if getattr(pictures, "do_normalize", False):
        missing += [name for name in ("image_mean", "image_std") if stated.get(name) is None]
    if missing:
        taken = ", ".join(f"{name} {shown(getattr(pictures, name, None))}" for name in missing)
        raise ModelError(
            f"{path}: the image processor's file does not say {', '.join(missing)}, so transformers took defaults of "
            f"{type(pictures).__name__} ({taken}); a preprocessor_config.json or processor_config.json that says what the model was "
            "trained with is accepted; copy it from where the model comes from, or write the values there."
        )


def shown(value: Any) -> str:
    """A setting in an error, without the entries of a size that are not used."""
    if hasattr(value, "items"):
        value = {name: entry for name, entry in value.items() if entry is not None}
    return str(value)


def check_counts(path: str, processor: ProcessorMixin) -> None:
    """Refuse a loaded processor of the LLaVA kind that does not know how many visual tokens an image has.

    Raises:
        ModelError: patch size or feature strategy is not there.
    """
    unknown = [
        name
        for name in ("patch_size", "vision_feature_select_strategy")
        if hasattr(processor, name) and getattr(processor, name) is None
    ]
    if unknown:
        raise ModelError(
            f"{path}: the processor has no {' and no '.join(unknown)}, so it cannot count visual tokens; the values of the model's "
            "config.json are accepted; write them to processor_config.json."
        )


def unstated_ends(path: str, model: PreTrainedModel) -> tuple[bool, str]:
    """Whether the model's end tokens are a mere default of its class, and a sentence about where they come from, empty if all is said.

    Where generation_config.json does not name them they are those of the model's config, whose class may have a default of its own.
    """
    held = has_file(path, GENERATION)
    if held and model.generation_config is not None and model.generation_config.eos_token_id is not None:
        return False, ""
    lacking = f"{GENERATION} names no eos_token_id" if held else f"no {GENERATION}"
    config = PreTrainedConfig.get_config_dict(path)[0]
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    stated = any(part.get("eos_token_id") is not None for part in parts)
    ends = ", ".join(map(str, end_tokens(model)))
    if not ends:
        return False, f"{lacking}, nor does config.json name an end token: nothing says where an answer ends"
    origin = "config.json" if stated else f"a default of {type(model.config.get_text_config()).__name__}, named nowhere"
    return not stated, f"{lacking}: the end of an answer is token {ends}, from {origin}"
