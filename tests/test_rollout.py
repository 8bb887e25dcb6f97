"""On-policy batches: answers are the student's own distribution, and the batch they make is one that could have come from the data."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TrainingArguments

from align_ti.config import Iva, Kd, Objective, OnPolicy, Recipe, Sft, Tpa
from align_ti.data.roles import TEACHER_HIDDEN
from align_ti.data.sources import read_conversations
from align_ti.errors import BatchError, ConfigError, InterruptedRunError, ModelError
from align_ti.models.loading import load_model, load_processor
from align_ti.models.pairing import Pairing
from align_ti.pipeline.training import distil
from align_ti.runs import RunFolder
from align_ti.training.objective import distillation_loss
from align_ti.training.rollout import respond
from align_ti.training.trainer import AlignTITrainer
from align_ti.training.watch import WARM_UP, RunRecorder
from tests import family_plain as plain
from tests import small, tiny
from tests.family_models import COMPOSITIONS, FAMILIES
from tests.launching import on_processes
from tests.test_objective_twins import only
from tests.test_trainer import Stop

STUDENT, TEACHER = tiny.model(1), tiny.model(2, hidden=48, layers=3)
GREEDY = OnPolicy(temperature=1e-6, max_new_tokens=6)
"""So cold that the most probable token is drawn."""
FREE = OnPolicy(temperature=3.0, max_new_tokens=8)
"""So hot that every token is drawn now and then."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real(batch: dict, name: str, sample: int) -> list[int]:
    """The entries of one sample's real tokens."""
    return batch[name][sample][batch["attention_mask"][sample].bool()].tolist()


def begin(roles: list[int]) -> int:
    """Where the last run of response tokens begins."""
    stop = max(place for place, role in enumerate(roles) if role == 3)
    return max((place for place, role in enumerate(roles[:stop]) if role != 3), default=-1) + 1


def answers(batch: dict) -> list[list[int]]:
    """What the student wrote in each sample."""
    return [batch["input_ids"][row][marks.bool()].tolist() for row, marks in enumerate(batch["student_written"])]


def by_hand(batch: dict[str, Tensor], written: list[list[int]]) -> dict[str, Tensor]:
    """The batch with those answers, put together token by token and padded on the right."""
    names = [name for name in (*plain.PER_TOKEN, "pictures") if name in batch]
    rows: list[dict[str, list[int]]] = []
    for sample, answer in enumerate(written):
        start = begin(real(batch, "roles", sample))
        row = {name: real(batch, name, sample)[:start] for name in names}
        values = {
            "input_ids": answer,
            "labels": answer,
            "roles": [3] * len(answer),
            "attention_mask": [1] * len(answer),
        }
        for name in names:
            # Other fields mark what kind of token it is, and an answer is of the kind that the recorded one is.
            kind = real(batch, name, sample)[start]
            row[name] = row[name] + values.get(name, [kind] * len(answer))
        rows.append(row)
    length = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": tiny.END, "labels": -100}
    made = {
        name: torch.tensor([row[name] + [fills.get(name, 0)] * (length - len(row[name])) for row in rows])
        for name in names
    }
    return {**batch, **made}


def same_batch(one: dict, other: dict) -> None:
    """Every field of the second batch is in the first, with the same entries."""
    for name, value in other.items():
        if isinstance(value, dict):
            same_batch(one[name], value)
        else:
            assert torch.equal(one[name], value), name


# --- the answers ------------------------------------------------------------------------------------------------------


def chain(twin: plain.Twin, sample: dict, count: int, never: tuple[int, ...]) -> list[int]:
    """The most probable tokens one by one, each from a full forward without a cache."""
    start = begin(sample["roles"][0].tolist())
    ids, written = sample["input_ids"][:, :start], []
    # The roles tell the twin which tokens are no part of a prefix.
    roles = torch.cat([sample["roles"][:, :start], torch.full((1, count), 3)], dim=1)
    while len(written) < count and tiny.END not in written:
        with torch.no_grad():
            logits = twin.logits({**sample, "roles": roles}, ids)[-1].clone()
        logits[list(never)] = -torch.inf
        written.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[written[-1]]])], dim=1)
    return written


