"""Muon for the weights of linear layers and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from align_ti.config import Training
from align_ti.errors import ConfigError

MATCH = "match_rms_adamw"
"""PyTorch's name of the scale under which Muon's updates are as large as AdamW's: 0.2 sqrt(max(rows, columns)) times the orthogonal
matrix (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2). So one learning rate and one weight decay
serve both."""


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained weights that Muon is meant for: those of linear layers, adapters' among them, which map states to states.

    Not embeddings (of tokens or places) nor the output head, whose rows belong to tokens, convolutions, experts stacked in one tensor,
    norms and biases.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        tables.add(id(output.weight))
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - tables
    return [one for one in model.parameters() if one.requires_grad and one.ndim == 2 and id(one) in linear]


def saved_bytes(model: nn.Module) -> int:
    """Bytes that Muon's states take less than AdamW's: one average for a matrix in place of two, and no count of its steps."""
    return sum(one.numel() * one.element_size() + 4 for one in hidden_matrices(model))


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` for some parameters and `torch.optim.AdamW` for the others, with common groups, state and checkpoints.

    Args:
        params: parameters or groups of them, with options such as `weight_decay`; a group is divided in two where it has both kinds.
        matrices: the parameters of `params` that Muon trains; each has two axes. They are not kept.
        lr: the learning rate of both.
        betas: AdamW's decay rates.
        eps: AdamW's term against division by 0.
        weight_decay: the decoupled weight decay of both.
        momentum: the decay rate of Muon's gradient average (Nesterov).

    Raises:
        ConfigError: one of the matrices is not among the parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        matrices: Sequence[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        chosen = {id(one) for one in matrices}
        given: list[Any] = list(params)
        groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        if absent := chosen - {id(one) for group in groups for one in group["params"]}:
            raise ConfigError(
                f"{len(absent)} of {len(chosen)} matrices for Muon are not among the parameters that are trained; accepted: those of "
                "the model as it is trained; find them (hidden_matrices) after adapters are added and weights are frozen."
            )

        def these(of_muon: bool) -> list[dict[str, Any]]:
            divided = [
                {**group, "params": [one for one in group["params"] if (id(one) in chosen) == of_muon]}
                for group in groups
            ]
            return [group for group in divided if group["params"]]

        self.parts: list[Optimizer] = []
        self.whole = False
        if mine := these(of_muon=True):
            self.parts.append(
                torch.optim.Muon(mine, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn=MATCH)
            )
        if rest := these(of_muon=False):
            # Fused, as transformers' own default is: no temporaries of the embeddings' size.
            self.parts.append(AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.share()
        self.whole = True

    def share(self) -> None:
        """Lets both parts read and write the groups and the state of the whole."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For `Optimizer.__init__` alone: a later group would belong neither to Muon nor to AdamW.

        Raises:
            ConfigError: it is made already.
        """
        if self.whole:
            raise ConfigError(
                "parameters are added to a MuonAdamW that is made already; give all of them when it is made."
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """What copies are made from."""
        return {**super().__getstate__(), "parts": self.parts, "whole": self.whole}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when a checkpoint is loaded, with groups and state made anew."""
        super().__setstate__(state)
        self.share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def check_optimizer(training: Training) -> None:
    """Refuses an optimizer that this PyTorch does not have.

    Raises:
        ConfigError: Muon, before PyTorch 2.9.
    """
    if training.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"training.optimizer is muon, which came with PyTorch 2.9, and this is {torch.__version__}; upgrade torch, or set "
            "training.optimizer: adamw."
        )


def optimizer_of(training: Training, model: nn.Module) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """The recipe's optimizer as transformers' Trainer takes it (`optimizer_cls_and_kwargs`); None: its own AdamW.

    Args:
        training: learning rate and the rest; weight decay is the trainer's.
        model: the student as it is trained, adapters added and weights frozen.

    Raises:
        ConfigError: this PyTorch has no Muon.
    """
    check_optimizer(training)
    if training.optimizer == "adamw":
        return None
    return MuonAdamW, {
        "matrices": hidden_matrices(model),
        "lr": training.learning_rate,
        "betas": (0.9, training.adam_beta2),
    }
