"""Captions for the contrast between image and text, with near misses that differ in one word or one place."""

import numpy as np

from libra.mini.questions import pick, place_of
from libra.mini.scenes import BOARD, COLOR_NAMES, Digit
from libra.mini.shapes import COLORS as SHAPE_COLORS
from libra.mini.shapes import SHAPES, Shape

SHORTENED = 0.4  # share of captions that name some of the digits only, so that short texts mean something
# A question's first words may stand before a shortened caption: methods will show the text tower questions,
# where these words are to mean nothing.
OPENINGS = (
    "what digit is at the",
    "what color is the",
    "where is the",
    "is there a",
    "how many",
    "describe the digits .",
    "read all the",
)
MOST_TOKENS = 29  # <s>, an opening, 5 digits of 4 words, or 6 without an opening, and </s>


def caption_of(digits) -> str:
    return " ".join(f"{digit.color} {digit.value} {place_of(digit)}" for digit in digits)


def near_miss(rng: np.random.Generator, digits: list[Digit]) -> list[Digit]:
    """The same digits with the value, colour or place of one of them changed, in reading order."""
    index, kind = int(rng.integers(len(digits))), rng.integers(3)
    old = digits[index]
    if kind == 0:
        new = Digit(_other(rng, old.value, range(10)), old.color, old.row, old.column)
    elif kind == 1:
        new = Digit(old.value, _other(rng, old.color, COLOR_NAMES), old.row, old.column)
    else:
        taken = {(digit.row, digit.column) for digit in digits}
        free = [
            (row, column) for row in range(BOARD) for column in range(BOARD) if (row, column) not in taken
        ]
        new = Digit(old.value, old.color, *pick(rng, free))
    changed = [*digits[:index], new, *digits[index + 1 :]]
    return sorted(changed, key=lambda digit: (digit.row, digit.column))


def _other(rng, value, everything):
    return pick(rng, [other for other in everything if other != value])


def scene_captions(rng: np.random.Generator, digits: tuple[Digit, ...]) -> list[str]:
    """A true caption and two near misses."""
    named, opening = list(digits), ""
    if rng.random() < SHORTENED:
        count = int(rng.integers(1, len(digits)))
        named = [digits[i] for i in sorted(rng.permutation(len(digits))[:count])]
        if rng.random() < 0.5:
            opening = f"{pick(rng, OPENINGS)} "
    return [opening + caption_of(some) for some in (named, near_miss(rng, named), near_miss(rng, named))]


def shape_captions(rng: np.random.Generator, shape: Shape) -> list[str]:
    """A true caption and two near misses: another shape, another colour."""
    return [
        f"{shape.color} {shape.name}",
        f"{shape.color} {_other(rng, shape.name, SHAPES)}",
        f"{_other(rng, shape.color, tuple(SHAPE_COLORS))} {shape.name}",
    ]