MIXED = "text only in the batch"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cold_answers_are_those_of_full_forwards_one_by_one(name, side):
    family, student = FAMILIES[name], FAMILIES[name].model(1)
    image_tokens = {
        getattr(student.config, f"{kind}_token_{end}", None) for kind in ("image", "video") for end in ("id", "index")
    }
    never = tuple(sorted(image_tokens - {None}))
    for composition in {"several turns", "several images", MIXED, "alone"}.intersection(family.compositions):
        batch = family.batch(COMPOSITIONS[composition], 3, side)
        before = {name: value.clone() for name, value in batch.items()}
        out = respond(student, batch, GREEDY, seeded())
        same_batch(batch, before)
        parts = plain.samples(batch, family.pictures(COMPOSITIONS[composition], 3))
        expected = [chain(plain.Twin(family, student), sample, 6, never) for sample in parts]
        assert answers(out.batch) == expected
        assert out.cut.tolist() == [tiny.END not in answer for answer in expected]
        same_batch(out.batch, by_hand(batch, expected))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("composition", tiny.COMPOSITIONS)
def test_a_batch_is_the_one_made_by_hand_of_prompt_and_answer(composition, side):
    batch = tiny.batch(tiny.COMPOSITIONS[composition], seed=2, side=side, extra_padding=2)
    batch["pictures"] = (batch["roles"] == 1).long()
    out = respond(STUDENT, batch, FREE, seeded()).batch
    written = answers(out)
    assert all(answer == answer[: answer.index(tiny.END) + 1] for answer in written if tiny.END in answer)
    assert all(0 < len(answer) <= 8 for answer in written)
    same_batch(out, by_hand(batch, written))
    assert torch.equal(out["pictures"], (out["roles"] == 1).long())
    # Earlier turns are the data's, and only the last response is the student's.
    assert int((out["student_written"] * (out["roles"] != 3)).sum()) == 0
    for sample, answer in enumerate(written):
        assert real(out, "student_written", sample)[-len(answer) :] == [1] * len(answer)
        assert sum(real(out, "student_written", sample)) == len(answer)


def test_what_a_template_puts_behind_the_answer_is_dropped():
    batch = tiny.batch(tiny.COMPOSITIONS["several turns"], side="left")
    fills = {"input_ids": 5, "labels": -100, "roles": 0, "attention_mask": 1}
    tail = {name: torch.nn.functional.pad(batch[name], (0, 2), value=fill) for name, fill in fills.items()}
    same_batch(respond(STUDENT, {**batch, **tail}, FREE, seeded()).batch, respond(STUDENT, batch, FREE, seeded()).batch)


def test_a_batch_without_a_mask_has_no_padding():
    batch = tiny.batch(((tiny.Turn(1, 2, 3),),))
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    same_batch(respond(STUDENT, bare, FREE, seeded()).batch, respond(STUDENT, batch, FREE, seeded()).batch)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_positions_of_pictures_are_known_without_marks_of_their_tokens(name):
    family, student = FAMILIES[name], FAMILIES[name].model(1)
    batch = family.batch(COMPOSITIONS["several images"], 3)
    bare = {name: value for name, value in batch.items() if name != "mm_token_type_ids"}
    assert answers(respond(student, bare, GREEDY).batch) == answers(respond(student, batch, GREEDY).batch)


