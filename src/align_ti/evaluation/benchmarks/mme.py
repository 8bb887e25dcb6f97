"""MME: pairs of yes/no questions about an image in fourteen categories. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from align_ti.data.records import ImageRoot
from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.answers import check, notes_on, tidy
from align_ti.evaluation.benchmarks.base import Benchmark, Item, Report
from align_ti.evaluation.benchmarks.files import (
    EVAL_ZIP,
    Source,
    field,
    read_lines,
    read_text,
    refuse_twice,
    task_folder,
)
from align_ti.evaluation.metrics import Metric, ratio
from align_ti.evaluation.scoring import mme_answer

PICTURES = "MME_Benchmark_release_version"
QUESTIONS = Source(("llava_mme.jsonl",), EVAL_ZIP)
ORIGIN = "MME (https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation)"
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUFFIX = "Answer the question using a single word or phrase."
OFFICIAL_SUFFIX = "Please answer yes or no."
STATISTICS = 4
"""Of a category: right answers, questions, images with both answers right, images."""
PAIR = 2
PUBLISHED = 2374


class Mme(Benchmark):
    """MME by LLaVA's protocol."""

    name = "mme"
    title = "MME"
    max_new_tokens = 128

    def items(self, folder: Path) -> list[Item]:
        """The questions of `llava_mme.jsonl` with the answers beside the images in `MME_Benchmark_release_version`.

        A question's id is its image's and its words, since the file's own ids are those of images.
        """
        folder = task_folder(folder, "MME", QUESTIONS)
        root = ImageRoot(Source((PICTURES,), ORIGIN).path(folder))
        truths: dict[str, dict[str, str]] = {}
        items = []
        for record, place in read_lines(QUESTIONS.path(folder), QUESTIONS.origin):
            id, image, text = (field(record, name, place) for name in ("question_id", "image", "text"))
            asked = question_of(text)
            if id not in truths:
                truths[id] = read_truth(root, id, place)
            if asked not in truths[id]:
                raise DataError(
                    f"{place}: {asked!r} is none of the questions about {id} ({', '.join(map(repr, truths[id]))}); the release of MME "
                    f"is another; get it from {ORIGIN}."
                )
            items.append(
                Item(
                    id=f"{id} {asked}",
                    text=text,
                    images=(root.path(image, place),),
                    cluster=id,
                    kind=id.split("/")[0],
                    reference={"answer": truths[id][asked]},
                    place=place,
                )
            )
        refuse_twice(items, QUESTIONS.origin)
        self.check_pairs(items)
        return items

    def check_pairs(self, items: Sequence[Item]) -> None:
        """Refuse a category that MME does not have, or an image without exactly two questions.

        Raises:
            DataError: one is found.
        """
        count: dict[str, int] = {}
        for item in items:
            count[item.cluster] = count.get(item.cluster, 0) + 1
            if item.kind not in PERCEPTION + COGNITION:
                raise DataError(
                    f"{item.place}: category {item.kind!r}; accepted: {', '.join(PERCEPTION + COGNITION)}; get the file from "
                    f"{QUESTIONS.origin}."
                )
        for item in items:
            if count[item.cluster] != PAIR:
                raise DataError(
                    f"{item.place}: image {item.cluster} has {count[item.cluster]} question(s); each has {PAIR}; the file is cut off "
                    f"or of another version; get it from {QUESTIONS.origin}."
                )

    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        """Perception (also divided by 20, as the paper's table has it), cognition, and each category, at most 200.

        Strictly, pairs are neighbouring answers of a category, and what stops the original is an error: tabs and line ends, an odd
        number of answers, a category without answers or with none that says yes or no.
        """
        check(items, predictions, self.title)
        notes = notes_on(items, predictions, PUBLISHED, "absent, as by the original" if strict_original else "")
        if strict_original:
            pairs = self.neighbours(items, predictions)
        else:
            pairs = by_picture(items)
            single = sum(len(pair.items) != PAIR for pair in pairs)
            if single:
                notes.append(f"{single} images lack one of their two questions; they count as pairs of the one.")
        right = {}
        for item in (item for pair in pairs for item in pair.items):
            said = predictions.get(item.id, "")
            right[item.id] = float(mme_answer(said if strict_original else tidy(said)) == item.reference["answer"])
        there = {pair.items[0].kind for pair in pairs}
        for name, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
            absent = [one for one in categories if one not in there]
            if absent:
                notes.append(f"No questions of {', '.join(absent)}: 0 points of theirs in {name}.")
        return Report(metrics_of(pairs, right), "perception/20", right, tuple(notes))

    def neighbours(self, items: Sequence[Item], predictions: Mapping[str, str]) -> list[Pair]:
        """The pairs as the original makes them: neighbours in the answers' order.

        Raises:
            DataError: the original stops.
        """
        pairs = []
        way_out = "score without strict_original."
        every = {item.id: item for item in items}
        in_order = [every[id] for id in predictions if id in every]
        for category in PERCEPTION + COGNITION:
            answered = [item for item in in_order if item.kind == category]
            if not answered:
                raise DataError(
                    f"{self.title}: no answers in category {category}, where the original stops (no such file); {way_out}"
                )
            if len(answered) % PAIR:
                raise DataError(
                    f"{self.title}: {len(answered)} answers in category {category}, an odd number, where the original stops; {way_out}"
                )
            broken = next((item.id for item in answered if set(predictions[item.id]) & set("\t\n\r")), None)
            if broken is not None:
                raise DataError(
                    f"{self.title}: the answer to {broken!r} holds a tab or a line end, which breaks the original's file; {way_out}"
                )
            if all(mme_answer(predictions[item.id]) == "other" for item in answered):
                raise DataError(
                    f"{self.title}: no answer in category {category} says yes or no, where the original stops; {way_out}"
                )
            for start in range(0, len(answered), PAIR):
                pair = tuple(answered[start : start + PAIR])
                pairs.append(Pair(pair[0].cluster, pair))
        return pairs


