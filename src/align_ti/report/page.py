"""The self-contained page of one or several runs and studies; a pure function of their folders."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from align_ti.report import study
from align_ti.report.cost import cost_of
from align_ti.report.curves import curves_of
from align_ti.report.examples import examples_of
from align_ti.report.folders import STUDY, Model, folders_of, is_study, read_runs
from align_ti.report.headline import Headline, headline_of_runs, headline_of_study
from align_ti.report.looks import looks_of
from align_ti.report.origin import origins_of
from align_ti.report.pictures import Pictures
from align_ti.report.scores import scores_of
from align_ti.report.templates import rendered
from align_ti.report.transitions import transitions_of
from align_ti.runs import RunFolder, read_json, write_text


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the page."""

    id: str
    title: str
    body: Markup


def write_report(*roots: Path, out: Path | None = None) -> Path:
    """Writes the page of run folders and study folders, and returns its path.

    Args:
        roots: the folders of finished runs, demos, and studies.
        out: the page; by default `report.html` in the first folder.

    Raises:
        RunError: a folder holds neither a finished run nor a study.
        DataError: a file of scores is damaged.
    """
    path = RunFolder(Path(roots[0])).report if out is None else out
    write_text(path, page_of([Path(root) for root in roots]))
    return path


def page_of(roots: Sequence[Path]) -> str:
    """The page of run folders and study folders."""
    studies = {root: read_json(root / STUDY) for root in roots if is_study(root)}
    runs = [root for root in roots if root not in studies]
    models = read_runs(runs) if runs else []
    pictures, script = Pictures(), inline_script()
    parts = parts_of_runs(models, pictures) if models else []
    for number, (root, content) in enumerate(studies.items()):
        # Alone on the page, its answer stands at the top already.
        answer = study.answer(content) if models or number else []
        body = rendered("study.part.html.j2", answer=answer) + study.study_body(content)
        parts.append(Part(f"study-{number}", f"Study: {root.resolve().name}", body))
    return rendered(
        "page.html.j2",
        title=title_of(models, studies),
        policy=policy(script),
        headline=headline_of(models, studies),
        parts=parts,
        pictures=pictures.markup,
        script=Markup(script),
    )


def parts_of_runs(models: Sequence[Model], pictures: Pictures) -> list[Part]:
    """The parts about run folders that there is something to show in."""
    parts = []
    scores = scores_of(models)
    if scores["tables"]:
        parts.append(Part("scores", "Scores", rendered("scores.html.j2", scores=scores)))
    folders = folders_of(models)
    looks = [one for folder in folders if (one := looks_of(models, folder, pictures)) is not None]
    if looks:
        parts.append(Part("looks", "Attention over images", rendered("looks.html.j2", looks=looks)))
    transitions = [one for folder in folders if (one := transitions_of(models, folder, pictures)) is not None]
    if transitions:
        body = rendered("transitions.html.j2", transitions=transitions)
        parts.append(Part("transitions", "Next-token distributions", body))
    examples = examples_of(models, pictures)
    if examples:
        parts.append(Part("examples", "Examples", rendered("examples.html.j2", examples=examples)))
    curves = curves_of(models)
    if curves:
        parts.append(Part("training", "Training", rendered("curves.html.j2", curves=curves)))
    parts.append(Part("cost", "Cost", rendered("cost.html.j2", cost=cost_of(models))))
    parts.append(Part("origin", "Provenance", rendered("origin.html.j2", origins=origins_of(models))))
    return parts


def headline_of(models: Sequence[Model], studies: dict[Path, study.Content]) -> Headline:
    """The top of the page: of the runs if there are some, else of the first study, which is named where there are several."""
    if models:
        return headline_of_runs(models)
    root, content = next(iter(studies.items()))
    found = headline_of_study(content)
    if len(studies) == 1:
        return found
    return replace(found, sentences=[f"Study {root.resolve().name}: {found.sentences[0]}", *found.sentences[1:]])


def title_of(models: Sequence[Model], studies: dict[Path, study.Content]) -> str:
    """The page's title: the one folder's own, or how many there are."""
    folders = folders_of(models)
    if len(folders) == 1 and not studies:
        return str(folders[0].summary["title"])
    if len(studies) == 1 and not folders:
        return str(study.view(next(iter(studies.values())))["title"])
    told = [
        f"{len(of)} {word if len(of) == 1 else plural_of}"
        for of, word, plural_of in ((folders, "run folder", "run folders"), (studies, "study", "studies"))
        if len(of)
    ]
    return " and ".join(told)


def inline_script() -> str:
    """The page's own script: it filters examples, and the page reads without it."""
    return files("align_ti.report").joinpath("page.js").read_text(encoding="utf-8")


def policy(script: str) -> str:
    """What a browser may do with the page: nothing from outside, and no script but its own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{nothing}; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
