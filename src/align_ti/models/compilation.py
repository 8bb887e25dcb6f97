"""torch.compile for what a language model does with each token by itself."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from align_ti.errors import ModelError
from align_ti.models.families import language_model


def compile_tokenwise(model: PreTrainedModel, backend: str = "inductor") -> int:
    """Compiles MLPs and norms of the language model in place, for any number of tokens; returns how many modules.

    Attention, which is one fused kernel already, is left alone, for two reasons seen with torch 2.13. Its cache is indexed by
    layer, so a compiled layer is compiled again for every layer until dynamo's limit of 8, behind which it runs uncompiled without
    an error. And a graph made while nobody reads attention goes past a later reader (`align_ti.models.attention.watching`).

    Weights keep their names, so checkpoints and the finished student are what they are without compilation.

    Raises:
        ModelError: the language model has no list of layers.
    """
    layers = getattr(language_model(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"training.torch_compile: the language model of {type(model).__name__} has no `layers` to compile; set it to false."
        )
    modules = [child for layer in layers for child in layer.children() if is_tokenwise(child)]
    for module in modules:
        module.compile(backend=backend, dynamic=True)
    return len(modules)


def is_tokenwise(module: nn.Module) -> bool:
    """Whether a part of a layer reads each token by itself: what mixes tokens (attention, recurrence) knows its layer's number."""
    return not any(hasattr(part, "layer_idx") for part in module.modules())
