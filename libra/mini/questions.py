"""The question types of the embedded benchmark: twelve about scenes of digits; the last is easy-VQA's data.

Each maker takes a scene's digits and returns (question, answer), or None where the scene does not allow the
type.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .scenes import BOARD, COLOR_NAMES, Digit

Question = tuple[str, str]
PLACES = [
    [f"{row} {column}" for column in ("left", "center", "right")] for row in ("top", "middle", "bottom")
]
LETTERS = "ABCD"
DIRECTIONS = {"right of": (0, 1), "left of": (0, -1), "below": (1, 0), "above": (-1, 0)}
VALUE_NAMES = tuple(str(value) for value in range(10))


def pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def place_of(digit: Digit) -> str:
    return PLACES[digit.row][digit.column]


def _single(digits, attribute: str) -> list[Digit]:
    """The digits whose value (or colour) no other digit of the scene has."""
    values = [getattr(digit, attribute) for digit in digits]
    return [digit for digit, value in zip(digits, values) if values.count(value) == 1]


def absent_digit(rng, digits) -> tuple[int, str]:
    """Value and colour of a digit that is not there, though mostly its value or its colour is: a hard
    negative."""
    present = {(digit.value, digit.color) for digit in digits}
    while True:
        digit, kind = pick(rng, digits), rng.integers(5)
        value = digit.value if kind in (0, 1) else int(rng.integers(10))
        name = digit.color if kind in (2, 3) else pick(rng, COLOR_NAMES)
        if (value, name) not in present:
            return value, name


def position(rng, digits) -> Question:
    digit = pick(rng, digits)
    return f"what digit is at the {place_of(digit)} ?", str(digit.value)


def color(rng, digits) -> Question:
    digit = pick(rng, digits)
    return f"what color is the digit at the {place_of(digit)} ?", digit.color


def reading(rng, digits) -> Question:
    return "read all the digits in order .", " ".join(str(digit.value) for digit in digits)


def caption(rng, digits) -> Question:
    return "describe the digits .", " ".join(f"{digit.color} {digit.value}" for digit in digits)


def counting(rng, digits) -> Question:
    """How many digits: in all, in one row, or of one colour."""
    kind = rng.integers(3)
    if kind == 0:
        return "how many digits are there ?", str(len(digits))
    if kind == 1:
        row = int(rng.integers(BOARD))
        return f"how many digits are in the {PLACES[row][0].split()[0]} row ?", str(
            sum(d.row == row for d in digits)
        )
    # Mostly a colour that is there, or the answer would be 0 most of the time.
    name = pick(rng, digits).color if rng.random() < 0.75 else pick(rng, COLOR_NAMES)
    return f"how many {name} digits are there ?", str(sum(d.color == name for d in digits))


def relation(rng, digits) -> Question | None:
    """The next digit from a given one along its row or column; the cell between may be empty."""
    board = {(d.row, d.column): d for d in digits}
    pairs = []
    for digit in digits:
        for name, (down, right) in DIRECTIONS.items():
            steps = [board.get((digit.row + down * k, digit.column + right * k)) for k in range(1, BOARD)]
            found = next((other for other in steps if other is not None), None)
            if found is not None:
                pairs.append((name, digit, found))
    if not pairs:
        return None
    name, digit, found = pick(rng, pairs)
    return f"what digit is next {name} the {place_of(digit)} one ?", str(found.value)


def find(rng, digits) -> Question:
    """Where something is: a coloured digit, or a digit or a colour that is there once; a fifth of them are
    nowhere."""
    if rng.random() < 0.2:
        value, name = absent_digit(rng, digits)
        return f"where is the {name} {value} ?", "nowhere"
    digit, kind = pick(rng, digits), rng.integers(3)
    if kind == 0 and digit in _single(digits, "value"):
        what = str(digit.value)
    elif kind == 1 and digit in _single(digits, "color"):
        what = f"{digit.color} one"
    else:
        what = f"{digit.color} {digit.value}"
    return f"where is the {what} ?", place_of(digit)


def attribute(rng, digits, among=None) -> Question | None:
    """By content, not by place: the colour of a digit, or the digit of a colour, that is there once; the
    digit is one of ``among``, by default any."""
    by_value, by_color = (
        [digit for digit in _single(digits, key) if among is None or digit in among]
        for key in ("value", "color")
    )
    questions = [(f"what color is the {digit.value} ?", digit.color) for digit in by_value]
    questions += [(f"what digit is {digit.color} ?", str(digit.value)) for digit in by_color]
    return pick(rng, questions) if questions else None


def extreme(rng, digits) -> Question:
    word, of = (("smallest", min), ("largest", max))[rng.integers(2)]
    return f"what is the {word} digit ?", str(of(digit.value for digit in digits))


def _wrong(rng, right, others: list, everything):
    """A false value: by a coin one that another digit of the scene has, a near miss, or any."""
    near = [value for value in others if value != right]
    return pick(
        rng, near if near and rng.random() < 0.5 else [value for value in everything if value != right]
    )


def yes_no(rng, digits) -> Question:
    """Something at a place, or anywhere; yes and no are equally likely, and a no is often a near miss."""
    truth, kind = bool(rng.integers(2)), rng.integers(5)
    digit = pick(rng, digits)
    values, colors = [d.value for d in digits], [d.color for d in digits]
    if kind == 0:
        value = digit.value if truth else _wrong(rng, digit.value, values, range(10))
        question = f"is the digit at the {place_of(digit)} a {value} ?"
    elif kind == 1:
        name = digit.color if truth else _wrong(rng, digit.color, colors, COLOR_NAMES)
        question = f"is the digit at the {place_of(digit)} {name} ?"
    elif kind == 2:
        absent = [name for name in COLOR_NAMES if name not in colors]
        truth = truth or not absent
        question = f"is there a {digit.color if truth else pick(rng, absent)} digit ?"
    elif kind == 3:
        value = digit.value if truth else pick(rng, [value for value in range(10) if value not in values])
        question = f"is there a {value} ?"
    else:
        value, name = (digit.value, digit.color) if truth else absent_digit(rng, digits)
        question = f"is there a {name} {value} ?"
    return question, "yes" if truth else "no"


def listing(options) -> str:
    return " ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options))


def multiple_choice(rng, digits, count: int = 4) -> Question:
    """``count`` options for the digit or the colour at a place; two others of the scene come first as
    distractors."""
    digit = pick(rng, digits)
    if rng.integers(2):
        what, right, seen, everything = "digit", str(digit.value), {str(d.value) for d in digits}, VALUE_NAMES
    else:
        what, right, seen, everything = "color", digit.color, {d.color for d in digits}, COLOR_NAMES
    near = rng.permutation(sorted(seen - {right})).tolist()
    far = rng.permutation(sorted({*everything} - seen)).tolist()
    wrong = [*near[:2], *far, *near[2:]][: count - 1]
    options = rng.permutation([right, *wrong]).tolist()
    return f"{what} at the {place_of(digit)} ? {listing(options)}", LETTERS[options.index(right)]


Maker = Callable[[np.random.Generator, tuple[Digit, ...]], Question | None]


class SceneType(NamedTuple):
    """A type of the benchmark: ``small`` as in :func:`~libra.mini.scenes.draw_scene`."""

    make: Maker
    small: bool | None = None


SCENE_TYPES = {
    "reading": SceneType(reading, small=False),
    "reading_small": SceneType(reading, small=True),
    "caption": SceneType(caption, small=False),
    "caption_small": SceneType(caption, small=True),
    "position": SceneType(position),
    "relation": SceneType(relation),
    "counting": SceneType(counting),
    "find": SceneType(find),
    "attribute": SceneType(attribute),
    "extreme": SceneType(extreme),
    "yes_no": SceneType(yes_no),
    "multiple_choice": SceneType(multiple_choice),
}
EASY_VQA = "easy_vqa"
TYPES = (*SCENE_TYPES, EASY_VQA)
