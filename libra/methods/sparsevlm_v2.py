"""SparseVLM+ (Improved Text-Visual Attention Pattern, 2025; version 2 of SparseVLM's code): the raters'
attention of the heads that look at the picture most.

Raters are those of :mod:`libra.methods.sparsevlm`. A visual token's score is their attention to it, averaged
over them and the 14 heads whose raters have most attention on visual tokens. Nothing is recycled, and
positions stay as they are. The published counts after layers 2, 6 and 15 are 300, 200, 118 (called 192), 238,
108, 60 (128) and 66, 34, 20 (64).
"""

from .registry import Method
from .sparsevlm import PLACES

METHOD = Method(
    "sparsevlm-v2",
    description="the tokens that the question's raters attend to with their strongest heads; the rest is"
    " dropped",
    section="SparseVLM+, 2025",
    keys={"select": "topk", "merge": "drop", "importance": "rater-heads"},
    places=PLACES,
    cost="attention rows of all the question's tokens, head by head",
    deviation="the released code first divides each attention by what the rotary embedding alone gives at"
    " that distance, (2/√d) Σ cos(Δ · 10000^(-2i/d)); ours does not. For heads 128 wide that is negative from"
    " a distance of 1,707 on (474 for 32), where dividing turns the order of tokens round",
    family="attention",
)
