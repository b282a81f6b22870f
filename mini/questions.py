"""What the embedded model is asked in training, and the words it has to know."""

import numpy as np

from libra.mini.questions import DIRECTIONS, LETTERS, PLACES, SCENE_TYPES, Question, easy_vqa
from libra.mini.scenes import COLOR_NAMES, Digit


def ask(rng: np.random.Generator, digits: tuple[Digit, ...], count: int) -> list[Question]:
    """At most ``count`` different questions about one scene, of types drawn by their training share."""
    shares = np.array([share for _, share in SCENE_TYPES.values()])
    makers = [maker for maker, _ in SCENE_TYPES.values()]
    questions: list[Question] = []
    for index in rng.choice(len(makers), size=3 * count, p=shares / shares.sum()):
        question = makers[index](rng, digits)
        if question is not None and question not in questions:
            questions.append(question)
        if len(questions) == count:
            break
    return questions


def every_word() -> list[str]:
    """All words of all questions and answers, sorted: the vocabulary of the embedded model's tokenizer."""
    words = {*COLOR_NAMES, *LETTERS, *(str(n) for n in range(10)), "yes", "no"}
    words |= {word for row in PLACES for place in row for word in place.split()}
    words |= {word for direction in DIRECTIONS for word in direction.split()}
    words |= set(
        "what digit is at the ? color read all digits in order . how many are there row next one a".split()
    )
    _, by_image = easy_vqa("train")
    words |= {
        word
        for questions in by_image.values()
        for pair in questions
        for text in pair
        for word in text.split()
    }
    return sorted(words)
