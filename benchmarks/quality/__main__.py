"""The data of the studies of docs/quality.md: the digits benchmark once for each seed.

python -m benchmarks.quality            writes runs/quality/digits-SEED; what is there is left as it is
python -m benchmarks.quality --train 10000 --folder runs/quality/long       for long.yaml
python -m benchmarks.quality --train 10000 --questions 2 --folder runs/quality/images       for images.yaml
python -m benchmarks.quality --train 11000 --mix count=4 where=2 --folder runs/quality/mix       more questions of some types
align-ti study benchmarks/quality/ablation.yaml
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from align_ti.digits.files import Sizes, write_benchmark

SIZES = Sizes(train=2500, validation=100, test=150)
"""Images of the splits, and types of questions about each image of training. Only seed 0's validation and test questions are asked, so
that all runs answer the same."""


def frequency(text: str) -> tuple[str, float]:
    """A type and its relative frequency, as in `count=4`."""
    kind, _, number = text.partition("=")
    return kind, float(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--train", type=int, default=SIZES.train, help="training images")
    parser.add_argument(
        "--questions",
        type=int,
        choices=range(1, 9),
        default=SIZES.questions,
        help="question types per training image, drawn at random if fewer than 8",
    )
    parser.add_argument(
        "--mix", nargs="+", type=frequency, default=[], help="relative frequencies of types in training, as count=4"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        out = arguments.folder / f"digits-{seed}"
        if not out.is_dir():
            sizes = replace(SIZES, train=arguments.train, questions=arguments.questions, mix=dict(arguments.mix))
            write_benchmark(out, seed, sizes)
        print(out)


if __name__ == "__main__":
    main()
