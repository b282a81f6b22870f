"""Faults of the engine and the plug-in, one test an entry: what is right, or the sentence that refuses."""

import copy
import gc
import itertools
import pickle
import re
import threading
import warnings
import weakref
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import families
import plain
import pytest
import tiny
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import libra
from libra import Compression
from libra.budget import actual, kept, nominal
from libra.config import ConfigError
from libra.engine import score
from libra.engine.layers import HookedForward
from libra.engine.transformers_api import cache_argument, cache_of
from libra.flops import report
from libra.merge import MERGERS
from libra.methods import METHODS
from libra.ops import kernels
from libra.ops.reference import first_equal, most_similar
from libra.rows import Row
from libra.select import SELECTORS, top_of_span
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).resolve().parent.parent
TORCH_AND_TRITON = pytest.mark.parametrize(
    "search", [most_similar.__wrapped__, kernels.most_similar], ids=["torch", "triton"]
)


def refused(error) -> str:
    """The sentence of a caught error: one line."""
    text = str(error.value)
    assert text and text.isprintable() and "Traceback" not in text
    return text


def prompt(*parts: int, answer: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """A row for tiny.hf_model from ids, each tiny.IMAGE an image; the last id is an answer where there are
    labels."""
    ids = torch.tensor(
        [[i for part in parts for i in ([part] * (tiny.IMAGE_TOKENS if part == tiny.IMAGE else 1))]]
    )
    draw = torch.Generator().manual_seed(seed)
    given = {
        "input_ids": ids,
        "pixel_values": torch.randn(parts.count(tiny.IMAGE), 3, 56, 56, generator=draw),
    }
    if answer:
        given["labels"] = torch.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, ids, -100)
    return given


LIBRA = Compression(method="libra", layers=(1, 3), ratio=0.5, tau=0.9)
ONE = prompt(5, 7, tiny.IMAGE, 6, 8, 9, answer=True)
OTHER = prompt(4, tiny.IMAGE, 11, 12, answer=True, seed=1)
OTHER_ASKED = {k: v for k, v in OTHER.items() if k != "labels"}


# --- B 13: layers default to each method's natural places ---

PLACES = {
    "libra": {
        12: (2, 5, 8),
        32: (7, 15, 23),
        40: (9, 19, 29),
        28: (6, 13, 20),
        6: (1, 2, 3),
        2: (0, 1),
        1: (0,),
    },
    "pyramiddrop": {12: (2, 5, 8), 32: (7, 15, 23), 2: (0,)},
    "fastv": {12: (1,), 32: (3,), 28: (3,), 24: (2,), 80: (9,), 1: (0,)},
    "sparsevlm": {12: (0, 2, 5), 32: (2, 6, 15), 28: (2, 5, 13), 40: (3, 8, 19)},
    "dart": {12: (0,), 32: (1,), 28: (1,)},
}
PLACES["sparsevlm-v2"] = PLACES["sparsevlm"]
PLACES["libra-mean"] = PLACES["libra"]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.places])
def test_b13_natural_places(method):
    for depth, layers in PLACES.get(method, PLACES["fastv"]).items():
        c = Compression(method=method, ratio=0.5)
        assert c.layers is None and c.compresses and "layers" not in c.to_dict()
        assert c.at_depth(depth) == Compression(method=method, layers=layers, ratio=0.5)
        assert actual(c, depth, [64]) == actual(c.at_depth(depth), depth, [64])
        assert nominal(c, depth, 64)[-1] == 64 * 0.5 ** sum(layer < depth - 1 for layer in layers)
    assert Compression().at_depth(32) == Compression(layers=(7, 15, 23))
    vanilla = Compression(method="vanilla")
    assert vanilla.at_depth(12) is vanilla and not vanilla.compresses and vanilla.layers == ()


def test_b13_a_wrong_layer_is_told_the_natural_ones():
    for keys, depth, words in (
        (
            dict(method="libra", layers=(7, 15, 23)),
            12,
            r"15 is out of range: .* 0 to 11; use for example \[2, 5, 8\]",
        ),
        (dict(method="fastv", layers=(10**30,)), 12, r"10{30} is out of range: .*; use for example \[1\]"),
        (
            dict(method="pyramiddrop", layers=(11,)),
            12,
            r"11 is the last layer .*; use for example \[2, 5, 8\]",
        ),
        (dict(method="pyramiddrop"), 1, "a model of 1 layers has no natural place"),
    ):
        with pytest.raises(ConfigError) as error:
            Compression(**keys).at_depth(depth)
        assert re.search(words, refused(error)), error.value


def test_b13_every_door_finds_the_places(tmp_path):
    """attach, a llava model, a row's file, its FLOPs; a row's file for another model than the row's."""
    path = tmp_path / "row.yaml"
    path.write_text("model: llava-1.5-7b\ncompression: {method: libra, ratio: 0.5}\n")
    row = Row.from_yaml(path)
    assert row.compression.layers == (7, 15, 23)
    assert report(row)["nominal"]["flops"] / 1e12 == pytest.approx(1.78, abs=0.005)
    free = Compression.from_yaml(path)
    assert free.layers is None
    hf, ours = tiny.hf_model(), tiny.llava_model()
    with libra.attach(hf, free) as handle:
        assert handle.compression.layers == (1, 2, 3)
        hf(torch.tensor([[5, *[tiny.IMAGE] * tiny.IMAGE_TOKENS, 6]]), pixel_values=torch.zeros(1, 3, 56, 56))
        assert [tokens for (tokens,) in handle.stats["visual_tokens"]] == [16, 16, 8, 4, 2, 2]
    ours.set_compression(free)
    assert ours.compression.layers == (1, 2, 3)


# --- B 10: as many images as places ---


@pytest.mark.parametrize("family", families.KINDS)
@torch.no_grad()
def test_b10_attach_refuses_more_images_than_places(family):
    """Surplus in the first row, so that the second one would be answered on the wrong picture."""
    model = families.model(family)
    talks = [families.talk(family, "t3 i t4", 1), families.talk(family, "t2 i t3", 2)]
    more = [families.Talk(talks[0].ids, talks[0].labels, talks[0].given * 2), talks[1]]
    fewer = [families.Talk(talks[0].ids, talks[0].labels, []), talks[1]]
    with libra.attach(model, Compression(method="libra", layers=(2,))):
        model(**families.collate(family, talks))
        for wrong in (more, fewer):
            with pytest.raises((ValueError, RuntimeError, IndexError, StopIteration)):
                model(**families.collate(family, wrong))


# --- B 11: a call's state ends with the call, whatever ends it ---


@contextmanager
def interrupted(module: torch.nn.Module, error: BaseException):
    """``module`` does not return."""

    def stop(*_):
        raise error

    hook = module.register_forward_pre_hook(stop)
    try:
        with pytest.raises(type(error)) as caught:
            yield caught
    finally:
        hook.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("where", ["vision_tower", "language_model.layers.2", "lm_head"])
