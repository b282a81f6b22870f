"""A control: average pooling over even windows of the picture, which benchmark papers found hard to beat.

A picture of h × w tokens is cut into h' × w' = T windows as square as they can be, and each window becomes
its mean, at the place of its middle token. Where T has no such factors (a prime number, or one that would
make windows more than four times as long as wide) the windows are T even runs of tokens in raster order.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from .registry import Method, register_merge, register_select

if TYPE_CHECKING:
    import torch

LONGEST = 4  # how many times as long as wide a window may be

METHOD = Method(
    "pool",
    description="the mean of each of T even windows of the picture (a control)",
    section="not in the paper",
    keys={"select": "pool", "merge": "pool"},
    places=(),
    place="input",
    cost="one mean over the tokens",
    deviation="windows do not overlap, so that each token counts once; adaptive pooling, which benchmark "
    "papers use, lets them overlap where T does not divide the grid",
)


@register_select("pool", reads=(), needs=("grid",), trusted=True)
def pool(candidates, c) -> "torch.Tensor":
    """The middle token of each window."""
    layout = candidates.layout
    slots, middles = [], []
    for spans, keeps, grids in zip(layout.spans, layout.keeps, candidates.grids):
        row, chosen, first = [], [False] * layout.tokens, 0
        for n, k, parts in zip(spans, keeps, grids):
            numbers, places = windows(parts, k)
            for place in places:
                chosen[first + place] = True
            row += [first + places[number] for number in numbers]
            first += n
        slots.append(row + [0] * (layout.tokens - len(row)))
        middles.append(chosen)
    candidates.memo["middle"] = layout.index.new_tensor(slots)
    return layout.valid & layout.index.new_tensor(middles).bool()


@register_merge("pool", compensates=False, reads=("hidden",), trusted=True)
def mean_of_windows(matches, c):
    """Each token goes to the slot of the middle of its window, with the same weight as the others."""
    slot = matches.own_slot.gather(1, matches.candidates.memo["middle"])
    return slot, matches.candidates.importance.new_zeros(slot.shape)


@lru_cache(maxsize=256)
def windows(parts: tuple[tuple[int, ...], ...], k: int) -> tuple[list[int], list[int]]:
    """For each token of a span the number of its window, and for each of the k windows its middle token.

    parts: the grids that make up the span, one after another; each gets windows by its share of the tokens.
    """
    sizes = [math.prod(part) for part in parts]
    if k < len(parts):
        return _middles([i * k // sum(sizes) for i in range(sum(sizes))])
    numbers, given, first = [], _shares(sizes, k), 0
    for part, share in zip(parts, given):
        numbers += [first + number for number in _windows(math.prod(part[:-1]), part[-1], share)]
        first += share
    return _middles(numbers)


def _shares(sizes: list[int], k: int) -> list[int]:
    """k windows over parts of these sizes: at least one each, at most a token a window."""
    shares = [1] * len(sizes)
    for _ in range(k - len(sizes)):
        open_ones = [i for i in range(len(sizes)) if shares[i] < sizes[i]]
        shares[max(open_ones, key=lambda i: sizes[i] / shares[i])] += 1
    return shares


def _windows(h: int, w: int, k: int) -> list[int]:
    """The window of each token of an h × w map."""
    fitting = [(k // across, across) for across in range(1, min(k, w) + 1) if k % across == 0]
    fitting = [(down, across) for down, across in fitting if down <= h]

    def length(pair):
        return abs(math.log(h * pair[1] / (w * pair[0])))

    best = min(fitting, key=length, default=None)
    if best is None or length(best) > math.log(LONGEST):
        return [i * k // (h * w) for i in range(h * w)]
    down, across = best
    return [(y * down // h) * across + x * across // w for y in range(h) for x in range(w)]


def _middles(numbers: list[int]) -> tuple[list[int], list[int]]:
    members: dict[int, list[int]] = {}
    for token, number in enumerate(numbers):
        members.setdefault(number, []).append(token)
    return numbers, [members[number][len(members[number]) // 2] for number in range(len(members))]
