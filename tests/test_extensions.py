"""Divergences and terms of a user's own file: registered, allowed, refused, trained; and docs/extending.md, executed."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import yaml

from align_ti import Objective, read_recipe, registry
from align_ti.errors import ConfigError, RunError
from align_ti.pipeline.checking import check_recipe
from align_ti.pipeline.training import distil
from align_ti.runs import RunFolder, read_json
from align_ti.testing import check_divergence, check_term
from tests import small

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTERED", {"divergence": {}, "term": {}})


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def extension(tmp_path) -> Path:
    """The page's own file: a divergence and a term."""
    path = tmp_path / "mine.py"
    path.write_text("\n\n".join(code for code in snippets("python") if "@register" in code))
    return path


def test_the_page_keeps_its_promise_of_length():
    divergence, term = (code for code in snippets("python") if "@register" in code)
    assert len([line for line in divergence.splitlines() if line.strip()]) <= 20
    assert len([line for line in term.splitlines() if line.strip()]) <= 40


def test_the_pages_own_divergence_and_term_keep_the_rules(extension):
    assert set(registry.load_extension(extension)) == {"hellinger", "visual_cosine"}
    checked = [code for code in snippets("python") if "check_divergence(" in code]
    assert len(checked) == 1
    exec(compile(checked[0], "docs/extending.md", "exec"), {})
    check_divergence("hellinger", lambda p, q: float((p.sqrt() - q.sqrt()).square().sum() / 2))
    check_term(Objective.only(visual_cosine={"layer": 0}).terms["visual_cosine"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    return path


def written(folder: Path, out: Path, extension: Path, **sections) -> Path:
    content = small.recipe(folder, out=str(out), extensions=[str(extension)], **sections)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


OBJECTIVE = {
    "iva": {"weight": 0.0},
    "kd": {"divergence": "hellinger"},
    "visual_cosine": {"weight": 0.5, "layer": 1},
}


def test_a_recipe_alone_runs_no_code(folder, tmp_path, extension):
    marker = tmp_path / "ran"
    extension.write_text(f"open({str(marker)!r}, 'w').close()\n" + extension.read_text())
    recipe = written(folder, tmp_path / "run", extension, objective=OBJECTIVE)
    with pytest.raises(ConfigError, match="--allow-extensions") as caught:
        read_recipe(recipe)
    assert str(extension) in str(caught.value)
    assert not marker.exists()
    read_recipe(recipe, allow_extensions=True)
    assert marker.exists()


def test_a_term_of_ones_own_is_checked_trained_logged_and_carded(folder, tmp_path, extension):
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "phases": True}
    recipe = written(
        folder,
        tmp_path / "run",
        extension,
        objective=OBJECTIVE,
        training={**small.recipe(folder)["training"], **settings},
    )
    read = read_recipe(recipe, allow_extensions=True)
    verdicts = {verdict.name: verdict for verdict in check_recipe(read).verdicts}
    assert {"term.visual_cosine", "fused.visual_cosine", "fused.kd"} <= verdicts.keys()
    assert verdicts["term.visual_cosine"].state == "pass"
    # The page's term brings no plain twin, so the check says that it compared nothing; kd has one whatever its divergence.
    assert verdicts["fused.visual_cosine"].state == "warn"
    assert verdicts["fused.kd"].state == "pass"
    run = distil(read)
    lines = run.read_metrics()
    assert all(line["visual_cosine"] > 0 and line["visual_cosine_weight"] == 0.5 for line in lines)
    assert "| visual_cosine | 0.5 |" in (run.student / "README.md").read_text()
    assert read_json(run.phases)["phases"].keys() >= {"divergence", "backward"}
    assert read_json(run.provenance)["extensions"].keys() == {str(extension)}


def test_a_run_does_not_go_on_with_a_file_that_has_changed(folder, tmp_path, extension):
    recipe = read_recipe(written(folder, tmp_path / "run", extension, objective=OBJECTIVE), allow_extensions=True)
    run = RunFolder(Path(recipe.out))
    run.claim(recipe)
    run.append_metrics({"step": 1, "loss": 1.0})
    assert run.claim(recipe)
    extension.write_text(extension.read_text() + "\n# another\n")
    with pytest.raises(RunError, match="have changed since this run began"):
        run.claim(recipe)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("x = 1", "it registers nothing; put @align_ti.register above"),
        ("1 / 0", "running it stopped with ZeroDivisionError"),
        ("import align_ti\n@align_ti.register\nclass Mine: name = 'mine'", "Mine is neither a divergence nor a term"),
        (
            "import align_ti\n@align_ti.register\nclass Mine(align_ti.Term): name = 'kd'",
            "there is a term named 'kd' already",
        ),
        (
            "import align_ti\n@align_ti.register\nclass Mine(align_ti.Term): pass",
            "Mine.name is None; accepted: small letters",
        ),
        (
            "import align_ti\n@align_ti.register\nclass Mine(align_ti.Divergence): name = 'Not a name'",
            "Mine.name is 'Not a name'; accepted: small letters",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, code, sentence):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(code))
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        registry.load_extension(path)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        registry.load_extension(tmp_path / "nothing.py")


def test_a_file_may_be_loaded_again(extension):
    first = registry.load_extension(extension)
    assert registry.load_extension(extension) == first


def test_names_of_registered_terms_are_suggested(extension):
    registry.load_extension(extension)
    with pytest.raises(ConfigError, match="did you mean 'visual_cosine'"):
        Objective(visual_cosin={})
    with pytest.raises(ConfigError, match="did you mean 'hellinger'"):
        Objective(kd={"divergence": "helinger"})
