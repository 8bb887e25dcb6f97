"""Which families vLLM, SGLang, llama.cpp's converter and optimum list, read from their published packages without installing; as JSON.

    .venv/bin/python -m pip download --no-deps --dest build/wheels vllm==0.33.0 sglang==0.5.23 optimum-intel==2.2.0 optimum-onnx==0.1.0
    .venv/bin/python -m pip download --no-deps --no-binary llama-cpp-python --dest build/wheels llama-cpp-python==0.3.36
    .venv/bin/python -m benchmarks.registries --packages build/wheels --out results/registries.json --page docs/deployment.md

What is listed was not run by this command; both servers need a GPU. What is read is source, parsed and never imported: vLLM's
dictionaries of names, SGLang's `EntryClass`, llama.cpp's `ModelBase.register`, and what optimum's exporters register for the task
image-text-to-text.
"""

from __future__ import annotations

import argparse
import ast
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

from align_ti.runs import provenance, write_json

FAMILIES = (
    "llava",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "smolvlm",
    "idefics3",
    "internvl",
    "gemma3",
    "gemma4",
    "paligemma",
)
"""transformers' names of the families of docs/families.md; a student's folder names its class under `architectures`."""

PARTS = (
    "SiglipVisionModel",
    "CLIPVisionModel",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "GraniteForCausalLM",
    "Gemma2ForCausalLM",
)
"""What LLaVA students are made of."""

START, STOP = "<!-- registries: start -->", "<!-- registries: stop -->"
"""Around the table in docs/deployment.md."""

TITLES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama_cpp_python": "llama.cpp's converter",
    "optimum_intel": "optimum-intel (OpenVINO)",
    "optimum_onnx": "optimum-onnx",
}

Files = Callable[[str], Iterator[tuple[str, str]]]
"""The files of a package whose path matches an expression, with their text."""


def files_of(package: Path) -> Files:
    """Reads a wheel or a source distribution."""

    def read(pattern: str) -> Iterator[tuple[str, str]]:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as archive:
                for name in archive.namelist():
                    if re.search(pattern, name):
                        yield name, archive.read(name).decode("utf-8")
            return
        with tarfile.open(package) as archive:
            for member in archive:
                file = archive.extractfile(member) if re.search(pattern, member.name) else None
                if file is not None:
                    yield member.name, file.read().decode("utf-8")

    return read


def vllm_names(files: Files) -> dict[str, set[str]]:
    """The architectures by vLLM's name of their kind."""
    ((_, text),) = files(r"vllm/model_executor/models/registry\.py$")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign):
            targets, value = [node.target], node.value
        elif isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        else:
            continue
        kind = re.fullmatch(r"_([A-Z_]+)_MODELS", ast.unparse(targets[0]))
        # These two list what is not there any more, or is in another package.
        if kind and isinstance(value, ast.Dict) and kind[1] not in {"PREVIOUSLY_SUPPORTED", "OOT_SUPPORTED"}:
            names = {key.value for key in value.keys if isinstance(key, ast.Constant)}
            found[kind[1].lower().replace("_", " ")] = {str(name) for name in names}
    return {kind: names for kind, names in found.items() if kind != "vllm"}


def vllm_towers(files: Files) -> list[str]:
    """The configs of vision towers that vLLM's LLaVA accepts."""
    ((_, text),) = files(r"vllm/model_executor/models/llava\.py$")
    return sorted(
        {
            ast.unparse(node.args[1])
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) == "isinstance"
            and ast.unparse(node.args[0]) == "vision_config"
        }
    )


def sglang_names(files: Files) -> dict[str, set[str]]:
    """The architectures that SGLang registers."""
    names: set[str] = set()
    for _, text in files(r"sglang/srt/models/\w+\.py$"):
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
                entries = node.value.elts if isinstance(node.value, (ast.List, ast.Tuple)) else [node.value]
                names |= {ast.unparse(entry) for entry in entries}
    return {"registered": names}


