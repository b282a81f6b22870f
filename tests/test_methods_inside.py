"""SparseVLM and DART: what they choose against the original codes, and what the engine gives them against a
computation by hand."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from test_methods import golden
from transformers import DynamicCache

import libra
from libra import Compression, Context, compress, ops
from libra.budget import actual
from libra.config import ConfigError
from libra.methods import MERGERS, SELECTORS, dart, sparsevlm

# --- SparseVLM ---


def rows(data) -> tuple[torch.Tensor, torch.Tensor]:
    """Visual and text embeddings (1, n, D)."""
    first, text = int(data["n576.visual_start"]), int(data["n576.text_start"])
    hidden = data["n576.hidden"]
    return hidden[:, first : first + 576], hidden[:, text:]


def test_raters():
    data = golden("sparsevlm")
    visual, text = rows(data)
    everywhere = torch.ones(1, 576, dtype=torch.bool), torch.ones(1, 1, text.shape[1], dtype=torch.bool)
    weights = sparsevlm.raters(visual, text, *everywhere)[0, 0]
    chosen = data["n576.raters"]
    assert torch.equal(weights.nonzero().flatten(), chosen)
    torch.testing.assert_close(weights[chosen], torch.full((len(chosen),), 1 / len(chosen)))


CASES = ("v1_0_192_layer2", "v1_0_64_layer6", "v1_0_128_layer15", "v2_0_192_layer2", "v2_0_64_layer15")


def score(data, case: str) -> torch.Tensor:
    """(1, 576), from the attention rows of each head."""
    attention, chosen = data["n576.text_to_visual"][None], data["n576.raters"]
    rates = torch.zeros(1, attention.shape[2]).index_fill(1, chosen, 1.0).bool()
    if case.startswith("v2"):
        by_text = sparsevlm.of_strongest_heads(attention, rates, torch.ones(1, 576, dtype=torch.bool))
    else:
        by_text = attention.mean(1)
    return by_text[:, chosen].mean(1)


@pytest.mark.parametrize("case", CASES)
def test_sparsevlm(case):
    data, name = golden("sparsevlm"), f"n576_{case}"
    found, kept = score(data, case), data[f"{name}.kept"]
    torch.testing.assert_close(found[0], data[f"{name}.score"], rtol=1e-4, atol=1e-7)
    visual, _ = rows(data)
    if case.startswith("v2"):
        c = Compression(select="topk", merge="drop", keep=len(kept), importance="rater-heads", layers=(2,))
        assert torch.equal(compress(visual, found, c).targets[0], kept)
        return
    clusters, recycled = int(data[f"{name}.clusters"]), data[f"{name}.recycled"]
    count = len(kept) + clusters
    assert sparsevlm.counts(576, count) == (len(kept), len(recycled), clusters)
    out = compress(visual, found, Compression(method="sparsevlm", keep=count, layers=(2,)))
    targets = out.targets[0].tolist()
    centres = set(targets) - set(kept.tolist())
    assert len(targets) == count and len(centres) == clusters and centres <= set(recycled.tolist())
    for slot, target in enumerate(targets):
        members = (out.groups[0] == slot).nonzero().flatten().tolist()
        if target not in centres:
            assert members == [target]
            continue
        assert set(members) <= set(recycled.tolist())
        torch.testing.assert_close(out.tokens[0, slot], visual[0, members].mean(0), atol=1e-5, rtol=0)
    assert int((out.groups[0] >= 0).sum()) == len(kept) + len(recycled)


def clusters_by_hand(x: np.ndarray, count: int, nearest: int = 5) -> list[int]:
    """The centre of each row of ``x``, as density peaks are described, in loops."""
    n = len(x)
    distance = np.array([[np.sqrt(((a - b) ** 2).sum() / x.shape[1]) for b in x] for a in x])
    density = [np.exp(-np.mean(np.sort(row)[: min(nearest, count)] ** 2)) for row in distance]
    score = []
    for i in range(n):
        denser = [distance[i, j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * (min(denser) if denser else distance[i].max()))
    centres = sorted(range(n), key=lambda i: -score[i])[:count]
    return [i if i in centres else min(centres, key=lambda c: distance[i, c]) for i in range(n)]


def test_clusters_are_those_of_a_computation_in_loops():
    x = torch.randn(3, 30, 6, generator=torch.Generator().manual_seed(2)).double()
    valid = torch.ones(3, 30, dtype=torch.bool)
    for count in (1, 4, 9):
        found = ops.density_peaks(x, valid, count)
        for row in range(3):
            assert found[row].tolist() == clusters_by_hand(x[row].float().double().numpy(), count)
            assert len(set(found[row].tolist())) == count


@pytest.mark.parametrize("n, k", [(5, 5), (40, 1), (40, 3), (100, 60), (2880, 200), (12, 11)])
def test_kept_and_clusters_are_T_together(n, k):
    kept, recycled, clusters = sparsevlm.counts(n, k)
    assert kept + clusters == k and clusters <= recycled <= n - kept


# --- DART ---


DART = ("n576_lc64", "n576_lc192", "n576_up192", "n144_up36", "n144_lc36")


@pytest.mark.parametrize("case", DART)
def test_dart_in_the_order_of_pivots_that_the_original_had(case):
    data, name = golden("dart"), case.partition("_")[0]
    start, n = int(data[f"{name}.image_start"]), int(data[f"{name}.image_length"])
    hidden = torch.nn.functional.normalize(data[f"{name}.hidden"][0], dim=-1)
    keys = data[f"{name}.keys"][0].transpose(0, 1).flatten(1)
    norms = keys.abs().sum(1)
    torch.testing.assert_close(norms[start : start + n], data[f"{name}.image_key_l1"], rtol=1e-5, atol=0)
    order = data[f"{case}.pivot_order_absolute"]
    quota = torch.full((1, len(order)), int(data[f"{case}.per_pivot"]))
    pivots, kept = data[f"{case}.image_pivots"][None], data[f"{case}.kept"]
    cosines = (hidden[order] @ hidden[start : start + n].T)[None]
    found = dart.least_like(cosines, quota, pivots, len(kept))
    assert torch.equal(found[0].sort().values, kept)
    assert set(norms[start : start + n].argsort(descending=True)[: pivots.shape[1]].tolist()) == set(
        pivots[0].tolist()
    )


def dart_by_hand(hidden, keys, text, text_keys, count: int) -> list[int]:
    """In loops over Python lists: visual pivots by norm, then the text's; the first ones take one more."""
    norms = keys.abs().sum(1)
    unit, unit_text = (torch.nn.functional.normalize(x, dim=-1) for x in (hidden, text))
    pivots = norms.argsort(descending=True)[:4].tolist()
    askers = [unit[p] for p in pivots]
    askers += [unit_text[p] for p in text_keys.abs().sum(1).argsort(descending=True)[:4]]
    kept = list(pivots)
    share, more = divmod(count - len(pivots), len(askers))
    for turn, asker in enumerate(askers):
        left = [i for i in range(len(hidden)) if i not in kept]
        kept += sorted(left, key=lambda i: float(unit[i] @ asker))[: share + (turn < more)]
    return sorted(kept)


