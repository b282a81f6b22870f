"""ToMe (Token Merging: Your ViT But Faster, ICLR 2023): bipartite soft matching, here as one merge of a span.

Tokens at even places are compared with those at odd places; the r of highest cosine merge into their best odd
token, as a mean weighted with how many tokens each stands for. A step can remove at most half of the tokens,
so a smaller T takes a chain of halvings, each on the tokens that the one before left.
"""

from typing import TYPE_CHECKING

from .. import ops
from .registry import Method, register_merge, register_select

if TYPE_CHECKING:
    import torch

METHOD = Method(
    "tome",
    description="the most similar pairs of tokens are averaged, in halvings, until the wanted number is left",
    section="ToMe, ICLR 2023",
    keys={"select": "tome", "merge": "tome"},
    places=(),
    place="input",
    cost="N/2 × N/2 similarities a span and halving",
    deviation="the matching runs once before the language model, on its embeddings, not in every layer of"
    " the tower",
    family="merging",
)


@register_select("tome", reads=("hidden",), trusted=True)
def tome(candidates, c):
    """The tokens that others merge into, or that stay as they are."""
    flat = candidates.flat_index
    into = candidates.memo["into"] = flat.clone()

    def of_spans(k, x, place):
        found, left = match_chain(x.float(), halvings(x.shape[1], k))
        into.view(-1)[place] = place.gather(1, found)
        return left

    return candidates.choose(of_spans, candidates.hidden.detach(), flat)


@register_merge("tome", compensates=False, reads=("hidden",), trusted=True, follows=("tome",))
def merge_matched(matches, c):
    """Each token goes to the slot of the token it was merged into; plain means, which chains of weighted
    means are."""
    into = matches.candidates.memo["into"]
    slot = matches.own_slot.flatten()[into]
    return slot, matches.candidates.importance.new_zeros(slot.shape)


def halvings(n: int, k: int) -> list[int]:
    """How many tokens each step removes to get from n to k."""
    removed = []
    while n > k:
        removed.append(min(n // 2, n - k))
        n -= removed[-1]
    return removed


def match_chain(x: "torch.Tensor", removed: list[int]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Bipartite soft matching of ``x`` (S, n, D) in steps that each remove so many tokens.

    Returns:
        into (S, n): the token that each one ends up in; left (S, n'): the tokens that are left, in ToMe's
        order: the even ones by descending best cosine, then the odd ones.
    """
    spans, n, width = x.shape
    size = x.new_ones(spans, n, 1)
    everyone = left = into = ops.token_numbers(x)
    for r in removed:
        even, odd = x[:, 0::2], x[:, 1::2]
        similarity = ops.cosines(even, odd)
        best = similarity.max(2)
        order = best.values.argsort(dim=1, descending=True, stable=True)
        merged, kept = order[:, :r], order[:, r:]
        goal = best.indices.gather(1, merged)  # among the odd tokens
        even_left, odd_left = left[:, 0::2], left[:, 1::2]
        # Whoever was merged into such an even token now goes to its odd one.
        renamed = everyone.scatter(1, even_left.gather(1, merged), odd_left.gather(1, goal))
        into = renamed.gather(1, into)
        size_even, size_odd = size[:, 0::2], size[:, 1::2]
        weighted = (even * size_even).gather(1, merged[:, :, None].expand(-1, -1, width))
        total = (odd * size_odd).scatter_add(1, goal[:, :, None].expand(-1, -1, width), weighted)
        size_odd = size_odd.scatter_add(1, goal[:, :, None], size_even.gather(1, merged[:, :, None]))
        x = ops.cat([even.gather(1, kept[:, :, None].expand(-1, -1, width)), total / size_odd], 1)
        size = ops.cat([size_even.gather(1, kept[:, :, None]), size_odd], 1)
        left = ops.cat([even_left.gather(1, kept), odd_left], 1)
    return into, left
