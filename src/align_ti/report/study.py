"""The self-contained HTML page of a study, from its `study.json` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from markupsafe import Markup

from align_ti.report import study_plots as plots
from align_ti.report.drawing import Cell, Drawing, minus, picture_of
from align_ti.report.numbers import (
    DASH,
    OPERATIONS,
    TIMES,
    amount,
    bounds,
    capital,
    decimals,
    digits,
    number,
    plural,
    points,
    probability,
    scaled,
    signed,
    with_interval,
)
from align_ti.report.tables import FIDELITY
from align_ti.report.templates import environment
from align_ti.runs import read_json, write_text

Content = Mapping[str, Any]

CAPTIONS = {
    "differences": "Filled points: the corrected interval excludes 0. Hollow points: it includes 0 or is unknown. In brackets: the "
    "uncorrected 95 % interval."
}
"""What stands beneath figures."""


def write_study_page(root: Path) -> Path:
    """Writes `study.html` from the `study.json` beside it and returns its path.

    Raises:
        RunError: there is no `study.json`, or it is damaged.
    """
    root = Path(root)
    content = read_json(root / "study.json")
    page = environment().get_template("study.html.j2").render(view(content), figures=study_drawings(content))
    path = root / "study.html"
    write_text(path, page)
    return path


def study_body(content: Content) -> Markup:
    """The study as a part of a page: all of its own page but the title and the answer, headings two levels lower."""
    body = environment().get_template("study_body.html.j2")
    return Markup(body.render(view(content), figures=study_drawings(content), h="h3", sub="h4"))


def study_drawings(content: Content) -> dict[str, Drawing]:
    """The study's figures with the numbers that they show."""
    return {
        name: picture_of(name, figure, *study_numbers(content, name), caption=CAPTIONS.get(name, ""))
        for name, figure in study_figures(content).items()
    }


def study_numbers(content: Content, name: str) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """The header and the rows of the numbers that a figure shows."""
    labels, unit = content["labels"], unit_of_score(content)
    if name == "differences":
        keys = ("mean", "low", "high", "corrected_low", "corrected_high", "corrected_p")
        rows = [(labels[one["of"]], labels[one["to"]], *(one[key] for key in keys)) for one in content["differences"]]
        return ("of", "to", f"difference, {points(unit)}", *(key.replace("_", " ") for key in keys[1:])), rows
    if name == "kinds":
        every = [(row["metric"], one) for row in parts(content) for one in row["differences"]]
        rows = [
            (kind, labels[one["of"]], labels[one["to"]], one["mean"], one["low"], one["high"]) for kind, one in every
        ]
        return ("kind", "of", "to", f"difference, {points(unit)}", "low", "high"), rows
    if name.startswith("frontier"):
        rows = [
            (labels[of], one["seconds"], one["flops"], *(one["accuracy"][key] for key in ("mean", "low", "high")))
            for of, one in content["variants"].items()
        ]
        return ("variant", "seconds", "FLOPs", f"mean, {unit}", "low", "high"), rows
    benchmark = name.split("-", 2)[2]
    rows = [
        (labels[of], *(point[key] for key in ("step", "seconds", "mean", "low", "high")))
        for of, found in content["curves"].items()
        for point in found.get(benchmark, ())
    ]
    return ("variant", "step", "seconds", "mean", "low", "high"), rows


def study_figures(content: Content) -> dict[str, str]:
    """The study's figures as the text of SVG files, by name; those that it has no numbers for are left out.

    `differences`, `kinds`, `frontier-seconds`, `frontier-flops`, and for each benchmark of the learning curves `learning-step-NAME`
    and `learning-seconds-NAME`.

    Args:
        content: of `study.json`.
    """
    labels, variants = content["labels"], content["variants"]
    figures: dict[str, str] = {}
    unit = points(unit_of_score(content))
    if content["differences"]:
        told = [with_interval(one, decimals_of_differences(content)) for one in content["differences"]]
        figures["differences"] = plots.forest(content["differences"], labels, told, unit)
    rows, pairs = parts(content), pairs_of(content)
    if len(rows) > 1 and pairs:
        figures["kinds"] = plots.kinds(rows, pairs, labels, unit)
    score = f"{name_of_score(content)}, {unit_of_score(content)}"
    for by, units, words in (("seconds", TIMES, "training time"), ("flops", OPERATIONS, "FLOPs of a run")):
        if variants:
            scale, name = scaled(units, [one[by] for one in variants.values()])
            told_axes = (f"{words}, {name}", score)
            figures[f"frontier-{by}"] = plots.frontier(variants, labels, content["frontier"][by], by, scale, told_axes)
    for benchmark in benchmarks_of_curves(content):
        curves = {name: found[benchmark] for name, found in content["curves"].items() if benchmark in found}
        scale, name = scaled(TIMES, [point["seconds"] for rows in curves.values() for point in rows])
        for by, divisor, words in (("step", 1.0, "step"), ("seconds", scale, f"training time, {name}")):
            figures[f"learning-{by}-{benchmark}"] = plots.learning(
                curves, labels, by, divisor, (words, f"score on {benchmark}")
            )
    return figures


