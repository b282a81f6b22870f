"""FastV (An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024): early pruning by the last token's attention.

The tokens with the most attention from the last prompt token stay (:func:`libra.select.topk`), the rest is
dropped. FastV's own K names the layer whose input is pruned; the paper of Libra-Merging counts "after layer
L", as we do.
"""

from .registry import Method

METHOD = Method(
    "fastv",
    description="the most important tokens; the rest is dropped",
    section="§3.1, §4.1",
    keys={"select": "topk", "merge": "drop"},
    own_count="FastV's own K={K} prunes the input of layer {K} by the scores of layer {before}",
    family="attention",
)
