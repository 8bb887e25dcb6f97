"""Draws the figures of the documentation: `python -m benchmarks.figures --out docs/pictures`.

`rows` and `ribbon` are schemes of the definitions in docs/method.md. `digits`, `iva` and `tpa` are measured on the benchmark's own test
images, seed 0: `iva` with the shipped teacher, `tpa` with it and a student after `BEGUN` steps of SFT. `report` is the chart at the
top of a demo's report, from the numbers in results/demo.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Objective
from align_ti.data.collator import Collator
from align_ti.data.conversation import Conversation
from align_ti.data.roles import INSTRUCTION, RESPONSE, VISUAL, encode, model_inputs
from align_ti.data.sources import read_conversations
from align_ti.demo import LABELS, TRAINING, method_recipe
from align_ti.digits.files import Sizes, write_benchmark
from align_ti.interactions.visual import visual_weights
from align_ti.models.attention import watching
from align_ti.models.continuation import read
from align_ti.models.loading import load_model, load_processor
from align_ti.pipeline.training import distil
from align_ti.report.folders import ROLES as PARTS_PLAYED
from align_ti.report.headline import ModelBar, gap_chart

ROLES = {
    "other": "#c4c4c4",
    "visual": "#cc79a7",
    "instruction": "#56b4e9",
    "response": "#009e73",
    "candidate": "#e69f00",
}
"""A colour for each role, and for candidates; told apart by colour-blind readers too (Okabe and Ito)."""

DEMO = Path(__file__).parent.parent / "results" / "demo.json"

LAYER = 4
"""The teacher's layer whose attention is shown: the shipped teacher's highest IRS."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "path",  # every browser shows the same
    "svg.hashsalt": "align-ti",
    "axes.spines.top": False,
    "axes.spines.right": False,
}

SEQUENCE = (
    ("<", "other"),
    *((f"v{index}", "visual") for index in range(1, 6)),
    *((f"q{index}", "instruction") for index in range(1, 4)),
    (">", "other"),
    *((f"y{index}", "response") for index in range(1, 5)),
)
"""The scheme's sequence: each token with its role; template tokens around image, instruction and answer."""

TRIED = {1: ("a", "b"), 2: ("a",), 3: ("a", "b")}
"""The scheme's candidates by the response step whose token they replace; those of the fourth step end the turn or are gold."""


def first_response() -> int:
    """The place of the scheme's first response token."""
    return [role for _, role in SEQUENCE].index("response")


def candidates() -> list[tuple[str, int]]:
    """The scheme's candidates: a name, and the step whose token each replaces."""
    return [(f"u{step}{letter}", step) for step, letters in TRIED.items() for letter in letters]


def visible() -> np.ndarray:
    """Which token (column) each token (row) sees: gold tokens causally, a candidate the gold tokens before its step and itself."""
    gold, tried = len(SEQUENCE), candidates()
    seen = np.zeros((gold + len(tried), gold + len(tried)), dtype=bool)
    seen[:gold, :gold] = np.tri(gold, dtype=bool)
    for number, (_, step) in enumerate(tried, start=gold):
        seen[number, : first_response() + step - 1] = True
        seen[number, number] = True
    return seen


# --- schemes ----------------------------------------------------------------------------------------------------------


def box(ax: Axes, x: float, y: float, colour: str, text: str = "", height: float = 0.8, alpha: float = 1.0) -> None:
    """One token, or one row of it, at a column."""
    ax.add_patch(
        Rectangle((x - 0.42, y), 0.84, height, facecolor=colour, alpha=alpha, edgecolor="#444444", linewidth=0.6)
    )
    ax.text(x, y + height / 2, text, ha="center", va="center", fontsize=8)


