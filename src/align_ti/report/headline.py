"""The top of the page: one sentence and one chart that say how much of the gap to the teacher was closed, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from align_ti.evaluation.metrics import Metric
from align_ti.evaluation.results import Scores
from align_ti.evaluation.statistics import Difference, gap_closed, interval, paired
from align_ti.report import study
from align_ti.report.drawing import (
    INK,
    PAPER,
    SOFT,
    WIDTH,
    Drawing,
    around,
    axes,
    drawn,
    look,
    looks,
    picture_of,
    short,
)
from align_ti.report.folders import Model, names_in_colour
from align_ti.report.numbers import MINUS, TIMES, amount, amounts, bounds, decimals, number, points, signed


@dataclass(frozen=True, slots=True)
class ModelBar:
    """A model in the chart."""

    key: str
    label: str
    role: str
    value: float
    low: float | None
    high: float | None
    seconds: float | None = None
    """Its training time; None where it is not known, or the model was not trained here."""


@dataclass(frozen=True, slots=True)
class Headline:
    """What a reader with ten seconds sees."""

    sentences: Sequence[str]
    chart: Drawing | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The models that were asked the same questions, and what is compared with what."""

    benchmark: str
    scores: Mapping[str, Scores]
    """By model."""
    models: Sequence[Model]
    base: Model | None
    """The student that the gap is counted from: one trained by SFT alone, or the untouched one."""
    best: Model | None
    teacher: Model | None
    candidates: int
    """Students among which the best one is the best."""

    def metric(self, model: Model) -> Metric:
        """A model's headline."""
        scores = self.scores[model.key]
        return scores.metrics[scores.headline]


def comparison_of(models: Sequence[Model]) -> Comparison | None:
    """The benchmark that most models were asked the same questions of, own questions before others; None if none was asked."""
    groups: dict[tuple[str, str], list[Model]] = {}
    for model in models:
        for name, scores in model.scores.items():
            if name != "fidelity":
                groups.setdefault((name, scores.questions), []).append(model)
    groups = {key: found for key, found in groups.items() if any(model.role == "trained" for model in found)}
    if not groups:
        return None
    (benchmark, _), found = max(groups.items(), key=lambda item: len(item[1]))
    return comparison(benchmark, found)


def comparison(benchmark: str, models: Sequence[Model]) -> Comparison:
    """Who is compared with whom on a benchmark."""
    scores = {model.key: model.scores[benchmark] for model in models}
    value = {model.key: scores[model.key].metrics[scores[model.key].headline].score for model in models}
    starts = [model for model in models if model.role == "start"]
    trained = [model for model in models if model.role == "trained"]
    by_sft = [model for model in trained if set(model.terms) == {"sft"}]
    others = [model for model in trained if model not in by_sft]
    base = next(iter([*(by_sft if others else []), *starts]), None)
    candidates = others or trained
    best = max(candidates, key=lambda model: value[model.key]) if candidates else None
    teacher = next((model for model in models if model.role == "teacher"), None)
    return Comparison(benchmark, scores, models, base, best, teacher, len(candidates))


def headline_of_runs(models: Sequence[Model]) -> Headline:
    """The sentence and the chart of run folders."""
    found = comparison_of(models)
    if found is None or found.best is None:
        return Headline(["The students have not been evaluated on any questions."], None)
    closed = gap_of(found)
    sentences = [in_words(found, closed), *cautions(found, models)]
    return Headline(sentences, gap_chart_of_runs(found, closed))


def gap_of(found: Comparison) -> Difference | None:
    """How much of the gap the best student closed; None where there is no teacher, no student to count from, or no clear gap."""
    if found.base is None or found.teacher is None or found.best is None:
        return None
    goal, start = found.metric(found.teacher), found.metric(found.base)
    way = paired(goal, start)
    if isnan(way.low) or way.low <= 0:
        return None
    return gap_closed([found.metric(found.best)], [start], goal)


