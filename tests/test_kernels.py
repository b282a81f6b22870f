"""The Triton kernels against the torch functions they stand in for: as Python in Triton's interpreter, or on
a GPU.

tests/conftest.py has Triton interpret kernels where there is no GPU. That a compiler takes them too is
checked without a GPU by tests/kernel_builds.py.
"""

import inspect
import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import test_maths
import tiny
import torch
from hypothesis import given, settings

from libra import Compression, Context
from libra.budget import keeps
from libra.ops import dispatch
from libra.ops.greedy import greedy_map, pick_farthest, similarities
from libra.ops.reference import (
    best_of_intervals,
    group_softmax,
    merge_groups,
    most_similar,
    ordinals,
    score_row,
    slots_and_logits,
)
from libra.ops.spans import Spans
from libra.step import compress

kernels = pytest.importorskip("libra.ops.kernels", reason="Triton is not installed")
greedy_kernels = pytest.importorskip("libra.ops.greedy_kernels", reason="Triton is not installed")

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILDS = Path(__file__).with_name("kernel_builds.py")
SHARED_LIMIT = 99 * 1024  # bytes of shared memory of a block on consumer GPUs since Ampere
NAMES = {
    "score_row",
    "most_similar",
    "group_softmax",
    "merge_groups",
    "ordinals",
    "best_of_intervals",
    "slots_and_logits",
}
TOOLS = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin"
needs_assembler = pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump")),
    reason="a Triton without NVIDIA's assembler",
)
floats = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
# In the interpreter a row without any visible key warns where a GPU silently computes what is not used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not kernels.INTERPRETED, reason="kernels are compiled on this machine"),
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request):
    return request.param


@pytest.fixture
def launched(monkeypatch):
    """Every kernel is used, on a CPU too; which ones did their twins' work. A kernel that fails fails the
    test."""
    counts = Counter()

    def launch(name, args, kwargs):
        result = getattr(kernels, name)(*args, **kwargs)
        counts[name] += result is not NotImplemented
        return result

    monkeypatch.setattr(dispatch, "runs_kernels", lambda tensor: True)
    monkeypatch.setattr(dispatch, "_launch", launch)
    return counts


