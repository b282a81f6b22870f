"""The page of :mod:`llava.serve.web` on the embedded model, with pictures of its benchmark to try:
``python -m libra.mini.page``."""

from pathlib import Path

from llava.serve import web

SHOWN = ("counting", "attribute", "reading", "relation")  # question types


def examples(folder: Path) -> list[list[str]]:
    """[picture's file, question] of the benchmark, written to a folder; none where its packages are
    missing."""
    try:
        from .benchmark import scene_sample

        samples = [scene_sample(kind, 0) for kind in SHOWN]
    except ImportError:
        return []
    rows = []
    for i, sample in enumerate(samples):
        path = folder / f"example{i}.png"
        sample.image.save(path)
        rows.append([str(path), sample.question])
    return rows


if __name__ == "__main__":
    web.main(prog="python -m libra.mini.page", examples=examples)
