"""Synthetic scenes of real handwriting: 2 to 6 coloured digits on a 3 × 3 board, 96 × 96 pixels.

The glyphs are scikit-learn's handwritten digits, split 70/30 so that no test glyph is seen in training.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

IMAGE_SIZE = 96
BOARD = 3
CELL = IMAGE_SIZE // BOARD
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 205, 40),
    "purple": (165, 60, 200),
    "cyan": (50, 200, 210),
}
COLOR_NAMES = tuple(COLORS)
GLYPH_SIZES = range(23, 31)
NO_DIGIT, NO_COLOR = 10, len(COLORS)  # patch labels of the background
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: its value, colour name and cell (row and column from the top left)."""

    value: int
    color: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """An image with what it shows, in reading order, and per-patch labels for the vision tower's dense
    pre-training."""

    image: np.ndarray  # (96, 96, 3) uint8
    digits: tuple[Digit, ...]
    digit_labels: np.ndarray  # (grid²,) int64, the digit on each patch or NO_DIGIT
    color_labels: np.ndarray  # (grid²,) int64, its colour or NO_COLOR


@cache
def _glyphs() -> tuple[dict[int, np.ndarray], dict[str, list[np.ndarray]]]:
    """Every glyph as an opacity map at every size, and the glyph numbers of each digit in each split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    cut = int(0.7 * len(order))
    by_digit = {
        split: [part[data.target[part] == value] for value in range(10)]
        for split, part in (("train", order[:cut]), ("test", order[cut:]))
    }
    scaled = {
        size: np.stack(
            [
                np.clip(
                    np.asarray(Image.fromarray(glyph.astype(np.float32)).resize((size, size), Image.BICUBIC))
                    / 16
                    * 1.15,
                    0,
                    1,
                )
                for glyph in data.images
            ]
        )
        for size in GLYPH_SIZES
    }
    return scaled, by_digit


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dark canvas: plain, noisy or cloudy."""
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), rng.integers(0, 70), np.float32) + rng.integers(-12, 13, 3)
    kind = rng.integers(3)
    if kind == 1:
        canvas += rng.standard_normal(canvas.shape, np.float32) * rng.uniform(8, 28)
    elif kind == 2:
        coarse = rng.standard_normal((6, 6, 3), np.float32) * rng.uniform(8, 25)
        cloud = [
            np.asarray(Image.fromarray(coarse[..., c]).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC))
            for c in range(3)
        ]
        canvas += np.stack(cloud, -1) + rng.standard_normal(canvas.shape, np.float32) * 8
    return canvas


def draw_scene(rng: np.random.Generator, split: Split, grid: int = 16) -> Scene:
    """Draw one scene; ``grid`` is the number of patches a side for the labels (96 must be a multiple of
    it)."""
    scaled, by_digit = _glyphs()
    count = int(rng.integers(2, 7))
    cells = np.sort(rng.permutation(BOARD * BOARD)[:count])
    canvas = _background(rng)
    digits, opacity = [], np.zeros((count, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for i, cell in enumerate(cells):
        while True:  # no two digits of a scene share both value and colour
            value, color = int(rng.integers(10)), COLOR_NAMES[rng.integers(len(COLORS))]
            if all((value, color) != (other.value, other.color) for other in digits):
                break
        row, column = divmod(int(cell), BOARD)
        size = GLYPH_SIZES[rng.integers(len(GLYPH_SIZES))]
        y, x = row * CELL + rng.integers(CELL - size + 1), column * CELL + rng.integers(CELL - size + 1)
        opacity[i, y : y + size, x : x + size] = scaled[size][rng.choice(by_digit[split][value])]
        paint = np.clip(np.array(COLORS[color], np.float32) + rng.integers(-20, 21, 3), 0, 255)
        canvas = canvas * (1 - opacity[i, ..., None]) + paint * opacity[i, ..., None]
        digits.append(Digit(value, color, row, column))
    patch = IMAGE_SIZE // grid
    cover = opacity.reshape(count, grid, patch, grid, patch).mean((2, 4)).reshape(count, -1)
    owner, visible = cover.argmax(0), cover.max(0) > 0.12
    values = np.array([digit.value for digit in digits])
    colors = np.array([COLOR_NAMES.index(digit.color) for digit in digits])
    return Scene(
        image=np.clip(canvas, 0, 255).astype(np.uint8),
        digits=tuple(digits),
        digit_labels=np.where(visible, values[owner], NO_DIGIT),
        color_labels=np.where(visible, colors[owner], NO_COLOR),
    )
