"""The tensor operations of a compression step, as torch definitions: what :mod:`libra.ops.kernels` has to
give.

A function marked :func:`~libra.ops.dispatch.fused` has a Triton kernel of the same name; the others are torch
everywhere. Shapes: B rows of a batch, N tokens of a row, D numbers of a token.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from . import NOWHERE
from .dispatch import fused

if TYPE_CHECKING:
    from .spans import Spans

PIECE = 1 << 24  # similarities held at a time: 64 MB
HASHED = 32  # rows whose hash is computed at a time


@fused
def score_row(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    scaling: float,
    key_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of the chosen query tokens, averaged over the heads; N × N is never built.

    Args:
        query: (B, H, S, D) after rotary embedding.
        key: (B, H_kv, K, D) with H a multiple of H_kv and K ≥ S; the last S keys belong to the queries.
        rows: (B, R) which of the S queries.
        scaling: factor on the scores, 1/√D as a rule.
        key_mask: (B, K or more) bool, False for padding; its last K columns are the keys'. None if there is
            none.
        sliding_window: how many keys back a query sees, itself included; None for all.

    Returns:
        (B, R, K) float32; each row sums to 1.
    """
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width)).float() * scaling
    grouped = picked.reshape(batch, kv_heads, -1, width)  # the queries that share a key head, side by side
    scores = (grouped @ key.float().transpose(2, 3)).view(batch, heads, rows.shape[1], keys)
    place = torch.arange(keys, device=key.device)
    newest = (rows + keys - length)[:, :, None]
    visible = place <= newest
    if sliding_window is not None:
        visible = visible & (place > newest - sliding_window)
    if key_mask is not None:
        visible = visible & key_mask.bool()[:, None, -keys:]
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)


