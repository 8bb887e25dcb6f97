"""Studies: what their file may say, how compute is made equal, that no run is made twice, and what their numbers are worth."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from align_ti.cli import app
from align_ti.config import Objective, Recipe, Student, read_recipe
from align_ti.errors import CheckError, ConfigError, RunError
from align_ti.evaluation.metrics import Metric, ratio
from align_ti.evaluation.results import FORMAT, name_of
from align_ti.evaluation.statistics import gap_closed, hierarchical, over_seeds
from align_ti.pipeline.training import distil
from align_ti.runs import locked, read_json, write_json
from align_ti.studies import costs, planned, running
from align_ti.studies.costs import Cost, equal_steps
from align_ti.studies.design import Study, StudyFile, read_study
from align_ti.studies.folder import StudyFolder, content_digest, told
from align_ti.studies.results import cost_until, differences, first_at, frontier, summary_of, with_costs
from align_ti.studies.running import Shard, run_study
from align_ti.terms.kd import Kd
from align_ti.terms.sft import Sft
from tests import small
from tests.launching import ROOT

# --- what a study's numbers are worth ---------------------------------------------------------------------------------


def shares(hits: np.ndarray, of: int = 8) -> Metric:
    """A share of right answers: hits of each image's questions."""
    return Metric(
        np.stack([hits, np.full(len(hits), of)], axis=-1).astype(float), ratio, tuple(f"p{i}" for i in range(len(hits)))
    )


def record(variant: str, seed: int, metric: Metric, curve=(), seconds_per_step=1.0, steps=10) -> dict:
    """A run's record with that score, as a file holds it; its own interval, which nothing of a study reads, is not computed."""
    told = {
        "value": metric.score,
        "unit": "%",
        "function": name_of(ratio),
        "cluster_list": 0,
        "sums": metric.sums.tolist(),
    }
    content = {
        "format": FORMAT,
        "benchmark": "exact match",
        "title": "exact match",
        "model": variant,
        "questions": "q",
        "headline": "overall",
        "metrics": {"overall": told},
        "notes": [],
        "cluster_lists": [list(metric.clusters)],
    }
    return {
        "variant": variant,
        "seed": seed,
        "error": None,
        "steps": steps,
        "seconds_per_step": seconds_per_step,
        "seconds": steps * seconds_per_step,
        "flops": 5.0 * steps,
        "peak_memory_mib": None,
        "curve": [{"step": step, "task_digits": value, "task_digits_low": 0.0} for step, value in curve],
        "scores": {"exact match": content},
        "provenance": {"python": "3"},
    }


def study_of(variants=("sft", "kd"), seeds=(0, 1, 2, 3, 4), **more) -> Study:
    """A study that is never run."""
    file = StudyFile(out="o", base="b", seeds=seeds, variants={name: {} for name in variants}, **more)
    recipe = Recipe.model_validate(
        {
            "out": "o",
            "student": {"path": "s"},
            "teacher": {"path": "t"},
            "data": {"train": "d", "eval": "e"},
            "training": {"max_steps": 10},
        }
    )
    return Study(file, {name: dict.fromkeys(seeds, recipe) for name in variants}, dict.fromkeys(variants, recipe))


def simulated(
    random: np.random.Generator, effects: dict[str, float], seeds: int = 5, pictures: int = 40
) -> dict[str, dict[int, Metric]]:
    """Scores of variants whose runs and questions differ by chance, and by the effects."""
    hard = random.normal(0, 1.0, pictures)
    return {
        name: {
            seed: shares(random.binomial(8, 1 / (1 + np.exp(-(hard + random.normal(effect, 0.3))))))
            for seed in range(seeds)
        }
        for name, effect in effects.items()
    }


def test_of_studies_without_an_effect_one_in_twenty_finds_one():
    random, runs = np.random.default_rng(0), 200
    alone = together = 0
    pairs = study_of(("sft", "kd", "iva")).pairs
    for _ in range(runs):
        found = differences(simulated(random, {"sft": 0, "kd": 0, "iva": 0}), pairs)
        alone += sum(one["low"] > 0 or one["high"] < 0 for one in found)
        together += any(one["corrected_low"] > 0 or one["corrected_high"] < 0 for one in found)
    # 400 differences, 200 families; about three standard errors around 5 %, and below it, since families are corrected by Bonferroni.
    assert 0.02 < alone / (2 * runs) < 0.08
    assert together / runs < 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_an_effect_is_found_and_its_interval_holds_it():
    random = np.random.default_rng(1)
    found = differences(simulated(random, {"sft": 0, "kd": 1.5}), study_of().pairs)
    assert [(one["of"], one["to"]) for one in found] == [("kd", "sft")]
    assert 0 < found[0]["low"] < found[0]["mean"] < found[0]["high"]


