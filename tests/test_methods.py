"""Methods that choose before the language model, against what the original codes keep
(tests/golden/selection), and what every method keeps to."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import libra
from libra import Compression, Context, compress, ops
from libra.methods import MERGERS, METHODS
from libra.methods.context import PER_ROW
from libra.methods.pool import windows
from libra.methods.tome import halvings, match_chain

GOLDEN = Path(__file__).parent / "golden/selection"
ALL = [name for name, method in METHODS.items() if method.compresses]


def golden(name: str) -> dict[str, torch.Tensor]:
    found = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    return {key: x.float() if x.is_floating_point() else x.long() for key, x in found.items()}


def cls_scores(data, name: str) -> torch.Tensor:
    return data[f"{name}.cls_rows"].mean(1)[:, 1:]


@pytest.mark.parametrize(
    "name, count", [("n576", 64), ("n576", 192), ("n576", 56), ("n144", 36), ("n144", 14)]
)
def test_divprune(name, count):
    data = golden("divprune")
    features = data[f"{name}.features"][None]
    out = compress(features, None, Compression(method="divprune", keep=count))
    assert torch.equal(out.targets[0], data[f"{name}_t{count}.kept"])
    assert torch.equal(ops.farthest_first(features, count)[0], data[f"{name}_t{count}.order"])
    assert torch.equal(out.tokens[0], features[0, out.targets[0]])


@pytest.mark.parametrize("name, count", [("n576", 64), ("n576", 192), ("n144b2", 36)])
def test_fastervlm(name, count):
    data = golden("fastervlm")
    context = Context(tower_cls=cls_scores(data, name))
    out = compress(
        data[f"{name}.features"], None, Compression(method="fastervlm", keep=count), context=context
    )
    assert torch.equal(out.targets, data[f"{name}_t{count}.kept"])
    assert torch.equal(out.tokens, data[f"{name}_t{count}.tokens"])


@pytest.mark.parametrize("name, count", [("n576", 64), ("n576", 192), ("n144b2", 36)])
def test_vispruner(name, count):
    data = golden("vispruner")
    features = data[f"{name}.features"]
    context = Context(tower_cls=cls_scores(data, name), tower_hidden=features)
    out = compress(features, None, Compression(method="vispruner", keep=count), context=context)
    assert torch.equal(out.targets, data[f"{name}_t{count}.kept"])


@pytest.mark.parametrize(
    "name, retention, count", [("n576", 64, 64), ("n576", 192, 192), ("n576b2", 256, 128)]
)
def test_hiprune(name, retention, count):
    data = golden("hiprune")
    received = torch.stack([data[f"{name}.shallow_received"], data[f"{name}.deep_received"]])
    batch = received.shape[1]
    context = Context(tower_received=received, grid=[[(24, 24)]] * batch)
    out = compress(
        torch.zeros(batch, 576, 1), None, Compression(method="hiprune", keep=count), context=context
    )
    assert torch.equal(out.targets, data[f"{name}_t{retention}.kept"])


@pytest.mark.parametrize("ratio, count, released", [(0.25, 36, 32), (0.5, 72, 68)])
def test_hiprune_keeps_all_tokens_where_the_code_for_qwen_keeps_fewer(ratio, count, released):
    data = golden("hiprune")
    received = torch.stack([data["qwen_n144.shallow_score"], data["qwen_n144.deep_score"]])[:, None]
    context = Context(tower_received=received, grid=[[(12, 12)]])
    out = compress(torch.zeros(1, 144, 1), None, Compression(method="hiprune", keep=count), context=context)
    theirs = set(data[f"qwen_n144_r{ratio}.kept"].tolist())
    assert len(theirs) == released < len(out.targets[0]) == count and theirs < set(out.targets[0].tolist())


def cdpruner(data, name: str, count: int, **keys):
    relevance = (
        F.normalize(data[f"{name}.image_embeds"], dim=-1) @ F.normalize(data[f"{name}.text_embeds"], dim=-1).T
    )
    c = Compression(method="cdpruner", keep=count, **keys)
    return compress(data[f"{name}.features"], None, c, context=Context(relevance=relevance.mean(-1))).targets


@pytest.mark.parametrize("count", [64, 192])
def test_cdpruner(count):
    data = golden("cdpruner")
    assert torch.equal(cdpruner(data, "n576", count), data[f"n576_t{count}.kept"])


def test_cdpruner_of_a_batch_is_that_of_its_rows_and_as_released_it_is_not():
    data = golden("cdpruner")
    alone = torch.cat([data[f"n144b2_t36.alone{row}.kept"] for row in (0, 1)])
    assert torch.equal(cdpruner(data, "n144b2", 36), alone)
    released = cdpruner(data, "n144b2", 36, as_released=True)
    assert torch.equal(released, data["n144b2_t36.kept"]) and not torch.equal(released, alone)


def test_cdpruner_goes_on_past_the_rank_of_its_kernel():
    """Eight numbers a token give a kernel of rank 8; the released code returns NaN indices there."""
    hidden = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    for relevance in (torch.rand(2, 30), torch.ones(2, 30)):
        out = compress(
            hidden, None, Compression(method="cdpruner", keep=20), context=Context(relevance=relevance)
        )
        assert out.tokens.isfinite().all()
        assert all(len(set(row)) == 20 for row in out.targets.tolist())


def test_cdpruner_by_text_embeddings_prefers_what_is_alike():
    hidden = torch.eye(6)[None]
    context = Context(text=[torch.eye(6)[[2, 4]]])
    out = compress(hidden, None, Compression(method="cdpruner", keep=2), context=context)
    assert out.targets.tolist() == [[2, 4]]


@pytest.mark.parametrize("dominant, contextual", [(54, 10), (27, 5), (109, 20)])
def test_visionzip(dominant, contextual):
    data, case = golden("visionzip"), f"d{dominant}_c{contextual}"
    cls = F.pad(data["ref.cls_attention_sum"], (1, 0))  # what [CLS] pays itself is not looked at
    context = Context(tower_cls=cls, tower_keys=data["ref.metric"], cls_first=True)
    c = Compression(method="visionzip", keep=dominant + contextual)
    out = compress(data["ref.clip_hidden_minus2"], None, c, context=context)
    for row, (tokens, targets) in enumerate(zip(out.tokens, out.targets.tolist())):
        # The original puts the contextual tokens after the dominant ones.
        order = (
            sorted(data[f"{case}.keep_indices"][row].tolist())
            + data[f"{case}.target_positions{row}"].tolist()
        )
        assert sorted(order) == targets
        released = tokens[[targets.index(number) for number in order]]
        torch.testing.assert_close(released, data[f"{case}.features"][row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("removed", [288, 192])
def test_tome(removed):
    data = golden("tome")
    into, left = match_chain(data["n576.metric"], [removed])
    rows = {token: row for row, token in enumerate(left[0].tolist())}
    assert [rows[token] for token in into[0].tolist()] == data[f"n576_r{removed}.group_of_token"].tolist()
    sizes = torch.bincount(into[0], minlength=576)[left[0]]
    assert torch.equal(sizes.float(), data[f"n576_r{removed}.size"].flatten().float())


def test_tome_in_a_chain_and_its_means():
    data = golden("tome")
    schedule = data["n144_chain.schedule_r"].tolist()
    into, left = match_chain(data["n144.x"], schedule)
    rows = {token: row for row, token in enumerate(left[0].tolist())}
    groups = torch.tensor([rows[token] for token in into[0].tolist()])
    assert torch.equal(groups, data["n144_chain.group_of_token"])
    means = torch.stack([data["n144.x"][0, groups == row].mean(0) for row in range(36)])
    torch.testing.assert_close(means, data["n144_chain.tokens"], atol=1e-5, rtol=0)


def test_tome_as_a_method_merges_everything():
    hidden = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(0))
    assert halvings(50, 9) == [25, 12, 4] and halvings(50, 50) == []
    out = compress(hidden, None, Compression(method="tome", keep=9))
    assert out.tokens.shape == (1, 9, 6) and (out.groups >= 0).all()
    for slot in range(9):
        torch.testing.assert_close(out.tokens[0, slot], hidden[0, out.groups[0] == slot].mean(0))


def context_of(batch: int, tokens: int, grid, width: int = 8) -> Context:
    draw = torch.Generator().manual_seed(1)
    return Context(
        tower_cls=torch.rand(batch, tokens, generator=draw),
        tower_received=torch.rand(2, batch, tokens, generator=draw),
        tower_keys=torch.randn(batch, tokens, 5, generator=draw),
        tower_hidden=torch.randn(batch, tokens, 7, generator=draw),
        tower_next=torch.rand(batch, tokens, generator=draw),
        tower_next_keys=torch.randn(batch, tokens, 6, generator=draw),
        relevance=torch.randn(batch, tokens, generator=draw),
        text=[torch.randn(2 + row, width, generator=draw) for row in range(batch)],
        grid=grid,
        layer_keys=torch.randn(batch, tokens, 6, generator=draw),
        text_keys=[torch.randn(2 + row, 6, generator=draw) for row in range(batch)],
        final_hidden=torch.randn(batch, tokens, width, generator=draw),
        final_text=[torch.randn(2 + row, width, generator=draw) for row in range(batch)],
    )


def importance_of(method: str, batch: int, tokens: int) -> torch.Tensor | None:
    """Scores of the decoder's attention, for the methods that go by them."""
    reads = METHODS[method].place == "layers" and Compression(method=method).reads_importance
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)) if reads else None


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("keep", [1, 5, 12, 100])
def test_a_row_of_a_ragged_batch_is_that_row_alone(method, keep):
    """Exactly min(T, n) tokens of each span, whatever stands in the padding."""
    spans, grid = [[12, 20], [6], [20, 3, 12]], [[(3, 4), (4, 5)], [(2, 3)], [(4, 5), (1, 3), (2, 6)]]
    hidden = torch.randn(3, 37, 9, generator=torch.Generator().manual_seed(0))
    context, c = context_of(3, 37, grid, width=9), Compression(method=method, keep=keep)
    scores = importance_of(method, 3, 37)
    out = compress(hidden, scores, c, spans=spans, context=context)
    hidden[0, 32:] = hidden[1, 6:] = 1e6
    assert torch.equal(compress(hidden, scores, c, spans=spans, context=context).targets, out.targets)
    for row, lengths in enumerate(spans):
        n, t = sum(lengths), sum(min(keep, length) for length in lengths)
        alone_context = Context(
            tower_cls=context.tower_cls[row : row + 1, :n],
            tower_received=context.tower_received[:, row : row + 1, :n],
            tower_keys=context.tower_keys[row : row + 1, :n],
            tower_hidden=context.tower_hidden[row : row + 1, :n],
            tower_next=context.tower_next[row : row + 1, :n],
            tower_next_keys=context.tower_next_keys[row : row + 1, :n],
            relevance=context.relevance[row : row + 1, :n],
            text=context.text[row : row + 1],
            grid=grid[row : row + 1],
            layer_keys=context.layer_keys[row : row + 1, :n],
            text_keys=context.text_keys[row : row + 1],
            final_hidden=context.final_hidden[row : row + 1, :n],
            final_text=context.final_text[row : row + 1],
        )
        own = None if scores is None else scores[row : row + 1, :n]
        alone = compress(hidden[row : row + 1, :n], own, c, spans=[lengths], context=alone_context)
        assert alone.targets.shape == (1, t) and len(set(alone.targets[0].tolist())) == t
        assert torch.equal(out.targets[row, :t], alone.targets[0])
        torch.testing.assert_close(out.tokens[row, :t], alone.tokens[0, :t])


