"""Muon beside AdamW is each of them on its own parameters, goes on from checkpoints, and is what a recipe's run steps with."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from align_ti.config import Recipe, Training
from align_ti.errors import ConfigError
from align_ti.models.adapters import wrap_with_lora
from align_ti.models.loading import freeze, load_model
from align_ti.pipeline.parts import load_parts
from align_ti.pipeline.training import distil
from align_ti.runs import RunFolder
from align_ti.training.optimizers import MuonAdamW, hidden_matrices, optimizer_of
from tests import small
from tests.test_engine_runs import recipe_of

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with PyTorch 2.9")


class Small(nn.Module):
    """A table, two layers, a norm, a convolution and a head that shares the table's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, tokens):
        states = self.convolution(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(states + self.second(self.first(states).tanh())))


def model(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def learn(one: Small, optimizer, steps: int, start: int = 0) -> None:
    """Some steps on random tokens, with a rate that falls."""
    for step in range(start, start + steps):
        tokens = torch.from_numpy(np.random.default_rng(step).integers(7, size=(4, 5)))
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(one(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


def muon(one: Small, **options) -> MuonAdamW:
    decayed = [value for value in one.parameters() if value.ndim > 1]
    others = [value for value in one.parameters() if value.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return MuonAdamW(groups, matrices=hidden_matrices(one), lr=0.02, **options)


def test_muon_gets_the_matrices_between_states_alone():
    one = model()
    assert [id(value) for value in hidden_matrices(one)] == [id(one.first.weight), id(one.second.weight)]
    one.first.weight.requires_grad_(False)
    assert [id(value) for value in hidden_matrices(one)] == [id(one.second.weight)]
    one.head.weight = nn.Parameter(torch.ones(7, 6))  # untied: a table of outputs all the same
    assert [id(value) for value in hidden_matrices(one)] == [id(one.second.weight)]


def test_each_parameter_moves_as_under_its_own_optimizer():
    together, apart = model(), model()
    learn(together, muon(together, betas=(0.8, 0.95)), 5)

    class Both:
        """The two that users would write side by side."""

        def __init__(self, one: Small) -> None:
            matrices = [one.first.weight, one.second.weight]
            tables = [one.table.weight, one.convolution.weight]
            others = [value for value in one.parameters() if value.ndim == 1]
            self.both = [
                torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(
                    [{"params": tables, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                    lr=0.02,
                    betas=(0.8, 0.95),
                    fused=True,
                ),
            ]

        @property
        def param_groups(self):
            return [group for one in self.both for group in one.param_groups]

        def zero_grad(self):
            for one in self.both:
                one.zero_grad()

        def step(self):
            for one in self.both:
                one.step()

    learn(apart, Both(apart), 5)
    moved = 0.0
    for (name, value), (_, other), (_, start) in zip(
        together.named_parameters(), apart.named_parameters(), model().named_parameters(), strict=True
    ):
        assert torch.equal(value, other), name
        moved += float((value - start).norm())
    assert moved > 0.1


def test_an_update_of_muon_is_as_large_as_one_of_adamw():
    # 0.2 in root mean square whatever the shape, which is what AdamW's updates come to (Liu et al. 2025); the five steps of
    # Newton and Schulz leave singular values between 0.7 and 1.2.
    for rows, columns in ((8, 8), (8, 64), (64, 8)):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(rows, columns))
        weight.grad = torch.randn(rows, columns)
        MuonAdamW([weight], matrices=[weight], lr=1.0).step()
        assert 0.12 < float(weight.square().mean().sqrt()) < 0.25, (rows, columns)


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tmp_path):
    whole, halved = model(), model()
    optimizer = muon(whole)
    learn(whole, optimizer, 6)
    first = muon(halved)
    learn(halved, first, 3)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = muon(other := copy.deepcopy(halved))
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    learn(other, second, 3, start=3)
    for value, expected in zip(other.parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, expected)
    without = muon(fresh := copy.deepcopy(halved))
    learn(fresh, without, 3, start=3)
    assert not all(
        torch.equal(value, expected) for value, expected in zip(fresh.parameters(), whole.parameters(), strict=True)
    )


def test_only_matrices_or_none_is_fine():
    one = model()
    for matrices in ([one.first.weight], []):
        optimizer = MuonAdamW([one.first.weight], matrices=matrices, lr=0.1)
        assert len(optimizer.parts) == 1
        one.first.weight.grad = torch.ones_like(one.first.weight)
        before = one.first.weight.detach().clone()
        assert optimizer.step(lambda: 3.0) == 3.0
        assert not torch.equal(before, one.first.weight)


def test_a_copy_goes_on_like_the_original_and_nothing_is_left_out(tmp_path):
    one = model()
    optimizer = muon(one)
    learn(one, optimizer, 2)
    other, theirs = copy.deepcopy((one, optimizer))
    for each, its in ((one, optimizer), (other, theirs)):
        learn(each, its, 2, start=2)
    for value, expected in zip(other.parameters(), one.parameters(), strict=True):
        assert value is not expected and torch.equal(value, expected)
    with pytest.raises(ConfigError, match="made already"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ConfigError, match="1 of 2 matrices for Muon are not among the parameters"):
        MuonAdamW([one.first.weight], matrices=hidden_matrices(one))


def test_adapters_are_trained_by_muon_and_places_and_heads_are_not(folder):
    student = load_model(str(folder / "student"), "float32")
    names = {id(value): name for name, value in student.named_parameters()}
    linear = {names[id(value)].rsplit(".", 2)[1] for value in hidden_matrices(student)}
    assert {"q_proj", "down_proj", "linear_1"} <= linear
    assert not linear & {"embed_tokens", "lm_head", "position_embedding", "patch_embedding"}
    freeze(student, ("vision_tower", "multi_modal_projector.*"))
    wrapped = wrap_with_lora(student, rank=2, alpha=4)
    trained = {name for name, value in wrapped.named_parameters() if value.requires_grad and "lora_" in name}
    found = {id(value) for value in hidden_matrices(wrapped)}
    assert {name for name, value in wrapped.named_parameters() if id(value) in found} == trained != set()


def test_adamw_is_transformers_own_and_an_old_pytorch_is_told(folder, monkeypatch):
    assert optimizer_of(Training(), model()) is None
    kind, options = optimizer_of(Training(optimizer="muon", adam_beta2=0.98), model())
    assert kind is MuonAdamW
    assert (options["betas"], options["lr"]) == ((0.9, 0.98), 2e-5)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"came with PyTorch 2\.9, and this is .*training\.optimizer: adamw"):
        optimizer_of(Training(optimizer="muon"), model())
    with pytest.raises(ConfigError, match=r"came with PyTorch 2\.9"):
        load_parts(Recipe.model_validate(of_muon(folder, folder / "never")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("optimizers")
    small.write_pair(path)
    small.write_records(path)
    return path


def of_muon(folder, out, batch: int = 4):
    made = recipe_of(folder, out, batch)
    made["training"] = {**made["training"], "optimizer": "muon"}
    return made


def test_a_run_with_muon_differs_from_adamws_and_resumes_exactly(folder, tmp_path):
    whole = distil(Recipe.model_validate(of_muon(folder, tmp_path / "whole")))
    plain = distil(Recipe.model_validate(recipe_of(folder, tmp_path / "plain", 4)))
    expected, other = (load_file(run.student / "model.safetensors") for run in (whole, plain))
    assert max(float((value - other[name]).abs().max()) for name, value in expected.items()) > 1e-4
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "student")
    shutil.rmtree(tmp_path / "half" / "checkpoint-4")
    recipe = tmp_path / "half" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "whole"), str(tmp_path / "half")))
    assert RunFolder(tmp_path / "half").last_checkpoint() == tmp_path / "half" / "checkpoint-2"
    before = (tmp_path / "half" / "metrics.jsonl").stat().st_size
    resumed = distil(Recipe.model_validate(of_muon(folder, tmp_path / "half")))
    logged = [json.loads(line) for line in resumed.metrics.read_text()[before:].splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [3, 4]
    for name, value in load_file(resumed.student / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name
