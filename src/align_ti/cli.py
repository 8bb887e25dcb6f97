"""The command line: thin verbs over the pipeline. Importing it, and so `--help`, imports no torch."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from align_ti.config import Composition, Evaluation, Generation, Recipe, Scores, Source, Teacher, Training, read_recipe
from align_ti.errors import AlignTIError, CheckError, ConfigError, DataError, InterruptedRunError, RequeueError
from align_ti.phases import Stopwatch, phase_names
from align_ti.processes import launch, part_in_order
from align_ti.registry import Kind, lookup, names
from align_ti.report.tables import FIDELITY, bounds, figure

if TYPE_CHECKING:
    from align_ti.checkpoints.parts import Made
    from align_ti.pipeline.caching import Cached
    from align_ti.planning.plan import Plan
    from align_ti.preflight.report import Report
    from align_ti.runs import RunFolder

app = typer.Typer(
    name="align-ti",
    help="Train a small vision-language model to imitate a large one.\n\nStart with: align-ti demo --out runs/demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
recipes = typer.Typer(
    help="The recipes that are shipped, and configs for accelerate launch: list, show, copy.", no_args_is_help=True
)
app.add_typer(recipes, name="recipes")
# Names and words of users may hold brackets, which are no markup.
console = Console(markup=False)

RecipePath = Annotated[
    Path, typer.Argument(help="A recipe file (.yaml), or the name of a shipped recipe.", metavar="RECIPE")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one option, such as objective.tpa.candidates=2. May be repeated."
    ),
]

AllowExtensions = Annotated[
    bool,
    typer.Option(
        "--allow-extensions",
        help="Run the Python files that the recipe names under `extensions`: divergences and terms of your own.",
    ),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder; a stopped demo goes on in it.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Decides scenes, questions, order and draws.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each method; by default the benchmark's.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Measure on 'test', or on 'validation' while settings are chosen.")
    ] = "test",
    phases: Annotated[bool, typer.Option("--phases", help="Also tell where the time of a training step goes.")] = False,
) -> None:
    """Distil a small model on real handwriting three ways and compare them.

    Draws the digits benchmark, measures the shipped teacher, scores its layers, trains one student by SFT, by SFT + vanilla KD and by
    Align-TI from the same start, measures all of them on held-out handwriting, writes report.html and summary.json, and tells how
    long each part took.
    """
    if split not in {"test", "validation"}:
        raise ConfigError(f"--split is {split!r}; accepted: 'test' or 'validation'.")
    stopwatch = Stopwatch(of="run")
    with stopwatch.phase("load the libraries"):
        quiet()
        from align_ti.demo import TRAINING, objectives, run_demo
        from align_ti.runs import RunFolder

    changed: dict[str, Any] = {"phases": phases, **({} if steps is None else {"max_steps": steps})}
    training = Training(**{**TRAINING.model_dump(), **changed})
    with bars() as advance:
        summary = run_demo(out, seed, training=training, split=split, advance=advance, stopwatch=stopwatch)
    show_summary(summary)
    show_phases({summary["labels"][name]: RunFolder(out / name) for name in objectives(0)})
    show_spent(summary["spent_seconds"])
    console.print(f"report: {RunFolder(out).report}\nsummary: {RunFolder(out).summary}")


@app.command()
def train(
    recipe: RecipePath,
    changes: Changes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check recipe, data and models, train nothing.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Check models and first records first, as `align-ti check` does.")
    ] = True,
    allow_extensions: AllowExtensions = False,
    processes: Annotated[
        int | None,
        typer.Option("--launch", min=1, metavar="N", help="Train on N processes of this machine (DDP), one a GPU."),
    ] = None,
) -> None:
    """Distil as a recipe says; run again to go on after a stop.

    Ends with 0 when the student is there, 2 after an error with a message, 1 after any other, 130 after Ctrl-C, 75 after SIGTERM or
    SIGUSR1: run it again.

    With data.eval in the recipe, the student before and after and the teacher are measured on one's own questions, with
    evaluation.tasks on benchmarks; with either report.html is written, and the student's card holds the results.
    """
    quiet()  # first, since a recipe's terms import what libraries speak of
    checked = read_recipe(find_recipe(recipe), changes or [], allow_extensions=allow_extensions)
    if dry_run:
        dry(checked)
        return
    if processes is not None:
        changed = [part for change in changes or [] for part in ("--set", change)]
        options = ["--check" if check else "--no-check", *(["--allow-extensions"] if allow_extensions else [])]
        raise typer.Exit(launch(processes, ["train", str(recipe), *changed, *options]))
    from accelerate import PartialState

    from align_ti.pipeline.measuring import train_and_measure
    from align_ti.report.page import write_report
    from align_ti.runs import read_json

    with bars() as advance:
        run = train_and_measure(
            checked,
            steps=lambda done, total: advance("train", done, total),
            advance=lambda name, done, total: advance(f"measure: {name}", done, total),
            check=check,
            seen=show_troubles,
        )
    if not PartialState().is_main_process:
        return
    console.print(f"student: {run.student}")
    show_phases({"student": run})
    if run.summary.exists():
        show_summary(read_json(run.summary))
        console.print(f"report: {write_report(run.root)}")
    if run.benchmarks.exists():
        told = read_json(run.benchmarks)
        show_tasks({told["labels"][name]: scores for name, scores in told["benchmarks"].items()})


@app.command()
def cache(
    recipe: RecipePath,
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write, or to go on with; by default the recipe's data.teacher_cache."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Records that go through the teacher together; no effect but by rounding.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say from a few records what it would take and save; write nothing.")
    ] = False,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Write what KD and IVA need of the teacher, once for several epochs or students; run again to go on after a stop.

    Students train from it by data.teacher_cache, without the teacher. `accelerate launch` shares the records among processes.
    """
    quiet()  # first, since a recipe's terms import what libraries speak of
    checked = read_recipe(find_recipe(recipe), changes or [], allow_extensions=allow_extensions)
    from align_ti.pipeline.caching import cache_teacher, estimate
    from align_ti.pipeline.parts import launched

    if dry_run:
        show_cached(estimate(checked, out, batch_size=batch_size), written=False)
        return
    with bars() as advance:
        made = cache_teacher(
            checked, out, batch_size=batch_size, advance=lambda done, total: advance("cache", done, total)
        )
    if launched().is_main_process:
        show_cached(made, written=True)
        console.print(f"teacher cache: {made.folder} (in a recipe: data.teacher_cache)")


