"""Low-rank adapters on a student, through peft: wrapping, the model inside, merging, and weights for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from align_ti.errors import ModelError
from align_ti.models.families import backbone, head, language_model

TRAINED = "trained.safetensors"
"""In a checkpoint with adapters: every trained weight, since peft's own file leaves out those outside of the adapters."""


def wrap_with_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    targets: tuple[str, ...] | None = None,
    dora: bool = False,
    rslora: bool = False,
) -> PeftModel:
    """The model with an adapter beside each target layer; its output is unchanged until the adapters are trained.

    A part of the model (vision tower, projector, language model with its head) that has an adapter is trained through adapters
    alone; weights of other parts stay as they were, trained or frozen.

    Args:
        model: the model; what is frozen in it stays frozen and gets no adapter.
        rank: rank of the two matrices.
        alpha: the adapter's output is multiplied by alpha / rank.
        dropout: on the adapter's input.
        targets: ends of names of linear layers, or patterns over them; by default all of the language model.
        dora: train the length of weight vectors too (arXiv:2402.09353).
        rslora: multiply by alpha / sqrt(rank) instead.

    Raises:
        ModelError: a target is no linear layer, or everything it names is frozen.

    Source: Hu et al. (arXiv:2106.09685).
    """
    names = target_layers(model, targets)
    part_of = parts_of_parameters(model)
    adapted = {part_of[f"{name}.weight"] for name in names}
    kept = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and part_of[name] not in adapted
    ]
    options = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, use_dora=dora, use_rslora=rslora
    )
    wrapped = get_peft_model(model, options)
    # peft freezes everything but its own; parts without an adapter are trained as if there were none.
    for parameter in kept:
        parameter.requires_grad_(True)
    return wrapped


def parts_of_parameters(model: PreTrainedModel) -> dict[str, str]:
    """The part of the model that each parameter belongs to; the head belongs to the language model."""
    decoder, projection = language_model(model), {id(parameter) for parameter in head(model).parameters()}
    part = next(first_name(name) for name, module in model.named_modules() if module is decoder)
    return {
        name: part if id(parameter) in projection else first_name(name) for name, parameter in model.named_parameters()
    }


def first_name(name: str) -> str:
    """The part that a full name begins with."""
    return name.removeprefix("model.").partition(".")[0]


def target_layers(model: PreTrainedModel, targets: tuple[str, ...] | None) -> list[str]:
    """The full names of the linear layers that the targets name and that are not frozen.

    Raises:
        ModelError: a target names no linear layer, or only frozen ones.
    """
    inside = {id(module) for module in backbone(model).modules()}
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and id(layer) in inside
    }
    decoder = {id(module) for module in language_model(model).modules()}
    if targets is None:
        wanted = {"the language model": [name for name, layer in layers.items() if id(layer) in decoder]}
    else:
        wanted = {target: [name for name in layers if is_named(name, target)] for target in targets}
    for target, found in wanted.items():
        if not found:
            ends = dict.fromkeys(name.rpartition(".")[2] for name in layers)
            raise ModelError(
                f"student.lora.targets names {target!r}, but no linear layer of {type(model).__name__} is called that; ends of "
                f"their names are: {', '.join(ends)}; patterns such as language_model.layers.0.* are accepted too."
            )
        if not any(layers[name].weight.requires_grad for name in found):
            raise ModelError(
                f"student.lora wraps {target!r}, but student.freeze keeps all of it as it is; unfreeze it, or choose other targets."
            )
    chosen = {name for found in wanted.values() for name in found if layers[name].weight.requires_grad}
    return sorted(chosen)


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern means this module: by the end of its name, or by the whole of it with or without `model.` in front."""
    short = name.removeprefix("model.")
    return fnmatchcase(name, pattern) or fnmatchcase(short, pattern) or f".{name}".endswith(f".{pattern}")


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model of transformers itself, adapters included as layers of it, without peft's wrapper.

    Raises:
        ModelError: it is something else.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"the student is {type(inner).__name__}; a model of transformers, or one wrapped by peft, is accepted."
        )
    return inner


def merged(model: nn.Module) -> PreTrainedModel:
    """The model with its adapters added to the weights they stand beside; one without adapters as it is.

    Raises:
        ModelError: the sum is not finite.
    """
    if not isinstance(model, PeftModel):
        return unwrapped(model)
    try:
        model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            f"the adapters cannot be merged ({error}); training has diverged; resume from an earlier checkpoint with a lower "
            "training.learning_rate."
        ) from error
    return unwrapped(model.get_base_model())


def save_trained(model: nn.Module, folder: Path, write: bool = True) -> None:
    """Writes every trained weight into the folder, by the names that the model has in memory.

    Where FSDP 2 has the weights in parts all processes gather them, and those that do not `write` drop them.
    """
    weights = {name: whole(value.detach()) for name, value in trained(model).items()}
    if write:
        save_file(weights, folder / TRAINED, {"format": "pt"})


def whole(value: Tensor) -> Tensor:
    """The weight in full, gathered from all processes where it lies in parts."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).contiguous()


def load_trained(model: nn.Module, folder: Path) -> None:
    """Takes the trained weights from a folder.

    Raises:
        ModelError: there are none, or they are of other adapters.
    """
    if not (folder / TRAINED).is_file():
        raise ModelError(
            f"{folder} has no {TRAINED}; a checkpoint that AlignTITrainer wrote with adapters is accepted."
        )
    saved: Mapping[str, Tensor] = load_file(folder / TRAINED)
    own = trained(model)
    differing = sorted(saved.keys() ^ own.keys()) + sorted(
        name for name in saved.keys() & own.keys() if saved[name].shape != own[name].shape
    )
    if differing:
        raise ModelError(
            f"{folder}: the checkpoint trains other weights than this student: {len(differing)} differ, first {differing[0]}; resume "
            "with the same student.lora and student.freeze."
        )
    with torch.no_grad():
        for name, value in saved.items():
            target: Tensor = own[name]
            if isinstance(target, DTensor):
                target.copy_(distribute_tensor(value.to(target.device), target.device_mesh, target.placements))
            else:
                target.copy_(value)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
