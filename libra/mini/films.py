"""Films of moving digits for methods that look at videos: three frames of two to four coloured digits that
step from cell to cell over a background that stays.

The glyphs and colours are those of :mod:`libra.mini.scenes`. Questions go by what a digit is, not by where:
the embedded model was never trained on several pictures, and of several it knows what is there, hardly
where or in which order.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import questions
from .questions import Question, absent_digit, pick
from .scenes import (
    BIG_SIZES,
    BOARD,
    CELL,
    COLOR_NAMES,
    COLORS,
    IMAGE_SIZE,
    Digit,
    Split,
    background,
    glyphs,
)

FRAMES = 3  # of 256 visual tokens; four of them would leave no room for text in the model's 1024 positions
FEWEST, MOST = 2, 4  # digits


@dataclass(frozen=True)
class Film:
    """Frames, what each of them shows, and the digits of all of them."""

    images: tuple[Image.Image, ...]
    shown: tuple[tuple[Digit, ...], ...]
    digits: tuple[Digit, ...]


def draw_film(rng: np.random.Generator, split: Split, passing: bool = False) -> Film:
    """Draw one film.

    passing: one digit, the last of ``digits``, is in a single frame only; otherwise all are in every frame.
    """
    scaled, by_digit = glyphs()
    canvas = background(rng, 1.0)
    count = int(rng.integers(FEWEST, MOST + 1))
    cells = rng.permutation(BOARD * BOARD)[:count]
    stamps = []
    digits: list[Digit] = []
    for cell in cells:
        while True:  # no two digits of a film share both value and colour
            value, color = int(rng.integers(10)), pick(rng, COLOR_NAMES)
            if all((value, color) != (other.value, other.color) for other in digits):
                break
        size = pick(rng, BIG_SIZES)
        paint = np.clip(np.array(COLORS[color], np.float32) + rng.integers(-20, 21, 3), 0, 255)
        stamps.append((scaled[size][rng.choice(by_digit[split][value])], paint))
        digits.append(Digit(value, color, *divmod(int(cell), BOARD)))
    only = int(rng.integers(FRAMES)) if passing else None
    images, shown, now = [], [], list(digits)
    for frame in range(FRAMES):
        if frame:
            now = _moved(rng, now)
        there = [i for i in range(count) if i < count - 1 or only in (None, frame)]
        image = canvas.copy()
        for i in there:
            _paint(rng, image, now[i], *stamps[i])
        images.append(Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)))
        shown.append(tuple(now[i] for i in there))
    return Film(tuple(images), tuple(shown), tuple(digits))


def _moved(rng: np.random.Generator, digits: list[Digit]) -> list[Digit]:
    """Each digit a step to a free neighbouring cell, in turns; one that has none stays."""
    moved = list(digits)
    for i in rng.permutation(len(moved)):
        taken = {(digit.row, digit.column) for digit in moved}
        row, column = moved[i].row, moved[i].column
        steps = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        free = [(y, x) for y, x in steps if 0 <= y < BOARD and 0 <= x < BOARD and (y, x) not in taken]
        if free:
            moved[i] = Digit(moved[i].value, moved[i].color, *pick(rng, free))
    return moved


def _paint(rng: np.random.Generator, image: np.ndarray, digit: Digit, glyph, paint) -> None:
    """Put a glyph somewhere in its cell."""
    size = len(glyph)
    y = digit.row * CELL + rng.integers(CELL - size + 1)
    x = digit.column * CELL + rng.integers(CELL - size + 1)
    area = slice(y, min(y + size, IMAGE_SIZE)), slice(x, min(x + size, IMAGE_SIZE))
    image[area] = image[area] * (1 - glyph[..., None]) + paint * glyph[..., None]


def attribute(rng: np.random.Generator, film: Film) -> Question | None:
    """The colour of a value, or the value of a colour, that one digit of the film has."""
    return questions.attribute(rng, film.digits)


def passing(rng: np.random.Generator, film: Film) -> Question | None:
    """The same of the digit that is in one frame only."""
    return questions.attribute(rng, film.digits, film.digits[-1:])


def exists(rng: np.random.Generator, film: Film) -> Question:
    """Whether a coloured digit is in the film; yes and no are equally likely, and a no is a near miss."""
    truth, digit = bool(rng.integers(2)), pick(rng, film.digits)
    value, name = (digit.value, digit.color) if truth else absent_digit(rng, film.digits)
    return f"is there a {name} {value} ?", "yes" if truth else "no"


# Type → the question, and whether one digit is in a single frame only.
FILM_TYPES = {
    "film_attribute": (attribute, False),
    "film_passing": (passing, True),
    "film_exists": (exists, False),
}


def film_question(kind: str, rng: np.random.Generator, split: Split) -> tuple[Film, str, str]:
    """A film of a type with its question and answer."""
    make, once = FILM_TYPES[kind]
    while True:  # a film may not allow the type: all values and colours may be there twice
        film = draw_film(rng, split, once)
        pair = make(rng, film)
        if pair is not None:
            return film, *pair