@app.command()
def plan(
    recipe: RecipePath,
    devices: Annotated[int, typer.Option(min=1, help="Devices that train.")] = 1,
    memory: Annotated[float | None, typer.Option(min=0.01, help="GB (10^9 bytes) of one device.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="one, ddp, fsdp2, zero2 or zero3. By default one device alone, or ddp.")
    ] = None,
    shard_teacher: Annotated[
        bool, typer.Option("--shard-teacher", help="The teacher sharded too. By default as teacher.sharded says.")
    ] = False,
    tokens: Annotated[int | None, typer.Option(min=3, help="Tokens of a record. By default data.max_length.")] = None,
    visual: Annotated[
        int | None, typer.Option(min=0, help="Visual tokens among them. By default one picture's.")
    ] = None,
    response: Annotated[int | None, typer.Option(min=1, help="Response tokens among them.")] = None,
    row_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of TPA's candidates that need a row of their own.")
    ] = 1.0,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Plan for training on CPUs, where rows come in smaller chunks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    changes: Changes = None,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Tell what a run will take on each device, before anything is loaded: memory by part, and bytes sent in a step.

    Only the models' configs are read. With --memory, tells what to change first if it does not fit.
    """
    quiet()
    checked = read_recipe(find_recipe(recipe), changes or [], allow_extensions=allow_extensions)
    from align_ti.planning.memory import Layout
    from align_ti.planning.plan import make_plan

    spread = engine or ("one" if devices == 1 else "ddp")
    sharded = shard_teacher or (checked.teacher is not None and checked.teacher.sharded and devices > 1)
    layout = Layout(engine=spread, devices=devices, shard_teacher=sharded)
    sizes: dict[str, Any] = {"tokens": tokens, "visual": visual, "response": response, "row_share": row_share}
    limit = None if memory is None else int(memory * 1e9)
    made = make_plan(checked, layout, limit=limit, accelerator=not cpu, **sizes)
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=2))
    else:
        show_plan(made, limit)


@app.command()
def check(
    recipe: RecipePath,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON instead of a table.")] = False,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Check a recipe's own models and first records in about a minute: plain verdicts before a long run.

    Pictures reach both models, vocabularies and image tokens agree, every term is alive, the loss equals a plain re-computation,
    no response is cut; with expected memory and time. check.json and check.html are written to the run folder.
    """
    quiet()  # first, since a recipe's terms import what libraries speak of
    checked = read_recipe(find_recipe(recipe), changes or [], allow_extensions=allow_extensions)
    import json

    from align_ti.pipeline.checking import check_recipe
    from align_ti.preflight import verdicts
    from align_ti.runs import RunFolder

    with contextlib.nullcontext() if as_json else console.status("checking"):
        found = check_recipe(checked)
    run = RunFolder(Path(checked.out))
    if as_json:
        typer.echo(json.dumps(verdicts.as_json(found.verdicts), indent=2, ensure_ascii=False))
    else:
        show_check(found)
        console.print(f"page: {run.check_page}")
    if (message := verdicts.failed(found.verdicts, str(run.check))) is not None:
        raise CheckError(message)


@app.command()
def terms(
    name: Annotated[
        str | None, typer.Argument(help="A term or a divergence: its definition and every option.", metavar="NAME")
    ] = None,
) -> None:
    """List the terms and divergences that a recipe may use, or show one with its options and source.

    objective: {kd: {divergence: {name: skew_kl, alpha: 0.1}}, llava_kd_rdist: {weight: 0.5}}
    """
    quiet()
    if name is not None:
        show_one(name)
        return
    kinds: tuple[Kind, ...] = ("term", "divergence")
    for kind in kinds:
        table = Table(title=f"{kind}s", title_justify="left")
        table.add_column("name")
        table.add_column("what it is")
        for known in names(kind):
            table.add_row(known, first_paragraph(lookup(kind, known)))
        console.print(table)


@app.command("score-layers")
def score_layers(
    model: Annotated[str, typer.Argument(help="A folder or hub name of a vision-language model, usually the teacher.")],
    data: Annotated[Path, typer.Argument(help="A LLaVA-format file whose pictures have several instructions.")],
    images: Annotated[Path | None, typer.Option(help="The folder that picture names start from.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures in the sample.")] = 64,
    instructions: Annotated[int, typer.Option(min=2, help="Instructions of each picture.")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
) -> None:
    """Score how far each layer's visual focus moves with the instruction (IRS).

    The layer with the highest score is the one that objective.iva.layer=auto takes.
    """
    quiet()
    from align_ti.data.sources import read_conversations
    from align_ti.pipeline.measuring import score_teacher
    from align_ti.runs import write_json

    with console.status("scoring layers"):
        scores = score_teacher(
            model, read_conversations(data, images), Scores(images=pictures, instructions=instructions), seed
        )
    best = max(scores, key=lambda layer: scores[layer])
    table = Table("layer", "IRS", "")
    for layer, score in scores.items():
        table.add_row(
            str(layer),
            f"{score:.4f}",
            "█" * round(40 * score / max(*scores.values(), 1e-9)) + (" ←" if layer == best else ""),
        )
    console.print(table)
    if out is not None:
        write_json(out, {"layer": best, "scores": {str(layer): score for layer, score in scores.items()}})


TaskFolder = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="The folder of the benchmarks' files, laid out as LLaVA's evaluation guide says (its eval folder, or the one above).",
    ),
]
OwnQuestions = Annotated[Path | None, typer.Option(help="The .jsonl file of the task `own`.", metavar="FILE")]
OwnScorer = Annotated[
    str | None, typer.Option(help="How the task `own` scores questions that name no scorer of their own.")
]
StrictOriginal = Annotated[
    bool, typer.Option("--strict-original", help="Score as the original scripts do, their defects included.")
]


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder or hub name of a vision-language model.")],
    data: Annotated[
        Path | None, typer.Argument(help="A LLaVA-format file with the expected answers, in place of --tasks.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Benchmarks, such as gqa,sqa,textvqa,pope,mme,mmbench,digits,own.", metavar="NAME[,NAME]"),
    ] = None,
    folder: TaskFolder = None,
    questions: OwnQuestions = None,
    scorer: OwnScorer = None,
    images: Annotated[Path | None, typer.Option(help="The folder that picture names start from.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Also measure how near the model is to this one, and where.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of one answer at most; by default 128, or as each benchmark's protocol says."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask about so many questions of each benchmark, whole groups of them.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (as saved, the default of --tasks), float32, bfloat16 or float16.")
    ] = None,
    strict_original: StrictOriginal = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--launch", min=1, metavar="N", help="Share --tasks among N processes of this machine, one a GPU."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the benchmarks' files and say what would be asked; load no model.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also write scores and answers to this JSON file; of --tasks the folder of predictions and scores, by default one "
            "named after the model, below evaluations."
        ),
    ] = None,
) -> None:
    """Ask a model the questions of benchmarks, or of a file of one's own records, and score its answers.

    With --tasks, predictions are written first (NAME.jsonl), and scored then, each score with a 95 % interval; run again to go on
    after a stop. With DATA, answers are scored by exact match, overall and by kind.
    """
    if (data is None) == (tasks is None):
        raise ConfigError(
            "evaluate takes a file of records (DATA) or benchmarks (--tasks), one of the two; "
            + ("give one." if data is None else "leave the other out.")
        )
    precision: Any = dtype
    if data is not None:
        for_tasks = {
            "--data": folder,
            "--questions": questions,
            "--scorer": scorer,
            "--limit": limit,
            "--launch": processes,
            "--strict-original": strict_original or None,
            "--dry-run": dry_run or None,
        }
        if wrong := [name for name, value in for_tasks.items() if value is not None]:
            raise ConfigError(
                f"{', '.join(wrong)} belong(s) to --tasks, but a file of records was given ({data}); leave one of the two out."
            )
        Teacher(path=model, dtype=precision or "float32")
        evaluate_records(model, data, images, teacher, batch_size, max_new_tokens or 128, precision or "float32", out)
        return
    if images is not None or teacher is not None:
        raise ConfigError("--images and --teacher belong to a file of records (DATA); leave them out with --tasks.")
    settings = Teacher(path=model, dtype=precision or "auto")
    asked = {name: scorer_of(name, scorer) for name in task_names(tasks or "")}
    quiet()
    if processes is not None and not dry_run:
        options: dict[str, Any] = {
            "--tasks": tasks,
            "--data": folder,
            "--questions": questions,
            "--scorer": scorer,
            "--batch-size": batch_size,
            "--max-new-tokens": max_new_tokens,
            "--limit": limit,
            "--dtype": dtype,
            "--out": out,
        }
        given = [str(part) for name, value in options.items() if value is not None for part in (name, value)]
        strict = ["--strict-original"] if strict_original else []
        raise typer.Exit(launch(processes, ["evaluate", model, *given, *strict]))
    from align_ti.evaluation.benchmarks import benchmark
    from align_ti.pipeline.asking import predict, read_task, score_tasks, where_to
    from align_ti.pipeline.parts import launched

    read = [read_task(benchmark(full), task_place(name, folder, questions), limit) for name, full in asked.items()]
    if dry_run:
        table = Table("benchmark", "questions", "pictures", "tokens of an answer", title="dry run: nothing is asked")
        for task in read:
            pictures = len({str(image) for item in task.items for image in item.images})
            tokens = task.tokens(max_new_tokens)
            table.add_row(task.benchmark.title, str(len(task.items)), str(pictures), f"at most {tokens}")
        console.print(table)
        return
    into, digest = where_to(model, out)
    with bars() as advance:
        predict(
            settings,
            read,
            into,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            digest=digest,
            advance=advance,
        )
    if launched().is_main_process:
        scores = score_tasks(read, into, strict_original=strict_original)
        show_tasks({model: {name: one.told for name, one in scores.items()}})
        console.print(f"predictions and scores: {into}")


