"""A new LLaVA model from a vision tower and a language model; the projector between them is fresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

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
    loading,
    precision,
    set_precision,
)
from align_ti.checkpoints.templates import check_template, vicuna, with_pictures
from align_ti.config import Composition
from align_ti.errors import ModelError
from align_ti.models.completeness import unstated_ends
from align_ti.models.families import backbone, check_layout, class_tokens, head
from align_ti.models.llava import Strategy, build_config, build_processor
from align_ti.models.loading import check_loaded
from align_ti.models.overrides import Projection
from align_ti.models.saving import save_model
from align_ti.runs import new_folder


def compose(options: Composition) -> Made:
    """Writes the model that the options name; plain transformers loads the folder.

    Raises:
        RunError: the folder is not empty.
        ModelError: a part cannot be loaded, or the parts do not fit each other.
    """
    with new_folder(Path(options.out)) as draft:
        tower, pictures = load_tower(options.vision), load_pictures(options.vision)
        check_feature_layer(options.feature_layer, tower.config, "compose.feature_layer")
        strategy = select_strategy(options, tower)
        language = load_language_model(options.text)
        tokenizer = load_tokenizer(options.text, language.config)
        template, name = choose_template(options, tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            room = make_room(language, image_id(tokenizer))
            model = assemble(tower, language, image_id(tokenizer), options.feature_layer, strategy)
        config = model.config
        processor = build_processor(pictures, tokenizer, vision=tower.config, strategy=strategy, chat_template=template)
        # Both write chat_template.jinja, the tokenizer last.
        tokenizer.chat_template = template
        end = check_template(processor, config, name)
        default, told = unstated_ends(options.text, language)
        ends = end_ids(None if default else language, tokenizer, end)
        model.generation_config = greedy_generation(tokenizer, ends)
        dtype = rows_of(language).dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        nn.Module.to(model, dtype)
        set_precision(config, dtype)
        save_model(model, draft)
        processor.save_pretrained(draft)
    return Made(
        folder=Path(options.out),
        parameters=count_parameters(config),
        dtype=precision(dtype),
        image_token=config.image_token_index,
        visual_tokens=config.image_seq_length,
        end_tokens=ends,
        notes=(f"chat template: {name}", room, *([f"{options.text}: {told}"] if told else [])),
    )


def load_language_model(path: str) -> PreTrainedModel:
    """The causal language model in a folder or of a hub name.

    Raises:
        ModelError: it cannot be loaded, or its layers are not followed exactly by the objective.
    """
    with loading(path, "language model", "a folder or hub name of a causal language model, saved as safetensors,"):
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(
            path,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Not taken: check_loaded refuses them by name.
            ignore_mismatched_sizes=True,
        )
    check_loaded(path, info)
    check_layout(model)
    loaded: PreTrainedModel = model.eval()
    check_plain_logits(path, loaded)
    return loaded


def check_plain_logits(path: str, language: PreTrainedModel) -> None:
    """Refuse a language model that caps or scales its logits: a LLaVA model takes them as the head gives them.

    Raises:
        ModelError: what the model makes of hidden states is not what its head makes of them.
    """
    # No product is compared: two of other shapes need not give the same bits.
    if isinstance(head(language), nn.Linear) and Projection(language).linear is None:
        raise ModelError(
            f"{path}: {type(language).__name__} caps or scales its logits behind the head, which a LLaVA model does not, so its "
            "distributions would change; language models with plain logits are accepted, such as Llama, Qwen2 and Qwen3."
        )


def select_strategy(options: Composition, tower: PreTrainedModel) -> Strategy:
    """Which positions of the tower's output become visual tokens: by default every patch and no class token.

    Raises:
        ModelError: a patch would be dropped in place of a class token.
    """
    has_class = class_tokens(tower.config) > 0
    if options.select_strategy == "default" and not has_class:
        raise ModelError(
            f"compose.select_strategy is 'default', which drops the first position, but {options.vision} has no class token there, "
            "so a patch would be lost; 'full' is accepted."
        )
    return options.select_strategy or ("default" if has_class else "full")


def choose_template(options: Composition, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The chat template and its name: as asked for, else the language model's own with images, else the vicuna form.

    Raises:
        ModelError: the file cannot be read, or the vicuna form has no token to end an answer with.
    """
    chosen, own = options.chat_template, tokenizer.chat_template
    if chosen is None and own:
        return with_pictures(own if isinstance(own, str) else own["default"]), "the language model's own, with images"
    if chosen in {None, "vicuna"}:
        if tokenizer.eos_token is None:
            raise ModelError(f"{options.text}: the tokenizer has no eos_token to end an answer with; give it one.")
        return vicuna(tokenizer.eos_token), "vicuna"
    try:
        return Path(str(chosen)).read_text(encoding="utf-8"), str(chosen)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"compose.chat_template is {chosen!r}, which cannot be read ({error}); a Jinja file or 'vicuna' is accepted."
        ) from error


def rows_of(language: PreTrainedModel) -> Tensor:
    """The head's weight, a row for each token."""
    return next(head(language).parameters())


def make_room(language: PreTrainedModel, token: int) -> str:
    """Sees to it that the token has a row in embeddings and head; says how."""
    rows = len(rows_of(language))
    if token < rows:
        return f"{rows} rows of embeddings: <image> took a free one"
    language.resize_token_embeddings(token + 1)
    return f"{rows} rows of embeddings were all taken: now {token + 1}"


def assemble(
    tower: PreTrainedModel, language: PreTrainedModel, image_token: int, feature_layer: int, strategy: Strategy
) -> LlavaForConditionalGeneration:
    """The parts as one model; the projector is drawn anew, as PyTorch draws linear layers.

    Raises:
        ModelError: the language model is not of the form that a LLaVA model holds.
    """
    config = build_config(
        tower.config, language.config, image_token=image_token, feature_layer=feature_layer, strategy=strategy
    )
    model = empty_model(config)
    parts: tuple[tuple[nn.Module, nn.Module], ...] = (
        (model.model.language_model, backbone(language)),
        (model.lm_head, head(language)),
    )
    for place, part in parts:
        wanted, found = (
            {name: weight.shape for name, weight in module.state_dict().items()} for module in (place, part)
        )
        differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        if type(place) is not type(part) or differing:
            reason = ", ".join(differing[:3]) or type(part).__name__
            raise ModelError(
                f"{type(language).__name__} does not fit into a LLaVA model ({reason}); a decoder with a plain head without bias is "
                "accepted, such as Llama, Qwen2 or Qwen3."
            )
    model.model.vision_tower = tower
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config)
    model.model.language_model = backbone(language)
    model.lm_head = head(language)
    return model


def end_ids(language: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, end: int) -> tuple[int, ...]:
    """The template's end of an answer first, then what the language model itself stops at; None: it does not say."""
    own = language.generation_config.eos_token_id if language is not None and language.generation_config else None
    more = own if isinstance(own, list) else [own, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(token for token in [end, *more] if token is not None))
