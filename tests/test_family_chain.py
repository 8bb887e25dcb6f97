"""Every family from records to terms: its real processor, a tiny random model, and a plain loop over records that are read alone.

Two models with processors of their own are compared through the same records.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen3Config, TrainingArguments

from align_ti.config import Evaluation, Iva, Kd, Recipe, Sft, Tpa
from align_ti.data.collator import Collator, EncodedConversations
from align_ti.data.conversation import Conversation, Turn
from align_ti.data.roles import RESPONSE, encode, image_id, model_inputs
from align_ti.data.sources import read_conversations
from align_ti.errors import CheckError, ConfigError, DataError, ModelError
from align_ti.evaluation.fidelity import along_responses
from align_ti.evaluation.runner import answer
from align_ti.evaluation.tasks import question
from align_ti.interactions.visual import visual_weights
from align_ti.models.families import end_tokens, full_attention_layers, image_token
from align_ti.models.loading import load_processor
from align_ti.models.pairing import pair_up, reads_the_same
from align_ti.pipeline.measuring import evaluate_model
from align_ti.pipeline.training import distil
from align_ti.preflight.checks import run_checks
from align_ti.training.objective import distillation_loss
from align_ti.training.trainer import AlignTITrainer
from tests import family_models, family_processors
from tests.family_plain import kl
from tests.test_objective_twins import only

MODELS = {
    "llava-llama3": "llava-clip-llama",
    "llava-vicuna": "llava-clip-llama",
    "llava-qwen2": "llava-siglip-qwen2",
    "llava-qwen3": "llava-siglip-qwen3",
    "llava-onevision": "llava-onevision",
    "qwen2-vl": "qwen2-vl",
    "qwen2.5-vl": "qwen2.5-vl",
    "qwen3-vl": "qwen3-vl",
    "qwen3.5": "qwen3.5",
    "smolvlm": "smolvlm",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "gemma3": "gemma3",
}
"""The model that goes with each processor."""

CLOSE = 1e-6
"""Relative tolerance: some layers compute in float32 whatever the model's precision, and in a batch rows have other shapes."""


