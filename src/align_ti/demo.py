"""The main job on real data: one small student distilled three times from the same start, and everything measured.

benchmark -> teacher and start measured -> layers scored -> SFT, SFT + KD, Align-TI trained -> all measured -> report
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from align_ti.config import Data, Evaluation, Objective, Recipe, Scores, Student, Teacher, Training
from align_ti.data.cache import SampleCache
from align_ti.data.collator import EncodedConversations
from align_ti.data.conversation import Conversation
from align_ti.data.sources import read_conversations
from align_ti.digits.files import Sizes, write_benchmark
from align_ti.errors import RunError
from align_ti.models.loading import load_processor
from align_ti.parallel import Advance, nothing, side_by_side
from align_ti.phases import OTHER, Stopwatch, part
from align_ti.pipeline.measuring import evaluate_model, score_teacher, summarise
from align_ti.pipeline.showing import show_inside
from align_ti.pipeline.training import distil
from align_ti.report.folder_progress import METHODS
from align_ti.report.page import write_report
from align_ti.runs import RunFolder, provenance, read_json, write_json

LABELS = {"teacher": "teacher", "start": "student before training", **METHODS}

# Chosen once, on the validation split (docs/benchmark.md tells how); the test split and the seed had no say.
TRAINING = Training(
    # With an older PyTorch, which has no Muon, the demo runs all the same; recipe.yaml of each of its runs names the optimizer.
    optimizer="muon" if hasattr(torch.optim, "Muon") else "adamw",
    max_steps=1200,
    learning_rate=4e-3,
    per_device_train_batch_size=16,
    warmup_steps=60,
    weight_decay=0.01,
    logging_steps=40,
    save_steps=400,
    save_total_limit=1,
)
EVALUATION = Evaluation(batch_size=100, max_new_tokens=40, fidelity_records=48)
SCORES = Scores(images=64, instructions=4)


def objectives(layer: int) -> dict[str, Objective]:
    """The three methods that are compared."""
    return {
        "sft": Objective.only(sft={}),
        "kd": Objective.only(sft={}, kd={}),
        "align_ti": Objective(iva={"layer": layer}),
    }


def run_demo(
    out: Path,
    seed: int = 0,
    *,
    sizes: Sizes | None = None,
    training: Training = TRAINING,
    split: str = "test",
    jobs: int = 1,
    advance: Advance = lambda stage, done, total: None,
    stopwatch: Stopwatch | None = None,
    prepare: Callable[[], None] = nothing,
) -> dict[str, Any]:
    """The whole job, report included; what is finished in the folder already is not done again.

    Args:
        out: the run folder.
        seed: decides scenes, questions, order and draws.
        sizes: images of each split.
        training: how long and how fast each method trains.
        split: "test", or "validation" while settings are chosen.
        jobs: methods trained at the same time, each in a process of its own; the processor's threads are shared out. More than one
            needs a main module that can be imported (`if __name__ == "__main__":`).
        advance: progress.
        stopwatch: counts the parts of the run; given, it may have counted some already.
        prepare: called first in each of those processes; a function of a module.

    Returns:
        The content of `summary.json`.

    Raises:
        RunError: the folder holds something else, or a demo with other choices.
    """
    sizes = Sizes() if sizes is None else sizes
    claim(
        out,
        {
            "version": provenance()["versions"]["align-ti"],
            "seed": seed,
            "sizes": sizes,
            "training": training,
            "split": split,
        },
    )
    root = RunFolder(out)
    with spending(root, Stopwatch(of="run") if stopwatch is None else stopwatch) as spent:
        summary = compare_methods(root, seed, sizes, training, split, jobs, advance, prepare)
        write_json(root.summary, {**summary, "spent_seconds": spent()})
        with part("write the report"):
            write_report(out)
        # Once more, now that the report's own time is known.
        summary["spent_seconds"] = spent()
        write_json(root.summary, summary)
    return summary


@contextmanager
def spending(root: RunFolder, stopwatch: Stopwatch) -> Iterator[Callable[[], dict[str, float]]]:
    """Counts the block on the stopwatch; gives a function that tells the seconds of each part, those of earlier calls included.

    They are kept in the folder, after a stop too, since a demo that goes on does not do again what it did before.
    """
    before: dict[str, float] = read_json(root.spent) if root.spent.exists() else {}

    def spent() -> dict[str, float]:
        now = stopwatch.so_far()
        total = {name: round(before.get(name, 0.0) + now.get(name, 0.0), 2) for name in {**before, **now}}
        total[OTHER] = total.pop(OTHER)
        write_json(root.spent, total)
        return total

    with stopwatch.running():
        try:
            yield spent
        finally:
            spent()


def compare_methods(
    root: RunFolder,
    seed: int,
    sizes: Sizes,
    training: Training,
    split: str,
    jobs: int,
    advance: Advance,
    prepare: Callable[[], None],
) -> dict[str, Any]:
    """Data, teacher and start measured, three methods trained and measured: the content of `summary.json`."""
    out, data = root.root, root.root / "data"
    if not data.is_dir():
        done, total = [0], sizes.train + sizes.validation + sizes.test

        def drawn(count: int) -> None:
            done[0] += count
            advance("draw the benchmark", done[0], total)

        with part("draw the benchmark"):
            write_benchmark(data, seed, sizes, drawn)

    conversations = read_conversations(data / f"{split}.json")
    for name, folder in (("teacher", "teacher"), ("start", "student")):
        measure(root, name, data / folder, split, advance)
    layer = best_layer(root, data, seed, advance)

    recipes = {
        name: method_recipe(out / name, data, objective, seed, training)
        for name, objective in objectives(layer).items()
    }
    runs = {name: RunFolder(out / name) for name in recipes}
    train = read_conversations(data / "train.json")
    if not all(run.student.exists() for run in runs.values()):
        encode_all(train, load_processor(str(data / "student")), kept_samples(out), jobs, advance)
    train_all([Method(root, name, recipe, split) for name, recipe in recipes.items()], jobs, advance, prepare)
    shutil.rmtree(kept_samples(out), ignore_errors=True)
    results: dict[str, dict[str, Any]] = {name: read_json(root.evaluation(name)) for name in LABELS}
    if not root.looks.exists():
        paths = {
            "teacher": data / "teacher",
            "start": data / "student",
            **{name: run.student for name, run in runs.items()},
        }
        models = {name: Teacher(path=str(path), dtype="float32") for name, path in paths.items()}
        right = {name: [one["right"] for one in result["answers"]] for name, result in results.items()}
        show_inside(
            root, models, conversations, right, EVALUATION.shown, layer, partial(advance, "attention and next tokens")
        )

    summary = summarise("Align-TI on real handwriting", seed, results, LABELS, runs)
    summary |= {
        "split": split,
        "pictures": getattr(sizes, split),
        "training_instructions": len(train),
        "steps": training.max_steps,
        "layer": layer,
        "layer_scores": read_json(root.layer_scores)["scores"],
        "branch_share": branch_share(runs["align_ti"]),
        "provenance": provenance(),
    }
    return summary


def measure(root: RunFolder, name: str, path: Path, split: str, advance: Advance) -> None:
    """The model's answers, and how near it is to the teacher, in the folder; nothing is done if they are there."""
    file, data = root.evaluation(name), root.root / "data"
    if file.exists():
        return
    conversations, done = read_conversations(data / f"{split}.json"), [0]

    def answered(count: int) -> None:
        done[0] += count
        advance(f"evaluate: {LABELS[name]}", done[0], len(conversations))

    teacher = None if name == "teacher" else str(data / "teacher")
    write_json(file, evaluate_model(str(path), conversations, EVALUATION, teacher=teacher, advance=answered))


