"""The tensor operations of a compression step: torch definitions, and Triton kernels of the same names.

``ops.name`` is the function of :mod:`libra.ops.reference`, :mod:`libra.ops.greedy` or
:mod:`libra.ops.choices`, imported when it is first used: files that only name methods and their traits start
without torch.
"""

from ..utils.lazy import lazily

NOWHERE = -1  # the output slot of a dropped token

_NAMES = (
    "best_of_intervals", "cosine", "first_equal", "flat_rows", "group_softmax", "lengths_of",
    "merge_groups", "most_similar", "ordinals", "pull", "score_row", "slots_and_logits", "take",
)  # fmt: skip
_GREEDY = ("cat", "cosines", "farthest_first", "greedy_map", "similarities", "thin_out")
_CHOICES = ("cover_most", "density_peaks", "group_mean", "preferred", "rank_within", "token_numbers")
_FILES = {"reference": _NAMES, "greedy": _GREEDY, "choices": _CHOICES}
__getattr__ = lazily(__name__, {name: file for file, names in _FILES.items() for name in names})