def picture(seed: int, size: tuple[int, int] = (20, 12)) -> Image.Image:
    pixels = torch.randint(
        0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


def records() -> list[Conversation]:
    """Two turns, two images, and one record without any."""
    return [
        Conversation(
            (
                Turn("user", "<image>how many?"),
                Turn("assistant", "two"),
                Turn("user", "and red"),
                Turn("assistant", "one red"),
            ),
            (picture(0),),
        ),
        Conversation((Turn("user", "say it"), Turn("assistant", "it is so"))),
        Conversation(
            (Turn("user", "<image><image>the same?"), Turn("assistant", "no")), (picture(1), picture(2, (12, 20)))
        ),
    ]


def family_ids(processor) -> family_models.Ids:
    """The ids of a processor's tokenizer; heads are padded to a multiple of 8."""
    ids = family_processors.special_ids(processor)
    given = {
        "image": "image",
        "image_start": "start",
        "image_end": "stop",
        "video": "video",
        "eos": "eos",
        "pad": "pad",
    }
    known = {ours: ids[theirs] for theirs, ours in given.items() if theirs in ids}
    known["image"] = image_id(processor)
    known["vocabulary"] = -(-ids["vocabulary"] // 8) * 8
    return dataclasses.replace(family_models.IDS, **known)


def tiny_model(name: str, processor, seed: int, **sizes):
    """A model of the family with the ids of the processor."""
    return family_models.FAMILIES[MODELS[name]].model(seed, ids=family_ids(processor), **sizes)


def rows(model, sample: dict[str, Tensor], ids: Tensor | None = None) -> Tensor:
    """The logits after every token of one record, read alone by the model's own forward: [seq, vocab]."""
    inputs = model_inputs(Collator(0)([sample]))
    return model(**{**inputs, "input_ids": inputs["input_ids"] if ids is None else ids}).logits[0]


def responses(sample: dict[str, Tensor]) -> list[int]:
    return (sample["roles"] == RESPONSE).nonzero().flatten().tolist()


def plain_kd(student, teacher, ours: list, theirs: list, tokens) -> float:
    values = []
    for one, other in zip(ours, theirs, strict=True):
        mine, its = rows(student, one), rows(teacher, other)
        for step, place in zip(responses(one), responses(other), strict=True):
            values.append(kl(its[place - 1], mine[step - 1], tokens=tokens))
    return torch.stack(values).mean().item()


def plain_tpa(
    student, teacher, ours: list, theirs: list, tokens, tried: list[list[list[int]]], left_out: set[int]
) -> float:
    values = []
    for one, other, lists in zip(ours, theirs, tried, strict=True):
        for step, place, candidates in zip(responses(one), responses(other), lists, strict=True):
            found = []
            for token in candidates:
                if token not in left_out:
                    mine, its = one["input_ids"][None].clone(), other["input_ids"][None].clone()
                    mine[0, step] = its[0, place] = token
                    found.append(kl(rows(teacher, other, its)[place], rows(student, one, mine)[step], tokens=tokens))
            if found:
                values.append(torch.stack(found).mean())
    return torch.stack(values).mean().item()


def some_candidates(samples: list, tokens: int) -> list[list[list[int]]]:
    """For each response token of each record itself, and two others."""
    random = torch.Generator().manual_seed(0)
    return [
        [
            [int(one["input_ids"][step]), *torch.randint(0, tokens, (2,), generator=random).tolist()]
            for step in responses(one)
        ]
        for one in samples
    ]


def compare(student, teacher, processor, teacher_processor, terms: dict) -> None:
    """Terms of the batch through processors, dataset and collator equal the loops over records."""
    data = EncodedConversations(records(), processor)
    if teacher_processor is not None:
        data.teacher = EncodedConversations(records(), teacher_processor)
    pad = processor.tokenizer.pad_token_id
    collate = Collator(
        pad, teacher_pad_token=None if teacher_processor is None else teacher_processor.tokenizer.pad_token_id
    )
    batch = collate([data[index] for index in range(len(data))])
    pairing = pair_up(student, teacher, processor, teacher_processor)
    ours = [encode(one, processor) for one in records()]
    theirs = ours if teacher_processor is None else [encode(one, teacher_processor) for one in records()]
    known = min(len(processor.tokenizer), len((teacher_processor or processor).tokenizer))
    tried = some_candidates(ours, known)
    candidates = batch["input_ids"][..., None].repeat(1, 1, 3)
    candidates[batch["roles"] == RESPONSE] = torch.tensor([tokens for lists in tried for tokens in lists])
    out = distillation_loss(student, teacher, batch, only(**terms), candidates, pairing=pairing)
    left_out = {*end_tokens(student), image_token(student), *pairing.unshared(100_000)}
    with torch.no_grad():
        kd = plain_kd(student, teacher, ours, theirs, pairing.shared)
        assert out.terms["kd"].item() == pytest.approx(kd, rel=CLOSE)
        if "tpa" in terms:
            tpa = plain_tpa(student, teacher, ours, theirs, pairing.shared, tried, left_out)
            assert out.terms["tpa"].item() == pytest.approx(tpa, rel=CLOSE)
    assert all(torch.isfinite(value) and value > 0 for value in out.terms.values())


@pytest.mark.parametrize("name", list(MODELS))
def test_records_become_the_terms_of_the_family(name):
    processor = family_processors.FAMILIES[name]()
    student, teacher = tiny_model(name, processor, 1), tiny_model(name, processor, 2, hidden=48, layers=3)
    terms = {"sft": Sft(), "kd": Kd(), "iva": Iva(layer=full_attention_layers(teacher)[0])}
    if name != "qwen3.5":
        terms["tpa"] = Tpa()
    compare(student, teacher, processor, None, terms)


CROSSED = [("internvl", "qwen2.5-vl"), ("qwen2-vl", "llava-qwen2"), ("llava-qwen2", "llava-onevision")]
"""Student and teacher of one tokenizer, with processors of their own."""


@pytest.mark.parametrize(("name", "teacher_name"), CROSSED)
def test_two_families_are_compared_through_the_same_records(name, teacher_name):
    processors = family_processors.of_one_tokenizer()
    processor, other = processors[name], processors[teacher_name]
    assert not reads_the_same(processor, other)
    student, teacher = tiny_model(name, processor, 1), tiny_model(teacher_name, other, 2, hidden=48, layers=3)
    compare(student, teacher, processor, other, {"kd": Kd(), "tpa": Tpa()})


def test_a_processor_that_reads_videos_says_what_it_needs(tmp_path):
    # Without torchvision transformers raised an ImportError, which reached the user as a traceback.
    if find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed, so the processor loads")
    processor = family_processors.FAMILIES["qwen2-vl"]()
    tiny_model("qwen2-vl", processor, 1).config.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    with pytest.raises(ModelError, match=r"needs a package .*Torchvision.*install it: torchvision"):
        load_processor(str(tmp_path))


@pytest.mark.parametrize("name", list(MODELS))
def test_questions_in_a_batch_are_answered_as_they_are_alone(name):
    processor = family_processors.FAMILIES[name]()
    model = tiny_model(name, processor, 1)
    questions = [question(record) for record in records()]
    together = answer(model, processor, questions, Evaluation(batch_size=3, max_new_tokens=4))
    alone = [answer(model, processor, [one], Evaluation(batch_size=1, max_new_tokens=4))[0] for one in questions]
    assert together == alone
    assert len({text for text, _ in alone}) > 1


@pytest.mark.parametrize("name", list(MODELS))
def test_the_check_before_training_passes_for_a_sound_pair(name, tmp_path):
    # Qwen3.5's linear attention moved by 6.6e-4 nats in a batch on some processors, more than the check took for rounding.
    processor = family_processors.FAMILIES[name]()
    student = tiny_model(name, processor, 1).float()
    teacher = tiny_model(name, processor, 2, hidden=48, layers=3).float().requires_grad_(False)
    objective = {"iva": {"layer": full_attention_layers(teacher)[0]}}
    recipe = folder_recipe(tmp_path, objective=objective)
    verdicts = run_checks(student, teacher, processor, records(), Recipe.model_validate(recipe))
    if name == "qwen3.5":
        assert [verdict.name for verdict in verdicts if verdict.state == "fail"] == ["layout"]
        recipe["objective"] = {**objective, "tpa": {"weight": 0.0}}
        verdicts = run_checks(student, teacher, processor, records(), Recipe.model_validate(recipe))
    assert {verdict.name: verdict.sentence for verdict in verdicts if verdict.state != "pass"} == {}


@pytest.mark.parametrize("name", ["llava-vicuna", "idefics3", "gemma3"])
def test_a_family_is_distilled_from_folders_to_a_folder(tmp_path, name):
    """The families whose whole processor can be saved without torchvision."""
    processor = family_processors.FAMILIES[name]()
    for part, seed in (("student", 1), ("teacher", 2)):
        tiny_model(name, processor, seed).float().save_pretrained(tmp_path / part)
        processor.save_pretrained(tmp_path / part)
    write_conversations(tmp_path)
    run = distil(Recipe.model_validate(folder_recipe(tmp_path)))
    assert json.loads(run.check.read_text())["state"] != "fail"
    assert [line["step"] for line in run.read_metrics() if "kd" in line] == [1, 2]
    loaded = AutoModelForImageTextToText.from_pretrained(run.student)
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    same = [torch.equal(one, other) for one, other in zip(loaded.parameters(), before.parameters(), strict=True)]
    assert not all(same) and any(same)


def write_two_families(folder) -> None:
    """A teacher that sees images at another size through a processor of its own, beside a student, and records."""
    ours = family_processors.llava(family_processors.llama3_tokenizer(), family_processors.LLAMA3, tower="clip")
    longer = family_processors.LLAMA3.replace("bos_token", "bos_token + 'Be brief. '")
    theirs = family_processors.llava(family_processors.llama3_tokenizer(), longer, tower="siglip")
    theirs.image_processor.size = {"height": 12, "width": 12}
    wide = dataclasses.replace(
        family_models.FAMILIES["llava-siglip-qwen3"],
        build=family_models.llava(lambda: family_models.siglip(image_size=12), Qwen3Config, tied=True),
    )
    ids = family_ids(ours)
    models = {
        "student": (family_models.FAMILIES["llava-clip-llama"].model(1, ids=ids), ours),
        "teacher": (wide.model(2, hidden=48, layers=3, ids=ids), theirs),
    }
    for part, (model, processor) in models.items():
        model.float().save_pretrained(folder / part)
        processor.save_pretrained(folder / part)
    write_conversations(folder)


def test_two_families_are_distilled_from_folders(tmp_path):
    """The teacher's rows are resampled."""
    write_two_families(tmp_path)
    recipe = folder_recipe(
        tmp_path, objective={"iva": {"resample": True}}, layer_scores={"images": 1, "instructions": 2}
    )
    run = distil(Recipe.model_validate(recipe))
    states = {verdict["name"]: verdict["state"] for verdict in json.loads(run.check.read_text())["verdicts"]}
    assert "fail" not in states.values() and states["fused.tpa"] == states["fused.kd"] == "pass"
    assert json.loads((run.root / "layer_scores.json").read_text())["layer"] in (0, 1, 2)
    result = evaluate_model(
        str(run.student), read_conversations(tmp_path / "train.json"), Evaluation(), teacher=str(tmp_path / "teacher")
    )
    assert 0 < result["divergence"] < float("inf")
    without = folder_recipe(tmp_path, out=str(tmp_path / "other"))
    with pytest.raises(
        CheckError, match=r"rows: in 4 of 6 records .* sample 0: 4 visual tokens for the student, 9 for the teacher"
    ):
        distil(Recipe.model_validate(without))


def crossed_trainer(tmp_path, dataset, **options) -> AlignTITrainer:
    """A trainer whose teacher reads images otherwise than its student."""
    ours, theirs = (family_processors.FAMILIES["llava-vicuna"]() for _ in range(2))
    theirs.image_processor.image_mean = [0.1, 0.2, 0.3]
    student, teacher = (tiny_model("llava-vicuna", ours, seed).float() for seed in (1, 2))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, per_device_train_batch_size=3
    )
    return AlignTITrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        objective=only(kd=Kd()),
        train_dataset=dataset(ours),
        processing_class=ours,
        teacher_processing_class=theirs,
        **options,
    )