@pytest.mark.parametrize("method", ALL)
def test_half_precision_and_gradients(method):
    hidden = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    scores, context = importance_of(method, 1, 24), context_of(1, 24, [[(4, 6)]])
    out = compress(hidden, scores, Compression(method=method, keep=6), context=context)
    assert out.tokens.dtype == torch.bfloat16 and out.mask.sum() == out.tokens.shape[1]
    out.tokens.float().sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().sum() > 0


def test_rows_that_are_repeated_keep_all_that_is_known_of_them():
    one = context_of(2, 6, [[(2, 3)], [(6, 1)]])
    three = one.repeated(3)
    three.check_rows(6)
    for name in PER_ROW:
        rows = getattr(three, name)
        assert [row is getattr(one, name)[b // 3] for b, row in enumerate(rows)] == [True] * 6
    assert torch.equal(three.tower_received[:, 4], one.tower_received[:, 1])
    assert Context().repeated(2) == Context()


def test_libra_at_the_input_is_libra_with_the_towers_scores():
    hidden, context = (
        torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0)),
        context_of(2, 24, None),
    )
    ours = compress(hidden, None, Compression(method="libra-input", ratio=0.5), context=context)
    libra_ = compress(hidden, context.tower_cls, Compression(method="libra", ratio=0.5))
    assert torch.equal(ours.targets, libra_.targets) and torch.equal(ours.tokens, libra_.tokens)
    received = Context(tower_received=context.tower_received)  # a tower without a [CLS] token
    without = compress(hidden, None, Compression(method="libra-input"), context=received)
    assert torch.equal(without.importance, context.tower_received[1])


