"""POPE: is an object in the image, three ways of choosing objects that are not. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from align_ti.data.records import ImageRoot
from align_ti.errors import DataError
from align_ti.evaluation.benchmarks.answers import check, kinds, notes_on, tidy, zero_note
from align_ti.evaluation.benchmarks.base import Benchmark, Item, Report
from align_ti.evaluation.benchmarks.files import (
    EVAL_ZIP,
    Source,
    field,
    read_lines,
    refuse_twice,
    task_folder,
)
from align_ti.evaluation.metrics import Metric, ratio
from align_ti.evaluation.scoring import pope_answer

QUESTIONS = Source(("llava_pope_test.jsonl",), EVAL_ZIP)
LABELS_ORIGIN = "output/coco of https://github.com/AoiDragon/POPE at commit e3e39262c85a6a83f26cf5094022a782cb0df58d"
SPLITS = ("adversarial", "popular", "random")
PUBLISHED = 8910

ABOUT = re.compile(r"Is there an? (.+?) in the ima\w+\s*\??", re.IGNORECASE)

COUNTS = ("true_positive", "false_positive", "true_negative", "false_negative", "said_yes", "asked")
"""The statistics of a split; yes is positive. A missing prediction is a false one, and no yes."""


class Pope(Benchmark):
    """POPE by LLaVA's protocol, but joined by image and object."""

    name = "pope"
    title = "POPE"
    max_new_tokens = 128

    def items(self, folder: Path) -> list[Item]:
        """The questions of `llava_pope_test.jsonl` with the labels of `coco/coco_pope_{split}.json`."""
        folder = task_folder(folder, "pope", QUESTIONS)
        records = list(read_lines(QUESTIONS.path(folder), QUESTIONS.origin))
        root = ImageRoot(folder / "val2014")
        count = Counter(split_of(record, place) for record, place in records)
        labels = {split: read_labels(folder, split) for split in count}
        asked: Counter[str] = Counter()
        items = []
        for record, place in records:
            split, image, text = (field(record, name, place) for name in ("category", "image", "text"))
            ordered, by_key, path = labels[split]
            key = (image, object_of(text))
            if key not in by_key:
                raise DataError(
                    f"{place}: {path} has no label for {key[1]!r} in image {image!r}; it holds {len(ordered)} labels, there are "
                    f"{count[split]} {split} questions, so the two differ in version; get the labels from {LABELS_ORIGIN}."
                )
            number = asked[split]
            asked[split] += 1
            items.append(
                Item(
                    id=field(record, "question_id", place),
                    text=text,
                    images=(root.path(image, place),),
                    cluster=image,
                    kind=split,
                    reference={
                        "label": by_key[key],
                        "label_in_order": ordered[number] if number < len(ordered) else None,
                        "labels": len(ordered),
                        "questions": count[split],
                    },
                    place=place,
                )
            )
        refuse_twice(items, QUESTIONS.origin)
        return items

    def score(self, items: Sequence[Item], predictions: Mapping[str, str], *, strict_original: bool = False) -> Report:
        """Accuracy, precision, recall, F1 and share of yes of each split; the mean of the splits' F1 in front.

        Strictly, answers and labels are joined by their order and cut to the shorter, nothing is tidied, and a denominator of 0 is an
        error.
        """
        check(items, predictions, self.title)
        splits = tuple(sorted(kinds(items)))
        notes = notes_on(
            items, predictions, PUBLISHED, "the labels move up, as in the original" if strict_original else ""
        )
        counted: list[tuple[str, str, Counts]] = []
        right: dict[str, float] = {}
        for split in splits:
            of = [item for item in items if item.kind == split]
            labels, questions = of[0].reference["labels"], of[0].reference["questions"]
            if labels != questions:
                notes.append(
                    f"coco_pope_{split}.json holds {labels} labels for {questions} questions; they are joined by "
                    f"{'order, as by the original' if strict_original else 'image and object'}."
                )
            found = in_order(of, predictions) if strict_original else by_picture(of, predictions)
            if not found:
                raise DataError(
                    f"{self.title}: no answers to the {split} questions, where the original divides by zero; score without "
                    "strict_original."
                )
            counted += [(item.cluster, split, counts) for item, counts in found]
            right |= {item.id: float(counts[0] + counts[2]) for item, counts in found}
        for split in (one for one in SPLITS if one not in splits):
            notes.append(f"No {split} questions: the mean F1 is over {', '.join(splits)}.")
        metrics = metrics_of(counted, splits)
        for split in splits:
            total = np.sum([counts for _, of, counts in counted if of == split], axis=0)
            notes += self.zeros(split, dict(zip(COUNTS, total, strict=True)), strict_original)
        return Report(metrics, "f1", right, tuple(notes))

    def zeros(self, split: str, total: Mapping[str, float], strict: bool) -> list[str]:
        """A note about each denominator of a split that is 0.

        Raises:
            DataError: one is 0, and the original's behaviour is asked for.
        """
        true, false = total["true_positive"], total["false_positive"]
        notes = []
        if true + false == 0:
            notes.append(zero_note(f"{split} precision", "is no answer yes"))
        if true + total["false_negative"] == 0:
            notes.append(zero_note(f"{split} recall", "is no label yes"))
        if true == 0 and not notes:
            notes.append(
                zero_note(f"{split} F1", f"is no right yes (precision and recall are 0; {false:.0f} wrong ones)")
            )
        if strict and notes:
            raise DataError(
                f"{self.title}: {notes[0].removesuffix('; the original stops there.')}, where the original divides by zero; score "
                "without strict_original."
            )
        return notes


