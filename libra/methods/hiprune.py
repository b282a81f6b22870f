"""HiPrune (Training-Free Visual Token Pruning via Hierarchical Attention, Findings of ACL 2026): anchors,
their neighbours, registers.

Both scores are attention received in the vision tower (mean over heads and queries). Anchors are the round(T
· α / 5) tokens, α = 0.1, with the highest score in a middle layer (9 of CLIP's 24, counted from 1); they stay
with their left, right, upper and lower neighbours in raster order, clamped to the picture. The other places
go to the highest scores of the second last layer.
"""

from fractions import Fraction
from typing import TYPE_CHECKING

from .. import ops
from .registry import Method, register_select

if TYPE_CHECKING:
    import torch

ALPHA = 0.1  # share of T that anchors and their neighbours may take
SHALLOW = Fraction(9, 24)  # the middle layer, as a share of the tower's depth
AROUND = 5  # an anchor and its four neighbours

METHOD = Method(
    "hiprune",
    description="tokens that a middle layer of the vision tower attends to, their neighbours, and those"
    " of a deep layer",
    section="HiPrune, Findings of ACL 2026, arXiv 2508.00553",
    keys={"select": "hiprune", "merge": "drop"},
    places=(),
    place="input",
    cost="a sort of N scores for each of two layers",
    deviation="the released code for Qwen can keep fewer than T tokens, because its scores exceed the 1"
    " it subtracts",
    family="attention",
)


@register_select("hiprune", reads=(), needs=("tower_received", "grid"), trusted=True, tower_layers=(SHALLOW,))
def hiprune(candidates, c):
    """``tower_received`` (2 or more, B, N): its first layer gives the anchors, its last one the registers."""
    shallow, deep = candidates.context.tower_received[0], candidates.context.tower_received[-1]
    return candidates.choose(_of_spans, shallow, deep, candidates.grid_width)


def _of_spans(k: int, shallow, deep, width) -> "torch.Tensor":
    """(S, k) places of spans of n tokens, from two scores (S, n) and the width of the grid (S, n)."""
    n = shallow.shape[1]
    anchors = shallow.argsort(dim=1, descending=True, stable=True)[:, : round(k * ALPHA / AROUND)]
    first = shallow.new_zeros(shallow.shape)
    for step in (0, -1, 1, -width[:, :1], width[:, :1]):
        first = first.scatter(1, (anchors + step).clamp(0, n - 1), 1.0)
    # A set: the anchors and their neighbours come before every other token.
    return ops.preferred(deep.argsort(dim=1, descending=True, stable=True), first.bool(), k)
