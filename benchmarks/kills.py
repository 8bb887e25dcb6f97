"""A run that is killed at random moments ends with bitwise the weights of one that was not.

    python -m benchmarks.kills            # 10 kills of one process, 10 of two; minutes

A tiny pair is trained with a checkpoint every second step. Each kill is SIGKILL at a moment drawn over the whole life of the command,
from its start to its end, writing of checkpoints and of the student included; of two processes either of them or the launch itself is
killed. Then the same command goes on. When a run has ended, its student's weights are compared with those of a run that nobody touched.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from safetensors.torch import load_file
from tests import small


def main() -> None:
    """Kills, counts, and says so in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="kills for each number of processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, lost = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small.write_pair(folder)
        small.write_records(folder)
        for processes in (1, 2):
            lost += kills_of(folder, processes, options.kills, chance)
    print(f"{2 * options.kills} kills, {lost} lost")
    sys.exit(1 if lost else 0)


def kills_of(folder: Path, processes: int, kills: int, chance: random.Random) -> int:
    """Kills runs of so many processes so often; the number of runs that ended otherwise than one that nobody touched."""
    began = time.monotonic()
    whole = folder / f"whole-{processes}"
    code = start(folder, whole, processes).wait()
    if code:
        raise SystemExit(f"the run that nobody touched ended with {code}")
    life = time.monotonic() - began
    print(f"{processes} process(es): {life:.1f} s untouched", flush=True)
    done, runs, lost = 0, 0, 0
    while done < kills:
        out, struck = folder / f"killed-{processes}-{runs}", []
        runs += 1
        while True:
            run = start(folder, out, processes)
            if done < kills:
                moment = chance.uniform(0, life)
                code = ended_within(run, moment)
                if code is None:
                    victim = run.pid if processes == 1 else chance.choice([run.pid, *children(run.pid)])
                    os.kill(victim, signal.SIGKILL)
                    struck.append(f"{moment:.1f} s")
                    done += 1
                    run.wait()
                    continue
            code = run.wait()
            break
        same = code == 0 and equal(whole, out)
        lost += not same
        print(
            f"  run {runs}: killed at {', '.join(struck) or 'no moment'}: {'same' if same else f'LOST ({code})'}",
            flush=True,
        )
        shutil.rmtree(out)
    return lost


def start(folder: Path, out: Path, processes: int) -> subprocess.Popen[bytes]:
    """The command, from its beginning or from where it stopped."""
    recipe = small.recipe(folder, out=str(out))
    recipe["training"] = {**recipe["training"], "max_steps": 12, "per_device_train_batch_size": 4 // processes}  # type: ignore[dict-item]
    path = folder / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    several = [] if processes == 1 else ["--launch", str(processes)]
    command = [sys.executable, "-m", "align_ti", "train", str(path), *several]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ended_within(run: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code, or None if the run still lives after these seconds."""
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def children(process: int) -> list[int]:
    """The processes that a launch has started."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def equal(one: Path, other: Path) -> bool:
    """Whether two runs left bitwise the same student."""
    weights, found = (load_file(run / "student" / "model.safetensors") for run in (one, other))
    return weights.keys() == found.keys() and all(bool((weights[name] == found[name]).all()) for name in weights)


if __name__ == "__main__":
    main()
