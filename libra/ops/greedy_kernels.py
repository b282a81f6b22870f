"""Triton kernels of the choices that go step by step: one program a span, one launch for all of a batch.

The torch definitions in :mod:`libra.ops.greedy` launch a handful of operations a step, which costs more than
the arithmetic; here a span's scores stay in registers from the first pick to the last.
"""

import torch
import triton
import triton.language as tl

LONGEST_SPAN = 8192  # a span's scores are one block
COLUMNS = 16  # earlier columns of the Cholesky factor that are read at a time


@triton.jit(do_not_specialize=["tokens", "count"])
def _farthest(similarity, nearest, picks, tokens, count, BLOCK: tl.constexpr):
    """Max-min picks of one span: each time the token whose nearest picked token is farthest."""
    span = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    real = lane < tokens
    first = tl.load(nearest + span * tokens + lane, mask=real, other=float("-inf"))
    pick = tl.argmax(first, 0)
    tl.store(picks + span * count, pick.to(tl.int64))
    distance = tl.where(real, float("inf"), float("-inf"))
    for step in range(1, count):
        row = similarity + (span * tokens + pick) * tokens + lane
        to_pick = 1.0 - tl.load(row, mask=real, other=0.0)
        distance = tl.where(real, tl.minimum(distance, to_pick), float("-inf"))
        distance = tl.where(lane == pick, float("-inf"), distance)
        pick = tl.argmax(distance, 0)
        tl.store(picks + span * count + step, pick.to(tl.int64))


@triton.jit(do_not_specialize=["tokens", "count"])
def _greedy_map(
    kernel, columns, picks, tokens, count, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Greedy MAP picks of one span; ``columns`` (S, count, n) holds the Cholesky factor found so far."""
    span = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    real = lane < tokens
    kernel += span * tokens * tokens
    columns += span * count * tokens
    diagonal = tl.load(kernel + lane * (tokens + 1), mask=real, other=float("-inf"))
    floor = 1e-6 * tl.maximum(tl.max(diagonal, 0), 1e-30)
    gain = diagonal
    free = real
    part = tl.arange(0, COLUMNS)
    for step in range(count):
        score = tl.where(gain > floor, gain, diagonal * floor)
        pick = tl.argmax(tl.where(free, score, float("-inf")), 0)
        tl.store(picks + span * count + step, pick.to(tl.int64))
        free = free & (lane != pick)
        update = tl.load(kernel + pick.to(tl.int64) * tokens + lane, mask=real, other=0.0)
        for start in range(0, step, COLUMNS):
            earlier = start + part
            seen = earlier < step
            at_pick = tl.load(columns + earlier * tokens + pick, mask=seen, other=0.0)
            block = tl.load(
                columns + earlier[:, None] * tokens + lane[None, :],
                mask=seen[:, None] & real[None, :],
                other=0.0,
            )
            update -= tl.sum(at_pick[:, None] * block, 0)
        own = tl.sum(tl.where(lane == pick, gain, 0.0), 0)
        update = tl.where(own > floor, update / tl.sqrt(tl.maximum(own, 1e-30)), 0.0)
        tl.store(columns + step * tokens + lane, update, mask=real)
        tl.debug_barrier()  # the next steps of this program read what was stored here
        gain = gain - update * update


def _block(tokens: int) -> tuple[int, int]:
    """The block that holds a span, and warps for it."""
    block = max(16, triton.next_power_of_2(tokens))
    return block, 4 if block <= 1024 else 8


def pick_farthest(similarity: torch.Tensor, nearest: torch.Tensor, count: int):
    """See :func:`libra.ops.greedy.pick_farthest`."""
    spans, tokens, _ = similarity.shape
    if tokens > LONGEST_SPAN or similarity.dtype != torch.float32:
        return NotImplemented
    picks = torch.empty(spans, count, dtype=torch.long, device=similarity.device)
    block, warps = _block(tokens)
    _farthest[(spans,)](
        similarity.contiguous(), nearest.contiguous(), picks, tokens, count, BLOCK=block, num_warps=warps
    )
    return picks


def greedy_map(kernel: torch.Tensor, count: int):
    """See :func:`libra.ops.greedy.greedy_map`."""
    spans, tokens, _ = kernel.shape
    if tokens > LONGEST_SPAN or kernel.dtype != torch.float32:
        return NotImplemented
    picks = torch.empty(spans, count, dtype=torch.long, device=kernel.device)
    block, warps = _block(tokens)
    columns = torch.empty(spans, count, tokens, device=kernel.device)
    chunk = max(1, min(COLUMNS, (1 << 14) // block))
    _greedy_map[(spans,)](
        kernel.contiguous(), columns, picks, tokens, count, COLUMNS=chunk, BLOCK=block, num_warps=warps
    )
    return picks