def evaluate_records(
    model: str,
    data: Path,
    images: Path | None,
    teacher: str | None,
    batch_size: int,
    max_new_tokens: int,
    dtype: str,
    out: Path | None,
) -> None:
    """Ask a model every question of a file and show its scores by exact match."""
    quiet()
    from align_ti.data.sources import read_conversations
    from align_ti.pipeline.measuring import evaluate_model
    from align_ti.runs import write_json

    conversations = read_conversations(data, images)
    with bars() as advance:
        done = [0]

        def answered(count: int) -> None:
            done[0] += count
            advance("answer", done[0], len(conversations))

        settings = Evaluation(batch_size=batch_size, max_new_tokens=max_new_tokens)
        result = evaluate_model(model, conversations, settings, teacher=teacher, dtype=dtype, advance=answered)
    table = Table("kind", "accuracy %", "95 %", "questions")
    for kind, score in result["accuracy"].items():
        table.add_row(
            kind, f"{score['per_cent']:.1f}", f"{score['low']:.1f}-{score['high']:.1f}", str(score["questions"])
        )
    console.print(table)
    if result["cut"]:
        console.print(f"{result['cut']} answer(s) were cut at {max_new_tokens} tokens; raise --max-new-tokens.")
    if "fidelity" in result:
        show_fidelity(result["fidelity"])
    if out is not None:
        write_json(out, result)


