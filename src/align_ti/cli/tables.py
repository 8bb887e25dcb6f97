"""Results as tables: scores with their intervals, fidelity, comparisons, where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from align_ti.cli.terminal import console
from align_ti.phases import phase_names
from align_ti.report.tables import FIDELITY, PARTS, bounds, figure

if TYPE_CHECKING:
    from align_ti.runs import RunFolder


def show_summary(summary: dict[str, Any]) -> None:
    """The result as a table: a column for each model, a row for each kind of question and each cost; nothing without own questions."""
    names = list(summary["accuracy"])
    if not names:
        return
    table = Table(title=f"exact match, %, {summary['questions']} questions")
    table.add_column("")
    for name in names:
        table.add_column(summary["labels"][name], justify="right")
    for kind in summary["questions_by_kind"]:
        table.add_row(kind, *(f"{summary['accuracy'][name][kind]:.1f}" for name in names))
        if kind == "overall":
            intervals = [summary["interval_95"][name][kind] for name in names]
            table.add_row("  95 % CI", *(f"{low:.1f}-{high:.1f}" for low, high in intervals), end_section=True)
    table.add_section()
    measured = summary.get("fidelity", {})
    for key, form, title in (
        ("top1_agreement", ".1f", "top-1 agreement, %"),
        ("own_agreement", ".1f", "  self-generated answers"),
        ("visual_kl", ".3f", "visual KL, nats"),
        ("transition_kl", ".3f", "transition KL, nats"),
    ):
        if any(key in of for of in measured.values()):
            values = [measured.get(name, {}).get(key, {}).get("value") for name in names]
            table.add_row(title, *(shown(value, form) for value in values))
    for key, form, title in (
        ("divergence_nats", ".3f", "response KL, nats"),
        ("seconds_per_step", ".3f", "s / step"),
        ("peak_memory_mib", ".0f", "peak memory, MiB"),
    ):
        table.add_row(title, *(shown(summary[key].get(name), form) for name in names))
    console.print(table)


def show_tasks(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """The headline of each benchmark with its 95 % interval, a column for each model; the mean of the paper's six; then the notes."""
    from align_ti.evaluation.scored import mean_of_six

    table = Table("benchmark", "score", "questions")
    for name in models:
        table.add_column(name, justify="right")
        table.add_column("95 % CI", justify="right")
    for name, first in next(iter(models.values())).items():
        told = [scores[name] for scores in models.values()]
        cells = [cell for one in told for cell in (f"{one['value']:.1f}", ends(one["low"], one["high"]))]
        table.add_row(first["title"], first["metric"], str(first["questions"]), *cells)
    means = [mean_of_six(scores) for scores in models.values()]
    if None not in means:
        table.add_section()
        cells = [cell for value, low, high in filter(None, means) for cell in (f"{value:.1f}", ends(low, high))]
        table.add_row("mean of six", "as in the paper", "", *cells)
    console.print(table)
    for model, scores in models.items():
        for one in scores.values():
            of = f"{model}, " if len(models) > 1 else ""
            for note in one["notes"]:
                console.print(f"{of}{one['title']}: {note}", highlight=False)


def show_fidelity(found: Mapping[str, Any]) -> None:
    """How near a model is to its teacher: each measure with its interval, then agreement along the answers."""
    table = Table("fidelity to the teacher", "value", "95 % CI")
    for name, title in FIDELITY.items():
        if name in found:
            one = found[name]
            table.add_row(f"{title} ({one['unit']})", figure(one["value"], one["unit"]), bounds(one, one["unit"]))
    console.print(table)
    table = Table("position in the answer", title="top-1 agreement with the teacher, %")
    for title in ("reference answers", "95 % CI", "self-generated answers", "95 % CI"):
        table.add_column(title, justify="right")
    along = {name: {one["position"]: one for one in rows} for name, rows in found["by_position"].items()}
    for position in sorted({position for rows in along.values() for position in rows}):
        cells, last = [], position
        for name in ("gold", "own"):
            one = along.get(name, {}).get(position)
            last = max(last, one["to"] if one else position)
            cells += [figure(one["agreement"]["value"], "%"), bounds(one["agreement"], "%")] if one else ["", ""]
        table.add_row(f"{position}" if last == position else f"{position} to {last}", *cells)
    console.print(table)
    for note in found["notes"]:
        console.print(note)


