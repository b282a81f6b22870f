"""The easy-VQA data set: coloured shapes on plain backgrounds, its questions, and what its images show."""

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from .questions import Question
from .scenes import IMAGE_SIZE, NOTHING, Split

SIZE = 64  # pixels a side
SHAPES = ("rectangle", "circle", "triangle")
COLORS = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
VALIDATION = 10  # every tenth training image is kept for validation


@cache
def easy_vqa(split: Split) -> tuple[dict[int, str], dict[int, list[Question]]]:
    """Image number → file path, and image number → its questions, spelled as ours are.

    The test split is easy-VQA's own; training and validation share its training split.
    """
    import easy_vqa as package

    if split == "test":
        paths, pairs = package.get_test_image_paths(), package.get_test_questions()
    else:
        paths, pairs = package.get_train_image_paths(), package.get_train_questions()
        paths = {n: path for n, path in paths.items() if (n % VALIDATION == 0) == (split == "validation")}
    by_image: dict[int, list[Question]] = {number: [] for number in paths}
    for question, answer, number in zip(*pairs):
        if number in by_image:
            by_image[number].append((question.replace("?", " ?"), answer))
    return paths, by_image


def easy_vqa_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


class Shape(NamedTuple):
    """What an easy-VQA image shows: its pixels at the model's size, name and colour, and where the shape
    lies."""

    image: np.ndarray  # (96, 96, 3) uint8
    name: str
    color: str
    owners: np.ndarray  # (grid²,) int64, 0 on the shape's patches and NOTHING elsewhere


@cache
def see_shape(path: str, grid: int) -> Shape:
    """Find the shape, which the background's one colour gives away; its outline's fill tells which it is."""
    image = easy_vqa_image(path)
    pixels = np.asarray(image).astype(int)
    mask = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
    rows, columns = np.where(mask)
    fill = mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))  # 1, π/4 and 1/2 but for the edges
    name = SHAPES[0] if fill > 0.9 else SHAPES[1] if fill > 0.65 else SHAPES[2]
    paint = np.median(pixels[mask], 0)
    color = min(COLORS, key=lambda key: np.abs(paint - COLORS[key]).sum())
    side = SIZE // grid
    covered = mask.reshape(grid, side, grid, side).mean((1, 3)).flatten() > 0.12
    larger = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    return Shape(larger, name, color, np.where(covered, 0, NOTHING))


def easy_vqa_words() -> set[str]:
    """All words of its training questions and answers."""
    _, by_image = easy_vqa("train")
    return {
        word
        for questions in by_image.values()
        for pair in questions
        for text in pair
        for word in text.split()
    }
