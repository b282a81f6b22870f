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

PIECE = 1 << 24  # similarities or attention scores held at a time: 64 MB
HASHED = 1 << 21  # words that are hashed at a time: 16 MB
TABLES = 4  # times as many places as tokens may a table of intervals have


def on_device(rows, device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A small table made on the host, copied without waiting for the device, as ``torch.tensor(rows,
    device=…)`` would."""
    return torch.tensor(rows, dtype=dtype).to(device, non_blocking=True)


def tables_on_device(tables: list[list[list[int]]], device) -> list[torch.Tensor]:
    """Tables of whole numbers, each with rows of one length, copied together."""
    flat = on_device([number for table in tables for row in table for number in row], device, torch.long)
    shapes = [(len(table), len(table[0]) if table else 0) for table in tables]
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


@fused
def score_row(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor | range,
    scaling: float,
    key_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of the chosen query tokens, averaged over the heads; N × N is never built.

    Args:
        query: (B, H, S, D) after rotary embedding.
        key: (B, H_kv, K, D) with H a multiple of H_kv and K ≥ S; the last S keys belong to the queries.
        rows: (B, R) which of the S queries; a range where they are the same in all rows of the batch.
        scaling: factor on the scores, 1/√D as a rule.
        key_mask: (B, K or more) bool, False for padding; its last K columns are the keys'. None if there is
            none.
        sliding_window: how many keys back a query sees, itself included; None for all.

    Returns:
        (B, R, K) float32; each row sums to 1.
    """
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if isinstance(rows, range):
        picked = query[:, :, rows.start : rows.stop]
    else:
        picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width))
    # The queries that share a key head, side by side.
    grouped = (picked.float() * scaling).reshape(batch, kv_heads, -1, width)
    scores = (grouped @ key.float().transpose(2, 3)).view(batch, heads, -1, keys)
    hidden = _hidden_keys(rows, keys, length, key_mask, sliding_window, key.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return scores.softmax(-1).mean(1)


def _hidden_keys(rows, keys: int, length: int, key_mask, window: int | None, device) -> torch.Tensor | None:
    """(B or 1, R or 1, K) bool: the keys that the queries ``rows`` do not see; None where they see all."""
    hidden = None
    if rows != range(length - 1, length) or window is not None:
        table = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, range) else rows
        newest = (table + keys - length)[..., None]
        place = torch.arange(keys, device=device)
        hidden = place > newest
        if window is not None:
            hidden = hidden | (place <= newest - window)
        hidden = hidden.view(-1, newest.shape[-2], keys)
    if key_mask is not None:
        padding = ~key_mask.bool()[:, None, -keys:]
        hidden = padding if hidden is None else hidden | padding
    return hidden