@pytest.mark.parametrize("name", ["llava-siglip-qwen3", "qwen2-vl", "qwen2.5-vl", "gemma3", "paligemma"])
def test_the_loss_is_that_of_a_student_that_never_wrote_on_a_batch_made_by_hand(name):
    family = FAMILIES[name]
    student, teacher = family.model(1), family.model(2, hidden=48, layers=3)
    fresh = copy.deepcopy(student)
    batch = family.batch(COMPOSITIONS[MIXED], 4)
    out = respond(student, batch, FREE, seeded())
    expected = by_hand(batch, answers(out.batch))
    # SFT leaves the student's own words out, so there the two batches differ on purpose.
    objective = Objective(sft={"weight": 0.0}, iva=Iva(layer=1), tpa=Tpa(candidates=3))
    first, second = (
        distillation_loss(model, teacher, of, objective, generator=seeded())
        for model, of in ((student, out.batch), (fresh, expected))
    )
    assert first.loss.item() == second.loss.item() > 0
    assert all(first.terms[term].item() == second.terms[term].item() > 0 for term in ("kd", "iva", "tpa"))
    assert int(first.masses["kd"]) == sum(len(answer) for answer in answers(out.batch))


def test_kd_along_the_answer_equals_its_definition():
    family = FAMILIES["qwen2-vl"]
    student, teacher = family.model(1), family.model(2)
    out = respond(student, family.batch(COMPOSITIONS["several turns"], 4), FREE, seeded()).batch
    parts = plain.samples(out, family.pictures(COMPOSITIONS["several turns"], 4))
    found = distillation_loss(student, teacher, out, only(kd=Kd())).loss.item()
    expected = plain.kd(plain.Twin(family, student), plain.Twin(family, teacher), parts).item()
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("ours", "its"), [("llava-siglip-qwen3", "qwen2-vl"), ("qwen2.5-vl", "internvl")])
def test_a_teacher_of_its_own_sequence_reads_the_same_answers(ours, its):
    family, other = FAMILIES[ours], FAMILIES[its]
    student, teacher = family.model(1), other.model(2)
    mine, theirs = family.batch(COMPOSITIONS[MIXED], 3), other.batch(COMPOSITIONS[MIXED], 3, "left")
    labelled = dict(theirs)
    # A teacher's labels are not needed.
    del theirs["labels"]
    out = respond(
        student, {**mine, "teacher": theirs}, FREE, seeded(), Pairing(teacher_image_tokens=(tiny.IMAGE,))
    ).batch
    expected = by_hand(labelled, answers(out))
    del expected["labels"]
    same_batch(out["teacher"], expected)
    assert "labels" not in out["teacher"]
    same_batch(out, by_hand(mine, answers(out)))
    parts = plain.samples(out, family.pictures(COMPOSITIONS[MIXED], 3))
    others = plain.samples(out["teacher"], other.pictures(COMPOSITIONS[MIXED], 3))
    found = distillation_loss(student, teacher, out, only(kd=Kd())).loss.item()
    twins = plain.Twin(family, student), plain.Twin(other, teacher)
    assert found == pytest.approx(plain.kd(*twins, parts, others=others).item(), rel=1e-9)


# --- the draw ---------------------------------------------------------------------------------------------------------

DRAWS = 4000


def crowd(count: int = DRAWS) -> dict[str, Tensor]:
    """One short record of text many times, so that one call draws many answers to it."""
    one = tiny.batch(((tiny.Turn(0, 2, 2),),), seed=1)
    return {name: value.expand(count, -1) for name, value in one.items()}


