"""The same numbers from every engine: one process, DDP, FSDP 2, DeepSpeed, a sharded teacher; uneven ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from align_ti.config import Iva, Objective
from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.sources import read_conversations
from align_ti.errors import ConfigError
from align_ti.models.adapters import wrap_with_lora
from align_ti.models.loading import freeze, load_model, load_processor
from align_ti.training.optimizers import MuonAdamW
from align_ti.training.trainer import AlignTITrainer
from tests import small
from tests.launching import on_processes
from tests.test_trainer import FixedDraws

WORKER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.test_engines import Case, left_behind
from align_ti.processes import part_in_order
left_behind(Path(sys.argv[1]), Path(sys.argv[2]), Case(**json.loads(sys.argv[3])))
part_in_order()
"""


@dataclass(frozen=True)
class Case:
    """How some samples are trained on."""

    engine: str = "none"
    """none, ddp, fsdp2, zero2 or zero3."""
    processes: int = 1
    batch: int = 4
    accumulate: int = 1
    shard_teacher: bool = False
    uneven: bool = False
    """Half of the samples have no image, and these have no candidates either."""
    checkpointing: bool = False
    lora: bool = False
    untied: bool = False
    """The head has weights of its own, which nothing gathers before it is called."""
    draw: bool = False
    """Candidates are drawn, the most probable token each time, rather than given by the samples."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of terms other than 1."""

    def alone(self) -> Case:
        """The same step by one process that takes all samples at once."""
        batch = self.processes * self.batch * self.accumulate
        return Case(
            batch=batch,
            draw=self.draw,
            uneven=self.uneven,
            checkpointing=self.checkpointing,
            lora=self.lora,
            untied=self.untied,
            weights=self.weights,
        )

    def __str__(self) -> str:
        changed = {name: value for name, value in asdict(self).items() if value != getattr(Case(), name)}
        return "-".join(str(value) if isinstance(value, str) else f"{name}={value}" for name, value in changed.items())


@dataclass(frozen=True, slots=True)
class FixedCandidates(Collator):
    """As the collator, with the candidates that samples carry."""

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        batch = super(FixedCandidates, self).__call__(
            [{name: value for name, value in sample.items() if name != "candidates"} for sample in samples]
        )
        candidates = torch.zeros(*batch["input_ids"].shape, 2, dtype=torch.long)
        for row, sample in enumerate(sample for sample in samples if "candidates" in sample):
            candidates[row, : len(sample["candidates"])] = sample["candidates"]
        return {**batch, "candidates": candidates} if "candidates" in samples[0] else batch


class Uneven(FixedDraws):
    """Samples without an image try nothing but the end of a turn, which is left out: they have no candidate."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if "pixel_values" not in sample:
            sample["candidates"] = torch.full_like(sample["candidates"], int(sample["input_ids"][-1]))
        return sample


def run_of(folder: Path, out: Path, case: Case) -> AlignTITrainer:
    """A trainer of two steps; it tells accelerate, which offers FSDP on accelerators alone, that this machine's CPU is one."""
    deepspeed = {"deepspeed": zero(int(case.engine[-1]))} if case.engine.startswith("zero") else {}
    if deepspeed:
        # accelerate knows no backend of DeepSpeed's for CPUs, and would take each process to be alone.
        PartialState._prepare_backend = lambda *_arguments, **_options: ("gloo", DistributedType.NO)  # type: ignore[method-assign]
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=case.accumulate,
        gradient_checkpointing=case.checkpointing,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=1e9,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not deepspeed,
        save_strategy="no",
        seed=3,
        **deepspeed,
    )
    if case.engine == "fsdp2":
        assert args.device.type == "cpu"  # the processes find each other here
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        }
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    processor = load_processor(str(folder / "student"))
    records = read_conversations(folder / "train.json")
    if case.uneven:
        words = (Turn("user", "what is seven plus one?"), Turn("assistant", "eight"))
        records = [*records[:2], *(Conversation(words, place=f"words {index}") for index in range(2))]
    kind = EncodedConversations if case.draw else Uneven if case.uneven else FixedDraws
    return AlignTITrainer(
        model=student_of(folder, case),
        teacher_model=load_model(str(folder / "teacher"), "float32"),
        args=args,
        objective=objective_of(case),
        train_dataset=kind(records, processor),
        processing_class=processor,
        data_collator=FixedCandidates(0),
        shard_teacher=case.shard_teacher,
    )


def zero(stage: int) -> dict[str, Any]:
    """A config of DeepSpeed that partitions even the smallest weights."""
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        },
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


def objective_of(case: Case) -> Objective:
    """The four terms of Align-TI, with the case's weights."""
    iva = Iva(layer=1, weight=case.weights.get("iva", 1.0))
    others = {name: {"weight": weight} for name, weight in case.weights.items() if name != "iva"}
    drawn = {"tpa": {"top_k": 1, **others.pop("tpa", {})}} if case.draw else {}
    return Objective.model_validate({"iva": iva, **others, **drawn})


def student_of(folder: Path, case: Case):
    """The student as training begins."""
    student = load_model(str(folder / ("untied" if case.untied else "student")), "float32")
    if case.lora:
        freeze(student, ("vision_tower",))
        torch.manual_seed(0)
        return wrap_with_lora(student, rank=2, alpha=4)
    return student