def test_different_responses_have_no_divergence():
    # Rows of other tokens were compared where their number happened to agree, and failed without a reason where it did not.
    ours = family_processors.llava(family_processors.llama3_tokenizer(), family_processors.LLAMA3, tower="clip")
    theirs = family_processors.llava(family_processors.llama3_tokenizer(), family_processors.VICUNA, tower="clip")
    student, teacher = (tiny_model("llava-llama3", ours, seed).float() for seed in (1, 2))
    with pytest.raises(DataError, match="student and teacher read different response tokens"):
        along_responses(student, teacher, ours, records(), Evaluation(), teacher_processor=theirs)


class Samples(torch.utils.data.Dataset):
    """Encoded samples of somebody else's making."""

    def __init__(self, samples: list) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


def test_a_dataset_that_is_encoded_already_gets_the_teachers_own_inputs(tmp_path):
    # The teacher's processor was ignored for such a dataset, and the teacher read the student's pixels without a word.
    trainer = crossed_trainer(tmp_path, lambda processor: EncodedConversations(records(), processor))
    sample = trainer.train_dataset[0]
    assert not torch.equal(sample["pixel_values"], sample["teacher"]["pixel_values"])
    trainer.train()
    blind = crossed_trainer(tmp_path, lambda processor: Samples([encode(one, processor) for one in records()]))
    with pytest.raises(ConfigError, match="the batch holds none for it"):
        blind.train()


