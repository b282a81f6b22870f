"""Triton kernels: what a GPU runs in place of the functions of the same names in :mod:`libra.ops.reference`.

A function here takes and returns what the torch definition does, whose docstring holds, or it returns
NotImplemented and the definition runs. Sums are float32, in a fixed order, without atomics: the same input
gives the same bits. Offsets along rows and batches are int64; a block of any kernel fits the 99 KB of shared
memory of consumer GPUs.
"""

import functools
import math
import os

import torch
import triton
import triton.language as tl

from . import NOWHERE
from .greedy_kernels import _farthest, _greedy_map, greedy_map, pick_farthest  # noqa: F401  Found by name.
from .spans import Spans, on_device

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LONGEST_ROW = 1 << 17
MOST_BLOCKS = (1 << 16) - 1  # of a grid's second and third axis
LONGEST_INTERVAL = 1024  # a token is compared with its whole interval, one by one
MULTIPROCESSORS = 108  # assumed off a GPU
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run as Python, on any device


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` or a copy, its last dimension dense in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """A bool tensor as its bytes, without a copy."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _chunk(length: int, most: int = 2048) -> int:
    return max(16, min(triton.next_power_of_2(length), most))


# Numbers that change from prompt to prompt must not be compiled into a kernel: naming them so keeps one
# kernel for all.


@triton.jit(
    do_not_specialize=[
        "first",
        "rows_count",
        "length",
        "keys",
        "heads_shared",
        "mask_first",
        "window",
        "blocks",
    ]
)
def _score_blocks(
    query, key, rows, first, key_mask, scores, tops, totals, scaling,
    query_batch, query_head, query_row, key_batch, key_head, key_row, mask_batch, mask_column,
    kv_heads, heads_shared, rows_count, length, keys, width, mask_first, window, blocks,
    IN_TURN: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, PICKED: tl.constexpr,
    KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scores of the picked queries of one key head on a block of its keys, and the block's part of their
    softmax."""
    block = tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    place = block * KEYS + tl.arange(0, KEYS)
    lane = tl.arange(0, WIDTH)
    real = place < keys
    tile = (
        key + batch * key_batch + kv_head * key_head + place.to(tl.int64)[:, None] * key_row + lane[None, :]
    )
    k = tl.load(tile, mask=real[:, None] & (lane < width)[None, :], other=0.0).to(tl.float32)
    seen = real
    if MASKED:
        column = (mask_first + place).to(tl.int64)
        seen = seen & (tl.load(key_mask + batch * mask_batch + column * mask_column, mask=real, other=0) != 0)
    begin = tl.program_id(2) * PICKED
    for picked in range(begin, min(begin + PICKED, heads_shared * rows_count)):
        head = kv_head * heads_shared + picked // rows_count
        out = batch * rows_count + picked % rows_count
        row = (first + picked % rows_count).to(tl.int64)
        if not IN_TURN:
            row = tl.load(rows + out)
        q = tl.load(
            query + batch * query_batch + head * query_head + row * query_row + lane,
            mask=lane < width,
            other=0.0,
        )
        score = tl.sum(k * (q.to(tl.float32) * scaling)[None, :], 1)
        newest = row + keys - length
        visible = seen & (place <= newest)
        if WINDOWED:
            visible = visible & (place > newest - window)
        score = tl.where(visible, score, float("-inf"))
        top = tl.max(score, 0)
        total = tl.sum(tl.where(visible, tl.exp(score - top), 0.0), 0)
        out_head = out * kv_heads * heads_shared + head
        tl.store(scores + out_head * keys + place, score, mask=real)
        tl.store(tops + out_head * blocks + block, top)
        tl.store(totals + out_head * blocks + block, total)


@triton.jit(do_not_specialize=["keys", "blocks"])
def _score_mean(
    scores,
    tops,
    totals,
    attention,
    heads,
    keys,
    blocks,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The softmax of every head over all keys, averaged over the heads, for one block of keys of one row."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    part = tl.arange(0, BLOCKS)
    mean = tl.zeros((KEYS,), dtype=tl.float32)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        line = row * heads + head
        inside = (head < heads)[:, None] & (part < blocks)[None, :]
        tops_here = tl.load(tops + line[:, None] * blocks + part[None, :], mask=inside, other=float("-inf"))
        totals_here = tl.load(totals + line[:, None] * blocks + part[None, :], mask=inside, other=0.0)
        top = tl.max(tops_here, 1)
        total = tl.sum(tl.where(totals_here > 0, totals_here * tl.exp(tops_here - top[:, None]), 0.0), 1)
        inside = (head < heads)[:, None] & (place < keys)[None, :]
        score = tl.load(scores + line[:, None] * keys + place[None, :], mask=inside, other=float("-inf"))
        mean += tl.sum(tl.where(inside, tl.exp(score - top[:, None]) / total[:, None], 0.0), 0)
    tl.store(attention + row * keys + place, mean / heads, mask=place < keys)


def score_row(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor | range,
    scaling: float,
    key_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Two launches: the keys are read once, in blocks; then each block of the row is finished for all
    heads."""
    batch, heads, length, width = query.shape
    in_turn = isinstance(rows, range)
    kv_heads, keys, picked = key.shape[1], key.shape[2], len(rows) if in_turn else rows.shape[1]
    key_block = 64 if width <= 128 else 32
    blocks = triton.cdiv(keys, key_block)
    queries = heads // kv_heads * picked
    if (
        query.dtype not in FLOATS or key.dtype not in FLOATS or width > 512
        or not in_turn and rows.dtype != torch.int64
        or not 0 < keys <= LONGEST_ROW
        or not 0 < batch * picked <= MOST_BLOCKS
        or batch * kv_heads > MOST_BLOCKS
        or batch * picked * heads * keys >= 1 << 33
    ):  # fmt: skip
        return NotImplemented
    query, key = _whole_rows(query), _whole_rows(key)
    first, rows = (rows.start, query) if in_turn else (0, rows.contiguous())
    mask = query[:, :, 0, 0] if key_mask is None else _bytes(key_mask)
    scores = torch.empty(batch, picked, heads, keys, device=key.device)
    tops, totals = (torch.empty(batch, picked, heads, blocks, device=key.device) for _ in range(2))
    attention = torch.empty(batch, picked, keys, device=key.device)
    queries_block = 16
    _score_blocks[(blocks, batch * kv_heads, triton.cdiv(queries, queries_block))](
        query, key, rows, first, mask, scores, tops, totals, float(scaling),
        *query.stride()[:3], *key.stride()[:3], *mask.stride()[:2],
        kv_heads, heads // kv_heads, picked, length, keys, width, mask.shape[1] - keys,
        sliding_window or 0, blocks,
        IN_TURN=in_turn, MASKED=key_mask is not None, WINDOWED=sliding_window is not None,
        PICKED=queries_block, KEYS=key_block,
        WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip
    parts = triton.next_power_of_2(blocks)
    _score_mean[(triton.cdiv(keys, 64), batch * picked)](
        scores, tops, totals, attention, heads, keys, blocks,
        HEADS=min(triton.next_power_of_2(heads), 32, max(1, 2048 // parts)), BLOCKS=parts, KEYS=64,
    )  # fmt: skip
    return attention


@triton.jit
def _cosine(product, length):
    """A product of a token with a unit vector over the token's length, in [-1, 1]; -inf (nothing to compare
    with) stays."""
    cosine = tl.div_rn(product, length)
    cosine = tl.where(cosine > 1.0, 1.0, cosine)
    return tl.where((cosine < -1.0) & (cosine > float("-inf")), -1.0, cosine)


@triton.jit(do_not_specialize=["count", "total", "per_split", "splits"])
def _most_similar(
    tokens, others, token_spans, other_spans, best, place, lengths,
    tokens_batch, tokens_row, others_batch, others_row, count, total, width, per_split, splits,
    SPANS: tl.constexpr, ITSELF: tl.constexpr, WIDEN: tl.constexpr, WHOLE: tl.constexpr,
    TOKENS: tl.constexpr, OTHERS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The best of one split of the others for a block of tokens, times the tokens' lengths, and those
    lengths."""
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, WIDTH)
    token_row = tokens + batch * tokens_batch + token.to(tl.int64)[:, None] * tokens_row
    is_token = token < count
    span = token  # only looked at where SPANS
    if SPANS:
        span = tl.load(token_spans + batch * count + token, mask=is_token, other=0).to(tl.int32)
    highest = tl.full((TOKENS,), float("-inf"), dtype=tl.float32)
    where = tl.zeros((TOKENS,), dtype=tl.int32)
    begin = split * per_split
    for first in range(begin, min(begin + per_split, total), OTHERS):
        other = first + tl.arange(0, OTHERS)
        is_other = other < total
        other_row = others + batch * others_batch + other.to(tl.int64)[:, None] * others_row
        product = tl.zeros((TOKENS, OTHERS), dtype=tl.float32)
        squares = tl.zeros((OTHERS, WIDTH), dtype=tl.float32)
        for start in range(0, width, WIDTH):
            column = start + lane
            x = tl.load(
                token_row + column[None, :], mask=is_token[:, None] & (column < width)[None, :], other=0.0
            )
            y = tl.load(
                other_row + column[None, :], mask=is_other[:, None] & (column < width)[None, :], other=0.0
            )
            wide = y.to(tl.float32)
            squares += wide * wide
            if WIDEN:
                product = tl.dot(x.to(tl.float32), tl.trans(wide), product, input_precision="ieee")
            else:
                product = tl.dot(x, tl.trans(y), product)
        length = tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), 1e-12)
        cosine = tl.div_rn(product, tl.broadcast_to(length[None, :], (TOKENS, OTHERS)))
        compared = tl.broadcast_to(is_other[None, :], (TOKENS, OTHERS))
        if SPANS:
            other_span = tl.load(other_spans + batch * total + other, mask=is_other, other=0).to(tl.int32)
            compared = compared & (span[:, None] == other_span[None, :])
        if not ITSELF:
            compared = compared & (token[:, None] != other[None, :])
        cosine = tl.where(compared, cosine, float("-inf"))
        top = tl.max(cosine, 1)
        found = tl.min(tl.where(cosine == top[:, None], other[None, :], total), 1)
        better = top > highest
        where = tl.where(better, found, where)
        highest = tl.where(better, top, highest)
    squares_here = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        column = start + lane
        x = tl.load(
            token_row + column[None, :], mask=is_token[:, None] & (column < width)[None, :], other=0.0
        ).to(tl.float32)
        squares_here += x * x
    token_length = tl.maximum(tl.sqrt_rn(tl.sum(squares_here, 1)), 1e-12)
    out = (batch * splits + split) * count + token
    if WHOLE:
        highest = _cosine(highest, token_length)
    elif split == 0:
        tl.store(lengths + batch * count + token, token_length, mask=is_token)
    tl.store(best + out, highest, mask=is_token)
    tl.store(place + out, where.to(tl.int64), mask=is_token)


@triton.jit(do_not_specialize=["count", "splits"])
def _best_split(
    part_best, part_place, lengths, best, place, count, splits, TOKENS: tl.constexpr, SPLITS: tl.constexpr
):
    """The best of all splits, the first of several, divided by the tokens' lengths."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < count
    split = tl.arange(0, SPLITS)
    line = (batch * splits + split)[:, None] * count + token[None, :]
    inside = (split < splits)[:, None] & is_token[None, :]
    parts = tl.load(part_best + line, mask=inside, other=float("-inf"))
    top = tl.max(parts, 0)
    chosen = tl.min(tl.where(parts == top[None, :], split[:, None], SPLITS - 1), 0)
    found = tl.load(
        part_place + (batch * splits + chosen) * count + token, mask=is_token & (chosen < splits), other=0
    )
    length = tl.load(lengths + batch * count + token, mask=is_token, other=1.0)
    tl.store(best + batch * count + token, _cosine(top, length), mask=is_token)
    tl.store(place + batch * count + token, found, mask=is_token)


def most_similar(
    tokens: torch.Tensor,
    others: torch.Tensor,
    spans: tuple[torch.Tensor, torch.Tensor] | None = None,
    itself: bool = True,
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
    floats: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch where the tokens fill the GPU; otherwise the others are split, and a second, small one joins
    the parts."""
    batch, count, width = tokens.shape
    total = others.shape[1]
    if (
        tokens.dtype not in FLOATS or others.dtype not in FLOATS or not 0 < batch <= MOST_BLOCKS
        or not 0 < count <= LONGEST_ROW or not 0 < total <= LONGEST_ROW or width == 0
    ):  # fmt: skip
        return NotImplemented
    tokens, others = _whole_rows(tokens), _whole_rows(others)
    # Triton's interpreter multiplies bfloat16 numbers as if they were integers.
    widen = tokens.dtype != others.dtype or tokens.dtype == torch.float32
    widen = widen or INTERPRETED and tokens.dtype == torch.bfloat16
    filled = _multiprocessors(tokens.device)
    if widen:
        tile, options = (32, 32, 32), {"num_warps": 4, "num_stages": 2}
    elif triton.cdiv(count, 128) * triton.cdiv(total, 128) * batch >= filled:
        tile, options = (128, 128, 32), {"num_warps": 8, "num_stages": 4}
    else:
        tile, options = (32, 64, 64), {"num_warps": 4, "num_stages": 4}
    blocks, pieces = triton.cdiv(count, tile[0]), triton.cdiv(total, tile[1])
    splits = min(pieces, 64, max(1, filled // (blocks * batch)))
    per_split = triton.cdiv(pieces, splits) * tile[1]
    splits = triton.cdiv(total, per_split)
    device = tokens.device
    best = torch.empty(batch, count, device=device)
    place = torch.empty(batch, count, dtype=torch.long, device=device)
    part_best, part_place, lengths = best, place, best
    if splits > 1:
        part_best, lengths = (
            torch.empty(batch, splits, count, device=device),
            torch.empty(batch, count, device=device),
        )
        part_place = torch.empty(batch, splits, count, dtype=torch.long, device=device)
    ids = (place, place) if spans is None else tuple(ids.contiguous() for ids in spans)
    _most_similar[(blocks, splits, batch)](
        tokens, others, *ids, part_best, part_place, lengths,
        *tokens.stride()[:2], *others.stride()[:2], count, total, width, per_split, splits,
        SPANS=spans is not None, ITSELF=itself, WIDEN=widen, WHOLE=splits == 1,
        TOKENS=tile[0], OTHERS=tile[1], WIDTH=tile[2], **options,
    )  # fmt: skip
    if splits > 1:
        grid, power = (triton.cdiv(count, 64), batch), triton.next_power_of_2(splits)
        tables = part_best, part_place, lengths, best, place
        _best_split[grid](*tables, count, splits, TOKENS=64, SPLITS=power)
    return best, place


@triton.jit
def _pull(importance, eta):
    """α/η as torch's division and nan_to_num have it: NaN is 0, an infinite number the largest one."""
    quotient = tl.div_rn(importance, eta)
    quotient = tl.where(quotient == quotient, quotient, 0.0)
    return tl.minimum(tl.maximum(quotient, -3.4028234663852886e38), 3.4028234663852886e38)


@triton.jit(do_not_specialize=["targets", "rest", "order_row", "importance_row", "eta_row"])
def _slots_and_logits(
    order, nearest, similarity, lowest, importance, eta, counts, slot_of, logits, has_one,
    targets, rest, order_row, importance_row, eta_row, eta_token, tau,
    RAGGED: tl.constexpr, LOWEST: tl.constexpr, NOWHERE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row, whose targets come first and stay in their own slots; the compensation token's is the one
    after them."""
    row = tl.program_id(0).to(tl.int64)
    kept, left = targets, rest
    if RAGGED:
        kept = tl.load(counts + 2 * row).to(tl.int32)
        left = tl.load(counts + 2 * row + 1).to(tl.int32)
    total = targets + rest
    any_apart = tl.zeros((), dtype=tl.int32)
    for start in range(0, total, CHUNK):
        place = start + tl.arange(0, CHUNK)
        other = place - targets  # the number of a token that is not a target
        is_other = (other >= 0) & (other < left)
        own = tl.where(place < kept, place, NOWHERE)
        apart = tl.load(similarity + row * rest + other, mask=is_other, other=0.0) <= tau
        if LOWEST:
            apart = apart | (other == tl.load(lowest + row))
        joined = tl.load(nearest + row * rest + other, mask=is_other, other=0)
        slot = tl.where(is_other, tl.where(apart, targets, joined), own)
        any_apart += tl.sum((slot == targets).to(tl.int32), 0)
        token = tl.load(order + row * order_row + place, mask=place < total, other=0)
        alpha = tl.load(importance + row * importance_row + token)
        logit = _pull(alpha, tl.load(eta + row * eta_row + token * eta_token))
        tl.store(slot_of + row * total + place, slot, mask=place < total)
        tl.store(logits + row * total + place, logit, mask=place < total)
    tl.store(has_one + row, (any_apart > 0).to(tl.uint8))


def slots_and_logits(
    importance: torch.Tensor,
    eta: torch.Tensor | float,
    order: torch.Tensor,
    spans: Spans,
    closest: tuple[torch.Tensor, torch.Tensor] | None = None,
    tau: float | None = None,
    lowest: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One launch; of the spans only their sizes are copied to the device, and only if they differ."""
    batch, total = order.shape
    if closest is None or importance.dtype != torch.float32 or not 0 < total <= LONGEST_ROW or batch == 0:
        return NotImplemented
    device = importance.device
    importance, order = _whole_rows(importance), _whole_rows(order)
    if not isinstance(eta, torch.Tensor):
        eta = importance.new_full((1, 1), eta)
    eta = eta.expand(importance.shape)
    similarity, nearest = (of_rest.contiguous() for of_rest in closest)
    counts = list(zip(spans.target_counts, spans.rest_counts))
    ragged = len(set(counts)) > 1
    table = on_device(counts, device, torch.long) if ragged else order
    slot = torch.empty(batch, total, dtype=torch.long, device=device)
    logits = torch.empty(batch, total, device=device)
    has_one = torch.empty(batch, dtype=torch.bool, device=device)
    _slots_and_logits[(batch,)](
        order, nearest, similarity, order if lowest is None else lowest, importance, eta, table,
        slot, logits, _bytes(has_one),
        spans.targets, total - spans.targets, order.stride(0), importance.stride(0), *eta.stride(),
        -math.inf if tau is None else tau,
        RAGGED=ragged, LOWEST=lowest is not None, NOWHERE=NOWHERE, CHUNK=_chunk(total), num_warps=8,
    )  # fmt: skip
    return slot, logits, has_one if tau is not None and lowest is None else None


@triton.jit(do_not_specialize=["count"])
def _group_softmax(
    logits, slots, weights, count, NOWHERE: tl.constexpr, TOKENS: tl.constexpr, OTHERS: tl.constexpr
):
    """Each token looks through its whole row for its slot: integer comparisons, cheaper than sorting or
    atomics."""
    row = tl.program_id(1).to(tl.int64) * count
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < count
    slot = tl.load(slots + row + token, mask=is_token, other=NOWHERE).to(tl.int32)
    logit = tl.load(logits + row + token, mask=is_token, other=0.0)
    top = logit
    for start in range(0, count, OTHERS):
        other = start + tl.arange(0, OTHERS)
        same = (
            slot[:, None]
            == tl.load(slots + row + other, mask=other < count, other=NOWHERE - 1).to(tl.int32)[None, :]
        )
        found = tl.load(logits + row + other, mask=other < count, other=0.0)
        top = tl.maximum(top, tl.max(tl.where(same, found[None, :], float("-inf")), 1))
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    for start in range(0, count, OTHERS):
        other = start + tl.arange(0, OTHERS)
        same = (
            slot[:, None]
            == tl.load(slots + row + other, mask=other < count, other=NOWHERE - 1).to(tl.int32)[None, :]
        )
        found = tl.load(logits + row + other, mask=other < count, other=0.0)
        total += tl.sum(tl.where(same, tl.exp(found[None, :] - top[:, None]), 0.0), 1)
    weight = tl.where(slot == NOWHERE, 0.0, tl.exp(logit - top) / total)
    tl.store(weights + row + token, weight, mask=is_token)


def group_softmax(logits: torch.Tensor, slot: torch.Tensor, slots: int, whole: bool = False) -> torch.Tensor:
    """One launch."""
    batch, count = logits.shape
    if logits.dtype != torch.float32 or not 0 < count <= LONGEST_ROW or not 0 < batch <= MOST_BLOCKS:
        return NotImplemented
    logits, slot = logits.contiguous(), slot.contiguous()
    weights = torch.empty_like(logits)
    _group_softmax[(triton.cdiv(count, 32), batch)](
        logits, slot, weights, count, NOWHERE=NOWHERE, TOKENS=32, OTHERS=128
    )
    return weights


@triton.jit(do_not_specialize=["count", "slots", "weights_batch"])
def _merge_groups(
    hidden, slot_of, weights, merged, hidden_batch, hidden_row, count, slots, width,
    SCAN: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One slot, one block of its width: look for the slot's tokens, and add up the parts of the row that hold
    any."""
    slot = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    batch = tl.program_id(2).to(tl.int64)
    row = batch * count
    sums = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for start in range(0, count, SCAN):
        token = start + tl.arange(0, SCAN)
        mine = tl.load(slot_of + row + token, mask=token < count, other=-1) == slot
        first = tl.min(tl.where(mine, token, count), 0)
        last = tl.max(tl.where(mine, token, -1), 0)
        for begin in range(first, last + 1, TOKENS):
            near = begin + tl.arange(0, TOKENS)
            own = tl.load(slot_of + row + near, mask=near <= last, other=-1) == slot
            weight = tl.load(weights + row + near, mask=own, other=0.0)
            tile = hidden + batch * hidden_batch + near.to(tl.int64)[:, None] * hidden_row + column[None, :]
            values = tl.load(tile, mask=own[:, None] & (column < width)[None, :], other=0.0)
            sums += values.to(tl.float32) * weight[:, None]
    total = tl.sum(sums, 0)
    tl.store(
        merged + (batch * slots + slot) * width + column,
        total.to(merged.dtype.element_ty),
        mask=column < width,
    )


def merge_groups(
    hidden: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor, slots: int, whole: bool = False
) -> torch.Tensor:
    """One launch; every slot gathers its own tokens."""
    batch, count, width = hidden.shape
    block = min(256, _chunk(width))
    if (
        hidden.dtype not in FLOATS or weights.dtype != torch.float32 or not 0 < count <= LONGEST_ROW
        or not 0 < batch <= MOST_BLOCKS or not 0 < slots or not 0 < triton.cdiv(width, block) <= MOST_BLOCKS
    ):  # fmt: skip
        return NotImplemented
    hidden, slot, weights = _whole_rows(hidden), slot.contiguous(), weights.contiguous()
    merged = torch.empty(batch, slots, width, dtype=hidden.dtype, device=hidden.device)
    _merge_groups[(slots, triton.cdiv(width, block), batch)](
        hidden, slot, weights, merged, *hidden.stride()[:2], count, slots, width,
        SCAN=_chunk(count, 1024), TOKENS=16, WIDTH=block,
    )  # fmt: skip
    return merged


@triton.jit(do_not_specialize=["length", "count", "chosen_row"])
def _ordinals(chosen, numbers, length, count, chosen_row, chosen_column, CHUNK: tl.constexpr):
    """One row: a chosen place goes after the chosen ones before it, any other after all chosen ones."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    total = tl.zeros((), dtype=tl.int32)
    for start in range(0, length, CHUNK):
        place = start + lane
        picked = tl.load(chosen + row * chosen_row + place * chosen_column, mask=place < length, other=0).to(
            tl.int32
        )
        total += tl.sum(picked, 0)
    before = tl.zeros((), dtype=tl.int32)
    for start in range(0, length, CHUNK):
        place = start + lane
        picked = tl.load(chosen + row * chosen_row + place * chosen_column, mask=place < length, other=0).to(
            tl.int32
        )
        rank = before + tl.cumsum(picked, 0) - picked
        slot = tl.where(picked > 0, rank, total + place - rank)
        tl.store(numbers + row * count + slot, place.to(tl.int64), mask=(place < length) & (slot < count))
        before += tl.sum(picked, 0)


def ordinals(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """One launch, a cumulative sum in place of a sort."""
    batch, length = chosen.shape
    count = min(count, length)
    if chosen.dtype != torch.bool or not 0 < length <= LONGEST_ROW or batch == 0 or count <= 0:
        return NotImplemented
    numbers = torch.empty(batch, count, dtype=torch.long, device=chosen.device)
    _ordinals[(batch,)](
        _bytes(chosen), numbers, length, count, *chosen.stride(), CHUNK=_chunk(length), num_warps=8
    )
    return numbers


@triton.jit(do_not_specialize=["length", "importance_row", "spans", "one_size", "one_keep"])
def _best_of_intervals(
    importance,
    table,
    chosen,
    length,
    importance_row,
    spans,
    one_size,
    one_keep,
    ALIKE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A token is the first best of its interval if none there is better, and none before it as good."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    first = tl.zeros((TOKENS,), dtype=tl.int64)
    size = tl.zeros((TOKENS,), dtype=tl.int64)
    keep = tl.zeros((TOKENS,), dtype=tl.int64)
    if ALIKE:
        inside = token < one_size
        size = tl.where(inside, one_size, size)
        keep = tl.where(inside, one_keep, keep)
    else:
        begin = tl.zeros((), dtype=tl.int64)
        for span in range(spans):
            here = table + (batch * spans + span) * 2
            tokens_here = tl.load(here)
            inside = (token >= begin) & (token < begin + tokens_here)
            first = tl.where(inside, begin, first)
            size = tl.where(inside, tokens_here, size)
            keep = tl.where(inside, tl.load(here + 1), keep)
            begin += tokens_here
    real = (size > 0) & (token < length)
    size = tl.maximum(size, 1)
    keep = tl.maximum(keep, 1)
    interval = ((token - first + 1) * keep - 1) // size
    low = first + interval * size // keep
    high = first + (interval + 1) * size // keep
    own = tl.load(importance + batch * importance_row + token, mask=real, other=0.0)
    beaten = token < 0
    for step in range(tl.max(tl.where(real, high - low, 0), 0)):
        other = low + step
        rival = real & (other < high)
        found = tl.load(importance + batch * importance_row + other, mask=rival, other=0.0)
        beaten = beaten | (rival & ((found > own) | ((found == own) & (other < token))))
    tl.store(chosen + batch * length + token, (real & (beaten == 0)).to(tl.uint8), mask=token < length)


def best_of_intervals(importance: torch.Tensor, spans: Spans) -> torch.Tensor:
    """One launch; of the spans only their sizes are copied to the device, and only if they differ."""
    batch, length = importance.shape
    sizes = {(n, k) for row, keeps in zip(spans.spans, spans.keeps) for n, k in zip(row, keeps)}
    if (
        importance.dtype != torch.float32 or not 0 < length <= LONGEST_ROW or not 0 < batch <= MOST_BLOCKS
        or any(k < 1 or math.ceil(n / k) > LONGEST_INTERVAL for n, k in sizes)
    ):  # fmt: skip
        return NotImplemented
    importance = _whole_rows(importance)
    alike = len(sizes) == 1 and spans.one_span and all(spans.spans)
    size, keep = next(iter(sizes))
    most = max(map(len, spans.spans))
    table = importance
    if not alike:
        pairs = [
            [*zip(row, keeps), *[(0, 0)] * (most - len(row))] for row, keeps in zip(spans.spans, spans.keeps)
        ]
        table = on_device(pairs, importance.device, torch.long)
    chosen = torch.empty(batch, length, dtype=torch.bool, device=importance.device)
    _best_of_intervals[(triton.cdiv(length, 128), batch)](
        importance,
        table,
        _bytes(chosen),
        length,
        importance.stride(0),
        most,
        size,
        keep,
        ALIKE=alike,
        TOKENS=128,
    )
    return chosen
