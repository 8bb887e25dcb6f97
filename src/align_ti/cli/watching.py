"""The verb that shows a run while it trains, in the terminal or as a page on this machine; it reads the folder's files only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from align_ti.cli.terminal import console
from align_ti.errors import ConfigError

if TYPE_CHECKING:
    from align_ti.report.progress import Bar, Progress, Section

EVERY = 1.0
"""Seconds between two looks at the folder."""

PORT = 8765

LINES = 10
"""Lines of the log that are printed at first where there is no terminal, as `tail -f` does."""

BLOCKS = "▁▂▃▄▅▆▇█"

LABEL = 26
"""Columns of a row's label; longer ones are cut."""


def watch(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, a demo or a study.", metavar="RUN")],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and end.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve a page that reloads itself, reachable from this machine only.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help=f"The page's port, by default {PORT}; 0 takes any free one.")
    ] = None,
) -> None:
    """Show the progress of a run while it trains: terms, learning rate, throughput, memory, held-out questions, problems.

    Only the run's files are read, so the command may be started before the run, on another machine with the same files, and
    stopped at any time (Ctrl-C) without effect on the run. Ends when the run is done. If the output is not a terminal, it
    prints a line for every new entry of the log.
    """
    if port is not None and not serve:
        raise ConfigError(
            "--port is given without --serve; the two are accepted together; add --serve, or leave --port out."
        )
    if serve and once:
        raise ConfigError("--serve and --once are both given; one of them is accepted; leave the other out.")
    from align_ti.report.folder_progress import progress

    try:
        if serve:
            from align_ti.cli.serving import serve_progress

            serve_progress(folder, PORT if port is None else port, console.print)
        elif once:
            console.print(shown(progress(folder, time.time())))
        elif console.is_terminal:
            follow_live(folder)
        else:
            follow_plainly(folder)
    except KeyboardInterrupt:
        return


def follow_live(folder: Path) -> None:
    """Draws the progress in place until the work is done."""
    from align_ti.report.folder_progress import progress

    with Live(console=console, auto_refresh=False) as live:
        while True:
            view = progress(folder, time.time())
            live.update(shown(view), refresh=True)
            if view.done:
                return
            time.sleep(EVERY)


def follow_plainly(folder: Path) -> None:
    """Prints the state whenever it changes, and every new entry of the logs, until the work is done."""
    from align_ti.report.folder_progress import progress

    printed: set[str] = set()
    state = None
    while True:
        view = progress(folder, time.time())
        new = [line for line in (*view.log, *view.troubles) if line not in printed]
        printed.update(new)
        lines = new[-LINES:] if state is None else new
        if view.state != state:
            state = view.state
            lines.append(state)
        for line in lines:
            print(line, flush=True)
        if view.done:
            return
        time.sleep(EVERY)


# --- drawing ----------------------------------------------------------------------------------------------------------


def shown(view: Progress) -> Group:
    """The progress as it stands in a terminal, no wider than that."""
    parts: list[RenderableType] = [Text(view.title, style="bold"), Text(view.state)]
    if view.bars:
        parts.append(bar_table(view.bars))
    parts += [section_table(section) for section in view.sections]
    if view.troubles:
        parts += [Text("problems", style="bold red"), *(Text(f"  {line}") for line in view.troubles)]
    return Group(*parts)


def bar_table(bars: tuple[Bar, ...]) -> Table:
    """A bar for each run: how much is done, and what is left."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(max_width=LABEL, no_wrap=True, overflow="ellipsis")
    table.add_column(ratio=1, min_width=8)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for bar in bars:
        drawn = ProgressBar(total=bar.total, completed=bar.done) if bar.total else Text("")
        told = f"{bar.done:,}" + (f" of {bar.total:,}" if bar.total else "")
        table.add_row(Text(bar.label), drawn, told, Text(bar.note))
    return table


def section_table(section: Section) -> Table:
    """A table with the curve of each row behind its cells, as wide as there is room."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=Text(section.title, style="bold"), title_justify="left")
    table.add_column("", max_width=LABEL, no_wrap=True, overflow="ellipsis")
    for column in section.columns:
        table.add_column(column, justify="right")
    curves = any(row.curve for row in section.rows)
    if curves:
        table.add_column("over steps", no_wrap=True)
    room = max(8, min(40, console.width - LABEL - 14 * len(section.columns) - 2))
    for row in section.rows:
        table.add_row(Text(row.label), *map(Text, row.cells), *([sparkline(row.curve, room)] if curves else []))
    return table


def sparkline(values: tuple[float, ...], width: int) -> str:
    """The curve in characters, at most `width` of them; nothing where the terminal cannot show them."""
    from align_ti.report.progress import shape

    if not console.encoding.lower().startswith("utf"):
        return ""
    return "".join(BLOCKS[round(height * (len(BLOCKS) - 1))] for height in shape(values, width))
