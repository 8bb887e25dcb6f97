"""Vanilla KD on gold responses, through this project's trainer and through TRL's: samples a second and peak memory, as JSON.

    .venv/bin/python -m pip install --no-deps --target build/peers -r requirements/peers.txt
    PYTHONPATH=build/peers .venv/bin/python -m benchmarks.peers --out results/peers.json

Same models, same samples in the same order, same batch, optimizer and number of steps, float32, no gradient checkpointing. The loss is
KL(teacher || student) over response tokens; every trainer's loss of the first step has to agree with ours, or there is no result. Two
pairs: `digits`, the demo's models on its real images, and `cpu`, random weights at a vocabulary of 32,000 with 729 visual, 60
instruction and 150 response tokens. Every run is a fresh process, one after the other, in an order that turns from round to round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from align_ti.cli import quiet
from align_ti.digits.files import write_benchmark
from align_ti.runs import provenance, write_json
from benchmarks.peer_runs import COMMON, DIGITS_BATCH, RIVALS
from benchmarks.shapes import CPU

OURS, MORE_WORK = "align_ti_kd", "align_ti_full"
BATCHES = {"digits": DIGITS_BATCH, "cpu": CPU.batch}
TOLERANCE = 1e-3
"""How far the loss of the first step may be from ours, as a share of it."""

WHAT = {
    "align_ti_kd": "AlignTITrainer, kd alone; as shipped: on a CPU it keeps freed memory (align_ti.allocator), the others do not",
    "trl_gold": "GOLDTrainer: lmbda 0 (gold responses alone), beta 0 (forward KL), temperature 1, ready tensors by a data collator",
    "trl_distillation_update": "DistillationTrainer: beta 0, temperature 1; it takes no gold responses, so the method that generates "
    "responses is replaced by one that returns them: its update is measured, its generation is not",
    "align_ti_full": "AlignTITrainer, sft + kd + iva + tpa: more work, for information",
}

LEFT_OUT = {
    "DistillationTrainer as it is": "trains on responses that the student generates (_generate_and_score_completions); no option "
    "takes given ones; its update is measured as trl_distillation_update",
    "GKDTrainer": "compute_loss hands input_ids and attention_mask to both models and nothing else, so pixel_values never reach them, "
    "whatever the collator gives: a vision-language model is trained without its images (first loss on the digits pair 8.432; with "
    "the images 8.094)",
    "IWOPDTrainer (distillation_objective='jsd', lmbda=0)": "the same: compute_loss hands on input_ids and attention_mask alone, and "
    "its collator tokenizes text alone",
    "GOLDTrainer with use_uld_loss": "another loss (sorted probabilities across tokenizers), which one tokenizer does not need",
    "ServerDistillationTrainer": "the teacher is a vLLM server that returns its top tokens alone: no divergence over the vocabulary",
    "AsyncDistillationTrainer": "always on-policy: responses come from a vLLM server",
    "SDFTTrainer, SDPOTrainer": "self-distillation: the teacher is the student itself under another prompt",
    "MiniLLMTrainer": "not in this version of TRL any more",
}

NO_GPU = "a GPU; there TRL's divergence runs as Triton kernels, here as its PyTorch tiles"
NOT_MEASURED = (
    "Liger kernels: they need Triton and an accelerator; TRL's GOLDTrainer has no Liger loss, the option changes the models' layers",
    "bf16 and gradient checkpointing, which TRL switches on by default",
    "TRL's own preparation of images and text: all trainers get the same ready tensors",
    "generation, with or without vLLM: the work is off-policy",
    "several processes, adapters, other model families",
)

MISSING = """TRL is not installed for this Python, and the peers are its trainers; put it into a folder of its own and name that folder:
    {python} -m pip install --no-deps --target build/peers -r requirements/peers.txt
    PYTHONPATH=build/peers {python} -m benchmarks.peers --out results/peers.json"""


def check_peers() -> str:
    """The version of TRL.

    Raises:
        SystemExit: it is not installed; the message tells how to get it.
    """
    if importlib.util.find_spec("trl") is None:
        raise SystemExit(MISSING.format(python=sys.executable))
    return importlib.metadata.version("trl")


def run(rival: str, pair: str, steps: int, folder: Path) -> dict[str, Any]:
    """One run in a fresh process.

    Raises:
        SystemExit: the run failed; its last words are shown.
    """
    out = folder / "run.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.peer_runs", "--rival", rival, "--pair", pair, "--steps", str(steps)]
    command += ["--data", str(folder / "data"), "--out", str(out)]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode or not out.exists():
        raise SystemExit(f"{rival} on {pair} failed (exit {done.returncode}):\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def rounds_of(pair: str, steps: int, rounds: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every rival's runs, one a round."""
    names = list(RIVALS)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            found = run(name, pair, steps, folder)
            runs[name].append(found)
            print(
                f"{pair}, round {number + 1}, {name}: {found['samples_per_second']:.3g} samples/s, "
                f"peak {found['peak_memory_mib'] or 0:.0f} MiB, losses {', '.join(f'{x:.5g}' for x in found['losses'][:6])}",
                flush=True,
            )
    return runs


