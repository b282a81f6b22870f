"""SparseVLM (Visual Token Sparsification, ICML 2025), version 1: what the question's raters attend to, and a
part of the rest recycled in clusters.

Raters are the text tokens after the picture whose mean, over the visual tokens, of the softmax over the text
of visual · text embeddings exceeds the mean over the text; they are chosen once, before the first layer. A
visual token's score is the raters' attention to it, averaged over them and the heads. Of the n tokens that
are not kept, the m = ⌊0.3 n⌋ + 1 with the highest scores are clustered into ⌊m / 10⌋ + 1 groups by density
peaks, and each group becomes its mean. The published counts of kept tokens after layers 2, 6 and 15 of
LLaVA-1.5's 576 are 300, 200, 110 (called 192), 303, 110, 36 (128) and 66, 30, 17 (64), without the clusters;
ours counts them in.
"""

from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

from .. import ops
from .registry import Method, register_merge, register_select

if TYPE_CHECKING:
    import torch

PLACES = (Fraction(3, 32), Fraction(7, 32), Fraction(16, 32))
RECYCLED = 0.3  # share of the tokens that are not kept
CLUSTER = 10  # recycled tokens of a cluster
HEADS = 14  # of the decoder's, in version 2

METHOD = Method(
    "sparsevlm",
    description="the tokens that the question's raters attend to, and clusters of some of the others",
    section="SparseVLM, ICML 2025",
    keys={"select": "sparsevlm", "merge": "sparsevlm", "importance": "raters"},
    places=PLACES,
    cost="attention rows of all the question's tokens, and 0.3 N × 0.3 N distances a span",
    deviation="T counts the clusters; a cluster stands at the place of its centre, not after the kept tokens,"
    " and the density has no noise",
    family="attention",
)


@register_select("sparsevlm", reads=("hidden", "importance"), trusted=True)
def sparsevlm(candidates, c):
    """The most important tokens, and the centres of the clusters."""
    flat = candidates.flat_index
    into = candidates.memo["into"] = flat.clone()

    def of_spans(k, x, score, place):
        kept, recycled, clusters = counts(x.shape[1], k)
        order = score.argsort(dim=1, descending=True, stable=True)
        some = order[:, kept : kept + recycled]
        joined = ops.density_peaks(ops.take(x, some), some >= 0, clusters)
        into.view(-1)[place.gather(1, order[:, kept + recycled :])] = -1
        centres = some.gather(1, joined)
        into.view(-1)[place.gather(1, some)] = place.gather(1, centres)
        own = (centres == some).long().argsort(dim=1, descending=True, stable=True)[:, :clusters]
        return ops.cat([order[:, :kept], some.gather(1, own)], 1)

    return candidates.choose(of_spans, candidates.hidden.detach(), candidates.importance, flat)


@register_merge("sparsevlm", compensates=False, reads=("hidden",), trusted=True, follows=("sparsevlm",))
def recycle(matches, c):
    """Each recycled token goes to the slot of its centre, as a plain mean; the others are gone."""
    into = matches.candidates.memo["into"]
    slot = matches.own_slot.flatten()[into.clamp(min=0)].masked_fill(into < 0, -1)
    return slot, matches.candidates.importance.new_zeros(slot.shape)


@lru_cache(maxsize=256)
def counts(n: int, k: int) -> tuple[int, int, int]:
    """Kept, recycled and clusters of a span of ``n`` tokens, where kept and clusters together are ``k``."""
    if n == k:
        return n - 1, 1, 1  # a cluster of one
    for kept in range(k - 1, -1, -1):
        recycled = int(RECYCLED * (n - kept)) + 1
        if kept + recycled // CLUSTER + 1 == k:
            return kept, recycled, k - kept
    return k - 1, int(RECYCLED * (n - k + 1)) + 1, 1


def raters(visual: "torch.Tensor", text: "torch.Tensor", there: "torch.Tensor", asked: "torch.Tensor"):
    """(B, G, R) float32: how much each of R text tokens counts among the raters, which sum to 1.

    Args:
        visual: (B, N, D) embeddings; there: (B, N) bool, which of them are visual tokens.
        text: (B, R, D) embeddings; asked: (B, G, R) bool, the text of each of G runs that rate together.
    """
    products = visual.float() @ text.float().transpose(1, 2)  # (B, N, R)
    shares = products[:, None].masked_fill(~asked[:, :, None], float("-inf")).softmax(3).nan_to_num()
    weight = there.float() / there.sum(1, keepdim=True).clamp(min=1)
    score = (shares * weight[:, None, :, None]).sum(2)
    mean = score.sum(2, keepdim=True) / asked.sum(2, keepdim=True).clamp(min=1)
    chosen = asked & (score > mean)
    # Of a single token, or of equal ones, none exceeds the mean.
    chosen = chosen.where(chosen.any(2, keepdim=True), asked).float()
    return chosen / chosen.sum(2, keepdim=True).clamp(min=1)


def of_strongest_heads(attention: "torch.Tensor", rates: "torch.Tensor", visual: "torch.Tensor"):
    """(B, R, K): attention (B, H, R, K) averaged over the 14 heads whose raters look most at visual tokens.

    rates: (B, R) bool, which of the rows are raters'; visual: (B, S) bool, of the last S keys.
    """
    own = attention[..., -visual.shape[1] :] * visual[:, None, None] * rates[:, None, :, None]
    heads = own.sum((2, 3)).topk(min(HEADS, attention.shape[1]), dim=1).indices
    return attention.gather(1, heads[:, :, None, None].expand(-1, -1, *attention.shape[2:])).mean(1)
