"""Runs a notebook in this process, without a kernel, whose start would take longer than the cells: `python -m tests.notebook FILE`."""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from IPython.core.displayhook import DisplayHook
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import publish_display_data
from IPython.utils.capture import capture_output
from traitlets import Type
from traitlets.config import Config

Notebook = dict[str, Any]

KINDS = ("text/html", "image/png", "text/plain")
"""The forms of an output that are kept: the first that it has, and plain text for readers without it."""


def executed(notebook: Notebook) -> Notebook:
    """The notebook with the outputs that its cells make one after the other.

    Raises:
        AssertionError: a cell fails; the message is its source and its error.
    """
    with TemporaryDirectory() as settings, shell_of_its_own(settings) as shell:
        return {**notebook, "cells": [*run_cells(shell, notebook["cells"])]}


class Hook(DisplayHook):
    """Displays a cell's value instead of printing it."""

    def write_output_prompt(self) -> None:
        """Does nothing: the value has no number in front."""

    def write_format_data(self, format_dict: dict[str, Any], md_dict: dict[str, Any] | None = None) -> None:
        """Displays the value in all its forms."""
        publish_display_data(format_dict, md_dict)


class Shell(InteractiveShell):
    """A shell without windows."""

    displayhook_class = Type(Hook)

    def enable_gui(self, gui: Any = None) -> None:
        """Does nothing: figures are drawn into the notebook."""


@contextmanager
def shell_of_its_own(settings: str) -> Iterator[InteractiveShell]:
    """A shell that leaves neither a history nor another `__main__` behind."""
    quiet = Config({"HistoryManager": {"enabled": False}})
    shell = Shell.instance(config=quiet, ipython_dir=settings)
    try:
        yield shell
    finally:
        shell.restore_sys_module_state()
        Shell.clear_instance()


def run_cells(shell: InteractiveShell, cells: list[Notebook]) -> Iterator[Notebook]:
    """Each cell, those of code with their outputs."""
    count = 0
    for cell in cells:
        if cell["cell_type"] == "code":
            count += 1
            source = "".join(cell["source"])
            with capture_output() as seen:
                result = shell.run_cell(source, store_history=True)
            assert result.success, f"{source}\n\n{result.error_in_exec or result.error_before_exec!r}"
            printed = [{"output_type": "stream", "name": "stdout", "text": lines(seen.stdout)}] if seen.stdout else []
            cell = {**cell, "execution_count": count, "outputs": [*printed, *map(output, seen.outputs)]}
        yield cell


def output(shown: Any) -> Notebook:
    """One displayed object in the notebook's format."""
    best = next(kind for kind in KINDS if kind in shown.data)
    kept = {kind: shown.data[kind] for kind in dict.fromkeys((best, "text/plain")) if kind in shown.data}
    if best == "text/html":
        kept["text/plain"] = "(shown as HTML)"
    data = {
        kind: b64encode(value).decode() if isinstance(value, bytes) else lines(value) for kind, value in kept.items()
    }
    return {"output_type": "display_data", "data": data, "metadata": {}}


def lines(text: str) -> list[str]:
    """The text as the format keeps it."""
    return text.splitlines(keepends=True)


def main(path: Path) -> None:
    """Runs the notebook of a file and writes its outputs into it."""
    notebook = executed(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
