"""The trainer and the run: normalisation over the step, repetition, resumption, and a student that loads anywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from align_ti.config import Evaluation, Iva, Objective, Recipe, Tpa
from align_ti.data.collator import EncodedConversations
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.stream_shards import OWN_RECORDS, Counted, Repeated, StreamShard
from align_ti.errors import ConfigError, DataError, InterruptedRunError, ModelError, RunError
from align_ti.interactions.transitions import Candidates
from align_ti.models.loading import freeze, load_model, load_processor
from align_ti.models.pairing import own_processor, reads_the_same, shared_ids
from align_ti.models.sharding import run_in_forward
from align_ti.pipeline.measuring import train_and_measure
from align_ti.pipeline.parts import load_parts
from align_ti.pipeline.training import distil
from align_ti.pipeline.watching import TaskWatch
from align_ti.runs import RunFolder
from align_ti.training.trainer import AlignTITrainer
from tests import small
from tests.launching import on_processes

FIXED = Objective(iva=Iva(layer=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    small.write_records(path, "eval.json", pictures=2, seed=1)
    return path


class FixedDraws(EncodedConversations):
    """Samples that carry their own candidates, so that batches of every size try the same tokens."""

    def __getitem__(self, index):
        sample = dict(super().__getitem__(index))
        random = torch.Generator().manual_seed(index)
        drawn = torch.randint(260, 300, (len(sample["input_ids"]), 2), generator=random)
        # The end of a turn, so that some positions keep no candidate and the mass is not the number of tokens.
        sample["candidates"] = torch.where(
            torch.rand(len(drawn), 1, generator=random) < 0.4, sample["input_ids"][-1], drawn
        )
        return sample


def pad_candidates(samples):
    from align_ti.data.collator import Collator

    plain = [{name: value for name, value in sample.items() if name != "candidates"} for sample in samples]
    batch = Collator(0)(plain)
    length = batch["input_ids"].shape[1]
    pads = [torch.nn.functional.pad(s["candidates"], (0, 0, 0, length - len(s["candidates"]))) for s in samples]
    return {**batch, "candidates": torch.stack(pads)}


def trainer(
    folder: Path,
    out: Path,
    batch: int,
    accumulate: int,
    steps: int = 2,
    objective: Objective = FIXED,
) -> AlignTITrainer:
    processor = load_processor(str(folder / "student"))
    from align_ti.data.sources import read_conversations

    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=1e9,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        seed=3,
    )
    return AlignTITrainer(
        model=load_model(str(folder / "student"), "float32"),
        teacher_model=load_model(str(folder / "teacher"), "float32"),
        args=args,
        objective=objective,
        train_dataset=FixedDraws(read_conversations(folder / "train.json"), processor),
        processing_class=processor,
        data_collator=pad_candidates,
    )


def test_on_a_cpu_training_keeps_freed_memory(folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("align_ti.training.trainer.keep_freed_memory", lambda: calls.append(1))
    run = trainer(folder, tmp_path, 2, 1, steps=1)
    assert calls == []
    run.train()
    assert calls == [1]


def test_a_batch_of_four_equals_four_batches_of_one(folder, tmp_path):
    runs = [trainer(folder, tmp_path / str(size), size, 4 // size) for size in (4, 2, 1)]
    for run in runs:
        run.train()
    weights = [run.model.state_dict() for run in runs]
    start = load_model(str(folder / "student"), "float32").state_dict()
    moved = sum(float((weights[0][name] - start[name]).norm()) for name in start)
    assert moved > 1e-3
    for other in weights[1:]:
        for name, value in weights[0].items():
            assert float((value - other[name]).norm()) < 1e-5 * (1 + float(value.norm())), name
    logs = [[line for line in run.state.log_history if "tpa" in line] for run in runs]
    for other in logs[1:]:
        for one, two in zip(logs[0], other, strict=True):
            for term in ("loss", "sft", "kd", "iva", "tpa"):
                assert one[term] == pytest.approx(two[term], rel=1e-4), term


def weigh_candidates(samples):
    """As pad_candidates, with a weight for each candidate that follows from the sample alone."""
    batch = pad_candidates(samples)
    tokens = batch["candidates"]
    weights = ((tokens % 7) + 1.0) / 14 * (tokens != samples[0]["input_ids"][-1])
    return {**batch, "candidates": Candidates(tokens, weights)}


def test_weights_of_candidates_travel_with_accumulated_batches(folder, tmp_path):
    weights = []
    for size in (4, 1):
        run = trainer(folder, tmp_path / str(size), size, 4 // size)
        run.data_collator = weigh_candidates
        run.train()
        weights.append(run.model.state_dict())
    for name, value in weights[0].items():
        assert float((value - weights[1][name]).norm()) < 1e-5 * (1 + float(value.norm())), name


@pytest.mark.parametrize("draw", ["without_replacement", "top_and_tail", "stratified"])
def test_every_way_to_draw_trains_under_accumulation(folder, tmp_path, draw):
    objective = Objective(iva=Iva(layer=0), tpa=Tpa(draw=draw, candidates=3))
    run = trainer(folder, tmp_path, 2, 2, steps=2, objective=objective)
    run.data_collator = lambda samples: {k: v for k, v in pad_candidates(samples).items() if k != "candidates"}
    seen = []
    inner = run.known_masses
    run.known_masses = lambda batch, objective: (inner(batch, objective), seen.append(batch["candidates"]))[0]
    run.train()
    lines = [line for line in run.state.log_history if "branch_share" in line]
    assert len(seen) == 4 and all(found.weights is not None for found in seen)
    assert len(lines) == 2 and all(line["tpa"] > 0 and 0 < line["branch_share"] <= 1 for line in lines)


WORKER = """
import json
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import tests.test_trainer as here
from align_ti.processes import part_in_order
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
run = here.trainer(folder, out, 2, 1, objective=getattr(here, sys.argv[3]))
run.train()
if run.is_world_process_zero():
    run.model.save_pretrained(out / "final")
    (out / "log.json").write_text(json.dumps(run.state.log_history))