@dataclass(frozen=True, slots=True)
class Pair:
    """The questions that make one point of acc+ together."""

    name: str
    items: tuple[Item, ...]


def by_picture(items: Sequence[Item]) -> list[Pair]:
    """The questions of each image."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.cluster, []).append(item)
    return [Pair(name, tuple(of)) for name, of in found.items()]


def question_of(text: str) -> str:
    """The question without either suffix, with single spaces."""
    return tidy(text.replace(SUFFIX, " ").replace(OFFICIAL_SUFFIX, " "))


def read_truth(root: ImageRoot, id: str, place: str) -> dict[str, str]:
    """The answers (yes or no) to the questions about one image, by question.

    Raises:
        DataError: the file is missing or damaged, or the id leads out of the folder.
    """
    category, name = id.split("/")[0], id.split("/")[-1].split(".")[0] + ".txt"
    tried = [root.path(f"{category}/{sub}{name}", place) for sub in ("questions_answers_YN/", "")]
    path = next((one for one in tried if one.is_file()), None)
    if path is None:
        raise DataError(f"{place}: neither {tried[0]} nor {tried[1]} exists; they come with the images of {ORIGIN}.")
    found = {}
    for number, line in enumerate(read_text(path).strip().split("\n"), start=1):
        parts = line.strip().split("\t")
        answer = parts[-1].strip().lower()
        if len(parts) != PAIR or answer not in ("yes", "no"):
            raise DataError(
                f"{path}, line {number}: {line!r:.80}; a question, a tab, and Yes or No are accepted; get the file again from {ORIGIN}."
            )
        found[question_of(parts[0])] = answer
    return found


def metrics_of(pairs: Sequence[Pair], right: Mapping[str, float]) -> dict[str, Metric]:
    """The totals over all clusters, and each category over its own."""
    categories = [name for name in PERCEPTION + COGNITION if any(pair.items[0].kind == name for pair in pairs)]
    names = tuple(pair.name for pair in pairs)
    sums = np.zeros((len(pairs), len(categories), STATISTICS))
    for index, pair in enumerate(pairs):
        hits = [right[item.id] for item in pair.items]
        sums[index, categories.index(pair.items[0].kind)] += (sum(hits), len(hits), min(hits), 1)
    flat = sums.reshape(len(pairs), -1)
    perception = tuple(index for index, name in enumerate(categories) if name in PERCEPTION)
    cognition = tuple(index for index, name in enumerate(categories) if name in COGNITION)
    metrics = {
        "perception/20": Metric(flat, partial(total, perception, 20), names),
        "perception": Metric(flat, partial(total, perception, 1), names, "points"),
        "cognition": Metric(flat, partial(total, cognition, 1), names, "points"),
    }
    for index, name in enumerate(categories):
        there = sums[:, index, -1] > 0
        of = tuple(pair for pair, kept in zip(names, there, strict=True) if kept)
        metrics[name] = Metric(sums[there, index], partial(total, (0,), 1), of, "points")
    return metrics


def total(
    chosen: tuple[int, ...], over: int, sums: Float[np.ndarray, "*draws statistics"]
) -> Float[np.ndarray, "*draws"]:
    """The points of the chosen categories (accuracy and share of pairs, 100 each) divided by a number.

    A resample of few images may have none of a category, which then counts as the mean of the others: with 0 points for it, even an
    interval of right answers alone would go below them.
    """
    apart = sums.reshape(*sums.shape[:-1], -1, STATISTICS)[..., list(chosen), :]
    points = ratio(apart[..., :2]) + ratio(apart[..., 2:])
    there = (apart[..., 1] > 0).sum(-1)
    return np.asarray(points.sum(-1) * len(chosen) / np.maximum(there, 1) / over)