def surprise(tokens: list[int], probability: Tensor) -> float:
    """Pearson's statistic of the counts, in standard deviations from what is expected; rare tokens are counted together."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probability)).double()
    expected = probability.double() * len(tokens)
    rare = expected < 5
    found, told = (torch.cat([of[~rare], of[rare].sum()[None]]) for of in (counts, expected))
    if told[-1] == 0:
        assert found[-1] == 0, "a token of probability 0 was drawn"
        found, told = found[:-1], told[:-1]
    freedom = max(len(found) - 1, 1)
    return (float(((found - told) ** 2 / told.clamp(min=1e-9)).sum()) - freedom) / (2 * freedom) ** 0.5


def first_distribution(student, never: tuple[int, ...]) -> Tensor:
    """The student's logits for the first token of the answer, without what is not drawn."""
    one = tiny.batch(((tiny.Turn(0, 2, 2),),), seed=1)
    with torch.no_grad():
        logits = student(input_ids=one["input_ids"][:, : begin(one["roles"][0].tolist())]).logits[0, -1].clone()
    logits[list(never)] = -torch.inf
    return logits


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (2.5, None, None), (2.5, 5, None), (2.5, None, 0.6), (2.5, 9, 0.5)],
)
def test_draws_follow_the_distribution_asked_for_and_nothing_of_the_models_own_options(temperature, top_k, top_p):
    student = copy.deepcopy(STUDENT)
    # transformers fills what a call leaves open with the model's options.
    student.generation_config = GenerationConfig(
        eos_token_id=tiny.END, pad_token_id=tiny.PAD, do_sample=True, top_k=2, top_p=0.3, temperature=0.1, repetition_penalty=9.0,
        suppress_tokens=[0, 1, 2, 3], max_length=3, min_new_tokens=1, no_repeat_ngram_size=1,
    )  # fmt: skip
    own = student.generation_config
    logits = first_distribution(student, (tiny.IMAGE,)) / temperature
    ranked = logits.sort(descending=True)
    if top_k is not None:
        logits[ranked.indices[top_k:]] = -torch.inf
    if top_p is not None:
        shares = logits[ranked.indices].softmax(-1)
        logits[ranked.indices[shares.cumsum(-1) - shares >= top_p]] = -torch.inf
    settings = OnPolicy(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = [token for (token,) in answers(respond(student, crowd(), settings, seeded(7)).batch)]
    assert surprise(drawn, logits.softmax(-1)) < 5
    # The test tells distributions apart.
    assert surprise([token for token in drawn if logits[token] > -1e9], (logits / 2).softmax(-1)) > 15
    assert student.generation_config is own


def test_tokens_that_stand_for_no_word_or_that_one_model_does_not_know_are_never_drawn():
    student = copy.deepcopy(STUDENT)
    shared = torch.tensor([token for token in range(tiny.VOCABULARY) if token not in {3, 11}])
    pairing = Pairing(shared=shared, teacher_image_tokens=(20,))
    never = {3, 11, 20, tiny.IMAGE}
    batch = crowd(300)
    drawn = {token for answer in answers(respond(student, batch, FREE, seeded(), pairing).batch) for token in answer}
    assert drawn == set(range(tiny.VOCABULARY)) - never
    open_ended = {token for answer in answers(respond(student, batch, FREE, seeded()).batch) for token in answer}
    assert open_ended == set(range(tiny.VOCABULARY)) - {tiny.IMAGE}


def test_the_generator_alone_decides_and_no_other_random_state_is_touched():
    batch = tiny.batch(tiny.COMPOSITIONS["several images"])
    before = torch.get_rng_state()
    one = respond(STUDENT, batch, FREE, seeded(5)).batch
    torch.manual_seed(99)
    two, other = (respond(STUDENT, batch, FREE, seeded(seed)).batch for seed in (5, 6))
    same_batch(one, two)
    assert answers(one) != answers(other)
    torch.set_rng_state(before)
    respond(STUDENT, batch, FREE, seeded(5))
    assert torch.equal(torch.get_rng_state(), before)
    respond(STUDENT, batch, FREE)
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)


