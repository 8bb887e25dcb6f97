"""Imports point down only; torch and transformers stay where they belong; the README tells the truth."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "align_ti"

ALLOWED = {
    "allocator": set(),
    "errors": set(),
    "options": {"errors"},
    "registry": {"errors"},
    "losses": {"options", "registry"},
    "flops": set(),
    "phases": set(),
    "notebooks": set(),
    "processes": set(),
    "config": {"options", "registry", "errors"},
    "runs": {"config", "errors"},
    "data": {"config", "notebooks", "errors"},
    "models": {"phases", "errors"},
    "digits": {"models", "runs", "errors"},
    "checkpoints": {"config", "data", "models", "runs", "errors"},
    "interactions": {"data", "models", "options", "errors"},
    "terms": {"data", "interactions", "losses", "models", "options", "errors"},
    "evaluation": {"config", "data", "losses", "models", "runs", "errors"},
    "training": {
        "allocator",
        "config",
        "data",
        "flops",
        "interactions",
        "losses",
        "models",
        "notebooks",
        "phases",
        "runs",
        "terms",
        "errors",
    },
    "report": {"evaluation", "phases", "runs", "errors"},
    "preflight": {
        "allocator",
        "config",
        "data",
        "interactions",
        "losses",
        "models",
        "report",
        "runs",
        "terms",
        "training",
        "errors",
    },
    "planning": {
        "config",
        "data",
        "flops",
        "losses",
        "models",
        "notebooks",
        "phases",
        "terms",
        "training",
        "errors",
    },
    "pipeline": {
        "config",
        "data",
        "evaluation",
        "interactions",
        "losses",
        "models",
        "phases",
        "preflight",
        "processes",
        "report",
        "runs",
        "terms",
        "training",
        "errors",
    },
    "studies": {"config", "evaluation", "flops", "options", "pipeline", "runs", "errors"},
    "parallel": {"processes", "errors"},
    "demo": {"config", "data", "digits", "models", "parallel", "phases", "pipeline", "report", "runs", "errors"},
    "cli": {
        "checkpoints",
        "config",
        "data",
        "demo",
        "digits",
        "evaluation",
        "phases",
        "pipeline",
        "planning",
        "preflight",
        "processes",
        "registry",
        "report",
        "runs",
        "studies",
        "errors",
    },
    "testing": {"config", "losses", "registry", "terms", "training", "errors"},
}
"""What each part may import of ours: the table of docs/architecture.md."""

WITHOUT = {
    "torch": {
        "allocator",
        "errors",
        "options",
        "registry",
        "config",
        "runs",
        "report",
        "processes",
        "cli",
        "notebooks",
    },
    "transformers": {"allocator", "errors", "options", "registry", "config", "runs", "report", "losses", "notebooks"},
}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.name not in {"__init__.py", "__main__.py"})


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of everything that the file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_follow_the_table(path):
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("align_ti.")}
    assert ours - {part(path)} <= ALLOWED[part(path)]
    outside = {name.partition(".")[0] for name in imported(path, top_level_only=part(path) == "cli")}
    for library, parts in WITHOUT.items():
        if part(path) in parts:
            assert library not in outside


def test_the_table_has_every_part_and_no_cycle():
    assert {part(path) for path in modules()} == set(ALLOWED)
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, needs in ALLOWED.items() if needs <= done} - done
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready


def test_modules_do_not_import_each_other_in_circles():
    graph = {}
    for path in modules():
        name = "align_ti." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        graph[name] = {found.rpartition(".")[0] for found in imported(path)} | imported(path)
    graph = {name: needs & graph.keys() - {name} for name, needs in graph.items()}
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


def test_every_argument_and_result_is_annotated_and_no_option_is_swallowed():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in {"self", "cls", "ctx"}]
            assert not bare, f"{path}:{node.lineno} {node.name}: {bare}"
            assert node.returns is not None, f"{path}:{node.lineno} {node.name}"
            if part(path) in {"losses", "interactions", "terms"}:
                assert node.args.kwarg is None


def test_every_module_class_and_public_function_has_a_docstring():
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.read_text(encoding="utf-8").strip():
            assert ast.get_docstring(tree), path
        for node in tree.body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and node.name != "main"
            ):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name}"


def test_no_pickle_and_no_remote_code():
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert not {"pickle", "dill", "cloudpickle", "joblib"} & {name.partition(".")[0] for name in imported(path)}
        assert "trust_remote_code=True" not in text
        assert "torch.load(" not in text and "torch.save(" not in text


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_and_the_readme_name_only_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"```text\n(align-ti/.*?)```", page, re.DOTALL)
    stack: list[str] = []
    named = 0
    for line in tree.splitlines()[1:]:
        match = re.match(r"^([│ ├└─]*)(\S+)", line)
        assert match, line
        depth = len(match[1]) // 4
        stack = [*stack[: depth - 1], match[2]]
        assert (ROOT / "/".join(stack)).exists(), "/".join(stack)
        named += 1
    assert named > 20
    for link in re.findall(r"\]\(([^)#]+)\)", readme()):
        if "://" not in link:
            assert (ROOT / link).exists(), link


def test_the_readme_names_only_commands_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", readme(), re.MULTILINE)) <= targets
    from align_ti.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands} | {"recipes"}
    used = set(re.findall(r"^align-ti ([a-z-]+)", readme(), re.MULTILINE))
    assert used
    assert used <= verbs


def test_the_documentation_names_only_functions_that_exist():
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for module, name in re.findall(r"`align_ti\.([a-z_.]+)\.([A-Za-z_]+)`", path.read_text(encoding="utf-8")):
            file = SOURCE / (module.replace(".", "/") + ".py")
            assert file.exists(), f"{path.name}: {module}"
            assert re.search(rf"(def|class) {name}\b|^{name}\b", file.read_text(), re.MULTILINE), (
                f"{path.name}: {module}.{name}"
            )


def test_ci_calls_the_targets_that_the_readme_names():
    script = (ROOT / ".ci" / "run").read_text()
    for target in ("check", "test", "demo"):
        assert f"make {target}" in script
        assert f"make {target}" in readme()
