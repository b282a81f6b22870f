"""PruMerge+ (LLaVA-PruMerge, ICCV 2025): the outliers of PruMerge, and tokens spread evenly over the picture.

Outliers are the tokens whose [CLS] attention is above the third quartile by more than 1.5 times the distance
of the quartiles. The released code adds every s-th token that is none of them, s a third of one over the
outliers' share, so that the picture decides how many are kept, about a quarter; where more than a sixth are
outliers, s is 1 and all stay. Neighbours are added to all of them, and one sum of the rest comes last, as in
:mod:`libra.methods.prumerge`.
"""

from typing import TYPE_CHECKING

from .. import ops
from .prumerge import DEVIATION, NEEDS, outliers, share_of, with_neighbours
from .registry import Method, register_select

if TYPE_CHECKING:
    import torch

EVENLY = 3  # of the tokens between two outliers on average, how many are kept

METHOD = Method(
    "prumerge-plus",
    description="PruMerge of the outliers and of tokens spread evenly over the picture",
    section="LLaVA-PruMerge, ICCV 2025",
    keys={"select": "prumerge-plus", "merge": "prumerge"},
    places=(),
    place="tower",
    cost="a sort of N scores, and T × N similarities of keys",
    deviation="where T is given, outliers come first and even places of the others fill it up (as_released:"
    " every s-th token, then by attention); the released code takes as many as there are (``keep: adaptive``,"
    f" in the tower). {DEVIATION}",
    family="merging",
)


def own_count(score: "torch.Tensor") -> int:
    """The outliers, every s-th of the others, and one for the rest."""
    outlier = outliers(score.float())[None]
    spread = int(every_step(len(score), outlier, ops.token_numbers(outlier)).sum())
    return min(len(score), int(len(score) * share_of(score)) + spread + 1)


@register_select(
    "prumerge-plus", reads=("hidden", "as_released"), needs=NEEDS, trusted=True, own_count=own_count
)
def prumerge_plus(candidates, c):
    """Outliers by descending attention, then even places in order."""
    spread = every_step if c.as_released else even_places
    return with_neighbours(candidates, lambda k, score: ranked(k, score, spread))


def ranked(k: int, score: "torch.Tensor", spread) -> "torch.Tensor":
    """(S, n): the tokens in the order in which they are kept."""
    n = score.shape[1]
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    outlier = outliers(score) & (rank < k - 1)
    place = ops.token_numbers(score)
    order = (n + place).where(spread(k, outlier, place), 2 * n + rank)
    return rank.where(outlier, order).argsort(dim=1)


def even_places(k: int, outlier: "torch.Tensor", place: "torch.Tensor") -> "torch.Tensor":
    """(S, n) bool: of the tokens that are not outliers as many as are missing to k - 1, evenly in order."""
    others = (~outlier).long()
    number, count = others.cumsum(1) - 1, others.sum(1, keepdim=True).clamp(min=1)
    missing = k - 1 - outlier.long().sum(1, keepdim=True)
    return ~outlier & ((number + 1) * missing // count > number * missing // count)


def every_step(k: int, outlier: "torch.Tensor", place: "torch.Tensor") -> "torch.Tensor":
    """(S, n) bool: every s-th token but the last of all, outliers apart."""
    share = outlier.double().mean(1, keepdim=True).clamp(min=1 / outlier.shape[1])
    step = ((1 / share).floor() / EVENLY).floor().long().clamp(min=1)
    return ~outlier & (place % step == 0) & (place < outlier.shape[1] - 1)