def test_the_summary_tells_what_the_statistics_say():
    random = np.random.default_rng(2)
    metrics = simulated(random, {"sft": 0, "kd": 1, "iva": 2})
    study = study_of(("sft", "kd", "iva"), compare=[["iva", "kd"], ["kd", "sft"]])
    records = {name: {seed: record(name, seed, one) for seed, one in runs.items()} for name, runs in metrics.items()}
    content = summary_of(study, records, None)
    heads = {name: list(runs.values()) for name, runs in metrics.items()}
    told = over_seeds(heads["kd"])
    assert content["variants"]["kd"]["accuracy"] == {"mean": told.value, "low": told.low, "high": told.high}
    assert content["variants"]["kd"]["per_seed"] == {str(s): one.score for s, one in enumerate(heads["kd"])}
    first, expected = content["differences"][0], hierarchical(heads["iva"], heads["kd"])
    assert (first["mean"], first["low"], first["high"]) == (expected.value, expected.low, expected.high)
    assert first["corrected_low"] < first["low"] < first["high"] < first["corrected_high"]
    mean = np.mean([one.score for one in heads["kd"]])
    assert first["relative"] == pytest.approx(100 * expected.value / mean)
    # What a file holds is JSON: no NaN.
    json.dumps(content, allow_nan=False)


def test_the_mean_over_seeds_of_equal_runs_and_pictures_has_its_exact_interval():
    # All hits or none say something about other questions all the same.
    told = over_seeds([shares(np.full(30, 8)) for _ in range(5)])
    assert told.value == 100 and 80 < told.low < 100 and told.high == 100


@pytest.mark.parametrize(("most", "end"), [(8, 100.0), (0, 0.0)])
def test_the_interval_of_a_share_over_seeds_stays_between_0_and_100(most, end):
    # Tables had 99.8 % (99.0 to 100.6).
    pictures = np.arange(30)
    told = over_seeds([shares(np.where(pictures < missed, abs(most - 1), most)) for missed in (0, 1, 1, 12)])
    assert end in (told.low, told.high)
    assert 0 <= told.low < told.value < told.high <= 100


@pytest.mark.parametrize("part", [0.0, 0.25, 1.0, 1.5])
def test_the_gap_that_is_closed_is_the_share_of_the_way(part):
    pictures = np.arange(20) % 3
    start, goal = shares(2 + pictures), shares(6 + 0 * pictures)
    way = goal.score - start.score
    between = [
        Metric(start.sums + np.stack([part * way / 100 * start.sums[:, 1], 0 * pictures], -1), ratio, start.clusters)
    ]
    told = gap_closed(between * 2, [start] * 2, goal)
    assert told.value == pytest.approx(100 * part)
    # Runs and images that are all alike tell nothing of others.
    assert math.isnan(told.low) if part == 0 else told.low < told.value < told.high
    assert gap_closed([start], [goal], goal) is None


def test_intervals_of_the_gap_hold_it_nineteen_times_in_twenty():
    random, held, runs = np.random.default_rng(3), 0, 200
    for _ in range(runs):
        hard = random.normal(0, 1, 60)

        def run(effect: float, hard: np.ndarray = hard) -> Metric:
            return shares(random.binomial(8, 1 / (1 + np.exp(-(hard + random.normal(effect, 0.3))))))

        told = gap_closed([run(0.7) for _ in range(5)], [run(0) for _ in range(5)], run(3.0))
        held += told.low <= TRUE_GAP <= told.high
    assert 0.90 < held / runs < 0.99


def expected(effect: float) -> float:
    """The mean score of a run with that effect, over runs and images."""
    random = np.random.default_rng(9)
    return float(np.mean(1 / (1 + np.exp(-(random.normal(0, 1, 400_000) + random.normal(effect, 0.3, 400_000))))))


TRUE_GAP = 100 * (expected(0.7) - expected(0)) / (expected(3.0) - expected(0))


# --- curves and cost --------------------------------------------------------------------------------------------------