def test_dart_keeps_exactly_T_of_ragged_rows():
    data = golden("dart")
    start, n = int(data["n144.image_start"]), int(data["n144.image_length"])
    keys = data["n144.keys"].transpose(1, 2).flatten(2)
    visual, after = slice(start, start + n), slice(start + n, None)
    hidden = data["n144.hidden"]
    context = Context(
        layer_keys=keys[:, visual].repeat(2, 1, 1),
        final_hidden=hidden[:, visual].repeat(2, 1, 1),
        text_keys=[keys[0, after], keys[0, after][:2]],
        final_text=[hidden[0, after], hidden[0, after][:2]],
    )
    c = Compression(method="dart", keep=37, layers=(1,))
    zeros = torch.zeros(2, n, 4)
    out = compress(zeros, None, c, lengths=[n, 100], context=context)
    for row, length in enumerate((n, 100)):
        own = hidden[0, visual][:length], keys[0, visual][:length]
        wanted = dart_by_hand(*own, context.final_text[row], context.text_keys[row], 37)
        assert out.targets[row].tolist() == wanted
    for few in (1, 3, 5):
        c = Compression(method="dart", keep=few, layers=(1,))
        assert compress(zeros, None, c, context=context).targets.shape == (2, few)


def test_dart_needs_a_decoder_layer():
    with pytest.raises(ConfigError, match="compares keys of a decoder layer, and before the language model"):
        Compression(method="dart", at="input")


# --- what the engine gives them ---

PATTERNS = ("t3 v16 t7", "t2 v20 t4", "t1 v9 t2 v12 t6")
SIXTEEN_HEADS = dict(num_attention_heads=16, num_key_value_heads=4)