def rows() -> Figure:
    """Which positions each term compares, and with what weight."""
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    ax, start = figure.subplots(), first_response()
    last = start + len(TRIED) + 1
    for x, (name, role) in enumerate(SEQUENCE):
        box(ax, x, 4.4, ROLES[role], name)
    lanes = (("SFT, KD", 3.2), ("IVA", 2.0), ("TPA", 0.4))
    for x in range(start - 1, last - 1):
        box(ax, x, lanes[0][1], ROLES["response"], f"→ y{x - start + 2}")
    heights = {1: 0.12, 2: 0.25, 3: 0.8, 4: 0.45, 5: 0.12}
    for x, height in heights.items():
        box(ax, x, lanes[1][1], ROLES["visual"], height=height)
        ax.text(x, lanes[1][1] - 0.08, f"w{x}", ha="center", va="top")
    for step, letters in TRIED.items():
        for depth, letter in enumerate(letters):
            height = 0.9 / len(letters)
            box(
                ax,
                start + step - 1,
                lanes[2][1] + depth * height,
                ROLES["candidate"],
                f"u{step}{letter} →",
                height * 0.94,
            )
    notes = (
        "the position before each\nresponse token, weight 1",
        "each visual token, weight w: the share of\nthe teacher's attention that it gets",
        "each candidate in place of the gold token;\na position's candidates share its weight",
    )
    for (name, y), note in zip(lanes, notes, strict=True):
        ax.text(-0.9, y + 0.4, name, ha="right", va="center", weight="bold")
        ax.text(len(SEQUENCE) + 0.1, y + 0.4, note, va="center")
    ax.text(-0.9, 4.8, "sequence", ha="right", va="center", weight="bold")
    ax.set(xlim=(-2.6, len(SEQUENCE) + 6.5), ylim=(0, 5.9))
    for x, role in ((3, "visual"), (7, "instruction"), (start + 1.5, "response")):
        ax.text(x, 5.35, role, ha="center")
    ax.axis("off")
    return figure


def ribbon() -> Figure:
    """Candidates after the gold sequence: what each token attends to, and which position it has."""
    figure = Figure(figsize=(7.2, 6.2), layout="constrained")
    ax, seen = figure.subplots(), visible()
    tokens = [*SEQUENCE, *((name, "candidate") for name, _ in candidates())]
    places = [*range(len(SEQUENCE)), *(first_response() + step - 1 for _, step in candidates())]
    for row, column in zip(*np.nonzero(seen), strict=True):
        colour = ROLES[tokens[column][1]]
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=1))
    ax.axhline(len(SEQUENCE), color="#444444", linewidth=1)
    ax.axvline(len(SEQUENCE), color="#444444", linewidth=1)
    ax.set(xlim=(0, len(tokens)), ylim=(len(tokens), 0), aspect="equal", xlabel="attended token (key)")
    ax.set_ylabel("attending token (query), with its position")
    names = [name for name, _ in tokens]
    ax.set_xticks(np.arange(len(tokens)) + 0.5, names, fontsize=7)
    ax.set_yticks(
        np.arange(len(tokens)) + 0.5, [f"{name}  {place:>2}" for name, place in zip(names, places, strict=True)]
    )
    ax.tick_params(length=0)
    ax.text(len(tokens) + 0.2, len(SEQUENCE) / 2, "gold sequence:\none causal pass", va="center")
    ax.text(
        len(tokens) + 0.2,
        (len(SEQUENCE) + len(tokens)) / 2,
        "candidates attend to the\ngold tokens before their\nstep, and to themselves",
        va="center",
    )
    return figure


# --- measured ---------------------------------------------------------------------------------------------------------


BEGUN = 200
"""Steps of SFT that the student of the figure `tpa` has had; the shipped one has learnt captions alone."""


@dataclass
class Shipped:
    """The shipped teacher, a student that has begun to learn from it, and records about the benchmark's test images."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    processor: ProcessorMixin
    records: Sequence[Conversation]

    @classmethod
    def written_to(cls, folder: Path) -> Shipped:
        write_benchmark(folder, sizes=Sizes(train=BEGUN * 2, validation=1, test=3))
        training = TRAINING.model_copy(update={"max_steps": BEGUN})
        begun = distil(method_recipe(folder / "run", folder, Objective.only(sft={}), 0, training), check=False).student
        teacher, student = (load_model(str(path), "float32").eval() for path in (folder / "teacher", begun))
        return cls(teacher, student, load_processor(str(folder / "student")), read_conversations(folder / "test.json"))

    def picture(self, number: int) -> list[Conversation]:
        """The records about one image."""
        names = list(dict.fromkeys(record.images[0] for record in self.records))
        return [record for record in self.records if record.images[0] == names[number]]

    def batch(self, records: Sequence[Conversation]) -> dict[str, Tensor]:
        """Records as tensors."""
        return Collator(self.processor.tokenizer.pad_token_id)([encode(record, self.processor) for record in records])


def words(record: Conversation) -> tuple[str, str]:
    """A record's question and answer."""
    return record.turns[0].text.replace("<image>", "").strip(), record.turns[-1].text