# --- what the page says -----------------------------------------------------------------------------------------------


def view(content: Content) -> dict[str, Any]:
    """All that the template shows, in words and formatted numbers."""
    shown = {name: content["labels"].get(name, name) for name in content["labels"]}
    return {
        "title": f"{capital(content['title'])}: {len(shown)} {plural(shown, 'variant')}, {len(content['seeds'])} "
        f"{plural(content['seeds'], 'seed')}",
        "answer": answer(content),
        "gaps": not_there(content),
        "incomplete": bool(content["failed"] or content["missing"]),
        "equal": equal_in_words(content),
        "score": name_of_score(content),
        "unit": unit_of_score(content),
        "points": points(unit_of_score(content)),
        "gap_from": shown[content["gap_from"]],
        "labels": shown,
        "variants": variant_rows(content),
        "costs": cost_units(content),
        "teacher": teacher_of(content),
        "differences": difference_rows(content),
        "curves": benchmarks_of_curves(content),
        "times": time_rows(content),
        "tables": [table_of(content, benchmark) for benchmark in benchmarks_of_metrics(content)],
        "seeds": content["seeds"],
        "scores": seed_rows(content),
        "failed": [{**one, "label": shown[one["variant"]]} for one in content["failed"]],
        "recipes": {shown[name]: options(changes) for name, changes in content["recipes"].items()},
        "base": {"recipe": leaf(content["base"]["recipe"]), "changes": options(content["base"]["changes"])},
        "made_on": [machine(one) for one in content["made_on"]],
    }


def answer(content: Content) -> list[str]:
    """The study in a sentence or two: the best variant, the gap that it closed, its cost, and whether it stands out."""
    variants, labels = content["variants"], content["labels"]
    if not variants:
        return ["No run has finished yet."]
    means = {name: one["accuracy"]["mean"] for name, one in variants.items()}
    ranked = sorted(means, key=lambda name: -means[name])
    best = ranked[0]
    told = variants[best]["accuracy"]
    score = f"{number(told['mean'], decimals_of_scores(content))} {unit_of_score(content)}"
    apart = bounds(told["low"], told["high"], decimals_of_scores(content))
    level = [name for name in ranked if means[name] == means[best]]
    if len(level) > 1:
        names = " and ".join(labels[name] for name in level)
        return [f"{names} are tied for the best result: {name_of_score(content)} {score} ({apart})."]
    reached = "is best:" if len(ranked) > 1 else "reaches"
    first = f"{labels[best]} {reached} {name_of_score(content)} {score} ({apart})"
    closed = gap_in_words(content, best)
    sentences = [f"{first}{closed}, {cost_in_words(content, best)}."]
    if len(ranked) > 1:
        sentences.append(lead(content, best, ranked[1]))
    return sentences


def gap_in_words(content: Content, best: str) -> str:
    """How much of the gap to the teacher the best variant closed."""
    one, start = content["variants"][best], content["gap_from"]
    if best == start:
        return "; the gap to the teacher is measured from it" if content["teacher"] else ""
    if one["gap_closed"] is None:
        return ""
    low, high = one["gap_closed_interval"]
    return (
        f"; it closed {number(one['gap_closed'], 0)} % ({bounds(low, high, 0)}) of the gap between "
        f"{content['labels'][start]} and the teacher"
    )


