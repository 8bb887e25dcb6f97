"""docs/performance.md and the README say what results/ says."""

from __future__ import annotations

import re

from benchmarks.tables import PAGE, PAGES, ROOT, TABLES, filled


def test_every_table_of_the_page_is_made_from_the_results():
    pages = [path.read_text(encoding="utf-8") for path in PAGES]
    assert set(re.findall(r"<!-- table: ([a-z-]+) -->", "".join(pages))) == set(TABLES)
    for page in pages:
        assert filled(page) == page, "run `python -m benchmarks.tables`"


def test_a_number_that_was_changed_by_hand_is_seen():
    page = PAGE.read_text(encoding="utf-8")
    digit = re.search(r"<!-- table: step -->.*?(\d+\.\d\d)", page, re.DOTALL)
    assert digit is not None
    other = page[: digit.start(1)] + "9.87" + page[digit.end(1) :]
    assert filled(other) == page != other


def test_pictures_and_commands_of_the_page_are_there():
    page = PAGE.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        if "://" not in link:
            assert (PAGE.parent / link).exists(), link
    modules = re.findall(r"python -m benchmarks\.([a-z_]+)", page)
    assert len(modules) >= 6
    for name in modules:
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name
