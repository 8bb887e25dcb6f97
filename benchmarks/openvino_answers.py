"""Greedy answers of a model folder by transformers or OpenVINO, for benchmarks/openvino_export.py; imports nothing of ours."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def load(kind: str, folder: str) -> Any:
    """The model: by transformers, or as optimum exported it.

    Raises:
        SystemExit: transformers leaves weights at random numbers.
    """
    if kind == "openvino":
        exported = importlib.import_module("optimum.intel").OVModelForVisualCausalLM
        # By default a CPU may compute in lower precision than the exported weights have.
        return exported.from_pretrained(folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    model, told = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    if told["missing_keys"]:
        raise SystemExit(
            f"{folder}: {len(told['missing_keys'])} weights are missing, such as {min(told['missing_keys'])}"
        )
    return model


def main() -> None:
    """Answers the questions one by one and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("transformers", "openvino"))
    parser.add_argument("folder")
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    model, processor = load(options.kind, options.folder), AutoProcessor.from_pretrained(options.folder)
    answers = []
    for one in json.loads(options.questions.read_text(encoding="utf-8")):
        content = [{"type": "image"}, {"type": "text", "text": one["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=prompt, images=Image.open(one["image"]).convert("RGB"), return_tensors="pt")
        made = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(made, skip_special_tokens=True).strip())
    packages = ("torch", "transformers", "optimum", "optimum-intel", "openvino")
    versions = {name: importlib.metadata.version(name) for name in packages}
    options.out.write_text(json.dumps({"answers": answers, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main()
