"""The command line: thin verbs over the pipeline, one file for each group. Importing it, and so `--help`, imports no torch."""

from align_ti.cli.application import app, main
from align_ti.cli.terminal import quiet
from align_ti.config import shipped

__all__ = ["app", "main", "quiet", "shipped"]