def kept_samples(out: Path) -> Path:
    """Where the encoded training data of a demo lie until its methods have learnt from them."""
    return out / "cache"


def encode_all(
    records: Sequence[Conversation], processor: ProcessorMixin, folder: Path, jobs: int, advance: Advance
) -> None:
    """Every record encoded and kept on disk, so that no method's time holds it."""
    with part("prepare training data"):
        data, done = EncodedConversations(records, processor, disk=SampleCache(folder, processor)), 0
        workers = 0 if jobs == 1 else jobs
        for count in DataLoader(data, batch_size=64, num_workers=workers, collate_fn=len):
            done += count
            advance("prepare training data", done, len(data))


# --- one method, and all of them --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Method:
    """One method's training and its measures."""

    root: RunFolder
    name: str
    recipe: Recipe
    split: str

    @property
    def done(self) -> bool:
        """Whether the student is trained and measured."""
        return RunFolder(Path(self.recipe.out)).student.exists() and self.root.evaluation(self.name).exists()

    def run(self, advance: Advance) -> None:
        """Trains and measures the student; what is done already is not done again."""
        label = LABELS[self.name]
        # No check: the pair is shipped, and the tests prove on it what a check looks for.
        with part(f"train: {label}"):
            run = distil(self.recipe, steps=partial(advance, f"train: {label}"), check=False)
        measure(self.root, self.name, run.student, self.split, advance)


