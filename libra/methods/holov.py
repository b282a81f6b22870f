"""HoloV (Don't Just Chase "Highlighted Tokens" in MLLMs, NeurIPS 2025): quotas over runs of the picture by
their share of the [CLS] attention.

The tokens are cut into 16 runs in raster order. A token scores 1000 times its [CLS] attention plus α = 0.09
times the variance of its cosines with the others of its run, which is scaled to the attention's mean in the
run; a run's share of T is its mean score's share of all runs', rounded down, and what is missing goes one
each to the runs of highest share. Inside a run attention decides. Because of the scaling the variance
changes no share, and so nothing that is kept.
"""

from typing import TYPE_CHECKING

from .. import ops
from .registry import Method, register_select

if TYPE_CHECKING:
    import torch

RUNS = 16
ALPHA = 0.09  # weight of the variance
SCALE = 1000  # of the attention
EPSILON = 1e-6

METHOD = Method(
    "holov",
    description="the tokens with the most attention of the vision tower in each of 16 runs, as many as the"
    " run's share of it",
    section="HoloV, NeurIPS 2025",
    keys={"select": "holov", "merge": "drop", "importance": "tower"},
    places=(),
    place="input",
    cost="16 similarities of N/16 × N/16 a span, and a sort of N scores",
    deviation="where a run's quota exceeds its tokens the released code fills up with rows of zeros; ours"
    " gives the surplus to the runs of highest share that have room",
    family="intervals",
)


@register_select("holov", reads=("hidden", "importance"), trusted=True)
def holov(candidates, c):
    """Quotas over runs, see :func:`quotas`; inside a run the most important tokens."""

    def of_spans(k, x, score):
        return in_order(score, quotas(shares(x, score), x.shape[1], k), k)

    return candidates.choose(of_spans, candidates.hidden.detach(), candidates.importance)


def sizes(n: int) -> list[int]:
    """Tokens of each run of a span of n; the first ones are one longer where 16 does not divide n."""
    return [n // RUNS + (run < n % RUNS) for run in range(RUNS)]


def runs(like: "torch.Tensor") -> "torch.Tensor":
    """(S, n): the run of each token of ``like`` (S, n)."""
    numbers = [run for run, size in enumerate(sizes(like.shape[1])) for _ in range(size)]
    return like.new_tensor(numbers).long().expand(like.shape)


def token_scores(x: "torch.Tensor", attention: "torch.Tensor") -> "torch.Tensor":
    """(S, n) float32 from the tokens (S, n, D) and their attention (S, n)."""
    scaled, found, first = SCALE * attention.float(), [], 0
    for size in sizes(x.shape[1]):
        own, part = scaled[:, first : first + size], x[:, first : first + size].float()
        first += size
        directions = part / (part.norm(dim=2, keepdim=True) + EPSILON)
        cosines = directions @ directions.transpose(1, 2)
        cosines = cosines - cosines.diagonal(dim1=1, dim2=2).diag_embed()
        others = max(1, size - 1)
        mean = cosines.sum(2, keepdim=True) / others
        variance = ((cosines - mean) ** 2).sum(2) / others
        level = own.abs().mean(1, keepdim=True) / (variance.abs().mean(1, keepdim=True) + EPSILON)
        found.append(own + ALPHA * variance * level)
    return ops.cat(found, 1)


def shares(x: "torch.Tensor", attention: "torch.Tensor") -> "torch.Tensor":
    """(S, 16): each run's share of the tokens that are kept."""
    scores = ops.group_mean(token_scores(x, attention), runs(attention), RUNS)
    return scores / (scores.sum(1, keepdim=True) + EPSILON)


def quotas(share: "torch.Tensor", n: int, k: int) -> "torch.Tensor":
    """(S, 16) whole numbers, which sum to ``k``; none exceeds the tokens of its run."""
    quota = (share * k).floor().long()
    by_share = share.argsort(dim=1, descending=True, stable=True)
    rank = by_share.argsort(dim=1, stable=True)
    quota = quota + (rank < k - quota.sum(1, keepdim=True)).long()
    room = quota.new_tensor(sizes(n)).expand_as(quota)
    surplus = (quota - room).clamp(min=0).sum(1, keepdim=True)
    quota = quota.minimum(room)
    free = (room - quota).gather(1, by_share)
    given = (surplus - (free.cumsum(1) - free)).clamp(min=0).minimum(free)
    return quota.scatter_add(1, by_share, given)


def in_order(score: "torch.Tensor", quota: "torch.Tensor", k: int) -> "torch.Tensor":
    """(S, k): the tokens kept, run after run, each run's by descending score; a whole run in raster order."""
    run = runs(score)
    rank = ops.rank_within(score, run, RUNS)
    wanted = quota.gather(1, run)
    whole = wanted == score.new_tensor(sizes(score.shape[1])).long()[run]
    order = run * score.shape[1] + rank.where(~whole, ops.token_numbers(score))
    order = order.masked_fill(rank >= wanted, RUNS * score.shape[1])
    return order.argsort(dim=1, stable=True)[:, :k]
