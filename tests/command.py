"""The command line in the process of the tests."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

from align_ti.cli import main, terminal


@dataclass
class Done:
    """What a command said, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, cwd: Path | None = None, width: int = 200) -> Done:
    """The entry point in this process, which has loaded the libraries already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["align-ti", *map(str, arguments)]),
        # Test workers have terminals of 80 columns.
        patch.object(terminal.console, "_width", width),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert end.value.code is None or isinstance(end.value.code, int)
    return Done(end.value.code or 0, out.getvalue(), err.getvalue())
