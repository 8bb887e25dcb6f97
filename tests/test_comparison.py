"""Models compared on the same questions, by files and on the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from align_ti.cli import app, tables
from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.base import Report
from align_ti.evaluation.comparison import compare, read_models
from align_ti.evaluation.metrics import mean_of, quotient
from align_ti.evaluation.results import scored, write_scores
from align_ti.evaluation.statistics import holm, interval, paired, simultaneous


def report(chance: float, seed: int, notes: tuple[str, ...] = ()) -> Report:
    values = (np.random.default_rng(seed).random(60) < chance).astype(float).tolist()
    clusters = [number // 2 for number in range(60)]
    metrics = {"accuracy": mean_of(values, clusters), "first": mean_of(values[:30], clusters[:30])}
    return Report(metrics, "accuracy", {}, notes)


@pytest.fixture
def files(tmp_path):
    for model, chance in (("small", 0.4), ("kd", 0.6), ("[bold]all", 0.9)):
        for number, benchmark in enumerate(("pope", "gqa")):
            made = report(chance, number, ("2 predictions are missing.",) if model == "kd" and number == 0 else ())
            write_scores(tmp_path / model / f"{benchmark}.scores.json", scored(benchmark, made, model, "q"))
    return [tmp_path / model for model in ("small", "kd", "[bold]all")]


def test_each_model_is_compared_with_the_first(files):
    models = read_models(files)
    found = compare(models)
    assert found["models"] == ["small", "kd", "[bold]all"]
    assert [(row["benchmark"], row["metric"]) for row in found["rows"]] == [("gqa", "accuracy"), ("pope", "accuracy")]
    assert found["comparisons"] == 4
    assert found["notes"] == ["kd, pope: 2 predictions are missing."]
    pairs = [(row["benchmark"], one) for row in found["rows"] for one in row["differences"]]
    metrics = {name: {title: one.metrics["accuracy"] for title, one in scores.items()} for name, scores in models}
    alone = [paired(metrics[one["of"]][title], metrics[one["to"]][title]) for title, one in pairs]
    wide = [paired(metrics[one["of"]][t], metrics["small"][t], level=simultaneous(4)) for t, one in pairs]
    for (_, one), own, corrected, p in zip(pairs, alone, wide, holm([each.p for each in alone]), strict=True):
        assert (one["value"], one["low"], one["high"], one["p"]) == (own.value, own.low, own.high, own.p)
        assert (one["corrected_low"], one["corrected_high"], one["corrected_p"]) == (corrected.low, corrected.high, p)
    score = found["rows"][0]["scores"]["kd"]
    assert (score["low"], score["high"]) == (interval(metrics["kd"]["gqa"]).low, interval(metrics["kd"]["gqa"]).high)
    assert len(compare(models, all_metrics=True)["rows"]) == 4
    assert json.loads(json.dumps(found)) == found


def test_the_command_prints_no_difference_without_its_interval(files, tmp_path, monkeypatch):
    # Test workers have consoles of 80 columns, in which rows take several lines.
    monkeypatch.setattr(tables, "console", Console(width=200, markup=False))
    with_wide = CliRunner()
    result = with_wide.invoke(app, ["compare", *map(str, files), "--all-metrics", "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    lines = [line for line in result.output.splitlines() if line.count("│") > 5]
    for row in found["rows"]:
        for one in row["differences"]:
            shown = f"{one['value']:+.1f}"
            interval_shown = f"{one['low']:.1f} to {one['high']:.1f}"
            assert any(shown in line and interval_shown in line and one["of"] in line for line in lines)
    assert "corrected for 8 comparisons (Holm)" in result.output
    assert "2 predictions are missing." in result.output
    assert "[bold]all" in result.output
    two = with_wide.invoke(app, ["compare", str(files[0] / "gqa.scores.json"), str(files[1] / "gqa.scores.json")])
    assert "Holm" not in two.output
    assert two.exit_code == 0


def test_different_questions_and_different_counting_are_refused(files, tmp_path):
    other = tmp_path / "gqa.scores.json"
    write_scores(other, scored("gqa", report(0.5, 0), "other", "another digest"))
    with pytest.raises(
        DataError, match=r"gqa\.scores\.json and .*different questions of 'gqa' \(q and another digest\)"
    ):
        compare(read_models([files[0], other]))
    made = report(0.5, 0)
    nats = replace(made.metrics["first"], value=quotient, unit="nats")
    write_scores(other, scored("gqa", Report({**made.metrics, "first": nats}, "accuracy", {}), "other", "q"))
    with pytest.raises(DataError, match="first of 'gqa' are counted in different ways"):
        compare(read_models([files[0], other]))
    # What one alone has is shown, without a difference.
    more = {**made.metrics, "more": made.metrics["first"]}
    write_scores(other, scored("gqa", Report(more, "accuracy", {}), "other", "q"))
    found = compare(read_models([files[0] / "gqa.scores.json", other]), all_metrics=True)
    assert [len(row["differences"]) for row in found["rows"]] == [1, 1, 0]
    assert found["notes"] == ["gqa: no more of small."]
    write_scores(other, scored("gqa", Report(made.metrics, "first", {}), "other", "q"))
    with pytest.raises(DataError, match="the headline of 'gqa'"):
        compare(read_models([files[0], other]))


def test_what_only_some_models_have_is_told(files, tmp_path):
    (files[1] / "gqa.scores.json").unlink()
    found = compare(read_models(files[:2]))
    assert "gqa: no scores of kd." in found["notes"]
    assert [len(row["differences"]) for row in found["rows"]] == [0, 1]
    (files[1] / "pope.scores.json").rename(tmp_path / "alone.scores.json")
    with pytest.raises(DataError, match=r"no other model has a benchmark of small \(small: gqa; kd: pope\)"):
        compare(read_models([files[0] / "gqa.scores.json", tmp_path / "alone.scores.json"]))
    with pytest.raises(DataError, match="at least 2 files or folders"):
        read_models(files[:1])


def test_the_models_of_a_run_are_compared(tmp_path):
    for name, right in (("before", [True, False, False]), ("student", [True, True, False])):
        answers = [
            {
                "place": f"record {n}",
                "image": f"/x/{n}.png",
                "kind": "k",
                "question": "?",
                "expected": "a",
                "answer": "",
                "right": one,
            }
            for n, one in enumerate(right)
        ]
        (tmp_path / f"evaluation-{name}.json").write_text(json.dumps({"answers": answers}))
    found = compare(read_models([tmp_path]))
    assert found["models"] == ["before", "student"]
    (difference,) = found["rows"][0]["differences"]
    assert difference["value"] == pytest.approx(100 / 3)
    # One question of three tells nothing.
    assert difference["p"] == 1
    again = compare(read_models([tmp_path / "evaluation-before.json", tmp_path]))
    assert again["rows"] == found["rows"]


def test_models_of_one_name_are_called_by_their_paths(files):
    with pytest.raises(DataError, match="one path is there twice"):
        read_models([files[0], files[0]])
    found = compare(read_models([files[0], files[0] / "gqa.scores.json"]))
    assert found["models"] == [str(files[0]), str(files[0] / "gqa.scores.json")]
    (difference,) = found["rows"][0]["differences"]
    assert difference["low"] < 0 == difference["value"] < difference["high"]
