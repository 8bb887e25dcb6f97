"""The verbs that ask, score and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from align_ti.cli.tables import ends, show_comparison, show_fidelity, show_tasks, with_unit
from align_ti.cli.terminal import bars, console, quiet
from align_ti.config import Evaluation, Teacher
from align_ti.errors import ConfigError
from align_ti.processes import launch

if TYPE_CHECKING:
    from align_ti.pipeline.asking import Task

TaskFolder = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="The folder of the benchmarks' files, laid out as in LLaVA's evaluation guide (its eval folder, or the one above).",
    ),
]

OwnQuestions = Annotated[Path | None, typer.Option(help="The .jsonl file of the task `own`.", metavar="FILE")]

OwnScorer = Annotated[
    str | None, typer.Option(help="Scorer of the task `own` for questions without a scorer of their own.")
]

StrictOriginal = Annotated[
    bool, typer.Option("--strict-original", help="Score as the original scripts do, their defects included.")
]


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder or hub name of a vision-language model.")],
    data: Annotated[
        Path | None, typer.Argument(help="A LLaVA-format file with the expected answers, instead of --tasks.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Benchmarks, such as gqa,sqa,textvqa,pope,mme,mmbench,digits,own.", metavar="NAME[,NAME]"),
    ] = None,
    folder: TaskFolder = None,
    questions: OwnQuestions = None,
    scorer: OwnScorer = None,
    images: Annotated[Path | None, typer.Option(help="The root folder of image names.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Also measure the fidelity to this model: KL and agreement.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum tokens of one answer; by default 128, or as in each benchmark's protocol."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use about this many questions of each benchmark, complete groups of them."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto (as saved, the default of --tasks), float32 (the default of DATA), bfloat16 or float16; the teacher's too."
        ),
    ] = None,
    strict_original: StrictOriginal = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--launch", min=1, metavar="N", help="Split --tasks over N processes of this machine, one per GPU."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the benchmarks' files and list the questions; load no model.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also write scores and answers to this JSON file; with --tasks the folder of predictions and scores, by default one "
            "named after the model, below evaluations."
        ),
    ] = None,
) -> None:
    """Evaluate a model on benchmarks, or on a file of your own records.

    With --tasks, predictions are written first (NAME.jsonl) and then scored, each score with a 95 % interval; run the same
    command again to resume after a stop. With DATA, answers are scored by exact match, overall and by question type.
    """
    if (data is None) == (tasks is None):
        raise ConfigError(
            "evaluate takes a file of records (DATA) or benchmarks (--tasks), one of the two; "
            + ("give one." if data is None else "leave the other out.")
        )
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
                f"{', '.join(wrong)} can be used only with --tasks, but a file of records is given ({data}); leave one of the two out."
            )
        evaluate_records(model, data, images, teacher, batch_size, max_new_tokens or 128, dtype or "float32", out)
        return
    if images is not None or teacher is not None:
        raise ConfigError(
            "--images and --teacher can be used only with a file of records (DATA); leave them out with --tasks."
        )
    precision: Any = dtype or "auto"
    settings = Teacher(path=model, dtype=precision)
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
    from align_ti.pipeline.asking import read_task

    read = [read_task(benchmark(full), task_place(name, folder, questions), limit) for name, full in asked.items()]
    if dry_run:
        show_asked(read, max_new_tokens)
    else:
        evaluate_tasks(settings, read, batch_size, max_new_tokens, strict_original, out)


def show_asked(read: list[Task], max_new_tokens: int | None) -> None:
    """What would be asked of each benchmark, as a table."""
    table = Table("benchmark", "questions", "images", "tokens per answer", title="dry run: no model is run")
    for task in read:
        pictures = len({str(image) for item in task.items for image in item.images})
        tokens = task.tokens(max_new_tokens)
        table.add_row(task.benchmark.title, str(len(task.items)), str(pictures), f"at most {tokens}")
    console.print(table)


def evaluate_tasks(
    model: Teacher,
    read: list[Task],
    batch_size: int,
    max_new_tokens: int | None,
    strict_original: bool,
    out: Path | None,
) -> None:
    """Write a model's predictions on benchmarks, score them and show the scores."""
    from align_ti.pipeline.asking import predict, score_tasks, where_to
    from align_ti.pipeline.parts import launched

    into, digest = where_to(model.path, out)
    with bars() as advance:
        predict(model, read, into, batch_size=batch_size, max_new_tokens=max_new_tokens, digest=digest, advance=advance)
    if launched().is_main_process:
        scores = score_tasks(read, into, strict_original=strict_original)
        show_tasks({model.path: {name: one.told for name, one in scores.items()}})
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
    """Ask a model every question of a file and show its scores by exact match.

    Raises:
        ConfigError: there is no such precision.
    """
    precision: Any = dtype
    Teacher(path=model, dtype=precision)
    quiet()
    from align_ti.data.sources import read_conversations
    from align_ti.pipeline.measuring import evaluate_model
    from align_ti.runs import write_json

    conversations = read_conversations(data, images)
    with bars() as advance:
        done = [0]

        def answered(count: int) -> None:
            done[0] += count
            advance("generate answers", done[0], len(conversations))

        settings = Evaluation(batch_size=batch_size, max_new_tokens=max_new_tokens)
        result = evaluate_model(
            model, conversations, settings, teacher=teacher, dtype=dtype, teacher_dtype=dtype, advance=answered
        )
    table = Table("question type", "accuracy, %", "95 % CI", "questions")
    for kind, score in result["accuracy"].items():
        table.add_row(
            kind, f"{score['per_cent']:.1f}", f"{score['low']:.1f}-{score['high']:.1f}", str(score["questions"])
        )
    console.print(table)
    if result["cut"]:
        console.print(f"{result['cut']} answer(s) were truncated at {max_new_tokens} tokens; raise --max-new-tokens.")
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
        raise ConfigError(f"--tasks is {tasks!r}; accepted: comma-separated names, each once.")
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
        own = ", or the file of questions with --questions" if name.partition(":")[0] == "own" else ""
        raise ConfigError(f"--data is missing; use it to name the folder with the files of {name}{own}.")
    return place


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
    """Score a file of predictions of any tool on a benchmark, each score with a 95 % interval. Loads no model and no torch.

    A record needs the question's id (id, question_id) and the answer (text, prediction, response, answer). Missing ones are
    wrong.
    """
    from align_ti.evaluation.benchmarks import benchmark
    from align_ti.evaluation.results import is_named_scores, write_scores
    from align_ti.evaluation.scored import score_file

    if out is not None and not is_named_scores(out):
        raise ConfigError(f"--out is {str(out)!r}; accepted: scores.json, or a name that ends in .scores.json.")
    chosen = benchmark(scorer_of(task, scorer))
    items = chosen.items(task_place(task, folder, questions))
    found = score_file(predictions, chosen, items, strict_original=strict_original)
    table = Table("score", "value", "95 % CI", title=f"{chosen.title}, {found.questions} questions")
    for name, told in found.content["metrics"].items():
        table.add_row(name, with_unit(told["value"], told["unit"]), ends(told["low"], told["high"]))
    console.print(table)
    for note in found.report.notes:
        console.print(note, highlight=False)
    if out is not None:
        write_scores(out, found.content)
        console.print(f"scores: {out}")


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more results: files of scores or of answers, folders of such files, or one run folder.",
            metavar="RESULT...",
        ),
    ],
    all_metrics: Annotated[bool, typer.Option(help="Every metric, not only each benchmark's headline score.")] = False,
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