def left_behind(folder: Path, out: Path, case: Case) -> None:
    """Trains, and leaves all weights and the log."""
    run = run_of(folder, out, case)
    run.train()
    weights = run.accelerator.get_state_dict(run.model_wrapped)
    if run.is_world_process_zero():
        whole = student_of(folder, case)
        whole.load_state_dict(weights)
        torch.save(whole.state_dict(), out / "weights.pt")
        (out / "log.json").write_text(json.dumps(run.state.log_history))


def left(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """What `left_behind` left."""
    lines = json.loads((out / "log.json").read_text())
    return torch.load(out / "weights.pt"), [line for line in lines if "tpa" in line or "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("engines")
    small.write_pair(path)
    small.write_records(path)
    student = load_model(str(path / "student"), "float32")
    student.config.tie_word_embeddings = student.config.text_config.tie_word_embeddings = False
    student.get_output_embeddings().weight = torch.nn.Parameter(student.get_output_embeddings().weight.detach() + 0.01)
    student.save_pretrained(path / "untied")
    return path


SHAPES = [
    {"batch": 2},
    {"batch": 1, "accumulate": 2, "uneven": True, "shard_teacher": True, "checkpointing": True},
    {"batch": 2, "lora": True, "checkpointing": True},
    {"batch": 1, "accumulate": 2, "untied": True, "draw": True},
    {"batch": 2, "weights": {"sft": 0.0, "kd": 0.0, "iva": 0.0}},
]
"""What DeepSpeed is held to."""

CASES = [
    Case("ddp", 2, 1, 2),
    Case("ddp", 2, 2, shard_teacher=True),
    Case("ddp", 4, 1, uneven=True),
    Case("fsdp2", 2, 2),
    Case("fsdp2", 2, 1, 2),
    Case("fsdp2", 2, 1, 2, uneven=True, shard_teacher=True, checkpointing=True),
    Case("fsdp2", 4, 1, uneven=True),
    Case("fsdp2", 2, 2, lora=True, checkpointing=True),
    Case("fsdp2", 2, 1, 2, shard_teacher=True, draw=True),
    Case("fsdp2", 2, 1, 2, untied=True, draw=True),
    # Nothing but candidates: no row of the gold pass has weight, and yet its keys carry gradient.
    Case("fsdp2", 2, 2, weights={"sft": 0.0, "kd": 0.0, "iva": 0.0}),
    *(Case(engine, 2, **shape) for engine in ("zero2", "zero3") for shape in SHAPES),
    Case("zero3", 4, 1, uneven=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_engine_gives_the_numbers_of_one_process(folder, tmp_path, case):
    if case.engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: make engines")
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    left_behind(folder, tmp_path / "one", case.alone())
    on_processes(
        case.processes,
        WORKER,
        folder,
        tmp_path / "many",
        json.dumps(asdict(case)),
        environment={"DS_ACCELERATOR": "cpu"},
    )
    (weights, log), (found, lines) = left(tmp_path / "one"), left(tmp_path / "many")
    assert found.keys() == weights.keys()
    before = student_of(folder, case).state_dict()
    assert sum(float((weights[key] - before[key]).norm()) for key in weights) > 1e-3
    for key, value in weights.items():
        assert float((value - found[key]).norm()) < 1e-5 * (1 + float(value.norm())), key
    assert len(lines) == len(log) > 0
    for one, other in zip(log, lines, strict=True):
        for term in one.keys() & {"loss", "grad_norm", "sft", "kd", "iva", "tpa"}:
            assert one[term] == pytest.approx(other[term], rel=1e-4), term


def test_forms_of_sharding_that_the_loss_cannot_take_are_refused_by_name(folder, tmp_path):
    run = run_of(folder, tmp_path, Case())
    run.check_sharding()
    for kind, name in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
        run.accelerator.state.parallelism_config = ParallelismConfig(**{f"{kind}_size": 2})
        with pytest.raises(ConfigError, match=rf"{name} parallelism \({kind}_size 2\)"):
            run.check_sharding()
    run.accelerator.state.parallelism_config = ParallelismConfig(dp_shard_size=2)
    run.check_sharding()
    run.is_deepspeed_enabled, run.args.bf16 = True, True
    with pytest.raises(
        ConfigError, match=r"training\.bf16 is true under zero2, and DeepSpeed would make the weights themselves"
    ):
        run.check_sharding()
    run.args.bf16, run.optimizer_cls_and_kwargs = False, (MuonAdamW, {})
    with pytest.raises(
        ConfigError, match=r"muon under zero2, .* accepted: training\.optimizer: adamw, or another engine"
    ):
        run.check_sharding()
    run.is_deepspeed_enabled = False
    run.check_sharding()
    run.is_fsdp_enabled = True
    for options, sentence in (
        ({"fsdp_version": 1}, "sharded by FSDP 1"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, "own activation_checkpointing is on"),
    ):
        run.accelerator.state.fsdp_plugin = SimpleNamespace(**{"activation_checkpointing": False, **options})
        with pytest.raises(ConfigError, match=sentence):
            run.check_sharding()