def task_names(tasks: str) -> list[str]:
    """The names in a list with commas.

    Raises:
        ConfigError: there is none, or one stands there twice.
    """
    found = [name.strip() for name in tasks.split(",") if name.strip()]
    if not found or len({name.partition(":")[0] for name in found}) < len(found):
        raise ConfigError(f"--tasks is {tasks!r}; accepted: names with commas between them, each once.")
    return found


def scorer_of(name: str, scorer: str | None) -> str:
    """The benchmark's name, with the scorer that `own` is to use."""
    return f"{name}:{scorer}" if name == "own" and scorer is not None else name


def task_place(name: str, folder: Path | None, questions: Path | None) -> Path:
    """Where a benchmark's files are.

    Raises:
        ConfigError: it was not said.
    """
    place = questions if name.partition(":")[0] == "own" and questions is not None else folder
    if place is None:
        own = ", or the file of questions by --questions" if name.partition(":")[0] == "own" else ""
        raise ConfigError(f"--data is missing; name the folder that holds the files of {name} by it{own}.")
    return place


@app.command()
def score(
    predictions: Annotated[
        Path, typer.Argument(help="A .jsonl or .json file of predictions, by `align-ti evaluate` or another tool.")
    ],
    task: Annotated[str, typer.Option(help="The benchmark: gqa, sqa, textvqa, pope, mme, mmbench, digits or own.")],
    folder: TaskFolder = None,
    questions: OwnQuestions = None,
    scorer: OwnScorer = None,
    strict_original: StrictOriginal = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the scores to this file, whose name ends in scores.json.")
    ] = None,
) -> None:
    """Score predictions on a benchmark, whoever made them, each score with a 95 % interval. Loads no model and no torch.

    A record needs the question's id (id, question_id) and the answer (text, prediction, response, answer). Missing ones are wrong.
    """
    from align_ti.evaluation.benchmarks import benchmark
    from align_ti.evaluation.results import is_named_scores, write_scores
    from align_ti.evaluation.scored import score_file

    if out is not None and not is_named_scores(out):
        raise ConfigError(f"--out is {str(out)!r}; accepted: scores.json, or a name that ends in .scores.json.")
    chosen = benchmark(scorer_of(task, scorer))
    items = chosen.items(task_place(task, folder, questions))
    found = score_file(predictions, chosen, items, strict_original=strict_original)
    table = Table("score", "value", "95 %", title=f"{chosen.title}, {found.questions} questions")
    for name, told in found.content["metrics"].items():
        table.add_row(name, with_unit(told["value"], told["unit"]), ends(told["low"], told["high"]))
    console.print(table)
    for note in found.report.notes:
        console.print(note, highlight=False)
    if out is not None:
        write_scores(out, found.content)
        console.print(f"scores: {out}")


