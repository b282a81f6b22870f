"""VisionZip (Longer is Better but Not Necessary in Vision Language Models, CVPR 2025): dominant and
contextual tokens.

Of T tokens, 54 in 64 are dominant: the [CLS] feature itself, where the tower has one, and those with its
highest attention in the second last layer (without a [CLS] token: with the highest attention received). The
others are compared by the tower's keys of that layer, averaged over the heads: every (R // count)-th of the R
that remain is a contextual target, and each other one joins the most similar target, to which the mean of
what it received is *added*. The model's own projector runs on what is left.
"""

from .. import ops
from .registry import Method, register_merge, register_select

CONTEXTUAL = 10 / 64  # share of T that is contextual

METHOD = Method(
    "visionzip",
    description="the tokens with the most attention of the [CLS] token, and a few that similar ones are"
    " merged into",
    section="VisionZip, CVPR 2025",
    keys={"select": "visionzip", "merge": "visionzip"},
    places=(),
    place="tower",
    cost="a sort of N scores, and T/6 × N similarities of keys",
    deviation="tokens stay in their original order; the released code puts the contextual ones after the"
    " dominant ones (as_released: so do we, in the tower)",
    family="merging",
)


@register_select(
    "visionzip",
    reads=("as_released",),
    needs=("tower_cls|tower_received", "tower_keys"),
    trusted=True,
    takes_cls=True,
)
def visionzip(candidates, c):
    """Dominant tokens, then every step-th of the rest. With ``context.cls_first`` token 0 of a span is
    [CLS]."""
    score = candidates.tower_score
    cls_first = candidates.context.cls_first
    contextual = candidates.memo["contextual"] = candidates.layout.valid.new_zeros(score.shape)

    def of_spans(k, score, place):
        count = round(k * CONTEXTUAL)
        if cls_first:
            score = score.scatter(1, score.new_zeros(len(score), 1).long(), float("inf"))
        order = score.argsort(dim=1, descending=True, stable=True)
        rest = order[:, k - count :].sort(dim=1).values
        targets = rest[:, :: max(1, rest.shape[1] // max(1, count))][:, :count]
        contextual.view(-1)[place.gather(1, targets)] = True
        return ops.cat([order[:, : k - count], targets], 1)

    return candidates.choose(of_spans, score, candidates.flat_index)


@register_merge(
    "visionzip",
    compensates=False,
    reads=("hidden",),
    needs=("tower_keys",),
    gives_weights=True,
    trusted=True,
    follows=("visionzip",),
)
def merge_into_contextual(matches, c):
    """Each token that is not a target joins the contextual target of its span with the most similar tower
    keys."""
    candidates, spans = matches.candidates, matches.layout
    keys = ops.similarities(candidates.context.tower_keys)
    own, contextual = matches.own_slot, candidates.memo["contextual"]
    apart = spans.span[:, :, None] != spans.span[:, None]
    nearest = keys.masked_fill(apart | ~contextual[:, None], float("-inf")).max(2)
    slot = own.gather(1, nearest.indices).masked_fill(nearest.values == float("-inf"), -1)
    slot = own.where(matches.is_target, slot).masked_fill(~spans.valid, -1)
    outside = candidates.context.outside
    if outside is not None:  # a newline is not a part of the picture that others could be merged with
        slot = slot.masked_fill(outside & ~matches.is_target, -1)
    # A target counts fully, the tokens that joined it count together as one.
    joined = (slot >= 0) & ~matches.is_target
    counts = keys.new_zeros(len(slot), max(1, spans.targets)).scatter_add(
        1, slot.clamp(min=0), joined.to(keys.dtype)
    )
    share = 1 / counts.gather(1, slot.clamp(min=0)).clamp(min=1)
    weights = share.where(joined, matches.is_target.to(keys.dtype))
    if c.as_released:  # the place of each slot: dominant ones first
        late = contextual.gather(1, matches.targets)
        matches.candidates.memo["order"] = late.long().argsort(dim=1, stable=True).argsort(dim=1)
    return slot, weights