def llama_cpp_names(files: Files) -> dict[str, set[str]]:
    """The architectures that llama.cpp converts: as language models, and as towers with projectors (`--mmproj`)."""
    kinds: dict[str, set[str]] = {"language model": set(), "tower and projector": set()}
    bases: dict[str, list[str]] = {}
    registered: dict[str, set[str]] = {}
    for _, text in files(r"vendor/llama\.cpp/conversion/\w+\.py$"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base) for base in node.bases]
                for call in node.decorator_list:
                    if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("ModelBase.register"):
                        names = {arg.value for arg in call.args if isinstance(arg, ast.Constant)}
                        registered.setdefault(node.name, set()).update(map(str, names))

    def is_tower(name: str) -> bool:
        return name == "MmprojModel" or any(is_tower(base) for base in bases.get(name, []))

    for name, names in registered.items():
        kinds["tower and projector" if is_tower(name) else "language model"] |= names
    return kinds


def optimum_names(files: Files) -> dict[str, set[str]]:
    """The model types that one of optimum's exporters takes with images."""
    types: set[str] = set()
    for _, text in files(r"^optimum/exporters/\w+/model_configs\.py$"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and re.match(r"register_(in_)?tasks_manager", ast.unparse(node.func)):
                words = [part.value for arg in node.args for part in ast.walk(arg) if isinstance(part, ast.Constant)]
                types |= {str(words[0])} if "image-text-to-text" in words else set()
    return {"image-text-to-text": types}


def listed(names: dict[str, set[str]], architecture: str) -> list[str]:
    """The kinds under which an architecture is listed."""
    return sorted(kind for kind, found in names.items() if architecture in found)


def needs(files: Files) -> list[str]:
    """What the package requires of torch and transformers."""
    ((_, text),) = files(r"^[^/]+/(METADATA|PKG-INFO)$")
    return sorted(re.findall(r"^Requires-Dist: ((?:torch|transformers)(?![\w-])[^;\n]*)$", text, re.MULTILINE))


def table(result: dict[str, Any]) -> str:
    """The families and where they are listed, as Markdown."""
    packages = result["packages"]
    heads = [f"{TITLES[name]} {packages[name]['version']}" for name in packages]
    lines = [f"| family | class | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for family, entry in result["families"].items():
        cells = [", ".join(entry[name]) or "no" for name in packages]
        lines.append(f"| {family} | `{entry['architecture']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, result: dict[str, Any]) -> str:
    """The page with the table in its place."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{table(result)}\n\n{STOP}{rest.split(STOP)[1]}"


BY_CLASS = {"vllm": vllm_names, "sglang": sglang_names, "llama_cpp_python": llama_cpp_names}
BY_TYPE = {"optimum_intel": optimum_names, "optimum_onnx": optimum_names}
"""How each package is read, by whether it lists classes or model types."""


def main() -> None:
    """Reads the packages and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="the folder with the downloaded packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="also write the table into this page")
    options = parser.parse_args()
    classes = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    asked = {name: classes[name] for name in FAMILIES}
    result: dict[str, Any] = {"packages": {}, "families": {}, "parts": {}}
    for name, reader in {**BY_CLASS, **BY_TYPE}.items():
        found = sorted(options.packages.glob(f"{name}-*"))
        if len(found) != 1:
            raise SystemExit(
                f"{options.packages} holds {len(found)} packages of {name}; 1 is accepted; download it as --help says."
            )
        files = files_of(found[0])
        names = reader(files)
        result["packages"][name] = {
            "version": found[0].name.split("-")[1].removesuffix(".tar.gz"),
            "needs": needs(files),
        }
        for family, architecture in asked.items():
            entry = result["families"].setdefault(family, {"architecture": architecture})
            entry[name] = listed(names, architecture if name in BY_CLASS else family)
        for part in PARTS if name in BY_CLASS else ():
            result["parts"].setdefault(part, {})[name] = listed(names, part)
        if name == "vllm":
            result["packages"][name]["towers of llava"] = vllm_towers(files)
    write_json(options.out, {**result, "provenance": provenance()})
    if options.page is not None:
        options.page.write_text(page(options.page.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
