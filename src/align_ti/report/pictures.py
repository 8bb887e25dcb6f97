"""Images from data as data URLs: decoded and encoded anew, so that nothing but pixels gets into a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from PIL import Image

SIDE = 192
"""Pixels of an image's longer side on a page."""


def shrunk(opened: Image.Image) -> Image.Image:
    """The image's pixels, at most `SIDE` on a side."""
    small = opened.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return small


def data_url(opened: Image.Image) -> str:
    """The image, small, as a data URL of its pixels alone: a photograph as JPEG, what PNG holds in as little room as PNG."""
    small = shrunk(opened)
    forms = {kind: encoded(small, kind) for kind in ("png", "jpeg")}
    kind = "jpeg" if 2 * len(forms["jpeg"]) < len(forms["png"]) else "png"
    return f"data:image/{kind};base64,{base64.b64encode(forms[kind]).decode()}"


def encoded(of: Image.Image, kind: str) -> bytes:
    """The image's file."""
    buffer = io.BytesIO()
    of.save(buffer, format=kind, **({"quality": 85} if kind == "jpeg" else {}))
    return buffer.getvalue()


class Shown(NamedTuple):
    """An image of the page: what `<use>` refers to, and its size."""

    id: str
    width: int
    height: int


class Pictures:
    """The images of a page, each in it once however often it is shown."""

    def __init__(self) -> None:
        self._found: dict[str, Shown | None] = {}
        self._markup: list[Markup] = []

    def add(self, path: str | Path | None) -> Shown | None:
        """The image; None if the record has none, or the file is gone or no image."""
        if path is None:
            return None
        name = str(path)
        if name not in self._found:
            self._found[name] = self._read(path)
        return self._found[name]

    def _read(self, path: str | Path) -> Shown | None:
        try:
            with Image.open(path) as opened:
                small = shrunk(opened)
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
        shown = Shown(f"p{len(self._markup)}", *small.size)
        self._markup.append(Markup('<image id="{}" width="{}" height="{}" href="{}"/>').format(*shown, data_url(small)))
        return shown

    @property
    def markup(self) -> Markup:
        """What `<use>` refers to; it takes no room itself."""
        hidden = Markup('<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>{}</defs></svg>')
        return hidden.format(Markup("").join(self._markup)) if self._markup else Markup("")