part_in_order()
"""


def on_two_processes(folder: Path, tmp_path: Path, objective: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The weights and the log of 2 x 2 samples on two processes, with an objective of this module."""
    on_processes(2, WORKER, folder, tmp_path / "two", objective)
    lines = json.loads((tmp_path / "two" / "log.json").read_text())
    return load_file(tmp_path / "two" / "final" / "model.safetensors"), [line for line in lines if "tpa" in line]


def saved(run: AlignTITrainer, folder: Path) -> dict[str, torch.Tensor]:
    """The weights by the names that they are saved under."""
    run.model.save_pretrained(folder / "final")
    return load_file(folder / "final" / "model.safetensors")


def test_two_processes_equal_one(folder, tmp_path):
    """2 x 2 samples on two processes give the weights that 4 on one do."""
    two, _ = on_two_processes(folder, tmp_path, "FIXED")
    one = trainer(folder, tmp_path / "one", 4, 1)
    one.train()
    for name, value in saved(one, tmp_path / "one").items():
        assert float((value - two[name]).norm()) < 1e-5 * (1 + float(value.norm())), name


EVALUATOR = """
import json
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import tests.test_trainer as here
from align_ti.processes import part_in_order
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
found = {}
for records in here.RECORDS:
    run = here.evaluator(folder, out, records, 2)
    found[records] = run.evaluate()
    for workers in (0, 2):
        run.args.dataloader_num_workers = workers
        found[f"stream {records}, {workers}"] = run.evaluate(here.Streamed(run.eval_dataset))
    run.args.dataloader_num_workers = 0
    run.eval_dataset = {"a": here.Streamed(run.eval_dataset)}
    found[f"named {records}"] = {name.replace("eval_a_", "eval_"): value for name, value in run.evaluate().items()}
found["answers"] = here.asked(folder, run)
if run.is_world_process_zero():
    (out / "metrics.json").write_text(json.dumps(found))
part_in_order()
"""