@pytest.mark.parametrize(
    "method, context, missing",
    [
        ("libra", None, "method libra reads the importance of the visual tokens"),
        (
            "fastervlm",
            None,
            r"method fastervlm needs tower_cls or tower_received: give context=.*tower_cls=…\)",
        ),
        ("vispruner", Context(tower_cls=torch.zeros(1, 8)), "needs tower_hidden"),
        ("hiprune", Context(tower_received=torch.zeros(2, 1, 8)), "needs grid"),
        (
            "hiprune",
            Context(tower_received=torch.zeros(2, 1, 8), grid=[[(3, 3)]]),
            "9 places and its span 8 tokens",
        ),
        ("cdpruner", Context(), "needs relevance or text"),
        (
            "fastervlm",
            Context(tower_cls=torch.zeros(1, 5)),
            "context.tower_cls has 5 tokens a row; give all 8",
        ),
        ("fastervlm", Context(tower_cls=torch.zeros(2, 8)), "context.tower_cls has 2 rows, and there are 1"),
        ("fastervlm", Context(tower_cls=torch.zeros(3, 2, 8)), "context.tower_cls has 2 rows"),
        ("cdpruner", Context(text=[torch.zeros(1, 2)] * 2), "context.text has 2 rows"),
        *(
            ("evs", Context(grid=grid), r"grid: .* does not tell .* write such as \[\[\(24, 24\)\]\]")
            for grid in (
                [(2, 4)],
                [[]],
                [[(2.0, 4)]],
                [["ab"]],
                [[(-2, -4)]],
                [[(8,)]],
                [[()]],
                [[((2, 4), None)]],
                [[(2, 2)] * 2],
            )
        ),
        ("pool", Context(grid=torch.tensor([[[2, 4]]])), "grid: .* does not tell"),
    ],
)
def test_what_a_method_lacks_is_said(method, context, missing):
    with pytest.raises(ValueError, match=missing):
        compress(torch.ones(1, 8, 2), None, Compression(method=method, keep=4), context=context)