def show_comparison(found: dict[str, Any]) -> None:
    """Scores and differences as a table: a row for each model on each metric."""
    first, many = found["models"][0], found["comparisons"] > 1
    table = Table("benchmark", "score", "model", caption=f"Difference: the model minus {first}.")
    for title in ("value", "95 % CI", "difference", "95 % CI", *(("p (Holm)",) if many else ("p",))):
        table.add_column(title, justify="right")
    for row in found["rows"]:
        differences = {one["of"]: one for one in row["differences"]}
        for name, score in row["scores"].items():
            cells = ["", "", ""]
            if (one := differences.get(name)) is not None:
                cells = [signed(one["value"], row["unit"]), bounds(one, row["unit"]), f"{one['corrected_p']:.2g}"]
            start = name == next(iter(row["scores"]))
            head = [row["benchmark"], f"{row['metric']} ({row['unit']})"] if start else ["", ""]
            table.add_row(*head, name, figure(score["value"], row["unit"]), bounds(score, row["unit"]), *cells)
        table.add_section()
    console.print(table)
    if many:
        console.print(
            f"p values are corrected for {found['comparisons']} comparisons (Holm). The intervals are not corrected; "
            "simultaneous intervals are in the JSON (--out)."
        )
    for note in found["notes"]:
        console.print(note)


def show_phases(runs: Mapping[str, RunFolder]) -> None:
    """Where the time of a training step goes, in the runs that counted it: mean milliseconds of each phase and its share."""
    from align_ti.runs import read_json

    found = {name: read_json(run.phases) for name, run in runs.items() if run.phases.exists()}
    if not found:
        return
    steps = next(iter(found.values()))["steps"]
    table = Table(title="time of a training step, ms", caption=f"mean of {steps} steps")
    table.add_column("phase")
    for name in found if len(found) > 1 else ["ms"]:
        table.add_column(name, justify="right")
        table.add_column("%", justify="right")
    for phase in phase_names(found.values()):
        cells = [one["phases"].get(phase) for one in found.values()]
        table.add_row(phase, *(text for cell in cells for text in milliseconds_and_share(cell)))
    table.add_section()
    whole = [{**one["step"], "share": 1.0} for one in found.values()]
    table.add_row("step", *(text for cell in whole for text in milliseconds_and_share(cell)))
    console.print(table)


def show_spent(spent: Mapping[str, float]) -> None:
    """How long each part of a demo took, all calls together."""
    whole = sum(spent.values())
    table = Table(title="wall time of the demo")
    table.add_column("part")
    for column in ("s", "%"):
        table.add_column(column, justify="right")
    for name, seconds in spent.items():
        table.add_row(PARTS.get(name, name), f"{seconds:.1f}", f"{100 * seconds / whole:.1f}")
    table.add_section()
    table.add_row("total", f"{whole:.1f}", "100.0")
    console.print(table)


def milliseconds_and_share(cell: Mapping[str, float] | None) -> tuple[str, str]:
    """Two cells of the table of phases; dashes where a run has no such phase."""
    return ("-", "-") if cell is None else (f"{1000 * cell['mean_seconds']:.2f}", f"{100 * cell['share']:.1f}")


def shown(value: float | None, form: str) -> str:
    """A number, or a dash where nothing was measured."""
    return "-" if value is None else format(value, form)


def ends(low: float | None, high: float | None) -> str:
    """An interval, or a dash where it is unknown."""
    return "-" if low is None or high is None or low != low or high != high else f"{low:.1f}-{high:.1f}"


def with_unit(value: float, unit: str) -> str:
    """A score with its unit."""
    return f"{value:.2f} {unit}".strip()


def signed(value: float, unit: str) -> str:
    """A difference with its sign."""
    return f"{'+' if value > 0 else ''}{figure(value, unit)}"