RECORDS = (1, 5, 7)
"""Of 2 x 2 in a step: a process that has repeated records alone, then the first or the second with part of a batch."""


@pytest.fixture(scope="module")
def two_processes(folder, tmp_path_factory) -> dict[str, Any]:
    """What two processes found by `EVALUATOR`."""
    out = tmp_path_factory.mktemp("two")
    on_processes(2, EVALUATOR, folder, out)
    return json.loads((out / "metrics.json").read_text())


class Streamed(IterableDataset):
    """The samples without their number; workers share them."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, len(self.data), step):
            yield self.data[index]


def evaluator(folder: Path, out: Path, records: int, batch: int) -> AlignTITrainer:
    run = trainer(folder, out, 2, 1)
    run.args.per_device_eval_batch_size = batch
    run.eval_dataset = FixedDraws(run.train_dataset.conversations[:records], run.processing_class)
    return run


def asked(folder: Path, run: AlignTITrainer) -> list[dict[str, str]]:
    """The student's answers to six questions of one's own, and whether all of its modules are in the mode that they were in."""
    own = folder / "own.jsonl"
    if run.is_world_process_zero():
        records = [{"id": n, "question": f"{'Which digit? ' * n}", "answer": "one"} for n in range(1, 7)]
        own.write_text("".join(json.dumps(record) + "\n" for record in records))
    run.accelerator.wait_for_everyone()
    settings = Evaluation(tasks=("own",), data=str(own), every=1, batch_size=2, task_max_new_tokens=4)
    watch = TaskWatch(settings, run.processing_class)
    run.model.train()
    answers = [watch.answers(run.model, task, run) for task in watch.tasks]
    run.model.train()
    watch.measure(run.model, run)
    assert all(module.training for module in run.model.modules())
    return answers


def test_several_processes_share_the_questions_of_a_measurement(two_processes, folder, tmp_path):
    (answers,) = two_processes["answers"]
    assert [answers] == asked(folder, evaluator(folder, tmp_path, 1, 2))
    assert set(answers) == {str(number) for number in range(1, 7)}


def test_a_student_in_parts_is_not_asked_during_training(folder):
    (folder / "own.jsonl").write_text(json.dumps({"id": 1, "question": "Why?", "answer": "so"}) + "\n")
    settings = Evaluation(tasks=("own",), data=str(folder / "own.jsonl"), every=1)
    watch = TaskWatch(settings, load_processor(str(folder / "student")))
    with pytest.raises(ConfigError, match=r"evaluation\.every is given, but the student's weights are sharded"):
        watch.attach(Mock(spec=AlignTITrainer, shards_weights=True))


def test_records_repeated_to_fill_the_last_batch_count_once(two_processes, folder, tmp_path):
    # accelerate repeats the first records on processes that have fewer, and each then counted twice in an evaluation's means.
    for records in RECORDS:
        one = evaluator(folder, tmp_path / "one", records, 8).evaluate()
        # Of a stream, whose length nobody knows, they went on counting twice.
        for of in (f"{records}", f"stream {records}, 0", f"stream {records}, 2", f"named {records}"):
            for name in ("loss", "sft", "kd", "iva", "tpa"):
                assert two_processes[of][f"eval_{name}"] == pytest.approx(one[f"eval_{name}"], rel=1e-5), (of, name)


def test_a_stream_is_evaluated_as_its_records_are_pictures_and_all(folder, tmp_path):
    # accelerate cuts a stream's batches by their first axis, even on one process, and images of records that have several were lost.
    run = trainer(folder, tmp_path, 2, 1)
    run.args.per_device_eval_batch_size = 2
    several = [
        Conversation((Turn("user", "<image><image>What?"), Turn("assistant", "so")), two.images * 2)
        for two in run.train_dataset.conversations[:3]
    ]
    data = FixedDraws(several, run.processing_class)
    whole, streamed = run.evaluate(data), run.evaluate(Streamed(data))
    for name in ("loss", "sft", "kd", "iva", "tpa"):
        assert streamed[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-5), name


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 4))
def test_a_stream_is_split_whole_and_evenly(records, batch, processes):
    samples = [{"number": number} for number in range(records)]
    parts = [list(StreamShard(samples, batch, process, processes)) for process in range(processes)]
    (length,) = {len(part) for part in parts}
    assert length % batch == 0 and length * processes - records < batch * processes
    own = [[sample for sample in part if not isinstance(sample, Repeated)] for part in parts]
    assert sorted(sample["number"] for part in own for sample in part) == list(range(records))
    for part, mine in zip(parts, own, strict=True):
        # Repeated ones stand at the end, in batches too.
        assert part[: len(mine)] == mine
        counts = [
            Counted(lambda rows: {})(part[start : start + batch])[OWN_RECORDS] for start in range(0, length, batch)
        ]
        assert sum(counts) == len(mine) and all(count == batch for count in counts[: len(mine) // batch])


def test_terms_are_logged_unweighted_with_their_weight(folder, tmp_path):
    run = trainer(folder, tmp_path, 4, 1, steps=1, objective=Objective(iva=Iva(layer=0, weight=0.25)))
    run.train()
    line = next(line for line in run.state.log_history if "iva" in line)
    assert line["iva_weight"] == 0.25
    total = sum(line[term] * line[f"{term}_weight"] for term in ("sft", "kd", "iva", "tpa"))
    assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert 0 < line["branch_share"] <= 1


def test_evaluation_reports_each_term(folder, tmp_path):
    run = trainer(folder, tmp_path, 4, 1)
    metrics = run.evaluate(run.train_dataset)
    again = run.evaluate(run.train_dataset)
    assert {"eval_loss", "eval_sft", "eval_kd", "eval_iva", "eval_tpa"} <= metrics.keys()
    assert metrics["eval_kd"] == again["eval_kd"] > 0


def test_the_layer_is_scored_once_and_kept(folder, tmp_path):
    recipe = Recipe.model_validate(small.recipe(folder, out=str(tmp_path / "run")))
    run = distil(recipe)
    kept = json.loads(run.layer_scores.read_text())
    assert kept["layer"] == int(max(kept["scores"], key=lambda layer: kept["scores"][layer]))
    assert set(kept["scores"]) == {"0", "1"}


def losses(run: RunFolder) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["tpa"]) for line in run.read_metrics()]


def test_kept_layer_scores_of_another_teacher_are_not_used(folder, tmp_path):
    first = trainer(folder, tmp_path, 2, 1, objective=Objective())
    first.resolve_layer()
    kept = json.loads((tmp_path / "layer_scores.json").read_text())
    (tmp_path / "layer_scores.json").write_text(json.dumps({**kept, "layer": 77}))
    again = trainer(folder, tmp_path, 2, 1, objective=Objective())
    assert again.resolve_layer().iva.layer == 77
    other = trainer(folder, tmp_path, 2, 1, objective=Objective())
    with torch.no_grad():
        # Not the head, which may be frozen while the rest is trained.
        next(weight for name, weight in other.teacher_model.named_parameters() if "layers.0.mlp" in name).mul_(1.01)
    assert other.resolve_layer().iva.layer == kept["layer"]


def test_kept_layer_scores_of_other_data_are_not_used(folder, tmp_path):
    # A bug: data of the same number of records counted as the same.
    first = trainer(folder, tmp_path, 2, 1, objective=Objective())
    first.resolve_layer()
    kept = json.loads((tmp_path / "layer_scores.json").read_text())
    (tmp_path / "layer_scores.json").write_text(json.dumps({**kept, "layer": 77}))
    other = trainer(folder, tmp_path, 2, 1, objective=Objective())
    records = list(other.train_dataset.conversations)
    asked = Turn("user", "<image>Which digits are there?")
    records[0] = replace(records[0], turns=(asked, *records[0].turns[1:]))
    other.train_dataset = EncodedConversations(records, other.processing_class)
    assert other.resolve_layer().iva.layer == kept["layer"]


def test_evaluation_changes_no_draw_of_training(folder, tmp_path):
    quiet, watched = (trainer(folder, tmp_path / name, 4, 1, steps=3) for name in ("quiet", "watched"))
    for run in (quiet, watched):
        run.data_collator = lambda samples: {k: v for k, v in pad_candidates(samples).items() if k != "candidates"}
    watched.args.eval_strategy, watched.args.eval_steps = IntervalStrategy.STEPS, 1
    watched.eval_dataset = watched.train_dataset
    quiet.train()
    watched.train()
    logs = [[line["tpa"] for line in run.state.log_history if "tpa" in line] for run in (quiet, watched)]
    assert logs[0] == logs[1]
    evaluations = [line for line in watched.state.log_history if "eval_tpa" in line]
    assert len(evaluations) >= 2
    line = evaluations[0]
    assert line["eval_loss"] == pytest.approx(sum(line[f"eval_{term}"] for term in ("sft", "kd", "iva", "tpa")))


def test_the_same_seed_is_the_same_run(folder, tmp_path):
    def run(name: str, seed: int) -> list[tuple[int, float, float]]:
        return losses(distil(Recipe.model_validate(small.recipe(folder, out=str(tmp_path / name), seed=seed))))

    one, two, other = run("one", 5), run("two", 5), run("other", 6)
    assert one == two
    assert one != other


class Stop(TrainerCallback):
    """Sends the process the signal that Ctrl-C sends, at the end of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, step: int, _steps: int) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("training", [{}, {"gradient_accumulation_steps": 2}])
