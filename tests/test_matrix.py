"""libra.attach on every vision-language class: the same checks for each.

The fast suite takes each class with one check and one method, such that every check meets every method;
``--all`` takes all.
"""

import runpy
from contextlib import ExitStack
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from by_hand import by_hand, flat, watched
from families import SAID, Talk

import libra
from libra import Compression
from libra.engine.families import TESTED
from libra.engine.structure import final_norm, layers_of

METHODS = {
    "libra": dict(method="libra", tau=0.9),
    "fastv": dict(method="fastv"),
    "turbo": dict(method="turbo"),
    "pyramiddrop": dict(method="pyramiddrop", positions="original"),  # scored by the layer that comes next
    "sparsevlm": dict(method="sparsevlm"),
    "sparsevlm-v2": dict(method="sparsevlm-v2"),
    "dart": dict(method="dart"),
}
# Not in the reference by hand; their scores and answers are tests/test_methods_inside.py's.
BY_PARTS = ("sparsevlm", "sparsevlm-v2", "dart")
PATTERNS = ("t4 i i t5", "t2 i t3 v t7")  # an image where the class takes no videos
STEPS = 4
CLASSES = [name for name in zoo.NAMES if name in TESTED]


def compression(name: str, method: str, **more) -> Compression:
    return Compression(layers=zoo.places(name), **{"ratio": 0.5, **METHODS[method], **more})


def close(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    """Close for the size of the numbers: recurrent layers and mixtures of experts lose more digits. The least
    number is no size: Chameleon gives it to the codes of pictures, which it never says."""
    size = want[want > torch.finfo(want.dtype).min].abs().max()
    bound = zoo.BOUNDS.get(name, 1e-4) * max(1.0, float(size))
    torch.testing.assert_close(got, want, atol=bound, rtol=0)


def talks(name: str) -> list[Talk]:
    return [zoo.talk(name, pattern, seed) for seed, pattern in enumerate(PATTERNS)]


def rows_of(name: str) -> list[Talk]:
    """A batch whose rows do not depend on each other: HunYuan numbers the pictures of the whole batch."""
    if name == "HunYuanVLForConditionalGeneration":
        return [zoo.talk(name, "t9", 0), talks(name)[1]]
    return talks(name)


def none_and_given_back(name: str, method: str) -> None:
    """Without compression no bit differs, nor after one is detached."""
    model, given = zoo.model(name), zoo.collate(name, talks(name))
    before = model(**given).logits
    with libra.attach(model, Compression(method="vanilla")):
        assert torch.equal(model(**given).logits, before)
    with libra.attach(model, compression(name, method)):
        assert model(**given).logits.shape[1] < before.shape[1]
    assert torch.equal(model(**given).logits, before)
    assert not any(layer._forward_pre_hooks for layer in zoo.decoder(model).layers)


def ratio_zero(name: str, method: str) -> None:
    """At ratio 0 the engine runs and no bit differs."""
    model, given = zoo.model(name), zoo.collate(name, talks(name))
    before, valid = model(**given).logits, given["attention_mask"].bool()
    with libra.attach(model, compression(name, method, ratio=0.0)) as handle:
        after = model(**given).logits
        assert handle.stats["visual_tokens"][-1] == handle.stats["given"]
    assert torch.equal(after[valid], before[valid])


def batch(name: str, method: str) -> None:
    """A batch padded on the left gives what each of its samples does, and generates the same."""
    model, rows = zoo.model(name), rows_of(name)
    options = dict(max_new_tokens=STEPS, **SAID, return_dict_in_generate=True, output_logits=True)
    with libra.attach(model, compression(name, method)):
        together = model(**zoo.collate(name, rows)).logits
        said = model.generate(**zoo.collate(name, rows), **options)
        for row, t in enumerate(rows):
            logits = model(**zoo.collate(name, [t])).logits[0]
            close(together[row, -len(logits) :], logits, name)
            alone = model.generate(**zoo.collate(name, [t]), **options)
            close(torch.stack(said.logits)[:, row], torch.stack(alone.logits)[:, 0], name)
            assert torch.equal(said.sequences[row, -STEPS:], alone.sequences[0, -STEPS:])


def cached_is_replayed(name: str, method: str) -> None:
    """An answer decoded with the cache is that of a pass without one over prompt and answer, by hand."""
    model, twin, t = zoo.model(name), zoo.twin(name), talks(name)[1]
    c = compression(name, method)
    options = dict(max_new_tokens=STEPS, **SAID, return_dict_in_generate=True, output_logits=True)
    with libra.attach(model, c):
        answer = model.generate(**zoo.collate(name, [t]), **options)
    said = answer.sequences[0, -STEPS:-1].tolist()
    want = by_hand(twin, name, t, c, said, zoo.replayed(name, len(t.ids))).logits[-STEPS:]
    close(torch.stack(answer.logits)[:, 0], want, name)


def by_layers(name: str, method: str) -> None:
    """What enters each layer, and the logits, are those of the reference by hand."""
    model, twin, c = zoo.model(name), zoo.twin(name), compression(name, method)
    for t in talks(name):
        want = by_hand(twin, name, t, c)
        assert len(want.source) < len(t.ids)
        with libra.attach(model, c), watched(zoo.decoder(model).layers) as seen:
            logits = model(**zoo.collate(name, [t])).logits[0]
        for layer, told in seen.items():
            close(flat(told.hidden), want.entered[layer], name)
        close(logits, want.logits, name)


CHECKS = (none_and_given_back, ratio_zero, batch, cached_is_replayed, by_layers)
ASKED = [
    (method, check)
    for method, check in product(METHODS, CHECKS)
    if not (method in BY_PARTS and check in (cached_is_replayed, by_layers))
]


def pairwise() -> list[tuple]:
    """Each class with one check and one method, such that every check meets every method."""
    turns = cycle(ASKED)
    return [(name, *next(turns)) for name in CLASSES]


CELLS = [
    pytest.param(*cell, id="-".join((cell[0], cell[1], cell[2].__name__)), marks=marks)
    for cell, marks in [
        *((cell, ()) for cell in pairwise()),
        *(
            ((name, method, check), (pytest.mark.slow,))
            for name, (method, check) in product(CLASSES, ASKED)
            if (name, method, check) not in pairwise()
        ),
    ]
]


@pytest.mark.filterwarnings("error:.*is untested with libra.attach")
@pytest.mark.parametrize("name, method, check", CELLS)
@torch.no_grad()
def test_a_class(name, method, check):
    if reason := zoo.NOT_BY.get(method, {}).get(name):
        with pytest.raises(ValueError, match=reason):
            libra.attach(zoo.model(name), compression(name, method))
    else:
        check(name, method)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in zoo.NOT_BY["dart"]])