def test_the_student_writes_as_it_would_be_used_and_is_left_as_it_was():
    student = copy.deepcopy(STUDENT)
    student.gradient_checkpointing_enable()
    student.config.use_cache = False
    for module in student.model.language_model.layers:
        module.self_attn.attention_dropout = 0.5
    student.train()
    student.model.vision_tower.eval()
    modes = [module.training for module in student.modules()]
    config = student.generation_config
    seen: list[tuple[int, bool, bool]] = []
    layer = student.model.language_model.layers[0]
    watch = layer.register_forward_pre_hook(
        lambda module, given: seen.append((given[0].shape[1], module.training, torch.is_grad_enabled()))
    )
    batch = tiny.batch(tiny.COMPOSITIONS["one turn"])
    out = respond(student, batch, GREEDY, seeded())
    watch.remove()
    same_batch(out.batch, respond(STUDENT, batch, GREEDY, seeded()).batch)
    # Over a cache: one token a step behind the prompt.
    assert [length for length, _, _ in seen[1:]] == [1] * (len(seen) - 1)
    assert len(seen) == max(map(len, answers(out.batch)))
    assert not any(training or gradient for _, training, gradient in seen)
    assert [module.training for module in student.modules()] == modes
    assert student.generation_config is config
    assert all(parameter.grad is None for parameter in student.parameters())
    with pytest.raises(ValueError, match="do not match"):
        respond(student, {**batch, "pixel_values": batch["pixel_values"][:1]}, GREEDY, seeded())
    assert [module.training for module in student.modules()] == modes
    assert student.generation_config is config


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(batch: dict, match: str, student=STUDENT, error: type[Exception] = BatchError) -> None:
    with pytest.raises(error, match=match):
        respond(student, batch, FREE, seeded())


def test_what_cannot_be_answered_is_refused_by_name():
    batch = tiny.batch(((tiny.Turn(1, 2, 3),), (tiny.Turn(1, 3, 4, image_last=True),)), side="left")
    behind = {**batch, "roles": batch["roles"].clone(), "labels": batch["labels"].clone()}
    # The first response ends before the image, and the last one is gone.
    picture = (batch["input_ids"][1] == tiny.IMAGE).nonzero()[0].item()
    behind["roles"][1] = torch.where(torch.arange(batch["roles"].shape[1]) == picture - 1, 3, 0)
    refused(behind, rf"sample 1: token {picture} is an image's")
    silent = {**batch, "roles": batch["roles"].clone()}
    silent["roles"][0] = 0
    refused(silent, "sample 0: batch has no response")
    at_once = tiny.batch(((tiny.Turn(0, 1, 3),),))
    at_once["roles"][:] = 3
    refused(at_once, "sample 0: response has no token before it")
    refused({**batch, "position_ids": torch.zeros_like(batch["roles"])}, "position_ids of the batch")
    refused({**batch, "candidates": batch["input_ids"][..., None]}, "candidates of the batch")
    refused({**batch, TEACHER_HIDDEN: torch.zeros(3, 4)}, "teacher_hidden of the batch is made for the recorded answer")
    refused({**batch, "teacher": silent}, "sample 0: the teacher's batch has no response")
    endless = copy.deepcopy(STUDENT)
    endless.generation_config = GenerationConfig()
    endless.config.text_config.eos_token_id = None
    refused(batch, "no token that ends a turn", endless, ModelError)


# --- the trainer ------------------------------------------------------------------------------------------------------

OBJECTIVE = Objective(iva=Iva(layer=1), tpa=Tpa(candidates=2))
SHORT = OnPolicy(probability=1.0, max_new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    return path


def trainer(
    folder: Path,
    out: Path,
    on_policy: OnPolicy | None,
    accumulate: int = 1,
    steps: int = 2,
    objective: Objective = OBJECTIVE,
) -> AlignTITrainer:
    return AlignTITrainer(
        model=load_model(str(folder / "student"), "float32"),
        teacher_model=load_model(str(folder / "teacher"), "float32"),
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-2,
            optim="sgd",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            seed=3,
        ),
        objective=objective,
        train_dataset=read_conversations(folder / "train.json"),
        processing_class=load_processor(str(folder / "student")),
        on_policy=on_policy,
    )


