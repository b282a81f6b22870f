"""The next embedded benchmark is rightly labelled."""

import re

import numpy as np
import pytest

from mini.next import benchmark
from mini.next.questions import SCENE_TYPES
from mini.next.scenes import COLOR_NAMES

STEPS = {"right of": (0, 1), "left of": (0, -1), "below": (1, 0), "above": (-1, 0)}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


def named(words: list[str], digits) -> list:
    """The digits of a value, a colour or both, as the words of a question name them."""
    wanted = {word for word in words if word in COLOR_NAMES or word.isdigit()}
    return [digit for digit in digits if wanted <= {digit.color, str(digit.value)}]


def counted(question: str, digits) -> str:
    if row := re.search(r"in the (\w+) row", question):
        return str(sum(digit.row == ROWS.index(row[1]) for digit in digits))
    return str(len(named(question.split(), digits)))


def related(question: str, board: dict, place: tuple[int, int]) -> str:
    down, right = STEPS[re.search(r"next (.*) the", question)[1]]
    while (place := (place[0] + down, place[1] + right)) not in board:
        pass
    return str(board[place].value)


def chosen(question: str, digit) -> str:
    options = dict(re.findall(r"([ABCD]) (\w+)", question))
    assert len(options) == 4 == len(set(options.values()))
    right = digit.color if question.startswith("color") else str(digit.value)
    return next(letter for letter, option in options.items() if option == right)


def answer_from_scene(kind: str, question: str, digits) -> str:
    """Reads a question's English and looks the answer up in the scene, without the code that made it."""
    board = {(digit.row, digit.column): digit for digit in digits}
    order = [board[key] for key in sorted(board)]
    place, words = None, question.split()
    if found := re.search(rf"the ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})", question):
        place = ROWS.index(found[1]), COLUMNS.index(found[2])
    if kind == "yes_no":
        return "yes" if named(words, [board[place]] if place else digits) else "no"
    if kind == "attribute":
        (digit,) = named(words, digits)
        return digit.color if words[1] == "color" else str(digit.value)
    if kind == "find":
        where = [f"{ROWS[digit.row]} {COLUMNS[digit.column]}" for digit in named(words, digits)]
        assert len(where) < 2
        return where[0] if where else "nowhere"
    return {
        "position": lambda: str(board[place].value),
        "reading": lambda: " ".join(str(digit.value) for digit in order),
        "caption": lambda: " ".join(f"{digit.color} {digit.value}" for digit in order),
        "counting": lambda: counted(question, digits),
        "relation": lambda: related(question, board, place),
        "extreme": lambda: str((min if "smallest" in words else max)(digit.value for digit in digits)),
        "multiple_choice": lambda: chosen(question, board[place]),
    }[kind.removesuffix("_small")]()


@pytest.mark.parametrize("kind", SCENE_TYPES)
def test_answers_follow_from_the_scene(kind):
    for index in range(40):
        sample = benchmark.scene_sample(kind, index)
        assert sample.answer == answer_from_scene(kind, sample.question, sample.scene.digits), sample.question
        if SCENE_TYPES[kind].small is not None:
            covered = max(np.bincount(sample.scene.owners[sample.scene.owners >= 0]))
            assert covered <= 25 if SCENE_TYPES[kind].small else covered > 8
