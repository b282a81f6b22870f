"""The question types of the embedded benchmark. Seven are asked about scenes, the eighth is the easy-VQA data
set.

Each maker takes a scene's digits and returns (question, answer), or None where the scene does not allow the
type.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from .scenes import BOARD, COLOR_NAMES, Digit, Split

Question = tuple[str, str]
PLACES = [
    [f"{row} {column}" for column in ("left", "center", "right")] for row in ("top", "middle", "bottom")
]
LETTERS = "ABCD"


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _place(digit: Digit) -> str:
    return PLACES[digit.row][digit.column]


def position(rng, digits) -> Question:
    digit = _pick(rng, digits)
    return f"what digit is at the {_place(digit)} ?", str(digit.value)


def color(rng, digits) -> Question:
    digit = _pick(rng, digits)
    return f"what color is the digit at the {_place(digit)} ?", digit.color


def reading(rng, digits) -> Question:
    return "read all the digits in order .", " ".join(str(digit.value) for digit in digits)


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
    name = _pick(rng, digits).color if rng.random() < 0.75 else _pick(rng, COLOR_NAMES)
    return f"how many {name} digits are there ?", str(sum(d.color == name for d in digits))


DIRECTIONS = {"right of": (0, 1), "left of": (0, -1), "below": (1, 0), "above": (-1, 0)}


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
    name, digit, found = _pick(rng, pairs)
    return f"what digit is next {name} the {_place(digit)} one ?", str(found.value)


def yes_no(rng, digits) -> Question:
    """A digit at a place, a colour at a place, or a colour anywhere; yes and no are equally likely."""
    truth, kind = bool(rng.integers(2)), rng.integers(3)
    digit = _pick(rng, digits)
    if kind == 0:
        value = digit.value if truth else _pick(rng, [v for v in range(10) if v != digit.value])
        question = f"is the digit at the {_place(digit)} a {value} ?"
    elif kind == 1:
        name = digit.color if truth else _pick(rng, [c for c in COLOR_NAMES if c != digit.color])
        question = f"is the digit at the {_place(digit)} {name} ?"
    else:
        present = sorted({d.color for d in digits})
        absent = [c for c in COLOR_NAMES if c not in present]
        truth = truth or not absent
        question = f"is there a {_pick(rng, present if truth else absent)} digit ?"
    return question, "yes" if truth else "no"


def multiple_choice(rng, digits) -> Question:
    """Four options for the digit at a place; other digits of the scene come first as distractors."""
    digit = _pick(rng, digits)
    others = rng.permutation(sorted({d.value for d in digits} - {digit.value}))
    rest = rng.permutation(sorted(set(range(10)) - {digit.value} - set(others.tolist())))
    options = rng.permutation([digit.value, *[*others[:2], *rest, *others[2:]][:3]]).astype(int).tolist()
    listing = " ".join(f"{letter} {value}" for letter, value in zip(LETTERS, options))
    return f"digit at the {_place(digit)} ? {listing}", LETTERS[options.index(digit.value)]


# Type → (maker, share of the training questions). Fixed before any compressed result was looked at.
SCENE_TYPES: dict[str, tuple[Callable[..., Question | None], float]] = {
    "reading": (reading, 0.10),
    "position": (position, 0.12),
    "relation": (relation, 0.18),
    "counting": (counting, 0.16),
    "color": (color, 0.12),
    "yes_no": (yes_no, 0.17),
    "multiple_choice": (multiple_choice, 0.15),
}
EASY_VQA = "easy_vqa"
TYPES = (*SCENE_TYPES, EASY_VQA)


@cache
def easy_vqa(split: Split) -> tuple[dict[int, str], dict[int, list[Question]]]:
    """easy-VQA's own split: image number → file path, and image number → its questions, spelled as ours
    are."""
    import easy_vqa as package

    train = split == "train"
    paths = package.get_train_image_paths() if train else package.get_test_image_paths()
    questions, answers, images = package.get_train_questions() if train else package.get_test_questions()
    by_image: dict[int, list[Question]] = {number: [] for number in paths}
    for question, answer, number in zip(questions, answers, images):
        by_image[number].append((question.replace("?", " ?"), answer))
    return paths, by_image


def easy_vqa_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