@torch.no_grad()
def test_the_final_norm_gets_what_leaves_the_last_layer(name):
    decoder, told = zoo.decoder(zoo.model(name)), []

    def left(layer, args, output):
        told.append(output[0] if isinstance(output, tuple) else output)

    def entered(norm, args, kwargs):
        told.append(next(iter((*args, *kwargs.values()))))

    with ExitStack() as hooks:
        hooks.callback(layers_of(decoder)[-1].register_forward_hook(left).remove)
        hooks.callback(final_norm(decoder).register_forward_pre_hook(entered, with_kwargs=True).remove)
        zoo.model(name)(**zoo.collate(name, talks(name)[:1]))
    assert len(told) == 2 and torch.equal(*told)


@pytest.mark.parametrize("name", list(filter(zoo.possible, zoo.REASONS)))
def test_what_cannot_work_is_refused_with_the_reason(name):
    with pytest.raises(ValueError) as refusal:
        libra.attach(zoo.hollow(name), Compression(method="libra", layers=(1, 3), ratio=0.5))
    assert str(refusal.value).startswith(f"libra.attach does not support {name}: {zoo.REASONS[name]}")


def test_features_that_come_late_are_not_compressed_early():
    name = "Granite4VisionForConditionalGeneration"
    model, c = zoo.model(name), Compression(method="libra", layers=(2,), ratio=0.5)
    with pytest.raises(ValueError, match="layers: 2 is too early: .* compress after layer 3 at the earliest"):
        libra.attach(model, c)
    with libra.attach(model, Compression(method="libra", layers=(3,), ratio=0.5)):
        pass


@pytest.mark.parametrize("name", ["ChameleonForConditionalGeneration", "Emu3ForConditionalGeneration"])
@torch.no_grad()
def test_codes_of_pictures_among_the_ids_are_text_unless_marked(name):
    model, t = zoo.model(name), talks(name)[0]
    given = zoo.collate(name, [t])
    pictures = {key: value for key, value in given.items() if key in ("pixel_values", "image_sizes")}
    ids = given["input_ids"].clone()
    ids[0, t.visual] = model.model.get_image_tokens(**pictures).flatten().long()
    with libra.attach(model, compression(name, "libra")) as handle:
        want = model(**given).logits
        assert model(input_ids=ids).logits.shape[1] == len(t.ids) > want.shape[1]
        handle.mark_visual_tokens(t.visual[None])
        assert torch.equal(model(input_ids=ids, attention_mask=given["attention_mask"]).logits, want)


def test_the_tested_classes_are_those_of_this_matrix():
    assert sorted(TESTED) == sorted(set(zoo.KINDS) - set(zoo.REASONS))
    assert len(TESTED) >= 48


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="newer ones take other classes")
def test_the_page_of_models_is_current():
    root = Path(__file__).resolve().parents[1]
    page = runpy.run_path(str(root / "scripts/models_page.py"))["page"]
    assert page() == (root / "docs/models.md").read_text(encoding="utf-8"), "run scripts/models_page.py"