def pair() -> tuple:
    """A model and its twin with eager attention, which returns its attention."""
    model, twin = (tiny.llava_model(3, attention, **SIXTEEN_HEADS) for attention in ("sdpa", "eager"))
    twin.load_state_dict(model.state_dict())
    return model, twin


def places(row: tiny.Row) -> tuple[list[int], list[int]]:
    """The columns of visual tokens, and those of the text after the last one."""
    visual = row.visual.nonzero().flatten().tolist()
    return visual, list(range(visual[-1] + 1, len(row)))


def scores_by_hand(row: tiny.Row, attention: torch.Tensor, strongest: int) -> torch.Tensor:
    """(N,) from the attention of each head (H, S, S)."""
    visual, text = places(row)
    shares = (row.embeds[visual] @ row.embeds[text].T).softmax(1).mean(0)
    rates = [column for column, share in zip(text, shares) if share > shares.mean()]
    assert 0 < len(rates) < len(text)
    on_visual = attention[:, rates][:, :, visual]
    best = on_visual.sum((1, 2)).argsort(descending=True)[:strongest]
    return on_visual[best].mean((0, 1))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("importance, heads", [("raters", 16), ("rater-heads", 14)])
def test_scores_are_the_attention_of_the_questions_raters(importance, heads, side):
    model, twin = pair()
    rows = [tiny.row(pattern, seed) for seed, pattern in enumerate(PATTERNS)]
    c = Compression(select="topk", merge="drop", layers=(1,), ratio=0.7, importance=importance)
    model.set_compression(c)
    with tiny.watched() as steps:
        model(**tiny.collate(rows, side))
    for b, row in enumerate(rows):
        attention = twin(**tiny.alone(row), output_attentions=True).attentions[1][0]
        wanted = scores_by_hand(row, attention, heads)
        torch.testing.assert_close(
            steps[0].outcome.importance[b, : len(wanted)], wanted, atol=1e-6, rtol=1e-4
        )
    assert not torch.allclose(scores_by_hand(rows[0], attention_of(twin, rows[0]), 16), wanted[:16])


def attention_of(twin, row: tiny.Row) -> torch.Tensor:
    return twin(**tiny.alone(row), output_attentions=True).attentions[1][0]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_dart_sees_the_keys_of_its_layer_and_hidden_states_after_the_final_norm(side):
    model, twin = pair()
    rows = [tiny.row(pattern, seed) for seed, pattern in enumerate(PATTERNS[:2])]
    model.set_compression(Compression(method="dart", layers=(1,), keep=9))
    with tiny.watched() as steps:
        model(**tiny.collate(rows, side))
    for b, row in enumerate(rows):
        cache = DynamicCache(config=twin.config)
        output = twin(**tiny.alone(row), cache=cache, output_hidden_states=True)
        keys = cache.layers[1].keys[0].transpose(0, 1).flatten(1)
        hidden = twin.model.norm(output.hidden_states[2][0])
        visual, text = places(row)
        assert steps[0].targets(b) == dart_by_hand(hidden[visual], keys[visual], hidden[text], keys[text], 9)


