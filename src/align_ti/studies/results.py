"""What a study's records come to: variants, differences, gap, curves, cost, time to quality. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from align_ti.errors import RunError
from align_ti.evaluation.comparison import told_difference
from align_ti.evaluation.metrics import Metric
from align_ti.evaluation.results import Scores, of_content
from align_ti.evaluation.statistics import (
    LEVEL,
    Difference,
    compared,
    gap_closed,
    hierarchical,
    interval,
    over_seeds,
    paired,
    pareto,
)
from align_ti.evaluation.statistics import told as told_interval
from align_ti.runs import provenance, read_json, write_json
from align_ti.studies.design import Study, measured_on
from align_ti.studies.folder import StudyFolder

Metrics = Mapping[int, Metric]
"""One metric of a variant, by seed."""


def write_summary(study: Study, folder: StudyFolder) -> dict[str, Any]:
    """Writes `study.json` from the records that are there, and gives its content.

    Accuracy, gap and relative differences are in per cent, differences in points. Every number over seeds has its 95 % interval;
    `null` where a single seed or cluster leaves it unknown. `corrected_*` hold for all the study's differences together.
    """
    records = folder.records(study)
    teacher = read_json(folder.teacher) if folder.teacher.exists() else None
    costs = read_json(folder.costs) if folder.costs.exists() else {}
    content = summary_of(study, with_costs(study, records, costs), teacher)
    write_json(folder.summary, content)
    return content


def with_costs(
    study: Study,
    records: Mapping[str, Mapping[int, Mapping[str, Any]]],
    costs: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[int, dict[str, Any]]]:
    """The records with the time of a step as it was measured for all variants in turn, on one machine.

    The runs' own times may be of several machines, and of some that did other work too; they stay in the records. `spans` are the
    parts of training, in order, with what a step costs in each (`Objective.spans`).
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, runs in records.items():
        found[name] = {seed: dict(one) for seed, one in runs.items()}
        for one in found[name].values():
            if name in costs and not one["error"]:
                a_step, of_stage = costs[name]["seconds_per_step"], costs[name].get("stages", [costs[name]])
                spans, stages = study.templates[name].objective.spans()
                one |= {"seconds_per_step": a_step, "seconds": a_step * one["steps"]}
                if len(stages) == len(of_stage):
                    one["spans"] = [{"begin": begin, "end": end, **of_stage[stage]} for begin, end, stage in spans]
    return found


def cost_until(run: Mapping[str, Any], step: float, by: Literal["seconds", "flops"]) -> float:
    """What a run had cost at a step: where schedules change the work of a step, steps of different parts of training differ."""
    if "spans" not in run:
        return float(step * run[by] / run["steps"])
    progress = step / run["steps"]
    return float(
        sum(
            max(0.0, min(progress, one["end"]) - one["begin"]) * run["steps"] * one[f"{by}_per_step"]
            for one in run["spans"]
        )
    )


