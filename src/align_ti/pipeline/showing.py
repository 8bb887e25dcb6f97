"""What the report shows of the inside of models: where they look in a few images, and what they say next along a few answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from align_ti.config import Teacher
from align_ti.data.collator import Collator
from align_ti.data.conversation import IMAGE_TAG, Conversation
from align_ti.data.groups import same_image_groups
from align_ti.data.lengths import last_response
from align_ti.data.roles import RESPONSE, VISUAL, encode, model_inputs
from align_ti.errors import BatchError, ConfigError, DataError, ModelError
from align_ti.interactions.candidates import CandidateOptions
from align_ti.interactions.layer_scores import similarities_of, visual_focus
from align_ti.models.branches import Branches
from align_ti.models.families import end_tokens, full_attention_layers, visual_grids
from align_ti.models.loading import best_device, load_processor
from align_ti.models.overrides import Projection
from align_ti.models.pairing import shared_ids
from align_ti.phases import part
from align_ti.pipeline.parts import load_teacher
from align_ti.runs import RunFolder, write_json
from align_ti.terms.readings import Reads, View, view
from align_ti.training.passes import first_pass, second_pass

INSTRUCTIONS = 4
"""Instructions of an image at most."""

STEPS = 6
"""Tokens of an answer that are followed."""

CANDIDATES = 3
"""Tokens that are tried at a step: the answer's own, and what the trained student finds most probable beside it."""

NEXT = 5
"""Next tokens that are told behind each candidate: those that any model finds most probable, in the order of the teacher."""

SIDE = 256
"""Pixels of an image's longer side at most."""

UNSHOWN = (BatchError, ConfigError, DataError, ModelError)
"""What says that a model, or these records, cannot be shown in this way."""


