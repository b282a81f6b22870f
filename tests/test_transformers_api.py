"""Every transformers in the range: the cache that comes back is ours, by every route and name; others are
refused."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from packaging.requirements import Requirement
from transformers import DynamicCache
from transformers.generation import GenerationMixin
from transformers.utils import logging

import libra
from libra import Compression
from libra.engine.cache import StagedCache
from libra.engine.transformers_api import CACHE, RANGE, cache_argument, cache_of

ROOT = Path(__file__).resolve().parents[1]
LIBRA = Compression(method="libra", layers=(1, 3), ratio=0.5)
DOORS = ["attach", "llava"]
FORMER = "past_key_values"
OLD = transformers.__version__.startswith("5.17.")
SAID = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[tiny.IMAGE], return_dict_in_generate=True)


@pytest.fixture(scope="module")
def models():
    return {"attach": tiny.hf_model(), "llava": tiny.llava_model()}


@pytest.fixture(params=DOORS)
def door(request, models):
    """(name, a compressed model, its arguments for two rows with an image each)."""
    model = models[request.param]
    if request.param == "llava":
        model.set_compression(LIBRA)
        yield "llava", model, tiny.collate([tiny.row("t5 v16 t4", 1), tiny.row("t3 v16 t4", 2)], "left")
        model.set_compression(None)
        return
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny.IMAGE, (2, 25), generator=draw)
    ids[:, 4 : 4 + tiny.IMAGE_TOKENS] = tiny.IMAGE
    pixels = torch.randn(2, 3, 56, 56, generator=draw)
    with libra.attach(model, LIBRA):
        yield (
            "attach",
            model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels},
        )


NAMES = (
    [FORMER, "cache"] if CACHE == "cache" else [FORMER]
)  # by which the installed transformers takes a cache


def assert_ours(cache, rows: int = 2) -> None:
    assert type(cache) is StagedCache
    assert [stage.first_layer for stage in cache.stages] == [0, 2, 4]
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths[0] == lengths[1] > lengths[2] == lengths[3] > lengths[4] == lengths[5]
    assert {len(layer.keys) for layer in cache.layers} == {rows}


def generate(model, given: dict, **options):
    """transformers' own generate: llava's takes token ids and pictures, and hands on to it."""
    given = {name: value for name, value in given.items() if name != "position_ids"}
    return GenerationMixin.generate(model, **given, **{**SAID, **options})


@pytest.mark.filterwarnings("error::FutureWarning")
@torch.no_grad()
def test_the_cache_that_comes_back_is_ours(door, caplog):
    """And nothing of ours says a deprecated name on the way."""
    kind, model, given = door
    logging.enable_propagation()
    logging.warning_once.cache_clear()
    try:
        assert_ours(cache_of(model(**given, use_cache=True)))
        assert_ours(cache_of(generate(model, given)))
        assert_ours(cache_of(generate(model, given, num_beams=2)), rows=4)
        if kind == "attach" or not OLD:
            one = {name: value[:1] for name, value in given.items()}
            assisted = generate(model, one, prompt_lookup_num_tokens=2, max_matching_ngram_size=1)
            assert_ours(cache_of(assisted), rows=1)
            assert torch.equal(assisted.sequences, generate(model, one).sequences)

        cache = DynamicCache()
        assert cache_of(model(**given, **cache_argument(cache))) is cache
        assert_ours(cache)
        cache = DynamicCache()
        assert cache_of(generate(model, given, **cache_argument(cache))) is cache
        assert_ours(cache)
    finally:
        logging.disable_propagation()
    assert "deprecated" not in caplog.text


@pytest.mark.skipif(not OLD, reason="newer ones take embeddings and guesses")
def test_guesses_are_refused_where_transformers_loses_the_embeddings(models):
    for option in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": models["llava"]}):
        with pytest.raises(
            ValueError, match="assisted generation from embeddings gives wrong tokens with transformers 5.17"
        ):
            models["llava"].generate(torch.tensor([[5, 6]]), **option)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for the former name
@torch.no_grad()
def test_either_name_is_the_cache_that_is_used(door):
    kind, model, given = door
    want = model(**given, use_cache=True)
    for name in [FORMER, "cache"] if kind == "llava" else NAMES:  # ours takes both everywhere
        cache = DynamicCache()
        assert torch.equal(model(**given, **{name: cache}).logits, want.logits)
        assert_ours(cache)
        length = cache.get_seq_length()
        step = {
            "input_ids": torch.full((2, 1), 5),
            "attention_mask": torch.ones(2, length + 1, dtype=torch.long),
        }
        assert cache_of(model(**step, **{name: cache})) is cache
        assert cache.get_seq_length() == length + 1
        if kind == "llava":
            cache = DynamicCache()
            model.generate(torch.tensor([[5, 6, 7]]), **{name: cache}, max_new_tokens=2)
            assert type(cache) is StagedCache and cache.get_seq_length() == 4
    for name in NAMES:
        cache = DynamicCache()
        assert cache_of(generate(model, given, **{name: cache})) is cache
        assert_ours(cache)


@torch.no_grad()
def test_two_caches(door):
    """llava refuses them; an attached model does what its transformers does, and uses ``cache``."""
    kind, model, given = door
    former, cache = DynamicCache(), DynamicCache()
    if kind == "llava":
        for call in (model, model.model):
            with pytest.raises(
                ValueError, match="two caches were given, as `past_key_values` and as `cache`"
            ):
                call(inputs_embeds=given["inputs_embeds"], past_key_values=former, cache=cache)
        with pytest.raises(ValueError, match="two caches were given"):
            model.generate(torch.tensor([[5, 6]]), past_key_values=former, cache=cache)
        model.generate(torch.tensor([[5, 6]]), past_key_values=cache, cache=cache, max_new_tokens=2)
        assert type(cache) is StagedCache and cache.get_seq_length() == 3
    elif CACHE == "cache":
        with pytest.warns(FutureWarning, match="Both `past_key_values` and `cache`"):
            model(**given, past_key_values=former, cache=cache)
        assert_ours(cache)
        assert not former.get_seq_length()


def test_a_reset_cache_is_empty(door):
    _, model, given = door
    with torch.no_grad():
        cache = cache_of(model(**given, use_cache=True))
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.get_mask_sizes(1, 0)[0] == 1
        assert cache_of(model(**given, **cache_argument(cache))) is cache
    assert_ours(cache)


def test_the_range_is_that_of_setup_py():
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    (found,) = (line for line in setup["CORE"] if Requirement(line).name == "transformers")
    assert Requirement(found).specifier == Requirement(f"transformers{RANGE}").specifier


STUB = """
import os
__version__ = os.environ["STUB_VERSION"]
def __getattr__(name):
    if name in ("PreTrainedConfig", "__path__"):  # 4.x has another name for it
        raise AttributeError(name)
    return object
"""
IMPORTS = """
import importlib, os, sys
for version in ("4.57.1", "5.16.4", "5.25.0.dev0", "5.25.0"):
    os.environ["STUB_VERSION"] = version
    for name in ("libra.engine.attach", "llava.model.builder"):
        ours = ("libra", "llava", "transformers")
        for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] in ours]:
            del sys.modules[loaded]
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(error)
from llava.convert.__main__ import main
main(["source", "destination"])
"""


def test_another_version_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "transformers.py").write_text(STUB)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    answer = subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True)
    wanted = f"transformers{RANGE}"
    sentences = [
        f"libra needs {wanted}, but {version} is installed; run: pip install '{wanted}'"
        for version in ("4.57.1", "5.16.4", "5.25.0.dev0", "5.25.0")
    ]
    assert answer.stdout.splitlines() == [sentence for sentence in sentences for _ in range(2)], answer.stderr
    assert (answer.returncode, answer.stderr) == (2, f"error: {sentences[-1]}\n")  # what a command says
