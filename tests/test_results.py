"""Scores in a file: written, read back exactly, and refused where they are not what they say."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from align_ti.errors import DataError
from align_ti.evaluation import metrics as shared
from align_ti.evaluation.benchmarks.base import Report
from align_ti.evaluation.metrics import Metric, mean_of, ratio
from align_ti.evaluation.results import name_of, named_function, read_scores, scored, write_scores
from align_ti.evaluation.statistics import interval


def report(values=(1, 0, 1, 1, 0.3), clusters=("a", "a", "b", "c", "é\n")) -> Report:
    metrics = {"accuracy": mean_of(values, clusters), "part": mean_of(values[1:], clusters[1:])}
    return Report(metrics, "accuracy", {str(index): value for index, value in enumerate(values)}, ("1 is missing.",))


def test_scores_come_back_as_they_were(tmp_path):
    made = report()
    write_scores(tmp_path / "pope.scores.json", scored("pope", made, "student", "abc", title="POPE"))
    found = read_scores(tmp_path / "pope.scores.json")["pope"]
    assert (found.title, found.headline, found.model, found.questions) == ("POPE", "accuracy", "student", "abc")
    assert found.notes == ("1 is missing.",)
    assert list(found.metrics) == ["accuracy", "part"]
    for name, metric in made.metrics.items():
        again = found.metrics[name]
        assert again.clusters == metric.clusters
        assert again.unit == "%"
        assert np.array_equal(again.sums, metric.sums)
        assert again.value is ratio
        assert interval(again) == interval(metric)
    told = json.loads((tmp_path / "pope.scores.json").read_text())["metrics"]["accuracy"]
    assert {"value", "low", "high"} <= told.keys()
    assert told["value"] == pytest.approx(66.0)


def test_a_file_is_small(tmp_path):
    values = [float(number % 3 == 0) for number in range(10_000)]
    made = Report({str(n): mean_of(values, range(10_000)) for n in range(3)}, "0", {}, ())
    write_scores(tmp_path / "scores.json", scored("gqa", made, "m", "q"))
    assert (tmp_path / "scores.json").stat().st_size < 10_000 * (12 + 3 * 8)


@settings(max_examples=30, deadline=None)
@given(of_numpy.arrays(float, (4, 2), elements=st.floats(0, 1e6)))
def test_sums_keep_every_bit(tmp_path_factory, sums):
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    sums[:, 1] += 1
    metric = Metric(sums, ratio, tuple("abcd"), "nats")
    write_scores(path, scored("own", Report({"one": metric}, "one", {}, ()), "m", "q"))
    found = read_scores(path)["own"].metrics["one"]
    assert np.array_equal(found.sums, sums)
    assert found.unit == "nats"


def scaled(times, sums):
    return times * sums[..., 0]


def test_functions_are_named_with_what_they_are_bound_to(monkeypatch):
    monkeypatch.setattr(shared, "scaled", scaled, raising=False)
    monkeypatch.setattr(scaled, "__module__", "align_ti.evaluation.metrics")
    assert name_of(partial(scaled, 3)) == ["align_ti.evaluation.metrics:scaled", 3]
    assert named_function("align_ti.evaluation.metrics:scaled", 1) is scaled
    assert named_function("align_ti.evaluation.metrics:scaled", 0) is None
    assert name_of(ratio) == ["align_ti.evaluation.metrics:ratio"]
    for wrong in (lambda sums: sums[..., 0], partial(scaled, [1]), partial(scaled, times=3), np.sum):
        with pytest.raises(ValueError, match="last argument `sums`"):
            name_of(wrong)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "align_ti.evaluation.metrics:mean_of",
        "align_ti.evaluation.metrics:dataclass",
        "align_ti.evaluation.metrics:np",
        "align_ti.evaluation.runner:answer",
        "align_ti.evaluation.benchmarks..runs:sums",
        "align_ti.evaluation.benchmarks.nowhere:f",
        "align_ti.evaluation.metrics:ratio:x",
    ],
)
def test_a_file_can_name_nothing_but_functions_of_sums(name, tmp_path):
    assert named_function(name, 0) is None
    content = scored("pope", report(), "m", "q")
    content["metrics"]["accuracy"]["function"] = [name]
    write_scores(tmp_path / "scores.json", content)
    with pytest.raises(DataError, match="is not known"):
        read_scores(tmp_path)


def damaged(**changes):
    content = scored("pope", report(), "m", "q")
    for path, value in changes.items():
        *steps, last = path.split("__")
        part = content
        for step in steps:
            part = part[step]
        part[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ("[" * 99999, "not valid JSON"),
        ("1" * 4999, "not valid JSON"),
        ("[]", "found 'list'"),
        ('{"accuracy": 1}', "found None where a file of scores says 'align-ti scores 1'"),
        (damaged(format="align-ti scores 0"), "align-ti scores 0"),
        (damaged(headline="f1"), "headline 'f1' is none of the metrics accuracy, part"),
        (damaged(metrics__accuracy__value=3), "accuracy is 3, but its sums give 66"),
        (damaged(metrics__accuracy__sums=[[1, 1]]), r"sums of shape \(1, 2\) for 4 clusters"),
        (damaged(metrics__accuracy__cluster_list=9), "list index out of range"),
        (damaged(metrics__accuracy={}), "'function' is missing"),
        (damaged(cluster_lists=[["a", "a", "b", "c"], ["a", "b", "c", "d"]]), "for 3 clusters"),
        ('{"answers": []}', "no answers"),
        ('{"answers": [{"question": "Q?"}]}', "answer 0: no `question` and `right`"),
    ],
)
def test_a_damaged_file_is_refused(content, told, tmp_path):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(DataError, match=told) as caught:
        read_scores(tmp_path / "scores.json")
    assert "scores.json" in str(caught.value)


def test_a_folder_holds_a_file_for_each_benchmark(tmp_path):
    for name in ("pope", "gqa"):
        write_scores(tmp_path / name / "scores.json", scored(name, report(), "m", "q"))
    (tmp_path / "layer_scores.json").write_text("{}")
    assert set(read_scores(tmp_path)) == {"pope", "gqa"}
    write_scores(tmp_path / "again.scores.json", scored("pope", report(), "m", "q"))
    with pytest.raises(DataError, match="are both scores on 'pope'"):
        read_scores(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no scores found"):
        read_scores(tmp_path / "empty")
    with pytest.raises(DataError, match="cannot be read"):
        read_scores(tmp_path / "missing.scores.json")
    with pytest.raises(ValueError, match=r"ends in `\.scores\.json`"):
        write_scores(tmp_path / "pope.json", scored("pope", report(), "m", "q"))


def answers(folder, *rights, kinds=("x", "y", "x")):
    return [
        {"place": f"{folder}/f.json, record {n}", "image": image and f"{folder}/{image}", "kind": kind}
        | {"question": f"{n}?", "expected": "e", "answer": "a", "right": right}
        for n, (image, kind, right) in enumerate(zip(("a/1.png", "b/1.png", None), kinds, rights, strict=True))
    ]


def test_the_answers_of_a_run_are_scores(tmp_path):
    for folder, rights in (("/one", (True, False, True)), ("/other/data", (False, False, True))):
        run = tmp_path / folder[1:]
        run.mkdir(parents=True)
        (run / "evaluation-student.json").write_text(json.dumps({"answers": answers(folder, *rights)}))
    one, other = (read_scores(tmp_path / name)["exact match"] for name in ("one", "other/data"))
    # The same questions, though the images lie elsewhere.
    assert one.questions == other.questions
    assert one.metrics["overall"].clusters == other.metrics["overall"].clusters == ("a/1.png", "b/1.png", "record 2")
    assert [metric.score for metric in one.metrics.values()] == [pytest.approx(200 / 3), 100, 0]
    assert one.model == "student"
    (tmp_path / "changed.json").write_text(
        json.dumps({"answers": answers("/one", True, True, True, kinds=("x", "x", "x"))})
    )
    assert read_scores(tmp_path / "changed.json")["exact match"].questions != one.questions
