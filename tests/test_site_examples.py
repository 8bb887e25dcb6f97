"""What the pages for beginners tell a reader to type works as written, in their order, in an empty folder."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from align_ti.checkpoints.templates import vicuna
from align_ti.config import Recipe
from align_ti.data.roles import RESPONSE, encode
from align_ti.errors import DataError
from align_ti.models.loading import load_processor
from tests import small
from tests.test_cli import run

DOCS = Path(__file__).parent.parent / "docs"

BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NOT_RUN = {"pip install .": "the package is installed where tests run; test_wheel.py installs it"}
"""Commands that a page shows and no test types, with the reason."""


def typed(line: str, folder: Path) -> str:
    """What one command prints."""
    words = shlex.split(line, comments=True)
    assert words[0] == "align-ti", f"{line!r} is not run; only commands of this package are, and those in NOT_RUN"
    done = run(*words[1:], cwd=folder)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def followed(page: str, folder: Path) -> str:
    """All that is printed to somebody who follows a page: files are written, commands and sessions run."""
    printed, names = "", {}
    for language, title, text in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        if title:
            (folder / title).write_text(text)
        elif language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                if line.strip() and line not in NOT_RUN:
                    printed += typed(line, folder)
        elif language == "python":
            out = io.StringIO()
            with contextlib.chdir(folder), contextlib.redirect_stdout(out):
                exec(compile(text, page, "exec"), names)
            printed += out.getvalue()
        else:
            raise AssertionError(f"{page}: a block in {language} that nothing does anything with")
    return printed


def named(page: str) -> set[str]:
    """The files and folders that a page says a reader has then."""
    return set(re.findall(r"`((?:runs|digits|mine)/[\w./-]+)`", (DOCS / page).read_text(encoding="utf-8")))


@pytest.mark.parametrize(("page", "least", "says"), [("start.md", 12, "'tpa'"), ("own-pair.md", 6, "tpa ")])
def test_a_reader_who_follows_the_page_gets_what_it_says(tmp_path, page, least, says):
    printed = followed(page, tmp_path)
    assert len(named(page)) >= least
    assert [name for name in sorted(named(page)) if not (tmp_path / name).exists()] == []
    assert says in printed and "0 fail" in printed


def test_a_template_that_ends_no_answer_is_replaced_as_the_page_says(tmp_path):
    without = vicuna("END").replace("'END'", "''")
    small.write_pair(tmp_path / "models")
    for name in ("teacher", "student"):
        processor = load_processor(str(tmp_path / "models" / name))
        processor.chat_template = without
        processor.save_pretrained(tmp_path / "models" / name)
    record = small.write_records(tmp_path)[0]
    with pytest.raises(DataError, match="special token"):
        encode(record, load_processor(str(tmp_path / "models" / "student")))
    [block] = [text for language, _, text in BLOCK.findall((DOCS / "real-pair.md").read_text()) if language == "python"]
    with contextlib.chdir(tmp_path):
        exec(compile(block, "real-pair.md", "exec"), {})
    for name in ("teacher", "student"):
        processor = load_processor(str(tmp_path / "models" / name))
        sample = encode(record, processor)
        end = sample["input_ids"][sample["roles"] == RESPONSE][-1]
        assert end == processor.tokenizer.eos_token_id


def test_troubleshooting_names_checks_and_options_that_exist():
    page, check = ((DOCS / name).read_text(encoding="utf-8") for name in ("troubleshooting.md", "check.md"))
    cells = re.findall(r"check (`.*?) \|", page.replace("`check.html`", "the page"))
    said = [name for cell in cells for name in re.findall(r"`([a-z_]+(?:\.[a-z*]+)?)`", cell)]
    explained = set(re.findall(r"`([a-z_]+(?:\.\*)?)`", check))
    unknown = [name for name in said if name not in explained and f"{name.partition('.')[0]}.*" not in explained]
    assert len(said) > 15 and unknown == []
    options = re.findall(r"`((?:data|training|student|teacher|objective|evaluation)\.[a-z_.]+)", page)
    assert len(options) > 10
    for option in options:
        group, *rest = option.rstrip(".").split(".")
        section = Recipe.section(group)
        for part in rest:
            assert section is not None and part in section.known(), option
            section = section.section(part)


def test_troubleshooting_quotes_messages_that_exist():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (DOCS.parent / "src").rglob("*.py"))
    quoted = re.findall(r"^\| \"([^\"]+)\"", page, re.MULTILINE)
    assert len(quoted) >= 3 and [message for message in quoted if message not in source] == []