def in_words(found: Comparison, closed: Difference | None) -> str:
    """The sentence."""
    assert found.best is not None
    best, base, unit = found.best, found.base, found.metric(found.best).unit
    title = title_of(found.scores[best.key])
    cost = cost_in_words(best, base)
    if closed is not None and base is not None and found.teacher is not None:
        of = f"of the gap between {base.label} ({told(found, base)}) and the teacher ({told(found, found.teacher)})"
        share = f"{number(closed.value, 0)} % ({ends(closed, 0)})"
        if closed.value < 0:
            return f"{best.label} closed none {of} in {title}: the gap grew by {share.replace(MINUS, '')}{cost}."
        return f"{best.label} closed {share} {of} in {title}{cost}."
    first = f"{best.label} reaches {told(found, best)} ({ends(interval(found.metric(best)), 1)}) in {title}"
    if base is None:
        return f"{first}{cost}."
    apart = paired(found.metric(best), found.metric(base))
    places = decimals(unit, [apart.value], 1)
    return f"{first}, {signed(apart.value, places)} {points(unit)} ({ends(apart, places, sign=True)}) from {base.label}{cost}."


def cautions(found: Comparison, models: Sequence[Model]) -> list[str]:
    """What a reader has to bear in mind."""
    said = []
    trained = [model for model in found.models if model.role == "trained"]
    if found.base is not None and found.teacher is not None and gap_of(found) is None:
        said.append(
            "The teacher is not significantly better than the student that the gap would be measured from, so no closed share of "
            "the gap is reported."
        )
    if found.candidates > 1:
        said.append(f"It is the best of {found.candidates} students; the interval does not account for this selection.")
    elsewhere = [model.label for model in models if model.role == "trained" and model not in trained]
    if elsewhere:
        said.append(f"Not in the chart, because they were evaluated on other questions: {', '.join(elsewhere)}.")
    said.append("One run of each: the intervals are over questions and do not include run-to-run variance.")
    return said


def told(found: Comparison, model: Model) -> str:
    """A model's score with its unit."""
    metric = found.metric(model)
    return f"{number(metric.score, decimals(metric.unit, [metric.score], 1))} {metric.unit}"


def ends(of: Any, places: int, *, sign: bool = False) -> str:
    """The ends of an interval, NaN where one is unknown."""
    low, high = (None if isnan(end) else end for end in (of.low, of.high))
    return bounds(low, high, places, sign=sign)


def title_of(scores: Scores) -> str:
    """The benchmark and its headline in words."""
    return scores.title if scores.headline in ("", scores.title, "overall") else f"{scores.title} {scores.headline}"


def cost_in_words(best: Model, base: Model | None) -> str:
    """The time that the best one was trained for, beside that of the one that the gap is counted from."""
    if best.seconds is None:
        return ""
    beside = ""
    if base is not None and base.role == "trained" and base.seconds:
        beside = f", {number(best.seconds / base.seconds, 2)} times that of {base.label}"
    memory = "" if best.peak_memory_mib is None else f" and {best.peak_memory_mib:,.0f} MiB"
    return f", at {amount(TIMES, best.seconds)} of training{beside}" + ("" if beside else memory)


# --- the chart --------------------------------------------------------------------------------------------------------


def gap_chart_of_runs(found: Comparison, closed: Difference | None) -> Drawing:
    """The chart of run folders."""
    bars, names = [], names_in_colour(found.models)
    for model in found.models:
        one = interval(found.metric(model))
        low, high = (None if isnan(end) else end for end in (one.low, one.high))
        seconds = model.seconds if model.role == "trained" else None
        bars.append(ModelBar(names[model.key], model.label, model.role, one.value, low, high, seconds))
    of = found.models
    base, best, teacher = (None if one is None else of.index(one) for one in (found.base, found.best, found.teacher))
    share = None if closed is None else f"{number(closed.value, 0)} % of the gap"
    unit = found.metric(found.models[0]).unit
    return gap_chart(bars, (base, best, teacher), share, title_of(found.scores[of[0].key]), unit)