def test_time_to_quality_is_read_off_the_curves():
    flat = shares(np.full(6, 4))
    records = {
        "sft": {s: record("sft", s, flat, [(5, 20.0), (10, 40.0)], 1.0) for s in (0, 1)},
        # Reaches 40 half way between 2 and 6, at twice the cost of a step.
        "kd": {s: record("kd", s, flat, [(2, 30.0), (6, 50.0), (10, 45.0)], 2.0) for s in (0, 1)},
    }
    (told,) = summary_of(study_of(seeds=(0, 1)), records, None)["time_to_quality"]
    assert told["per_seed"]["0"] == {
        "best": 40.0,
        "steps": 4.0,
        "steps_of_other": 10.0,
        "steps_share": 0.4,
        "share": 0.8,
    }
    assert told["share"] == pytest.approx(0.8) and told["share_low"] == pytest.approx(0.8) and told["reached"] == 2
    # One seed that never gets there leaves no mean to tell.
    records["kd"][1] = record("kd", 1, flat, [(10, 39.0)])
    (told,) = summary_of(study_of(seeds=(0, 1)), records, None)["time_to_quality"]
    assert told["share"] is None and told["reached"] == 1 and told["seeds"] == 2
    curve = summary_of(study_of(seeds=(0, 1)), records, None)["curves"]["sft"]["digits"]
    assert [(one["step"], one["mean"], one["seconds"], one["flops"]) for one in curve] == [
        (5, 20, 5, 25),
        (10, 40, 10, 50),
    ]


@given(st.dictionaries(st.integers(0, 50), st.floats(0, 100), min_size=1), st.floats(0, 100))
def test_a_curve_reaches_a_value_between_the_measurements_around_it(values, goal):
    step = first_at(values, goal)
    if step is None:
        assert max(values.values()) < goal
    else:
        above = min(key for key in values if values[key] >= goal)
        below = [key for key in values if key < above]
        assert (max(below) if below else above) <= step <= above


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=6))
def test_what_stands_on_the_frontier_is_beaten_by_nothing(costs_and_hits):
    heads = {str(i): {0: shares(np.full(4, hits))} for i, (_, hits) in enumerate(costs_and_hits)}
    runs = {str(i): {0: {"seconds": float(cost)}} for i, (cost, _) in enumerate(costs_and_hits)}
    on = frontier(heads, runs, "seconds")
    for i, (cost, hits) in enumerate(costs_and_hits):
        better = [1 for c, h in costs_and_hits if (c <= cost and h > hits) or (c < cost and h >= hits)]
        assert (str(i) not in on) if better else any(costs_and_hits[int(j)] == (cost, hits) for j in on)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from(["time", "flops"]))
def test_equal_compute_is_the_budget_but_for_one_step(first, second, equal):
    study = study_of(equal=equal, budget="kd")
    a_step = {
        name: {"seconds_per_step": cost, "flops_per_step": cost} for name, cost in (("sft", first), ("kd", second))
    }
    if first > 10 * second:
        with pytest.raises(RunError, match="less than one step of sft"):
            equal_steps(study, a_step)
        return
    steps = equal_steps(study, a_step)
    assert steps["kd"] == 10
    assert steps["sft"] * first <= 10 * second * (1 + 1e-6) < (steps["sft"] + 1) * first * (1 + 1e-5)
    assert equal_steps(study_of(equal="steps"), a_step) == {"sft": 10, "kd": 10}


def test_times_of_a_study_are_those_that_were_measured_in_turn():
    records = {"sft": {0: record("sft", 0, shares(np.full(4, 4)), seconds_per_step=9.0)}}
    told = with_costs(study_of(), records, {"sft": {"seconds_per_step": 2.0, "flops_per_step": 3.0}})["sft"][0]
    assert (told["seconds_per_step"], told["seconds"]) == (2.0, 20.0)
    assert records["sft"][0]["seconds_per_step"] == 9.0


def test_a_step_before_the_weights_fall_costs_more_than_one_after():
    # Every step had the mean cost of training, so a dear first half was drawn as if it were cheap.
    off = {"weight": {"final": 0.0, "begin": 0.5, "end": 0.5}}
    study = study_of()
    recipe = study.templates["kd"].model_copy(update={"objective": Objective.only(sft=Sft(), kd=Kd(schedule=off))})
    study = dataclasses.replace(study, templates={**study.templates, "kd": recipe})
    half = {"seconds_per_step": 3.0, "flops_per_step": 9.0}, {"seconds_per_step": 1.0, "flops_per_step": 5.0}
    costs = {"kd": {"seconds_per_step": 2.0, "flops_per_step": 7.0, "stages": list(half)}}
    run = with_costs(study, {"kd": {0: record("kd", 0, shares(np.full(4, 4)))}}, costs)["kd"][0]
    assert [cost_until(run, step, "seconds") for step in (0, 1, 5, 6, 10)] == [0, 3, 15, 16, 20]
    assert [cost_until(run, step, "flops") for step in (4, 10)] == [36, 70]
    assert run["seconds"] == cost_until(run, 10, "seconds")


