"""What mkdocs is told beside mkdocs.yml: generated pages, files outside docs/ that pages link to, and formulas.

Events of mkdocs, called by their names (https://www.mkdocs.org/dev-guide/plugins/#events).
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from references import REFERENCES

OUTSIDE = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]+)")
"""The target of a link that begins by leaving its folder."""

REPOSITORY = "repository"
"""Where the site keeps what pages link to outside docs/."""

SOURCE = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh"}
"""Files that are shown as a page, since a browser would offer to save them, and their language."""

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""A formula as pymdownx.arithmatex hands it out."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the references, and each file outside docs/ that a page links to."""
    for uri, text in REFERENCES.items():
        files.append(File.generated(config, uri, content=text()))
    for page in files.documentation_pages():
        for target in OUTSIDE.findall(page.content_string):
            found = in_repository(page.src_uri, target, config)
            if found is None or files.get_file_from_path(site_uri(found)) is not None:
                continue
            path = root(config) / found
            if path.suffix in SOURCE:
                code = path.read_text(encoding="utf-8")
                text = f"---\nsearch: {{exclude: true}}\n---\n# {found}\n\n````{SOURCE[path.suffix]}\n{code}\n````\n"
                file = File.generated(config, site_uri(found), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
            elif path.is_dir():
                names = "".join(f"- {item.name}\n" for item in sorted(path.iterdir()))
                text = f"# {found}\n\nA folder of the repository:\n\n{names}"
                file = File.generated(config, site_uri(found), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
            else:
                file = File.generated(config, site_uri(found), abs_src_path=str(path))
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links out of docs/ to the site's copies; one that leads nowhere stays, and mkdocs reports it."""

    def inside(link: re.Match[str]) -> str:
        found = in_repository(page.file.src_uri, link[1], config)
        return link[1] if found is None else posixpath.relpath(site_uri(found), posixpath.dirname(page.file.src_uri))

    return OUTSIDE.sub(inside, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes formulas as MathML, which browsers draw without a script."""

    def mathml(formula: re.Match[str]) -> str:
        try:
            return convert(unescape(formula[2]), display="block" if formula[1] == "div" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: {formula[2]!r} is no formula ({error!r})") from error

    return FORMULA.sub(mathml, html)


def root(config: MkDocsConfig) -> Path:
    """The repository's folder."""
    return Path(config.docs_dir).parent


def in_repository(page: str, target: str, config: MkDocsConfig) -> str | None:
    """The path from the repository's root that a page's link leads to, if it is a file or folder outside docs/."""
    docs = Path(config.docs_dir)
    path = (docs / page).parent.joinpath(target).resolve()
    if path.is_relative_to(docs) or not path.is_relative_to(docs.parent) or not path.exists():
        return None
    return path.relative_to(docs.parent).as_posix()


def site_uri(found: str) -> str:
    """Where the site has a file of the repository."""
    path = Path(found)
    page = ".md" if path.suffix in SOURCE or not path.suffix else ""
    return f"{REPOSITORY}/{found}{page}"