@app.command()
def compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more results: files of scores or of answers, folders of such files, or one run folder.",
            metavar="RESULT...",
        ),
    ],
    all_metrics: Annotated[bool, typer.Option(help="Every metric, not only each benchmark's headline.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the comparison to this JSON file.")] = None,
) -> None:
    """Compare models on the same questions: scores, and differences to the first, with 95 % intervals and corrected p values."""
    from align_ti.evaluation.comparison import compare as compare_models
    from align_ti.evaluation.comparison import read_models
    from align_ti.runs import write_json

    found = compare_models(read_models(results), all_metrics)
    show_comparison(found)
    if out is not None:
        write_json(out, found)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A folder or hub name of a vision-language model, usually the teacher.")],
    data: Annotated[str, typer.Argument(help="A file, folder or hub dataset of training records.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; a stopped command goes on in it.")],
    images: Annotated[str | None, typer.Option(help="The folder that picture names start from.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="auto, llava, messages, prompt_completion or plain, as in a recipe.")
    ] = "auto",
    split: Annotated[str | None, typer.Option(help="The split to take, where there are several.")] = None,
    subset: Annotated[str | None, typer.Option(help="The configuration of a hub dataset.")] = None,
    find_extension: Annotated[
        bool, typer.Option("--find-extension", help="Look for a missing picture under another extension.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Records answered at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of one answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: greedy; above: tokens are drawn.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Draw among the tokens that reach this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most probable tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    on_bad_record: Annotated[
        str, typer.Option(help="error: stop at a record that cannot be used; skip: leave it out.")
    ] = "error",
) -> None:
    """Let a model answer training records, for students that learn from its answers; run again to go on after a stop.

    The file is training data itself (data.train), and a recipe's answers: data.responses teacher or mixed, data.answers the file.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "on_bad_record": on_bad_record,
    }
    place: dict[str, Any] = {"format": form, "split": split, "subset": subset, "find_extension": find_extension}
    settings, source = Generation(**options), Source(path=data, images=images, **place)
    precision: Any = dtype
    teacher = Teacher(path=model, dtype=precision)
    quiet()
    from align_ti.pipeline.generating import generate_answers

    with bars() as advance:
        made = generate_answers(
            teacher, source, out, settings, advance=lambda done, total: advance("answer", done, total)
        )
    console.print(f"answers: {made.out}, to {made.lines} of {made.records} records")
    if made.images is not None:
        console.print(f"picture names in it start from {made.images}")
    if made.cut:
        console.print(
            f"{made.cut} record(s) have an answer that was cut at {max_new_tokens} tokens; data.responses does not use them; raise "
            "--max-new-tokens."
        )
    if made.records > made.lines:
        console.print(f"{made.records - made.lines} record(s) were left out:")
        for one in made.left_out[:5]:
            console.print(f"  {one.reason}")
        if len(made.left_out) < made.records - made.lines:
            console.print("  (reasons of an earlier call were told there)")


@app.command()
def chat(
    student: Annotated[str, typer.Argument(help="A folder or hub name of a vision-language model.")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture to talk about. May be repeated.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Also ask this model, for comparison.")] = None,
    question: Annotated[
        str | None, typer.Option(help="Ask this and end; otherwise questions are read until Ctrl-D.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 256,
) -> None:
    """Ask a model about pictures, next to its teacher if one is named.

    Each model remembers its own answers. The pictures go with the first question.
    """
    quiet()
    from align_ti.pipeline.measuring import open_chats

    models = {"student": student, **({} if teacher is None else {"teacher": teacher})}
    chats = dict(zip(models, open_chats(list(models.values()), image or [], max_new_tokens), strict=True))
    if question is not None:
        ask_each(chats, question)
        return
    console.print("Ask; Ctrl-D ends.")
    while True:
        try:
            text = console.input("\nyou: ").strip()
        except EOFError:
            console.print()
            return
        if text:
            try:
                ask_each(chats, text)
            except DataError as error:
                # One question that cannot be asked is no end of the conversation.
                console.print(Text(str(error), style="red"))


def ask_each(chats: Mapping[str, Any], question: str) -> None:
    """Print each model's answer under its name, as plain text whatever is in it."""
    from align_ti.evaluation.chat import visible

    for name, one in chats.items():
        with console.status(f"{name} answers"):
            answer, cut = one.ask(question)
        console.print(Text.assemble((f"{name}: ", "bold"), visible(answer) or "(an empty answer)"), soft_wrap=True)
        if cut:
            console.print(f"(cut at {one.max_new_tokens} tokens; raise --max-new-tokens)")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The folder of a finished run or demo.")]) -> None:
    """Write report.html again from what lies in a run folder."""
    from align_ti.report.page import write_report

    console.print(f"report: {write_report(run)}")


@app.command()
def digits(
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    train: Annotated[int, typer.Option(min=1, help="Training pictures, each with up to eight instructions.")] = 250,
    validation: Annotated[int, typer.Option(min=1, help="Validation pictures.")] = 100,
    test: Annotated[int, typer.Option(min=1, help="Test pictures.")] = 150,
) -> None:
    """Write the digits benchmark to disk: pictures, LLaVA-format JSON, and the shipped teacher and student."""
    quiet()
    from align_ti.digits.files import Sizes, write_benchmark

    with bars() as advance:
        done = [0]

        def drawn(count: int) -> None:
            done[0] += count
            advance("draw", done[0], train + validation + test)

        write_benchmark(out, seed, Sizes(train=train, validation=validation, test=test), drawn)
    console.print(f"benchmark: {out}")


@app.command()
def compose(
    vision: Annotated[str, typer.Option(help="A folder or hub name of a SigLIP or CLIP checkpoint.")],
    text: Annotated[str, typer.Option(help="A folder or hub name of a causal language model.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    feature_layer: Annotated[
        int, typer.Option(help="The tower's hidden state that is read; -1: behind the last layer.")
    ] = -2,
    select_strategy: Annotated[
        str | None,
        typer.Option(help="full, or default: without the first position. By the kind of tower if not given."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the language model's), float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Fixes the projector.")] = 0,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, or vicuna. By default the language model's own, with pictures.")
    ] = None,
) -> None:
    """Put a new LLaVA model together: a vision tower, a fresh projector, a language model."""
    options: dict[str, Any] = {
        "vision": vision,
        "text": text,
        "out": str(out),
        "feature_layer": feature_layer,
        "select_strategy": select_strategy,
        "dtype": dtype,
        "seed": seed,
        "chat_template": chat_template,
    }
    checked = Composition(**options)
    quiet()
    from align_ti.checkpoints.compose import compose as put_together

    with console.status("composing"):
        made = put_together(checked)
    show_made(made)


@app.command("import")
def import_checkpoint(
    path: Annotated[
        str, typer.Argument(help="A folder or hub name of a checkpoint that the paper's authors published.")
    ],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    vision_tower: Annotated[
        str | None,
        typer.Option(help="The SigLIP tower's folder or hub name; by default the one that the checkpoint names."),
    ] = None,
    own_tower: Annotated[
        bool, typer.Option("--own-tower", help="Take the tower weights inside the checkpoint in place of the folder's.")
    ] = False,
) -> None:
    """Turn a checkpoint in the authors' own layout into a folder that plain transformers loads."""
    quiet()
    from align_ti.checkpoints.released import import_released

    with console.status("importing"):
        made = import_released(path, out, vision_tower, own_tower=own_tower)
    show_made(made)


@recipes.command("list")
def list_recipes() -> None:
    """Name every shipped recipe, and every config for `accelerate launch`, with its first line."""
    for title, folder in (("recipe", "recipes"), ("config of accelerate", ENGINES)):
        table = Table(title, "what it is")
        for name, text in shipped(folder).items():
            table.add_row(name, text.splitlines()[0].lstrip("# "))
        console.print(table)


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="The name of a shipped recipe or config.")]) -> None:
    """Print a recipe or a config."""
    typer.echo(recipe_text(name))


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="The name of a shipped recipe or config.")],
    to: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
) -> None:
    """Copy a recipe, or a config for `accelerate launch`, to a file of your own, to change it there."""
    text = recipe_text(name)
    if to.exists():
        raise ConfigError(f"{to} exists; nothing was written; choose another name.")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text, encoding="utf-8")
    console.print(f"written: {to}")


