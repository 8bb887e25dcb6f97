"""Recipes are read strictly, and every error of a file comes in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from align_ti.cli import shipped
from align_ti.config import Iva, Kd, Objective, OnPolicy, Recipe, Sft, Tpa, read_recipe
from align_ti.errors import AlignTIError, ConfigError, RunError
from align_ti.runs import RunFolder

SMALL = {"out": "runs/x", "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train": "d.json"}}


def written(folder: Path, content: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def refusal(folder: Path, content: object, changes: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_recipe(written(folder, content), changes or [])
    return str(caught.value)


def on_policy(**options: object) -> dict[str, object]:
    return {**SMALL, "data": {"train": "d.json", "on_policy": options}}


def test_a_small_recipe_has_the_documented_defaults(tmp_path):
    recipe = read_recipe(written(tmp_path, SMALL))
    assert recipe.objective == Objective(
        sft=Sft(weight=1.0),
        kd=Kd(weight=1.0, temperature=1.0),
        iva=Iva(weight=1.0, layer="auto"),
        tpa=Tpa(weight=1.0, candidates=4, temperature=1.0, top_k=None, top_p=None),
    )
    assert recipe.student.freeze == ("vision_tower",)
    assert recipe.data.on_policy is None
    chosen = read_recipe(written(tmp_path, SMALL), ["data.on_policy.temperature=0.9"]).data.on_policy
    assert chosen == OnPolicy(probability=0.5, max_new_tokens=128, temperature=0.9, top_k=None, top_p=None)


def test_every_error_comes_in_one_message_with_the_nearest_key(tmp_path):
    message = refusal(
        tmp_path,
        {
            **SMALL,
            "objective": {"tpa": {"candidates": 0, "wieght": 1}, "kd": {"temperature": "hot"}},
            "training": {"learning_rte": 1e-3, "bf16": "yes"},
            "student": {},
        },
    )
    for expected in (
        "objective.tpa.candidates is 0",
        "greater than or equal to 1",
        "objective.tpa.weight: 0 to leave the term out",
        "objective.tpa.wieght is no known option; did you mean 'weight'?",
        "objective.kd.temperature is 'hot'",
        "training.learning_rte is no known option; did you mean 'learning_rate'?",
        "training.bf16 is 'yes'",
        "student.path is missing",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("sft", "weight", -1),
        ("kd", "weight", float("nan")),
        ("kd", "weight", float("inf")),
        ("kd", "temperature", 0),
        ("iva", "layer", -1),
        ("iva", "layer", "best"),
        ("iva", "images", "each"),
        ("tpa", "candidates", 1.5),
        ("tpa", "candidates", True),
        ("tpa", "source", "students"),
        ("tpa", "top_k", 0),
        ("tpa", "top_p", 0),
        ("tpa", "top_p", 1.1),
        ("tpa", "temperature", -0.5),
        ("tpa", "form", "ribbon"),
        ("tpa", "left_out", ["a"]),
    ],
)
def test_a_value_out_of_range_names_option_and_value(tmp_path, section, key, value):
    message = refusal(tmp_path, {**SMALL, "objective": {section: {key: value}}})
    assert f"objective.{section}.{key}" in message.replace("left_out.0", "left_out")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "top level is list"),
        ("a: [", "not valid YAML"),
        ("out: x\nout: y", "given twice"),
        ({**SMALL, "extra": 1}, "extra is no known option"),
        ({**SMALL, "teacher": None}, "teacher is missing"),
        ({**SMALL, "seed": "0"}, "seed is '0'"),
        ({**SMALL, "seed": 2**32}, "seed is 4294967296"),
        ({**SMALL, "student": {"path": ""}}, "student.path"),
        ({**SMALL, "training": {"max_steps": 0}}, "max_steps"),
        ({**SMALL, "training": {"bf16": True, "fp16": True}}, "bf16 and fp16"),
        ({**SMALL, "student": {"path": "s", "freeze": ["tower"]}}, "student.freeze"),
        ({**SMALL, "training": {"max_steps": -2}}, "training.max_steps is -2"),
        ({**SMALL, "objective": {t: {"weight": 0} for t in ("sft", "kd", "iva", "tpa")}}, "every weight is 0"),
        ({k: v for k, v in SMALL.items() if k != "out"}, "out is missing"),
        (on_policy(probability=0.0), "data.on_policy.probability is 0"),
        (on_policy(probability=1.5), "data.on_policy.probability is 1.5"),
        (on_policy(temperature=0.0), "data.on_policy.temperature is 0"),
        (on_policy(max_new_tokens=0), "data.on_policy.max_new_tokens is 0"),
        (on_policy(top_p=1.1), "data.on_policy.top_p is 1.1"),
        (on_policy(tempreature=1.0), "data.on_policy.tempreature is no known option; did you mean 'temperature'?"),
        (
            {**on_policy(), "objective": {t: {"weight": 0.0} for t in ("kd", "iva", "tpa")}},
            "data.on_policy is given, but no term with weight compares with a teacher",
        ),
    ],
)
def test_a_broken_recipe_is_refused_with_file_and_reason(tmp_path, content, expected):
    message = refusal(tmp_path, content)
    assert expected in message
    assert "recipe.yaml" in message


def test_a_missing_recipe_names_the_list(tmp_path):
    with pytest.raises(ConfigError, match="recipes list"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path)


def test_changes_are_laid_over_the_file(tmp_path):
    path = written(tmp_path, SMALL)
    recipe = read_recipe(path, ["objective.tpa.candidates=2", "training.learning_rate=2e-5", "data.cache=true"])
    assert recipe.objective.tpa.candidates == 2
    assert recipe.training.learning_rate == 2e-5
    assert recipe.data.cache
    for wrong in ("candidates", "=3", "out.deep=3", "seed=[", "objective.tpa.candidats=2"):
        with pytest.raises(ConfigError):
            read_recipe(path, [wrong])


@pytest.mark.parametrize("text", ["2e-5", "1E3", "5.e-4", "-1e-2", "1e+5"])
def test_scientific_notation_is_a_number(tmp_path, text):
    path = written(tmp_path, yaml.safe_dump(SMALL) + f"training:\n  weight_decay: {text}\n")
    if text.startswith("-"):
        with pytest.raises(ConfigError, match=r"weight_decay is -0\.01"):
            read_recipe(path)
    else:
        assert read_recipe(path).training.weight_decay == float(text)


def test_options_are_frozen_and_checked_in_python_too():
    with pytest.raises(ConfigError, match=r"objective\.tpa\.candidates is 0"):
        Tpa(candidates=0)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        Kd(temprature=2.0)
    with pytest.raises(Exception, match="frozen"):
        Kd().weight = 2.0
    with pytest.raises(TypeError):
        Kd(1.0)


@given(weight=st.floats(0, 10), count=st.integers(1, 64), layer=st.one_of(st.just("auto"), st.integers(0, 80)))
def test_a_recipe_survives_being_written_and_read(weight, count, layer):
    recipe = Recipe.model_validate(
        {
            **SMALL,
            "objective": {
                "sft": {"weight": 1.0},
                "kd": {"weight": weight},
                "iva": {"layer": layer},
                "tpa": {"candidates": count},
            },
        }
    )
    again = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert Recipe.model_validate(again) == recipe


def test_shipped_recipes_are_valid(tmp_path):
    assert shipped()
    for text in shipped().values():
        assert isinstance(read_recipe(written(tmp_path, text)), Recipe)
        assert text.startswith("# ")


def test_every_option_is_documented_under_its_field():
    def walk(declared):
        for name, field in declared.model_fields.items():
            inner = [
                t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(t, "model_fields")
            ]
            if inner:
                walk(inner[0])
            else:
                assert field.description, f"{declared.__name__}.{name}"

    walk(Recipe)


def test_errors_are_one_tree():
    import align_ti.errors as errors

    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, AlignTIError)


def test_a_run_from_before_an_option_existed_goes_on_and_a_changed_one_does_not(tmp_path):
    # A recipe that was kept before an option existed was refused as one "with other settings ()".
    recipe = Recipe.model_validate({**SMALL, "out": str(tmp_path / "run")})
    run = RunFolder(tmp_path / "run")
    run.claim(recipe)
    run.append_metrics({"step": 1, "loss": 1.0})
    kept = yaml.safe_load(run.recipe.read_text())
    del kept["extensions"], kept["data"]["on_policy"], kept["objective"]["kd"]["divergence"]
    run.recipe.write_text(yaml.safe_dump(kept))
    assert run.claim(recipe)
    other = recipe.model_copy(update={"seed": 5})
    with pytest.raises(RunError, match=r"other settings \(seed\)"):
        run.claim(other)