def test_a_stopped_run_goes_on_where_it_stopped_and_ends_the_same(folder, tmp_path, training):
    section = {**small.recipe(folder)["training"], **training}
    whole = distil(Recipe.model_validate(small.recipe(folder, out=str(tmp_path / "whole"), training=section)))
    recipe = Recipe.model_validate(small.recipe(folder, out=str(tmp_path / "stopped"), training=section))
    # transformers' Trainer read none of a LLaVA checkpoint's weights, for their names, and went on from the start.
    with pytest.raises(InterruptedRunError, match="step 3 of 4"):
        distil(recipe, steps=Stop(3))
    assert not RunFolder(tmp_path / "stopped").student.exists()
    resumed = distil(recipe)
    assert losses(resumed) == losses(whole)
    one, two = (load_file(run.student / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_of_another_run_is_refused(folder, tmp_path):
    recipe = small.recipe(
        folder, out=str(tmp_path / "run"), training={"max_steps": 1, "per_device_train_batch_size": 2}
    )
    distil(Recipe.model_validate(recipe))
    with pytest.raises(RunError, match=r"training\.max_steps"):
        distil(Recipe.model_validate({**recipe, "training": {"max_steps": 2, "per_device_train_batch_size": 2}}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="no run folder"):
        distil(Recipe.model_validate({**recipe, "out": str(tmp_path / "other")}))
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


LOADS_ALONE = """
import sys
sys.modules["align_ti"] = None  # importing the package fails, as where it is not installed
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="float32")
processor = AutoProcessor.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read every digit."}]}]
text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
inputs = processor(text=[text], images=[Image.new("RGB", (48, 48), (90, 40, 10))], return_tensors="pt")
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, sys.argv[2])
"""


def test_the_student_loads_with_plain_transformers_and_gives_the_same_logits(folder, tmp_path):
    recipe = Recipe.model_validate(small.recipe(folder, out=str(tmp_path / "run")))
    run = distil(recipe)
    done = subprocess.run(
        [sys.executable, "-c", LOADS_ALONE, str(run.student), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from PIL import Image

    model, processor = load_model(str(run.student), "float32"), load_processor(str(run.student))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read every digit."}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.new("RGB", (48, 48), (90, 40, 10))], return_tensors="pt")
    with torch.no_grad():
        ours = model(**inputs).logits
    torch.testing.assert_close(ours, torch.load(tmp_path / "logits.pt", weights_only=True))
    assert not list(run.student.glob("*.bin"))
    frozen = load_file(folder / "student" / "model.safetensors"), load_file(run.student / "model.safetensors")
    changed = {name for name in frozen[0] if not torch.equal(frozen[0][name], frozen[1][name])}
    assert changed
    assert not any("vision_tower" in name for name in changed)


def test_before_and_after_are_measured(folder, tmp_path):
    data = {"train": str(folder / "train.json"), "eval": str(folder / "eval.json")}
    recipe = small.recipe(
        folder, out=str(tmp_path / "run"), data=data, evaluation={"max_new_tokens": 4, "batch_size": 3}
    )
    run = train_and_measure(Recipe.model_validate(recipe))
    summary = json.loads(run.summary.read_text())
    assert set(summary["accuracy"]) == {"teacher", "before", "student"}
    assert summary["questions"] == 8
    assert set(summary["divergence_nats"]) == {"before", "student"}
    from align_ti.report.page import write_report

    page = write_report(run.root).read_text()
    assert "student before" in page


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused(folder, tmp_path):
    student, processor = load_model(str(folder / "student")), load_processor(str(folder / "student"))
    with pytest.raises(ConfigError, match="teacher_model"):
        AlignTITrainer(model=student, objective=FIXED, processing_class=processor)
    with pytest.raises(ConfigError, match="processing_class"):
        AlignTITrainer(model=student, teacher_model=student, objective=FIXED)
    del student.model.vision_tower
    with pytest.raises(ModelError, match="no such part"):
        freeze(student, ("vision_tower",))
    with pytest.raises(ModelError, match="nothing to train"):
        freeze(load_model(str(folder / "student")), ("vision_tower", "projector", "language_model"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_processor(str(tmp_path / "nowhere"))


def test_a_checkpoint_with_missing_weights_is_refused(folder, tmp_path):
    # transformers fills what is missing with random numbers and only warns; a blind vision tower trains happily.
    shutil.copytree(folder / "student", tmp_path / "blind")
    weights = load_file(tmp_path / "blind" / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "vision_tower" not in n},
        tmp_path / "blind" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"vision_tower.* is missing"):
        load_model(str(tmp_path / "blind"))


def test_a_teacher_that_prepares_pictures_differently_reads_its_own(folder):
    one, two = (load_processor(str(folder / "student")) for _ in range(2))
    assert reads_the_same(one, two) and own_processor(one, two) is None
    two.image_processor.image_mean = [0.4, 0.5, 0.5]
    assert not reads_the_same(one, two) and own_processor(one, two) is two


def test_different_tokenizers_are_refused_with_the_first_tokens_that_differ(folder):
    one, two = (load_processor(str(folder / "student")).tokenizer for _ in range(2))
    size = len(one)
    assert shared_ids(one.get_vocab(), two.get_vocab(), size) == list(range(size))
    one.add_tokens(["first-extra", "second-extra"])
    two.add_tokens(["second-extra", "first-extra"])
    with pytest.raises(ModelError, match="'first-extra'"):
        shared_ids(one.get_vocab(), two.get_vocab(), size + 2)


def test_auto_without_conversations_says_what_to_do(folder, tmp_path):
    run = trainer(folder, tmp_path, 2, 1, objective=Objective())
    run.train_dataset = [run.train_dataset[0]]
    with pytest.raises(ConfigError, match="score_layers"):
        run.resolve_layer()


def test_a_bad_record_stops_the_run_and_is_named(folder, tmp_path):
    records = json.loads((folder / "train.json").read_text())
    records[3]["image"] = "gone.png"
    (folder / "gone.json").write_text(json.dumps(records))
    objective = {"iva": {"layer": 0}}
    recipe = small.recipe(
        folder, out=str(tmp_path / "run"), data={"train": str(folder / "gone.json")}, objective=objective
    )
    with pytest.raises(DataError, match=r"gone\.json, record 4"):
        distil(Recipe.model_validate(recipe))


def test_the_redirected_call_restores_forward_even_after_an_error(folder):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **options):
            assert options  # data parallelism on GPUs fails on a call without any argument
            return self.inner(**options)

    inner = torch.nn.Linear(1, 1)
    wrapper = Wrapper(inner)
    assert run_in_forward(wrapper, inner, lambda: "result") == "result"
    with pytest.raises(ZeroDivisionError):
        run_in_forward(wrapper, inner, lambda: 1 / 0)
    assert "forward" not in inner.__dict__


def test_a_recipe_of_sft_alone_needs_no_teacher(folder, tmp_path):
    off = {name: {"weight": 0.0} for name in ("kd", "iva", "tpa")}
    recipe = small.recipe(folder, out=str(tmp_path / "run"), objective=off, teacher=None)
    run = distil(Recipe.model_validate(recipe))
    assert all("kd" not in line and line["sft"] > 0 for line in run.read_metrics())
    assert load_parts(Recipe.model_validate(recipe)).teacher is None


def test_sampling_options_reach_the_draw(folder, tmp_path):
    objective = Objective(iva=Iva(layer=0), tpa=Tpa(top_k=1, candidates=3))
    run = trainer(folder, tmp_path, 4, 1, steps=1, objective=objective)
    run.data_collator = lambda samples: {k: v for k, v in pad_candidates(samples).items() if k != "candidates"}
    run.train()
    line = next(line for line in run.state.log_history if "branch_share" in line)
    # Three draws of the most probable token are one row at most.
    assert line["branch_share"] <= 1 / 3 + 1e-6


EVERY_TERM = Objective(
    iva=Iva(layer=0),
    kd={"divergence": {"name": "skew_kl", "alpha": 0.2}},
    llava_kd_mdist={"weight": 0.7},
    llava_kd_rdist={},
    align_kd={"weight": 3.0},
    compodistill={},
    em_kd_vsd={},
    em_kd_vlad={},
)
"""Every built-in term at once: rows, rows with partners of their own, scalars over hidden states and over attention."""


def logged(run: AlignTITrainer) -> list[dict[str, float]]:
    return [line for line in run.state.log_history if "tpa" in line]


def test_every_term_is_the_same_however_a_step_is_cut_into_batches(folder, tmp_path):
    runs = [trainer(folder, tmp_path / str(size), size, 4 // size, objective=EVERY_TERM) for size in (4, 1)]
    for run in runs:
        run.train()
    for one, two in zip(*map(logged, runs), strict=True):
        for name, term in EVERY_TERM.terms.items():
            assert one[name] == pytest.approx(two[name], rel=1e-4), name
            assert one[f"{name}_weight"] == term.weight
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    weights = [run.model.state_dict() for run in runs]
    for name, value in weights[0].items():
        assert float((value - weights[1][name]).norm()) < 2e-5 * (1 + float(value.norm())), name


def test_every_term_is_the_same_on_two_processes(folder, tmp_path):
    weights, lines = on_two_processes(folder, tmp_path, "EVERY_TERM")
    one = trainer(folder, tmp_path / "one", 4, 1, objective=EVERY_TERM)
    one.train()
    for ours, theirs in zip(logged(one), lines, strict=True):
        for name in ("loss", *EVERY_TERM.active):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name, value in saved(one, tmp_path / "one").items():
        assert float((value - weights[name]).norm()) < 2e-5 * (1 + float(value.norm())), name