def test_runs_that_answered_other_questions_are_not_compared():
    records = {name: {s: record(name, s, shares(np.full(4, 4))) for s in (0, 1)} for name in ("sft", "kd")}
    records["kd"][1]["scores"]["exact match"]["questions"] = "others"
    with pytest.raises(RunError, match="kd with seed 1 answered other questions of 'exact match' than sft with seed 0"):
        summary_of(study_of(seeds=(0, 1)), records, None)
    # Another measure, taken in another way, has means and no difference.
    for name, runs in records.items():
        for one in runs.values():
            one["scores"]["exact match"]["questions"] = "q"
            one["scores"]["fidelity"] = {**one["scores"]["exact match"], "questions": f"at the layer of {name}"}
    told, fidelity = summary_of(study_of(seeds=(0, 1)), records, None)["metrics"]
    assert len(told["differences"]) == 1 and fidelity["differences"] == [] and len(fidelity["variants"]) == 2


def test_a_relative_difference_is_to_the_mean_of_the_seeds_that_both_have():
    hits = {0: 4, 1: 2, 2: 8}
    records = {
        "sft": {seed: record("sft", seed, shares(np.full(4, of))) for seed, of in hits.items()},
        "kd": {seed: record("kd", seed, shares(np.full(4, of + 1))) for seed, of in list(hits.items())[:2]},
    }
    (told,) = summary_of(study_of(seeds=(0, 1, 2)), records, None)["differences"]
    assert (told["seeds"], told["mean"]) == (2, pytest.approx(12.5))
    assert told["relative"] == pytest.approx(100 * 12.5 / 37.5)


# --- its file ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    small.write_pair(folder)
    small.write_records(folder)
    small.write_records(folder, "eval.json", pictures=2, seed=5)
    for seed in (0, 1):
        (folder / f"train-{seed}.json").write_text((folder / "train.json").read_text())
    base = small.recipe(folder, data={"train": str(folder / "train-{seed}.json"), "eval": str(folder / "eval.json")})
    base["objective"] = {"iva": {"layer": 0}}
    base["evaluation"] = {"max_new_tokens": 2, "fidelity_records": 2}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    return folder


def write_study(folder: Path, path: Path, **more: object) -> Path:
    content = {
        "out": str(path.with_suffix("")),
        "base": str(folder / "base.yaml"),
        "seeds": [0, 1],
        "variants": {"kd": {"objective.iva.weight": 0, "objective.tpa.weight": 0}, "align_ti": {}},
        **more,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_recipes_of_a_study_are_the_base_with_changes_variant_and_seed(folder, tmp_path):
    path = write_study(folder, tmp_path / "s.yaml", changes={"training.weight_decay": 0.5})
    study = read_study(path, ["training.max_steps=3"])
    kd = study.recipes["kd"][1]
    assert (kd.seed, kd.training.weight_decay, kd.training.max_steps) == (1, 0.5, 3)
    assert kd.data.train == str(folder / "train-1.json") and kd.objective.active == ("sft", "kd")
    assert study.recipes["align_ti"][0].objective.active == ("sft", "kd", "iva", "tpa")
    assert study.runs == [("kd", 0), ("align_ti", 0), ("kd", 1), ("align_ti", 1)]
    assert (study.gap_from, study.pairs) == ("kd", (("align_ti", "kd"),))


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        ({"sedes": [1], "equal": "money"}, ["sedes is no known option; did you mean 'seeds'?", "equal is 'money'"]),
        ({"variants": {"a/b": {}}}, ["variants names 'a/b'"]),
        ({"variants": {}}, ["variants"]),
        ({"seeds": [1, 1]}, ["different whole numbers"]),
        ({"seeds": []}, ["seeds"]),
        ({"compare": [["kd", "x"]]}, ["compare names 'x', which is no variant; accepted: kd, align_ti"]),
        ({"compare": [["kd", "kd"]]}, ["compare has 'kd' with itself"]),
        ({"budget": "kd"}, ["budget is given, but equal is 'steps'"]),
        ({"score": "pope"}, ["score is 'pope'; accepted: exact match"]),
        (
            {"variants": {"a": {"training.max_stesp": 2}, "b": {"objective.kd.temperature": -1}}},
            [
                "variants.a: training.max_stesp is no known option; did you mean 'max_steps'?",
                "variants.b: objective.kd.temp",
            ],
        ),
        ({"variants": {"a": {}, "b": {"training.max_steps": 9}}}, ["training.max_steps differs (a 4, b 9)"]),
        (
            {"variants": {"a": {}, "b": {"data.eval": "other.json"}}},
            ["variants.b, seed 0 is measured on other questions"],
        ),
        ({"changes": {"data.eval": None}}, ["nothing is measured"]),
        ({"changes": {"training.max_steps": -1}}, ["training.max_steps is -1"]),
        ({"changes": {"check.x": 1}}, ["changes.check.x: check is no section"]),
    ],
)
def test_a_study_file_is_read_strictly_with_all_errors_at_once(folder, tmp_path, more, messages):
    path = write_study(folder, tmp_path / "s.yaml", **more)
    with pytest.raises(ConfigError) as caught:
        read_study(path)
    assert str(tmp_path / "s.yaml") in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "quality").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_campaigns_studies_are_well_formed(path):
    if path.stem == "base":
        read_recipe(path)
    else:
        study = read_study(path)
        assert study.out == Path("results/quality") / path.stem and (study.pairs or len(study.variants) == 1)


