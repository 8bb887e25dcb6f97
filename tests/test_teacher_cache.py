"""A cache of the teacher: the loss from it is the loss with the teacher, and what does not belong to it is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from align_ti.cli import app
from align_ti.config import Iva, Kd, Objective, Recipe, Sft
from align_ti.data import teacher_cache
from align_ti.data.roles import TEACHER_ATTENTION, TEACHER_HIDDEN
from align_ti.data.teacher_cache import Made, TeacherCache, passes_until_even
from align_ti.errors import BatchError, CacheError, ConfigError, InterruptedRunError
from align_ti.models.families import backbone, full_attention_layers
from align_ti.models.headonly import has_head_only, load_head, save_head
from align_ti.models.loading import load_processor
from align_ti.models.placement import move
from align_ti.pipeline.caching import cache_teacher, estimate
from align_ti.pipeline.training import distil
from align_ti.training.cached_pass import outputs_to_cache
from align_ti.training.held_out import weightless_from
from align_ti.training.objective import distillation_loss
from tests import family_models, small, test_family_chain, tiny
from tests.launching import on_processes

OBJECTIVE = Objective.only(
    sft=Sft(weight=0.5), kd=Kd(temperature=2.0), iva=Iva(layer=1, weight=0.7, images="separately")
)


def with_kept(teacher, batch, layer=1):
    kept = outputs_to_cache(teacher, batch, layer)
    return {**batch, **{name: torch.cat([one[name] for one in kept]) for name in kept[0]}}


def head_of(teacher, folder):
    save_head(teacher, folder)
    return load_head(folder)


def loss_and_gradients(student, teacher, batch, objective=OBJECTIVE):
    student.zero_grad()
    out = distillation_loss(student, teacher, batch, objective)
    out.loss.backward()
    gradients = {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}
    return out, gradients


def check_equal(one, other):
    (online, theirs), (cached, ours) = one, other
    assert torch.equal(online.loss, cached.loss)
    assert online.terms.keys() == cached.terms.keys()
    for name, value in online.terms.items():
        assert torch.equal(value, cached.terms[name]), name
        assert value > 0 or name == "iva", name
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize("composition", tiny.COMPOSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_terms_and_gradients_are_the_teachers_own(composition, side, tmp_path):
    student, teacher = tiny.model(0), tiny.model(1, hidden=48)
    batch = tiny.batch(tiny.COMPOSITIONS[composition], side=side, extra_padding=2)
    light = head_of(teacher, tmp_path)
    online = loss_and_gradients(student, teacher, batch)
    check_equal(online, loss_and_gradients(student, light, with_kept(teacher, batch)))


@pytest.mark.parametrize("family", family_models.FAMILIES)
def test_every_family_is_cached_exactly(family, tmp_path):
    made = family_models.FAMILIES[family]
    student, teacher = made.model(0), made.model(1)
    # Where every layer slides, IVA has none to read.
    layer = next(reversed(full_attention_layers(teacher)), None)
    batch = made.batch(family_models.COMPOSITIONS["one turn"])
    objective = Objective.only(sft=Sft(), kd=Kd(), iva=Iva(layer=layer or 0, weight=float(layer is not None)))
    light = head_of(teacher, tmp_path)
    assert type(light) is type(teacher)
    online = loss_and_gradients(student, teacher, batch, objective)
    check_equal(online, loss_and_gradients(student, light, with_kept(teacher, batch, layer), objective))


@pytest.mark.parametrize("layer", [None, 1])
def test_records_without_weight_leave_nothing_kept_behind(layer):
    # A bug: an evaluation on several processes failed where filler records had rows in the cache.
    student, teacher = tiny.model(0), tiny.model(1)
    batch, objective = (
        tiny.batch(tiny.COMPOSITIONS["text only in the batch"]),
        OBJECTIVE if layer else Objective.only(kd=Kd()),
    )
    online, _ = loss_and_gradients(student, teacher, weightless_from(batch, 1), objective)
    cached, _ = loss_and_gradients(student, teacher, weightless_from(with_kept(teacher, batch, layer), 1), objective)
    for name, value in online.terms.items():
        assert float(value) == pytest.approx(float(cached.terms[name]), rel=1e-10) and value > 0, name
    assert online.masses.keys() == cached.masses.keys()


def test_the_head_alone_has_no_backbone_in_memory_and_moves(tmp_path):
    light = head_of(tiny.model(1), tmp_path)
    assert has_head_only(light)
    assert all(weight.is_meta for weight in backbone(light).parameters())
    move(light, "cpu")
    assert not has_head_only(tiny.model(1))


def test_a_batch_that_holds_too_little_is_refused(tmp_path):
    student, teacher = tiny.model(0), tiny.model(1)
    batch, light = tiny.batch(tiny.COMPOSITIONS["one turn"]), head_of(teacher, tmp_path)
    with pytest.raises(BatchError, match=r"head alone"):
        distillation_loss(student, light, batch, OBJECTIVE)
    with pytest.raises(BatchError, match=r"response rows alone"):
        distillation_loss(student, light, with_kept(teacher, batch, None), OBJECTIVE)
    whole = with_kept(teacher, batch)
    with pytest.raises(BatchError, match=r"its labels and roles select"):
        distillation_loss(student, light, {**whole, TEACHER_HIDDEN: whole[TEACHER_HIDDEN][1:]}, OBJECTIVE)
    with pytest.raises(BatchError, match=r"objective.tpa asks the teacher more"):
        distillation_loss(student, light, whole, Objective(iva=Iva(layer=1)))
    # KD alone needs no attention.
    only = Objective.only(kd=Kd())
    online = loss_and_gradients(student, teacher, batch, only)
    check_equal(online, loss_and_gradients(student, light, with_kept(teacher, batch, None), only))
    check_equal(online, loss_and_gradients(student, light, whole, only))
    assert TEACHER_ATTENTION in whole


# --- from a recipe ----------------------------------------------------------------------------------------------------


TERMS = {"tpa": {"weight": 0.0}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair")
    small.write_pair(path)
    small.write_records(path)
    return path


def recipe_of(pair, cache, run="run", **sections):
    """A recipe that trains from the cache; batches of 1, as the cache is made."""
    content = small.recipe(pair, objective={**TERMS, **sections.pop("objective", {})}, **sections)
    content["out"] = str(Path(cache).parent / run)
    content["training"] |= {"per_device_train_batch_size": 1, "max_steps": 3}
    content["data"] |= {"teacher_cache": str(cache)}
    return Recipe.model_validate(content)


def online_of(recipe, run="online"):
    data = recipe.data.model_copy(update={"teacher_cache": None})
    return recipe.model_copy(update={"data": data, "out": str(Path(recipe.out).parent / run)})


@pytest.fixture(scope="module")
def cached(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "cache"
    return cache_teacher(recipe_of(pair, folder), shard_bytes=2**14)


def logged(run):
    return [{name: line[name] for name in ("loss", "sft", "kd", "iva") if name in line} for line in run.read_metrics()]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_run_from_the_cache_is_the_run_with_the_teacher(pair, tmp_path, autocast):
    recipe = recipe_of(pair, tmp_path / "cache")
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"bf16": autocast})})
    cache_teacher(recipe)
    moved = recipe.model_copy(update={"teacher": recipe.teacher.model_copy()})
    from_cache, online = distil(moved), distil(online_of(recipe))
    assert logged(from_cache) == logged(online)
    assert logged(from_cache)[0]["kd"] > 0 and logged(from_cache)[0]["iva"] > 0
    ours, theirs = (load_file(run.student / "model.safetensors") for run in (from_cache, online))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_batches_and_epochs_of_any_kind_come_from_one_cache(pair, cached, tmp_path):
    """Padding and other batches round differently; nothing else differs."""
    recipe = recipe_of(pair, cached.folder)
    training = recipe.training.model_copy(
        update={"per_device_train_batch_size": 5, "dataloader_num_workers": 1, "gradient_accumulation_steps": 2}
    )
    recipe = recipe.model_copy(update={"training": training, "out": str(tmp_path / "run")})
    for ours, theirs in zip(logged(distil(recipe)), logged(distil(online_of(recipe))), strict=True):
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4), name


def test_sizes_are_what_is_on_disk(cached):
    shards = list(cached.folder.glob("shard-*.safetensors"))
    assert len(shards) > 1
    assert cached.totals.bytes == sum(path.stat().st_size for path in shards)
    assert cached.totals.samples == cached.records == cached.measured == 12
    # Hidden states in float32, and one float32 a visual token; what is more is the files' own headers.
    visual = 12 * 36
    plain = cached.totals.rows * cached.hidden * 4 + visual * 4
    assert plain < cached.totals.bytes < 1.5 * plain
    assert cached.totals.rows > visual
    assert cached.cost.teacher > 0 and cached.cost.writing > 0 and cached.cost.reading > 0


def test_the_break_even_is_where_the_cache_takes_less_time():
    for teacher, writing, reading in ((1.0, 0.2, 0.1), (1.0, 0.0, 0.0), (0.3, 2.0, 0.29), (1.0, 1.0, 0.5)):
        even = passes_until_even(teacher, writing, reading)
        assert even * teacher > teacher + writing + even * reading
        assert (even - 1) * teacher <= teacher + writing + (even - 1) * reading
    assert passes_until_even(1.0, 0.1, 1.0) is None


@pytest.mark.parametrize(
    ("section", "update", "named"),
    [
        ("training", {"bf16": True}, r"autocast .* is 'none' there and 'bfloat16' here"),
        ("teacher", {"dtype": "auto"}, r"teacher's precision .* is 'float32' there and 'auto' here"),
        ("objective", {"iva": {"layer": 1}}, "objective.iva.layer"),
        ("data", {"max_length": 53, "too_long": "truncate"}, "none of these tokens, roles and pixels"),
    ],
)
def test_a_cache_made_otherwise_is_refused(pair, cached, section, update, named):
    found = Made.read(cached.folder)
    assert found.layer == 0, "the other layer of the test is 1"
    content = recipe_of(pair, cached.folder).model_dump(exclude_unset=True)
    content = {**content, "out": content["out"] + section, section: {**content[section], **update}}
    with pytest.raises(CacheError, match=named) as error:
        distil(Recipe.model_validate(content))
    assert "align-ti cache" in str(error.value)


@pytest.mark.parametrize("changed", ["weights", "template", "processor"])
def test_another_teacher_processor_or_template_is_refused(pair, cached, tmp_path, changed):
    shutil.copytree(pair, tmp_path / "pair")
    teacher = tmp_path / "pair" / "teacher"
    if changed == "weights":
        weights = load_file(teacher / "model.safetensors")
        name = next(name for name in weights if "mlp" in name)
        weights[name].view(-1)[0] += 1e-3
        save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
        said = r"the teacher \(config or weights\)"
    else:
        processor = load_processor(str(teacher))
        if changed == "template":
            processor.chat_template = processor.chat_template + " "
            said = "the chat template"
        else:
            processor.image_processor.image_mean = [0.4, 0.4, 0.4]
            said = "the processor that the teacher reads by"
        processor.save_pretrained(teacher)
    recipe = recipe_of(tmp_path / "pair", cached.folder, f"run-{changed}")
    with pytest.raises(CacheError, match=said) as error:
        distil(recipe)
    assert "make it again" in str(error.value)
    # Nor is it gone on with.
    with pytest.raises(CacheError, match=said) as error:
        cache_teacher(recipe)
    assert "--out" in str(error.value)


@pytest.mark.parametrize("changed", ["words", "picture"])
def test_other_data_are_refused_and_added(pair, tmp_path, changed):
    shutil.copytree(pair, tmp_path / "pair")
    recipe = recipe_of(tmp_path / "pair", tmp_path / "cache")
    cache_teacher(recipe)
    if changed == "words":
        file = tmp_path / "pair" / "train.json"
        file.write_text(file.read_text().replace('"gpt", "value": "', '"gpt", "value": "1'))
    else:
        small.write_records(tmp_path / "pair", seed=1)
    with pytest.raises(CacheError, match=r"record 1, id 0.*none of these tokens, roles and pixels") as error:
        distil(recipe)
    assert "adds what is missing" in str(error.value)
    assert cache_teacher(recipe).totals.samples == 24
    distil(recipe)


def test_another_version_is_refused(pair, cached, tmp_path):
    shutil.copytree(cached.folder, tmp_path / "cache")
    file = tmp_path / "cache" / "made.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "format": 0}))
    with pytest.raises(CacheError, match=r"of format 0; this version reads and writes format 1"):
        distil(recipe_of(pair, tmp_path / "cache"))
    file.write_text(json.dumps({**told, "versions": {**told["versions"], "transformers": "5.0.0"}}))
    with pytest.raises(CacheError, match=r"two caches"):
        distil(recipe_of(pair, tmp_path / "cache", "other"))
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    (tmp_path / "cache" / "index.json").write_text(json.dumps({**index, "made": Made.read(tmp_path / "cache").digest}))
    with pytest.raises(CacheError, match=r"versions is .*5.0.0"):
        distil(recipe_of(pair, tmp_path / "cache", "third"))


def test_recipes_that_ask_the_teacher_more_are_refused_by_name(pair, cached):
    content = recipe_of(pair, cached.folder).model_dump(exclude_unset=True)
    for update, said in (
        ({"objective": {}}, r"tpa ask.* more than a cache holds.*objective.tpa.weight: 0"),
        ({"objective": {**TERMS, "llava_kd_rdist": {}}}, r"llava_kd_rdist ask.*objective.llava_kd_rdist.weight: 0"),
        ({"objective": {name: {"weight": 0} for name in ("kd", "iva", "tpa")}}, "no term with weight compares"),
        ({"data": {**content["data"], "on_policy": {}}}, "leave data.on_policy out"),
    ):
        with pytest.raises(ValueError, match=said):
            Recipe.model_validate({**content, **update})
    with pytest.raises(ConfigError, match=r"tpa ask.* more than a cache holds"):
        cache_teacher(online_of(Recipe.model_validate(content)).model_copy(update={"objective": Objective()}), "unused")
    with pytest.raises(ConfigError, match=r"--out"):
        cache_teacher(online_of(Recipe.model_validate(content)))


def test_a_teacher_with_a_processor_of_its_own_is_cached_in_its_own_sequence(tmp_path):
    """Other images, another template, other numbers of visual tokens: its rows are resampled from the cache as from its pass."""
    test_family_chain.write_two_families(tmp_path)
    content = test_family_chain.folder_recipe(
        tmp_path, objective={**TERMS, "iva": {"resample": True, "layer": 1}}, check=False
    )
    content["training"] |= {"per_device_train_batch_size": 1, "max_steps": 6}
    content["data"] |= {"teacher_cache": str(tmp_path / "cache")}
    recipe = Recipe.model_validate(content)
    cache_teacher(recipe)
    from_cache, online = logged(distil(recipe)), logged(distil(online_of(recipe)))
    assert from_cache == online
    assert any(line.get("iva", 0) > 0 for line in online)
    trained = recipe.training.model_copy(update={"per_device_train_batch_size": 3, "max_steps": 2})
    recipe = recipe.model_copy(update={"training": trained, "out": str(tmp_path / "batches")})
    for ours, theirs in zip(logged(distil(recipe)), logged(distil(online_of(recipe, "online3"))), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_stream_reads_the_cache_of_its_records(pair, cached, tmp_path):
    recipe = recipe_of(pair, cached.folder, objective={"iva": {"layer": 0}})
    data = recipe.data.model_copy(update={"stream": True})
    recipe = recipe.model_copy(update={"data": data, "out": str(tmp_path / "run")})
    assert logged(distil(recipe)) == logged(distil(online_of(recipe)))
    with pytest.raises(ConfigError, match=r"--set data.stream=false"):
        cache_teacher(recipe)


def test_a_cache_of_response_rows_serves_kd_alone(pair, tmp_path):
    recipe = recipe_of(pair, tmp_path / "cache", objective={"iva": {"weight": 0.0}})
    made = cache_teacher(recipe)
    assert made.layer is None
    assert made.totals.rows < made.totals.tokens / 5
    assert logged(distil(recipe)) == logged(distil(online_of(recipe)))
    with pytest.raises(CacheError, match=r"which rows are kept .* is 'response' there and 'response and visual' here"):
        distil(recipe_of(pair, tmp_path / "cache", "other"))


# --- stops ------------------------------------------------------------------------------------------------------------


def contents(folder):
    cache = TeacherCache(folder)
    return {key: cache.load(key, "here") for key in cache.places}


def check_same_contents(one, other):
    ours, theirs = contents(one), contents(other)
    assert ours.keys() == theirs.keys()
    for key, kept in ours.items():
        for name, value in kept.items():
            assert torch.equal(value, theirs[key][name])


@pytest.mark.parametrize("left", ["nothing more", "half a draft", "half a shard", "a lost shard"])
def test_a_stopped_cache_is_gone_on_with_and_is_the_same(pair, cached, tmp_path, left):
    recipe, folder = recipe_of(pair, tmp_path / "cache"), tmp_path / "cache"

    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match=r"7 of this process's 12"):
        cache_teacher(recipe, shard_bytes=2**14, advance=stop)
    with pytest.raises(CacheError, match=r"unfinished"):
        distil(recipe)
    shards = sorted(folder.glob("shard-*.safetensors"))
    assert len(shards) > 1
    if left == "half a draft":
        (folder / ".draft-1-000.safetensors").write_bytes(shards[0].read_bytes()[:100])
    elif left == "half a shard":
        shards[0].write_bytes(shards[0].read_bytes()[:-5])
    elif left == "a lost shard":
        shards[0].unlink()
    cache_teacher(recipe, shard_bytes=2**14)
    assert not list(folder.glob(".draft-*"))
    check_same_contents(folder, cached.folder)
    # Nothing is left to do, and nothing is done again.
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    cache_teacher(recipe)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def test_what_writing_took_is_kept_when_nothing_is_left_to_write(pair, tmp_path):
    recipe = recipe_of(pair, tmp_path / "cache", objective={"iva": {"weight": 0.0}})

    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        cache_teacher(recipe, advance=stop)
    assert teacher_cache.add_writing(tmp_path / "cache", 0.0, 0) > 0
    first = cache_teacher(recipe).cost.writing
    assert first > 0
    assert json.loads((tmp_path / "cache" / "writing.json").read_text())["samples"] == 12
    assert cache_teacher(recipe).cost.writing == first


def test_writing_is_a_mean_over_all_calls(tmp_path):
    assert teacher_cache.add_writing(tmp_path, 0.0, 0) == 0
    assert teacher_cache.add_writing(tmp_path, 6.0, 2) == 3
    assert teacher_cache.add_writing(tmp_path, 2.0, 2) == 2
    assert teacher_cache.add_writing(tmp_path, 0.5, 0) == 2


def test_a_damaged_shard_is_told_while_it_is_read(pair, cached, tmp_path):
    shutil.copytree(cached.folder, tmp_path / "cache")
    for shard in (tmp_path / "cache").glob("shard-*"):
        content = bytearray(shard.read_bytes())
        content[-3] ^= 64
        shard.write_bytes(content)
    cache, told = TeacherCache(tmp_path / "cache"), []
    for key in cache.places:
        try:
            cache.load(key, "record 3")
        except CacheError as error:
            told.append(str(error))
    assert len(told) == len(list((tmp_path / "cache").glob("shard-*")))
    for message in told:
        assert re.search("checksum.*record 3.*remove it", message)


def test_a_shard_that_cannot_be_read_now_is_kept(cached, monkeypatch):
    # Too many open files, or a server that was away for a moment, and good shards were removed as damaged.
    before = {path.name for path in cached.folder.glob("shard-*")}

    def away(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(teacher_cache, "safe_open", away)
    with pytest.raises(CacheError, match="Too many open files"):
        teacher_cache.whole_shards(cached.folder, TeacherCache(cached.folder).made)
    assert before and {path.name for path in cached.folder.glob("shard-*")} == before


def test_a_reader_keeps_few_shards_open_and_none_when_it_is_sent_away(cached, monkeypatch):
    monkeypatch.setattr(teacher_cache, "OPEN_SHARDS", 2)
    cache = TeacherCache(cached.folder)
    first = {key: cache.load(key, "here") for key in cache.places}
    assert len(list(cached.folder.glob("shard-*"))) > len(cache.opened) == 2
    sent = ForkingPickler.loads(ForkingPickler.dumps(cache))
    assert not sent.opened and sent.places == cache.places
    for key, kept in first.items():
        for name, value in kept.items():
            assert torch.equal(value, sent.load(key, "here")[name])


KILLED = """
import os, sys
from pathlib import Path
import align_ti.data.teacher_cache as teacher_cache
from align_ti.config import read_recipe
from align_ti.pipeline.caching import cache_teacher
real, calls = teacher_cache.save_file, [0]
def save(tensors, path, metadata):
    calls[0] += 1
    real(tensors, path, metadata)
    if calls[0] == 3:
        with open(path, "r+b") as file:
            file.truncate(int(sys.argv[2]))
        os._exit(9)