def cost_in_words(content: Content, best: str) -> str:
    """What a run of the best variant costs, beside the variant that the gap is counted from."""
    variants, start = content["variants"], content["gap_from"]
    one = variants[best]
    spent = f"{amount(TIMES, one['seconds'])} of training and {amount(OPERATIONS, one['flops'])} per run"
    if best == start or start not in variants:
        return f"at {spent}"
    ratios = [one[by] / variants[start][by] if variants[start][by] else None for by in ("seconds", "flops")]
    told = " and ".join("?" if ratio is None else f"{number(ratio, 2)}" for ratio in ratios)
    return f"at {spent}, {told} times those of {content['labels'][start]}"


def lead(content: Content, best: str, second: str) -> str:
    """Whether the best variant stands out from the next, by the corrected interval."""
    labels = content["labels"]
    for one in content["differences"]:
        if {one["of"], one["to"]} == {best, second}:
            turn = 1 if one["of"] == best else -1
            low, high = sorted_bounds(one["corrected_low"], one["corrected_high"], turn)
            several = len(content["differences"]) > 1
            many = f", corrected for {len(content['differences'])} comparisons" if several else ""
            places, unit = decimals_of_differences(content), points(unit_of_score(content))
            apart = f"{bounds(low, high, places, sign=True)}{many}"
            told = f"{signed(turn * one['mean'], places)} {unit} ({apart})"
            if low is None:
                return f"Its lead over {labels[second]}, the second best, is {told}: the runs so far give no interval."
            verdict = "" if plots.clear(low, high) else ", which is not significant"
            return f"Its lead over {labels[second]}, the second best, is {told}{verdict}."
    return f"Its difference from {labels[second]}, the second best, is not among the study's comparisons."


def sorted_bounds(low: float | None, high: float | None, turn: int) -> tuple[float | None, float | None]:
    """An interval, or that of the difference the other way round."""
    if turn > 0 or low is None or high is None:
        return low, high
    return -high, -low


def not_there(content: Content) -> list[str]:
    """What failed, what is missing, and what can therefore not be told."""
    told = []
    for key, word in (("failed", "failed"), ("missing", "not run yet")):
        runs = content[key]
        if runs:
            by_variant = {
                name: [str(one["seed"]) for one in runs if one["variant"] == name]
                for name in dict.fromkeys(one["variant"] for one in runs)
            }
            names = "; ".join(
                f"{content['labels'].get(name, name)}, {plural(seeds, 'seed')} {', '.join(seeds)}"
                for name, seeds in by_variant.items()
            )
            whole = len(content["seeds"]) * len(content["labels"])
            told.append(f"{len(runs)} of {whole} runs {word}: {names}.")
    if content["teacher"] is None:
        told.append("The teacher was not evaluated on this score, so no gap is reported.")
    if any(len(one["per_seed"]) == 1 for one in content["variants"].values()):
        told.append("Variants with a single seed have no estimate of run-to-run variance.")
    return told


def equal_in_words(content: Content) -> str:
    """What is the same for all variants."""
    budget = content["labels"].get(content["budget"], content["budget"])
    return {
        "steps": "All variants train for the same number of steps.",
        "time": f"Each variant trains for as many steps as fit into the training time of {budget}.",
        "flops": f"Each variant trains for as many steps as fit into the FLOPs of {budget}.",
        "nothing": "Each variant trains for its own number of steps.",
    }[content["equal"]]


# --- tables -----------------------------------------------------------------------------------------------------------


def variant_rows(content: Content) -> list[dict[str, Any]]:
    """The table of variants, in the study's order; one without a finished run has nothing but its name."""
    places, units, rows = decimals_of_scores(content), cost_units(content), []
    means = sorted(one["accuracy"]["mean"] for one in content["variants"].values())
    best = means[-1] if len(means) > 1 and means[-1] > means[-2] else None
    for name, label in content["labels"].items():
        one = content["variants"].get(name)
        if one is None:
            rows.append({"label": label, "there": False})
            continue
        told, gap = one["accuracy"], one["gap_closed"]
        gap_low, gap_high = one["gap_closed_interval"] or (None, None)
        rows.append(
            {
                "label": label,
                "there": True,
                "best": told["mean"] == best,
                "mean": number(told["mean"], places),
                "interval": bounds(told["low"], told["high"], places),
                "seeds": f"{len(one['per_seed'])} of {len(content['seeds'])}",
                "steps": f"{one['steps']:,}",
                "seconds": digits(one["seconds"] / units["seconds"][0]),
                "flops": digits(one["flops"] / units["flops"][0]),
                "memory": DASH if one["peak_memory_mib"] is None else f"{one['peak_memory_mib']:,.0f}",
                "gap": None if gap is None else number(gap, 1),
                "gap_interval": None if gap is None else bounds(gap_low, gap_high, 1),
                "start": name == content["gap_from"],
            }
        )
    return rows


