"""The page of :mod:`llava.serve.web` on the embedded model, with pictures of its benchmark to try:
``python -m libra.mini.page``."""

from llava.serve import web

# Question types and numbers of their scenes. The first is README's: bright, and the answers differ.
SHOWN = (("caption", 3), ("counting", 0), ("attribute", 0), ("reading", 0), ("relation", 0))


def examples() -> list:
    """Pictures of the benchmark with their questions and answers; none where its packages are missing."""
    from llava.serve.asked import Example

    try:
        from .benchmark import scene_sample

        samples = [scene_sample(kind, number) for kind, number in SHOWN]
    except ImportError:
        return []
    return [Example(sample.image, sample.question, sample.answer) for sample in samples]


if __name__ == "__main__":
    web.main(prog="python -m libra.mini.page", examples=examples)
