"""PyramidDrop (CVPR 2025): pruning in steps, by what the next layer would attend to.

The tokens with the most attention stay (:func:`libra.select.topk`), scored with the query and keys that the
next layer would make of the compression layer's output; positions are renumbered and counts are rounded down.
Its code counts every step from the original number of tokens, ours from the step before; at ratio 0.5 the two
are equal, and a list of ``steps`` with ``keep`` says the counts themselves.
"""

from .registry import QUARTERS, Method

METHOD = Method(
    "pyramiddrop",
    description="the most important tokens by the next layer's query and keys; the rest is dropped,"
    " positions are renumbered",
    section="not in the paper (PyramidDrop)",
    keys={
        "select": "topk",
        "merge": "drop",
        "score_layer": "next",
        "positions": "compact",
        "rounding": "floor",
    },
    places=QUARTERS,
    deviation="its code counts every step from the original number of tokens, ours from the step before",
    family="attention",
)
