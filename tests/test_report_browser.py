"""The report in headless Chromium: no errors, no request, filter and search, both themes, a phone's width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from align_ti.report.page import write_report
from tests.test_report import compared_folder

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (an apt package)")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
)

USE = """
const told = {};
const form = document.getElementById("filter");
const cards = () => [...document.querySelectorAll("#examples > article")].filter((card) => !card.hidden);
const set = (name, value) => {
  form.elements[name].value = value;
  form.dispatchEvent(new Event("input", { bubbles: true }));
};
const after = (name, value) => {
  set(name, value);
  const found = cards().map((card) => [card.dataset.kind, card.dataset.right]);
  const count = document.getElementById("count").textContent;
  set(name, "");
  return { found, count };
};
told.first = cards().length;
document.getElementById("more").click();
told.more = cards().length;
told.kind = after("kind", "colour");
told.rules = [...form.elements.right.options].map((option) => [option.value, option.textContent]);
told.learnt = after("right", told.rules[1][0]);
told.search = after("words", "question 7");
told.none = after("words", "nobody said this");
told.hidden = form.hidden;
told.requests = performance.getEntriesByType("resource").map((one) => one.name).filter((name) => !name.startsWith("data:"));
told.background = getComputedStyle(document.body).backgroundColor;
told.width = [document.documentElement.scrollWidth, window.innerWidth];
told.seconds = performance.getEntriesByType("navigation")[0].domComplete / 1000;
told.unnamed = [...document.querySelectorAll("svg:not([aria-hidden]), input, select")].filter(
  (one) => !(one.getAttribute("aria-label") || one.querySelector("title") || one.closest("label")),
).length;
told.unfocused = [...document.querySelectorAll(".wide")].filter((one) => one.tabIndex !== 0).length;
document.documentElement.dataset.told = JSON.stringify(told);
parent.postMessage(JSON.stringify(told), "*");
"""

PHONE = """<!doctype html><meta name="color-scheme" content="light dark">
<script>addEventListener("message", (event) => { document.documentElement.dataset.told = event.data; });</script>
<iframe src="copy.html" style="width: 390px; height: 844px; border: 0"></iframe>
"""
"""Shows the copy as narrow as a phone; a window of the browser is never narrower than 500 pixels."""


def opened(page: Path, *flags: str) -> tuple[str, str]:
    """The page's content once its scripts have run, and what the browser said of it."""
    assert CHROMIUM is not None
    folder = page.parent / f"profile-{len(list(page.parent.iterdir()))}"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", *flags, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, done.stderr


def used(page: Path, *flags: str, phone: bool = False) -> dict[str, Any]:
    """What a reader's moves do on a copy of the page, whose policy lets the script of this test run."""
    text = page.read_text()
    copy = page.with_name("copy.html")
    allowed = re.sub(r"script-src &#39;sha256-[^&]*&#39;", "script-src &#39;unsafe-inline&#39;", text)
    assert allowed != text
    copy.write_text(allowed.replace("</body>", f"<script>{USE}</script></body>"))
    shown = page.with_name("phone.html") if phone else copy
    if phone:
        shown.write_text(PHONE)
    content, _ = opened(shown, *flags)
    found = re.search(r'data-told="([^"]*)"', content)
    assert found, content[:500]
    told: dict[str, Any] = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&").replace("&gt;", ">"))
    return told


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page with 40 questions."""
    root = tmp_path_factory.mktemp("browser")
    return write_report(compared_folder(root / "demo"), out=root / "page.html")


def test_the_page_opens_without_a_word_from_the_browser(page):
    content, said = opened(page)
    assert '<section id="examples">' in content
    # The script has run under the page's own policy: what it hides and shows has changed.
    assert re.search(r'<form class="controls" id="filter">', content)
    assert not [line for line in said.splitlines() if "CONSOLE" in line]


def test_filter_search_and_themes_work(page):
    told = used(page, "--window-size=1200,900")
    assert told["first"] == 24 and told["more"] == 40 and told["hidden"] is False
    assert {kind for kind, _ in told["kind"]["found"]} == {"colour"} and told["kind"]["count"] == "20 of 20 shown"
    # Models in their order: teacher m0, start m1, SFT m2, Align-TI m3.
    assert told["rules"][1] == ["+m3 -m1", "corrected by training: start wrong, Align-TI correct"]
    assert {right for _, right in told["learnt"]["found"]} == {"m0 m2 m3", "m0 m3"}
    assert told["learnt"]["count"] == "20 of 20 shown"
    assert len(told["search"]["found"]) == 4 and told["none"]["count"] == "0 of 0 shown"
    assert told["requests"] == []
    assert told["background"] == "rgb(255, 255, 255)"
    assert told["unnamed"] == 0 and told["unfocused"] == 0
    assert told["seconds"] < 2


def test_a_phone_at_night_shows_it_dark_and_without_scrolling_sideways(page):
    told = used(page, "--force-dark-mode", "--blink-settings=preferredColorScheme=0", phone=True)
    assert told["background"] == "rgb(18, 22, 28)"
    # The list of models in the filter was as wide as its longest choice.
    assert told["width"][0] <= told["width"][1] == 390