# --- what the verbs share ---------------------------------------------------------------------------------------------


ENGINES = "recipes/engines"
"""Where the configs for `accelerate launch` lie."""


def shipped(folder: str = "recipes") -> dict[str, str]:
    """The shipped recipes, or configs, by name."""
    found = sorted(
        (item for item in (files("align_ti") / folder).iterdir() if item.name.endswith(".yaml")),
        key=lambda item: item.name,
    )
    return {item.name.removesuffix(".yaml"): item.read_text(encoding="utf-8") for item in found}


def recipe_text(name: str) -> str:
    """The text of a shipped recipe or config."""
    known = shipped() | shipped(ENGINES)
    if name not in known:
        raise ConfigError(f"there is no recipe or config {name!r}; shipped: {', '.join(known)}.")
    return known[name]


def find_recipe(path: Path) -> Path:
    """The recipe file: as given, or a shipped recipe of that name."""
    # A folder of that name, such as the benchmark's own, is no recipe.
    if not path.is_file() and str(path) in shipped():
        with as_file(files("align_ti") / "recipes" / f"{path}.yaml") as file:
            return Path(file)
    return path


def dry(recipe: Recipe) -> None:
    """Load and check everything that a run needs, and say what it would do."""
    from align_ti.data.mixing import read_mixture
    from align_ti.data.roles import ROLE_NAMES
    from align_ti.pipeline.measuring import read_tasks
    from align_ti.pipeline.parts import load_parts
    from align_ti.pipeline.records import read_questions, training_data

    mixture = None if recipe.data.stream else read_mixture(recipe.data, recipe.seed)
    questions = read_questions(recipe.data)
    for conversation in questions:
        conversation.check_files()
    tasks = read_tasks(recipe)
    parts = load_parts(recipe)
    with bars() as advance:
        data, story = training_data(
            recipe,
            parts.processor,
            advance=lambda done, total: advance("check the records", done, total),
            mixture=mixture,
            teacher_processor=parts.own_processor,
        )
    for conversation in [] if mixture is None or story["skipped"] else mixture.conversations:
        conversation.check_files()
    sample = next(iter(data))
    trained = parts.trained()
    table = Table("what", "value", title="dry run: nothing is trained")
    table.add_row(
        "student",
        f"{recipe.student.path}: {sum(count for count, _ in trained.values()) / 1e6:.2f} M of "
        f"{sum(every for _, every in trained.values()) / 1e6:.2f} M trained",
    )
    for part, (count, every) in trained.items():
        table.add_row(f"  {part}", f"{count / 1e6:.2f} M of {every / 1e6:.2f} M trained" if count else "frozen")
    if parts.teacher is not None and recipe.teacher is not None:
        table.add_row("teacher", f"{recipe.teacher.path}: {parts.teacher.num_parameters() / 1e6:.2f} M, frozen")
    add_data(table, story, len(questions))
    roles = ", ".join(f"{int((sample['roles'] == number).sum())} {name}" for number, name in enumerate(ROLE_NAMES))
    table.add_row("first record", f"{len(sample['input_ids'])} tokens: {roles}")
    terms = ", ".join(f"{name} x {getattr(recipe.objective, name).weight:g}" for name in recipe.objective.active)
    table.add_row("objective", terms)
    for task in tasks:
        table.add_row("benchmark", f"{task.benchmark.title}: {len(task.items)} questions")
    table.add_row("run folder", recipe.out)
    console.print(table)


def show_troubles(report: Report) -> None:
    """What a check before training has to say: verdicts that are no pass, and how many there are of each."""
    from align_ti.preflight.table import verdict_table

    console.print(verdict_table(report.verdicts, all_of_them=False))


def show_check(report: Report) -> None:
    """The verdicts of a check as a table, and the first sample with its roles coloured."""
    from align_ti.preflight.table import role_legend, sample_text, verdict_table

    console.print(verdict_table(report.verdicts))
    if report.renderings:
        console.print(role_legend())
        console.print(sample_text(report.renderings[0]))


def add_data(table: Table, story: dict[str, Any], questions: int) -> None:
    """The rows about data: each source, then all records, then why the first of them are skipped."""
    for source in story.get("sources", []):
        renamed = f", {source['other_extension']} pictures under another extension" if source["other_extension"] else ""
        table.add_row(f"source {source['path']}", f"{source['taken']} taken of {source['records']}{renamed}")
    if "stream" in story:
        table.add_row("records", f"a stream of {story['stream']}, {questions} to be measured on")
        return
    table.add_row(
        "records",
        f"{story['used']} to learn from, {questions} to be measured on; {story['skipped']} skipped, {story['truncated']} truncated",
    )
    if story["responses"]["teacher"]:
        table.add_row("responses", f"{story['responses']['teacher']} the teacher's, {story['responses']['gold']} gold")
    for reason in story["first_reasons"]:
        table.add_row("skipped", reason)


