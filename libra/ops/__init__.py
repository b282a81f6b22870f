"""The tensor operations of a compression step: torch definitions, and Triton kernels of the same names.

``ops.name`` is the function of :mod:`libra.ops.reference` or :mod:`libra.ops.greedy`, imported when it is
first used: files that only name methods and their traits start without torch.
"""

from ..utils.lazy import lazily

NOWHERE = -1  # the output slot of a dropped token

_NAMES = (
    "best_of_intervals", "cosine", "first_equal", "flat_rows", "group_softmax", "merge_groups",
    "most_similar", "ordinals", "repack", "score_row", "take",
)  # fmt: skip
_GREEDY = ("cat", "cosines", "farthest_first", "greedy_map", "similarities", "thin_out")
__getattr__ = lazily(__name__, dict.fromkeys(_NAMES, "reference") | dict.fromkeys(_GREEDY, "greedy"))