def test_a_list_of_steps_is_no_step():
    steps = [{"method": "divprune", "keep": 3}, {"method": "fastv", "layers": [3]}]
    with pytest.raises(ValueError, match="libra.compress does one step; give it one of the compression's"):
        compress(torch.ones(1, 8, 2), torch.ones(1, 8), Compression(steps=steps))


def test_needs_and_reads_name_what_exists():
    for register in (libra.register_select, libra.register_merge):
        with pytest.raises(ValueError, match="needs: tower_clss is unknown; use cls_first, final_hidden, "):
            register("mine", needs=("tower_clss",))
        with pytest.raises(ValueError, match="reads: layers is unknown; use "):
            register("mine", reads=("layers",))


def test_one_word_needs_no_list_around_it():
    libra.register_merge("mine", reads="hidden", needs="grid", follows="tome")(lambda matches, c: None)
    mine = MERGERS.pop("mine")
    assert (mine.reads, mine.needs, mine.follows) == ({"hidden"}, ("grid",), ("tome",))


def test_a_select_that_needs_nothing_runs_after_layers_too():
    c = Compression(select="divprune", merge="drop", layers=(3,), keep=4)
    assert c.at_depth(12) is c and c.place == "layers" and not c.needs


@torch.no_grad()
@pytest.mark.parametrize(
    "keys", [{"keep": 4}, {"ratio": (0.5, 0.5)}, {"select": "divprune", "merge": "drop", "keep": 4}]
)
def test_a_budget_through_a_decoder(keys):
    """16 visual tokens in three stages: 16, 8 and 4."""
    model = tiny.llava_model(layers=4)
    model.set_compression(Compression(layers=(0, 2), **keys))
    with tiny.watched() as steps:
        model(**tiny.collate([tiny.row("t3 v16 t4", 1), tiny.row("t2 v16 t1", 2)]))
    assert [step.outcome.layout.target_counts for step in steps] == [[8, 8], [4, 4]]


