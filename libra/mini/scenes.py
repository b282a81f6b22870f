"""Synthetic scenes of real handwriting: 2 to 6 coloured digits on a 3 × 3 board, 96 × 96 pixels.

The glyphs are scikit-learn's handwritten digits, split so that no validation or test glyph is seen in
training.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

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
BIG_SIZES = range(23, 31)  # pixels a side
SMALL_SIZES = range(15, 20)
ALL_SMALL, HALF_SMALL = 0.35, 0.15  # shares of the scenes whose digits are all small, or each small by a coin
FEWEST_DIGITS, MOST_DIGITS = 2, 6
NOTHING = -1  # the owner of a background patch
SPLIT_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: its value, colour name and cell (row and column from the top left)."""

    value: int
    color: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """An image with what it shows, in reading order, and which digit lies on which patch."""

    image: np.ndarray  # (96, 96, 3) uint8
    digits: tuple[Digit, ...]
    owners: np.ndarray  # (grid²,) int64, the index in ``digits`` of the digit on each patch, or NOTHING


@cache
def glyphs() -> tuple[dict[int, np.ndarray], dict[str, list[np.ndarray]]]:
    """Every glyph as an opacity map at every size, and the glyph numbers of each digit in each split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    cuts = (np.cumsum(list(SPLIT_SHARES.values()))[:-1] * len(order)).astype(int)
    by_digit = {
        split: [part[data.target[part] == value] for value in range(10)]
        for split, part in zip(SPLIT_SHARES, np.split(order, cuts))
    }
    scaled = {
        size: np.stack(
            [
                np.clip(
                    np.asarray(
                        Image.fromarray(glyph.astype(np.float32)).resize(
                            (size, size), Image.Resampling.BICUBIC
                        )
                    )
                    / 16
                    * 1.15,
                    0,
                    1,
                )
                for glyph in data.images
            ]
        )
        for size in (*SMALL_SIZES, *BIG_SIZES)
    }
    return scaled, by_digit


def _clouds(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    coarse = rng.standard_normal((6, 6, 3), np.float32) * rng.uniform(8, 25)
    cloud = [
        np.asarray(Image.fromarray(coarse[..., c]).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    return canvas + np.stack(cloud, -1) + rng.standard_normal(canvas.shape, np.float32) * 8


def _clutter(rng: np.random.Generator, canvas: np.ndarray, strokes: bool) -> np.ndarray:
    """Strokes or blocks in dull colours, which the digits will lie upon."""
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(8, 26)):
        x, y = rng.integers(0, IMAGE_SIZE, 2).tolist()
        ink = tuple(rng.integers(10, 125, 3).tolist())
        if strokes:
            across, down = rng.integers(-30, 31, 2).tolist()
            pen.line([x, y, x + across, y + down], fill=ink, width=int(rng.integers(1, 5)))
        else:
            across, down = rng.integers(3, 22, 2).tolist()
            pen.rectangle([x, y, x + across, y + down], fill=ink)
    return np.asarray(image).astype(np.float32) + rng.standard_normal(canvas.shape, np.float32) * rng.uniform(
        0, 12
    )


def background(rng: np.random.Generator, difficulty: float) -> np.ndarray:
    """A dark canvas: plain, noisy, cloudy or cluttered; cluttered are 40% of the scenes at difficulty 1, none
    at 0."""
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), rng.integers(0, 70), np.float32) + rng.integers(-12, 13, 3)
    cluttered = 0.2 * difficulty
    shares = {
        "plain": 0.15,
        "noisy": 0.2,
        "cloudy": 0.65 - 2 * cluttered,
        "strokes": cluttered,
        "blocks": cluttered,
    }
    kind = rng.choice(list(shares), p=list(shares.values()))
    if kind == "noisy":
        return canvas + rng.standard_normal(canvas.shape, np.float32) * rng.uniform(8, 28)
    if kind == "cloudy":
        return _clouds(rng, canvas)
    if kind in ("strokes", "blocks"):
        return _clutter(rng, canvas, kind == "strokes")
    return canvas


def _share_of_small(rng: np.random.Generator, difficulty: float) -> float:
    """How likely each digit of a scene is to be small."""
    chance = rng.random()
    if chance < ALL_SMALL * difficulty:
        return 1.0
    return 0.5 if chance < (ALL_SMALL + HALF_SMALL) * difficulty else 0.0


def draw_scene(
    rng: np.random.Generator,
    split: Split,
    grid: int = 16,
    small: bool | None = None,
    difficulty: float = 1.0,
    most: int = MOST_DIGITS,
) -> Scene:
    """Draw one scene.

    Args:
        grid: patches a side, for ``Scene.owners``; 96 must be a multiple of it.
        small: all digits at half size, or none; None draws which, and mixes them in some scenes.
        difficulty: 0 has big digits and no clutter, 1 the full shares of small digits and of clutter.
        most: digits at most.
    """
    scaled, by_digit = glyphs()
    share = _share_of_small(rng, difficulty) if small is None else float(small)
    count = int(rng.integers(FEWEST_DIGITS, most + 1))
    cells = np.sort(rng.permutation(BOARD * BOARD)[:count])
    canvas = background(rng, difficulty)
    digits: list[Digit] = []
    opacity = np.zeros((count, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for i, cell in enumerate(cells):
        while True:  # no two digits of a scene share both value and colour
            value, color = int(rng.integers(10)), COLOR_NAMES[rng.integers(len(COLORS))]
            if all((value, color) != (other.value, other.color) for other in digits):
                break
        row, column = divmod(int(cell), BOARD)
        sizes = SMALL_SIZES if rng.random() < share else BIG_SIZES
        size = sizes[rng.integers(len(sizes))]
        y, x = row * CELL + rng.integers(CELL - size + 1), column * CELL + rng.integers(CELL - size + 1)
        area = slice(y, y + size), slice(x, x + size)
        glyph = scaled[size][rng.choice(by_digit[split][value])]
        paint = np.clip(np.array(COLORS[color], np.float32) + rng.integers(-20, 21, 3), 0, 255)
        canvas[area] = canvas[area] * (1 - glyph[..., None]) + paint * glyph[..., None]
        opacity[i][area] = glyph
        digits.append(Digit(value, color, row, column))
    patch = IMAGE_SIZE // grid
    cover = opacity.reshape(count, grid, patch, grid, patch).mean((2, 4)).reshape(count, -1)
    return Scene(
        image=np.clip(canvas, 0, 255).astype(np.uint8),
        digits=tuple(digits),
        owners=np.where(cover.max(0) > 0.12, cover.argmax(0), NOTHING),
    )