def digits(shipped: Shipped) -> Figure:
    """Three images of the benchmark, each with a question and its answer."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for number, ax in enumerate(figure.subplots(1, 3)):
        record = shipped.picture(number)[number]
        question, answer = words(record)
        show(ax, record.pictures()[0])
        ax.set_title(f"{question}\n{answer}", fontsize=9)
    return figure


def show(ax: Axes, picture: Image.Image, alpha: float = 1.0) -> None:
    """An image with its pixels as they are."""
    ax.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest", alpha=alpha, extent=(0, 6, 6, 0))
    ax.set(xticks=[], yticks=[])
    ax.set_frame_on(False)


@torch.no_grad()
def iva(shipped: Shipped) -> Figure:
    """Where each of three instructions looks in one image, and the weights that its visual rows get."""
    records = [record for record in shipped.picture(0) if record.kind in {"digit", "where", "row"}]
    batch = shipped.batch(records)
    visual, instruction = batch["roles"] == VISUAL, batch["roles"] == INSTRUCTION
    with watching(shipped.teacher, instruction, (LAYER,)) as watch:
        read(shipped.teacher, model_inputs(batch), keep_cache=False)
    weights = visual_weights(watch.means[LAYER], visual, instruction)[visual].view(len(records), 6, 6).numpy()
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    grid = figure.subplots(2, len(records) + 1, gridspec_kw={"height_ratios": (3, 1)})
    show(grid[0, 0], records[0].pictures()[0])
    grid[0, 0].set_title("the image,\n36 visual tokens", fontsize=9)
    grid[1, 0].axis("off")
    for column, (record, weight) in enumerate(zip(records, weights, strict=True), start=1):
        show(grid[0, column], record.pictures()[0])
        grid[0, column].imshow(weight, cmap="magma", alpha=0.7, extent=(0, 6, 6, 0), vmin=0, vmax=weights.max())
        grid[0, column].set_title("\n".join(halves(words(record)[0])), fontsize=9)
        grid[1, column].bar(np.arange(1, 37), weight.ravel(), color=ROLES["visual"])
        grid[1, column].set(ylim=(0, weights.max() * 1.05), xlabel="visual token")
    grid[1, 1].set_ylabel("weight w")
    return figure


def halves(text: str) -> tuple[str, str]:
    """A sentence in two lines of like length."""
    parts = text.split()
    cut = min(range(1, len(parts)), key=lambda at: abs(len(" ".join(parts[:at])) - len(text) / 2))
    return " ".join(parts[:cut]), " ".join(parts[cut:])


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens drawn from the student at one step of an answer, and what each model expects behind them."""

    record: Conversation
    before: Tensor
    """The answer's tokens before the step."""
    gold: int
    candidates: tuple[tuple[int, int], ...]
    """Each token that was drawn, and how often."""
    teacher: Tensor
    """Next-token probabilities behind each candidate: (candidates, vocabulary)."""
    student: Tensor

    @property
    def divergences(self) -> Tensor:
        """KL(teacher || student) behind each candidate, in nats: (candidates,)."""
        return (self.teacher * (self.teacher.log() - self.student.log())).nansum(-1)

    @property
    def mean(self) -> float:
        """The mean over the draws, which is TPA at this step."""
        counts = torch.tensor([count for _, count in self.candidates])
        return float((self.divergences * counts).sum() / counts.sum())


