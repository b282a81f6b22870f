"""HoloV, VScan, MMTok, EVS, VidCom2 and PruMerge against what the original codes keep
(tests/golden/selection)."""

import pytest
import torch
from test_methods import golden

from libra import Compression, Context, compress, ops
from libra.engine.tower import one_head
from libra.methods import holov, mmtok, vidcom2

# --- HoloV ---


@pytest.mark.parametrize("name", ["n576", "n144"])
def test_holov_scores(name):
    data = golden("holov")
    features, attention = data[f"{name}.features"], data[f"{name}.attention"]
    scores = holov.token_scores(features, attention)[0]
    torch.testing.assert_close(scores, data[f"{name}.token_scores"], rtol=1e-4, atol=0)
    shares = holov.shares(features, attention)[0]
    torch.testing.assert_close(shares, data[f"{name}.block_weights"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("count", [64, 192])
def test_holov(count):
    data = golden("holov")
    features, attention = data["n576.features"], data["n576.attention"]
    quota = holov.quotas(holov.shares(features, attention), 576, count)
    assert torch.equal(quota[0], data[f"n576_t{count}.quota"])
    assert torch.equal(holov.in_order(attention, quota, count)[0], data[f"n576_t{count}.order"])
    context = Context(tower_cls=attention)
    out = compress(features, None, Compression(method="holov", keep=count), context=context)
    assert torch.equal(out.targets[0], data[f"n576_t{count}.order"].sort().values)
    assert torch.equal(out.tokens[0], features[0, out.targets[0]])


@pytest.mark.parametrize("count, lost", [(36, 7), (72, 31)])
def test_holov_keeps_all_tokens_where_the_released_code_has_rows_of_zeros(count, lost):
    data = golden("holov")
    theirs = data[f"n144_t{count}.order"]
    theirs = theirs[theirs >= 0].tolist()  # -1 is a row of zeros
    assert len(theirs) == count - lost
    context = Context(tower_cls=data["n144.attention"])
    out = compress(data["n144.features"], None, Compression(method="holov", keep=count), context=context)
    ours = out.targets[0].tolist()
    assert len(ours) == count and set(theirs) < set(ours)


# --- VScan ---


@pytest.mark.parametrize("count", [64, 192])
def test_vscan(count):
    data = golden("vscan")
    features = data["n576.features"]
    scores = torch.stack([data[f"n576.{depth}_cls"].mean(1) for depth in ("shallow", "deep")])
    c = Compression(method="vscan", keep=count)
    out = compress(features, None, c, context=Context(tower_cls=scores, grid=[[(24, 24)]]))
    kept = data[f"n576_t{count}.kept"]
    assert torch.equal(out.targets[0], kept)
    dropped = torch.ones(576, dtype=torch.bool).index_fill(0, kept, False)
    assert torch.equal(kept[out.groups[0, dropped]], data[f"n576_t{count}.assigned_to_kept"])
    merged = out.tokens[0] if count <= 128 else out.tokens[0, ::4]
    torch.testing.assert_close(merged, data[f"n576_t{count}.tokens"], atol=1e-4, rtol=0)


def test_vscan_keeps_exactly_T_and_has_windows_in_any_grid():
    """Two parts of 16 windows each: at T = 100 half of it gives each window one token."""
    draw = torch.Generator().manual_seed(0)
    scores, hidden = torch.rand(2, 1, 400, generator=draw), torch.randn(1, 400, 4, generator=draw)
    context = Context(tower_cls=scores, grid=[[((12, 20), (8, 20))]])
    out = compress(hidden, None, Compression(method="vscan", keep=100), context=context)
    assert out.targets.shape == (1, 100)
    kept = set(out.targets[0].tolist())
    for first, per_row in ((0, 3), (240, 2)):
        for top in range(4):
            for left in range(4):
                window = [
                    first + (top * per_row + y) * 20 + left * 5 + x for y in range(per_row) for x in range(5)
                ]
                assert max(window, key=lambda token: scores[0, 0, token]) in kept


# --- MMTok ---


@pytest.mark.parametrize("name, count", [("n576", 64), ("n576", 192), ("n144", 10), ("n144", 36)])
def test_mmtok(name, count):
    data = golden("mmtok")
    text, vision, clip = (data[f"{name}.{part}"] for part in ("text", "vision", "vision_clip"))
    share = torch.full((1, len(vision), len(text)), 1 / len(text))
    rows = mmtok.question_rows(ops.cosines(vision[None], text[None]), share)
    torch.testing.assert_close(rows.sum(1)[0], data[f"{name}.text_coverage_sum"], atol=1e-5, rtol=1e-3)
    every = torch.cat([rows, mmtok.picture_rows(clip[None])], 1)
    order = ops.cover_most(every, count)[0]
    assert torch.equal(order, data[f"{name}_t{count}.order"])
    gains, best = [], torch.zeros(every.shape[1])
    for pick in order.tolist():
        gains.append((every[0, :, pick] - best).clamp(min=0).sum())
        best = best.maximum(every[0, :, pick])
    torch.testing.assert_close(torch.stack(gains), data[f"{name}_t{count}.gains"], rtol=1e-3, atol=1e-7)
    context = Context(text=[text], tower_hidden=clip[None])
    out = compress(vision[None], None, Compression(method="mmtok", keep=count), context=context)
    assert torch.equal(out.targets[0], data[f"{name}_t{count}.kept"])


# --- EVS ---


def film(data, name: str) -> tuple[int, int, int]:
    frames, height, width = data[f"{name}.thw"].tolist()
    side = int(data[f"{name}.spatial_merge_size"])
    return frames, height // side, width // side


@pytest.mark.parametrize("name, q", [("t8", 0.5), ("t8", 0.75), ("t8", 0.9), ("t5", 0.3)])
def test_evs(name, q):
    data = golden("evs")
    count = int(data[f"{name}_q{q}.count"])
    frames, h, w = film(data, name)
    for grid in ((frames, h, w), ((h, w),) * frames):  # as one video, or as pictures of one span
        c, context = Compression(method="evs", keep=count), Context(grid=[[grid]])
        out = compress(data[f"{name}.embeds"][None], None, c, context=context)
        assert torch.equal(out.targets[0], data[f"{name}_q{q}.kept"])


def test_evs_scores():
    from libra.methods.evs import scores
    from libra.ops.spans import Spans
    from libra.select import Candidates

    data = golden("evs")
    frames, h, w = film(data, "t8")
    hidden = data["t8.embeds"][None]
    layout = Spans.build([[len(hidden[0])]], [[200]], "cpu")
    candidates = Candidates(hidden, hidden[..., 0], layout, context=Context(grid=[[(frames, h, w)]]))
    torch.testing.assert_close(scores(candidates)[0], data["t8.dissimilarity"], atol=1e-5, rtol=0)


def test_evs_thins_the_first_frame_out_evenly_where_not_all_of_it_can_stay():
    hidden = torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(0))
    for grid in ((2, 3, 4), (4, 6)):
        out = compress(hidden, None, Compression(method="evs", keep=4), context=Context(grid=[[grid]]))
        first = 12 if len(grid) == 3 else 24
        assert out.targets[0].tolist() == [(2 * i + 1) * first // 8 for i in range(4)]


# --- VidCom2 ---


def video(data, name: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Features (1, n, C), the frame of each, and how many frames."""
    frames, each = int(data[f"{name}.frames"]), int(data[f"{name}.tokens_per_frame"])
    return data[f"{name}.features"][None], torch.arange(frames).repeat_interleave(each)[None], frames


@pytest.mark.parametrize("name", ["t8", "t6"])
def test_vidcom2_scores(name):
    data = golden("vidcom2")
    for ours, kind in zip(vidcom2.scores(*video(data, name)), ("video", "frame")):
        torch.testing.assert_close(ours[0], data[f"{name}.{kind}_score"].flatten(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name, share", [("t8", 0.25), ("t8", 0.15), ("t6", 0.25)])
def test_vidcom2(name, share):
    """The frames' budgets are the original's; its total misses T by some, and vLLM's port mends that."""
    data = golden("vidcom2")
    features, frame, count = video(data, name)
    per_token = features.shape[1] // count
    both = vidcom2.scores(features, frame, count)
    budgets = vidcom2.budgets(both[0], frame, count, share)[0, ::per_token]
    assert torch.equal(budgets.long(), data[f"{name}_r{share}.per_frame"])
    ranks = ops.rank_within(-sum(both), frame, count)[0]
    kept = (ranks < budgets.repeat_interleave(per_token)).nonzero().flatten()
    assert torch.equal(kept, data[f"{name}_r{share}.kept"])
    side = round(per_token**0.5)
    c = Compression(method="vidcom2", ratio=1 - share, rounding="floor")
    out = compress(features, None, c, context=Context(grid=[[(count, side, side)]]))
    assert torch.equal(out.targets[0], data[f"{name}_r{share}.vllm_kept"])


# --- PruMerge ---


def reader(data, name: str) -> tuple[torch.Tensor, Context]:
    """Features (1, N, C), and what the layer that reads them says, its heads as one."""
    score, keys = one_head(data[f"{name}.q"][:, None], data[f"{name}.k"][:, None], has_cls=True)
    return data[f"{name}.hidden"][:, 1:], Context(tower_next=score[:, 1:], tower_next_keys=keys[:, 1:])


@pytest.mark.parametrize("name", ["n576a", "n144"])
def test_one_head_of_the_layer_that_reads_the_features(name):
    data = golden("prumerge")
    _, context = reader(data, name)
    torch.testing.assert_close(context.tower_next, data[f"{name}.cls_attention"], atol=1e-6, rtol=1e-4)


PRUMERGE = (
    ("n576a", "adaptive", "prumerge"),
    ("n576a", "plus", "prumerge-plus"),
    ("n144", "adaptive", "prumerge"),
    ("n144", "fixed4", "prumerge"),
)


@pytest.mark.parametrize("name, variant, method", PRUMERGE)
def test_prumerge(name, variant, method):
    data, case = golden("prumerge"), f"{name}_{variant}"
    features, context = reader(data, name)
    index = data[f"{case}.index"][0]
    c = Compression(method=method, keep=len(index) + 1, as_released=True)
    out = compress(features, None, c, context=context)
    in_order = out.order[0].argsort()  # the slot at each place
    assert torch.equal(out.targets[0, in_order[:-1]], index)
    torch.testing.assert_close(out.tokens[0, in_order], data[f"{case}.tokens"], atol=1e-4, rtol=0)
    ours = compress(features, None, Compression(method=method, keep=len(index) + 1), context=context)
    top = set(data[f"{case}.top"][0].tolist())
    kept = set(ours.targets[0].tolist())
    assert top < kept and len(kept) == len(index) + 1 and ours.order is None
    last = (set(range(features.shape[1])) - set(index.tolist())) if method == "prumerge" else kept - top
    assert max(last) in kept


@pytest.mark.parametrize("name, variant, method", [case for case in PRUMERGE if case[1] != "fixed4"])
def test_prumerge_keeps_as_many_as_the_original_of_its_own_accord(name, variant, method):
    data, case = golden("prumerge"), f"{name}_{variant}"
    features, context = reader(data, name)
    c = Compression(method=method, keep="adaptive", as_released=True)
    out = compress(features, None, c, context=context)
    in_order = out.order[0].argsort()
    assert torch.equal(out.targets[0, in_order[:-1]], data[f"{case}.index"][0])
    torch.testing.assert_close(out.tokens[0, in_order], data[f"{case}.tokens"], atol=1e-4, rtol=0)


def test_prumerge_plus_fills_up_with_even_places_between_the_outliers():
    score = torch.full((1, 40), 1.0)
    score[0, [3, 17]] = 9.0
    keys = torch.eye(40)[None]
    context = Context(tower_next=score, tower_next_keys=keys)
    out = compress(torch.ones(1, 40, 2), None, Compression(method="prumerge-plus", keep=9), context=context)
    others = [i for i in range(40) if i not in (3, 17)]
    even = [others[i] for i in range(38) if (i + 1) * 6 // 38 > i * 6 // 38]
    assert out.targets[0].tolist() == sorted([3, 17, *even, 38]) and even[-1] == 39
