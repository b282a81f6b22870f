"""SparseVLM+ (its code's version 2): the raters' attention of the heads that look at the picture most.

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
    section="SparseVLM+, the code's version 2",
    keys={"select": "topk", "merge": "drop", "importance": "rater-heads"},
    places=PLACES,
    cost="attention rows of all the question's tokens, head by head",
    deviation="the released code can divide the attention by a bias of the rotary embedding; ours does not",
    family="attention",
)
