"""The steps that the benchmarks compare: the same batch and models under ours and under what others run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align_ti.config import Iva, Objective, Tpa
from align_ti.models.compilation import compile_tokenwise
from align_ti.models.pairing import pair_up
from align_ti.training import objective as ours
from align_ti.training import passes
from benchmarks import rivals
from benchmarks.shapes import Shape, make_batch, make_candidates, make_pair

# The released design has to draw its candidates from a pass of the student; ours draws in its first pass. `given` leaves that pass out.
VARIANTS = (
    "vanilla_kd",
    "ours_kd",
    "align_ti_1.00",
    "align_ti_0.50",
    "align_ti_0.25",
    "align_ti_0.25_two_towers",
    "align_ti_0.25_iva_share_0.5",
    "align_ti_0.25_compiled",
    "align_ti_0.25_teacher_bfloat16",
    "released_design",
    "released_design_given",
)
NUM_CANDIDATES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """A pair of models with an optimizer whose state exists already, and the batch that they read."""

    shape: Shape
    student: PreTrainedModel
    teacher: PreTrainedModel
    batch: dict[str, Any]
    optimizer: torch.optim.Optimizer


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute the loss; `share` is that of the candidates that need a row, None without TPA."""

    name: str
    bench: Bench
    loss: Callable[[], Tensor]
    share: float | None = None

    def step(self) -> Tensor:
        """One step of training, after which there are no gradients; the loss in nats, detached."""
        loss = self.loss()
        loss.backward()
        self.bench.optimizer.step()
        self.bench.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def make_bench(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> Bench:
    """Models, batch and optimizer. The learning rate is 0: AdamW does all of its work, and the loss stays what it is."""
    student, teacher = make_pair(shape, dtype=dtype, teacher_dtype=teacher_dtype, device=device)
    if compiled:
        for model in (student, teacher):
            compile_tokenwise(model)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Bench(shape, student, teacher, make_batch(shape, dtype=dtype, device=device), optimizer)


def make_variants(
    names: tuple[str, ...], shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Variant]:
    """The named variants over as few pairs of models as they allow.

    Raises:
        ValueError: a name that is none.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is no variant; {', '.join(VARIANTS)} are accepted.")
    benches: dict[str, Bench] = {}
    made = []
    for name in names:
        kind = next((kind for kind in ("teacher_bfloat16", "compiled") if name.endswith(kind)), "plain")
        if kind not in benches:
            teacher_dtype = torch.bfloat16 if kind == "teacher_bfloat16" else None
            benches[kind] = make_bench(shape, device, dtype, teacher_dtype, compiled=kind == "compiled")
        made.append(make_variant(name, benches[kind]))
    return made


def make_variant(name: str, bench: Bench) -> Variant:
    """One variant over a pair of models."""
    if name == "vanilla_kd":
        return Variant(name, bench, lambda: rivals.vanilla_kd(bench.student, bench.teacher, bench.batch))
    if name == "ours_kd":
        return Variant(name, bench, our_loss(bench, Objective(iva=Iva(weight=0.0), tpa=Tpa(weight=0.0))))
    if name.startswith("released_design"):
        return Variant(name, bench, released_loss(bench, drawing=not name.endswith("given")), 1.0)
    share = float(name.split("_")[2])
    visual = 0.5 if name.endswith("iva_share_0.5") else 1.0
    return align_ti(bench, share, shared_tower=not name.endswith("two_towers"), visual_share=visual, name=name)


def align_ti(
    bench: Bench,
    share: float,
    count: int = NUM_CANDIDATES,
    *,
    shared_tower: bool = True,
    visual_share: float = 1.0,
    name: str = "align_ti",
) -> Variant:
    """Our whole loss, with the given share of `count` candidates needing a row of their own."""
    objective = Objective(iva=Iva(layer=watched_layer(bench), share=visual_share), tpa=Tpa(candidates=count))
    candidates = make_candidates(bench.batch, bench.shape, count, share)
    loss = our_loss(bench, objective, shared_tower=shared_tower)

    def scripted_loss() -> Tensor:
        with scripted(candidates):
            return loss()

    return Variant(name, bench, scripted_loss, share)


def watched_layer(bench: Bench) -> int:
    """The layer whose attention weighs the visual rows: the middle one, since random weights give none a reason."""
    layers: int = bench.teacher.config.get_text_config().num_hidden_layers
    return layers // 2


def our_loss(bench: Bench, objective: Objective, *, shared_tower: bool = True) -> Callable[[], Tensor]:
    """The package's loss, with what the trainer finds once about the pair found beforehand."""
    found = pair_up(bench.student, bench.teacher)
    pairing = dataclasses.replace(found, shared_tower=shared_tower and found.shared_tower)
    generator = torch.Generator(bench.student.device).manual_seed(0)

    def loss() -> Tensor:
        return ours.distillation_loss(
            bench.student, bench.teacher, bench.batch, objective, generator=generator, pairing=pairing
        ).loss

    return loss


def released_loss(bench: Bench, *, drawing: bool) -> Callable[[], Tensor]:
    """The released design at share 1.0; `drawing` adds the student's pass that candidates are drawn from."""
    candidates = make_candidates(bench.batch, bench.shape, NUM_CANDIDATES, 1.0)

    def loss() -> Tensor:
        if drawing:
            rivals.drawn_in_full(bench.student, bench.batch, NUM_CANDIDATES)
        return rivals.released_design(bench.student, bench.teacher, bench.batch, candidates, watched_layer(bench))

    return loss


@contextmanager
def scripted(candidates: Tensor) -> Iterator[None]:
    """Inside the block candidates are drawn as ever, so that drawing costs what it costs, and then replaced by these."""
    draw = passes.draw_candidates

    def drawn_then_replaced(*arguments: Any) -> Tensor:
        draw(*arguments)
        return candidates

    passes.draw_candidates = drawn_then_replaced
    try:
        yield
    finally:
        passes.draw_candidates = draw