@torch.no_grad()
def test_b11_an_interrupted_call_leaves_nothing_behind(where, error):
    """Neither its labels nor its choice of visual tokens; not even while its traceback is kept, as a notebook
    does."""
    model = tiny.hf_model()
    with libra.attach(model, LIBRA) as handle:
        plain_loss, plain = (
            model(**ONE).loss,
            model(input_ids=OTHER["input_ids"], pixel_values=OTHER["pixel_values"]),
        )
        stats = handle.stats
        for call in (model, model.model):
            module = model.lm_head if where == "lm_head" else model.model.get_submodule(where)
            given = {k: v for k, v in ONE.items() if call is model or k != "labels"}
            if call is model or where != "lm_head":
                with interrupted(module, error()) as kept:
                    call(**given)
                assert kept.value.__traceback__ is not None
            again = model(input_ids=OTHER["input_ids"], pixel_values=OTHER["pixel_values"])
            assert again.loss is None and torch.equal(again.logits, plain.logits) and handle.stats == stats
            body = model.model(
                input_ids=OTHER["input_ids"], pixel_values=OTHER["pixel_values"]
            ).last_hidden_state
            assert torch.equal(model.lm_head(body), plain.logits)
            assert torch.equal(model(**ONE).loss, plain_loss)
            model(input_ids=OTHER["input_ids"], pixel_values=OTHER["pixel_values"])


@torch.no_grad()
def test_b11_detaching_frees_what_an_interrupted_call_held():
    """Nothing else ends such a call: torch runs no hook after Ctrl-C."""

    def held() -> int:
        gc.collect()
        return sum(isinstance(thing, HookedForward) for thing in gc.get_objects())

    model, before = tiny.hf_model(), held()
    handle = libra.attach(model, LIBRA)
    with interrupted(model.model.language_model.layers[4].mlp, KeyboardInterrupt()) as kept:
        model(**ONE)
    del kept
    assert held() == before + 1
    handle.detach()
    assert held() == before


@torch.no_grad()
def test_b11_what_was_marked_goes_with_the_call():
    """Marked visual tokens belong to one call, also to one that fails before it reaches them, and to their
    own thread."""
    model = tiny.hf_model()
    embeds = torch.randn(1, 9, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) > 3)[None] & (torch.arange(9) < 8)[None]
    with libra.attach(model, LIBRA) as handle:
        handle.mark_visual_tokens(mask)
        with interrupted(model.model, KeyboardInterrupt()):
            model(inputs_embeds=embeds)
        with pytest.raises(ValueError, match="say it before the call"):
            model(inputs_embeds=embeds)
        handle.mark_visual_tokens(mask)
        failed = []

        def other():
            try:
                model(inputs_embeds=embeds)
            except ValueError as error:
                failed.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(failed) == 1 and "say it before the call" in failed[0]
        assert model(inputs_embeds=embeds).logits.shape[1] < 9


@torch.no_grad()
def test_b11_threads_do_not_meet():
    """One thread's labels and images are not another's, while both are on their way."""
    model, rounds = tiny.hf_model(), 12
    with libra.attach(model, LIBRA):
        wanted = [model(**given) for given in (ONE, OTHER)]
        wrong, gate = [], threading.Barrier(2)

        def work(given, want):
            for _ in range(rounds):
                gate.wait(60)
                got = model(**given)
                if not torch.equal(got.logits, want.logits) or not torch.equal(got.loss, want.loss):
                    wrong.append(given)

        threads = [threading.Thread(target=work, args=pair) for pair in zip((ONE, OTHER), wanted)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# --- B 12: only assisted generation scores by an earlier token ---


@pytest.mark.parametrize("keep", [2, 3, 5])
@torch.no_grad()
def test_b12_logits_to_keep_does_not_change_who_scores(keep):
    given = {k: v for k, v in ONE.items() if k != "labels"}
    model = tiny.hf_model()
    with libra.attach(model, Compression(method="fastv", layers=(1,), ratio=0.75)):
        want = model(**given).logits[:, -keep:]
        for cached in ({}, {"past_key_values": DynamicCache(), "use_cache": True}):
            torch.testing.assert_close(
                model(**given, **cached, logits_to_keep=keep).logits, want, atol=1e-5, rtol=1e-4
            )


# --- B 14: compact positions count on from a layer group's cache ---


@pytest.mark.parametrize("door", ["attach", "llava"])
@pytest.mark.parametrize("tail", [0, 1])
@torch.no_grad()
def test_b14_compact_positions_after_a_prompt_that_ends_with_visual_tokens(door, tail):
    """Cached decoding is the cache-free replay, and the keys' positions have no gap."""
    c, steps = Compression(method="pyramiddrop", layers=(1, 3), ratio=0.6), 4
    options = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
    for seed in range(3):  # with another picture another token is the last to stay
        if door == "attach":
            model = tiny.hf_model()
            given = prompt(5, 7, 3, tiny.IMAGE, *[8] * tail, seed=seed)
            seen = []
            hook = model.model.language_model.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(kwargs["inputs_embeds"][0]),
                with_kwargs=True,
            )
            model(**given)
            hook.remove()
            embeds, visual = seen[0], given["input_ids"][0] == tiny.IMAGE
            with libra.attach(model, c):
                out = model.generate(**given, max_new_tokens=steps, **options)
            decoder, ids = model.model.language_model, out.sequences[0, -steps:]
        else:
            model = tiny.llava_model()
            model.set_compression(c)
            row = tiny.row("t3 v16" + (" t1" if tail else ""), seed)
            embeds, visual = row.embeds, row.visual
            out = tiny.generate(model, tiny.alone(row), steps, **options)
            decoder, ids = model.model, out.sequences[0]
        longer = torch.cat([embeds, model.get_input_embeddings()(ids[:-1])])
        prefill = plain.Prefill.of(visual, len(visual) - 1, c)
        want = plain.decode(decoder, model.lm_head, longer, c, [prefill]).logits[-steps:]
        torch.testing.assert_close(torch.stack(out.logits, 1)[0], want, atol=1e-4, rtol=1e-4)


# --- B 15: vanilla, cosines, equal targets, ties ---


def test_b15_vanilla_compresses_nothing():
    for c in (Compression(method="vanilla"), "libra", None):
        with pytest.raises(ValueError, match="needs a libra.Compression that compresses"):
            libra.compress(torch.ones(1, 4, 2), torch.ones(1, 4), c)


@TORCH_AND_TRITON
def test_b15_no_cosine_is_above_one(search):
    """Pairs of the same token at every length and scale, some of which come out as 1.0000001 without a
    limit."""
    draw, found = torch.Generator().manual_seed(0), []
    for width in (3, 7, 24):
        tokens = torch.randn(1, 40, width, generator=draw) * 10 ** torch.empty(1, 40, 1).uniform_(
            -2, 2, generator=draw
        )
        groups = torch.arange(40)[None]
        for sign in (1, -1):
            found.append(search(tokens, sign * tokens, (groups, groups))[0])
    found = torch.cat(found)
    assert found.abs().max() == 1 and (found.abs() > 1 - 1e-6).all()
    alone = search(tokens, tokens, (groups, groups + 40))[0]
    assert (alone == -torch.inf).all()  # nobody to be compared with