def test_a_folder_of_another_study_is_refused_and_a_larger_one_goes_on(folder, tmp_path):
    def claim(**more: object) -> None:
        study = read_study(write_study(folder, tmp_path / "s.yaml", **more))
        StudyFolder(study.out).claim(study)

    claim()
    claim(seeds=[0, 1], compare=[["kd", "align_ti"]])
    claim(
        variants={
            "kd": {"objective.iva.weight": 0, "objective.tpa.weight": 0},
            "align_ti": {},
            "new": {"training.weight_decay": 0.1},
        }
    )
    # An option that is newer than the folder has its default there.
    kept = yaml.safe_load((tmp_path / "s" / "study.yaml").read_text())
    del kept["recipes"]["kd"]["training"]["weight_decay"]
    (tmp_path / "s" / "study.yaml").write_text(yaml.safe_dump(kept))
    claim()
    for more in ({"changes": {"training.weight_decay": 0.3}}, {"equal": "flops"}):
        with pytest.raises(RunError, match="other settings"):
            claim(**more)
    train = folder / "train-1.json"
    before = train.read_text()
    try:
        train.write_text(before + " ")
        with pytest.raises(RunError, match=r"the content of .*train-1\.json"):
            claim()
    finally:
        train.write_text(before)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no study"):
        claim(out=str(tmp_path / "other"))


# --- its runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cheap(monkeypatch) -> None:
    """Costs as if they were measured."""
    made = {
        "kd": Cost(seconds_per_step=1.0, flops_per_step=2.0, steps=4),
        "align_ti": Cost(seconds_per_step=2.0, flops_per_step=3.0, steps=4),
    }
    monkeypatch.setattr(running, "measured_costs", lambda study, folder, advance: made)


