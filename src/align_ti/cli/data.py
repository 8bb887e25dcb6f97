"""The verbs that write data: a teacher's answers, a teacher's cache, the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from align_ti.cli.arguments import AllowExtensions, Changes, RecipePath
from align_ti.cli.terminal import bars, console, quiet
from align_ti.config import Generation, Source, Teacher, find_recipe, read_recipe

if TYPE_CHECKING:
    from align_ti.pipeline.caching import Cached


def generate(
    model: Annotated[str, typer.Argument(help="A folder or hub name of a vision-language model, usually the teacher.")],
    data: Annotated[str, typer.Argument(help="A file, folder or hub dataset of training records.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; a stopped command resumes in it.")],
    images: Annotated[str | None, typer.Option(help="The root folder of image names.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="auto, llava, messages, prompt_completion or plain, as in a recipe.")
    ] = "auto",
    split: Annotated[str | None, typer.Option(help="The split to use, if there are several.")] = None,
    subset: Annotated[str | None, typer.Option(help="The configuration of a hub dataset.")] = None,
    find_extension: Annotated[
        bool, typer.Option("--find-extension", help="Look for a missing image under another extension.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Records answered at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: greedy; above: sampling.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most probable tokens that together reach this probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    on_bad_record: Annotated[
        str, typer.Option(help="error: stop at a record that cannot be used; skip: leave it out.")
    ] = "error",
) -> None:
    """Let a model answer training records, for students that learn from its answers; run again to resume after a stop.

    The file is training data itself (data.train), and can be used in a recipe with data.responses teacher or mixed, and
    data.answers.
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
            teacher, source, out, settings, advance=lambda done, total: advance("generate answers", done, total)
        )
    console.print(f"answers: {made.out}, for {made.lines} of {made.records} records")
    if made.images is not None:
        console.print(f"image paths in it are relative to {made.images}")
    if made.cut:
        console.print(
            f"{made.cut} record(s) have an answer truncated at {max_new_tokens} tokens; data.responses does not use them; raise "
            "--max-new-tokens."
        )
    if made.records > made.lines:
        console.print(f"{made.records - made.lines} record(s) were skipped:")
        for one in made.left_out[:5]:
            console.print(f"  {one.reason}")
        if len(made.left_out) < made.records - made.lines:
            console.print("  (an earlier call has printed the other reasons)")


def cache(
    recipe: RecipePath,
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write or to resume in; by default the recipe's data.teacher_cache."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Teacher batch size in records; no effect except by rounding.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate time, size and savings from a few records; write nothing.")
    ] = False,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Store the teacher's outputs that KD and IVA need, once for several epochs or students; run again to resume after a stop.

    With data.teacher_cache students train from the cache, without the teacher. `accelerate launch` splits the records over
    processes.
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


def show_cached(cached: Cached, written: bool) -> None:
    """What a teacher cache holds, what it took, and from how many passes over the data it saves time."""
    per_row = cached.totals.bytes / max(1, cached.totals.rows)
    title = "teacher cache" if written else f"dry run: from {cached.measured} records; nothing is written"
    table = Table("item", "value", title=title)
    table.add_row("records", f"{cached.records}, {cached.totals.samples} of them distinct")
    table.add_row(
        "size",
        f"{size(cached.totals.bytes)}: {cached.bytes_per_token:.0f} bytes per teacher token, {per_row:.0f} per stored position "
        f"({cached.totals.rows / max(1, cached.totals.tokens):.0%} of the tokens, {cached.hidden} values each)",
    )
    table.add_row(
        "IVA's layer", "none: only response positions are stored" if cached.layer is None else str(cached.layer)
    )
    cost = cached.cost
    table.add_row(
        "ms / record",
        f"teacher {1000 * cost.teacher:.2f}, writing {1000 * cost.writing:.2f}, reading {1000 * cost.reading:.2f}",
    )
    even = cost.even
    table.add_row(
        "break-even",
        "never: reading takes as long as the teacher's forward pass"
        if even is None
        else f"{even} passes over the data (epochs x students): (teacher + writing) + passes x reading < passes x teacher",
    )
    console.print(table)


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def digits(
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    train: Annotated[int, typer.Option(min=1, help="Training images, each with up to eight instructions.")] = 2500,
    validation: Annotated[int, typer.Option(min=1, help="Validation images.")] = 100,
    test: Annotated[int, typer.Option(min=1, help="Test images.")] = 150,
) -> None:
    """Write the digits benchmark to disk: images, LLaVA-format JSON, and the shipped teacher and student."""
    quiet()
    from align_ti.digits.files import Sizes, write_benchmark

    with bars() as advance:
        done = [0]

        def drawn(count: int) -> None:
            done[0] += count
            advance("draw images", done[0], train + validation + test)

        write_benchmark(out, seed, Sizes(train=train, validation=validation, test=test), drawn)
    console.print(f"benchmark: {out}")