def drawn(seed: int, device: str):
    """A source of random numbers that are the same on every device."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=draw).to(dtype).to(device)

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=draw).to(device)

    return normal, whole


def same_choices(got, want, tokens, others):
    """Equal similarities and places; a place may differ only where both are as similar up to float32
    rounding."""
    torch.testing.assert_close(got[0], want[0], atol=2e-6, rtol=2e-6)
    assert got[1].dtype == torch.int64 and got[1].shape == want[1].shape
    for b, q in (got[1] != want[1]).nonzero().tolist():
        places = got[1][b, q], want[1][b, q]
        one, two = (torch.cosine_similarity(tokens[b, q].double(), others[b, k].double(), 0) for k in places)
        assert abs(one - two) < 1e-6, (b, q, places)


@pytest.mark.parametrize("dtype, heads, kv_heads, width, length, keys, picked", [
    (torch.float32, 4, 4, 16, 70, 70, 1),
    (torch.bfloat16, 4, 2, 24, 33, 83, 3),
    (torch.float16, 3, 1, 80, 5, 130, 2),
    (torch.float32, 2, 2, 136, 40, 40, 1),
    (torch.bfloat16, 34, 2, 8, 9, 20, 1),
])  # fmt: skip
def test_score_row(device, dtype, heads, kv_heads, width, length, keys, picked):
    normal, whole = drawn(heads, device)
    # As attention modules have them: views of (B, S, H, D).
    query, key = normal(2, length, heads, width, dtype=dtype), normal(2, keys, kv_heads, width, dtype=dtype)
    rows = whole(0, length, 2, picked)
    mask = whole(0, 4, 2, keys + 5) > 0
    mask[:, keys + 4 :] = True
    last, run = range(length - 1, length), range(length // 2, length // 2 + 3)
    for asked, key_mask, window in (
        (last, None, None),
        (last, mask, 5),
        (run, mask, None),
        (run, None, None),
    ):
        given = query.transpose(1, 2), key.transpose(1, 2), asked, 0.2, key_mask, window
        got, want = kernels.score_row(*given), score_row.__wrapped__(*given)
        table = torch.arange(asked.start, asked.stop, device=device).expand(2, -1)
        by_table = score_row.__wrapped__(*given[:2], table, *given[3:])
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(by_table, want, atol=2e-6, rtol=2e-5)
    for scaling, key_mask, window in (
        (0.2, None, None),
        (1.5, mask, None),
        (0.2, mask.long(), 7),
        (0.2, None, 1),
    ):
        given = query.transpose(1, 2), key.transpose(1, 2), rows, scaling, key_mask, window
        got, want = kernels.score_row(*given), score_row.__wrapped__(*given)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5, equal_nan=True)


def test_a_query_that_sees_no_key(device):
    """What torch answers, and no other row is touched by it."""
    normal, _ = drawn(0, device)
    query, key = normal(2, 2, 6, 8), normal(2, 2, 6, 8)
    rows = torch.tensor([[5, 2], [5, 1]], device=device)
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[1, :3] = False
    got = kernels.score_row(query, key, rows, 0.3, mask)
    assert got[1, 1].isnan().all() and got.isfinite().sum() == 18
    torch.testing.assert_close(got, score_row.__wrapped__(query, key, rows, 0.3, mask), equal_nan=True)


@pytest.mark.parametrize("multiprocessors", [1, 108], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("dtype, batch, count, total, width", [
    (torch.float32, 1, 1, 1, 1),
    (torch.bfloat16, 2, 45, 170, 40),
    (torch.float16, 1, 130, 67, 100),
    (torch.float32, 2, 33, 65, 36),
])  # fmt: skip
def test_most_similar(device, dtype, multiprocessors, batch, count, total, width, monkeypatch):
    """Large tiles and no splits as where there is much to do, small tiles and splits as where there is
    little."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: multiprocessors)
    normal, whole = drawn(width, device)
    tokens, others = (
        normal(batch, count + 2, width, dtype=dtype)[:, 1:-1],
        normal(batch, total, width, dtype=dtype),
    )
    tokens[0, 0] = 0
    others[:, total // 2] = 0
    groups = whole(-1, 3, batch, count), whole(0, 4, batch, total)
    among = groups[1][:, :count], groups[1]
    for asked in ((tokens, others), (tokens, others, groups), (others[:, :count], others, among, False)):
        got, want = kernels.most_similar(*asked), most_similar.__wrapped__(*asked)
        same_choices(got, want, *asked[:2])


@floats
@pytest.mark.parametrize("multiprocessors", [1, 108], ids=["one split", "many splits"])
def test_the_first_of_equals_is_the_most_similar(device, dtype, multiprocessors, monkeypatch):
    """Vectors whose cosines come out exactly, far apart in the row: within a tile, across tiles and across
    splits."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: multiprocessors)
    _, whole = drawn(3, device)
    signs = (whole(0, 2, 1, 300, 4) * 2 - 1).to(dtype) * 2.0 ** whole(-2, 3, 1, 300, 1)
    given = signs[:, :40].to(dtype), signs.to(dtype)
    for itself in (True, False):
        got, want = kernels.most_similar(*given, None, itself), most_similar.__wrapped__(*given, None, itself)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        if itself:
            assert (
                want[1][0].cpu() < torch.arange(40)
            ).sum() > 5  # as similar to an earlier one as to itself


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8])
def test_slots_and_logits(device, ratio):
    """The same bits: similarities that are τ as float32 has it, rows of several lengths, η of every shape."""
    normal, whole = drawn(int(100 * ratio), device)
    for spans in [[1]], [[150]], [[37]] * 3, [[20, 7, 13], [5], [1, 1, 1, 40]], [[2500, 11], [140, 140]]:
        layout = Spans.build(spans, keeps(spans, Compression(ratio=ratio)), device)
        importance = whole(0, 5, len(spans), layout.tokens) / 4
        order = layout.arranged(best_of_intervals.__wrapped__(importance, layout))
        rest = order.shape[1] - layout.targets
        closest = whole(-10, 11, len(spans), rest) / 10, whole(0, layout.targets, len(spans), rest)
        lowest = whole(0, rest, len(spans), 1) if rest else None
        varied, nothing = whole(0, 2, *importance.shape) / 1.0, importance.new_zeros(len(spans), 1)
        for eta in importance.mean(1, keepdim=True) + 1e-9, varied, nothing, 0.3, math.inf:
            for tau, least in (0.7, None), (0.1, None), (-1.0, lowest), (None, None):
                asked = importance, eta, order, layout, closest, tau, least
                got, want = kernels.slots_and_logits(*asked), slots_and_logits.__wrapped__(*asked)
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
                assert (got[2] is None) == (want[2] is None) == (tau is None or least is not None)
                assert want[2] is None or torch.equal(got[2], want[2])
    assert kernels.slots_and_logits(importance, 0.3, order, layout) is NotImplemented


@pytest.mark.parametrize("batch, count, slots", [(1, 1, 1), (2, 140, 12), (1, 60, 55), (3, 40, 1)])
def test_group_softmax_and_merge_groups(device, batch, count, slots):
    normal, whole = drawn(count, device)
    logits, groups = 5 * normal(batch, count), whole(-1, slots, batch, count)
    groups[groups == slots // 2] = -1  # an empty group, and with one slot nothing but dropped tokens
    for asked in (logits, groups), (logits.T.contiguous().T, groups.T.contiguous().T):
        weights = kernels.group_softmax(*asked, slots)
        torch.testing.assert_close(weights, group_softmax.__wrapped__(*asked, slots), atol=1e-6, rtol=1e-5)
        assert (weights[groups == -1] == 0).all()
    for dtype, width in (
        (torch.float32, 260 if slots == 12 else 3),
        (torch.bfloat16, 24),
        (torch.float16, 1),
    ):
        hidden = normal(batch, count, 2 * width, dtype=dtype)[..., width:]
        got, want = (
            f(hidden, groups, weights, slots) for f in (kernels.merge_groups, merge_groups.__wrapped__)
        )
        assert got.dtype == dtype and got.shape == (batch, slots, width)
        # The interpreter rounds to bfloat16 towards zero.
        room = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(got, want, atol=room * 4, rtol=room)


@pytest.mark.parametrize("length", [1, 17, 300, 2500])
def test_ordinals(device, length):
    _, whole = drawn(length, device)
    chosen = whole(0, 3, 3, length) > 0
    chosen[0], chosen[1] = False, True
    for of in chosen, chosen.T.contiguous().T:
        for count in {1, length // 2 or 1, length, length + 3}:
            assert torch.equal(kernels.ordinals(of, count), ordinals.__wrapped__(of, count))


@pytest.mark.parametrize("spans, tokens, count", [(1, 20, 20), (3, 70, 9), (2, 130, 33)])
def test_picks_step_by_step(device, spans, tokens, count):
    """The same tokens in the same order, also past the rank of the kernel, and among equal tokens."""
    x = drawn(0, device)[0](spans, tokens, 24)
    x[:, 5] = x[:, 11]
    similarity = similarities(x)
    nearest = 1 - similarity.masked_fill(torch.eye(tokens, dtype=torch.bool, device=device), -2).amax(2)
    wanted = pick_farthest.__wrapped__(similarity, nearest, count)
    assert torch.equal(kernels.pick_farthest(similarity, nearest, count), wanted)
    relevance = 0.1 + drawn(1, device)[0](spans, tokens).abs()
    for kernel in (similarity, relevance[:, :, None] * similarity * relevance[:, None]):
        wanted = greedy_map.__wrapped__(kernel, min(count, 20))
        assert torch.equal(kernels.greedy_map(kernel, min(count, 20)), wanted)
    past = kernels.greedy_map(kernel, count)
    assert all(len(set(row)) == count for row in past.tolist())


def test_a_batch_of_selectors_is_one_launch(launched):
    """Spans of one size are one launch, whatever rows they are of."""
    hidden = drawn(0, "cpu")[0](3, 40, 8)
    context = Context(relevance=hidden[:, :, 0])
    for method, name in (("divprune", "pick_farthest"), ("cdpruner", "greedy_map")):
        launched.clear()
        compress(hidden, None, Compression(method=method, keep=7), context=context)
        assert launched[name] == 1


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 2 / 3, 0.95])
def test_best_of_intervals(device, ratio):
    _, whole = drawn(int(100 * ratio), device)
    for spans in [[1]], [[150]], [[37]] * 3, [[20, 7, 13], [5], [1, 1, 1, 40]], [[300, 11], [140, 140]]:
        layout = Spans.build(spans, keeps(spans, Compression(ratio=ratio)), device)
        for steps in 2, 1000:
            importance = whole(0, steps, len(spans), layout.tokens) / steps
            got, want = (
                kernels.best_of_intervals(importance, layout),
                best_of_intervals.__wrapped__(importance, layout),
            )
            assert torch.equal(got, want) and got.sum() == sum(layout.target_counts)


def test_what_kernels_leave_to_torch(device, launched):
    normal, whole = drawn(0, device)
    hidden, groups = normal(2, 9, 4).double(), whole(0, 3, 2, 9)
    weights = group_softmax(hidden[..., 0], groups, 3)
    assert weights.dtype == torch.float64 and merge_groups(hidden, groups, weights.float(), 3).shape == (
        2,
        3,
        4,
    )
    assert most_similar(hidden, hidden)[1].shape == (2, 9)
    assert score_row(hidden[:, None], hidden[:, None], groups[:, :1], 1.0).shape == (2, 1, 9)
    assert ordinals(groups > 5, 0).shape == (2, 0) and ordinals(groups[:0] > 5, 2).shape == (0, 2)
    spread = Spans.build([[5000]], [[1]], device)
    assert best_of_intervals(normal(1, 5000).abs(), spread).sum() == 1
    assert not +launched


@settings(max_examples=25, **test_maths.FEW)
@given(test_maths.cases(n_max=10, exact=True, rows_max=2, spans_max=2, dtypes=tuple(FLOATS.values())))
def check_against_the_equations(case):
    test_maths.check_case(case)


def test_a_step_of_kernels_follows_the_equations(launched):
    """What test_maths asks of the torch path, ties and all, by the float64 reference."""
    if not kernels.INTERPRETED:
        pytest.skip("kernels are compiled on this machine, and these cases lie on the CPU")
    check_against_the_equations()
    assert set(launched) == NAMES - {"score_row"}  # which belongs to a model


@pytest.mark.gpu
def test_the_same_bits_every_time():
    """Programs run in any order there; sums do not."""
    normal, whole = drawn(1, "cuda")
    hidden, groups = normal(4, 576, 1024, dtype=torch.bfloat16), whole(-1, 40, 4, 576)
    query, rows = normal(4, 16, 700, 64, dtype=torch.bfloat16), whole(0, 700, 4, 3)
    for kernel, *asked in (
        (kernels.score_row, query, query, rows, 0.1),
        (kernels.merge_groups, hidden, groups, normal(4, 576), 40),
        (kernels.group_softmax, normal(4, 576), groups, 40),
        (lambda *x: torch.cat([y.double() for y in kernels.most_similar(*x)]), hidden, hidden, None, False),
    ):
        first = kernel(*asked)
        assert all(torch.equal(first, kernel(*asked)) for _ in range(20))


@pytest.mark.parametrize("select, merge, keys", [
    ("intervals", "igm", {"tau": 0.2}), ("intervals", "igm", {"tau": -1.0, "compensation": "reserved"}),
    ("intervals", "igm-neg", {}), ("topk", "drop", {}), ("information", "average", {}),
    ("random", "igm-pos", {}),
])  # fmt: skip
def test_a_step_of_kernels_is_the_torch_step(device, select, merge, keys, launched, monkeypatch):
    normal, _ = drawn(5, device)
    hidden, importance = normal(2, 75, 20), normal(2, 75).softmax(1)
    c, spans = Compression(select=select, merge=merge, ratio=0.6, **keys), [[40, 35], [60]]
    got = compress(hidden, importance, c, spans=spans)
    assert set(launched) >= {"ordinals"} | (set() if merge == "drop" else {"group_softmax", "merge_groups"})
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "runs_kernels", lambda tensor: False)
    want = compress(hidden, importance, c, spans=spans)
    assert (
        torch.equal(got.targets, want.targets)
        and torch.equal(got.groups, want.groups)
        and torch.equal(got.mask, want.mask)
    )
    torch.testing.assert_close(got.token_weights, want.token_weights)
    torch.testing.assert_close(got.tokens, want.tokens)
    if want.similarity is not None:
        torch.testing.assert_close(got.similarity, want.similarity)


PROMPTS = {
    "libra": dict(method="libra", layers=(1, 3), tau=0.6),
    "fastv": dict(method="fastv", layers=(1,), ratio=0.75),
    "turbo": dict(method="turbo", layers=(1, 2)),
    "mean": dict(method="libra", layers=(2,), importance="mean", positions="compact", tau=0.6),
    "next": dict(method="pyramiddrop", layers=(1, 2)),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keys", PROMPTS.values(), ids=PROMPTS)
@torch.no_grad()
def test_a_model_with_kernels_is_the_model_without(device, keys, side, launched, monkeypatch):
    """Ragged prompts with no, one and several images, through decoder, stream and masks."""
    patterns = ("t3 v12 t4 v8 t3", "t2 v20 t6", "t7")
    rows = [
        tiny.row(pattern, seed, alike=0.95 if seed == 1 else 0.0) for seed, pattern in enumerate(patterns)
    ]
    model = tiny.llava_model(layers=4).to(device)
    model.set_compression(Compression(**keys))
    given = {name: value.to(device) for name, value in tiny.collate(rows, side).items()}
    with tiny.watched() as steps:
        logits = model(**given).logits
    merges = {"group_softmax", "merge_groups"} if model.compression.merge != "drop" else set()
    assert {"score_row", "ordinals"} | merges <= set(launched)
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "runs_kernels", lambda tensor: False)
    with tiny.watched() as plain_steps:
        plain_logits = model(**given).logits
    assert len(steps) == len(plain_steps) == len(keys["layers"])
    for step, plain in zip(steps, plain_steps):
        torch.testing.assert_close(step.attention, plain.attention, atol=1e-5, rtol=1e-5)
        assert torch.equal(step.shortened.source, plain.shortened.source)
        assert torch.equal(step.outcome.targets, plain.outcome.targets)
        assert torch.equal(step.outcome.groups, plain.outcome.groups)
    torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=1e-4)


def test_no_kernel_where_a_gradient_is_wanted(launched):
    hidden, groups = torch.randn(1, 6, 4, requires_grad=True), torch.tensor([[0, 1, 0, 1, 1, -1]])
    merge_groups(hidden, groups, torch.full((1, 6), 0.5), 2).sum().backward()
    assert not launched and hidden.grad.sum() == 10
    with torch.no_grad():
        merge_groups(hidden, groups, torch.full((1, 6), 0.5), 2)
    assert launched["merge_groups"] == 1


def test_no_kernel_on_a_cpu_or_where_they_are_switched_off(monkeypatch):
    monkeypatch.setattr(dispatch, "_launch", lambda *args: pytest.fail("a kernel was asked"))
    assert ordinals(torch.tensor([[False, True]]), 1).tolist() == [[1]]
    dispatch._kernels.cache_clear()
    monkeypatch.setenv("LIBRA_KERNELS", "torch")
    assert dispatch._kernels() is None
    dispatch._kernels.cache_clear()


def test_a_kernel_that_fails_is_named_once_and_torch_goes_on(monkeypatch):
    calls = []

    def broken(*args):
        calls.append(args)
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nand so on")

    monkeypatch.setattr(dispatch, "runs_kernels", lambda tensor: True)
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(kernels, "ordinals", broken)
    chosen = torch.tensor([[False, True, True]])
    said = (
        r"kernel ordinals failed .*\(RuntimeError: PTX was compiled with an unsupported "
        r"toolchain\).*LIBRA_KERNELS=torch"
    )
    with pytest.warns(UserWarning, match=said):
        assert ordinals(chosen, 2).tolist() == [[1, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ordinals(chosen, 2).tolist() == [[1, 2]]
    assert len(calls) == 1

    def full(*args):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(kernels, "group_softmax", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        group_softmax(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long), 1)
    assert dispatch._failed == {"ordinals"}


def builds(tmp_path, *arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, BUILDS, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_builds(found: list[dict]) -> None:
    """A few registers may spill: less than a line of cache for each thread."""
    source = inspect.getsource(kernels) + inspect.getsource(greedy_kernels)
    jitted = {name for name, k in vars(kernels).items() if hasattr(k, "arg_names")}
    # Others are part of the kernels that call them.
    assert {entry["kernel"] for entry in found} == {name for name in jitted if f" {name}[" in source}
    for entry in found:
        assert entry["shared"] <= SHARED_LIMIT and entry["spilled"] <= 64, entry


@needs_assembler
@pytest.mark.slow
@pytest.mark.parametrize("asked", [["80"], ["90"], ["86", "89", "--one"]], ids=" ".join)
def test_every_build_fits_its_gpu(tmp_path, asked):
    """Ampere, Hopper and consumer GPUs; float32, bfloat16 and float16; the sizes of the models."""
    found = builds(tmp_path, *asked)
    check_builds(found)
    assert len(found) > (10 if "--one" in asked else 50)
