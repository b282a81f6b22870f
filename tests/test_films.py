"""Films of moving digits, the embedded model on them, and the methods that look at frames together."""

from pathlib import Path

import numpy as np
import pytest
import torch

from libra import Compression, Context, compress
from libra.lmms.models_base import Sample
from libra.lmms.models_llava import Llava
from libra.methods.uniform_frames import chosen
from libra.mini import benchmark
from libra.mini.films import FILM_TYPES, FRAMES, draw_film
from libra.rows import Row

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "configs/mini/video"


@pytest.mark.parametrize("seed", range(12))
def test_digits_step_to_neighbouring_cells_and_stay_apart(seed):
    once = bool(seed % 2)
    film = draw_film(np.random.default_rng(seed), "test", once)
    assert len(film.images) == len(film.shown) == FRAMES
    names = [(digit.value, digit.color) for digit in film.digits]
    assert len(set(names)) == len(names)
    for shown in film.shown:
        cells = [(digit.row, digit.column) for digit in shown]
        assert len(set(cells)) == len(cells)
    times = [sum(name in [(d.value, d.color) for d in shown] for shown in film.shown) for name in names]
    assert times == [FRAMES] * (len(names) - once) + [1] * once
    for before, after in zip(film.shown, film.shown[1:]):
        for digit in before:
            for other in after:
                if (digit.value, digit.color) == (other.value, other.color):
                    assert abs(digit.row - other.row) + abs(digit.column - other.column) <= 1
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(film.images, film.images[1:]))


@pytest.mark.parametrize("kind", FILM_TYPES)
def test_answers_follow_from_the_film(kind):
    said = []
    for index in range(30):
        number = len(benchmark.TYPES) + list(FILM_TYPES).index(kind)
        film = draw_film(
            np.random.default_rng([benchmark.SEED, number, index]), "test", kind == "film_passing"
        )
        sample = benchmark.film_sample(kind, index)
        words, digits = sample.question.split(), film.digits
        if [np.asarray(x).tobytes() for x in film.images] != [np.asarray(x).tobytes() for x in sample.frames]:
            continue  # the first film that was drawn did not allow the type
        if kind == "film_exists":
            there = any(str(d.value) in words and d.color in words for d in digits)
            assert sample.answer == ("yes" if there else "no")
        else:
            (digit,) = [d for d in digits if str(d.value) in words or d.color in words]
            assert sample.answer == (digit.color if "color" in words else str(digit.value))
            assert kind == "film_attribute" or digit == digits[-1]
        said.append(sample.answer)
    assert len(said) > 20 and len(set(said)) > 1


@pytest.mark.parametrize(
    "sizes, k, kept",
    [
        ([4, 4, 4], 4, [1]),  # the middle frame
        ([4, 4, 4], 8, [0, 2]),
        ([2] * 6, 4, [1, 4]),
        ([4, 4, 4], 12, [0, 1, 2]),
    ],
)
def test_uniform_frames_are_whole_ones_at_even_distances(sizes, k, kept):
    wanted = [frame in kept for frame, size in enumerate(sizes) for _ in range(size)]
    assert chosen(sizes, k) == wanted


@pytest.mark.parametrize("k", range(1, 14))
def test_uniform_frames_keep_exactly_T(k):
    assert sum(chosen([4, 4, 5], k)) == k
    context, c = Context(grid=[[(3, 2, 2)]]), Compression(method="uniform-frames", keep=min(k, 12))
    out = compress(torch.randn(1, 12, 3), None, c, context=context)
    assert out.targets.shape == (1, min(k, 12))


@pytest.fixture(scope="module")
def engine():
    return Llava(str(ROOT / "mini/checkpoint"), None, "cpu", torch.float32)


def answer(engine, row: str, sample: Sample) -> tuple[str, list[int]]:
    engine.set_row(Row.from_yaml(ROWS / f"{row}.yaml"), trace=True)
    (text,), (facts,) = engine.generate([sample], {"max_new_tokens": 4})
    return text, facts["tokens"]


def test_frames_are_one_span_for_methods_that_look_at_them_together(engine):
    question = benchmark.film_sample("film_attribute", 0)
    sample = Sample("a film", question.question, [question.frames])
    assert answer(engine, "vanilla", sample) == (question.answer, [])
    for row, tokens in (("c33_evs_original", 256), ("c11_vidcom2_compact", 85), ("c17_random_original", 129)):
        said, counts = answer(engine, row, sample)
        assert counts == [tokens] * 12 and len(said.split()) == 1
    (trace,) = engine.model.compression_trace
    assert list(trace.spans) == [256] * 3  # the last one looks at each frame by itself
    answer(engine, "c33_uniform_frames_original", sample)
    (trace,) = engine.model.compression_trace
    assert list(trace.spans) == [768] and list(trace.kept(0)) == list(range(256, 512))
    both = [sample, Sample("another", question.question, [question.frames, question.frames[0]])]
    with pytest.raises(ValueError, match="another: its prompt has .* tokens and the model takes 1024"):
        engine.generate(both, {"max_new_tokens": 4})


def test_a_model_of_tiles_is_refused(engine, monkeypatch):
    question = benchmark.film_sample("film_attribute", 0)
    monkeypatch.setattr(engine.model.config, "mm_patch_merge_type", "spatial_unpad")
    with pytest.raises(ValueError, match="method evs looks at the frames of a video together"):
        answer(engine, "c33_evs_original", Sample("a film", question.question, [question.frames]))
