"""VisPruner (Beyond Text-Visual Attention, ICCV 2025): half by the [CLS] token's attention, half by
diversity.

The T/2 tokens with the highest [CLS] attention stay. The rest, ordered by that attention, is thinned out in
rounds until T/2 are left: even places are compared with odd ones, and the eight most similar are dropped.
Both halves stay in their original order; the similarities are those of the tower's features before the
projector.
"""

from .. import ops
from .registry import Method, register_select

IMPORTANT = 0.5  # share of T chosen by attention

METHOD = Method(
    "vispruner",
    description="half of the tokens by the vision tower's attention, half by thinning out similar ones",
    section="VisPruner, ICCV 2025",
    keys={"select": "vispruner", "merge": "drop", "importance": "tower"},
    places=(),
    place="input",
    cost="one N × N similarity a span in float64, then N / 8 rounds of sorting",
    deviation="where T/2 rounds to an odd number the released code fails; ours gives the even half one"
    " token more",
    family="attention and diversity",
)


@register_select("vispruner", reads=("importance",), needs=("tower_hidden",), trusted=True)
def vispruner(candidates, c):
    """The most important tokens and those that :func:`libra.ops.greedy.thin_out` leaves of the others."""

    def of_spans(k, x, score):
        important = int(k * IMPORTANT)
        order = score.argsort(dim=1, descending=True, stable=True)
        rest = ops.thin_out(x, order[:, important:], k - important)
        return ops.cat([order[:, :important], rest], 1)

    return candidates.choose(of_spans, candidates.context.tower_hidden, candidates.importance)
