"""Faults of the engine and the plug-in, one test an entry: what is right, or the sentence that refuses."""

import itertools
import re
from fractions import Fraction
from pathlib import Path

import pytest
import tiny
import torch

import libra
from libra import Compression, kernels
from libra.config import ConfigError, Row
from libra.flops import report
from libra.merge import MERGERS
from libra.methods import METHODS
from libra.schedule import actual, kept, nominal
from libra.select import SELECTORS, top_of_span
from libra.similarity import most_similar

ROOT = Path(__file__).resolve().parent.parent
TORCH_AND_TRITON = pytest.mark.parametrize(
    "search", [most_similar.__wrapped__, kernels.most_similar], ids=["torch", "triton"]
)


def refused(error) -> str:
    """The sentence of a caught error: one line."""
    text = str(error.value)
    assert text and text.isprintable() and "Traceback" not in text
    return text


# --- B 13: layers default to each method's natural places ---

PLACES = {
    "libra": {12: (2, 5, 8), 32: (7, 15, 23), 40: (9, 19, 29), 28: (6, 13, 20), 6: (1, 2, 3), 2: (0, 1), 1: (0,)},
    "pyramiddrop": {12: (2, 5, 8), 32: (7, 15, 23), 2: (0,)},
    "fastv": {12: (1,), 32: (3,), 28: (3,), 24: (2,), 80: (9,), 1: (0,)},
}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vanilla"])
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
        (dict(method="libra", layers=(7, 15, 23)), 12, r"15 is out of range: .* 0 to 11; use for example \[2, 5, 8\]"),
        (dict(method="fastv", layers=(10**30,)), 12, r"10{30} is out of range: .*; use for example \[1\]"),
        (dict(method="pyramiddrop", layers=(11,)), 12, r"11 is the last layer .*; use for example \[2, 5, 8\]"),
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


# --- B 15: vanilla, cosines, equal targets, ties ---


def test_b15_vanilla_compresses_nothing():
    for c in (Compression(method="vanilla"), "libra", None):
        with pytest.raises(ValueError, match="needs a libra.Compression that compresses"):
            libra.compress(torch.ones(1, 4, 2), torch.ones(1, 4), c)


@TORCH_AND_TRITON
def test_b15_no_cosine_is_above_one(search):
    """Pairs of the same token at every length and scale, some of which come out as 1.0000001 without a limit."""
    draw, found = torch.Generator().manual_seed(0), []
    for width in (3, 7, 24):
        tokens = torch.randn(1, 40, width, generator=draw) * 10 ** torch.empty(1, 40, 1).uniform_(-2, 2, generator=draw)
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
    for width, count in ((141, 7), (64, 33), (100, 18), (257, 9)) if search is not kernels.most_similar else ((37, 33),):
        others = torch.randn(1, count, width, generator=draw)
        for first, last in itertools.combinations((0, 3, count - 1), 2):
            twins = others.clone()
            twins[0, last] = twins[0, first]
            tokens = twins[:, [first]] + 0.01 * torch.randn(1, 25, width, generator=draw)
            for rows in (1, 3):
                batch = search(tokens.repeat(rows, 1, 1), twins.repeat(rows, 1, 1))[1]
                assert (batch == first).all(), (width, count, first, last)


def test_b15_ties_of_information_do_not_depend_on_the_batch():
    """Equal α: tokens that have a twin are all equally redundant, and so are two that are each other's nearest."""
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
        hidden, alpha = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)), torch.rand(2, 12) + 0.1
        return libra.compress(hidden, alpha, Compression(ratio=0.5, **keys), spans=[[8, 4], [6, 3]])

    yield own
    for table, old in before:
        table.clear()
        table.update(old)