def split_of(record: Mapping[str, Any], place: str) -> str:
    """The split that a question belongs to.

    Raises:
        DataError: it is none of POPE's.
    """
    split = field(record, "category", place)
    if split not in SPLITS:
        raise DataError(
            f"{place}: category {split!r:.60}; accepted: {', '.join(SPLITS)}; get the file from {QUESTIONS.origin}."
        )
    return split


def object_of(text: str) -> str:
    """What a question asks for; the whole first line if it is worded otherwise."""
    first = text.strip().split("\n")[0].strip()
    found = ABOUT.fullmatch(first)
    return (found[1] if found else first).lower()


def read_labels(folder: Path, split: str) -> tuple[list[str], dict[tuple[str, str], str], Path]:
    """A split's labels in their order, and by image and object, and the file.

    Raises:
        DataError: the file is missing or damaged, or contradicts itself.
    """
    path = Source((f"coco/coco_pope_{split}.json",), LABELS_ORIGIN).path(folder)
    ordered: list[str] = []
    by_key: dict[tuple[str, str], str] = {}
    for record, place in read_lines(path, LABELS_ORIGIN):
        # The original takes every other label for yes.
        label = field(record, "label", place)
        if label not in ("yes", "no"):
            raise DataError(
                f"{place}: the label is {label!r:.60}; 'yes' and 'no' are accepted; get the file from {LABELS_ORIGIN}."
            )
        key = (field(record, "image", place), object_of(field(record, "text", place)))
        if by_key.setdefault(key, label) != label:
            raise DataError(
                f"{place}: {key[1]!r} in {key[0]!r} is labelled yes and no; get the file again from {LABELS_ORIGIN}."
            )
        ordered.append(label)
    return ordered, by_key, path


Counts = tuple[float, ...]


def confusion(answer: str | None, label: str) -> Counts:
    """What one question adds to `COUNTS`."""
    # A missing answer is wrong, whatever the label.
    wrong = {"yes": "no", "no": "yes"}[label]
    taken = wrong if answer is None else answer
    return (
        float(taken == label == "yes"),
        float(taken == "yes" and label == "no"),
        float(taken == label == "no"),
        float(taken == "no" and label == "yes"),
        float(answer == "yes"),
        1.0,
    )


def by_picture(items: Sequence[Item], predictions: Mapping[str, str]) -> list[tuple[Item, Counts]]:
    """What each question of a split counts, joined by image and object."""
    said = [predictions.get(item.id) for item in items]
    return [
        (item, confusion(None if text is None else pope_answer(tidy(text)), item.reference["label"]))
        for item, text in zip(items, said, strict=True)
    ]


def in_order(items: Sequence[Item], predictions: Mapping[str, str]) -> list[tuple[Item, Counts]]:
    """What each answer of a split counts, joined with the labels by the answers' order.

    One without a label counts for the share of yes alone.
    """
    labels = [item.reference["label_in_order"] for item in items]
    of = {item.id: item for item in items}
    answered = [of[id] for id in predictions if id in of]
    found = []
    for item, label in zip(answered, labels, strict=False):
        answer = pope_answer(predictions[item.id])
        counts = confusion(answer, label) if label else (0.0, 0.0, 0.0, 0.0, float(answer == "yes"), 1.0)
        found.append((item, counts))
    return found


def metrics_of(counted: Sequence[tuple[str, str, Counts]], splits: Sequence[str]) -> dict[str, Metric]:
    """The mean of the F1, then each split's scores, all over the same clusters."""
    clusters = tuple(dict.fromkeys(cluster for cluster, _, _ in counted))
    number = {cluster: index for index, cluster in enumerate(clusters)}
    sums = np.zeros((len(clusters), len(splits), len(COUNTS)))
    for cluster, split, counts in counted:
        sums[number[cluster], splits.index(split)] += counts
    flat = sums.reshape(len(clusters), -1)
    metrics = {"f1": Metric(flat, partial(mean_f1, len(splits)), clusters)}
    for index, split in enumerate(splits):
        # The images of a split alone, so that its interval resamples them and no others.
        there = sums[:, index, COUNTS.index("asked")] > 0
        names = tuple(cluster for cluster, kept in zip(clusters, there, strict=True) if kept)
        for name, value in VALUES.items():
            metrics[f"{split} {name}"] = Metric(sums[there, index], value, names)
    return metrics


Sums = Float[np.ndarray, "*draws six"]
Values = Float[np.ndarray, "*draws"]


def share(above: Any, below: Any) -> Values:
    """100 times one over the other; 0 where the other is 0."""
    return ratio(np.stack([above, below], axis=-1))


def accuracy(sums: Sums) -> Values:
    """Right answers over all that have a label."""
    return share(sums[..., 0] + sums[..., 2], sums[..., :4].sum(-1))


def precision(sums: Sums) -> Values:
    """Right yes over all yes."""
    return share(sums[..., 0], sums[..., 0] + sums[..., 1])


def recall(sums: Sums) -> Values:
    """Right yes over all labels yes."""
    return share(sums[..., 0], sums[..., 0] + sums[..., 3])


def f1(sums: Sums) -> Values:
    """The harmonic mean of precision and recall."""
    return share(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 3])


def yes_ratio(sums: Sums) -> Values:
    """Answers yes over all questions."""
    return share(sums[..., 4], sums[..., 5])


def mean_f1(splits: int, sums: Float[np.ndarray, "*draws all"]) -> Values:
    """The mean of the splits' F1."""
    return np.asarray(f1(sums.reshape(*sums.shape[:-1], splits, len(COUNTS))).mean(-1))


VALUES = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes ratio": yes_ratio}