def drawn(shipped: Shipped, record: Conversation, step: int) -> Drawn:
    """Four tokens drawn from the student in place of the answer's token at `step`, an index into the whole sequence."""
    batch = shipped.batch([record])
    inputs, ids = model_inputs(batch), batch["input_ids"]
    start = int((batch["roles"][0] == RESPONSE).nonzero()[0, 0])
    choice = shipped.student(**inputs).logits[0, step - 1].softmax(-1)
    draws = torch.multinomial(choice, 4, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = {int(token): int((draws == token).sum()) for token in draws.unique()}
    behind: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for token in counts:
        seen = torch.cat([ids[:, :step], torch.tensor([[token]])], dim=1)
        changed = {**inputs, "input_ids": seen, "attention_mask": torch.ones_like(seen)}
        for name, found in behind.items():
            found.append(getattr(shipped, name)(**changed).logits[0, -1].softmax(-1))
    return Drawn(
        record,
        ids[0, start:step],
        int(ids[0, step]),
        tuple(counts.items()),
        torch.stack(behind["teacher"]),
        torch.stack(behind["student"]),
    )


@torch.no_grad()
def tpa(shipped: Shipped) -> Figure:
    """Four tokens drawn from the student at one step of an answer, and both models' distributions behind each.

    The student has had `BEGUN` steps of SFT. Of all steps of the answers about the test images where it draws at least three
    different tokens, the one is shown where its distributions behind them differ most from the teacher's.
    """
    steps = []
    for record in shipped.records:
        response = (shipped.batch([record])["roles"][0] == RESPONSE).nonzero()[:, 0]
        steps += [drawn(shipped, record, int(step)) for step in response]
    shown = max((one for one in steps if len(one.candidates) >= 3), key=lambda one: one.mean)
    tokenizer = shipped.processor.tokenizer
    rows = len(shown.candidates)
    figure = Figure(figsize=(9.5, 1.2 + 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, gridspec_kw={"width_ratios": (1, 2.6)})
    for ax in axes[:, 0]:
        ax.axis("off")
    middle = figure.add_subplot(axes[0, 0].get_gridspec()[:, 0])
    show(middle, shown.record.pictures()[0])
    answer = textwrap.fill(f"{tokenizer.decode(shown.before).strip()} …", 34)
    middle.set_title(f"{words(shown.record)[0]}\n{answer}\nanswer: {tokenizer.decode(shown.gold)!r}", fontsize=9)
    for ax, (token, count), teacher, student, divergence in zip(
        axes[:, 1], shown.candidates, shown.teacher, shown.student, shown.divergences, strict=True
    ):
        top = torch.maximum(teacher, student).topk(8).indices
        places = np.arange(len(top))
        ax.bar(places - 0.2, teacher[top], 0.4, color="#7f7f7f", label="teacher")
        ax.bar(
            places + 0.2, student[top], 0.4, color=ROLES["response"], hatch="///", edgecolor="white", label="student"
        )
        ax.set_xticks(places, [repr(tokenizer.decode(index)) for index in top])
        ax.set(ylim=(0, 1.05), ylabel="probability")
        ax.set_title(
            f"after the candidate {tokenizer.decode(token)!r} (sampled {count} of 4 times): KL {divergence:.2f} nats",
            fontsize=9,
            loc="left",
        )
    axes[0, 1].legend(loc="upper right", frameon=False)
    return figure


def report() -> str:
    """The chart at the top of a demo's report, as the text of an SVG file."""
    told = json.loads(DEMO.read_text(encoding="utf-8"))
    score, names = {name: told["accuracy"][name]["overall"] for name in LABELS}, list(LABELS)
    seconds = {name: each * told["steps"] for name, each in told["seconds_per_step"].items()}
    bars = [
        ModelBar(name, label, PARTS_PLAYED.get(name, "trained"), score[name], low, high, seconds.get(name))
        for name, label in LABELS.items()
        for low, high in [told["interval_95"][name]["overall"]]
    ]
    best = max(seconds, key=lambda name: score[name])
    closed = 100 * (score[best] - score["sft"]) / (score["teacher"] - score["sft"])
    marks = (names.index("sft"), names.index(best), names.index("teacher"))
    drawing = gap_chart(bars, marks, f"{closed:.0f} % of the gap", "exact match on own questions", "%")
    # A file of its own, unlike a part of a page, names what it is written in.
    return str(drawing.svg).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


SCHEMES: dict[str, Callable[[], Figure | str]] = {"rows": rows, "ribbon": ribbon, "report": report}
MEASURED: dict[str, Callable[[Shipped], Figure]] = {"digits": digits, "iva": iva, "tpa": tpa}


def save(figure: Figure | str, path: Path) -> None:
    """A figure as SVG; the same figure gives the same file."""
    if isinstance(figure, str):
        path.write_text(figure, encoding="utf-8")
    else:
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    # Matplotlib leaves blanks at the ends of lines.
    path.write_text(
        "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE), tempfile.TemporaryDirectory() as folder:
        shipped = Shipped.written_to(Path(folder) / "digits")
        drawn = {name: draw() for name, draw in SCHEMES.items()} | {
            name: draw(shipped) for name, draw in MEASURED.items()
        }
        for name, figure in drawn.items():
            save(figure, chosen.out / f"{name}.svg")


if __name__ == "__main__":
    main()