def watched(run: AlignTITrainer) -> tuple[list[dict], list[dict]]:
    """The batches that the loss reads and the masses of each step, as training goes on."""
    read, steps = [], []
    loss, batches = run.compute_loss, run.get_batch_samples

    def compute_loss(model, inputs, *given, **options):
        read.append({name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)})
        return loss(model, inputs, *given, **options)

    def get_batch_samples(*given):
        found = batches(*given)
        steps.append(run.step_totals)
        return found

    run.compute_loss, run.get_batch_samples = compute_loss, get_batch_samples
    return read, steps


def logged(run: AlignTITrainer) -> list[dict]:
    return [line for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_student_that_answers_every_batch_trains(folder, tmp_path, accumulate):
    run = trainer(folder, tmp_path, SHORT, accumulate)
    start = copy.deepcopy(run.model.state_dict())
    read, steps = watched(run)
    run.train()
    assert len(read) == 2 * accumulate
    for batch in read:
        assert torch.equal(batch["student_written"].bool(), batch["roles"] == 3)
    lines = logged(run)
    assert [line["on_policy_share"] for line in lines] == [1.0, 1.0]
    ends = run.model.generation_config.eos_token_id
    for step, line in enumerate(lines):
        assert line["kd"] > 0 and line["tpa"] > 0 and np.isfinite(line["loss"])
        written = [answer for batch in read[step * accumulate :][:accumulate] for answer in answers(batch)]
        assert line["cut_share"] == pytest.approx(sum(ends not in answer for answer in written) / len(written))
        if accumulate > 1:
            # Masses are those of the answers, not of what they replaced.
            assert int(steps[step]["kd"]) == sum(map(len, written))
    assert any(not torch.equal(start[name], value) for name, value in run.model.state_dict().items())


def test_some_batches_are_answered_and_their_share_is_logged(folder, tmp_path):
    run = trainer(folder, tmp_path, OnPolicy(probability=0.5, max_new_tokens=3), accumulate=2, steps=6)
    read, _ = watched(run)
    run.train()
    on = ["student_written" in batch for batch in read]
    assert 0 < sum(on) < len(on)
    lines = logged(run)
    assert [line["on_policy_share"] for line in lines] == [
        sum(pair) / 2 for pair in zip(on[::2], on[1::2], strict=True)
    ]
    assert [("cut_share" in line) for line in lines] == [line["on_policy_share"] > 0 for line in lines]
    # Without the option nothing is drawn, logged or changed.
    plain_run = trainer(folder, tmp_path / "plain", None)
    read, _ = watched(plain_run)
    plain_run.train()
    assert not any("student_written" in batch for batch in read)
    assert not any("on_policy_share" in line for line in logged(plain_run))


def test_an_evaluation_is_of_the_recorded_answers(folder, tmp_path):
    metrics = []
    for name, on_policy in (("on", SHORT), ("off", None)):
        run = trainer(folder, tmp_path / name, on_policy)
        measured = run.evaluate(run.train_dataset)
        metrics.append({name: measured[f"eval_{name}"] for name in ("loss", "sft", "kd", "iva", "tpa")})
    assert metrics[0] == metrics[1]


def recipe(folder: Path, out: Path, on_policy: dict, training: dict | None = None, **sections: object) -> Recipe:
    content = small.recipe(folder, out=str(out), objective={"iva": {"layer": 1}}, **sections)
    content["data"] = {**content["data"], "on_policy": on_policy}
    content["training"] = {**content["training"], **(training or {})}
    return Recipe.model_validate(content)


def losses(run: RunFolder) -> list[tuple]:
    names = ("step", "loss", "kd", "tpa", "on_policy_share", "cut_share", "grad_norm")
    return [tuple(line.get(name) for name in names) for line in run.read_metrics()]


def test_the_time_of_a_step_includes_the_answers_and_is_a_mean_over_both_kinds(folder, tmp_path, monkeypatch):
    answered = AlignTITrainer.perhaps_answered

    def slowly(*given):
        time.sleep(0.2)
        return answered(*given)

    monkeypatch.setattr(AlignTITrainer, "perhaps_answered", slowly)
    run = distil(recipe(folder, tmp_path / "run", {"max_new_tokens": 2}, {"max_steps": WARM_UP + 1}))
    assert json.loads(run.cost.read_text())["seconds_per_step"] >= 0.2
    recorder = RunRecorder(run)
    recorder.seconds = [9.0] * WARM_UP + [1.0, 1.0, 4.0]
    assert recorder.seconds_per_step == 1.0
    recorder.attach(SimpleNamespace(steps_differ=True, steps_change=False, seconds_before_step=0.0))
    assert recorder.seconds_per_step == 2.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_repeats_its_answers(folder, tmp_path, accumulate):
    on_policy, training = {"probability": 0.6, "max_new_tokens": 4}, {"gradient_accumulation_steps": accumulate}
    whole = distil(recipe(folder, tmp_path / "whole", on_policy, training))
    stopped = recipe(folder, tmp_path / "stopped", on_policy, training)
    with pytest.raises(InterruptedRunError, match="step 3 of 4"):
        distil(stopped, steps=Stop(3))
    resumed = distil(stopped)
    assert losses(resumed) == losses(whole)
    assert 0 < sum(line["on_policy_share"] for line in whole.read_metrics()) < 4


def test_adapters_checkpointing_and_autocast_go_along_and_generation_is_a_phase(folder, tmp_path):
    run = distil(
        recipe(
            folder,
            tmp_path / "run",
            {"probability": 1.0, "max_new_tokens": 3},
            {"gradient_checkpointing": True, "bf16": True, "phases": True, "max_steps": WARM_UP + 2},
            student={"path": str(folder / "student"), "lora": {"rank": 2}},
        )
    )
    told = json.loads(run.phases.read_text())
    assert list(told["phases"])[:2] == ["data", "generation"]
    assert told["phases"]["generation"]["mean_seconds"] > 0
    lines = run.read_metrics()
    assert all(line["on_policy_share"] == 1 and line["kd"] > 0 for line in lines)
    assert all(np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 for line in lines)


WORKER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from align_ti.config import OnPolicy
from align_ti.processes import part_in_order
from tests.test_rollout import answers, trainer, watched
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
run = trainer(folder, out, OnPolicy(probability=0.5, max_new_tokens=4), 3, steps=2)
read, _ = watched(run)
run.train()
told = {
    "on": ["student_written" in batch for batch in read],
    "written": [answers(batch) for batch in read if "student_written" in batch],
    "shares": [line["on_policy_share"] for line in run.state.log_history if "loss" in line],
    "sum": sum(float(value.double().sum()) for value in run.model.state_dict().values()),
}
(out / f"rank-{run.args.process_index}.json").write_text(json.dumps(told))
part_in_order()
"""


def test_two_processes_answer_the_same_batches_with_answers_of_their_own(folder, tmp_path):
    on_processes(2, WORKER, folder, tmp_path)
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one["on"] == two["on"] and 0 < sum(one["on"]) < len(one["on"]) == 6
    assert one["written"] != two["written"]
    # The log is over both processes.
    assert one["shares"] == pytest.approx([sum(one["on"][:3]) / 3, sum(one["on"][3:]) / 3])
    assert one["sum"] == two["sum"]


def test_what_an_on_policy_run_cannot_be_is_refused_by_name(folder, tmp_path):
    with pytest.raises(ConfigError, match="on_policy is given, but no term with weight compares with a teacher"):
        trainer(folder, tmp_path, SHORT, objective=only(sft=Sft()))
    run = trainer(folder, tmp_path, SHORT)
    run.check_sharding()
    for kind in ("is_fsdp_enabled",):
        setattr(run, kind, True)
        with pytest.raises(ConfigError, match=r"on_policy is given under .* sharded"):
            run.check_sharding()
        setattr(run, kind, False)
