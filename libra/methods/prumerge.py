"""PruMerge (LLaVA-PruMerge: Adaptive Token Reduction, ICCV 2025): the tokens that stand out for the [CLS]
token, with their neighbours added.

Attention and keys are those of the tower's layer that reads the features (CLIP's last one), taken as one head
over the whole width. Of T tokens T - 1 are those with the highest [CLS] attention. To each the 32 other
tokens with the most similar keys are added, each times its attention, whether they are kept or not; the T-th
is the sum of all that are not kept, each times its attention. The released code keeps as many as are
outliers: above the third quartile by more than 1.5 times the distance of the quartiles.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import ops
from .registry import Method, register_merge, register_select

if TYPE_CHECKING:
    import torch

NEIGHBOURS = 32
BEYOND = 1.5  # distances of the quartiles that an outlier is above the third one
NEEDS = ("tower_next", "tower_next_keys")
DEVIATION = (
    "Tokens stay in raster order, the sum of the rest at the last place that is not kept (as_released, in the"
    " tower: in its order). Where the features are those of the last layer its own attention is read, where"
    " there is no [CLS] token the attention received"
)

METHOD = Method(
    "prumerge",
    description="the tokens with the most attention of the [CLS] token, each with its neighbours added, and"
    " one sum of the rest",
    section="LLaVA-PruMerge, ICCV 2025",
    keys={"select": "prumerge", "merge": "prumerge"},
    places=(),
    place="tower",
    cost="a sort of N scores, and T × N similarities of keys",
    deviation="T may be given; the released code takes the number of outliers (``keep: adaptive``, in the"
    f" tower). {DEVIATION}",
    family="merging",
)


def outliers(score: "torch.Tensor") -> "torch.Tensor":
    """(…, n) bool: where the attention (…, n) is above the third quartile by 1.5 distances of the
    quartiles."""
    low, high = (score.quantile(share, dim=-1, keepdim=True) for share in (0.25, 0.75))
    return score > high + BEYOND * (high - low)


def share_of(score: "torch.Tensor") -> float:
    """The outliers' share of a span (n,)."""
    return int(outliers(score.float()).sum()) / len(score)


def own_count(score: "torch.Tensor") -> int:
    """The outliers, and one for the rest."""
    return min(len(score), int(len(score) * share_of(score)) + 1)


@register_select("prumerge", reads=("hidden", "as_released"), needs=NEEDS, trusted=True, own_count=own_count)
def prumerge(candidates, c):
    """The tokens with the most attention."""
    return with_neighbours(candidates, lambda k, score: score.argsort(dim=1, descending=True, stable=True))


def with_neighbours(candidates, ranked: "Callable[[int, torch.Tensor], torch.Tensor]") -> "torch.Tensor":
    """Targets: the first T - 1 of ``ranked(T, scores)`` (S, n), and a place for the sum of the rest.

    What each of them becomes, its number and where every token goes are left for the merge.
    """
    hidden, flat, memo = candidates.hidden, candidates.flat_index, candidates.memo
    becomes = memo["becomes"] = hidden.float().flatten(0, 1).clone()
    number, into = flat.flatten().clone(), flat.flatten().clone()
    memo["number"], memo["into"] = number, into

    def of_spans(k, x, keys, score, place):
        everyone = ops.token_numbers(score)
        if k == x.shape[1]:
            number[place] = everyone
            return everyone
        kept = ranked(k, score)[:, : k - 1]
        left = score.new_ones(score.shape).scatter(1, kept, 0.0)
        last = (everyone * left.long()).argmax(1, keepdim=True)
        rest = (x.float() * (score * left)[:, :, None]).sum(1, keepdim=True)
        chosen = ops.cat([kept, last], 1)
        becomes[place.gather(1, chosen)] = ops.cat([added(x, keys, score, kept), rest], 1)
        number[place.gather(1, chosen)] = everyone[:, :k]
        into[place] = place.where(left == 0, place.gather(1, last))
        return chosen

    context = candidates.context
    return candidates.choose(of_spans, hidden, context.tower_next_keys, context.tower_next.float(), flat)


def added(
    x: "torch.Tensor", keys: "torch.Tensor", attention: "torch.Tensor", kept: "torch.Tensor"
) -> "torch.Tensor":
    """(S, K, D): the tokens ``kept`` (S, K) of ``x`` (S, n, D), each with its neighbours by ``keys``
    (S, n, C) times their ``attention`` (S, n)."""
    keys = keys.float()
    cosines = ops.cosines(ops.take(keys, kept), keys).scatter(2, kept[:, :, None], float("-inf"))
    near = cosines.topk(min(NEIGHBOURS, x.shape[1] - 1), dim=2).indices
    weights = attention[:, None].expand_as(cosines).gather(2, near)
    weights = cosines.new_zeros(cosines.shape).scatter(2, near, weights)
    return ops.take(x, kept).float() + weights @ x.float()


@register_merge(
    "prumerge",
    compensates=False,
    reads=("hidden",),
    needs=NEEDS,
    gives_weights=True,
    gives_tokens=True,
    trusted=True,
    follows=("prumerge", "prumerge-plus"),
)
def take_what_they_became(matches, c):
    """A token has a part in several of them; its slot is its own, or that of the sum of the rest."""
    candidates, memo = matches.candidates, matches.candidates.memo
    becomes = memo["becomes"].view(matches.hidden.shape)
    memo["tokens"] = ops.take(becomes, matches.targets).to(matches.hidden.dtype)
    slot = matches.own_slot.flatten()[memo["into"]].view(matches.is_target.shape)
    if c.as_released:
        number = memo["number"].view(slot.shape).gather(1, matches.targets)
        memo["order"] = number.argsort(dim=1, stable=True).argsort(dim=1)
    attention = candidates.context.tower_next.float()
    return slot, attention.where(~matches.is_target, attention.new_ones(()))