def teacher_of(content: Content) -> dict[str, str] | None:
    """The teacher's line of that table."""
    one, places = content["teacher"], decimals_of_scores(content)
    if one is None:
        return None
    return {"mean": number(one["value"], places), "interval": bounds(one["low"], one["high"], places)}


def difference_rows(content: Content) -> list[dict[str, Any]]:
    """The table of differences."""
    places = decimals_of_differences(content)
    return [
        {
            "of": content["labels"][one["of"]],
            "to": content["labels"][one["to"]],
            "mean": signed(one["mean"], places),
            "interval": bounds(one["low"], one["high"], places, sign=True),
            "corrected": bounds(one["corrected_low"], one["corrected_high"], places, sign=True),
            "p": probability(one["corrected_p"]),
            "relative": DASH if one["relative"] is None else signed(one["relative"], 1),
            "seeds": one["seeds"],
            "clusters": one["clusters"],
            "apart": plots.clear(one["corrected_low"], one["corrected_high"]),
        }
        for one in content["differences"]
    ]


def time_rows(content: Content) -> list[dict[str, Any]]:
    """The table of time to quality."""
    rows = []
    for one in content["time_to_quality"]:
        shares = [
            f"{seed}: {'not reached' if found['share'] is None else number(found['share'], 2)}"
            for seed, found in one["per_seed"].items()
        ]
        rows.append(
            {
                "of": content["labels"][one["of"]],
                "to": content["labels"][one["to"]],
                "benchmark": one["benchmark"],
                "reached": f"{one['reached']} of {one['seeds']}",
                "share": None if one["share"] is None else number(one["share"], 2),
                "interval": bounds(one["share_low"], one["share_high"], 2),
                "per_seed": ", ".join(shares),
            }
        )
    return rows


def table_of(content: Content, benchmark: str) -> dict[str, Any]:
    """The metrics of a benchmark: each variant's mean and each pair's difference, with intervals that are not corrected."""
    rows = [row for row in content["metrics"] if row["benchmark"] == benchmark]
    names = [name for name in content["labels"] if any(name in row["variants"] for row in rows)]
    pairs = pairs_of(content)
    # A tint compares differences of one unit.
    widest = {
        unit: max((abs(one["mean"]) for row in rows if row["unit"] == unit for one in row["differences"]), default=0.0)
        for unit in {row["unit"] for row in rows}
    }
    unit = next(iter(widest)) if len(widest) == 1 else None
    return {
        "title": capital(rows[0]["title"]),
        "fidelity": benchmark == "fidelity",
        "unit": unit,
        "unit_of_differences": None if unit is None else points(unit),
        "names": [content["labels"][name] for name in names],
        "pairs": [minus(content["labels"][of], content["labels"][to]) for of, to in pairs],
        "rows": [metric_row(row, names, pairs, widest[row["unit"]]) for row in rows],
    }


def metric_row(row: Content, names: Sequence[str], pairs: Sequence[tuple[str, str]], widest: float) -> dict[str, Any]:
    """A line of that table."""
    places = decimals(row["unit"], (one["mean"] for one in row["variants"].values()), 1)
    fine = decimals(row["unit"], (one["mean"] for one in row["differences"]), 2)
    found = {(one["of"], one["to"]): one for one in row["differences"]}
    return {
        "metric": FIDELITY.get(row["metric"], row["metric"]) if row["benchmark"] == "fidelity" else row["metric"],
        "unit": row["unit"],
        "unit_of_differences": points(row["unit"]),
        "means": [cell(row["variants"].get(name), places) for name in names],
        "differences": [cell(found.get(pair), fine, sign=True, widest=widest) for pair in pairs],
    }


