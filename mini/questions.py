"""What the embedded model is asked in training: the benchmark's types, easier relatives of some, shares."""

from typing import NamedTuple

import numpy as np

from libra.mini.questions import (
    COLOR_NAMES,
    DIRECTIONS,
    LETTERS,
    PLACES,
    VALUE_NAMES,
    Maker,
    Question,
    attribute,
    caption,
    color,
    counting,
    extreme,
    find,
    listing,
    multiple_choice,
    pick,
    position,
    reading,
    relation,
    yes_no,
)
from libra.mini.scenes import Digit

# Asked in training only: easier relatives of the types that compare what is seen with what is read.


def fewer_choices(rng, digits) -> Question:
    return multiple_choice(rng, digits, int(rng.integers(2, 4)))


def text_choice(rng, digits) -> Question:
    """The letter of a word, with nothing to see: the look-up that multiple choice ends with."""
    words = rng.permutation(pick(rng, (VALUE_NAMES, COLOR_NAMES)))
    options = words[: int(rng.integers(2, 5))].tolist()
    index = int(rng.integers(len(options)))
    return f"{options[index]} ? {listing(options)}", LETTERS[index]


def text_equal(rng, digits) -> Question:
    """Whether two words are the same, with nothing to see: the comparison that yes/no ends with."""
    first, second = rng.permutation(pick(rng, (VALUE_NAMES, COLOR_NAMES)))[:2].tolist()
    truth = bool(rng.integers(2))
    return f"is {first} a {first if truth else second} ?", "yes" if truth else "no"


class Trained(NamedTuple):
    """A question of the training and its weight among the others, before and in the last third."""

    make: Maker
    early: float
    late: float


# Fixed before any compressed result was looked at.
TRAINED = {
    "reading": Trained(reading, 0.08, 0.10),
    "caption": Trained(caption, 0.08, 0.10),
    "position": Trained(position, 0.08, 0.06),
    "relation": Trained(relation, 0.10, 0.07),
    "counting": Trained(counting, 0.10, 0.08),
    "color": Trained(color, 0.05, 0.03),
    "find": Trained(find, 0.12, 0.12),
    "attribute": Trained(attribute, 0.08, 0.08),
    "extreme": Trained(extreme, 0.04, 0.04),
    "yes_no": Trained(yes_no, 0.20, 0.12),
    "multiple_choice": Trained(multiple_choice, 0.10, 0.24),
    "fewer_choices": Trained(fewer_choices, 0.06, 0.08),
    "text_choice": Trained(text_choice, 0.04, 0.06),
    "text_equal": Trained(text_equal, 0.04, 0.01),
}
LATE = 2 / 3  # of the training; from then on multiple choice gets a fifth of the questions


def ask(rng: np.random.Generator, digits: tuple[Digit, ...], count: int, part: float = 1.0) -> list[Question]:
    """At most ``count`` different questions about one scene; ``part`` (0 to 1) of the training gives the
    types' weights."""
    kinds = list(TRAINED.values())
    weights = np.array([kind.late if part >= LATE else kind.early for kind in kinds])
    questions: list[Question] = []
    for index in rng.choice(len(kinds), size=3 * count, p=weights / weights.sum()):
        question = kinds[index].make(rng, digits)
        if question is not None and question not in questions:
            questions.append(question)
        if len(questions) == count:
            break
    return questions


def scene_words() -> set[str]:
    """All words of all questions and answers about scenes."""
    words = {*COLOR_NAMES, *LETTERS, *VALUE_NAMES, "yes", "no"}
    words |= {word for row in PLACES for place in row for word in place.split()}
    words |= {word for direction in DIRECTIONS for word in direction.split()}
    return words | set(
        "what digit is at the ? color read all digits in order . how many are there row next one a "
        "where nowhere smallest largest describe".split()
    )