@fused
def most_similar(
    tokens: torch.Tensor,
    others: torch.Tensor,
    spans: tuple[torch.Tensor, torch.Tensor] | None = None,
    itself: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's highest cosine similarity to one of the others, and which one: the first of equal vectors
    (eq. 5).

    Args:
        tokens: (B, Q, D).
        others: (B, K, D).
        spans: (B, Q) and (B, K) integers; a token is compared only with those of its own span. None compares
            all with all.
        itself: False where both are the same tokens and none is to be compared with itself; among equals any
            may be returned then.

    Returns:
        the similarities (B, Q) float32 in [-1, 1], -inf where a token has nothing to be compared with, and
        the places (B, Q).
    """
    batch, count, _ = tokens.shape
    # A token's own length does not change which of the others is most similar to it: divide by it at the end.
    # Adding 0 removes the sign of zeros, so that equal vectors have equal bits.
    directions = F.normalize(others.float(), dim=-1).add_(0.0).transpose(1, 2)  # (B, D, K)
    best = torch.empty(batch, count, device=tokens.device)
    place = torch.empty(batch, count, dtype=torch.long, device=tokens.device)
    step = max(1, PIECE // max(1, batch * others.shape[1]))
    for start in range(0, count, step):
        piece = tokens[:, start : start + step].float()
        scores = piece @ directions  # (B, q, K)
        if spans is not None:
            apart = spans[0][:, start : start + step, None] != spans[1][:, None]
            scores = scores.masked_fill_(apart, -torch.inf)
        if not itself:
            scores.diagonal(start, 1, 2).fill_(-torch.inf)
        found = scores.argmax(-1, keepdim=True)
        lengths = torch.linalg.vector_norm(piece, dim=-1).clamp(min=1e-12)
        best[:, start : start + step] = scores.gather(-1, found)[..., 0] / lengths
        place[:, start : start + step] = found[..., 0]
    best = torch.where(best.isinf(), best, best.clamp(-1, 1))  # rounding makes cosines like 1.0000002
    if itself:  # a matrix product does not round every column alike, so equal ones may differ in the last bit
        place = first_equal(directions.transpose(1, 2), None if spans is None else spans[1]).gather(1, place)
    return best, place


def first_equal(rows: torch.Tensor, spans: torch.Tensor | None = None) -> torch.Tensor:
    """(B, K): for each vector of ``rows`` (B, K, D), float32, the first one of its span (B, K) that equals
    it.

    Rows are compared by a 64-bit hash of their bits, added up in whole numbers: exact in any order, on any
    device.
    """
    rows = F.pad(rows, (0, 1)) if rows.shape[-1] % 2 else rows.contiguous()
    bits = rows.view(torch.int64)  # two numbers each
    digest = torch.cat([_hash(part) for part in bits.split(HASHED, dim=1)], 1)
    if spans is not None:
        digest = digest + spans * 0x1E3779B97F4A7C15
    order = digest.argsort(dim=1, stable=True)
    ordered = digest.gather(1, order)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = torch.arange(digest.shape[1], device=rows.device).expand_as(digest)
    first = torch.where(begins, place, 0).cummax(1).values  # of each run of equal digests
    return torch.empty_like(order).scatter_(1, order, order.gather(1, first))


def _hash(bits: torch.Tensor) -> torch.Tensor:
    """(B, k) int64 of (B, k, n) int64: each number is mixed with its place, then all of a row are added up,
    modulo 2^64."""
    mixed = bits + torch.arange(bits.shape[-1], device=bits.device) * 0x1E3779B97F4A7C15
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        mixed ^= mixed >> 29
        mixed *= factor
    mixed ^= mixed >> 32
    return mixed.sum(-1)


def cosine(tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (B, Q) float32 of ``tokens`` (B, Q, D) and ``others`` (B, Q, D), pair by pair.

    Computed in float64, so that pairs which are equally similar get equal numbers in any batch.
    """
    batch, count, width = tokens.shape
    found = torch.empty(batch, count, device=tokens.device)
    step = max(1, (PIECE >> 3) // max(1, batch * width))
    for start in range(0, count, step):
        piece = slice(start, start + step)
        a, b = tokens[:, piece].double(), others[:, piece].double()
        lengths = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
        found[:, piece] = ((a * b).sum(-1) / lengths.clamp(min=1e-24)).clamp(-1, 1)
    return found


@fused
def best_of_intervals(importance: torch.Tensor, spans: "Spans") -> torch.Tensor:
    """The highest ``importance`` (B, N) of each interval, the first of several. Returns (B, N) bool.

    Interval i of a span of n tokens covers [⌊i·n/N_t⌋, ⌊(i+1)·n/N_t⌋), so token j lies in interval
    ⌊((j+1)·N_t − 1)/n⌋.
    """
    local = spans.index - spans.first_token
    interval = ((local + 1) * spans.span_keeps - 1) // spans.span_length.clamp(min=1) + spans.first_target
    interval = torch.where(
        spans.valid, interval, spans.targets
    )  # padding shares one interval after the others
    batch, slots = len(interval), spans.targets + 1
    best = importance.new_full((batch, slots), -torch.inf).scatter_reduce(1, interval, importance, "amax")
    is_best = spans.valid & (importance == best.gather(1, interval))
    place = torch.where(is_best, spans.index, spans.tokens)
    first = place.new_full((batch, slots), spans.tokens).scatter_reduce(1, interval, place, "amin")
    return is_best & (first.gather(1, interval) == spans.index)


@fused
def ordinals(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Indices (B, count) of the True entries of ``chosen`` (B, N), ascending; short rows are padded with
    indices of False entries."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def flat_rows(index: torch.Tensor, length: int) -> torch.Tensor:
    """(B·K,): ``index`` (B, K) into B tables of ``length`` rows, as an index into all these rows one after
    another."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * length).flatten()


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` (B, K) of ``x`` (B or 1, S, …): (B, K, …). Copies whole rows, where gather copies number
    by number."""
    flat = flat_rows(index, x.shape[1]) if len(x) == len(index) > 1 else index.flatten()
    return x.reshape(-1, *x.shape[2:]).index_select(0, flat).view(*index.shape, *x.shape[2:])


def take_last(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Numbers ``index`` (B, K) of the last dimension of ``x`` (…, B or 1, S): (…, B, K)."""
    shape = (*x.shape[:-2], *index.shape)
    return x.expand(*shape[:-1], x.shape[-1]).gather(-1, index.expand(shape))


@fused
def repack(
    keep: torch.Tensor, insert_after: torch.Tensor, extra: torch.Tensor, shift: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where columns go when some are removed, the rest moves together and one extra column may be inserted.

    Args:
        keep: (B, S) bool.
        insert_after: (B, 1), the column that the extra one follows, whether that column is kept or not.
        extra: (B, 1), 1 in a row with an extra column, otherwise 0.
        shift: (B, 1), empty columns on the left of the new row.
        width: columns of the new rows, S'.

    Returns:
        source (B, S'): the old column of each new one; ``insert_after`` for the extra column; its own number
        for a column that stays empty.
        place (B, S): the new column of each old one; for a removed column, the index of the last kept column
        before it (-1 if none).
    """
    batch, length = keep.shape
    columns = torch.arange(length, device=keep.device)
    rank = keep.cumsum(1)
    place = rank - 1 + shift + extra * (columns > insert_after)
    # A padded column stays the column it is, so that a step that removes nothing changes nothing.
    source = torch.arange(width + 1, device=keep.device).clamp(max=length - 1).repeat(batch, 1)
    source = source.scatter(1, torch.where(keep, place, width), columns.expand(batch, -1))
    gap = torch.where(extra > 0, rank.gather(1, insert_after) + shift, width)
    return source.scatter(1, gap, insert_after)[:, :width].contiguous(), place


@fused
def group_softmax(logits: torch.Tensor, slot: torch.Tensor, slots: int) -> torch.Tensor:
    """Softmax of ``logits`` (B, N) over the tokens of the same output slot (eq. 6).

    ``slot`` (B, N) is in 0 … ``slots`` - 1; a token whose slot is :data:`NOWHERE` gets weight 0.
    """
    index = torch.where(slot == NOWHERE, slots, slot)
    shape = (len(logits), slots + 1)
    top = logits.new_full(shape, -torch.inf).scatter_reduce(1, index, logits, "amax")
    power = (logits - top.gather(1, index)).exp()
    total = logits.new_zeros(shape).scatter_add(1, index, power)
    return (power / total.gather(1, index)).masked_fill(slot == NOWHERE, 0.0)


@fused
def merge_groups(hidden: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor, slots: int) -> torch.Tensor:
    """Weighted sum of the tokens of each output slot: (B, N, D) to (B, slots, D) (eq. 7, V′ = W V).

    W has at most one non-zero a column, which ``slot`` and ``weights``, both (B, N), give. Sums are in
    float32, those of float64 hidden states in float64.
    """
    batch, _, width = hidden.shape
    precise = torch.promote_types(hidden.dtype, torch.float32)
    index = flat_rows(torch.where(slot == NOWHERE, slots, slot), slots + 1)
    merged = hidden.new_zeros((batch * (slots + 1), width), dtype=precise)
    merged = merged.index_add(0, index, (hidden.to(precise) * weights[..., None]).flatten(0, 1))
    return merged.view(batch, slots + 1, width)[:, :slots].to(hidden.dtype)
