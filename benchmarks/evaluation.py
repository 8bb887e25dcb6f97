"""Questions a second of `align-ti evaluate --tasks` against plain `generate` one by one, and lmms-eval's own LLaVA class.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation --folder runs/evaluation --out results/evaluation.json [--lmms PYTHON]

The shipped digits teacher answers the questions of the benchmark's test split; the same questions, model, precision and token limit for
all. A time holds all from the image's file to the answer's words; models are loaded before. Rounds go over all variants in turn, and
ratios are taken within a round. With --lmms, the Python of an environment that has lmms-eval, its class `llava_hf` runs in a process of
that environment, which waits while the others are measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.cli import quiet
from align_ti.digits.files import write_benchmark
from align_ti.evaluation.benchmarks import benchmark
from align_ti.evaluation.benchmarks.base import Item
from align_ti.evaluation.predictions import conversation_of, subset
from align_ti.evaluation.runner import said_to
from align_ti.models.loading import best_device, load_model, load_processor
from align_ti.pipeline.asking import batches
from align_ti.runs import write_json
from benchmarks.rounds import machine, ratios, seconds_by_round, summary

TOKENS = 64
"""Tokens of one answer at most; the longest right answer has fewer."""

PLAIN, LMMS = "generate one by one", "lmms-eval llava_hf"

WORKER = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
from loguru import logger
logger.remove()
import torch
from PIL import Image
from lmms_eval.models.simple.llava_hf import LlavaHf
from lmms_eval.api.instance import Instance
told = json.loads(sys.stdin.readline())
model = LlavaHf(
    told["model"], device=told["device"], device_map=told["device"], dtype="float32", chat_template=told["template"]
)
documents = told["documents"]
model.task_dict = {"digits": {"test": documents}}
opened = lambda document: [Image.open(document["image"]).convert("RGB")]
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(one["question"], {"max_new_tokens": told["tokens"], "until": []}, opened, number, "digits", "test"),
            idx=0,
            metadata={"task": "digits", "doc_id": number, "repeats": 1},
        )
        for number, one in enumerate(documents)
    ]
    answers = model.generate_until(requests)
    print(json.dumps({"answers": answers}), flush=True)
"""
"""Asks all questions once for each line that it is sent."""


def ours(model: PreTrainedModel, processor: ProcessorMixin, items: Sequence[Item], size: int) -> list[str]:
    """The answers as `align-ti evaluate --tasks` gets them."""
    conversations, found = [conversation_of(item) for item in items], dict[int, str]()
    for batch in batches(conversations, size):
        answers = said_to(model, processor, [conversations[index] for index in batch], TOKENS)
        found |= {index: text for index, (text, _) in zip(batch, answers, strict=True)}
    return [found[index] for index in range(len(items))]


@torch.no_grad()
def one_by_one(model: PreTrainedModel, processor: ProcessorMixin, items: Sequence[Item]) -> list[str]:
    """The answers by transformers alone, a question at a time, in the file's order."""
    found = []
    for item in items:
        content = [{"type": "image"}, {"type": "text", "text": item.text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with Image.open(str(item.images[0])) as opened:
            inputs = processor(images=[opened.convert("RGB")], text=text, return_tensors="pt").to(model.device)
        generate: Any = model.generate
        made = generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[:, inputs["input_ids"].shape[1] :]
        found.append(processor.batch_decode(made, skip_special_tokens=True)[0].strip())
    return found


class Lmms:
    """lmms-eval's class `llava_hf` in a process of its own environment; as in its own runs, a question at a time.

    Args:
        python: that environment's Python.
        model: the model's folder.
        items: the questions.
        template: the chat template; lmms-eval hands it the question with `<image>` in front as one text.
    """

    def __init__(self, python: Path, model: Path, items: Sequence[Item], template: str) -> None:
        self.process = subprocess.Popen(
            [str(python), "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.told(
            {
                "model": str(model.resolve()),
                "device": str(best_device()),
                "tokens": TOKENS,
                "template": template,
                "documents": [
                    {"image": str(Path(str(item.images[0])).resolve()), "question": item.text} for item in items
                ],
            }
        )

    def told(self, what: Any) -> Any:
        """What the process says when it is told something.

        Raises:
            SystemExit: it has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("the process of lmms-eval has ended; run its Python by hand to see why.")

    def answers(self) -> list[str]:
        """The answers to all questions."""
        found: list[str] = self.told("go")["answers"]
        return [text.strip() for text in found]

    def end(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def as_text(template: str) -> str:
    """The chat template for a message whose content is one text: without the line end that lmms-eval puts behind the image tag."""
    content = "{{- message['content'] -}}"
    assert content in template
    return template.replace(content, "{{- message['content'] | replace('<image>\\n', '<image>') -}}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lmms", type=Path)
    chosen = parser.parse_args()
    quiet()
    if not (chosen.folder / "data").is_dir():
        write_benchmark(chosen.folder / "data")
    folder = chosen.folder / "data" / "teacher"
    items = subset(benchmark("digits").items(chosen.folder / "data"), chosen.questions)
    model, processor = load_model(str(folder), "float32", best_device()), load_processor(str(folder))
    answers: dict[str, list[str]] = {}

    def kept(name: str, work: Callable[[], list[str]]) -> Callable[[], None]:
        def run() -> None:
            answers[name] = work()

        return run

    works = {PLAIN: kept(PLAIN, lambda: one_by_one(model, processor, items))}
    for size in chosen.sizes:
        works[f"ours, batch {size}"] = kept(
            f"ours, batch {size}", lambda size=size: ours(model, processor, items, size)
        )
    lmms = None if chosen.lmms is None else Lmms(chosen.lmms, folder, items, as_text(processor.chat_template))
    if lmms is not None:
        works[LMMS] = kept(LMMS, lmms.answers)
    started = time.perf_counter()
    seconds = seconds_by_round(works, dict.fromkeys(works, chosen.rounds))
    if lmms is not None:
        lmms.end()
    content = {
        "questions": len(items),
        "pictures": len({item.cluster for item in items}),
        "tokens_at_most": TOKENS,
        "seconds": seconds,
        "questions_per_second": {
            name: summary([round(len(items) / one, 3) for one in each]) for name, each in seconds.items()
        },
        "times_as_fast_as_one_by_one": {name: ratios(seconds[PLAIN], each) for name, each in seconds.items()},
        "equal_answers_to_one_by_one": {
            name: sum(one == other for one, other in zip(each, answers[PLAIN], strict=True))
            for name, each in answers.items()
        },
        "wall_seconds": round(time.perf_counter() - started, 1),
        "machine": machine(str(best_device())),
    }
    if lmms is not None:
        content["times_as_fast_as_lmms_eval"] = {name: ratios(seconds[LMMS], each) for name, each in seconds.items()}
    write_json(chosen.out, content)
    for name, each in seconds.items():
        print(f"{name:<24} {len(items) / min(each):8.2f} questions/s", content["times_as_fast_as_one_by_one"][name])


if __name__ == "__main__":
    main()
