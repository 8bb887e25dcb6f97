"""What the benchmarks compare is the same work: the rivals' losses and gradients equal ours."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from benchmarks import topk
from benchmarks.evaluation import as_text, one_by_one, ours
from benchmarks.levers import second_pass_attention
from benchmarks.rivals import interleave, released_design, ribbon_mask, vanilla_kd
from benchmarks.rounds import ratios, rotated, seconds_by_round, summary
from benchmarks.scaling import AXES, Axis, Point, Setting, along, drawn, estimated_gib, exponent, growth, straight
from benchmarks.shapes import CPU, Decoder, Shape, Tower, make_batch, make_candidates, make_pair, parameters
from benchmarks.step import TARGETS, compared, losses_of, measured, targets_of
from benchmarks.variants import VARIANTS, align_ti, make_bench, make_variants, scripted

from align_ti.config import Iva, Objective, Tpa
from align_ti.digits.files import Sizes, write_benchmark
from align_ti.evaluation.benchmarks import benchmark as read_benchmark
from align_ti.models.loading import load_model, load_processor
from align_ti.training import passes
from align_ti.training.objective import distillation_loss

TINY = Shape(
    student=Decoder(hidden=32, layers=2, heads=4, key_heads=2, head_dim=8, intermediate=48),
    teacher=Decoder(hidden=48, layers=3, heads=4, key_heads=2, head_dim=8, intermediate=64),
    tower=Tower(hidden=16, layers=1, heads=2, intermediate=24),
    vocabulary=200,
    side=3,
    instruction=4,
    response=5,
    batch=2,
)
LAYER = 1
KD = Objective(iva=Iva(weight=0.0, layer=LAYER), tpa=Tpa(weight=0.0))
ALIGN_TI = Objective(iva=Iva(layer=LAYER))
# transformers computes norms, eager softmax and its own loss in float32 whatever the model is in.
ROUNDING = {"rtol": 1e-6, "atol": 1e-7}


def test_both_ways_of_asking_ask_the_same(tmp_path):
    write_benchmark(tmp_path / "data", sizes=Sizes(train=1, validation=1, test=1))
    folder = str(tmp_path / "data" / "teacher")
    model, processor = load_model(folder, "float32"), load_processor(folder)
    items = read_benchmark("digits").items(tmp_path / "data")
    plain = one_by_one(model, processor, items)
    assert plain == ours(model, processor, items, 3) and len(set(plain)) > 3
    # What lmms-eval makes of a question, by the template that it is given.
    content = [{"type": "image"}, {"type": "text", "text": items[0].text}]
    told = [{"role": "user", "content": f"<image>\n{items[0].text}"}]
    one, other = (
        processor.apply_chat_template(message, chat_template=template, add_generation_prompt=True)
        for message, template in (
            ([{"role": "user", "content": content}], processor.chat_template),
            (told, as_text(processor.chat_template)),
        )
    )
    assert one == other


@pytest.fixture(scope="module")
def tiny():
    student, teacher = make_pair(TINY, dtype=torch.float64)
    with torch.no_grad():
        for model in (student, teacher):
            # Random weights of the usual size give almost even distributions, where a wrong row goes unseen.
            for name, parameter in model.named_parameters():
                if "vision_tower" not in name:
                    parameter.mul_(2)
    return student, teacher, make_batch(TINY, dtype=torch.float64)


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_same(student, one, other):
    torch.testing.assert_close(one.double(), other.double(), **ROUNDING)
    left, right = gradients(student, one), gradients(student, other)
    assert left.keys() == right.keys()
    for name, grad in left.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(right[name] / scale, grad / scale, rtol=0, atol=1e-5, msg=name)


def test_vanilla_kd_as_people_write_it_is_our_sft_and_kd(tiny):
    student, teacher, batch = tiny
    ours = distillation_loss(student, teacher, batch, KD)
    assert ours.terms["kd"] > 0.1
    assert_same(student, vanilla_kd(student, teacher, batch), ours.loss)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_the_released_design_is_our_whole_loss(tiny, share):
    student, teacher, batch = tiny
    candidates = make_candidates(batch, TINY, 4, share)
    ours = distillation_loss(student, teacher, batch, ALIGN_TI, candidates)
    assert float(ours.branch_share) == pytest.approx(share)
    assert min(ours.terms.values()) > 0.1
    assert_same(student, released_design(student, teacher, batch, candidates, LAYER), ours.loss)


def test_the_released_design_is_our_whole_loss_with_candidates_drawn_twice(tiny):
    student, teacher, batch = tiny
    candidates = make_candidates(batch, TINY, 4, 1.0)
    candidates[..., 1] = candidates[..., 0]
    candidates[..., 3] = batch["input_ids"]
    ours = distillation_loss(student, teacher, batch, ALIGN_TI, candidates)
    assert float(ours.branch_share) == pytest.approx(0.5)
    assert_same(student, released_design(student, teacher, batch, candidates, LAYER), ours.loss)


def test_one_candidate_fewer_or_another_layer_is_another_loss(tiny):
    student, teacher, batch = tiny
    candidates = make_candidates(batch, TINY, 4, 1.0)
    losses = [
        released_design(student, teacher, batch, *chosen).item()
        for chosen in ((candidates, LAYER), (candidates[..., :3], LAYER), (candidates, LAYER + 1))
    ]
    assert len({round(loss, 4) for loss in losses}) == 3


def test_the_ribbon_shows_gold_tokens_before_a_step_and_the_token_itself():
    ids, roles = torch.tensor([[10, 11, 12]]), torch.tensor([[0, 3, 3]])
    ribbon = interleave(ids, roles, torch.tensor([[[20], [21], [22]]]))
    assert ribbon.ids.tolist() == [[10, 11, 21, 12, 22]]
    assert ribbon.source.tolist() == [0, 1, 1, 2, 2]
    seen = ribbon_mask(ribbon, torch.float64)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_samples_with_roles_at_different_places_are_refused():
    with pytest.raises(ValueError, match="different places"):
        interleave(torch.zeros(2, 2, dtype=torch.long), torch.tensor([[0, 3], [3, 0]]), torch.zeros(2, 2, 1).long())


def test_the_processor_shape_is_the_one_that_is_named():
    student, teacher = make_pair(CPU)
    assert round(parameters(student) / 1e6) == 15
    assert round(parameters(teacher) / 1e6) == 52
    assert CPU.visual == 729


def test_every_variant_takes_a_step_and_those_of_one_loss_agree():
    names = tuple(name for name in VARIANTS if not name.endswith("compiled"))
    variants = {variant.name: variant for variant in make_variants(names, TINY)}
    losses = losses_of(variants, torch.float32)
    assert losses["vanilla_kd"] == pytest.approx(losses["ours_kd"], rel=1e-5)
    assert losses["released_design"] == pytest.approx(losses["align_ti_1.00"], rel=1e-5)
    assert losses["align_ti_0.25"] == pytest.approx(losses["align_ti_0.25_two_towers"], rel=1e-6)
    assert losses["align_ti_0.25"] != losses["align_ti_1.00"]
    bench = variants["vanilla_kd"].bench
    assert all(parameter.grad is None for parameter in bench.student.parameters())
    assert losses_of(variants, torch.float32) == pytest.approx(losses, rel=1e-6)  # the weights are what they were


def test_losses_that_do_not_agree_stop_the_measurement():
    variants = {variant.name: variant for variant in make_variants(("vanilla_kd", "align_ti_0.25"), TINY)}
    with pytest.raises(SystemExit, match="they are one number"):
        losses_of({"vanilla_kd": variants["vanilla_kd"], "ours_kd": variants["align_ti_0.25"]}, torch.float32)


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match=r"align_ti_2\.00 is no variant"):
        make_variants(("align_ti_2.00",), TINY)


def test_the_ways_to_attend_for_candidates_are_one_number():
    # The command compares them before it takes their time.
    assert set(second_pass_attention(7, 1)) == {"one dense mask", "rows of 256 at most", "merged by log-sum-exp"}


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_candidates_are_drawn_and_then_replaced_by_those_of_the_share(tiny, share, monkeypatch):
    student, teacher, batch = tiny
    drawn = []
    draw = passes.draw_candidates
    monkeypatch.setattr(passes, "draw_candidates", lambda *given: drawn.append(draw(*given)))
    with scripted(make_candidates(batch, TINY, 4, share)):
        out = distillation_loss(student, teacher, batch, ALIGN_TI)
    assert float(out.branch_share) == pytest.approx(share)
    assert len(drawn) == 1
    assert len(drawn[0].tokens.unique()) > 10


def test_a_variant_without_a_shared_tower_reads_it_twice():
    bench, passes = make_bench(TINY), []
    for model in (bench.student, bench.teacher):
        model.model.vision_tower.encoder.register_forward_hook(lambda *_given: passes.append(1))
    for shared_tower, expected in ((True, 1), (False, 2)):
        passes.clear()
        align_ti(bench, 0.5, shared_tower=shared_tower).step()
        assert len(passes) == expected


def test_rounds_begin_with_another_variant_each_and_slow_ones_stop_early():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = seconds_by_round(works, {"a": 3, "b": 3, "c": 1})
    assert "".join(calls) == "abc" + "ba" + "ab"
    assert [len(values) for values in seconds.values()] == [3, 3, 1]
    assert rotated(["a", "b"], 3) == ["b", "a"]


def test_ratios_are_taken_within_rounds():
    assert ratios([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == {"median": 2.0, "lower": 2.0, "upper": 2.5}
    assert summary([4.0]) == {"median": 4.0, "lower": 4.0, "upper": 4.0}


def test_the_results_of_a_step_hold_every_round_and_judge_the_targets():
    variants = {variant.name: variant for variant in make_variants(("vanilla_kd", "ours_kd"), TINY)}
    results = json.loads(json.dumps(measured(variants, 2, 1, 1)))
    assert [len(result["seconds_by_round"]) for result in results.values()] == [2, 2]
    assert compared(results, "vanilla_kd", "vanilla_kd", "time")["median"] == 1.0
    results["vanilla_kd"]["mib"], results["ours_kd"]["mib"] = 100.0, 60.0
    rows = {(row["variant"], row["against"], row["of"]): row["met"] for row in targets_of(results, "cpu")}
    assert len(rows) == len(TARGETS["cpu"])
    assert rows["ours_kd", "vanilla_kd", "memory"] is True
    assert rows["align_ti_0.25", "vanilla_kd", "time"] is None
    results["ours_kd"]["mib"] = 61.0
    assert targets_of(results, "cpu")[1]["met"] is False


@pytest.mark.parametrize("power", [1, 2])
def test_growth_finds_the_power_and_the_line(power):
    sizes = [1, 2, 4, 8, 16]
    values = [3.0 * size**power for size in sizes]
    assert exponent(sizes, values) == pytest.approx(power)
    line = straight(sizes, values)
    assert (line["r2"] == pytest.approx(1.0)) == (power == 1)
    points = {str(x): {"a": {"seconds": {"median": y}, "mib": None}} for x, y in zip(sizes, values, strict=True)}
    assert growth(points, "a")["seconds"]["exponent"] == pytest.approx(power)
    assert "mib" not in growth(points, "a")


def test_every_axis_varies_one_size_and_is_estimated_to_fit():
    for axis in AXES.values():
        assert list(axis.points) == sorted(axis.points)
        estimates = [estimated_gib("vanilla_kd", point) for point in axis.points.values()]
        assert estimates == sorted(estimates)
        assert all(math.isfinite(value) and value > 0.5 for value in estimates)
    assert list(AXES["visual"].points) == [196, 400, 729, 1444, 2916]


def test_an_axis_is_measured_drawn_and_says_what_was_left_out():
    points = {n: Point(dataclasses.replace(TINY, batch=n)) for n in (1, 2, 3)}
    known = {points[3]: {name: {"left_out": "too large"} for name in ("align_ti", "vanilla_kd")}}
    result = along(Axis("samples a batch", points, "linear"), Setting(rounds=1), known)
    assert result["points"]["3"]["vanilla_kd"] == {"left_out": "too large"}
    assert result["points"]["2"]["align_ti"]["seconds"]["median"] > 0
    assert len(known) == 3
    figure = drawn({"batch": json.loads(json.dumps(result))})
    time, memory = figure.axes
    assert [list(line.get_xdata()) for line in time.lines] == [[1, 2], [1, 2]]
    assert len(memory.lines) == 2
    alone = along(Axis("samples a batch", {1: points[1]}, "linear"), Setting(rounds=1, limit_gib=0.1), {})
    assert "more than the 0.1 GiB" in alone["points"]["1"]["align_ti"]["left_out"]


def test_all_tokens_but_one_and_the_rest_are_the_exact_divergence():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 9, dtype=torch.float64) * 3
    exact = topk.measured(teacher, student)["exact_nats"]
    slope = student.softmax(-1) - teacher.softmax(-1)
    values = [topk.coarse(teacher, student, count, rest=True) for count in range(1, 9)]
    assert values[-1][0] == pytest.approx(exact, abs=1e-4)
    assert torch.allclose(values[-1][1], slope)
    # Coarser distributions are no further apart than finer ones.
    assert [value for value, _ in values] == sorted(value for value, _ in values)
    whole, its = topk.coarse(teacher, student, 9, rest=False)
    assert whole == pytest.approx(exact, abs=1e-4) and torch.allclose(its, slope)