def test_conversations_are_evaluated_wherever_they_are_given(tmp_path):
    # `evaluate(conversations)` failed, since only those given to the constructor became tensors.
    trainer = crossed_trainer(tmp_path, lambda processor: records(), eval_dataset={"one": records()})
    alone = trainer.evaluate(records())["eval_kd"]
    assert trainer.evaluate()["eval_one_kd"] == pytest.approx(alone)


def test_pictures_are_numbered_and_normalised_apart_even_side_by_side():
    # Two images without a token between them were one run, so that "separately" was the same as "together".
    processor = family_processors.FAMILIES["llava-llama3"]()
    sample = encode(records()[2], processor)
    visual = sample["roles"] == 1
    assert sample["pictures"][visual].tolist() == [1] * 4 + [2] * 4 and not sample["pictures"][~visual].any()
    attention = torch.rand(1, len(visual), generator=torch.Generator().manual_seed(0))
    weights = visual_weights(
        attention, visual[None], (sample["roles"] == 2)[None], "separately", sample["pictures"][None]
    )
    torch.testing.assert_close(weights[0][sample["pictures"] == 1].sum(), torch.tensor(0.5))


def test_what_is_for_the_teacher_does_not_reach_the_student():
    assert model_inputs({"input_ids": 1, "roles": 2, "pictures": 3, "teacher": 4}) == {"input_ids": 1}


def write_conversations(folder) -> None:
    """A data file with a few records and their images."""
    told = []
    for number, record in enumerate([*records(), *records()]):
        names = []
        for index, image in enumerate(record.images):
            names.append(f"{number % 3}-{index}.png")
            image.save(folder / names[-1])
        turns = [{"from": {"user": "human", "assistant": "gpt"}[t.speaker], "value": t.text} for t in record.turns]
        if number >= 3:
            turns[0]["value"] = turns[0]["value"].replace("how many?", "which one?")
        told.append({"id": number, "conversations": turns, **({"image": names} if names else {})})
    (folder / "train.json").write_text(json.dumps(told))


def folder_recipe(folder, **sections) -> dict:
    """Two steps over those files."""
    return {
        "out": str(folder / "run"),
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher"), "dtype": "float32"},
        "data": {"train": str(folder / "train.json")},
        "objective": {"iva": {"layer": 1}},
        "training": {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 3, "logging_steps": 1},
        **sections,
    }