def cell(one: Content | None, places: int, *, sign: bool = False, widest: float = 0.0) -> dict[str, Any] | None:
    """A mean with its interval; of a difference also its sign, how strong its tint is (0 to 0.4), and whether it leaves out 0."""
    if one is None:
        return None
    return {
        "mean": signed(one["mean"], places) if sign else number(one["mean"], places),
        "interval": bounds(one["low"], one["high"], places, sign=sign),
        "tint": f"{0.4 * abs(one['mean']) / widest:.2f}" if widest else "0",
        "side": "up" if one["mean"] > 0 else "down",
        "apart": plots.clear(one["low"], one["high"]),
    }


def seed_rows(content: Content) -> dict[str, list[str]]:
    """Each variant's score at each seed; in words where there is none."""
    without = {(one["variant"], one["seed"]): word for word in ("failed", "missing") for one in content[word]}
    places = decimals_of_scores(content)
    rows = {}
    for name, label in content["labels"].items():
        scores = content["variants"].get(name, {}).get("per_seed", {})
        rows[label] = [
            number(scores[str(seed)], places) if str(seed) in scores else without.get((name, seed), DASH)
            for seed in content["seeds"]
        ]
    return rows


def options(changes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options with their values as a recipe would have them; of files and folders only the names."""
    return [(key, json.dumps(without_folders(value), ensure_ascii=False)) for key, value in changes.items()]


def without_folders(value: Any) -> Any:
    """The value with the last part of every absolute path in it: where things lay is nobody's business on a page."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return leaf(value) if isinstance(value, str) else value


def leaf(text: str) -> str:
    """The last part of an absolute path; other text as it is."""
    absolute = text.startswith(("/", "~")) or PureWindowsPath(text).is_absolute()
    return PureWindowsPath(text).name or text if absolute else text


def machine(one: Content) -> dict[str, Any]:
    """A machine and its versions."""
    cores = f"{one['cores']} cores" if one.get("cores") else None
    system = " ".join(str(one[key]) for key in ("system", "machine") if one.get(key))
    told = [str(part) for part in (one.get("processor"), cores, system) if part]
    versions = {"Python": one.get("python", DASH), **one.get("versions", {})}
    return {"runs": one["runs"], "machine": ", ".join(told) or DASH, "versions": versions}


# --- what the content is about ----------------------------------------------------------------------------------------


def pairs_of(content: Content) -> list[tuple[str, str]]:
    """The pairs of variants that are compared."""
    return [(one["of"], one["to"]) for one in content["differences"]]


def parts(content: Content) -> list[Content]:
    """The rows of the score's benchmark that are in the headline's unit: kinds of questions, the headline first."""
    unit = unit_of_score(content)
    return [row for row in content["metrics"] if row["benchmark"] == content["score"] and row["unit"] == unit]


def unit_of_score(content: Content) -> str:
    """The headline's unit."""
    return str(content["unit"])


def name_of_score(content: Content) -> str:
    """The benchmark and its headline in words."""
    title, metric = str(content["title"]), str(content["metric"])
    return title if metric in ("", title, "overall") else f"{title} {metric}"


def benchmarks_of_curves(content: Content) -> list[str]:
    """The benchmarks that there are learning curves of."""
    return list(dict.fromkeys(name for curves in content["curves"].values() for name, rows in curves.items() if rows))


def benchmarks_of_metrics(content: Content) -> list[str]:
    """The benchmarks with metrics: the score's first, fidelity last."""
    found = dict.fromkeys(row["benchmark"] for row in content["metrics"])
    return sorted(found, key=lambda name: (name != content["score"], name == "fidelity"))


def cost_units(content: Content) -> dict[str, tuple[float, str]]:
    """The units in which the table tells time and operations."""
    units = {"seconds": TIMES, "flops": OPERATIONS}
    return {by: scaled(of, [one[by] for one in content["variants"].values()]) for by, of in units.items()}


def decimals_of_scores(content: Content) -> int:
    """Decimals of the score."""
    return decimals(unit_of_score(content), (one["accuracy"]["mean"] for one in content["variants"].values()), 1)


def decimals_of_differences(content: Content) -> int:
    """Decimals of its differences."""
    return decimals(unit_of_score(content), (one["mean"] for one in content["differences"]), 2)
