"""Step-by-step choices of tokens, for S spans of n tokens at once: one n × n similarity a span, and no host
synchronisation.

Every choice is made in float32 or better: in half precision the original methods do not keep their own sets.
"""

import math

import torch
import torch.nn.functional as F
from torch import cat

from .dispatch import fused

__all__ = ["cat", "cosines", "farthest_first", "greedy_map", "similarities", "thin_out"]


def similarities(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(S, n, n) cosine similarities of ``x`` (S, n, D); 0 for a token of zeros."""
    directions = F.normalize(x.to(dtype), dim=-1)
    return directions @ directions.transpose(1, 2)


def cosines(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(S, n, m) cosine similarities of ``x`` (S, n, D) with ``y`` (S, m, D), in their own precision."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(1, 2)


def _first_highest(scores: torch.Tensor) -> torch.Tensor:
    """(S, 1): where ``scores`` (S, n) is highest, the first of several."""
    highest = scores == scores.amax(1, keepdim=True)
    place = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(highest, place, scores.shape[1]).amin(1, keepdim=True).clamp(max=scores.shape[1] - 1)


def farthest_first(x: torch.Tensor, count: int) -> torch.Tensor:
    """(S, count): tokens of ``x`` (S, n, D) in the order in which DivPrune picks them.

    First the token whose nearest other token is farthest, then always the one whose nearest picked token is
    farthest; distance is 1 - cosine.
    """
    similarity = similarities(x)
    itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    nearest = 1 - similarity.masked_fill(itself, -math.inf).amax(2)
    return pick_farthest(similarity, nearest, count)


@fused
def pick_farthest(similarity: torch.Tensor, nearest: torch.Tensor, count: int) -> torch.Tensor:
    """(S, count): max-min picks by the distance 1 - ``similarity`` (S, n, n), float32; the first one is where
    ``nearest`` (S, n) is highest."""
    picks = [_first_highest(nearest)]
    nearest = torch.full_like(nearest, math.inf)
    for _ in range(count - 1):
        row = similarity.gather(1, picks[-1][:, :, None].expand(-1, -1, similarity.shape[1]))[:, 0]
        nearest = torch.minimum(nearest, 1 - row).scatter(1, picks[-1], -math.inf)
        picks.append(_first_highest(nearest))
    return torch.cat(picks, 1)


@fused
def greedy_map(kernel: torch.Tensor, count: int) -> torch.Tensor:
    """(S, count): tokens in the order in which greedy MAP inference of a determinantal point process picks
    them.

    ``kernel`` (S, n, n) is positive semidefinite. Past its numerical rank nothing is gained any more: the
    rest is picked by the diagonal, where the usual update would divide by 0.
    """
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    diagonal = gain.clone()
    floor = 1e-6 * gain.amax(1, keepdim=True).clamp(min=1e-30)
    taken = torch.zeros_like(gain, dtype=torch.bool)
    columns = kernel.new_zeros(len(kernel), count, kernel.shape[1])
    picks = []
    for step in range(count):
        score = torch.where(gain > floor, gain, diagonal * floor).masked_fill(taken, -math.inf)
        pick = _first_highest(score)
        picks.append(pick)
        taken = taken.scatter(1, pick, True)
        at_pick = columns[:, :step].gather(2, pick[:, None].expand(-1, step, 1))  # (S, step, 1)
        row = kernel.gather(1, pick[:, :, None].expand(-1, -1, kernel.shape[1]))[:, 0]
        own = gain.gather(1, pick)
        update = (row - (at_pick * columns[:, :step]).sum(1)) / own.clamp(min=1e-30).sqrt()
        update = torch.where(own > floor, update, 0.0)
        columns[:, step] = update
        gain = gain - update**2
    return torch.cat(picks, 1)


def thin_out(x: torch.Tensor, order: torch.Tensor, count: int, most: int = 8) -> torch.Tensor:
    """(S, count): what VisPruner leaves of the list ``order`` (S, R) of tokens of ``x`` (S, n, D).

    In every round the list is split into its even and its odd places, each even one is compared with all odd
    ones, and the ``most`` (fewer in the last round) with the highest cosine are dropped; the even places
    left, most similar first, and the odd ones are the new list. Where the list is odd the even half has one
    more.
    """
    similarity = similarities(
        x, torch.float64
    )  # float32 noise is as large as the smallest gaps between cosines
    while order.shape[1] > count:
        drop = min(most, order.shape[1] - count)
        even, odd = order[:, 0::2], order[:, 1::2]
        rows = similarity.gather(1, even[:, :, None].expand(-1, -1, x.shape[1]))
        highest = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(2)
        by_similarity = highest.argsort(dim=1, descending=True, stable=True)
        order = torch.cat([even.gather(1, by_similarity)[:, drop:], odd], 1)
    return order
