"""Scenes: several real handwritten digits in one image, coloured, on a loose grid, with noise and stray strokes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from align_ti.digits.scans import Scans

SIZE = 48
"""Width and height of a scene in pixels."""

GRID = 3
"""Rows and columns of the loose grid."""

CELL = SIZE // GRID
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 60, 50),
    "green": (60, 200, 70),
    "blue": (80, 110, 250),
    "yellow": (235, 215, 60),
    "pink": (240, 110, 220),
    "white": (235, 235, 235),
}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, slots=True)
class Figure:
    """One digit of a scene: where it stands, what it is, how it is drawn."""

    row: int
    column: int
    digit: int
    colour: str
    scan: int
    """Position of the scan within its split."""

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def name(self) -> str:
        return f"{self.colour} {WORDS[self.digit]}"


@dataclass(frozen=True, slots=True)
class Scene:
    """The digits of one image in reading order, and the image."""

    figures: tuple[Figure, ...]
    picture: Image.Image


def draw_scene(scans: Scans, random: np.random.Generator, *, least: int = 3, most: int = 5) -> Scene:
    """A scene of `least` to `most` digits in distinct cells, each from a scan of the given split."""
    count = int(random.integers(least, most + 1))
    cells = np.sort(random.choice(GRID * GRID, size=count, replace=False))
    figures = []
    for cell in cells:
        scan = int(random.integers(len(scans.digit)))
        colour = list(COLOURS)[int(random.integers(len(COLOURS)))]
        figures.append(Figure(int(cell) // GRID, int(cell) % GRID, int(scans.digit[scan]), colour, scan))
    return Scene(tuple(figures), render(figures, scans, random))


def render(figures: list[Figure], scans: Scans, random: np.random.Generator) -> Image.Image:
    """The image: a dark uneven ground, stray strokes, then each digit with its own size, offset, tilt and strength."""
    ground = 30 + 20 * random.random() + random.normal(0.0, 9.0, (SIZE, SIZE, 3))
    canvas = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(random.integers(1, 4))):
        tone = int(random.integers(60, 110))
        start, turn, length = random.random(2) * SIZE, random.random() * 2 * np.pi, 4 + 6 * random.random()
        end = start + length * np.array([np.cos(turn), np.sin(turn)])
        pen.line([tuple(start), tuple(end)], fill=(tone, tone, tone), width=1)
    pixels = np.asarray(canvas, dtype=np.float64).copy()
    for figure in figures:
        top, left, ink = placed(figure, scans.ink[figure.scan], random)
        size = ink.shape[0]
        window = pixels[top : top + size, left : left + size]
        colour = np.array(COLOURS[figure.colour]) + random.normal(0.0, 10.0, 3)
        window += ink[..., None] * (colour - window)
    pixels += random.normal(0.0, 6.0, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def placed(
    figure: Figure, ink: Float[np.ndarray, "8 8"], random: np.random.Generator
) -> tuple[int, int, Float[np.ndarray, "size size"]]:
    """Top and left edge in pixels, and the ink at its size in the image."""
    size = int(random.integers(12, 17))
    jitter = random.integers(-2, 3, size=2)
    corner = np.array([figure.row, figure.column]) * CELL + (CELL - size) // 2 + jitter
    top, left = (int(edge) for edge in corner.clip(0, SIZE - size))
    strength = 0.8 + 0.2 * random.random()
    tilt = float(random.uniform(-12, 12))
    grown = Image.fromarray((ink * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    tilted = grown.rotate(tilt, Image.Resampling.BICUBIC)
    return top, left, np.asarray(tilted, dtype=np.float64) / 255 * strength
