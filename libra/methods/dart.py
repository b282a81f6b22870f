"""DART (Stop Looking for Important Tokens, Duplication Matters More, EMNLP 2025): tokens that are unlike a
few pivots.

Pivots are the 4 visual tokens and the 4 text tokens after the picture with the highest L1 norm of the layer's
keys. In turns each pivot takes the visual tokens, of those that are left, with the lowest cosine to it, where
hidden states are compared after the decoder's final norm. The visual pivots stay too, positions are original.
"""

from fractions import Fraction
from typing import TYPE_CHECKING

from .. import ops
from .registry import Method, register_select

if TYPE_CHECKING:
    import torch

VISUAL, TEXT = 4, 4  # pivots

METHOD = Method(
    "dart",
    description="a few tokens with large keys, and those that are least like them or like the question's",
    section="DART, EMNLP 2025",
    keys={"select": "dart", "merge": "drop"},
    places=(Fraction(1, 16),),
    cost="8 × N similarities a span, and 8 sorts of N",
    deviation="the released code takes the pivots in the order of a Python set, and an equal number of tokens"
    " for each, so about T; ours takes visual pivots first, by descending norm, and the first ones take one"
    " token more where T asks for it. Keys have their positions in them: a row's are those that it has alone,"
    " however a batch is padded, but for a later turn on a padded cache, or a padded prompt read in pieces"
    " (`prefill_chunk_size`), without position_ids",
    family="diversity",
)


@register_select(
    "dart", reads=(), needs=("layer_keys", "text_keys", "final_hidden", "final_text"), trusted=True
)
def dart(candidates, c):
    """Pivots by keys, then :func:`least_like`."""
    context = candidates.context
    hidden = _directions(context.final_hidden)
    norms = context.layer_keys.float().abs().sum(2)
    to_text = hidden.new_zeros(*hidden.shape[:2], TEXT)
    count = hidden.new_zeros(hidden.shape[:2]).long()
    for row, (keys, text) in enumerate(zip(context.text_keys, context.final_text)):
        best = keys.to(norms).float().abs().sum(1).argsort(descending=True, stable=True)[:TEXT]
        to_text[row, :, : len(best)] = hidden[row] @ _directions(text.to(hidden))[best].transpose(0, 1)
        count[row] = len(best)

    def of_spans(k, x, norm, to_text, texts):
        pivots = norm.argsort(dim=1, descending=True, stable=True)[:, : min(VISUAL, k)]
        cosines = ops.cat([ops.take(x, pivots) @ x.transpose(1, 2), to_text.transpose(1, 2)], 1)
        used = pivots.shape[1]
        takers = used + texts[:, :1]
        turn = takers.new_ones(1, used + TEXT).cumsum(1) - 1
        quota = ((k - used) // takers + (turn < (k - used) % takers).long()) * (turn < takers).long()
        return least_like(cosines, quota, pivots, k)

    return candidates.choose(of_spans, hidden, norms, to_text, count)


def least_like(
    cosines: "torch.Tensor", quota: "torch.Tensor", pivots: "torch.Tensor", k: int
) -> "torch.Tensor":
    """(S, k): the ``pivots`` (S, P') among n tokens, and those that P pivots take in turns, each as many as
    its ``quota`` (S, P) of the lowest ``cosines`` (S, P, n) that are left."""
    taken = cosines.new_zeros(len(cosines), cosines.shape[2]).scatter(1, pivots, 1.0).bool()
    for turn in range(cosines.shape[1]):
        order = cosines[:, turn].masked_fill(taken, float("inf")).argsort(dim=1, stable=True)
        taken = taken | (order.argsort(dim=1, stable=True) < quota[:, turn : turn + 1])
    return taken.long().argsort(dim=1, descending=True, stable=True)[:, :k]


def _directions(x):
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
