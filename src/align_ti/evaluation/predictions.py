"""A model's answers to a benchmark in a file: written as they are made, gone on with after a stop, read back, whoever made them.

Imports no torch. The first line of a file says who answered what, and how (`About`); each further line is one answer. While answers
are made they lie in part files beside it, one for each process; the file itself appears at once, when every question has an answer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align_ti.data.answers import parsed, picture_mark
from align_ti.data.conversation import IMAGE_TAG, Conversation, Turn
from align_ti.data.sources import json_rows, parse
from align_ti.errors import DataError, RunError
from align_ti.evaluation.benchmarks.base import Item

HEADER = "predictions"
"""The key of a file's first line."""

IDS = ("id", "question_id", "questionId", "index", "doc_id")
"""Where a record's id is looked for, in this order: ours, LLaVA's, GQA's, MMBench's, lmms-eval's."""

TEXTS = ("text", "prediction", "response", "filtered_resps", "answer")
"""Where a record's words are looked for, in this order. `answer` last: beside a prediction it is the right answer."""


@dataclass(frozen=True, slots=True)
class About:
    """Who answered what, and every setting that answers depend on."""

    model: str
    weights: str
    """A digest of the model's files, or the hub's commit."""
    benchmark: str
    questions: str
    """A digest of what was asked (`questions_digest`)."""
    settings: Mapping[str, Any]

    def line(self) -> str:
        """The first line of a file."""
        return json.dumps({HEADER: asdict(self)}, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer."""

    id: str
    text: str
    prompt: str
    """The user's words, as they were asked."""
    cut: bool
    """Whether the answer was cut at the token limit."""

    def line(self) -> str:
        """One line of a file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def questions_digest(items: Sequence[Item]) -> str:
    """A digest of what is asked: ids, words and images (files by their name, others by what they are), in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.text, [picture_mark(image) for image in item.images]]).encode())
    return digest.hexdigest()[:32]