def summary_of(
    study: Study, records: Mapping[str, Mapping[int, Mapping[str, Any]]], teacher: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of `study.json`."""
    good = {name: {seed: one for seed, one in runs.items() if not one["error"]} for name, runs in records.items()}
    scores = {name: {seed: scores_in(one) for seed, one in runs.items()} for name, runs in good.items()}
    goals = scores_in(teacher) if teacher is not None else {}
    benchmark = study.file.score or measured_on(study.first(study.variants[0]))[0]
    check_questions(scores, goals, benchmark)
    heads = {name: headlines(runs, benchmark) for name, runs in scores.items()}
    goal = goals[benchmark].metrics[goals[benchmark].headline] if benchmark in goals else None
    pairs = [pair for pair in study.pairs if common(heads[pair[0]], heads[pair[1]])]
    return {
        "format": "align-ti study 1",
        "score": benchmark,
        **headline_in(scores, benchmark),
        "equal": study.file.equal,
        "budget": study.budget if study.file.equal in ("time", "flops") else None,
        "seeds": list(study.file.seeds),
        "gap_from": study.gap_from,
        "teacher": None if goal is None else told_interval(interval(goal)),
        "variants": {name: variant(study, name, heads, good[name], goal) for name in study.variants if heads[name]},
        "differences": differences(heads, pairs),
        "metrics": metric_table(scores, pairs),
        "curves": {name: curve(runs) for name, runs in good.items() if any(one["curve"] for one in runs.values())},
        "time_to_quality": time_to_quality(study, good),
        "frontier": {by: frontier(heads, good, by) for by in ("seconds", "flops")},
        "failed": [
            {"variant": name, "seed": seed, "error": one["error"]}
            for name, runs in records.items()
            for seed, one in runs.items()
            if one["error"]
        ],
        "missing": [{"variant": name, "seed": seed} for name, seed in study.runs if seed not in records[name]],
        "labels": {name: study.label(name) for name in study.variants},
        "recipes": {name: study.file.variants[name] for name in study.variants},
        "base": {"recipe": study.file.base, "changes": study.file.changes},
        "made_on": machines(good),
        "provenance": provenance(),
    }


def scores_in(record: Mapping[str, Any]) -> dict[str, Scores]:
    """The scores of a record by benchmark."""
    return {name: of_content(Path(name), content) for name, content in record["scores"].items()}


def check_questions(
    scores: Mapping[str, Mapping[int, Mapping[str, Scores]]], goals: Mapping[str, Scores], benchmark: str
) -> None:
    """All runs, and the teacher, have answered the same questions of the benchmark that decides.

    Raises:
        RunError: one has not; the files have changed while the study ran.
    """
    asked = {"the teacher": goals[benchmark].questions} if benchmark in goals else {}
    for name, runs in scores.items():
        asked |= {f"{name} with seed {seed}": one[benchmark].questions for seed, one in runs.items()}
    first = next(iter(asked), "")
    for other, questions in asked.items():
        if questions != asked[first]:
            raise RunError(
                f"{other} answered other questions of {benchmark!r} than {first} (digests {questions} and {asked[first]}): the "
                "benchmark's files changed between the runs, or records of two studies are mixed; restore the files and remove the "
                "records that were made with others, or choose another folder (out)."
            )


def headline_in(scores: Mapping[str, Mapping[int, Mapping[str, Scores]]], benchmark: str) -> dict[str, str]:
    """What decides: the benchmark's name for people, the metric and its unit."""
    for one in (one[benchmark] for runs in scores.values() for one in runs.values()):
        return {"title": one.title, "metric": one.headline, "unit": one.metrics[one.headline].unit}
    return {"title": benchmark, "metric": "", "unit": "%"}


def headlines(runs: Mapping[int, Mapping[str, Scores]], benchmark: str) -> dict[int, Metric]:
    """The metric that decides, by seed."""
    return {seed: one[benchmark].metrics[one[benchmark].headline] for seed, one in sorted(runs.items())}


def common(of: Metrics, to: Metrics) -> list[int]:
    """The seeds that both have."""
    return [seed for seed in of if seed in to]


def variant(
    study: Study,
    name: str,
    heads: Mapping[str, Metrics],
    runs: Mapping[int, Mapping[str, Any]],
    goal: Metric | None,
) -> dict[str, Any]:
    """One row of the table of variants."""
    mean = over_seeds(list(heads[name].values()))
    seeds, start = common(heads[name], heads[study.gap_from]), heads[study.gap_from]
    gap: Difference | None = None
    if goal is not None and seeds:
        gap = gap_closed([heads[name][seed] for seed in seeds], [start[seed] for seed in seeds], goal)
    closed = None if gap is None else told_interval(gap)
    if closed is not None and name == study.gap_from:
        closed |= {"low": 0.0, "high": 0.0}  # by definition
    return {
        "accuracy": {"mean": mean.value, "low": known(mean.low), "high": known(mean.high)},
        "per_seed": {str(seed): metric.score for seed, metric in heads[name].items()},
        "steps": round(fmean(one["steps"] for one in runs.values())),
        "seconds": fmean(one["seconds"] for one in runs.values()),
        "flops": fmean(one["flops"] for one in runs.values()),
        "peak_memory_mib": fmean(one["peak_memory_mib"] for one in runs.values() if one["peak_memory_mib"] is not None)
        if any(one["peak_memory_mib"] is not None for one in runs.values())
        else None,
        "gap_closed": None if closed is None else closed["value"],
        "gap_closed_interval": None if closed is None else [closed["low"], closed["high"]],
    }


def known(value: float) -> float | None:
    """The number, or None if it is not known."""
    return None if isnan(value) else value


def difference(of: Metrics, to: Metrics, level: float) -> Difference:
    """What one variant is above another, over the seeds that both have."""
    seeds = common(of, to)
    if len(of[seeds[0]].clusters) < 2:
        # One image tells nothing of others.
        value = fmean(of[seed].score - to[seed].score for seed in seeds)
        return Difference(value=value, low=nan, high=nan, p=1.0, clusters=1, seeds=len(seeds))
    if len(seeds) == 1:
        return paired(of[seeds[0]], to[seeds[0]], level=level)
    return hierarchical([of[seed] for seed in seeds], [to[seed] for seed in seeds], level=level)


def differences(heads: Mapping[str, Metrics], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The differences of the pairs, each alone and corrected for there being several."""
    if not pairs:
        return []
    made = compared([partial(difference, heads[of], heads[to]) for of, to in pairs])
    return [
        told_pair(of, to, alone, together, heads[to], common(heads[of], heads[to]))
        for (of, to), alone, together in zip(pairs, *made, strict=True)
    ]


def told_pair(
    of: str, to: str, alone: Difference, together: Difference, base: Metrics, seeds: Sequence[int]
) -> dict[str, Any]:
    """A difference as the file tells it; `relative` is to the base's mean over the seeds that it was taken on."""
    mean = fmean(base[seed].score for seed in seeds)
    told = told_difference(alone, together)
    return {
        "of": of,
        "to": to,
        "mean": told.pop("value"),
        **told,
        "seeds": alone.seeds,
        "relative": None if mean == 0 else 100 * alone.value / mean,
    }


def metric_table(
    scores: Mapping[str, Mapping[int, Mapping[str, Scores]]], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Every metric of every benchmark (kinds of questions, fidelity): means over seeds and the pairs' differences.

    The intervals are each metric's own, uncorrected: they show where a difference comes from, and are no further claims. What was
    measured on different questions, or in different ways (fidelity at different layers), has neither mean nor difference.
    """
    first = next((one for runs in scores.values() for one in runs.values()), {})
    rows = []
    for benchmark, of_first in first.items():
        for metric in of_first.metrics:
            by_variant = {
                name: {
                    seed: one[benchmark].metrics[metric]
                    for seed, one in sorted(runs.items())
                    if has(one, benchmark, metric)
                }
                for name, runs in scores.items()
            }
            rows.append(
                {
                    "benchmark": benchmark,
                    "title": of_first.title,
                    "metric": metric,
                    "unit": of_first.metrics[metric].unit,
                    "variants": {
                        name: {"mean": mean.value, "low": known(mean.low), "high": known(mean.high)}
                        for name, runs in by_variant.items()
                        if runs and alike(scores, name, name, benchmark)
                        for mean in [over_seeds(list(runs.values()))]
                    },
                    "differences": [
                        {"of": of, "to": to, "mean": one.value, "low": known(one.low), "high": known(one.high)}
                        for of, to in pairs
                        if common(by_variant[of], by_variant[to]) and alike(scores, of, to, benchmark)
                        for one in [difference(by_variant[of], by_variant[to], LEVEL)]
                    ],
                }
            )
    return rows


def alike(scores: Mapping[str, Mapping[int, Mapping[str, Scores]]], of: str, to: str, benchmark: str) -> bool:
    """Whether all runs of two variants were measured on the same questions, in the same way."""
    return len({one[benchmark].questions for name in (of, to) for one in scores[name].values() if benchmark in one}) < 2


def has(scores: Mapping[str, Scores], benchmark: str, metric: str) -> bool:
    """Whether a run has that metric."""
    return benchmark in scores and metric in scores[benchmark].metrics


def curve(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The learning curves on held-out questions, by benchmark: each point's step, seconds, mean over seeds, and the seeds' own."""
    found: dict[str, list[dict[str, Any]]] = {}
    for benchmark, by_seed in points(runs).items():
        steps = sorted({step for of_seed in by_seed.values() for step in of_seed})
        rows = []
        for step in steps:
            values = {seed: of_seed[step] for seed, of_seed in by_seed.items() if step in of_seed}
            low, high = t_interval(list(values.values()))
            rows.append(
                {
                    "step": step,
                    "seconds": fmean(cost_until(runs[seed], step, "seconds") for seed in values),
                    "flops": fmean(cost_until(runs[seed], step, "flops") for seed in values),
                    "mean": fmean(values.values()),
                    "low": low,
                    "high": high,
                    "per_seed": {str(seed): value for seed, value in values.items()},
                }
            )
        found[benchmark] = rows
    return found


def points(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, dict[int, float]]]:
    """The values of the curves: benchmark, seed, step."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for seed, one in sorted(runs.items()):
        for line in one["curve"]:
            for key, value in line.items():
                name = key.removeprefix("task_")
                if key.startswith("task_") and not name.endswith(("_low", "_high")):
                    found.setdefault(name, {}).setdefault(seed, {})[int(line["step"])] = float(value)
    return found


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float | None, float | None]:
    """Student's interval of a mean over seeds; unknown for one."""
    if len(values) < 2:
        return None, None
    mean, error = fmean(values), float(np.std(values, ddof=1)) / len(values) ** 0.5
    reach = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return mean - reach, mean + reach


def frontier(heads: Mapping[str, Metrics], runs: Mapping[str, Mapping[int, Mapping[str, Any]]], by: str) -> list[str]:
    """The variants that no other one beats in mean score at the same or a lower cost, cheapest first."""
    return pareto(
        {
            name: (fmean(one[by] for one in runs[name].values()), fmean(metric.score for metric in found.values()))
            for name, found in heads.items()
            if found
        }
    )


def time_to_quality(study: Study, runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """How long each variant of a pair needs to reach the other's best accuracy on its learning curve, seed by seed.

    `share` is its time over the time in which the other reached it, geometric mean over seeds with Student's interval of its
    logarithm; of seeds that did not reach it there is only a lower bound, so the share is told only if all did.
    """
    found = []
    for of, to in study.pairs:
        curves = {name: points(runs.get(name, {})) for name in (of, to)}
        for benchmark in curves[to]:
            seeds = [seed for seed in curves[to][benchmark] if seed in curves[of].get(benchmark, {})]
            if not seeds:
                continue
            per_seed = {seed: reached(curves, runs, of, to, benchmark, seed) for seed in seeds}
            shares = [one["share"] for one in per_seed.values()]
            row: dict[str, Any] = {
                "of": of,
                "to": to,
                "benchmark": benchmark,
                "per_seed": {str(seed): one for seed, one in per_seed.items()},
                "reached": sum(share is not None for share in shares),
                "seeds": len(seeds),
                "share": None,
                "share_low": None,
                "share_high": None,
                "steps_share": None,
            }
            if all(share is not None for share in shares):
                logs = [float(np.log(share)) for share in shares]
                low, high = t_interval(logs)
                row |= {
                    "share": float(np.exp(fmean(logs))),
                    "share_low": None if low is None else float(np.exp(low)),
                    "share_high": None if high is None else float(np.exp(high)),
                    "steps_share": float(np.exp(fmean(float(np.log(one["steps_share"])) for one in per_seed.values()))),
                }
            found.append(row)
    return found


def reached(
    curves: Mapping[str, Mapping[str, Mapping[int, Mapping[int, float]]]],
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]],
    of: str,
    to: str,
    benchmark: str,
    seed: int,
) -> dict[str, Any]:
    """When one seed's run reached the best of another variant's run of the same seed; `share` is None if it never did."""
    theirs, ours = curves[to][benchmark][seed], curves[of][benchmark][seed]
    best = max(theirs.values())
    their_step = first_at(theirs, best)
    step = first_at(ours, best)
    share = None
    if step is not None and their_step is not None:
        share = cost_until(runs[of][seed], step, "seconds") / cost_until(runs[to][seed], their_step, "seconds")
    return {
        "best": best,
        "steps": step,
        "steps_of_other": their_step,
        "steps_share": None if step is None or their_step is None else step / their_step,
        "share": share,
    }


def first_at(values: Mapping[int, float], goal: float) -> float | None:
    """The step at which a curve first reaches a value, between two measurements by the line through them; None if it never does."""
    before: tuple[int, float] | None = None
    for step in sorted(values):
        if values[step] >= goal:
            if before is None or values[step] == before[1]:
                return float(step)
            share = (goal - before[1]) / (values[step] - before[1])
            return before[0] + share * (step - before[0])
        before = (step, values[step])
    return None


def machines(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The machines and versions that the runs were made with, each once, with the number of runs."""
    found: list[dict[str, Any]] = []
    for one in (record for by_seed in runs.values() for record in by_seed.values()):
        told = one["provenance"]
        for entry in found:
            if {key: value for key, value in entry.items() if key != "runs"} == told:
                entry["runs"] += 1
                break
        else:
            found.append({**told, "runs": 1})
    return found