SELECTS = {
    "nobody": (lambda x, c: torch.zeros_like(x.layout.valid), "chose 0 targets in span 0 of row 0, which keeps 4"),
    "everybody": (lambda x, c: x.layout.valid, "chose 8 targets in span 0 of row 0, which keeps 4"),
    "another span's": (lambda x, c: top_of_span(-x.layout.index.float().expand(2, -1), x.layout).roll(2, 1), "chose"),
    "padding": (lambda x, c: top_of_span(x.importance, x.layout) | ~x.layout.valid, "in the padding of row 1, which keeps 0"),
    "numbers": (lambda x, c: x.importance, r"returned \(2, 12\) torch.float32; it has to return \(2, 12\) bool"),
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
    "a slot that is not there": (lambda m: (m.own_slot.masked_fill(~m.is_target, 99), m.pull), "slot 99; a target stays"),
    "another span's target": (lambda m: (m.own_slot.masked_fill(~m.is_target, 5), m.pull), "slot 5; "),
    "targets that move": (lambda m: (torch.full_like(m.own_slot, m.compensation), m.pull), "a target stays in its own slot"),
    "everybody dropped": (lambda m: (torch.full_like(m.own_slot, -1), m.pull), "a target stays in its own slot"),
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
        assert register("own")(mine) is mine and register("own")(mine) is mine  # a notebook's cell that is run again
        with pytest.raises(ValueError, match="own is taken by"):
            register("own")(lambda candidates, c: None)
    assert SELECTORS["topk"].__module__ == "libra.select"


# --- E 3: rounding, float64, odd inputs ---


def test_e3_halves_go_to_the_even_number():
    wrong = 0
    for bottom in (2, 3, 6, 7, 10, 30, 100, 1000):
        for top in range(0, bottom, max(1, bottom // 20)):
            for n in (*range(1, 26), 75, 135, 256, 576, 2880):
                exact = (1 - Fraction(top, bottom)) * n
                for name, whole in (("round", round(exact)), ("floor", exact.__floor__()), ("ceil", exact.__ceil__())):
                    assert kept(n, top / bottom, name) == min(n, max(1, whole)), (n, top, bottom, name)
                wrong += round((1 - top / bottom) * n) != round(exact)
    assert wrong > 5  # floats would have got that many wrong, such as 4.5 of 15 at 0.7


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vanilla"])
@torch.no_grad()
def test_e3_ratio_zero_changes_no_bit_of_a_float64_model(method):
    """Through both doors, padded and not."""
    hf, ours = tiny.hf_model().double(), tiny.llava_model().double()
    c = Compression(method=method, layers=(0, 2, 4), ratio=0.0)
    ids = torch.tensor([[5, 7, *[tiny.IMAGE] * 16, 6], [0, 5, *[tiny.IMAGE] * 16, 8]])
    draw = torch.Generator().manual_seed(0)
    given = dict(
        input_ids=ids, attention_mask=(ids > 0).long(),
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
        ((hidden, None), "must be tensors"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            libra.compress(*given, Compression())
        refused(error)
    for keys in (
        {"lengths": [5.5, 6]}, {"lengths": torch.tensor([5.0, 6.5])}, {"lengths": 6}, {"lengths": ["6", "6"]},
        {"lengths": [[6], [6]]}, {"spans": [6, 6]}, {"spans": [[3, 3], None]}, {"spans": [[-1, 7], [6]]},
    ):
        with pytest.raises(ValueError, match="lengths and spans must describe 2 rows|every row needs 1 to 6") as error:
            libra.compress(hidden, alpha, Compression(), **keys)
        refused(error)
    nan[1, 2] = 0.5
    nan[:, 5], broken[:, 4:] = torch.nan, torch.nan  # padding may hold anything
    out = libra.compress(broken, nan, Compression(), lengths=[4, 3])
    assert out.tokens[0].isfinite().all() and out.tokens.shape[1] in (2, 3)


# --- B 17: what docs/method.md says of SparseVLM ---


def test_b17_the_docs_know_sparsevlms_lists():
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    said = " ".join(text[text.index("**SparseVLM**") :].split("\n\n")[0].split())
    assert "fixed list" in said and "300, 200, 110" in said and "is not a number of the configuration" not in said
