"""The options of training, and those of the layer scores before it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from align_ti.options import Options


class Training(Options):
    """Optimiser, schedule, batches and logging; names are those of transformers' TrainingArguments."""

    where: ClassVar[str] = "training"
    max_steps: int = Field(default=-1, ge=-1)
    """Number of optimizer steps; -1: as many as num_train_epochs needs."""
    num_train_epochs: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Passes over the data, if max_steps is -1."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the weights of linear layers, AdamW for the rest (embeddings, head, norms, biases), with the same
    learning rate and weight decay. Muon needs PyTorch 2.9; not under DeepSpeed."""
    learning_rate: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule."""
    warmup_steps: float = Field(default=0.03, ge=0, allow_inf_nan=False)
    """Steps of linear warm-up; below 1: a share of all steps."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    """AdamW's decay rate of the squared-gradient average; lower (0.98) for runs of few steps."""
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Maximum gradient norm (gradient clipping)."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Records per forward pass on one device."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step, which has devices x per_device_train_batch_size x this many records. Terms are normalised
    over the whole step."""
    gradient_checkpointing: bool = False
    """Recompute the student's layers in backward: less memory, more time."""
    bf16: bool = False
    """Train under bfloat16 autocast."""
    fp16: bool = False
    """Train under float16 autocast."""
    torch_compile: bool = False
    """Compile the parts of the language model that treat each token separately (MLPs and norms), student and teacher; the first
    steps wait for the compiler."""
    dataloader_num_workers: int = Field(default=0, ge=0)
    """Worker processes that prepare records."""
    group_by_length: bool = False
    """Batch records of similar length: less padding, a little less randomness. Lengths are estimated from the text and the
    number of images, or exact if the records were checked before training."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between two lines of the log."""
    save_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    phases: bool = False
    """Measure where the time of each step goes and write it to phases.json; on an accelerator this slows the run a little."""
    flops: bool = True
    """Count the FLOPs of the first five steps, which the time of a step leaves out, and estimate the run's from them. Not counted with
    torch_compile, data.on_policy, quantised weights, attention other than eager and sdpa, or DeepSpeed."""
    gradient_shares_every: int = Field(default=0, ge=0)
    """Steps between two measurements of each term's own gradient, for its share in all of them; 0: none. A measurement takes about as
    long as a step for every term. Not under FSDP or DeepSpeed."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the log goes besides the run folder."""

    @model_validator(mode="after")
    def _steps_and_precision(self) -> Training:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0; give 1 or more, or -1 to train for num_train_epochs")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true; one of them is accepted; set the other to false")
        return self


class Scores(Options):
    """The sample of training data on which layers are scored (IRS, the instruction-relevance score)."""

    where: ClassVar[str] = "layer_scores"
    images: int = Field(default=64, ge=1)
    """Number of images with two or more instructions."""
    instructions: int = Field(default=4, ge=2)
    """Maximum number of instructions used for each image."""
