"""CDPruner (Beyond Attention or Similarity: Maximizing Conditional Diversity, NeurIPS 2025): relevant and
diverse.

A determinantal point process with the kernel L_ij = r_i · cos(v_i, v_j) · r_j, where v are the embeddings
that enter the language model and r is the relevance scaled to (0, 1] by its minimum and maximum; greedy MAP
inference picks T tokens. The released code takes as relevance the *negative* mean cosine of CLIP's image
embedding with the text segments of the question, so that low cosines count as relevant, and so do we where
the whole CLIP of the vision tower is at hand (llava finds it in the tower's own checkpoint, `libra.attach`
takes `clip=libra.ClipRelevance.load(…)`); elsewhere, as a variant of OpenVINO, the positive mean cosine with
the language model's own embeddings of the question.
"""

import math
from typing import TYPE_CHECKING

from .. import ops
from .registry import Method, register_select

if TYPE_CHECKING:
    import torch

EPSILON = 1e-6  # keeps the least relevant token's diagonal above 0

METHOD = Method(
    "cdpruner",
    description="tokens relevant for the question and unlike one another (a determinantal point process)",
    section="CDPruner, NeurIPS 2025",
    keys={"select": "cdpruner", "merge": "drop"},
    places=(),
    place="input",
    cost="one N × N similarity a span, then T steps over at most T · N numbers",
    deviation=(
        "relevance is scaled within a span, not over the whole batch, so that a row does not depend on the "
        "others (as_released: over the batch); past the kernel's rank the released code repeats tokens, "
        "ours goes on by relevance"
    ),
    family="diversity",
)


@register_select("cdpruner", reads=("hidden", "as_released"), needs=("relevance|text",), trusted=True)
def cdpruner(candidates, c):
    """Greedy MAP of the relevance-weighted similarity kernel, see :func:`libra.ops.greedy.greedy_map`."""
    raw, valid = _relevance(candidates), candidates.layout.valid
    if c.as_released:
        scaled = _scale(raw, raw[valid].min(), raw[valid].max())
    context = candidates.context
    unknown = valid.new_zeros(valid.shape)  # to CLIP: a newline is as relevant as the least relevant patch
    if context.relevance is not None and context.outside is not None:
        unknown = context.outside

    def of_spans(k, x, r, unknown):
        if not c.as_released:
            r = r.masked_fill(unknown, math.inf)
            low = r.amin(1, keepdim=True)
            r = r.where(~unknown, low)
            r = _scale(r, low, r.amax(1, keepdim=True))
        return ops.greedy_map(r[:, :, None] * ops.similarities(x) * r[:, None], k)

    return candidates.choose(of_spans, candidates.hidden.detach(), scaled if c.as_released else raw, unknown)


def _scale(r, low, high):
    # Where all tokens are equally relevant the original divides by 0; ours weighs them alike.
    span = high - low
    return ((r - low + EPSILON) / span.where(span > 0, span + EPSILON)).float()


def _relevance(candidates) -> "torch.Tensor":
    """(B, N): the negative given relevance, or the mean cosine with the rows' text embeddings."""
    context, hidden = candidates.context, candidates.hidden.detach()
    if context.relevance is not None:
        return -context.relevance.float()
    found = hidden.new_zeros(hidden.shape[:2]).float()
    for row, text in enumerate(context.text):
        text = text.to(hidden.device).float()
        found[row] = ops.cosines(hidden[row][None].float(), text[None])[0].mean(1)
    return found
