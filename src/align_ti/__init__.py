"""Align-TI: distil a large vision-language model into a small one by aligning its token interactions.

The public names are loaded when they are first used, so that importing the package is quick and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align_ti.config import Objective as Objective
    from align_ti.config import Recipe as Recipe
    from align_ti.config import read_recipe as read_recipe
    from align_ti.data.collator import Collator as Collator
    from align_ti.data.collator import EncodedConversations as EncodedConversations
    from align_ti.data.conversation import Conversation as Conversation
    from align_ti.data.conversation import Turn as Turn
    from align_ti.data.roles import encode as encode
    from align_ti.data.sources import read_conversations as read_conversations
    from align_ti.errors import AlignTIError as AlignTIError
    from align_ti.interactions.layer_scores import score_layers as score_layers
    from align_ti.losses.divergences.base import Divergence as Divergence
    from align_ti.models.loading import load_model as load_model
    from align_ti.models.loading import load_processor as load_processor
    from align_ti.models.pairing import pair_up as pair_up
    from align_ti.pipeline.training import distil as distil
    from align_ti.registry import register as register
    from align_ti.terms.base import Term as Term
    from align_ti.terms.base import WeightedRows as WeightedRows
    from align_ti.terms.iva import Iva as Iva
    from align_ti.terms.kd import Kd as Kd
    from align_ti.terms.readings import Readings as Readings
    from align_ti.terms.readings import Reads as Reads
    from align_ti.terms.sft import Sft as Sft
    from align_ti.terms.tpa import Tpa as Tpa
    from align_ti.training.objective import DistillationOutput as DistillationOutput
    from align_ti.training.objective import distillation_loss as distillation_loss
    from align_ti.training.trainer import AlignTITrainer as AlignTITrainer

__version__ = "0.2.0"

_HOME = {
    "AlignTIError": "errors",
    "AlignTITrainer": "training.trainer",
    "Collator": "data.collator",
    "Conversation": "data.conversation",
    "DistillationOutput": "training.objective",
    "Divergence": "losses.divergences.base",
    "EncodedConversations": "data.collator",
    "Iva": "terms.iva",
    "Kd": "terms.kd",
    "Objective": "config",
    "Readings": "terms.readings",
    "Reads": "terms.readings",
    "Recipe": "config",
    "Sft": "terms.sft",
    "Tpa": "terms.tpa",
    "Term": "terms.base",
    "Turn": "data.conversation",
    "WeightedRows": "terms.base",
    "distil": "pipeline.training",
    "distillation_loss": "training.objective",
    "encode": "data.roles",
    "load_model": "models.loading",
    "load_processor": "models.loading",
    "pair_up": "models.pairing",
    "read_conversations": "data.sources",
    "read_recipe": "config",
    "register": "registry",
    "score_layers": "interactions.layer_scores",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'align_ti' has no attribute {name!r}")
    return getattr(import_module(f"align_ti.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