@pytest.mark.parametrize("count", [16, 64, 144])
def test_pool(count):
    """Where the windows divide the grid they are those of adaptive average pooling."""
    data = golden("pool")
    c = Compression(method="pool", keep=count)
    out = compress(data["n576.features"], None, c, context=Context(grid=[[(24, 24)]]))
    torch.testing.assert_close(out.tokens[0], data[f"n576_avg{count}.tokens"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("h, w", [(9, 2), (2, 9), (7, 7), (1, 5), (16, 16)])
def test_pool_s_windows_are_rectangles_around_their_middles(h, w):
    for count in range(1, h * w + 1):
        numbers, middles = windows(((h, w),), count)
        assert set(numbers) == set(range(count)) and middles == sorted(middles)
        for number, middle in enumerate(middles):
            places = [place for place in range(h * w) if numbers[place] == number]
            rows, columns = {place // w for place in places}, {place % w for place in places}
            assert len(places) == len(rows) * len(columns) and numbers[middle] == number
            assert middle == sorted(rows)[len(rows) // 2] * w + sorted(columns)[len(columns) // 2]


def test_pool_of_parts_and_of_numbers_without_factors():
    hidden = torch.arange(32.0)[None, :, None].repeat(1, 1, 2)
    parts = ((4, 4), (2, 8))
    for count in (1, 2, 7, 8, 13, 31, 32):
        out = compress(hidden, None, Compression(method="pool", keep=count), context=Context(grid=[[parts]]))
        sizes = torch.bincount(out.groups[0], minlength=count)
        assert out.tokens.shape[1] == count and (sizes > 0).all() and sizes.max() <= 2 * 32 // count + 2
        for slot in range(count):
            torch.testing.assert_close(out.tokens[0, slot], hidden[0, out.groups[0] == slot].mean(0))
            assert out.groups[0, out.targets[0, slot]] == slot
    quarters = compress(hidden, None, Compression(method="pool", keep=8), context=Context(grid=[[parts]]))
    assert quarters.groups[0, :8].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