def images_digest(items: Sequence[Item]) -> str:
    """A digest of the names and sizes of the images' files: two sets of images may have the same names."""
    told = [[image.name, image.stat().st_size] for item in items for image in item.images if isinstance(image, Path)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def whole_clusters(clusters: Sequence[str], limit: int | None, kinds: Sequence[str] | None = None) -> list[int]:
    """The places of as many clusters as have at least `limit` of them, in order; all of them without a limit.

    Clusters stay whole, since scores need them whole (MME's pairs, MMBench's rotations). They are taken by a digest of their names:
    from everywhere in the file, the same for every model, and a larger limit adds to a smaller one. Of each kind (that of a cluster's
    first question) as large a part is taken, since a score may be a sum over kinds, as MME's is.
    """
    if limit is None:
        return list(range(len(clusters)))
    kind_of = dict(zip(reversed(clusters), reversed(kinds or [""] * len(clusters)), strict=True))
    of_kind: dict[str, list[str]] = {}
    for name in sorted(kind_of, key=lambda name: hashlib.sha256(name.encode()).digest()):
        of_kind.setdefault(kind_of[name], []).append(name)
    # The j-th of n clusters of a kind comes when (j + 1/2) / n of all are taken; the sort leaves the digests' order among equals.
    turn = {name: (at + 0.5) / len(names) for names in of_kind.values() for at, name in enumerate(names)}
    sizes, chosen, count = Counter(clusters), set[str](), 0
    for name in sorted(turn, key=lambda name: (turn[name], hashlib.sha256(name.encode()).digest())):
        if count >= limit:
            break
        chosen.add(name)
        count += sizes[name]
    return [index for index, name in enumerate(clusters) if name in chosen]


def subset(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The questions of whole clusters, at least `limit` of them; all of them without a limit."""
    clusters, kinds = [item.cluster for item in items], [item.kind or "" for item in items]
    return [items[index] for index in whole_clusters(clusters, limit, kinds)]


def conversation_of(item: Item) -> Conversation:
    """The question as a conversation: the images, and the user's words behind them.

    Raises:
        DataError: it cannot be asked, such as words with an image tag in them.
    """
    turn = Turn("user", IMAGE_TAG * len(item.images) + item.text)
    return Conversation((turn,), item.images, place=item.place or f"question {item.id}", kind=item.kind)


# --- written ----------------------------------------------------------------------------------------------------------


def part_path(out: Path, process: int) -> Path:
    """The part file of a process, beside the file that it becomes part of."""
    return out.with_name(f"{out.stem}.part-{process}{out.suffix}")


def part_paths(out: Path) -> list[Path]:
    """The part files that are there, of however many processes."""
    return sorted(out.parent.glob(f"{out.stem}.part-*{out.suffix}"))


def made_so_far(out: Path, about: About) -> dict[str, Prediction]:
    """The answers that earlier calls have left, in the file and in its parts, by id. Nothing is changed.

    Raises:
        RunError: a file holds something else, or was made by another model, to other questions or by other settings.
    """
    found: dict[str, Prediction] = {}
    # A file that was cut off, by a full disk or a copy, has its rest in parts.
    for path in [*([out] if out.exists() else []), *part_paths(out)]:
        for prediction in whole_lines(path, about)[0]:
            found[prediction.id] = prediction
    return found


def whole_lines(path: Path, about: About) -> tuple[list[Prediction], int]:
    """The answers in a file of ours, and the bytes up to the end of the last whole line: a kill can leave half of a line behind it.

    Raises:
        RunError: it holds something else, or was made otherwise.
    """
    made: list[Prediction] = []
    stop = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                start = f'{{"{HEADER}": {{'.encode()
                if number == 1 and not (raw.startswith(start) or start.startswith(raw)):
                    raise not_ours(f"{path}, line 1", path)
                break
            content = parsed(raw)
            if number == 1:
                check_header(content, path, about)
            else:
                made.append(own_prediction(content, f"{path}, line {number}", path))
            stop += len(raw)
    return made, stop


def check_header(content: Any, path: Path, about: About) -> None:
    """Refuse a file that was made otherwise.

    Raises:
        RunError: what differs is named.
    """
    before = header_in(content)
    if before is None:
        raise not_ours(f"{path}, line 1", path)
    then, now = flat(before), flat(about)
    if before.weights == about.weights:
        # The same model by another name, such as a path from elsewhere.
        then["model"] = now["model"]
    differ = [
        f"{name} is {then.get(name)!r} there and {now.get(name)!r} here"
        for name in dict.fromkeys([*then, *now])
        # Files of earlier versions do not tell of the images.
        if then.get(name) != now.get(name) and not (name == "images" and name not in then)
    ]
    if differ:
        raise RunError(
            f"{path}: the file has predictions with other settings ({'; '.join(differ)}); it can be resumed only with the same "
            "model, questions and settings; choose another folder (--out), or remove this file."
        )


def flat(about: About) -> dict[str, Any]:
    """What a header says, settings beside the rest."""
    told = asdict(about)
    settings: dict[str, Any] = told.pop("settings")
    return told | settings


def header_in(content: Any) -> About | None:
    """The header that a first line holds, or None if it is none of ours."""
    told = content.get(HEADER) if isinstance(content, dict) else None
    if not isinstance(told, dict) or set(told) != set(About.__dataclass_fields__):
        return None
    texts = [told[name] for name in ("model", "weights", "benchmark", "questions")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(told["settings"], dict):
        return None
    return About(**told)


def own_prediction(content: Any, place: str, path: Path) -> Prediction:
    """The answer in a line of ours.

    Raises:
        RunError: it is none.
    """
    kinds = {"id": str, "text": str, "prompt": str, "cut": bool}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
        raise not_ours(place, path)
    return Prediction(**{name: content[name] for name in kinds})


def not_ours(place: str, path: Path) -> RunError:
    """The error for a file that holds something else."""
    return RunError(
        f"{place}: no line of `align-ti evaluate --tasks`; nothing is written over; choose another folder than {path.parent} (--out), "
        "or remove this file."
    )


@dataclass(slots=True)
class Writer:
    """Adds answers to the part file of one process, a batch at a time.

    Args:
        path: the part file; half of a last line is removed from it.
        about: what its header says.
    """

    path: Path
    about: About
    size: int = field(init=False, default=0)
    """Bytes of the file as this call left it."""

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.size = whole_lines(self.path, self.about)[1]
            os.truncate(self.path, self.size)

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Append the answers of one batch; they are on their way to the disk when this returns.

        Raises:
            RunError: another process writes to the file.
        """
        text = "".join(prediction.line() for prediction in predictions)
        if (self.path.stat().st_size if self.path.exists() else 0) != self.size:
            raise RunError(
                f"{self.path} has changed since this command wrote to it; one command may write to a folder at a time; end the other "
                "one, and run the command again."
            )
        if self.size == 0:
            text = self.about.line() + text
        with self.path.open("ab") as file:
            self.size += file.write(text.encode())


def join_parts(out: Path, about: About, items: Sequence[Item]) -> list[Prediction]:
    """Writes the whole file from what is there, in the benchmark's own order, and removes its parts; gives the answers.

    Raises:
        RunError: a question has no answer.
    """
    made = made_so_far(out, about)
    missing = [item for item in items if item.id not in made]
    parts = part_paths(out)
    if missing:
        there = ", ".join(map(str, parts)) or "any part file"
        raise RunError(
            f"{out}: {len(missing)} of {len(items)} questions have no answer in {there} (the first: {missing[0].id!r}); all processes "
            "must write to one folder; give one (--out) that they share, and run the command again."
        )
    answers = [made[item.id] for item in items]
    if parts or not out.exists():
        draft = out.with_name(f".{out.name}")
        out.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(about.line().encode())
            file.writelines(answer.line().encode() for answer in answers)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(out)
    for path in parts:
        path.unlink()
    return answers


# --- read -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """What a file of predictions says."""

    texts: Mapping[str, str]
    """The answers by the id of their question."""
    items: Sequence[Item]
    """The questions that were asked: all of them, or those that a limit left."""
    about: About | None
    """Who answered and how, if the file says so."""
    cut: int
    """Answers that the file marks as cut at the token limit."""


def read_predictions(path: Path, items: Sequence[Item], benchmark: str) -> Read:
    """The predictions in a file, ours or another tool's, joined with a benchmark's questions.

    Another tool's file has a record for each question: its id under one of `IDS`, the words under one of `TEXTS`, as JSONL, as a JSON
    list, or as a JSON object of words by id. Where an id is not the question's own (LLaVA numbers images, not questions, in TextVQA
    and MME), the record's `prompt` tells which one is meant. Questions without a prediction are left to the score.

    Args:
        path: the file.
        items: the benchmark's questions.
        benchmark: its name.

    Raises:
        DataError: the file cannot be read, is of another benchmark or of other questions, names a question that is not there, or one
            twice.
    """
    if path.suffix not in {".json", ".jsonl"}:
        raise DataError(
            f"{path}: predictions are read from .jsonl (a record a line) or .json (a list of records, or an object of answers by id); "
            "convert the file."
        )
    rows = iter(prediction_rows(path))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path}: no predictions found; at least one is needed; check that this is the right file.")
    about = header_in(first[1])
    if about is not None:
        items = those_asked(items, about, path, benchmark)
    else:
        rows = iter([first, *rows])
    questions = Questions(items, benchmark)
    texts, places, cut = dict[str, str](), dict[str, str](), 0
    for place, raw in rows:
        item, text = questions.answered(place, raw)
        if item.id in places:
            raise DataError(
                f"{place}: a second prediction for question {item.id!r}, after {places[item.id]}; one for each question is accepted; "
                "remove one of them."
            )
        places[item.id], texts[item.id] = place, text
        cut += raw.get("cut") is True
    if texts and all(" ".join(texts[item.id].split()) == shown(item.text) for item in items if item.id in texts):
        raise DataError(
            f"{path}: every prediction is its own question, word by word, so this is a file of questions; give the file of answers."
        )
    return Read(texts, items, about, cut)


def prediction_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with its place; an object of answers by id gives a record each.

    Raises:
        DataError: the file cannot be read, or one of its lines is no JSON.
    """
    if path.suffix == ".json" and path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8.") from error
        if isinstance(parse(text, str(path)), dict):
            # As pairs: of a key that stands twice, an object would keep the last one without a word.
            pairs = json.loads(text, object_pairs_hook=list)
            yield from ((f"{path}, key {name!r}", {"id": name, "text": said}) for name, said in pairs)
            return
    if not path.exists():
        raise DataError(f"{path}: the file of predictions does not exist; check its name.")
    for place, raw in json_rows(path):
        if isinstance(raw, DataError):
            raise DataError(
                f"{raw} A file that was cut off while it was written ends so: finish it with the tool that made it."
            ) from raw
        yield place, raw


def those_asked(items: Sequence[Item], about: About, path: Path, benchmark: str) -> list[Item]:
    """The questions that a file of ours answers.

    Raises:
        DataError: it is of another benchmark, or its questions have changed since.
    """
    if about.benchmark != benchmark:
        raise DataError(
            f"{path}: predictions on {about.benchmark!r}, not on {benchmark!r}; those of the task are accepted; score them by --task "
            f"{about.benchmark}."
        )
    limit = about.settings.get("limit")
    asked = subset(items, limit if isinstance(limit, int) else None)
    if (now := questions_digest(asked)) != about.questions:
        raise DataError(
            f"{path}: answers to other questions ({about.questions}) than the folder holds now ({now}): ids, words or images' names "
            f"differ, or their order; give the folder that they were made from (--data), or evaluate the model again."
        )
    return asked


class Questions:
    """The questions of a benchmark, found by what a record says.

    Args:
        items: the questions.
        benchmark: the benchmark's name, for errors.
    """

    def __init__(self, items: Sequence[Item], benchmark: str) -> None:
        self.benchmark = benchmark
        self.by_id = {item.id: item for item in items}
        self.by_picture: dict[str, list[tuple[str, Item]]] = {}
        """Of ids that are an image's and a question's words: the questions, by the image's."""
        for item in items:
            name, _, words = item.id.partition(" ")
            self.by_picture.setdefault(name, []).append((shown(words).lower(), item))

    def answered(self, place: str, raw: Any) -> tuple[Item, str]:
        """The question that a record answers, and its words.

        Raises:
            DataError: the record names no question of the benchmark, or has no words.
        """
        if not isinstance(raw, dict):
            raise DataError(
                f"{place}: {type(raw).__name__} found; an object with the question's id ({', '.join(IDS)}) and the answer's words "
                f"({', '.join(TEXTS)}) is accepted; give such records."
            )
        found = next((raw[name] for name in IDS if name in raw), None)
        if not isinstance(found, str | int) or isinstance(found, bool):
            raise DataError(
                f"{place}: the id is {found!r}; text or a whole number under one of {', '.join(IDS)} is accepted; add it."
            )
        text = next((raw[name] for name in TEXTS if name in raw), None)
        if isinstance(text, list) and len(text) == 1:  # lmms-eval's filtered responses
            text = text[0]
        if not isinstance(text, str):
            raise DataError(
                f"{place}: the answer is {text!r}; text under one of {', '.join(TEXTS)} is accepted (empty if the model said nothing); "
                f"add it."
            )
        prompt = raw.get("prompt")
        return self.meant(str(found), prompt if isinstance(prompt, str) else None, place), text

    def meant(self, name: str, prompt: str | None, place: str) -> Item:
        """The question of this id, or of these words about the image of this id.

        Raises:
            DataError: there is none, there are several, or it asks something else.
        """
        words = None if prompt is None else shown(prompt)
        item = self.by_id.get(name)
        if item is None and words:
            about = [(asked, one) for asked, one in self.by_picture.get(name, []) if asked and asked in words.lower()]
            # One question's words may stand in another's.
            about = [(asked, one) for asked, one in about if shown(one.text) == words] or about
            item = about[0][1] if len(about) == 1 else None
        if item is None:
            example, asked = next(iter(self.by_id)), "" if words is None else f" with these words ({words!r:.80})"
            raise DataError(
                f"{place}: {self.benchmark} has no question {name!r}{asked}; it has {len(self.by_id)}, such as {example!r}; check that "
                "predictions and task fit each other."
            )
        asked = shown(item.text)
        # Another tool may keep the words without the suffix, or inside its template.
        if words and words not in asked and asked not in words:
            raise DataError(
                f"{place}: the answer to question {name!r} is to {words!r:.120}, but {self.benchmark} asks {asked!r:.120}; answers to "
                "the same questions are accepted; give the file that belongs to these questions, or leave `prompt` out of the records "
                "if they were meant to be asked otherwise."
            )
        return item


def shown(text: str) -> str:
    """The words of a prompt, without image tags and with single spaces."""
    return " ".join(text.replace(IMAGE_TAG, " ").split())
