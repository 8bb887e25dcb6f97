"""The documentation site: built strictly, so that a broken link fails here; complete, and nothing of it from elsewhere."""

from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import align_ti
from align_ti.cli.application import RECIPE_VERBS, VERBS
from align_ti.registry import names
from tests.test_report_browser import CHROMIUM, opened

ROOT = Path(__file__).parent.parent


class Loaded(HTMLParser):
    """What a browser loads to show a page: scripts, styles, images, frames; not what a reader may click."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag != "a":
            self.targets += [value for name in ("src", "href", "data", "poster") if (value := given.get(name))]
        assert "mermaid" not in (given.get("class") or ""), "the theme would fetch mermaid from a CDN"

    def handle_data(self, text: str) -> None:
        self.words.append(text)


def read(page: Path) -> Loaded:
    parsed = Loaded()
    parsed.feed(page.read_text(encoding="utf-8"))
    return parsed


def built(folder: Path, docs: Path = ROOT / "docs") -> Path:
    """The site in a folder."""
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), docs_dir=str(docs), strict=True)
    config.plugins.run_event("startup", command="build", dirty=False)
    build(config)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    return built(tmp_path_factory.mktemp("site"))


def test_the_references_hold_every_option_verb_and_public_name(site):
    recipes = (site / "reference" / "recipes.html").read_text()
    assert all(f'id="objective{term}"' in recipes for term in names("term"))
    assert all(f'id="{divergence}"' in recipes for divergence in names("divergence"))
    words = "".join(read(site / "reference" / "recipes.html").words)
    assert (
        "Tokens tried at each response position" in words
        and "Peak learning rate." in words
        and "max_steps: 1200" in words
    )
    verbs = (site / "reference" / "cli.html").read_text()
    assert all(f'id="align-ti-{verb}"' in verbs for verb in [*VERBS, *(f"recipes-{verb}" for verb in RECIPE_VERBS)])
    python = (site / "reference" / "api.html").read_text()
    assert [name for name in align_ti.__all__ if f'id="align_ti.{name}"' not in python] == ["__version__"]


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for target in read(page).targets:
            assert "//" not in target, f"{page.name} loads {target}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


SEARCH = """
window.addEventListener("load", () => {
  const field = document.querySelector("input[name=query]");
  field.focus();
  field.value = "distil teacher";
  for (const event of ["input", "keyup"]) field.dispatchEvent(new Event(event, { bubbles: true }));
});
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (an apt package)")
def test_the_search_works_without_a_server(site):
    page = site / "searched.html"
    page.write_text((site / "index.html").read_text().replace("</body>", f"<script>{SEARCH}</script></body>"))
    try:
        content, said = opened(page, "--virtual-time-budget=8000")
    finally:
        page.unlink()
    found = re.search(r'search-result__meta">(\d+) matching documents', content)
    assert found and int(found[1]) >= 5 and 'href="start.html' in content.split("search-result__list")[1]
    assert not [line for line in said.splitlines() if "CONSOLE" in line]


def test_files_outside_docs_come_along(site):
    families = (site / "families.html").read_text()
    assert 'href="repository/tests/test_families.py.html"' in families
    assert "def test_" in "".join(read(site / "repository" / "tests" / "test_families.py.html").words)
    assert 'src="repository/results/scaling.png"' in (site / "performance.html").read_text()
    assert (site / "repository" / "results" / "scaling.png").read_bytes() == (
        ROOT / "results" / "scaling.png"
    ).read_bytes()


def one_page(folder: Path, text: str) -> str:
    """A site of one page in a repository of its own, as HTML."""
    docs = folder / "repository" / "docs"
    docs.mkdir(parents=True)
    (docs / "index.md").write_text(text)
    nav = ["index.md", *(f"reference/{name}.md" for name in ("recipes", "cli", "api"))]
    changes = {"docs_dir": str(docs), "site_dir": str(folder / "site"), "nav": nav, "plugins": []}
    build(load_config(str(ROOT / "mkdocs.yml"), hooks=[str(ROOT / "website" / "hook.py")], **changes))
    return (folder / "site" / "index.html").read_text()


@pytest.mark.parametrize("link", ["gone.md", "index.md#gone", "../results/gone.json", "/data.md"])
def test_a_broken_link_stops_the_build(tmp_path, link):
    with pytest.raises(Abort, match="strict"):
        one_page(tmp_path, f"# A page\n\nSee [this]({link}).\n")


def test_formulas_are_mathml_and_a_broken_one_stops_the_build(tmp_path, caplog):
    page = one_page(tmp_path / "one", "# A page\n\nWith $a < b$ and\n\n$$\n\\sum_i w_i\n$$\n\nfor $5 or `$HOME`.\n")
    inline, block = (ElementTree.fromstring(formula) for formula in re.findall(r"<math.*?</math>", page, re.DOTALL))
    assert "".join(inline.itertext()) == "a<b" and inline.get("display") == "inline"
    assert "".join(block.itertext()) == "∑iwi" and block.get("display") == "block"
    assert "for $5 or <code>$HOME</code>" in page
    with pytest.raises(Abort):
        one_page(tmp_path / "two", "# A page\n\n$\\left( a$\n")
    assert "index.md: '\\\\left( a' is no formula" in caplog.text
