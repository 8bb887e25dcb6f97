"""Studies that nobody ran: records by chance, put together as real ones are."""

from __future__ import annotations

from typing import Any

import numpy as np

from align_ti.evaluation.benchmarks.base import Report
from align_ti.evaluation.metrics import Metric, quotient, ratio
from align_ti.evaluation.results import scored
from align_ti.studies.design import Study, StudyFile
from align_ti.studies.results import summary_of

EFFECTS = {"sft": 0.0, "kd": 0.45, "align_ti": 0.7}
"""The log odds of right answers, by variant."""

STEP_SECONDS = {"sft": 0.11, "kd": 0.29, "align_ti": 0.41}
"""Seconds of a step; those of others are between."""

MADE_ON = {
    "python": "3.11.7",
    "system": "Linux",
    "machine": "x86_64",
    "processor": "A processor",
    "cores": 2,
    "versions": {"align-ti": "0.1.0", "torch": "2.13.0"},
}


def study_content(
    effects: dict[str, float] | None = None,
    seeds: int = 3,
    pictures: int = 12,
    kinds: tuple[str, ...] = ("digit", "colour"),
    *,
    teacher: bool = True,
    curves: bool = True,
    fidelity: bool = True,
    failed: tuple[tuple[str, int], ...] = (),
    missing: tuple[tuple[str, int], ...] = (),
    **more: Any,
) -> dict[str, Any]:
    """The content of a `study.json`.

    Args:
        effects: the log odds of right answers, by variant.
        seeds: runs of each variant.
        images: clusters of questions, one question of each kind.
        kinds: of questions.
        teacher: whether it was measured.
        curves: whether runs were watched while they trained.
        fidelity: whether they were compared with the teacher's distributions.
        failed: runs that failed.
        missing: runs that were not made.
        **more: for the study's file.
    """
    random, effects = np.random.default_rng(7), effects or EFFECTS
    hard = random.normal(0.3, 1.0, (len(kinds), pictures))
    records: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in effects}
    for place, (name, effect) in enumerate(effects.items()):
        for seed in range(seeds):
            if (name, seed) in missing:
                continue
            chances = 1 / (1 + np.exp(-(hard + effect + random.normal(0, 0.08))))
            record = {
                "variant": name,
                "seed": seed,
                "error": None,
                "steps": 2400,
                "seconds_per_step": STEP_SECONDS.get(name, 0.2 + 0.03 * place),
                "flops": 1e9 * 2400 * (1 + place),
                "peak_memory_mib": 300.0 + 20 * place,
                "curve": curve(random, effect) if curves else [],
                "scores": scores(random, chances, kinds, fidelity, effect),
                "provenance": MADE_ON,
            }
            record["seconds"] = record["seconds_per_step"] * 2400
            if (name, seed) in failed:
                record |= {"error": "RunError: <b>the disk</b> is full", "scores": {}, "curve": []}
            records[name][seed] = record
    goal = {"scores": scores(random, 1 / (1 + np.exp(-(hard + 2.0))), kinds, False, 2.0)} if teacher else None
    return summary_of(study_of(tuple(effects), seeds, **more), records, goal)


def study_of(variants: tuple[str, ...], seeds: int, **more: Any) -> Study:
    """A study that is never run."""
    changes = {name: {"objective.kd.weight": 0} if name == "sft" else {} for name in variants}
    file = StudyFile(
        out="o",
        base="digits",
        changes={"student.path": "/home/somebody/secret/student"},
        seeds=tuple(range(seeds)),
        variants=changes,
        score="digits",
        **more,
    )
    # The score is named, so no recipe is asked what decides.
    return Study(file, {name: {} for name in variants}, {})


def scores(
    random: np.random.Generator, chances: np.ndarray, kinds: tuple[str, ...], fidelity: bool, effect: float
) -> dict[str, Any]:
    """What a record holds of a run's measurements."""
    hits = random.binomial(1, chances).astype(float)
    pictures = tuple(f"p{number}" for number in range(hits.shape[1]))
    ones = np.ones(len(pictures))
    metrics = {"accuracy": Metric(np.stack([hits.sum(0), len(kinds) * ones], axis=-1), ratio, pictures)}
    metrics |= {
        kind: Metric(np.stack([right, ones], axis=-1), ratio, pictures) for kind, right in zip(kinds, hits, strict=True)
    }
    found = {"digits": scored("digits", Report(metrics, "accuracy", {}, ()), "m", "q", "Digits")}
    if fidelity:
        total = random.gamma(3, 0.1 * np.exp(-effect), len(pictures))
        kl = Metric(np.stack([total, 4 * ones], axis=-1), quotient, pictures, "nats")
        agrees = random.binomial(4, min(0.95, 0.6 + 0.3 * effect), len(pictures)).astype(float)
        told = {"kl": kl, "agreement": Metric(np.stack([agrees, 4 * ones], axis=-1), ratio, pictures)}
        found["fidelity"] = scored("fidelity", Report(told, "kl", {}, ()), "m", "q", "Fidelity")
    return found


def curve(random: np.random.Generator, effect: float) -> list[dict[str, float]]:
    """A learning curve that rises and levels off."""
    steps = np.arange(200, 2401, 200)
    values = (50 + 12 * effect) * (1 - np.exp(-steps / 600)) + random.normal(0, 0.6, len(steps))
    return [
        {"step": int(step), "task_digits_validation": float(value)} for step, value in zip(steps, values, strict=True)
    ]
