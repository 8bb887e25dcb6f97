"""The shipped models in OpenVINO: exported by optimum-intel, asked the benchmark's questions, compared with transformers; as JSON.

    python -m venv build/openvino
    build/openvino/bin/python -m pip install torch==2.13.0
    build/openvino/bin/python -m pip install -c requirements/openvino.txt -r requirements/openvino.txt
    .venv/bin/python -m benchmarks.openvino_export --python build/openvino/bin/python --out results/openvino.json

The folder is saved as a finished student is (`align_ti.models.saving`); the export's environment has an older transformers, whose own
answers are compared too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from align_ti.cli import quiet
from align_ti.config import Evaluation
from align_ti.data.sources import read_conversations
from align_ti.digits.files import Sizes, write_benchmark
from align_ti.evaluation.runner import evaluate
from align_ti.evaluation.scoring import is_right
from align_ti.models.loading import load_model, load_processor
from align_ti.models.saving import save_model
from align_ti.runs import provenance, write_json

ANSWERS = Path(__file__).with_name("openvino_answers.py")
EXPORT = ("-m", "optimum.commands.optimum_cli", "export", "openvino", "--task", "image-text-to-text")


def inside(python: Path, *command: str) -> str:
    """Runs a command in the export's environment and returns what it said.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [str(python.absolute()), *command], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed (exit {done.returncode}):\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def compared(name: str, data: Path, python: Path, folder: Path, questions: int) -> dict[str, Any]:
    """A shipped model in both, on the first questions of the test split."""
    model, processor = load_model(str(data / name), "float32"), load_processor(str(data / name))
    records = read_conversations(data / "test.json")[:questions]
    given = evaluate(model, processor, records, Evaluation(max_new_tokens=64))["answers"]
    saved, exported, asked = folder / f"{name}-saved", folder / f"{name}-openvino", folder / f"{name}.json"
    save_model(model, saved)
    processor.save_pretrained(saved)
    asked.write_text(
        json.dumps([{"question": one["question"].removeprefix("<image>"), "image": one["image"]} for one in given])
    )
    out = folder / f"{name}-answers.json"
    try:
        # The shipped folders have the names of weights that transformers 5.23 writes.
        inside(python, str(ANSWERS), "transformers", str(data / name), str(asked), str(out))
        refused = ""
    except SystemExit as error:
        refused = str(error).strip().splitlines()[-1].replace(str(data), "digits")
    said = inside(python, *EXPORT, "--weight-format", "fp32", "--model", str(saved), str(exported))
    result: dict[str, Any] = {
        "questions": len(given),
        "without portable names": refused,
        "right here": sum(one["right"] for one in given),
        "export warns": sorted({line for line in said.splitlines() if "potential accuracy issues" in line}),
        "bytes": sum(path.stat().st_size for path in exported.glob("openvino_*")),
    }
    for kind, place in (("transformers", saved), ("openvino", exported)):
        inside(python, str(ANSWERS), kind, str(place), str(asked), str(out))
        found = json.loads(out.read_text(encoding="utf-8"))
        result["versions"] = found["versions"]
        pairs = list(zip(found["answers"], given, strict=True))
        result[kind] = {
            "same_answers": sum(text == one["answer"] for text, one in pairs),
            "right": sum(is_right(text, one["expected"]) for text, one in pairs),
            "different": [
                {"question": one["question"], "here": one["answer"], "there": text}
                for text, one in pairs
                if text != one["answer"]
            ][:20],
        }
    return result


def main() -> None:
    """Exports, asks and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="the Python of the export's environment")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_benchmark(folder / "data", sizes=Sizes(train=1, validation=1, test=(options.questions + 7) // 8))
        found = {
            model: compared(model, folder / "data", options.python, folder, options.questions)
            for model in ("teacher", "student")
        }
    write_json(options.out, {"models": found, "provenance": provenance()})


if __name__ == "__main__":
    main()