def check_same_work(pair: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse to compare trainers that did not do the same.

    Raises:
        SystemExit: the first loss of a rival is not ours.
    """
    ours = runs[OURS][0]["losses"][0]
    for name, found in runs.items():
        theirs = found[0]["losses"][0]
        if name != MORE_WORK and abs(theirs - ours) > TOLERANCE * abs(ours):
            raise SystemExit(
                f"{pair}: the first loss of {name} is {theirs:.6g}, ours is {ours:.6g}; they do not do the same work, so nothing is "
                "compared. Look for another version of TRL than the pinned one, or another normalisation."
            )


def spread(values: Sequence[float | None], digits: int) -> dict[str, float] | None:
    """Median, least and greatest; None where a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    named = {"median": statistics.median(known), "min": min(known), "max": max(known)}
    return {name: round(value, digits) for name, value in named.items()}


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each rival's speed, memory and losses, and ours as a multiple of its own, round by round."""
    table: dict[str, dict[str, Any]] = {}
    for name, found in runs.items():
        table[name] = {
            "what": WHAT[name],
            "samples_per_second": spread([one["samples_per_second"] for one in found], 4),
            "processor_seconds_per_sample": spread([one["processor_seconds_per_sample"] for one in found], 5),
            "peak_memory_mib": spread([one["peak_memory_mib"] for one in found], 1),
            "losses": [round(loss, 6) for loss in found[0]["losses"]],
        }
        if "branch_share" in found[0]:
            table[name]["branch_share"] = round(found[0]["branch_share"], 4)
        if name != OURS:
            table[name] |= against(runs[OURS], found)
    return table


def against(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Our speed over theirs (above 1: we are faster), processor time and memory (below 1: we need less), of the same round each."""
    return {
        "our_speed_over_theirs": spread(ratios("samples_per_second", ours, theirs), 3),
        "our_processor_time_over_theirs": spread(ratios("processor_seconds_per_sample", ours, theirs), 3),
        "our_memory_over_theirs": spread(ratios("peak_memory_mib", ours, theirs), 3),
    }


def ratios(name: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> list[float | None]:
    """Ours over theirs, round by round; None where the system does not tell one of the two."""
    both = [(one[name], other[name]) for one, other in zip(ours, theirs, strict=True)]
    return [one / other if one and other else None for one, other in both]


def show(pairs: dict[str, Any]) -> None:
    """The table for people: medians; the JSON has their ranges."""
    for pair, content in pairs.items():
        table = Table(
            box=box.SIMPLE,
            title=f"{pair}: batch {content['batch']}, {content['steps']} steps, ratios: {OURS} over each",
        )
        for column in ("", "samples/s", "peak MiB", "speed", "CPU time", "memory", "loss"):
            table.add_column(column, justify="left" if not column else "right", no_wrap=True)
        for name, row in content["runs"].items():
            cells = [
                row["samples_per_second"],
                row["peak_memory_mib"],
                row.get("our_speed_over_theirs"),
                row.get("our_processor_time_over_theirs"),
                row.get("our_memory_over_theirs"),
            ]
            table.add_row(name, *(cell(value) for value in cells), f"{row['losses'][0]:.4g}")
        Console(width=max(100, Console().width)).print(table)


def cell(value: dict[str, float] | None) -> str:
    """The median, or nothing where there is none."""
    return "" if value is None else f"{value['median']:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--digits-steps", type=int, default=50, help="the first is not timed; 50 at most")
    parser.add_argument("--cpu-steps", type=int, default=6, help="the first is not timed")
    chosen = parser.parse_args()
    quiet()
    version, load = check_peers(), os.getloadavg()
    steps = {"digits": chosen.digits_steps, "cpu": chosen.cpu_steps}
    pairs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_benchmark(folder / "data")
        for pair in chosen.pairs:
            runs = rounds_of(pair, steps[pair], chosen.rounds, folder)
            check_same_work(pair, runs)
            pairs[pair] = {"batch": BATCHES[pair], "steps": steps[pair], "runs": compared(runs)}
    content = {
        "trl": version,
        "pairs": pairs,
        "rounds": chosen.rounds,
        "options": {name: value for name, value in COMMON.items() if name not in ("disable_tqdm", "report_to")},
        "left_out": LEFT_OUT,
        "not_measured": [*([] if torch.accelerator.is_available() else [NO_GPU]), *NOT_MEASURED],
        "threads": torch.get_num_threads(),
        "load_average_at_start": [round(value, 2) for value in load],
    }
    write_json(chosen.out, {**content, "provenance": provenance()})
    show(pairs)


if __name__ == "__main__":
    main()
