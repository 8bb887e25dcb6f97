"""Every option of a run, declared once; reads a recipe strictly. Imports no torch.

A recipe is a YAML file with the sections of `Recipe`. `read_recipe` reports every error of a file in one message, each with the
option's full name, what was found, what is accepted, and the nearest known key.
"""

from __future__ import annotations

from typing import Any

from align_ti.config.data import Data as Data
from align_ti.config.data import OnPolicy as OnPolicy
from align_ti.config.data import Source as Source
from align_ti.config.engines import ENGINES as ENGINES
from align_ti.config.engines import Engine as Engine
from align_ti.config.evaluation import Evaluation as Evaluation
from align_ti.config.evaluation import Generation as Generation
from align_ti.config.models import Composition as Composition
from align_ti.config.models import Lora as Lora
from align_ti.config.models import Student as Student
from align_ti.config.models import Teacher as Teacher
from align_ti.config.objective import DEFAULT_TERMS as DEFAULT_TERMS
from align_ti.config.objective import Objective as Objective
from align_ti.config.reading import ENGINE_CONFIGS as ENGINE_CONFIGS
from align_ti.config.reading import find_recipe as find_recipe
from align_ti.config.reading import lay_over as lay_over
from align_ti.config.reading import put as put
from align_ti.config.reading import read_mapping as read_mapping
from align_ti.config.reading import read_recipe as read_recipe
from align_ti.config.reading import shipped as shipped
from align_ti.config.recipe import Recipe as Recipe
from align_ti.config.recipe import listed as listed
from align_ti.config.recipe import not_cacheable as not_cacheable
from align_ti.config.recipe import nothing_compared as nothing_compared
from align_ti.config.recipe import refused_by as refused_by
from align_ti.config.training import Scores as Scores
from align_ti.config.training import Training as Training
from align_ti.registry import lookup

_MOVED = ("Sft", "Kd", "Iva", "Tpa")


def __getattr__(name: str) -> Any:
    # The options of Align-TI's terms stand in their terms' files, which import torch; their names are known here too.
    if name in _MOVED:
        return lookup("term", name.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
