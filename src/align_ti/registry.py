"""The names that a recipe may use: divergences and terms, the package's own and those that a user's file registers. Imports no
torch.

A built-in name is looked up in a table and its module imported when it is first used. A file of the user's adds to the table
with the decorator `register`; it runs only if the user allows it (`load_extension`), never because a recipe says so.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from align_ti.errors import ConfigError

Kind = Literal["divergence", "term"]
"""What a name stands for."""

BUILT_IN: dict[Kind, dict[str, str]] = {
    "divergence": {
        "forward_kl": "align_ti.losses.divergences.forward_kl:ForwardKl",
        "reverse_kl": "align_ti.losses.divergences.reverse_kl:ReverseKl",
        "jensen_shannon": "align_ti.losses.divergences.jensen_shannon:JensenShannon",
        "skew_kl": "align_ti.losses.divergences.skew_kl:SkewKl",
        "skew_reverse_kl": "align_ti.losses.divergences.skew_reverse_kl:SkewReverseKl",
        "adaptive_kl": "align_ti.losses.divergences.adaptive_kl:AdaptiveKl",
        "alpha_beta": "align_ti.losses.divergences.alpha_beta:AlphaBeta",
        "total_variation": "align_ti.losses.divergences.total_variation:TotalVariation",
    },
    "term": {
        "sft": "align_ti.terms.sft:Sft",
        "kd": "align_ti.terms.kd:Kd",
        "iva": "align_ti.terms.iva:Iva",
        "tpa": "align_ti.terms.tpa:Tpa",
        "llava_kd_mdist": "align_ti.terms.llava_kd_mdist:LlavaKdMdist",
        "llava_kd_rdist": "align_ti.terms.llava_kd_rdist:LlavaKdRdist",
        "align_kd": "align_ti.terms.align_kd:AlignKd",
        "compodistill": "align_ti.terms.compodistill:CompoDistill",
        "em_kd_vsd": "align_ti.terms.em_kd_vsd:EmKdVsd",
        "em_kd_vlad": "align_ti.terms.em_kd_vlad:EmKdVlad",
    },
}
"""Where each name's class is: module:class."""

_REGISTERED: dict[Kind, dict[str, type[Any]]] = {"divergence": {}, "term": {}}

Registered = TypeVar("Registered", bound=type[Any])


def names(kind: Kind) -> tuple[str, ...]:
    """Every name of a kind: the built-in ones in their order, then the registered ones."""
    return (*BUILT_IN[kind], *_REGISTERED[kind])


def lookup(kind: Kind, name: str) -> type[Any]:
    """The class that a name stands for.

    Raises:
        ConfigError: nothing has that name.
    """
    if name in _REGISTERED[kind]:
        return _REGISTERED[kind][name]
    if name not in BUILT_IN[kind]:
        raise ConfigError(f"{name!r} is no known {kind}; {suggestion(kind, name)}")
    module, _, found = BUILT_IN[kind][name].partition(":")
    result: type[Any] = getattr(import_module(module), found)
    return result


def suggestion(kind: Kind, name: str) -> str:
    """The nearest known name as a question, or all of them."""
    nearest = difflib.get_close_matches(name, names(kind), n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(names(kind))}."


def register(cls: Registered) -> Registered:
    """Class decorator: makes a divergence or term of your own available to recipes under its `name`.

    Raises:
        ConfigError: the class has no valid name, or the name is already in use.
    """
    kind: Kind | None = getattr(cls, "kind", None)
    if kind not in _REGISTERED:
        raise ConfigError(
            f"{cls.__name__} is neither a divergence nor a term; derive it from align_ti.Divergence or align_ti.Term."
        )
    name = cls.__dict__.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(
            f"{cls.__name__}.name is {name!r}; accepted: small letters, digits and underscores; it is what a recipe calls the {kind}."
        )
    if kind == "term" and (name in RESERVED or name.endswith("_weight")):
        raise ConfigError(
            f"{cls.__name__}.name is {name!r}, which the log or the objective uses already; give another name."
        )
    other = _REGISTERED[kind].get(name)
    # A file that is loaded again replaces its own classes, and no others.
    if name in BUILT_IN[kind] or (other is not None and source_of(other) != source_of(cls)):
        raise ConfigError(f"{cls.__name__}: there is a {kind} named {name!r} already; give another name.")
    _REGISTERED[kind][name] = cls
    return cls


RESERVED = frozenset(
    ("loss", "step", "epoch", "grad_norm", "learning_rate", "branch_share", "on_policy_share", "cut_share")
    + ("chunk_rows", "terms", "active", "only", "known", "section", "where", "needs_teacher", "needs_layer", "at_layer")
    + ("scheduled", "at_progress", "without_schedules", "moments", "stages", "changes_work", "same_work")
)
"""Names that the log or `Objective` uses for something else than a term."""


def source_of(cls: type[Any]) -> tuple[str, str]:
    """Where a class was written: its file or module, and its name there."""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None) or cls.__module__, cls.__qualname__


def load_extension(path: Path) -> tuple[str, ...]:
    """Runs a Python file of the user's and returns the names that it registered.

    Raises:
        ConfigError: the file does not exist, cannot be run, or registers nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"extension {path}: no such file; give the path of a Python file that registers its classes.")
    before = {kind: dict(found) for kind, found in _REGISTERED.items()}
    # Two files of one name are two modules.
    module_name = f"align_ti_extension_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"extension {path}: not a Python file; a file that ends in .py is accepted.")
    module = importlib.util.module_from_spec(spec)
    # Type hints of its classes are looked up by the module's name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # Nothing of a file that failed halfway stays known.
        for kind, found in before.items():
            _REGISTERED[kind].clear()
            _REGISTERED[kind].update(found)
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"extension {path}: running it stopped with {type(error).__name__}: {error}") from error
    added = tuple(_added(before))
    if not added:
        raise ConfigError(
            f"extension {path}: it registers nothing; put @align_ti.register above each divergence or term in it."
        )
    return added


def _added(before: dict[Kind, dict[str, type[Any]]]) -> Iterator[str]:
    for kind, found in _REGISTERED.items():
        yield from (name for name, cls in found.items() if before[kind].get(name) is not cls)
