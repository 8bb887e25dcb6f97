"""Training engines of accelerate: which of them, and which of their options, compute the exact loss."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, Trainer

from align_ti.config.engines import SHARDED_WEIGHTS, Engine, refusals
from align_ti.errors import ConfigError
from align_ti.training.optimizers import MuonAdamW


def check(trainer: Trainer, *, on_policy: bool, candidates: bool, gradient_shares_every: int) -> None:
    """Refuses training engines and their options under which the loss would be another number.

    Args:
        trainer: the trainer with its accelerator.
        on_policy: whether the student answers some batches.
        candidates: whether a term compares rows of candidates.
        gradient_shares_every: steps between two measurements of each term's share in the gradient; 0: none.

    Raises:
        ConfigError: FSDP 1; sequences or layers split over devices; mixed precision or Muon under DeepSpeed; on-policy batches
            where weights are sharded; FSDP's own checkpointing where a term has candidates; shares in the gradient where it is
            sharded on each process, or where backward runs layers again in the way of reentrant checkpointing.
    """
    check_reentrance(trainer, gradient_shares_every)
    split = getattr(trainer.accelerator, "parallelism_config", None)
    for kind, name in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
        if split is not None and getattr(split, f"{kind}_size", 1) > 1:
            raise ConfigError(
                f"accelerate's parallelism_config asks for {name} parallelism ({kind}_size {getattr(split, f'{kind}_size')}), but "
                "the loss reads whole sequences and whole layers on one device: rows by their positions, attention of one layer, "
                f"candidates over a kept cache; {kind}_size 1 is accepted; for long sequences see docs/training.md (gradient "
                "checkpointing, one record on a device, FSDP 2)."
            )
    args = trainer.args
    refused = refusals(
        engine_of(trainer),
        muon=(trainer.optimizer_cls_and_kwargs or (None,))[0] is MuonAdamW,
        half="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        on_policy=on_policy,
        gradient_shares=gradient_shares_every > 0,
    )
    for refusal in refused:
        raise ConfigError(str(refusal))
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ConfigError(
            "training is sharded by FSDP 1, which PyTorch has replaced; FSDP 2 is accepted (`align-ti recipes copy fsdp2 "
            "fsdp2.yaml` writes a config for accelerate)."
        )
    if plugin.activation_checkpointing and candidates:
        raise ConfigError(
            "FSDP's own activation_checkpointing is on, under which the cache that candidates reuse would be written twice; use "
            "training.gradient_checkpointing: true instead, or objective.tpa.weight: 0."
        )


def check_reentrance(trainer: Trainer, gradient_shares_every: int) -> None:
    """Refuses to measure shares in the gradient where a term's own gradient cannot be computed without changing the step's.

    Raises:
        ConfigError: gradient checkpointing is reentrant.
    """
    checkpointing: Any = trainer.args.gradient_checkpointing_kwargs or {}
    if gradient_shares_every and trainer.args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise ConfigError(
            f"gradient_shares_every is {gradient_shares_every} (in a recipe: training.gradient_shares_every), but gradient "
            "checkpointing is reentrant, which cannot compute the gradient of one term; set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or gradient_shares_every to 0."
        )


def shards_weights(trainer: Trainer) -> bool:
    """Whether the student's weights are sharded over the processes: FSDP, or ZeRO-3."""
    return engine_of(trainer) in SHARDED_WEIGHTS


def engine_of(trainer: Trainer) -> Engine:
    """What spreads the run over processes."""
    if trainer.is_fsdp_enabled:
        return "fsdp2"
    if trainer.is_deepspeed_enabled:
        plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        return "zero3" if plugin is not None and plugin.zero_stage == 3 else "zero2"
    return "ddp"


def name_layers(plugin: Any, model: PreTrainedModel) -> None:
    """Tells accelerate which classes of layers to shard, if the user did not: those that the model names and has.

    transformers names layers that a model does not have (SigLIP's text embeddings in a vision tower), and accelerate refuses these.
    """
    names = {type(module).__name__ for module in model.modules()}
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted(names & set(model._no_split_modules or ())) or None