def show_plan(plan: Plan, limit: int | None) -> None:
    """Memory of a device and bytes sent as tables, then what was assumed, and what to change if it does not fit."""
    from align_ti.planning.plan import FILLED, shown_mapping

    layout = plan.case.layout
    table = Table("part", "GB", title=f"memory of a device: {layout.engine}, {layout.devices} device(s)")
    for name, size in shown_mapping(plan.memory.parts):
        table.add_row(name, size)
    table.add_section()
    table.add_row("all", f"{plan.memory.total / 1e9:,.3f}")
    console.print(table)
    if plan.traffic.parts:
        sent = Table("sent", "GB", title="sent by a device in an optimizer step")
        for name, size in shown_mapping(plan.traffic.parts):
            sent.add_row(name, size)
        console.print(sent)
    if plan.assumed:
        console.print("assumed: " + "; ".join(plan.assumed) + ".")
    if limit is None:
        return
    if plan.memory.total <= FILLED * limit:
        console.print(f"fits in {FILLED:.0%} of {limit / 1e9:g} GB.")
        return
    console.print(
        f"does not fit in {FILLED:.0%} of {limit / 1e9:g} GB, the rest being an allocator's and the libraries'."
    )
    options = Table("option, by itself", "GB", "saves", "fits")
    for one in plan.advice:
        saved = plan.memory.total - one.total
        options.add_row(one.change, f"{one.total / 1e9:,.3f}", f"{saved / 1e9:,.3f}", "yes" if one.fits else "no")
    console.print(options)
    console.print(
        f"change first: {plan.first}."
        if plan.first
        else "no option here makes it fit: take smaller models or larger devices."
    )


def show_summary(summary: dict[str, Any]) -> None:
    """The result as a table: a column for each model, a row for each kind of question and each cost; nothing without own questions."""
    names = list(summary["accuracy"])
    if not names:
        return
    table = Table(title=f"exact match, per cent, {summary['questions']} questions")
    table.add_column("")
    for name in names:
        table.add_column(summary["labels"][name], justify="right")
    for kind in summary["questions_by_kind"]:
        table.add_row(kind, *(f"{summary['accuracy'][name][kind]:.1f}" for name in names))
        if kind == "overall":
            intervals = [summary["interval_95"][name][kind] for name in names]
            table.add_row("  95 %", *(f"{low:.1f}-{high:.1f}" for low, high in intervals), end_section=True)
    table.add_section()
    measured = summary.get("fidelity", {})
    for key, form, title in (
        ("top1_agreement", ".1f", "agreement %"),
        ("own_agreement", ".1f", "  own answers"),
        ("visual_kl", ".3f", "visual KL, nats"),
        ("transition_kl", ".3f", "transition KL"),
    ):
        if any(key in of for of in measured.values()):
            values = [measured.get(name, {}).get(key, {}).get("value") for name in names]
            table.add_row(title, *(shown(value, form) for value in values))
    for key, form, title in (
        ("divergence_nats", ".3f", "KL, nats"),
        ("seconds_per_step", ".3f", "s / step"),
        ("peak_memory_mib", ".0f", "peak MiB"),
    ):
        table.add_row(title, *(shown(summary[key].get(name), form) for name in names))
    console.print(table)


def show_tasks(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """The headline of each benchmark with its 95 % interval, a column for each model; the mean of the paper's six; then the notes."""
    from align_ti.evaluation.scored import mean_of_six

    table = Table("benchmark", "score", "questions")
    for name in models:
        table.add_column(name, justify="right")
        table.add_column("95 %", justify="right")
    for name, first in next(iter(models.values())).items():
        told = [scores[name] for scores in models.values()]
        cells = [cell for one in told for cell in (f"{one['value']:.1f}", ends(one["low"], one["high"]))]
        table.add_row(first["title"], first["metric"], str(first["questions"]), *cells)
    means = [mean_of_six(scores) for scores in models.values()]
    if None not in means:
        table.add_section()
        cells = [cell for value, low, high in filter(None, means) for cell in (f"{value:.1f}", ends(low, high))]
        table.add_row("mean of the six", "as in the paper", "", *cells)
    console.print(table)
    for model, scores in models.items():
        for one in scores.values():
            of = f"{model}, " if len(models) > 1 else ""
            for note in one["notes"]:
                console.print(f"{of}{one['title']}: {note}", highlight=False)


def ends(low: float | None, high: float | None) -> str:
    """An interval, or a dash where it is unknown."""
    return "-" if low is None or high is None or low != low or high != high else f"{low:.1f}-{high:.1f}"


def with_unit(value: float, unit: str) -> str:
    """A score with its unit."""
    return f"{value:.2f} {unit}".strip()


def show_fidelity(found: Mapping[str, Any]) -> None:
    """How near a model is to its teacher: each measure with its interval, then agreement along the answers."""
    table = Table("fidelity to the teacher", "value", "95 %")
    for name, title in FIDELITY.items():
        if name in found:
            one = found[name]
            table.add_row(f"{title} ({one['unit']})", figure(one["value"], one["unit"]), bounds(one, one["unit"]))
    console.print(table)
    table = Table("position in the answer", title="agreement with the teacher, %")
    for title in ("right answers", "95 %", "own answers", "95 %"):
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
    table = Table("benchmark", "score", "model", caption=f"Differences are to {first}.")
    for title in ("value", "95 %", "difference", "95 %", *(("p (Holm)",) if many else ("p",))):
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
            f"p values are corrected for {found['comparisons']} comparisons (Holm); each interval holds by itself, those that hold "
            "together are in the JSON (--out)."
        )
    for note in found["notes"]:
        console.print(note)


