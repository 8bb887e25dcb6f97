"""What `pip install align-ti` puts on a machine, and that it works there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from align_ti import __version__

ROOT = Path(__file__).parent.parent


SMALL_DEMO = """
from pathlib import Path

from align_ti.demo import TRAINING, run_demo
from align_ti.digits.files import Sizes

training = TRAINING.model_copy(update={"max_steps": 2, "per_device_train_batch_size": 4})
run_demo(Path("demo"), sizes=Sizes(train=4, validation=1, test=1), training=training)
"""
"""`align-ti demo` with few images and steps."""


def done(*command: str | Path, **options: object) -> str:
    """What a command prints; it has to succeed."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it alone."""
    out = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (source,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, wheel


def test_the_wheel_contains_everything_it_needs(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        names = set(archive.namelist())
        entry = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    source = ROOT / "src"
    tracked = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert tracked <= names
    for needed in (
        "align_ti/py.typed",
        "align_ti/recipes/digits.yaml",
        "align_ti/report/page.html.j2",
        "align_ti/report/page.js",
        "align_ti/report/style.css",
        "align_ti/report/progress.html.j2",
        "align_ti/digits/assets/teacher/model.safetensors",
        "align_ti/digits/assets/student/chat_template.jinja",
    ):
        assert needed in names
    assert "align-ti = align_ti.cli:main" in entry
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    assert f"\nVersion: {__version__}\n" in metadata
    assert {line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Provides-Extra")} == {
        "deepspeed",
        "dev",
        "docs",
        "lmms-eval",
    }


def test_the_source_archive_has_what_its_tests_read(archives):
    # The archive had tests, but neither the site's settings nor the benchmarks and results that they read.
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"} <= names
    assert {"pyproject.toml", "requirements/constraints.txt", "results/quality/ablation/study.json"} <= names
    for part in ("src", "tests", "benchmarks", "website", "docs", "examples"):
        there = [path for path in (ROOT / part).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {str(path.relative_to(ROOT)) for path in there} <= names
    assert not any(name.startswith(("runs/", "build/", ".venv/")) or "/records/" in name for name in names)


def test_what_the_code_imports_comes_with_it():
    # The tests run beside the packages of the extras, which hide a requirement that is missing.
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else name.name).partition(".")[0]
        for path in (ROOT / "src").rglob("*.py")
        if not path.name.startswith("lmms")  # the extra lmms-eval
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0)
        for name in node.names
    } - {"align_ti", *sys.stdlib_module_names}
    declared = set(plain_requirements("align-ti"))
    brought = declared.union(*(plain_requirements(name) for name in declared))
    of = metadata.packages_distributions()
    missing = {module for module in modules if not {canonicalize_name(name) for name in of[module]} & brought}
    assert {"torch", "yaml", "PIL"} <= modules and not missing


def plain_requirements(name: str) -> set[str]:
    """What a distribution needs whatever extras are asked for."""
    found = map(Requirement, metadata.requires(name) or ())
    return {canonicalize_name(one.name) for one in found if one.marker is None or one.marker.evaluate({"extra": ""})}


def test_the_installed_wheel_runs(archives, tmp_path):
    # Its dependencies are those of the environment that tests run in; downloading them again would take minutes.
    site = tmp_path / "site"
    install = ("install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-compile")
    done(sys.executable, "-m", "pip", *install, "--target", site, archives[1])
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "120"}
    command = (sys.executable, site / "bin" / "align-ti")
    assert done(*command, "--version", env=environment, cwd=tmp_path) == f"align-ti {__version__}\n"
    told = done(*command, "demo", "--help", env=environment, cwd=tmp_path)
    assert "with three methods" in " ".join(told.split())
    (tmp_path / "small.py").write_text(SMALL_DEMO, encoding="utf-8")
    done(sys.executable, "small.py", env=environment, cwd=tmp_path)
    assert (tmp_path / "demo" / "report.html").exists() and (tmp_path / "demo" / "summary.json").exists()
    where = "import align_ti, importlib.metadata as m; print(align_ti.__file__, m.version('align-ti'))"
    file, version = done(sys.executable, "-c", where, env=environment, cwd=tmp_path).split()
    assert Path(file).is_relative_to(site) and version == __version__