@fused
def most_similar(
    tokens: torch.Tensor,
    others: torch.Tensor,
    spans: tuple[torch.Tensor, torch.Tensor] | None = None,
    itself: bool = True,
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
    floats: tuple[torch.Tensor, torch.Tensor] | None = None,
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
        lengths: (B, Q) and (B, K), what :func:`lengths_of` gives for them; None: not known yet.
        floats: tokens (B, Q, D) and others (B, K, D) as they are computed with, at least float32, where the
            caller has them already.

    Returns:
        the similarities (B, Q) float32 in [-1, 1], -inf where a token has nothing to be compared with, and
        the places (B, Q).
    """
    batch, count, _ = tokens.shape
    if lengths is None:
        lengths = lengths_of(tokens), lengths_of(others)
    tokens, columns = (tokens, others) if floats is None else floats
    columns = columns.float().transpose(1, 2)
    step = max(1, PIECE // max(1, batch * others.shape[1]))
    found = []
    for start in range(0, count, step):
        # A token's own length does not change which of the others is most similar to it: it comes last.
        scores = (tokens[:, start : start + step].float() @ columns).div_(lengths[1][:, None])  # (B, q, K)
        if spans is not None:
            scores.masked_fill_(spans[0][:, start : start + step, None] != spans[1][:, None], -torch.inf)
        if not itself:
            scores.diagonal(start, 1, 2).fill_(-torch.inf)
        best, place = scores.max(-1)
        found.append((best / lengths[0][:, start : start + step], place))
    if not found:
        return others.new_empty(batch, 0, dtype=torch.float32), others.new_empty(batch, 0, dtype=torch.long)
    best, place = found[0] if len(found) == 1 else (torch.cat(parts, 1) for parts in zip(*found))
    if spans is None and itself:
        best = best.clamp(-1, 1)  # rounding makes cosines like 1.0000002
    else:
        best = best.where(best < -2, best.clamp(-1, 1))  # -inf stays
    if itself:  # a matrix product does not round every column alike, so equal ones may differ in the last bit
        place = first_equal(others, None if spans is None else spans[1]).gather(1, place)
    return best, place


def lengths_of(x: torch.Tensor) -> torch.Tensor:
    """(B, N) float32: the lengths of the vectors ``x`` (B, N, D), as divisors: not 0."""
    return torch.linalg.vector_norm(x.float(), dim=-1).clamp(min=1e-12)


def first_equal(rows: torch.Tensor, spans: torch.Tensor | None = None) -> torch.Tensor:
    """(B, K): for each vector of ``rows`` (B, K, D) the first one of its span (B, K) that equals it.

    Rows are compared by a 64-bit hash of their bits, added up in whole numbers: exact in any order, on any
    device. Their numbers are read as words of at most four bytes, and each word is multiplied by an odd
    number that its place gives, modulo 2^64. A word is in the lower half of its 64 bits, since of one that
    ends in zeros, as the bits of powers of two do, a product holds only the last bits of the factor.
    """
    batch, _, width = rows.shape
    whole = (rows + 0.0).contiguous()  # which removes the sign of zeros: equal vectors have equal bits
    words = whole.view(torch.int16 if width * whole.element_size() % 4 else torch.int32)
    factors = torch.arange(1, 2 * words.shape[2], 2, device=rows.device) ** 13
    parts = words.split(max(1, HASHED // max(1, batch * len(factors))), dim=1)
    digests = [part.long().mul_(factors).sum(-1) for part in parts]
    digest = digests[0] if len(digests) == 1 else torch.cat(digests, 1)
    if spans is not None:
        digest = digest.add(spans, alpha=0x1E3779B97F4A7C15)
    ordered, order = digest.sort(dim=1, stable=True)
    return order.gather(1, torch.searchsorted(ordered, digest))


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
    tokens = spans.tokens
    if spans.uniform and len(spans.spans[0]) == 1 and tokens % spans.targets == 0:
        length = tokens // spans.targets
        best = importance.unflatten(1, (spans.targets, length)).argmax(2) + spans.index[:, ::length]
    elif spans.interval_cells > TABLES * tokens:
        return _best_by_scatter(importance, spans)
    else:
        if not spans.uniform:
            importance = F.pad(importance, (0, 1))  # what the slots that a row does not fill take
        places = on_device(spans.intervals, importance.device).expand(len(importance), -1, -1)
        found = importance.gather(1, places.flatten(1)).view(places.shape).argmax(2, keepdim=True)
        best = places.gather(2, found)[..., 0]
    chosen = torch.zeros(importance.shape, dtype=torch.bool, device=importance.device)
    return chosen.scatter(1, best, True)[:, :tokens]


def _best_by_scatter(importance: torch.Tensor, spans: "Spans") -> torch.Tensor:
    """The same where intervals differ much in length."""
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
    return chosen.view(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def flat_rows(index: torch.Tensor, length: int) -> torch.Tensor:
    """(B·K,): ``index`` (B, K) into B tables of ``length`` rows, as an index into all these rows one after
    another."""
    if len(index) == 1:
        return index.flatten()
    first = torch.arange(0, len(index) * length, length, device=index.device)
    return (index + first[:, None]).flatten()


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` (B, K) of ``x`` (B or 1, S, …): (B, K, …). Copies whole rows, where gather copies number
    by number."""
    flat = flat_rows(index, x.shape[1]) if len(x) == len(index) else index.flatten()
    return x.reshape(-1, *x.shape[2:]).index_select(0, flat).view(*index.shape, *x.shape[2:])


def take_last(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Numbers ``index`` (B, K) of the last dimension of ``x`` (…, B or 1, S): (…, B, K)."""
    shape = (*x.shape[:-2], *index.shape)
    return x.expand(*shape[:-1], x.shape[-1]).gather(-1, index.expand(shape))


def pull(importance: torch.Tensor, eta: torch.Tensor | float) -> torch.Tensor:
    """α/η (eq. 6), of ``importance`` (B, N) float32, ``eta`` (B, N), (B, 1) or a number."""
    # Where every α is 0 the quotient is 0/0: equal logits, hence uniform weights.
    return (importance / eta).nan_to_num(nan=0.0)


@fused
def slots_and_logits(
    importance: torch.Tensor,
    eta: torch.Tensor | float,
    order: torch.Tensor,
    spans: "Spans",
    closest: tuple[torch.Tensor, torch.Tensor] | None = None,
    tau: float | None = None,
    lowest: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Which output slot each token of a row goes to, and the logit of its weight there (§3.3).

    Args:
        importance, eta: as of :func:`pull`; with an infinite η all weights of a slot are equal.
        order: (B, T + R), the tokens of each row, its targets first, as :meth:`Spans.arranged` puts them.
        closest: the similarity (B, R) float32 of each non-target to its most similar target, and that
            target's slot (B, R); None: they all go to the compensation token, the slot after the targets.
        tau: those at most so similar go there; None: none does.
        lowest: (B, 1), which of the non-targets goes there in any case.

    Returns:
        the slots (B, T + R), :data:`NOWHERE` for what a row does not have, the logits (B, T + R) float32, and
        which rows have a token in the compensation token, (B,) bool; None where no similarity decides that.
    """
    own, missing = spans.target_slots, spans.rest_missing
    if closest is None:
        slot = own.new_full((len(order), order.shape[1] - spans.targets), spans.targets)
    else:
        similarity, slot = closest
    if tau is not None:
        apart = similarity <= tau
        if lowest is not None:
            apart = apart.scatter(1, lowest, True)
        slot = slot.masked_fill(apart, spans.targets)
    if missing is not None:
        slot = slot.masked_fill(missing, NOWHERE)
    depends = tau is not None and lowest is None
    has_one = (slot == spans.targets).any(1) if depends else None
    return torch.cat([own, slot], 1), pull(importance, eta).gather(1, order), has_one


@fused
def group_softmax(logits: torch.Tensor, slot: torch.Tensor, slots: int, whole: bool = False) -> torch.Tensor:
    """Softmax of ``logits`` (B, N) over the tokens of the same output slot (eq. 6).

    ``slot`` (B, N) is in 0 … ``slots`` - 1; a token whose slot is :data:`NOWHERE` gets weight 0; ``whole``
    says that there is none.
    """
    dropped = None if whole else slot == NOWHERE
    index = slot if dropped is None else slot.masked_fill(dropped, slots)
    shape = (len(logits), slots + (not whole))
    top = logits.new_full(shape, -torch.inf).scatter_reduce_(1, index, logits, "amax")
    power = (logits - top.gather(1, index)).exp()
    total = logits.new_zeros(shape).scatter_add_(1, index, power)
    weights = power / total.gather(1, index)
    return weights if dropped is None else weights.masked_fill(dropped, 0.0)


@fused
def merge_groups(
    hidden: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor, slots: int, whole: bool = False
) -> torch.Tensor:
    """Weighted sum of the tokens of each output slot: (B, N, D) to (B, slots, D) (eq. 7, V′ = W V).

    W has at most one non-zero a column, which ``slot`` and ``weights``, both (B, N), give; ``whole`` as of
    :func:`group_softmax`. Sums are in float32, those of float64 hidden states in float64.
    """
    batch, _, width = hidden.shape
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    room = slots + (not whole)
    index = flat_rows(slot if whole else slot.remainder(room), room)  # NOWHERE, -1, is the last one
    # Converted first: torch multiplies numbers of two kinds more slowly.
    parts = (hidden.to(precise) * weights[..., None]).flatten(0, 1)
    merged = hidden.new_zeros((batch * room, width), dtype=precise).index_add_(0, index, parts)
    return merged.view(batch, room, width)[:, :slots].to(hidden.dtype)