def signed(value: float, unit: str) -> str:
    """A difference with its sign."""
    return f"{'+' if value > 0 else ''}{figure(value, unit)}"


def show_phases(runs: Mapping[str, RunFolder]) -> None:
    """Where the time of a training step goes, in the runs that counted it: mean milliseconds of each phase and its share."""
    from align_ti.runs import read_json

    found = {name: read_json(run.phases) for name, run in runs.items() if run.phases.exists()}
    if not found:
        return
    steps = next(iter(found.values()))["steps"]
    table = Table(title="milliseconds of a training step", caption=f"mean of {steps} steps")
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


def milliseconds_and_share(cell: Mapping[str, float] | None) -> tuple[str, str]:
    """Two cells of the table of phases; dashes where a run has no such phase."""
    return ("-", "-") if cell is None else (f"{1000 * cell['mean_seconds']:.2f}", f"{100 * cell['share']:.1f}")


def show_spent(spent: Mapping[str, float]) -> None:
    """How long each part of a demo took, all calls together."""
    whole = sum(spent.values())
    table = Table(title="what the demo spent")
    table.add_column("part")
    for column in ("s", "%"):
        table.add_column(column, justify="right")
    for name, seconds in spent.items():
        table.add_row(name, f"{seconds:.1f}", f"{100 * seconds / whole:.1f}")
    table.add_section()
    table.add_row("all", f"{whole:.1f}", "100.0")
    console.print(table)


def show_cached(cached: Cached, written: bool) -> None:
    """What a teacher cache holds, what it took, and from how many passes over the data it saves time."""
    per_row = cached.totals.bytes / max(1, cached.totals.rows)
    title = "teacher cache" if written else f"dry run: from {cached.measured} records; nothing is written"
    table = Table("what", "value", title=title)
    table.add_row("records", f"{cached.records}, {cached.totals.samples} different ones")
    table.add_row(
        "size",
        f"{size(cached.totals.bytes)}: {cached.bytes_per_token:.0f} bytes a token of the teacher, {per_row:.0f} a row that is kept "
        f"({cached.totals.rows / max(1, cached.totals.tokens):.0%} of the tokens, {cached.hidden} numbers each)",
    )
    table.add_row("IVA's layer", "none: response rows alone" if cached.layer is None else str(cached.layer))
    cost = cached.cost
    table.add_row(
        "ms a record",
        f"{1000 * cost.teacher:.2f} the teacher, {1000 * cost.writing:.2f} writing, {1000 * cost.reading:.2f} reading",
    )
    even = cost.even
    table.add_row(
        "break-even",
        "never: reading takes as long as the teacher"
        if even is None
        else f"{even} passes over the data (epochs x students), where (teacher + writing) + passes x reading < passes x teacher",
    )
    console.print(table)


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def show_made(made: Made) -> None:
    """What was written, as a table."""
    table = Table("what", "value", title=str(made.folder))
    for part, count in made.parameters.items():
        table.add_row(part, f"{count / 1e6:.2f} M parameters")
    table.add_row("precision", made.dtype)
    table.add_row("image token", str(made.image_token))
    table.add_row("visual tokens per picture", str(made.visual_tokens))
    table.add_row("end-of-turn token ids", ", ".join(map(str, made.end_tokens)))
    console.print(table)
    for note in made.notes:
        console.print(note, markup=False, highlight=False)


def first_paragraph(documented: type) -> str:
    """The first paragraph of a class's docstring, as one line."""
    return " ".join(inspect.getdoc(documented).split("\n\n")[0].split()) if documented.__doc__ else ""  # type: ignore[union-attr]


def show_one(name: str) -> None:
    """A term or divergence as its docstring tells it, with every option, its default and its meaning.

    Raises:
        ConfigError: nothing has that name.
    """
    kind: Kind = "divergence" if name in names("divergence") else "term"
    found = lookup(kind, name)
    console.print(f"{kind} {name}\n\n{inspect.getdoc(found)}\n", highlight=False)
    table = Table("option", "default", "meaning")
    for option, field in found.model_fields.items():
        table.add_row(
            option, str(getattr(field.default, "name", field.default)), " ".join((field.description or "").split())
        )
    if found.model_fields:
        console.print(table)


def shown(value: float | None, form: str) -> str:
    """A number, or a dash where nothing was measured."""
    return "-" if value is None else format(value, form)


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars with the time that is left, one for each stage; where nobody watches, one line a stage."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(f"{stage} ...")
            progress.update(tasks[stage], completed=done, total=total)

        yield advance


def quiet() -> None:
    """Leave the terminal to the progress bars: libraries speak only when something is wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # torchao says at import which of its kernels this machine lacks, whoever imports it; the hub's client tells of every attempt.
    for name in ("accelerate", "huggingface_hub", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def main() -> None:
    """The entry point: an error that a user can meet is one message, not a traceback."""
    try:
        app()
    except SystemExit as end:
        if not end.code:
            part_in_order()
        raise
    except AlignTIError as error:
        if isinstance(error, RequeueError):
            part_in_order()  # all processes stop at the same step
        Console(stderr=True).print(f"[bold red]error[/] {type(error).__name__}", highlight=False)
        print(error, file=sys.stderr)
        sys.exit(75 if isinstance(error, RequeueError) else 130 if isinstance(error, InterruptedRunError) else 2)
