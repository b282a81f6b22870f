"""VScan (Rethinking Visual Token Reduction for Efficient Large Vision-Language Models, TMLR 2026): local and
global tokens of two layers of the tower, and the rest averaged into them.

Half of T are local: the picture is cut into 16 windows, and each gives as many of the tokens that a shallow
layer's [CLS] attends to most (6 of CLIP's 24, counted from 1). The others are those with the highest [CLS]
attention of the second last layer. Each dropped token joins the kept one of highest cosine (of the projected
features), as a plain mean. A second stage prunes inside the language model, after layer 16 of 32, by the last
instruction token's attention as PyramidDrop scores: write it as a step of its own,
``[{method: vscan, keep: 96}, {method: pyramiddrop, layers: [15], keep: 32}]`` with ``positions: compact``.
"""

import math
from fractions import Fraction
from functools import lru_cache

from .. import ops
from .registry import Method, register_select

LOCAL = 0.5  # share of T
SIDE = 4  # windows along an edge of the picture
SHALLOW = Fraction(6, 24)  # the shallow layer, as a share of the tower's depth

METHOD = Method(
    "vscan",
    description="tokens that a shallow layer of the vision tower attends to in each of 16 windows, those that"
    " a deep layer does, and the rest averaged into them",
    section="VScan, TMLR 2026, arXiv 2505.22654",
    keys={"select": "vscan", "merge": "average"},
    places=(),
    place="input",
    cost="two sorts of N scores, and T × N similarities",
    deviation="where 16 windows do not divide T/2 the released code keeps fewer tokens; ours gives the rest"
    " to the global half. Its windows are 6 × 6 of 24 × 24; ours are 4 × 4 windows of any grid, in each part"
    " of a picture of several",
    family="merging",
)


@register_select(
    "vscan", reads=(), needs=("tower_cls|tower_received", "grid"), trusted=True, tower_layers=(SHALLOW,)
)
def vscan(candidates, c):
    """The first layer of the tower's scores gives the local tokens, the last one the global ones."""
    layers, rows, counts = candidates.tower_scores, [], []
    for parts_of_row in candidates.grids:
        found = [windows(parts) for parts in parts_of_row]
        rows.append([window for numbers in found for window in numbers])
        counts.append([1 + max(numbers) for numbers in found for _ in numbers])
    window, count = candidates.per_token(rows, 0), candidates.per_token(counts, 1)
    most = max((max(row) for row in counts if row), default=1)

    def of_spans(k, shallow, deep, window, count):
        quota = int(k * LOCAL) // count
        local = ops.rank_within(shallow, window, most) < quota
        return ops.preferred(deep.argsort(dim=1, descending=True, stable=True), local, k)

    return candidates.choose(of_spans, layers[0], layers[-1], window, count)


@lru_cache(maxsize=256)
def windows(parts: tuple[tuple[int, ...], ...]) -> list[int]:
    """The number of the window of each token of a span with these grids."""
    numbers: list[int] = []
    for part in parts:
        first = 1 + max(numbers, default=-1)
        h, w = math.prod(part[:-1]), part[-1]
        down, across = min(SIDE, h), min(SIDE, w)
        numbers += [first + (y * down // h) * across + x * across // w for y in range(h) for x in range(w)]
    return numbers