def test_b15_at_tau_one_nothing_merges():
    hidden = torch.randn(1, 60, 24, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    out = libra.compress(hidden, torch.rand(1, 120), Compression(tau=1.0, ratio=0.5))
    assert out.compensated == [True] and (out.similarity <= 1).all()
    assert ((out.groups == 60) | torch.zeros(1, 120, dtype=torch.bool).scatter(1, out.targets, True)).all()


@TORCH_AND_TRITON
def test_b15_the_first_of_equal_targets_wins_in_every_batch(search):
    """A matrix product rounds its last columns otherwise than its first ones."""
    draw = torch.Generator().manual_seed(0)
    for width, count in (
        ((141, 7), (64, 33), (100, 18), (257, 9)) if search is not kernels.most_similar else ((37, 33),)
    ):
        others = torch.randn(1, count, width, generator=draw)
        for first, last in itertools.combinations((0, 3, count - 1), 2):
            twins = others.clone()
            twins[0, last] = twins[0, first]
            tokens = twins[:, [first]] + 0.01 * torch.randn(1, 25, width, generator=draw)
            for rows in (1, 3):
                batch = search(tokens.repeat(rows, 1, 1), twins.repeat(rows, 1, 1))[1]
                assert (batch == first).all(), (width, count, first, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [64, 33])
def test_b15_vectors_that_differ_in_a_part_of_a_word_are_not_equal(dtype, width):
    """Every fourth number is one of few; the hash reads one or two numbers as one word."""
    draw = torch.Generator().manual_seed(0)
    for part in range(4):
        rows = torch.zeros(2, 700, width, dtype=dtype)
        some = rows[..., part::4]
        some.copy_(torch.randint(0, 3, some.shape, generator=draw) - 1)
        rows[:, 500:520] = -rows[:, :20]
        rows[:, 600:] = rows[:, 100:200]
        rows[rows == 0] *= -1
        numbers = rows.float()
        equal = torch.cdist(numbers, numbers, 1) == 0
        assert first_equal(rows).equal(equal.int().argmax(2)), part
    spans = torch.arange(700).div(200, rounding_mode="floor").expand(2, -1)
    equal &= spans[:, :, None] == spans[:, None]
    assert first_equal(rows, spans).equal(equal.int().argmax(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_b15_vectors_of_powers_of_two_are_told_apart(dtype):
    """Their bits end in zeros: of 14,641 vectors of four float32 numbers 1,254 were taken for others."""
    numbers = (0, 0.25, -0.25, 0.5, -0.5, 1, -1, 2, -2, 4, -4)
    whole = torch.tensor(list(itertools.product(numbers, repeat=4)), dtype=dtype)
    pairs = torch.combinations(torch.arange(66))  # in a wide vector of ones two places differ
    apart = torch.ones(len(pairs), 24, 66, dtype=dtype)
    others = [pair for pair in itertools.product((0, 1, -1, 2, -2), repeat=2) if pair != (1, 1)]
    index = pairs[:, None].expand(-1, 24, -1)
    apart.scatter_(2, index, torch.tensor(others, dtype=dtype).expand_as(index))
    twice = apart.flatten(0, 1).unique(dim=0)
    for rows in (whole, twice):
        assert first_equal(rows[None])[0].equal(torch.arange(len(rows)))


@pytest.mark.parametrize("dtype, number", [(torch.bfloat16, torch.int16), (torch.float32, torch.int32)])
def test_b15_a_word_and_its_complement_are_not_equal(dtype, number):
    """Each number is a word by itself."""
    rows = torch.ones(1, 2, 33, dtype=dtype)
    rows[0, 1, 5] = (~rows[0, 1, 5:6].view(number)).view(dtype)[0]
    assert rows[0, 1, 5] < -3.9 and first_equal(rows).tolist() == [[0, 1]]


def test_b15_ties_of_information_do_not_depend_on_the_batch():
    """Equal α: tokens that have a twin are all equally redundant, and so are two that are each other's
    nearest."""
    draw = torch.Generator().manual_seed(1)
    one, noise = torch.randn(1, 40, 33, generator=draw), torch.randn(1, 40, 33, generator=draw)
    twins = torch.stack([one, 3 * one], 2).flatten(1, 2)
    pairs = torch.stack([one, one + 0.1 * noise], 2).flatten(1, 2)
    for hidden, ratio in ((twins, 0.5), (pairs, Fraction(43, 80)), (pairs, Fraction(19, 80))):
        c = Compression(select="information", merge="drop", ratio=ratio)
        more = torch.randn(4, 96, 33, generator=draw)
        more[2, :80] = hidden[0]
        together = libra.compress(more, torch.full((4, 96), 0.25), c, lengths=[96, 96, 80, 96])
        alone = libra.compress(hidden, torch.full((1, 80), 0.25), c)
        targets = alone.targets[0].tolist()
        assert targets == together.targets[2, : len(targets)].tolist()
        if hidden is twins:
            assert targets == list(range(40))
        else:
            assert [token % 2 for token in targets if token ^ 1 not in targets] == [0]


# --- B 16: what a select and a merge of one's own have to return ---


@pytest.fixture
def own():
    """Registers a select or a merge under the name "own", for one test."""
    before = [(table, dict(table)) for table in (SELECTORS, MERGERS)]

    def own(function=None, **keys):
        """The outcome on two ragged rows of two spans."""
        hidden, alpha = (
            torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)),
            torch.rand(2, 12) + 0.1,
        )
        return libra.compress(hidden, alpha, Compression(ratio=0.5, **keys), spans=[[8, 4], [6, 3]])

    yield own
    for table, old in before:
        table.clear()
        table.update(old)


SELECTS = {
    "nobody": (
        lambda x, c: torch.zeros_like(x.layout.valid),
        "chose 0 targets in span 0 of row 0, which keeps 4",
    ),
    "everybody": (lambda x, c: x.layout.valid, "chose 8 targets in span 0 of row 0, which keeps 4"),
    "another span's": (
        lambda x, c: top_of_span(-x.layout.index.float().expand(2, -1), x.layout).roll(2, 1),
        "chose",
    ),
    "padding": (
        lambda x, c: top_of_span(x.importance, x.layout) | ~x.layout.valid,
        "in the padding of row 1, which keeps 0",
    ),
    "numbers": (
        lambda x, c: x.importance,
        r"returned \(2, 12\) torch.float32; it has to return \(2, 12\) bool",
    ),
    "a row": (lambda x, c: x.layout.valid[0], r"returned \(12,\) torch.bool"),
    "nothing": (lambda x, c: None, "returned NoneType"),
}


@pytest.mark.parametrize("name", SELECTS)
def test_b16_a_select_keeps_to_the_contract(own, name):
    function, words = SELECTS[name]
    libra.register_select("own")(function)
    with pytest.raises(ValueError, match=f"select own .*{words}") as error:
        own(select="own")
    refused(error)


MERGES = {
    "a slot that is not there": (
        lambda m: (m.own_slot.masked_fill(~m.is_target, 99), m.pull),
        "slot 99; a target stays",
    ),
    "another span's target": (lambda m: (m.own_slot.masked_fill(~m.is_target, 5), m.pull), "slot 5; "),
    "targets that move": (
        lambda m: (torch.full_like(m.own_slot, m.compensation), m.pull),
        "a target stays in its own slot",
    ),
    "everybody dropped": (
        lambda m: (torch.full_like(m.own_slot, -1), m.pull),
        "a target stays in its own slot",
    ),
    "NaN": (lambda m: (m.nearest[1], m.pull * torch.nan), "a weight's logit nan"),
    "infinite": (lambda m: (m.nearest[1], (m.pull * 0).log()), "a weight's logit -inf"),
    "floats for slots": (lambda m: (m.nearest[1].float(), m.pull), "torch.float32 slots"),
    "one tensor": (lambda m: m.nearest[1], r"two tensors of \(2, 12\)"),
    "other shapes": (lambda m: (m.targets, m.pull), r"two tensors of \(2, 12\)"),
}


@pytest.mark.parametrize("name", MERGES)
def test_b16_a_merge_keeps_to_the_contract(own, name):
    function, words = MERGES[name]
    libra.register_merge("own")(lambda matches, c: function(matches))
    with pytest.raises(ValueError, match=f"merge own .*{words}") as error:
        own(merge="own")
    refused(error)


def test_b16_what_keeps_to_the_contract_is_taken(own):
    """Any float logits, -1 and the compensation token; every row of W that a row has sums to 1."""

    @libra.register_select("own")
    def last(candidates, c):
        return top_of_span(candidates.layout.index.expand_as(candidates.importance), candidates.layout)

    @libra.register_merge("own")
    def mixed(matches, c):
        odd = matches.layout.index % 3
        rest = torch.where(odd == 0, matches.nearest[1], torch.where(odd == 1, -1, matches.compensation))
        return torch.where(matches.is_target, matches.own_slot, rest), matches.pull.double() * 1e3

    out = own(select="own", merge="own")
    assert out.tokens.isfinite().all() and out.compensated == [True, True]
    torch.testing.assert_close(out.weights.sum(-1)[out.mask], torch.ones(int(out.mask.sum())))
    assert out.targets[0].tolist() == [4, 5, 6, 7, 10, 11]


def test_b16_taken_names_are_refused(own):
    def mine(candidates, c):
        return top_of_span(candidates.importance, candidates.layout)

    for register, names in ((libra.register_select, list(SELECTORS)), (libra.register_merge, list(MERGERS))):
        for name in names:
            with pytest.raises(ValueError, match=f"{name} is taken by libra.*; choose another name") as error:
                register(name)(mine)
            refused(error)
        for name in (mine, "", "a\nb", None):
            with pytest.raises(ValueError, match="takes a name: write @register_") as error:
                register(name)
            refused(error)
        assert (
            register("own")(mine) is mine and register("own")(mine) is mine
        )  # a notebook's cell that is run again
        with pytest.raises(ValueError, match="own is taken by"):
            register("own")(lambda candidates, c: None)
    assert SELECTORS["topk"].function.__module__ == "libra.select"


# --- E 3: rounding, float64, odd inputs ---


def test_e3_halves_go_to_the_even_number():
    wrong = 0
    for bottom in (2, 3, 6, 7, 10, 30, 100, 1000):
        for top in range(0, bottom, max(1, bottom // 20)):
            for n in (*range(1, 26), 75, 135, 256, 576, 2880):
                exact = (1 - Fraction(top, bottom)) * n
                for name, whole in (
                    ("round", round(exact)),
                    ("floor", exact.__floor__()),
                    ("ceil", exact.__ceil__()),
                ):
                    assert kept(n, top / bottom, name) == min(n, max(1, whole)), (n, top, bottom, name)
                wrong += round((1 - top / bottom) * n) != round(exact)
    assert wrong > 5  # floats would have got that many wrong, such as 4.5 of 15 at 0.7


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.places])
@torch.no_grad()
def test_e3_ratio_zero_changes_no_bit_of_a_float64_model(method):
    """Through both doors, padded and not."""
    hf, ours = tiny.hf_model().double(), tiny.llava_model().double()
    c = Compression(method=method, layers=(0, 2, 4), ratio=0.0)
    ids = torch.tensor([[5, 7, *[tiny.IMAGE] * 16, 6], [0, 5, *[tiny.IMAGE] * 16, 8]])
    draw = torch.Generator().manual_seed(0)
    given = dict(
        input_ids=ids,
        attention_mask=(ids > 0).long(),
        pixel_values=torch.randn(2, 3, 56, 56, generator=draw, dtype=torch.float64),
    )
    rows = tiny.collate([tiny.row("t3 v12 t4", 1), tiny.row("t2 v5 t1", 2)])
    rows["inputs_embeds"] = rows["inputs_embeds"].double() / 3
    plain, valid = hf(**given).logits, given["attention_mask"].bool()
    with libra.attach(hf, c):
        assert torch.equal(hf(**given).logits[valid], plain[valid])
    plain, valid = ours(**rows).logits, rows["attention_mask"].bool()
    ours.set_compression(c)
    assert torch.equal(ours(**rows).logits[valid], plain[valid])


def test_e3_odd_inputs_of_compress_are_sentences():
    hidden, alpha = torch.randn(2, 6, 3), torch.rand(2, 6)
    nan, infinite = alpha.clone(), alpha.clone()
    nan[1, 2], infinite[0, 5] = torch.nan, torch.inf
    broken = hidden.clone()
    broken[1, 4, 0] = torch.inf
    for given, words in (
        ((hidden[:0], alpha[:0]), "none of them 0"),
        ((hidden[:, :0], alpha[:, :0]), "none of them 0"),
        ((hidden[:, :, :0], alpha), "none of them 0"),
        ((hidden.long(), alpha), "hidden must be floating-point numbers .* are torch.int64"),
        ((hidden > 0, alpha), "are torch.bool"),
        ((hidden + 0j, alpha), "are torch.complex64"),
        ((hidden, alpha + 0j), "importance real"),
        ((hidden, nan), "importance has NaN or infinite numbers"),
        ((hidden, infinite), "importance has NaN or infinite numbers"),
        ((broken, alpha), "hidden has NaN or infinite numbers"),
        ((hidden.tolist(), alpha), "must be tensors, not list"),
        ((hidden, None), "reads the importance of the visual tokens; give it"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            libra.compress(*given, Compression())
        refused(error)
    for keys in (
        {"lengths": [5.5, 6]},
        {"lengths": torch.tensor([5.0, 6.5])},
        {"lengths": 6},
        {"lengths": ["6", "6"]},
        {"lengths": [[6], [6]]},
        {"spans": [6, 6]},
        {"spans": [[3, 3], None]},
        {"spans": [[-1, 7], [6]]},
    ):
        with pytest.raises(
            ValueError, match="lengths and spans must describe 2 rows|every row needs 1 to 6"
        ) as error:
            libra.compress(hidden, alpha, Compression(), **keys)
        refused(error)
    nan[1, 2] = 0.5
    nan[:, 5], broken[:, 4:] = torch.nan, torch.nan  # padding may hold anything
    out = libra.compress(broken, nan, Compression(), lengths=[4, 3])
    assert out.tokens[0].isfinite().all() and out.tokens.shape[1] in (2, 3)


# --- B 17: what docs/method.md says of SparseVLM ---


def test_b17_the_docs_know_sparsevlms_lists():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    for method, counts in (("sparsevlm", "300, 200, 110"), ("sparsevlm-v2", "300, 200, 118")):
        said = text.split(f"\n## {method}\n")[1].split("\n## ")[0]
        assert "published counts" in said and counts in said


# --- D 7: what cannot work is a sentence ---


@torch.no_grad()
def test_d7_a_compressed_cache_without_its_compression():
    """Through attach and detach, and through llava's switch; an empty or evenly filled cache goes on."""
    model, follow = tiny.hf_model(), {"input_ids": torch.tensor([[7]]), "use_cache": True}
    given = {k: v for k, v in ONE.items() if k != "labels"}
    with libra.attach(model, LIBRA):
        cache = model(**given, use_cache=True).past_key_values
        model(**follow, past_key_values=cache)
        even = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=r"filled with compression after layers \[1, 3\].* start with an empty cache"
    ) as error:
        model(**follow, past_key_values=cache)
    refused(error)
    assert model(**follow, past_key_values=even).logits.shape[1] == 1
    with libra.attach(model, LIBRA):
        assert model(**follow, past_key_values=cache).logits.shape[1] == 1

    ours, row = tiny.llava_model(), tiny.alone(tiny.row("t3 v12 t4", 1))
    ours.set_compression(LIBRA)
    cache = ours(**row, use_cache=True).past_key_values
    ours.set_compression(None)
    with pytest.raises(ValueError, match="filled with compression"):
        ours(torch.tensor([[7]]), past_key_values=cache, use_cache=True)


def test_d7_an_attached_model_is_not_pickled(tmp_path):
    model = tiny.hf_model()
    with libra.attach(model, LIBRA) as handle:
        for what in (model, model.model.language_model, handle):
            with pytest.raises(pickle.PicklingError, match="detach first") as error:
                pickle.dumps(what)
            refused(error)
        with pytest.raises(pickle.PicklingError, match="detach first"):
            torch.save(model, tmp_path / "model.pt")
        copied = copy.deepcopy(model)
    pickle.dumps(model)
    libra.detach(copied)
    assert type(copied.model.language_model) is type(model.model.language_model)


# --- E 2: handles ---


@torch.no_grad()
def test_e2_a_second_detach_of_an_old_handle_leaves_the_new_attachment_alone():
    model = tiny.hf_model()
    given = {k: v for k, v in ONE.items() if k != "labels"}
    before = model(**given).logits
    old = libra.attach(model, LIBRA)
    compressed = model(**given).logits
    old.detach()
    with libra.attach(model, LIBRA) as new:  # the very same Compression
        old.detach()
        assert torch.equal(model(**given).logits, compressed) and new.stats is not None
        one, handle = copy.deepcopy((model, new))
        handle.detach()
        handle.detach()
        assert torch.equal(model(**given).logits, compressed) and torch.equal(one(**given).logits, before)
    assert torch.equal(model(**given).logits, before)


@torch.no_grad()
def test_e2_a_dropped_handle_says_so_and_the_model_can_be_given_back():
    model = tiny.hf_model()
    given = {k: v for k, v in ONE.items() if k != "labels"}
    before = model(**given).logits
    libra.detach(model)  # nothing to do
    libra.attach(model, LIBRA)
    with pytest.warns(UserWarning, match=r"handle of libra.attach is gone .* libra\.detach\(model\)"):
        assert model(**given).logits.shape[1] < before.shape[1]
    with pytest.raises(
        ValueError, match=r"attached to this model already; detach it first, .* libra\.detach\(model\)"
    ):
        libra.attach(model, LIBRA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**given)  # once is enough
        libra.detach(model)
        assert torch.equal(model(**given).logits, before) and not model._forward_hooks
        with libra.attach(model, LIBRA):
            model(**given)


# --- B 10, D 7, E 4 and D 9 on a llava model that sees images ---


@pytest.fixture(scope="module")
def seeing():
    """A llava model with its vision tower, of 36 visual tokens an image, and its tokenizer."""
    tokenizer, model, processor, _ = load_pretrained_model(
        str(ROOT / "mini" / "checkpoint"), None, "llava", device="cpu"
    )
    return model, tokenizer, processor


def pictures(model, count: int) -> torch.Tensor:
    edge = model.get_vision_tower().config.image_size
    return torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(0))


PLACE = torch.tensor([[5, 6, IMAGE_TOKEN_INDEX, 7, 8], [5, IMAGE_TOKEN_INDEX, 9, 10, 11]])


@torch.no_grad()
def test_b10_llava_refuses_more_images_than_places(seeing):
    """In every way a picture can come in: forward, loss, generate, the original's preparation."""
    model = seeing[0]
    for compression in (None, LIBRA):
        model.set_compression(compression)
        calls = (
            lambda ids, images: model(ids, images=images),
            lambda ids, images: model(ids, images=images, labels=ids.clamp(min=0)),
            lambda ids, images: model.generate(ids, images=images, max_new_tokens=1, pad_token_id=0),
            lambda ids, images: model.prepare_inputs_labels_for_multimodal(
                ids, None, None, None, None, images
            ),
        )
        for call in calls:
            call(PLACE, pictures(model, 2))
            for count in (1, 3):
                with pytest.raises(
                    ValueError, match=f"the prompts need 2 images .* but {count} were given"
                ) as error:
                    call(PLACE, pictures(model, count))
                refused(error)
    model.set_compression(None)


@torch.no_grad()
def test_d7_llava_reads_its_prompt_in_one_piece(seeing):
    model = seeing[0]
    with pytest.raises(
        ValueError, match="prefill_chunk_size: a llava model reads its prompt in one piece"
    ) as error:
        model.generate(PLACE, images=pictures(model, 2), prefill_chunk_size=8)
    refused(error)


def between(trace) -> Compression:
    """A compression whose τ lies between the least similar tokens of two rows, so that one gets a
    compensation token."""
    least = [float(row.stages[0].similarity.min()) for row in trace]
    return Compression(layers=(1,), tau=sum(least) / 2)


LOOSE = Compression(layers=(1,), tau=-1)
LABELS = pytest.mark.parametrize("labelled", [False, True], ids=["plain", "labels"])


@LABELS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_e4_llavas_logits_keep_the_side_of_the_configuration(seeing, side, labelled, monkeypatch):
    """Rows of one length, of which one gets a compensation token; ``generate`` needs the left."""
    model = seeing[0]
    given = {"input_ids": PLACE, "images": pictures(model, 2) * torch.tensor([3.0, 0.01]).view(2, 1, 1, 1)}
    if labelled:
        given["labels"] = torch.where(torch.arange(5) == 4, PLACE, -100)
    monkeypatch.setattr(model.config, "tokenizer_padding_side", side)
    model.set_compression(LOOSE, trace=True)
    model(**given)
    model.set_compression(between(model.compression_trace))
    logits, stats = model(**given).logits, model.compression_stats
    assert sorted(stats["compensation_tokens"][1]) == [0, 1] and stats["padding"] == side
    for b in range(2):
        alone = model(**{name: value[b : b + 1] for name, value in given.items()}).logits[0]
        assert len(alone) == stats["columns"][b]
        torch.testing.assert_close(tiny.own(logits[b], len(alone), side), alone, atol=1e-3, rtol=1e-3)
    model.generate(PLACE, images=given["images"], max_new_tokens=1, pad_token_id=0)
    assert model.compression_stats["padding"] in ("left", None)
    model.set_compression(None)


@LABELS
@torch.no_grad()
def test_d9_attach_tells_on_which_side_the_logits_are_padded(labelled):
    """Rows of one length stay right-aligned, with labels and without, as generation needs them."""
    model, one = tiny.hf_model(), prompt(5, tiny.IMAGE, 6, 8, answer=labelled)
    given = {name: torch.cat([value, value]) for name, value in one.items()}
    given["pixel_values"][1] = 0.0
    with libra.attach(model, LOOSE, trace=True) as handle:
        model(**given)
        c = between(handle.trace)
    with libra.attach(model, c) as handle:
        logits, stats = model(**given).logits, handle.stats
        assert (
            sorted(stats["columns"]) == [logits.shape[1] - 1, logits.shape[1]] and stats["padding"] == "left"
        )
        for b in range(2):
            alone = model(**{name: value[b : b + 1] for name, value in given.items()}).logits[0]
            assert handle.stats["padding"] is None and handle.stats["columns"] == [len(alone)] == [
                stats["columns"][b]
            ]
            torch.testing.assert_close(logits[b, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


# --- what a person met who tried to break the plug-in ---


@torch.no_grad()
def followed(model, name: str, rows: list, *turns: int) -> torch.Tensor:
    """(turns, B, V): what is said after a batch of prompts, and after turns of so many words on its cache."""
    given = zoo.collate(name, rows)
    mask, said, cache = given["attention_mask"], [], None
    for words in (0, *turns):
        if words:
            ids = torch.arange(5, 5 + words).expand(len(rows), -1)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            given = {"input_ids": ids, "attention_mask": mask, **cache_argument(cache)}
        output = model(**given, use_cache=True)
        cache = cache_of(output)
        said.append(output.logits[:, -1])
    return torch.stack(said)


@pytest.mark.parametrize(
    "name",
    [
        f"{family}ForConditionalGeneration"
        for family in ("Gemma3", "Gemma4Unified", "Inkling", "PaliGemma")
        if f"{family}ForConditionalGeneration" in zoo.NAMES  # a version may lack some
    ],
)
@pytest.mark.parametrize(
    "keys",
    [
        dict(layers=(1, 3), ratio=0.0),  # a stage that begins with a window and goes on with full attention
        dict(layers=(1, 3), ratio=0.75),  # a row has more padding than a stage has keys
        dict(method="divprune", keep=2),  # no layer holds all columns
    ],
    ids=["zero", "layers", "input"],
)
def test_a_later_turn_of_a_padded_batch_where_the_model_makes_the_masks(name, keys):
    """Its own columns were hidden from a row, or another's padding was seen by it, without a word."""
    model, c = zoo.model(name), Compression(**keys)
    rows = [zoo.talk(name, pattern, seed) for seed, pattern in enumerate(("t4 i i i t5", "t2 i t7", "t5"))]
    with libra.attach(model, c):
        together = followed(model, name, rows, 1, 3, 1, 2)
        for row, talk in enumerate(rows):
            alone = followed(model, name, [talk], 1, 3, 1, 2)
            torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=1e-4)


OUTSIDES = {
    "model": lambda model: model(**OTHER_ASKED).logits,
    "body": lambda model: model.model(**OTHER_ASKED).last_hidden_state,
    "decoder": lambda model: model.model.language_model(torch.tensor([[5, 6, 7]])).last_hidden_state,
    "generate": lambda model: model.generate(**OTHER_ASKED, max_new_tokens=3, pad_token_id=0),
}
INSIDES = (
    "vision_tower",
    "language_model.layers.0",
    "language_model.layers.1.self_attn",
    "language_model.layers.2",
    "language_model.norm",
)


@pytest.mark.parametrize(
    "outside, inside", [p for p in itertools.product(OUTSIDES, INSIDES) if p != ("decoder", INSIDES[0])]
)
@pytest.mark.parametrize("method", ["libra", "pyramiddrop"])
@torch.no_grad()
def test_a_model_that_is_called_inside_its_own_call(outside, inside, method):
    """By somebody's hook, say: each call has its own visual tokens, masks and statistics."""
    model, called = tiny.hf_model(), []

    def call_again(*_):
        if not called:
            called.append(None)
            called.append(OUTSIDES[outside](model))

    asked = {k: v for k, v in ONE.items() if k != "labels"}
    with libra.attach(model, Compression(method=method, layers=(1, 3), ratio=0.5)) as handle:
        inner, outer, stats = OUTSIDES[outside](model), model(**ONE), None
        outer, stats = (outer.loss, model(**asked).logits), handle.stats
        module = model.model.get_submodule(inside)
        for given, want in ((asked, outer[1]), (ONE, outer[0])):
            called.clear()
            hook = module.register_forward_pre_hook(call_again)
            got = model(**given)
            hook.remove()
            assert torch.equal(got.logits if given is asked else got.loss, want) and handle.stats[
                "given"
            ] == [16]
            assert torch.equal(called[1], inner)
            assert given is ONE or handle.stats == stats


@torch.no_grad()
def test_an_emptied_cache_goes_to_another_compression_and_to_a_model_of_fewer_layers():
    model, given = tiny.hf_model(), {k: v for k, v in ONE.items() if k != "labels"}
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers = 4
    config.text_config.layer_types = (getattr(config.text_config, "layer_types", None) or [])[:4] or None
    small, cache = type(model)(config).eval(), DynamicCache()
    for one, c in ((model, LIBRA), (model, Compression(method="fastv", layers=(2,))), (small, LIBRA)):
        with libra.attach(one, c) as handle:
            want, stats = one(**given, use_cache=True).logits, handle.stats
            assert torch.equal(one(**given, use_cache=True, **cache_argument(cache)).logits, want)
            assert handle.stats == stats
        cache.reset()


@torch.no_grad()
def test_the_next_layers_score_in_a_later_turn_where_attention_has_a_bias():
    name = "InklingForConditionalGeneration"
    if name not in zoo.NAMES:
        pytest.skip("this version lacks the class")
    model, given = zoo.model(name), zoo.collate(name, [zoo.talk(name, "t2 i t3", 0)])
    with libra.attach(model, "pyramiddrop", layers=(1, 3), ratio=0.5, positions="original"):
        cache = cache_of(model(**given, use_cache=True))
        given["attention_mask"] = torch.cat([given["attention_mask"]] * 2, 1)
        with pytest.raises(ValueError, match="score_layer: next .* choose score_layer: same") as error:
            model(**given, use_cache=True, **cache_argument(cache))
        refused(error)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("third", ["t3", "t1 i t1"])
@pytest.mark.parametrize("method", ["libra", "pyramiddrop", "divprune", "dart", "sparsevlm"])
@torch.no_grad()
def test_a_row_of_nothing_but_padding_changes_no_other(method, third, side):
    name = "LlavaForConditionalGeneration"
    # The first two rows are padded, too, or neither of them is.
    for rows in (["t4 i t5", "t6 i t1"], ["t4 i t5", "t5 i t4"]):
        talks = [zoo.talk(name, pattern, seed) for seed, pattern in enumerate([*rows, third])]
        given, without = zoo.collate(name, talks, side), zoo.collate(name, talks[:2], side)
        given["attention_mask"][2] = 0
        with libra.attach(zoo.model(name), method) as handle:
            want, stats = zoo.model(name)(**without).logits, handle.stats
            got = zoo.model(name)(**given).logits
            assert handle.stats["columns"] == [*stats["columns"], 0]
            assert handle.stats["given"] == [*stats["given"], 0]
        for b, length in enumerate(stats["columns"]):
            own = slice(-length, None) if side == "left" else slice(length)
            torch.testing.assert_close(got[b, own], want[b, own], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("piece", [3, 1])
@pytest.mark.parametrize("positions", ["original", "compact", "centre"])
@pytest.mark.parametrize("method", ["libra", "pyramiddrop", "divprune"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_row_begins_in_a_later_call(attention, method, positions, piece):
    """As in a prompt that is padded on the left and read in pieces."""
    name = "LlavaForConditionalGeneration"
    model = zoo.own_model(name)
    model.set_attn_implementation(attention)
    early, late = zoo.talk(name, "t2 i t3", 0), zoo.talk(name, "t3 i t2", 1)
    words = zoo.talk(name, f"t{zoo.collate(name, [late])['input_ids'].shape[1]}", 2)

    def said(*calls) -> torch.Tensor:
        """(calls, B, V); each call is its talks and how many of their rows are padding."""
        cache, mask, logits = None, None, []
        for talks, empty in calls:
            given = zoo.collate(name, talks)
            given["attention_mask"][len(talks) - empty :] = 0
            mask = given["attention_mask"] if mask is None else torch.cat([mask, given["attention_mask"]], 1)
            output = model(**{**given, "attention_mask": mask}, use_cache=True, **cache_argument(cache))
            cache = cache_of(output)
            logits.append(output.logits[:, -1])
        return torch.stack(logits)

    pad, some, end = (zoo.talk(name, f"t{n}", 3) for n in (2, piece, 2))
    with libra.attach(model, method, positions=positions):
        both = said(([early, pad], 1), ([some, some], 1), ([words, late], 0), ([end, end], 0))
        alone = said(([early], 0), ([some], 0), ([words], 0), ([end], 0))
        torch.testing.assert_close(both[:, 0], alone[:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(both[2:, 1], said(([late], 0), ([end], 0))[:, 0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_padded_prompt_is_read_in_pieces():
    name = "LlavaForConditionalGeneration"
    model = zoo.model(name)
    given = zoo.collate(name, [zoo.talk(name, "t4 i i t5", 0), zoo.talk(name, "t2 i t7", 1)])
    asked = dict(given, max_new_tokens=4, pad_token_id=0, do_sample=False, prefill_chunk_size=7)
    want = model.generate(**asked)
    with libra.attach(model, "libra", layers=(1, 3), ratio=0.0):
        assert torch.equal(model.generate(**asked), want)
    with libra.attach(model, "libra", layers=(1, 3), ratio=0.5):
        assert model.generate(**asked).shape == want.shape


@torch.no_grad()
def test_the_next_layers_score_in_a_later_turn_of_latent_attention(monkeypatch):
    """Whose cache holds what the heads' keys are made of."""
    name = "Kimi_K25ForConditionalGeneration"
    if name not in zoo.NAMES:
        pytest.skip("this version lacks the class")
    model, given, probes = zoo.own_model(name), zoo.collate(name, [zoo.talk(name, "t2 i t3", 0)]), []
    answer = score.Probe.read

    def read(probe, query, key, *others):
        if probe.past_keys is not None:
            probes.append(probe.past_keys)
        return answer(probe, query, key, *others)

    monkeypatch.setattr(score.Probe, "read", read)
    with libra.attach(model, "pyramiddrop", layers=(1,), ratio=0.5):
        cache = cache_of(model(**given, use_cache=True))
        attention = model.model.language_model.layers[2].self_attn
        held, keys = cache.layers[2].get_seq_length(), []
        expand = attention.expand_kv
        attention.expand_kv = lambda *latents: (keys.append(expand(*latents)), keys[-1])[1]
        given["attention_mask"] = torch.cat([given["attention_mask"]] * 2, 1)
        assert model(**given, use_cache=True, **cache_argument(cache)).logits.isfinite().all()
    # What the probe was told of earlier keys is what the layer then made of its cache.
    assert len(probes) == 1 and torch.equal(probes[0], keys[-1][0][:, :, :held])


# --- what a caller gives next to the tokens: masks, labels, columns of logits ---


@pytest.mark.parametrize("wrong", [(1, 20), (1, 22), (2, 21), (21,), (1, 21, 21), (1, 1, 21, 21)], ids=str)
@torch.no_grad()
def test_a_mask_of_another_shape_is_refused(wrong):
    """A longer one moved the visual tokens without a word."""
    model, given = tiny.hf_model(), {k: v for k, v in ONE.items() if k != "labels"}
    assert given["input_ids"].shape == (1, 21)
    with libra.attach(model, LIBRA):
        with pytest.raises(ValueError, match=r"attention mask .*(must be \(1, 21\)|detach first)") as error:
            model(**given, attention_mask=torch.ones(wrong, dtype=torch.long))
        refused(error)


@pytest.mark.parametrize("more", [1, 3])
@torch.no_grad()
def test_a_mask_of_the_new_tokens_only_is_refused(more):
    """And nothing of the call stays in the cache, which still knows that it is compressed."""
    model, given = tiny.hf_model(), {k: v for k, v in ONE.items() if k != "labels"}
    ids = torch.full((1, more), 7)
    with libra.attach(model, LIBRA):
        want = model(input_ids=ids, **cache_argument(cache_of(model(**given, use_cache=True)))).logits
        cache = cache_of(model(**given, use_cache=True))
        for width in (more, 20 + more, 22 + more):
            with pytest.raises(ValueError, match=rf"must be \(1, {21 + more}\)") as error:
                model(input_ids=ids, attention_mask=torch.ones(1, width), **cache_argument(cache))
            refused(error)
    with pytest.raises(ValueError, match="now the model is called without it"):
        model(input_ids=ids, **cache_argument(cache))
    with libra.attach(model, LIBRA):
        mask = torch.ones(1, 21 + more)
        assert torch.equal(model(input_ids=ids, attention_mask=mask, **cache_argument(cache)).logits, want)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_a_call_that_fails_leaves_a_compressed_cache_that_knows_it(error):
    """The plain model took it for one of its own."""
    model, given = tiny.hf_model(), {k: v for k, v in ONE.items() if k != "labels"}
    with libra.attach(model, LIBRA):
        cache = cache_of(model(**given, use_cache=True))
        if error is None:
            mask = torch.ones(1, 42, dtype=torch.long)
            mask[0, 24] = 0
            with pytest.raises(ValueError, match="padding on both sides or inside a row"):
                model(**given, attention_mask=mask, **cache_argument(cache))
        else:
            with interrupted(model.model.language_model.layers[0].mlp, error()):
                model(**given, **cache_argument(DynamicCache()))
            with interrupted(model.model.language_model.layers[0].self_attn, error()):
                model(torch.tensor([[5]]), **cache_argument(cache))
    with pytest.raises(ValueError, match="now the model is called without it") as caught:
        model(torch.tensor([[5]]), **cache_argument(cache))
    refused(caught)


@torch.no_grad()
def test_labels_of_another_shape_are_refused():
    model = tiny.hf_model()
    with libra.attach(model, LIBRA):
        for labels in (ONE["labels"][:, 1:], ONE["labels"].expand(2, -1), ONE["labels"][0]):
            with pytest.raises(ValueError, match=r"the labels are .* but the prompt is \(1, 21\)") as error:
                model(**{**ONE, "labels": labels})
            refused(error)


@torch.no_grad()
def test_logits_that_are_named_by_columns_of_the_prompt():
    """They were those of other columns."""
    model, asked = tiny.hf_model(), {k: v for k, v in ONE.items() if k != "labels"}
    columns = torch.tensor([3, 7])
    with libra.attach(model, LIBRA):
        with pytest.raises(ValueError, match="a tensor of logits_to_keep names columns") as error:
            model(**asked, logits_to_keep=columns)
        refused(error)
        text = torch.arange(3, 12)[None]  # nothing is compressed, and nothing moves
        torch.testing.assert_close(
            model(text, logits_to_keep=columns).logits, model(text).logits[:, columns], atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_llava_refuses_the_same():
    """And a visual mask of another shape, which it took for that of other columns."""
    model, row = tiny.llava_model(), tiny.row("t3 v16 t3", 0)
    model.set_compression(LIBRA)
    given = tiny.alone(row)
    for name in ("visual_mask", "attention_mask", "labels"):
        for shape in ((1, 21), (1, 23), (2, 22), (22,)):
            with pytest.raises(ValueError, match=r"mask|the labels are") as error:
                model(**{**given, name: torch.ones(shape, dtype=torch.long).to(given["visual_mask"].dtype)})
            refused(error)
    with pytest.raises(ValueError, match="a tensor of logits_to_keep names columns") as error:
        model(**given, logits_to_keep=torch.tensor([2, 9]))
    refused(error)


def test_marked_visual_tokens_do_not_keep_a_model_alive():
    """Of a call that never came."""
    model = tiny.hf_model()
    handle, alive = libra.attach(model, LIBRA), weakref.ref(model)
    handle.mark_visual_tokens([[True] * 4])
    handle.detach()
    with pytest.raises(ValueError, match="this compression was detached") as error:
        handle.mark_visual_tokens(torch.ones(1, 4))
    refused(error)
    del error, handle, model
    gc.collect()
    assert alive() is None


# --- detach while a call runs ---


@torch.no_grad()
def test_detach_waits_for_the_calls_of_other_threads():
    """They lost the hooks of the layers, or of the loss, that were still to come."""
    model = tiny.hf_model()
    plain = model(**ONE)
    for where in ("vision_tower", "language_model.layers.2", "language_model.norm"):
        inside, go, got = threading.Event(), threading.Event(), []
        handle = libra.attach(model, LIBRA)
        want = model(**ONE)

        def stop(*_, inside=inside, go=go):
            inside.set()
            go.wait(60)

        hook = model.model.get_submodule(where).register_forward_pre_hook(stop)
        thread = threading.Thread(target=lambda got=got: got.append(model(**ONE)))
        thread.start()
        inside.wait(60)
        threading.Timer(0.05, go.set).start()
        handle.detach()
        thread.join()
        hook.remove()
        assert torch.equal(got[0].logits, want.logits) and torch.equal(got[0].loss, want.loss)
        assert torch.equal(model(**ONE).logits, plain.logits)


@torch.no_grad()
def test_an_answer_that_another_thread_generates_ends_at_detach_with_a_sentence():
    model, begun, failed = tiny.hf_model(), threading.Event(), []
    handle = libra.attach(model, LIBRA)

    def generate():
        try:
            model.generate(**OTHER_ASKED, max_new_tokens=400, pad_token_id=0, stopping_criteria=[seen])
        except ValueError as error:
            failed.append(str(error))

    def seen(ids, scores, **_):
        begun.set()
        return torch.zeros(len(ids), dtype=torch.bool)

    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait(60)
    handle.detach()
    thread.join()
    assert len(failed) == 1 and "now the model is called without it" in failed[0]


@torch.no_grad()
def test_a_hook_inside_a_call_does_not_detach():
    model, asked, caught = tiny.hf_model(), {k: v for k, v in ONE.items() if k != "labels"}, []
    with libra.attach(model, LIBRA) as handle:
        want = model(**asked).logits

        def leave(*_):
            with pytest.raises(ValueError, match="detach after the call") as error:
                handle.detach()
            caught.append(refused(error))

        hook = model.model.language_model.layers[2].register_forward_pre_hook(leave)
        assert torch.equal(model(**asked).logits, want) and len(caught) == 1
        hook.remove()
        assert torch.equal(model(**asked).logits, want)


class Largest(TorchDispatchMode):
    """Knows how many numbers the largest tensor has that was made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("cap", [None, 30.0])
@torch.no_grad()
def test_many_rows_of_scores_are_read_in_pieces(cap):
    """Of all the text after a picture, say: they took the memory of eager attention."""
    draw, length = torch.Generator().manual_seed(0), 2200
    query = torch.randn(1, 4, length, 8, generator=draw)
    key = torch.randn(1, 2, length, 8, generator=draw)
    columns = torch.arange(100, length)[None]
    want = None
    for rows in (columns, range(100, length)):
        probe, largest = score.Probe(rows, None), Largest()
        with largest:
            probe.read(query, key, None, {"softcap": cap})
        assert probe.attention.shape == (1, length - 100, length) and largest.numbers <= 1 << 24
        want = probe.attention if want is None else want
        assert torch.equal(probe.attention, want)
    for column in (100, 1234, length - 1):
        alone = score.Probe(range(column, column + 1), None)
        alone.read(query, key, None, {"softcap": cap})
        torch.testing.assert_close(probe.attention[:, column - 100], alone.attention[:, 0])


GAPS = (
    "Cohere2VisionForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "InklingForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    "NemotronH_Omni_Reasoning_V3",
)


@pytest.mark.parametrize("name", GAPS)
@torch.no_grad()
def test_rows_of_a_later_call_that_come_to_differ_where_padding_between_counts(name):
    """The state of the shorter row decayed over it, a convolution saw it, or a window was full of it."""
    if name not in zoo.NAMES:
        pytest.skip("this version lacks the class")
    model, picture = zoo.model(name), zoo.talk(name, "i t3", 1)
    text = zoo.talk(name, f"t{len(picture.ids)}", 2)

    def said(second, rows: int = 2) -> torch.Tensor:
        """(rows, V), after a call of text and a second one."""
        first = zoo.collate(name, [zoo.talk(name, "t5", seed) for seed in range(rows)])
        cache, given = cache_of(model(**first, use_cache=True)), zoo.collate(name, second)
        given["attention_mask"] = torch.ones(rows, 5 + len(picture.ids), dtype=torch.long)
        return model(**given, use_cache=True, **cache_argument(cache)).logits[:, -1]

    with libra.attach(model, "fastv", layers=zoo.places(name)[:1], ratio=0.5):
        with pytest.raises(ValueError, match="call its rows one by one") as error:
            said([picture, text])
        refused(error)
        both, alone = said([picture, picture]), said([picture], 1)
        torch.testing.assert_close(both[0], alone[0], atol=1e-4, rtol=1e-4)
        assert said([text, text]).isfinite().all()