def show_inside(
    run: RunFolder,
    models: Mapping[str, Teacher],
    conversations: Sequence[Conversation],
    right: Mapping[str, Sequence[bool]],
    count: int,
    layer: int | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `looks.json` and `transitions.json` for the report, and the images that they are about.

    Each model is loaded once, one after the other. What cannot be shown of a model or of the records is left out, and a note in the
    file says why.

    Args:
        run: the run folder.
        models: by the names of the run's summary; the one called teacher is what others are measured by, the last one the trained
            student whose most probable tokens are tried.
        conversations: the records that models were measured on.
        right: whether each model's answer to each record is right.
        count: images and answers; with 0 nothing is written.
        layer: the teacher's layer, if it is known; by default the one with the highest IRS on these images.
        advance: called with the models that are done, and all of them.
    """
    if count == 0:
        return
    notes: list[str] = []
    try:
        groups = same_image_groups(conversations, count, INSTRUCTIONS)
    except DataError:
        groups = []
        notes.append("No image of these records has two different instructions, so attention maps are not shown.")
    answers = [Answer(conversations[index]) for index in chosen_records(conversations, right, count)]
    students = [name for name in models if name != "teacher"]
    focus: dict[str, Focus] = {}
    # The trained student first: what it would try is what all are asked about.
    for done, name in enumerate([*students[-1:], *(name for name in models if name not in students[-1:])]):
        advance(done, len(models))
        with part("load models"):
            model, processor = load_teacher(models[name], best_device()), load_processor(models[name].path)
        model.eval()
        with part("measure: inside"), torch.no_grad():
            try:
                focus[name] = focus_of(model, processor, groups)
            except UNSHOWN as error:
                notes.append(f"{name}: attention maps cannot be shown: {error}")
            for answer in answers:
                try:
                    answer.read_by(name, model, processor)
                except UNSHOWN as error:
                    notes.append(f"{name}: next-token distributions cannot be shown: {error}")
    advance(len(models), len(models))
    write_json(run.looks, {**told_looks(run, groups, focus, layer), "notes": notes})
    told = [one for number, answer in enumerate(answers) if (one := answer.told(run, number)) is not None]
    write_json(run.transitions, {"answers": told, "notes": notes})


def chosen_records(conversations: Sequence[Conversation], right: Mapping[str, Sequence[bool]], count: int) -> list[int]:
    """Records in which most was learnt, of as many kinds as there are: the teacher right, the last student too, the first one wrong."""
    students = [name for name in right if name != "teacher"]

    def learnt(index: int) -> int:
        score = int("teacher" in right and right["teacher"][index])
        if students:
            score += 2 * right[students[-1]][index] - right[students[0]][index]
        return score

    usable = [index for index, one in enumerate(conversations) if one.turns[-1].speaker == "assistant"]
    order = sorted(usable, key=lambda index: -learnt(index))
    chosen: list[int] = []
    while len(chosen) < min(count, len(order)):
        kinds: set[str] = set()
        for index in order:
            if index not in chosen and conversations[index].kind not in kinds and len(chosen) < count:
                kinds.add(conversations[index].kind)
                chosen.append(index)
    return chosen


# --- where models look ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Focus:
    """Where one model looks."""

    layers: tuple[int, ...]
    pictures: list[Float[Tensor, "layers instructions visual"]]
    """For each image the weights of its visual tokens, which sum to 1 for each instruction."""
    grids: list[tuple[int, int] | None]
    """Rows and columns of each image's visual tokens; None where they are no single grid, as of an image that is read in tiles."""

    @property
    def scores(self) -> dict[int, float]:
        """The IRS of each layer on these images."""
        mean = torch.cat([similarities_of(one) for one in self.pictures], dim=1).mean(1)
        return {layer: 1 - float(value) for layer, value in zip(self.layers, mean, strict=True)}


def focus_of(model: PreTrainedModel, processor: ProcessorMixin, groups: Sequence[Sequence[Conversation]]) -> Focus:
    """Where a model looks in each group's image.

    Raises:
        AlignTIError: its attention or its visual tokens cannot be read.
    """
    layers, collate = tuple(full_attention_layers(model)), Collator(processor.tokenizer.pad_token_id)
    found = Focus(layers, [], [])
    for number, group in enumerate(groups, start=1):
        made = collate([encode(one, processor, train=False) for one in group])
        batch = {name: value.to(model.device) for name, value in made.items()}
        seen = visual_focus(model, batch, layers, f"image {number}").double().cpu()
        found.pictures.append(seen / seen.sum(-1, keepdim=True))
        try:
            grids = visual_grids(model, model_inputs(batch), batch["roles"] == VISUAL)[0]
        except BatchError:
            grids = []
        found.grids.append(grids[0] if len(grids) == 1 else None)
    return found


def told_looks(
    run: RunFolder, groups: Sequence[Sequence[Conversation]], focus: Mapping[str, Focus], layer: int | None
) -> dict[str, Any]:
    """The content of `looks.json`: each model's layer and its IRS, and for each image the weights of each instruction.

    Students are shown at one layer, the one with the highest mean IRS over them, so that before and after are the same layer.
    """
    if not groups or not focus:
        return {"models": {}, "pictures": []}
    chosen: dict[str, int] = {}
    students = {name: one for name, one in focus.items() if name != "teacher"}
    for depth in {one.layers for one in students.values()}:
        alike = {name: one.scores for name, one in students.items() if one.layers == depth}
        best = max(depth, key=lambda index: sum(scores[index] for scores in alike.values()))
        chosen |= dict.fromkeys(alike, best)
    if "teacher" in focus:
        scores = focus["teacher"].scores
        chosen["teacher"] = (
            layer if layer is not None and layer in scores else max(scores, key=lambda index: scores[index])
        )
    pictures = []
    for number, group in enumerate(groups):
        shown = {}
        for name, one in focus.items():
            grid = one.grids[number]
            if grid is not None:
                rows = one.pictures[number][one.layers.index(chosen[name])]
                shown[name] = {
                    "grid": list(grid),
                    "weights": [[round(value, 5) for value in row] for row in rows.tolist()],
                }
        if shown:
            texts = [one.turns[-1].text.replace(IMAGE_TAG, "").strip() for one in group]
            pictures.append({"picture": kept(run, group[0], f"look-{number}"), "instructions": texts, "models": shown})
    told = {
        name: {"layer": chosen[name], "scores": {str(index): round(value, 5) for index, value in one.scores.items()}}
        for name, one in focus.items()
    }
    return {"models": told, "pictures": pictures}


def kept(run: RunFolder, of: Conversation, name: str) -> str | None:
    """The record's first image, small, in the folder `shown`; its name there, or None if the record has none."""
    if not of.images:
        return None
    run.shown.mkdir(parents=True, exist_ok=True)
    small: Image.Image = of.pictures()[0].convert("RGB")
    small.thumbnail((SIDE, SIDE))
    small.save(run.shown / f"{name}.png")
    return f"{name}.png"


# --- what models say next ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """A record's right answer, and what each model makes of it."""

    record: Conversation
    ids: list[int] = field(default_factory=list)
    """The tokens of the answer that are followed."""
    tried: list[list[int]] = field(default_factory=list)
    """The candidates of each step, the answer's own token first."""
    processor: ProcessorMixin | None = None
    """The first model's, which has the words of the tokens."""
    steps: dict[str, Float[Tensor, "steps tokens"]] = field(default_factory=dict)
    """Each model's log probabilities at each step."""
    behind: dict[str, list[Float[Tensor, "candidates tokens"]]] = field(default_factory=dict)
    """And behind each candidate of each step."""
    shared: list[int] = field(default_factory=list)
    """The ids that all models so far know."""

    def read_by(self, name: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        """One model reads the answer and every candidate; the first model says which candidates there are.

        Raises:
            AlignTIError: the record or the candidates cannot be read.
        """
        sample = encode(self.record, processor)
        of = view(model, Collator(processor.tokenizer.pad_token_id)([sample]))
        start = last_response(of.roles[0])
        ends, ids = end_tokens(model), of.inputs["input_ids"][0]
        places = [place for place in range(start, min(start + STEPS, len(ids))) if answers(of, place, ends)]
        options, head = CandidateOptions(), Projection(model)
        first = first_pass(of, options, Reads(), drawn_from=True)
        assert first is not None
        steps = head(first.hidden[0, [place - 1 for place in places]]).float().log_softmax(-1).cpu()
        if self.processor is None:
            self.ids = [int(ids[place]) for place in places]
            self.processor, self.shared = processor, list(range(steps.shape[1]))
            self.tried = [candidates(row, token, ends) for row, token in zip(steps, self.ids, strict=True)]
        elif self.ids != [int(ids[place]) for place in places]:
            raise DataError(f"{self.record.place}: the models read different tokens of the answer.")
        vocabularies = self.processor.tokenizer.get_vocab(), processor.tokenizer.get_vocab()
        known = set(shared_ids(*vocabularies, steps.shape[1]))
        self.shared = [token for token in self.shared if token in known]
        tokens = torch.tensor([token for step in self.tried for token in step], device=ids.device)
        if not len(tokens):
            return
        replaces = torch.tensor(
            [place for place, step in zip(places, self.tried, strict=True) for _ in step], device=ids.device
        )
        rows = second_pass(of, first, Reads(), Branches.of(torch.zeros_like(tokens), tokens, replaces, 1))[1]
        assert rows is not None
        behind = head(rows).float().log_softmax(-1).cpu()
        self.steps[name], self.behind[name] = steps, list(behind.split([len(step) for step in self.tried]))

    def told(self, run: RunFolder, number: int) -> dict[str, Any] | None:
        """The answer's part of `transitions.json`; None if no model could read it."""
        if not self.behind:
            return None
        question, steps = self.record.turns[-2].text, []
        goal = self.behind.get("teacher")
        for place, tried in enumerate(self.tried):
            told = []
            for index, token in enumerate(tried):
                rows = {name: behind[place][index][self.shared].double() for name, behind in self.behind.items()}
                rows = {name: row - row.logsumexp(-1) for name, row in rows.items()}
                told.append(
                    {
                        "token": self.word(token),
                        "own": index == 0,
                        "probability": {name: chance(of[place, token]) for name, of in self.steps.items()},
                        "kl": {}
                        if goal is None
                        else {
                            name: divergence(rows["teacher"], row) for name, row in rows.items() if name != "teacher"
                        },
                        "next": self.next_of(rows),
                    }
                )
            steps.append({"token": self.word(self.ids[place]), "candidates": told})
        return {
            "picture": kept(run, self.record, f"answer-{number}"),
            "kind": self.record.kind,
            "question": question.replace(IMAGE_TAG, "").strip(),
            "answer": self.record.turns[-1].text,
            "steps": steps,
        }

    def word(self, token: int) -> str:
        """A token as text."""
        assert self.processor is not None
        return visible(self.processor, token)

    def next_of(self, rows: Mapping[str, Float[Tensor, " shared"]]) -> list[dict[str, Any]]:
        """The next tokens that are told behind a candidate, and each model's probability of them."""
        first = rows.get("teacher", next(iter(rows.values())))
        most = torch.stack(list(rows.values())).max(0).values
        chosen = most.topk(min(NEXT, len(most))).indices.tolist()
        chosen.sort(key=lambda index: -float(first[index]))
        return [
            {
                "token": self.word(self.shared[index]),
                "probability": {name: chance(row[index]) for name, row in rows.items()},
            }
            for index in chosen
        ]


def candidates(row: Float[Tensor, " tokens"], own: int, ends: Sequence[int]) -> list[int]:
    """The tokens that are tried at a step: the answer's own, and the most probable others that end no turn."""
    order = row.topk(min(len(row), CANDIDATES + len(ends) + 1)).indices.tolist()
    return [own, *(token for token in order if token != own and token not in ends)][:CANDIDATES]


def answers(of: View, place: int, ends: Sequence[int]) -> bool:
    """Whether a word of an answer stands there."""
    return int(of.roles[0, place]) == RESPONSE and int(of.inputs["input_ids"][0, place]) not in ends


def visible(processor: ProcessorMixin, token: int) -> str:
    """A token as text; what cannot be printed is made visible."""
    text: str = processor.tokenizer.decode([token])
    return "".join(letter if letter.isprintable() else f"<{ord(letter):02X}>" for letter in text) or f"<{token}>"


def chance(log_probability: Tensor) -> float:
    """A probability, to a hundredth of a per cent."""
    return round(float(log_probability.exp()), 4)


def divergence(teacher: Float[Tensor, " tokens"], student: Float[Tensor, " tokens"]) -> float:
    """KL(teacher || student) in nats, from log probabilities."""
    return round(float((teacher.exp() * (teacher - student)).nansum()), 4)
