"""Choices within groups of tokens (runs, windows, frames), by coverage and by density, for S spans of n
tokens at once.

As in :mod:`libra.ops.greedy` nothing here waits for the device, and similarities are float32.
"""

import math

import torch

from .greedy import _first_highest

__all__ = ["cover_most", "density_peaks", "group_mean", "preferred", "rank_within", "token_numbers"]


def token_numbers(like: torch.Tensor) -> torch.Tensor:
    """(S, n) int64: 0, 1, … n - 1 for each span of ``like`` (S, n, …); not to be written into."""
    return torch.arange(like.shape[1], device=like.device).expand(like.shape[:2])


def rank_within(scores: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """(S, n): how many tokens of a token's own group have a higher score, or an equal one and come before it.

    scores: (S, n); group: (S, n), numbers below ``groups``.
    """
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    by_group = by_score.gather(1, group.gather(1, by_score).argsort(dim=1, stable=True))
    sizes = torch.zeros(len(group), groups, dtype=torch.long, device=group.device)
    sizes = sizes.scatter_add(1, group, torch.ones_like(group))
    first = (sizes.cumsum(1) - sizes).gather(1, group)
    return torch.empty_like(by_group).scatter_(1, by_group, token_numbers(scores)) - first


def preferred(order: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """(S, count): of the tokens in ``order`` (S, n) first those where ``chosen`` (S, n) bool is True, then
    the others."""
    first = chosen.gather(1, order).long().argsort(dim=1, descending=True, stable=True)
    return order.gather(1, first)[:, :count]


def group_mean(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """(S, groups) or (S, groups, D): the mean of ``values`` (S, n) or (S, n, D) over each group of ``group``
    (S, n); 0 for an empty group."""
    shape = (len(group), groups, *values.shape[2:])
    index = group if values.ndim == 2 else group[:, :, None].expand_as(values)
    total = values.new_zeros(shape).scatter_add(1, index, values)
    count = values.new_zeros(len(group), groups).scatter_add(1, group, values.new_ones(group.shape))
    return total / count.clamp(min=1).view(len(group), groups, *[1] * (values.ndim - 2))


def cover_most(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(S, count): columns of ``rows`` (S, R, n), none negative, in the order in which a greedy choice covers
    most: each adds most to the sum over rows of the largest entry among the columns chosen; the first of
    equals."""
    best = rows.new_zeros(len(rows), rows.shape[1], 1)
    taken = torch.zeros(len(rows), rows.shape[2], dtype=torch.bool, device=rows.device)
    picks = []
    for _ in range(count):
        gain = (rows - best).clamp_(min=0).sum(1).masked_fill(taken, -math.inf)
        picks.append(_first_highest(gain))
        taken = taken.scatter(1, picks[-1], True)
        column = rows.gather(2, picks[-1][:, None].expand(-1, rows.shape[1], 1))
        best = torch.maximum(best, column)
    return torch.cat(picks, 1)


def density_peaks(x: torch.Tensor, valid: torch.Tensor, centres: int, nearest: int = 5) -> torch.Tensor:
    """(S, n): the centre that each token of ``x`` (S, n, D) is clustered to, by density peaks; a centre is
    its own.

    Distance is euclidean over √D; the density of a token is exp(-mean of the squares of the ``nearest``
    smallest distances, its own included); centres are the ``centres`` tokens with the highest product of
    density and distance to the nearest denser token (the largest distance where none is denser). Each token
    joins its nearest centre. valid: (S, n) bool, tokens that take part, at least ``centres`` of a span; what
    others are given means nothing.
    """
    spans, count, width = x.shape
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(width)
    both = valid[:, :, None] & valid[:, None]
    distance = distance.masked_fill(~both, math.inf)
    near = distance.topk(min(nearest, centres, count), dim=2, largest=False).values
    density = (-(near**2).mean(2)).exp().masked_fill(~valid, -1.0)
    # Of equally dense tokens the first counts as the denser one, so that two equal tokens are not both peaks.
    place = torch.arange(count, device=x.device)
    equal = (density[:, None] == density[:, :, None]) & (place < place[:, None])
    denser = (density[:, None] > density[:, :, None]) | equal
    apart = distance.masked_fill(~denser, math.inf).amin(2)
    largest = distance.masked_fill(~both, 0.0).amax(2)
    score = density * torch.where(apart.isinf(), largest, apart)
    chosen = score.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)[:, :centres]
    to_centre = distance.gather(2, chosen[:, None].expand(-1, count, -1))
    joined = chosen.gather(1, to_centre.argmin(2))
    return joined.scatter(1, chosen, chosen)