teacher_cache.save_file = save
cache_teacher(read_recipe(Path(sys.argv[1])), shard_bytes=2**14)
"""


@pytest.mark.parametrize("size", [0, 1000])
def test_a_kill_in_the_middle_of_a_file_loses_that_file_alone(pair, cached, tmp_path, size):
    recipe, folder = recipe_of(pair, tmp_path / "cache"), tmp_path / "cache"
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "recipe.yaml"), str(size)]
    assert subprocess.run(command, capture_output=True).returncode == 9
    assert len(list(folder.glob("shard-*"))) == 2
    assert len(list(folder.glob(".draft-*"))) == 1
    cache_teacher(recipe, shard_bytes=2**14)
    assert not list(folder.glob(".draft-*"))
    check_same_contents(folder, cached.folder)


SEVERAL = """
import sys
from pathlib import Path
from align_ti.config import read_recipe
from align_ti.pipeline.caching import cache_teacher
from align_ti.processes import part_in_order
found = cache_teacher(read_recipe(Path(sys.argv[1])), shard_bytes=2**14)
assert found.totals.samples == 12
part_in_order()
"""


def test_two_processes_write_one_cache(pair, cached, tmp_path):
    recipe, folder = recipe_of(pair, tmp_path / "cache"), tmp_path / "cache"
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    on_processes(2, SEVERAL, tmp_path / "recipe.yaml")
    names = {path.name.split("-")[1] for path in folder.glob("shard-*")}
    assert names == {"000", "001"}
    check_same_contents(folder, cached.folder)
    # One process goes on where two stopped.
    next(iter(folder.glob("shard-001-*"))).unlink()
    cache_teacher(recipe)
    check_same_contents(folder, cached.folder)


def test_the_verb_says_bytes_and_break_even_and_writes_nothing_in_a_dry_run(pair, tmp_path):
    recipe = recipe_of(pair, tmp_path / "cache")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(app, ["cache", str(file), *more])
        assert result.exit_code == 0, result.output
        said = " ".join(result.output.replace("│", " ").split())
        assert re.search(r"\d+ bytes per teacher token, \d+ per stored position", said)
        assert re.search(r"break-even \d+ passes|break-even never", said)
        assert (tmp_path / "cache").exists() == (not more)


def test_an_estimate_writes_nothing_and_is_near_what_comes(pair, cached, tmp_path):
    recipe = recipe_of(pair, tmp_path / "cache")
    found = estimate(recipe)
    assert not list(tmp_path.iterdir())
    assert found.measured == 8 and found.records == 12
    assert found.totals.bytes == pytest.approx(cached.totals.bytes, rel=0.2)
    assert found.totals.tokens == pytest.approx(cached.totals.tokens, rel=0.1)
    assert found.cost.teacher > 0 and found.cost.reading > 0
