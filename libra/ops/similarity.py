"""Cosine similarity of many tokens to many others, a piece at a time: what eq. 5 and Turbo's redundancy ask
for."""

import torch
import torch.nn.functional as F

from .dispatch import fused

PIECE = 1 << 24  # similarities held at a time: 64 MB
HASHED = 32  # rows whose hash is computed at a time


@fused
def most_similar(
    tokens: torch.Tensor,
    others: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor] | None = None,
    itself: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token the one of the others that is most similar to it; the first of several that are the same
    vector.

    Args:
        tokens: (B, Q, D).
        others: (B, K, D).
        groups: (B, Q) and (B, K) integers; a token is compared with those of its own group only. None
            compares all.
        itself: False where both are the same tokens and none is to be compared with itself; of several any
            may be named then.

    Returns:
        the similarities (B, Q) float32 in [-1, 1], -inf where a token has nobody to be compared with, and the
        places (B, Q).
    """
    batch, count, _ = tokens.shape
    # The tokens' own lengths change nothing in whom they are most similar to.
    keys = (
        F.normalize(others.float(), dim=-1).add_(0.0).transpose(1, 2)
    )  # (B, D, K); a zero has no sign after adding 0
    best = torch.empty(batch, count, device=tokens.device)
    place = torch.empty(batch, count, dtype=torch.long, device=tokens.device)
    step = max(1, PIECE // max(1, batch * others.shape[1]))
    for start in range(0, count, step):
        piece = tokens[:, start : start + step].float()
        scores = piece @ keys  # (B, q, K)
        if groups is not None:
            apart = groups[0][:, start : start + step, None] != groups[1][:, None]
            scores = scores.masked_fill_(apart, -torch.inf)
        if not itself:
            scores.diagonal(start, 1, 2).fill_(-torch.inf)
        found = scores.argmax(-1, keepdim=True)
        lengths = torch.linalg.vector_norm(piece, dim=-1).clamp(min=1e-12)
        best[:, start : start + step] = scores.gather(-1, found)[..., 0] / lengths
        place[:, start : start + step] = found[..., 0]
    best = torch.where(best.isinf(), best, best.clamp(-1, 1))  # rounding makes cosines like 1.0000002
    if itself:  # a matrix product does not round every column alike, so equal ones may differ in the last bit
        place = first_equal(keys.transpose(1, 2), None if groups is None else groups[1]).gather(1, place)
    return best, place


def first_equal(rows: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """(B, K): for each of ``rows`` (B, K, D), float32, the first one of its group (B, K) that is the same
    vector.

    Rows are compared by a 64-bit hash of their bits, added up in whole numbers: exact in any order, on any
    device.
    """
    rows = F.pad(rows, (0, 1)) if rows.shape[-1] % 2 else rows.contiguous()
    bits = rows.view(torch.int64)  # two numbers each
    key = torch.cat([_hash(part) for part in bits.split(HASHED, dim=1)], 1)
    if groups is not None:
        key = key + groups * 0x1E3779B97F4A7C15
    order = key.argsort(dim=1, stable=True)
    ordered = key.gather(1, order)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = torch.arange(key.shape[1], device=rows.device).expand_as(key)
    first = torch.where(begins, place, 0).cummax(1).values  # of each run of equal keys
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
    """Cosine similarity (B, Q) float32 of each of ``tokens`` (B, Q, D) to the one of ``others`` (B, Q, D) in
    its place.

    Computed in float64, so that pairs which are equally similar come out equal, whatever batch they are in.
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