@torch.no_grad()
@pytest.mark.parametrize("method", ["sparsevlm", "sparsevlm-v2", "dart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows_alone_and_the_counts_are_exact(method, side):
    """At the published places, a count for each: as steps."""
    model = tiny.llava_model(layers=4)
    rows = [tiny.row(pattern, seed) for seed, pattern in enumerate(PATTERNS)]
    steps = [{"method": method, "layers": [layer], "keep": keep} for layer, keep in ((0, 8), (2, 5))]
    c = Compression(steps=steps)
    model.set_compression(c)
    batch = tiny.collate(rows, side)
    whole, stats = model(**batch).logits, model.compression_stats
    assert torch.equal(model(**batch).logits, whole)
    for b, (pattern, row) in enumerate(zip(PATTERNS, rows)):
        alone = model(**tiny.alone(row)).logits[0]
        own = tiny.own(whole[b], stats["columns"][b], side)
        torch.testing.assert_close(own, alone, atol=2e-5, rtol=1e-4)
        spans = [int(part[1:]) for part in pattern.split() if part[0] == "v"]
        assert [layer[b] for layer in stats["visual_tokens"]] == actual(c, 4, spans)
        assert len(alone) == len(row) - sum(spans) + sum(min(5, n) for n in spans)


@pytest.fixture
def loudest():
    """A select by the keys of the layer that scores."""

    def choose(candidates, c):
        return candidates.top(candidates.context.layer_keys.float().abs().sum(2))

    libra.register_select("loudest", reads=("importance",), needs=("layer_keys",))(choose)
    yield dict(select="loudest", merge="drop")
    del SELECTORS["loudest"]


@pytest.mark.parametrize(
    "more",
    [{}, {"positions": "compact"}, {"positions": "centre"}, {"score_layer": "next"}],
    ids=["original", "compact", "centre", "next"],
)
@torch.no_grad()
def test_keys_that_are_compared_do_not_count_padding_where_positions_do(more, loudest):
    """Nobody gives positions, so those of a row begin after its padding."""
    model = tiny.llava_model(layers=4)
    asks = loudest if "score_layer" in more else dict(method="dart")  # which reads no score
    model.set_compression(Compression(layers=(0, 2), ratio=0.5, **asks, **more))
    rows = [tiny.row(pattern, seed) for seed, pattern in enumerate(PATTERNS)]
    batch = tiny.collate(rows, "left")
    counted = {**batch, "position_ids": torch.arange(batch["visual_mask"].shape[1])[None]}
    del batch["position_ids"]
    for given in (batch, counted):
        whole, lengths = model(**given).logits, model.compression_stats["columns"]
        for b, row in enumerate(rows):
            alone = model(**tiny.alone(row)).logits[0]
            torch.testing.assert_close(whole[b, -lengths[b] :], alone, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_positions_that_do_not_count_padding_are_taken_as_they_are():
    """Of one row that is padded, where their shape does not say whose they are."""
    model, row = tiny.llava_model(layers=4), tiny.row(PATTERNS[0], 0)
    model.set_compression(Compression(method="dart", layers=(0, 2), ratio=0.5))
    alone = model(**tiny.alone(row)).logits[0]
    batch = {name: value[:1] for name, value in tiny.collate([row, tiny.row("t3 v20 t9", 1)], "left").items()}
    assert not batch["attention_mask"].all()
    for positions in (batch["position_ids"], torch.arange(batch["attention_mask"].shape[1])[None], None):
        whole = model(**{**batch, "position_ids": positions}).logits[0]
        torch.testing.assert_close(whole[-len(alone) :], alone, atol=2e-5, rtol=1e-4)


@contextmanager
def replayed(recorded: list[tiny.Step]) -> Iterator[Compression]:
    """A compression that does at each place what was recorded there, whatever is asked."""
    turns = iter(recorded)
    now: list[tiny.Step] = []

    def select(candidates, c):
        now[:] = [next(turns)]
        outcome = now[0].outcome
        chosen = torch.zeros_like(candidates.layout.valid)
        return chosen.scatter(1, outcome.targets, outcome.layout.target_valid)

    def merge(matches, c):
        groups = now[0].outcome.groups
        return groups, torch.zeros(groups.shape)

    libra.register_select("replay", reads=())(select)
    libra.register_merge("replay", reads=(), compensates=False)(merge)
    try:
        yield Compression(
            steps=[
                {"select": "replay", "merge": "replay", "layers": [i], "keep": k} for i, k in ((0, 8), (2, 5))
            ]
        )
    finally:
        del SELECTORS["replay"], MERGERS["replay"]


@torch.no_grad()
@pytest.mark.parametrize("method", ["sparsevlm", "sparsevlm-v2", "dart"])
def test_cached_answers_are_those_of_a_pass_without_a_cache_that_replays_the_choice(method):
    model, row = tiny.llava_model(layers=4), tiny.row("t3 v20 t7", 4)
    steps = [{"method": method, "layers": [layer], "keep": keep} for layer, keep in ((0, 8), (2, 5))]
    model.set_compression(Compression(steps=steps))
    options = dict(tokens=4, return_dict_in_generate=True, output_logits=True)
    with tiny.watched() as recorded:
        output = tiny.generate(model, tiny.alone(row), **options)
    assert len(recorded) == 2
    said = model.get_input_embeddings()(output.sequences[0, :-1])
    embeds = torch.cat([row.embeds, said])[None]
    visual = torch.cat([row.visual, torch.zeros(len(said), dtype=torch.bool)])[None]
    with replayed(recorded) as c:
        model.set_compression(c)
        whole = model(inputs_embeds=embeds, visual_mask=visual).logits[0, -4:]
    torch.testing.assert_close(torch.cat(output.logits), whole, atol=2e-5, rtol=1e-4)