def train_all(methods: Sequence[Method], jobs: int, advance: Advance, prepare: Callable[[], None]) -> None:
    """All methods that are not done, `jobs` of them at a time, each of these in a process of its own."""
    left = [method for method in methods if not method.done]
    if jobs == 1 or not left:
        for method in left:
            method.run(advance)
        return
    # The last takes longest, so it begins first.
    tasks = {LABELS[method.name]: method.run for method in reversed(left)}
    with part(f"train and measure, {jobs} at a time"):
        side_by_side(tasks, jobs, advance, max(1, torch.get_num_threads() // jobs), prepare)


def method_recipe(out: Path, data: Path, objective: Objective, seed: int, training: Training) -> Recipe:
    """The run of one method: the shipped pair on the benchmark that lies in `data`."""
    return Recipe(
        out=str(out),
        seed=seed,
        student=Student(path=str(data / "student")),
        teacher=Teacher(path=str(data / "teacher"), dtype="float32"),
        data=Data(train=str(data / "train.json"), cache="disk", cache_dir=str(kept_samples(out.parent))),
        objective=objective,
        training=training,
        evaluation=EVALUATION,
    )


def claim(out: Path, choices: dict[str, Any]) -> None:
    """Make the folder this demo's own, or go on in it if it was made with the same choices."""
    content = {name: str(value) for name, value in choices.items()}
    marker = out / "demo.json"
    if marker.exists():
        before = read_json(marker)
        if before != content:
            changed = ", ".join(name for name in content if before.get(name) != content[name])
            raise RunError(
                f"{out} holds a demo with another {changed}; choose another folder (--out) or remove this one."
            )
    elif out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty and holds no demo; choose a new or empty folder (--out).")
    else:
        write_json(marker, content)


def best_layer(root: RunFolder, data: Path, seed: int, advance: Advance) -> int:
    """The teacher's layer with the highest instruction-relevance score on training images."""
    if not root.layer_scores.exists():
        advance("score the teacher's layers", 0, 1)
        with part("score the teacher's layers"):
            scores = score_teacher(
                str(data / "teacher"), read_conversations(data / "train.json"), SCORES, seed, "float32"
            )
        layer = max(scores, key=lambda key: scores[key])
        write_json(root.layer_scores, {"layer": layer, "scores": {str(key): value for key, value in scores.items()}})
        advance("score the teacher's layers", 1, 1)
    return int(read_json(root.layer_scores)["layer"])


def branch_share(run: RunFolder) -> dict[str, float]:
    """The share of candidates that needed a row of their own, in the first and in the last logged steps of training."""
    logged = [line["branch_share"] for line in run.read_metrics() if "branch_share" in line]
    return {"first": round(logged[0], 4), "last": round(logged[-1], 4)} if logged else {}