def gap_chart(
    bars: Sequence[ModelBar], marks: tuple[int | None, int | None, int | None], share: str | None, title: str, unit: str
) -> Drawing:
    """Every model's score with its interval, best on top; between two lines the gap, and an arrow over what was closed of it.

    Args:
        bars: the models.
        marks: the places among them of the one that the gap is counted from, of the best one, and of the teacher.
        share: what the arrow says; None: no gap is drawn.
        title: of the score.
        unit: of the score.
    """
    base, best, goal = marks
    order = sorted(range(len(bars)), key=lambda place: -bars[place].value)
    places = decimals(unit, (one.value for one in bars), 1)
    known = {place: bar.seconds for place, bar in enumerate(bars) if bar.seconds is not None}
    costs = dict(zip(known, amounts(TIMES, list(known.values())), strict=True))
    with look():
        figure, ax = axes(WIDTH, 0.75 + 0.47 * len(bars) + (0.3 if share else 0.0))
        styles = looks([bar.key for bar in bars])
        line = ax.get_yaxis_transform()
        for row, place in enumerate(order):
            bar = bars[place]
            colour = styles[bar.key].colour
            if bar.low is not None and bar.high is not None:
                ax.plot([bar.low, bar.high], [row, row], color=INK, linewidth=2.2, solid_capstyle="butt")
            marker = {"teacher": "D", "start": "s"}.get(bar.role, "o")
            ax.plot(bar.value, row, marker, color=colour, markersize=8, markeredgecolor=INK, zorder=3)
            score = f"{number(bar.value, places)} ({bounds(bar.low, bar.high, places)})"
            words = " · ".join([score, *([costs[place]] if place in costs else [])])
            for text, side, tone, across in ((short(bar.label, 24), "left", INK, 0), (words, "right", SOFT, 1)):
                ax.annotate(
                    text,
                    (across, row),
                    (0, 8),
                    xycoords=line,
                    textcoords="offset points",
                    fontsize=9,
                    fontweight="bold" if place == best and side == "left" else "normal",
                    color=tone,
                    ha=side,
                    bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
                )
        if share and base is not None and best is not None and goal is not None:
            low, top, reached = bars[base].value, bars[goal].value, bars[best].value
            for edge in (low, top):
                ax.axvline(edge, color=SOFT, linewidth=1.0, dashes=(4, 3), zorder=1)
            foot = len(bars) - 0.35
            ax.annotate(
                "", (reached, foot), (low, foot), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 2}
            )
            ax.annotate(
                share,
                ((low + reached) / 2, foot),
                (0, -5),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=9,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
            )
        seen = [end for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None]
        ax.set_xlim(*around(seen))
        ax.set_ylim(len(bars) - 0.6 + (0.8 if share else 0.0), -0.75)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        dashed = ", dashed: the gap" if share else ""
        ax.set_xlabel(f"{short(title, 44)}, {unit}\nbars: 95 % intervals{dashed}")
        text = drawn(figure, f"{title} of each model, and the gap to the teacher")
    header = ("model", f"{title}, {unit}", "low", "high", "training time, s")
    rows = [(one.label, one.value, one.low, one.high, one.seconds) for one in (bars[place] for place in order)]
    return picture_of("headline", text, header, rows)


def headline_of_study(content: Mapping[str, Any]) -> Headline:
    """The sentence and the chart of a study."""
    variants, labels, start = content["variants"], content["labels"], content["gap_from"]
    if not variants:
        return Headline(study.answer(content), None)
    bars = [
        ModelBar(name, labels[name], "trained", told["mean"], told["low"], told["high"], one["seconds"])
        for name, one in variants.items()
        for told in [one["accuracy"]]
    ]
    goal, best = content["teacher"], max(range(len(bars)), key=lambda place: bars[place].value)
    if goal is not None:
        bars.append(ModelBar("teacher", "teacher", "teacher", goal["value"], goal["low"], goal["high"]))
    base = next((place for place, bar in enumerate(bars) if bar.key == start), None)
    closed = variants[bars[best].key]["gap_closed"]
    share = None if goal is None or closed is None or base in (None, best) else f"{number(closed, 0)} % of the gap"
    marks = (base, best, None if goal is None else len(bars) - 1)
    title, unit = study.name_of_score(content), study.unit_of_score(content)
    return Headline(study.answer(content), gap_chart(bars, marks, share, title, unit))