class Watch:
    """Counts the steps of each run; stops the process's work at one of them."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stop, self.steps = stop, {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what.startswith("train: "):
            self.steps[what] = self.steps.get(what, 0) + 1
            if (what, self.steps[what]) == self.stop:
                raise KeyboardInterrupt


def test_a_stopped_study_goes_on_without_running_anything_twice(folder, tmp_path, cheap, monkeypatch):
    study = read_study(write_study(folder, tmp_path / "s.yaml"))
    first, said = Watch(stop=("train: align_ti, seed 0", 3)), []
    with pytest.raises(KeyboardInterrupt):
        run_study(study, advance=first)
    assert first.steps == {"train: kd, seed 0": 4, "train: align_ti, seed 0": 3}
    # The measuring of one run fails: the others are made, and the table tells.
    measure = running.scores_of

    def fails_once(model, recipe, *others):
        if recipe.seed == 1 and recipe.objective.active == ("sft", "kd"):
            raise ValueError("no room left")
        return measure(model, recipe, *others)

    monkeypatch.setattr(running, "scores_of", fails_once)
    second = Watch()
    content = run_study(study, advance=second, said=said.append)
    # From the checkpoint of step 2.
    assert second.steps == {"train: align_ti, seed 0": 2, "train: kd, seed 1": 4, "train: align_ti, seed 1": 4}
    assert content["failed"] == [{"variant": "kd", "seed": 1, "error": "ValueError: no room left"}]
    assert content["missing"] == [] and list(content["variants"]["kd"]["per_seed"]) == ["0"]
    assert any("kd, seed 1: failed" in line for line in said)
    third = Watch()
    assert run_study(study, advance=third)["failed"] == content["failed"] and not third.steps
    monkeypatch.setattr(running, "scores_of", measure)
    last = Watch()
    content = run_study(study, advance=last, retry=True)
    # Its student was finished, and is measured alone.
    assert not last.steps and not content["failed"]
    assert content == read_json(study.out / "study.json")
    assert not list((study.out / "work").glob("*/*/run")) and not (study.out / "students").exists()
    told = read_json(study.out / "records" / "kd" / "1.json")
    assert {"exact match", "fidelity"} == set(told["scores"]) and told["flops"] == 8.0
    rows = {(row["benchmark"], row["metric"]) for row in content["metrics"]}
    assert {("exact match", "overall"), ("fidelity", "response_kl")} <= rows


def test_a_run_that_another_process_is_at_is_passed_over(folder, tmp_path, cheap):
    study = read_study(write_study(folder, tmp_path / "s.yaml", seeds=[0], keep_students=True))
    held = StudyFolder(study.out).root / "work" / ".kd-0.lock"
    with locked(held) as owner:
        assert owner is None
        watch = Watch()
        content = run_study(study, advance=watch)
    assert watch.steps == {"train: align_ti, seed 0": 4}
    assert content["missing"] == [{"variant": "kd", "seed": 0}] and content["differences"] == []
    assert (study.out / "students" / "align_ti" / "0" / "model.safetensors").exists()


def test_a_run_that_another_study_has_made_is_taken_from_it(folder, tmp_path, cheap, monkeypatch):
    made = read_study(write_study(folder, tmp_path / "made.yaml", seeds=[0]))
    StudyFolder(made.out).claim(made)
    accuracy = shares(np.array([8, 0]))
    for name in made.variants:
        content = record(name, 0, accuracy, steps=4)
        write_json(StudyFolder(made.out).record(name, 0), content)
    # Under other names, and with other steps of its own, which equal compute replaces.
    variants = {"align_ti": {"training.max_steps": 9}, "kd": {"objective.iva.weight": 0, "objective.tpa.weight": 0}}
    taken = {"records_from": [str(made.out)], "equal": "nothing"}
    study = read_study(write_study(folder, tmp_path / "s.yaml", seeds=[0], variants=variants, **taken))
    StudyFolder(study.out).claim(study)
    teacher = record("teacher", 0, shares(np.array([8, 8])))["scores"]
    write_json(StudyFolder(study.out).teacher, {"path": "teacher", "scores": teacher})
    monkeypatch.setattr(planned, "measured_costs", running.measured_costs)
    plan = planned.planned(study, Watch())
    assert (plan.left, plan.seconds, plan.rows["kd"].done) == (0, 0, 1)
    watch, said = Watch(), []
    content = run_study(study, advance=watch, said=said.append)
    assert not watch.steps and len(said) == 2 and all("taken from" in line for line in said)
    assert content["variants"]["align_ti"]["per_seed"] == {"0": 50.0} and not content["missing"]
    assert read_json(StudyFolder(study.out).record("kd", 0))["taken_from"] == str(made.out)

    def found(study, variant="kd", seed=0, steps=4):
        return StudyFolder(study.out).made_elsewhere(study, variant, seed, steps)

    assert found(study) is not None
    assert found(study, steps=5) is None
    other = write_study(folder, tmp_path / "t.yaml", changes={"training.weight_decay": 0.3}, **taken)
    assert found(read_study(other)) is None
    assert found(read_study(write_study(folder, tmp_path / "t.yaml", **taken)), seed=1) is None
    with pytest.raises(RunError, match="holds no study"):
        found(read_study(write_study(folder, tmp_path / "t.yaml", records_from=[str(tmp_path / "nothing")])))
    train = folder / "train-0.json"
    before = train.read_text()
    try:
        train.write_text(before + " ")
        assert found(study) is None
    finally:
        train.write_text(before)
    failed = StudyFolder(made.out).record("kd", 0)
    write_json(failed, {**read_json(failed), "error": "no room left"})
    assert found(study) is None


def test_a_dry_run_leaves_the_costs_of_another_study(folder, tmp_path, cheap, monkeypatch):
    # It measured a changed recipe, and replaced costs that finished runs had been made with.
    monkeypatch.setattr(planned, "measured_costs", running.measured_costs)
    study = read_study(write_study(folder, tmp_path / "s.yaml"))
    StudyFolder(study.out).claim(study)
    changed = read_study(write_study(folder, tmp_path / "s.yaml", changes={"training.learning_rate": 0.5}))
    with pytest.raises(RunError, match=r"other settings \(variants\.kd: training\.learning_rate"):
        planned.planned(changed, Watch())


def test_a_variant_that_fails_its_check_is_trained_with_no_seed(folder, tmp_path, cheap, monkeypatch):
    # Only the first seed was checked: the others were trained and told as results.
    checks = []

    def refuses(recipe, *, steps, check):
        checks.append((recipe.seed, recipe.objective.active, check))
        if recipe.objective.active == ("sft", "kd"):
            raise CheckError("branch share is 0")
        return distil(recipe, steps=steps, check=False)

    monkeypatch.setattr(running, "distil", refuses)
    content = run_study(read_study(write_study(folder, tmp_path / "s.yaml")))
    assert [one["seed"] for one in content["failed"]] == [0, 1] and list(content["variants"]) == ["align_ti"]
    assert [check for _, _, check in checks] == [True, True, True, False]


def test_other_models_and_extensions_make_another_study(folder, tmp_path):
    models = [tmp_path / name for name in ("student", "teacher")]
    for model in models:
        shutil.copytree(folder / model.name, model)
    extension = tmp_path / "mine.py"
    extension.write_text("WEIGHT = 1\n")
    changes = {"student.path": str(models[0]), "teacher.path": str(models[1]), "extensions": [str(extension)]}
    study = read_study(write_study(folder, tmp_path / "s.yaml", changes=changes), allow_extensions=True)
    at = StudyFolder(study.out)
    at.claim(study)
    at.claim(study)
    for path in (models[0] / "model.safetensors", models[1] / "config.json", extension):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + b" ")
        with pytest.raises(RunError, match="the content of"):
            at.claim(study)
        path.write_bytes(before)


def test_the_digest_of_a_data_folder_is_that_of_its_files(tmp_path):
    # A bug: data in folders were never compared.
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "a.parquet").write_bytes(b"records")
    assert content_digest(one) == content_digest(two) != content_digest(one / "part" / "a.parquet")
    (two / ".cache").mkdir()
    (two / ".cache" / "a.metadata").write_text("2026")
    assert content_digest(one) == content_digest(two)
    (two / "part" / "a.parquet").write_bytes(b"other records")
    assert content_digest(one) != content_digest(two)
    (one / "part" / "a.parquet").rename(one / "part" / "b.parquet")
    assert content_digest(one) not in (content_digest(two), content_digest(one / "part" / "b.parquet"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_disk_that_a_student_takes_is_that_of_its_weights_in_32_bits(tmp_path, dtype):
    # A bug: weights saved in 32 bits counted twice.
    save_file({"a": torch.zeros(3, 5, dtype=dtype), "b": torch.zeros(7, dtype=dtype)}, tmp_path / "model.safetensors")
    assert planned.student_bytes(Student(path=str(tmp_path))) == 4 * (15 + 7)
    assert planned.student_bytes(Student(path=str(tmp_path), dtype="bfloat16")) == 2 * (15 + 7)
    assert planned.student_bytes(Student(path=str(tmp_path / "missing"))) == 0
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert planned.student_bytes(Student(path=str(tmp_path))) == 0


def test_runs_of_other_steps_than_the_costs_give_are_refused(folder, tmp_path, cheap):
    study = read_study(write_study(folder, tmp_path / "s.yaml", seeds=[0]))
    write_json(StudyFolder(study.out).record("kd", 0), record("kd", 0, shares(np.array([1, 0])), steps=5))
    StudyFolder(study.out).root.joinpath("study.yaml").write_text(yaml.safe_dump(told(study)))
    with pytest.raises(RunError, match=r"0\.json has 5 steps, and .*costs\.json gives kd 4"):
        run_study(study)


@given(st.integers(1, 7), st.integers(0, 40))
def test_every_run_is_of_one_shard(count, number):
    assert sum(Shard(index, count).has(number) for index in range(1, count + 1)) == 1


def test_costs_are_measured_once_and_more_terms_cost_more(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "TIMED", 7)
    monkeypatch.setattr(costs, "ROUNDS", 2)
    monkeypatch.setattr(costs, "COUNTED", (1, 3))
    study = read_study(write_study(folder, tmp_path / "s.yaml", equal="flops", budget="align_ti"))
    at = StudyFolder(study.out)
    done = []
    found = costs.measured_costs(study, at, lambda what, number, total: done.append(what))
    assert found["kd"].flops_per_step < found["align_ti"].flops_per_step
    assert found["align_ti"].steps == 4 <= found["kd"].steps
    assert found["kd"].steps * found["kd"].flops_per_step <= 4 * found["align_ti"].flops_per_step
    assert all(one.seconds_per_step > 0 for one in found.values()) and done
    done.clear()
    assert costs.measured_costs(study, at, lambda what, number, total: done.append(what)) == found and not done
    assert not list((at.root / "work").glob("cost-*"))


def test_costs_can_be_those_of_a_student_that_has_begun_to_learn(folder, tmp_path, monkeypatch):
    starts = []

    def seconds(recipe, at):
        starts.append(Path(recipe.student.path))
        return float((starts[-1] / "model.safetensors").exists())

    monkeypatch.setattr(costs, "seconds_of_a_step", seconds)
    monkeypatch.setattr(costs, "flops_of_a_step", lambda recipe, at: float(recipe.student.path == str(starts[-1])))
    study = read_study(write_study(folder, tmp_path / "s.yaml", cost_after=2, variants={"kd": {}}))
    at = StudyFolder(study.out)
    found = costs.measured_costs(study, at, lambda what, number, total: None)
    # The time was taken, and operations counted, with a student of that run, which is gone now.
    assert (found["kd"].seconds_per_step, found["kd"].flops_per_step) == (1.0, 1.0)
    assert starts[-1] != Path(study.first("kd").student.path) and not starts[-1].exists()
    # Costs of first steps are others.
    study = read_study(write_study(folder, tmp_path / "s.yaml", variants={"kd": {}}))
    costs.measured_costs(study, at, lambda what, number, total: None)
    assert starts[-1] == Path(study.first("kd").student.path)


def test_a_new_variant_is_timed_beside_one_that_is_known(folder, tmp_path, monkeypatch):
    # It was timed alone: on a machine of half the speed it would have made half the steps.
    pace = {"kd": 1.0, "align_ti": 3.0, "new": 2.0}
    speed = [1.0]

    def seconds(recipe, at):
        weights = recipe.training.weight_decay
        name = "new" if weights else "kd" if len(recipe.objective.active) == 2 else "align_ti"
        return pace[name] * speed[0]

    monkeypatch.setattr(costs, "seconds_of_a_step", seconds)
    monkeypatch.setattr(costs, "flops_of_a_step", lambda recipe, at: 1.0)
    more = {"equal": "time", "budget": "align_ti"}
    variants = {"kd": {"objective.iva.weight": 0, "objective.tpa.weight": 0}, "align_ti": {}}
    study = read_study(write_study(folder, tmp_path / "s.yaml", variants=variants, **more), ["training.weight_decay=0"])
    told = costs.measured_costs(study, StudyFolder(study.out), lambda *_: None)
    assert {name: one.steps for name, one in told.items()} == {"kd": 12, "align_ti": 4}
    speed[0] = 2.0
    variants["new"] = {"training.weight_decay": 0.1}
    study = read_study(write_study(folder, tmp_path / "s.yaml", variants=variants, **more), ["training.weight_decay=0"])
    told = costs.measured_costs(study, StudyFolder(study.out), lambda *_: None)
    assert {name: one.seconds_per_step for name, one in told.items()} == pace
    assert {name: one.steps for name, one in told.items()} == {"kd": 12, "align_ti": 4, "new": 6}


def test_counted_operations_are_those_of_the_products():
    torch = pytest.importorskip("torch")
    from align_ti.flops import FlopCount

    q = torch.randn(2, 3, 5, 4, requires_grad=True)
    with FlopCount() as count:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    # Two products forward; backward computes one again and has four of its own.
    one = 2 * 2 * 3 * 5 * 5 * 4
    assert count.total == 2 * one + 5 * one
    # A product that is added up in place, as the head's gradient is: PyTorch's own counter leaves it out.
    with count:
        torch.zeros(3, 5).addmm_(torch.ones(3, 4), torch.ones(4, 5))
    assert count.total == 7 * one + 2 * 3 * 4 * 5


def test_the_command_plans_runs_and_tells(folder, tmp_path, cheap, monkeypatch):
    monkeypatch.setattr(planned, "measured_costs", running.measured_costs)
    path = str(write_study(folder, tmp_path / "s.yaml", seeds=[0]))
    told = CliRunner().invoke(app, ["study", path, "--dry-run"])
    assert told.exit_code == 0 and "remaining: 2 runs, 12 s of training" in told.output
    assert "cost of a step: measured, 137 steps per variant in total" in " ".join(told.output.split())
    assert not (tmp_path / "s" / "study.yaml").exists()
    wrong = CliRunner().invoke(app, ["study", path, "--shard", "3/2"])
    assert isinstance(wrong.exception, ConfigError) and "--shard is '3/2'" in str(wrong.exception)


def test_a_dry_run_says_what_is_trained_before_costs_are_measured(folder, tmp_path, cheap, monkeypatch):
    # `cost_after` trains each variant, in a dry run too, and the plan neither said so nor counted the time.
    monkeypatch.setattr(planned, "measured_costs", running.measured_costs)
    path = str(write_study(folder, tmp_path / "s.yaml", seeds=[0], cost_after=300))
    told = CliRunner().invoke(app, ["study", path, "--dry-run"])
    lines = " ".join(told.output.split())
    before, plan = lines.split("remaining:")[0], lines.split("remaining:")[1]
    # 300 steps, five times 25 that are timed, 2 and 10 that are counted; a second a step for one variant, two for the other.
    assert (
        "measuring the cost of a step: 2 variant(s) are trained for 437 steps each, the first 300 of them before"
        in before
    )
    assert (
        "measured after 300 steps of training (cost_after), 437 steps per variant in total, about 21 min 51 s" in before
    )
    assert "12 s of training" in plan
    # Costs that the folder holds are not measured again, so nothing is announced.
    study = read_study(Path(path))
    known = {
        name: {"of": costs.measured_as(study, name), "seconds_per_step": 1.0, "flops_per_step": 2.0}
        for name in study.variants
    }
    StudyFolder(study.out).costs.write_text(json.dumps(known))
    told = CliRunner().invoke(app, ["study", path, "--dry-run"])
    assert "measuring the cost of a step" not in told.output and "cost_after" in told.output
