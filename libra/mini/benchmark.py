"""The held-out questions of the embedded benchmark, one parquet file a question type.

python -m libra.mini.benchmark --output results/benchmark
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..media import png
from ..utils.cli import Parser, whole_from
from ..utils.files import new_folder
from .films import FILM_TYPES, film_question
from .questions import EASY_VQA, SCENE_TYPES, TYPES
from .scenes import Scene, draw_scene
from .shapes import easy_vqa, easy_vqa_image

SEED = 20_260_101
# At 85% correct, 300 questions give a standard error of 2.1 points a type and of 0.6 for the mean of thirteen
# types: under the differences between methods, and a run of all rows still takes minutes on two cores.
QUESTIONS = 300
FORMAT = 2  # raise when the files or the way they are drawn change
MANIFEST = "manifest.json"
ALL_TYPES = (*TYPES, *FILM_TYPES)
SHOWN = ("image", "frames")  # the column of what is shown: of pictures and of films


class Sample(NamedTuple):
    """One held-out question; ``scene`` is None for easy-VQA, whose images come as files, and for films, whose
    frames are ``image`` and ``more``."""

    image: Image.Image
    question: str
    answer: str
    scene: Scene | None
    more: tuple[Image.Image, ...] = ()

    @property
    def frames(self) -> list[Image.Image]:
        """All that is shown."""
        return [self.image, *self.more]


def scene_sample(kind: str, index: int) -> Sample:
    """Question ``index`` of a scene type, about a scene of its own drawn with glyphs that training never
    shows."""
    make, small = SCENE_TYPES[kind]
    rng = np.random.default_rng([SEED, TYPES.index(kind), index])
    while True:  # a scene may not allow the type: two digits in no common line have no relation
        scene = draw_scene(rng, "test", small=small)
        pair = make(rng, scene.digits)
        if pair is not None:
            return Sample(Image.fromarray(scene.image), *pair, scene)


def easy_vqa_samples(count: int) -> list[Sample]:
    """One question about each of ``count`` images of easy-VQA's own test split."""
    paths, by_image = easy_vqa("test")
    if count > len(paths):
        raise ValueError(
            f"easy-VQA has {len(paths)} test images: ask for at most that many questions, not {count}"
        )
    rng = np.random.default_rng([SEED, TYPES.index(EASY_VQA)])
    samples = []
    for place in rng.permutation(len(paths))[:count]:
        number = sorted(paths)[place]
        question, answer = by_image[number][rng.integers(len(by_image[number]))]
        samples.append(Sample(easy_vqa_image(paths[number]), question, answer, None))
    return samples


def film_sample(kind: str, index: int) -> Sample:
    """Question ``index`` of a type about films, with glyphs that training never shows."""
    number = len(TYPES) + [*FILM_TYPES].index(kind)
    film, question, answer = film_question(kind, np.random.default_rng([SEED, number, index]), "test")
    return Sample(film.images[0], question, answer, None, film.images[1:])


def samples_of(kind: str, count: int) -> list[Sample]:
    """The first ``count`` held-out questions of a type; the same on every machine."""
    if kind == EASY_VQA:
        return easy_vqa_samples(count)
    draw = film_sample if kind in FILM_TYPES else scene_sample
    return [draw(kind, index) for index in range(count)]


def _content_hash(kind: str, samples: list[Sample]) -> str:
    """A hash of texts and pixels, not of PNG bytes, which change with the zlib at hand."""
    digest = hashlib.sha256(kind.encode())
    for sample in samples:
        digest.update(json.dumps([sample.question, sample.answer, sample.image.size]).encode())
        for frame in sample.frames:
            digest.update(frame.tobytes())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_dataset(kind: str, samples: list[Sample]):
    """The questions as a :class:`datasets.Dataset`, as the task files of :mod:`libra.lmms` read them."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    frames = [[{"bytes": png(frame), "path": None} for frame in sample.frames] for sample in samples]
    films = kind in FILM_TYPES
    return Dataset.from_dict(
        {
            "question_id": [f"{kind}-{index}" for index in range(len(samples))],
            SHOWN[films]: frames if films else [shown for (shown,) in frames],
            "question": [sample.question for sample in samples],
            "answer": [sample.answer for sample in samples],
        },
        features=Features(
            {
                "question_id": Value("string"),
                SHOWN[films]: List(ImageFeature()) if films else ImageFeature(),
                "question": Value("string"),
                "answer": Value("string"),
            }
        ),
    )


def _write_parquet(kind: str, samples: list[Sample], path: Path) -> None:
    import pyarrow.parquet

    table = as_dataset(kind, samples).data.table
    pyarrow.parquet.write_table(table, path)  # Dataset.to_parquet would draw a progress bar a type


def _reusable(folder: Path, count: int) -> dict | None:
    """The manifest of a folder that holds exactly these questions, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wanted = {"format": FORMAT, "seed": SEED, "questions": count}
        if all(manifest[key] == value for key, value in wanted.items()) and set(manifest["types"]) == set(
            ALL_TYPES
        ):
            if all(
                _file_hash(folder / entry["file"]) == entry["file_sha256"]
                for entry in manifest["types"].values()
            ):
                return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def write_benchmark(folder: Path, count: int = QUESTIONS) -> dict:
    """Write ``count`` questions of every type into ``folder``, or reuse the ones that are there; returns the
    manifest.

    The manifest holds the seed, a sha256 of all texts and pixels of the types about pictures, and for each
    type its file, its number of questions, its most frequent answer and that answer's share. Raises
    ValueError where ``folder`` holds something else, or for a count that is not positive or exceeds
    easy-VQA's test images.
    """
    if count < 1:
        raise ValueError(f"questions must be at least 1, not {count}")
    folder = Path(folder)
    manifest = _reusable(folder, count)
    if manifest is not None:
        return manifest
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the benchmark")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise ValueError(
            f"{folder} holds other files and no {MANIFEST}: name an empty or a new folder for the benchmark"
        )
    with new_folder(folder) as work:
        types = {}
        for kind in ALL_TYPES:
            samples = samples_of(kind, count)
            file = f"{kind}.parquet"
            _write_parquet(kind, samples, work / file)
            ((majority, times),) = Counter(sample.answer for sample in samples).most_common(1)
            types[kind] = {
                "file": file,
                "file_sha256": _file_hash(work / file),
                "content_sha256": _content_hash(kind, samples),
                "questions": count,
                "majority_answer": majority,
                "majority_share": times / count,
            }
        sha256 = hashlib.sha256(
            "".join(str(types[kind]["content_sha256"]) for kind in TYPES).encode()
        ).hexdigest()
        manifest = {"format": FORMAT, "seed": SEED, "questions": count, "sha256": sha256, "types": types}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m libra.mini.benchmark",
        description="Write the embedded benchmark's held-out questions.",
        epilog="example: python -m libra.mini.benchmark --output results/benchmark",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the parquet files and manifest.json"
    )
    parser.add_argument(
        "--questions", type=whole_from(1), default=QUESTIONS, help="questions a type (default %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        manifest = write_benchmark(options.output, options.questions)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for kind, entry in manifest["types"].items():
        print(
            f"{kind:16} {entry['questions']} questions, most frequent answer {entry['majority_answer']!r} "
            f"({entry['majority_share']:.1%})"
        )
    print(f"sha256 {manifest['sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
