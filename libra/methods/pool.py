"""A control: average pooling over even windows of the picture, which benchmark papers found hard to beat.

A picture of h × w tokens is cut into √(T·h/w) bands, rounded, of as many rows each, and a band into as many
windows as its share of T, whose numbers differ by one at most; so T windows of any number are nearly square.
Each becomes its mean, at the place of its middle token.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from .registry import Method, register_merge, register_select

if TYPE_CHECKING:
    import torch

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
    family="control",
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
        slots.append(row)
        middles.append(chosen)
    candidates.memo["middle"] = candidates.per_token(slots, 0)
    return layout.valid & layout.index.new_tensor(middles).bool()


@register_merge("pool", compensates=False, reads=("hidden",), trusted=True, follows=("pool",))
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
    if k < len(parts):  # even runs of tokens
        n = sum(sizes)
        return [i * k // n for i in range(n)], [(2 * i + 1) * n // (2 * k) for i in range(k)]
    numbers: list[int] = []
    middles: list[int] = []
    for part, size, share in zip(parts, sizes, _shares(sizes, k)):
        window, middle = _windows(size // part[-1], part[-1], share)
        middles += [len(numbers) + place for place in middle]
        numbers += [len(middles) - share + number for number in window]
    return numbers, middles


def _shares(sizes: list[int], k: int) -> list[int]:
    """k windows over parts of these sizes: at least one each, at most a token a window."""
    shares = [1] * len(sizes)
    for _ in range(k - len(sizes)):
        open_ones = [i for i in range(len(sizes)) if shares[i] < sizes[i]]
        shares[max(open_ones, key=lambda i: sizes[i] / shares[i])] += 1
    return shares


def _windows(h: int, w: int, k: int) -> tuple[list[int], list[int]]:
    """The window of each token of an h × w map, and the middle token of each of its k windows."""
    nearest = (math.isqrt(4 * k * h // w) + 1) // 2  # the whole number at the root of k · h / w
    bands = min(h, k, max(nearest, -(-k // w)))
    numbers: list[int] = []
    middles = []
    for band in range(bands):
        first, end = k * band // bands, k * (band + 1) // bands
        top, bottom = -(-h * band // bands), -(-h * (band + 1) // bands)
        numbers += [first + x * (end - first) // w for _ in range(top, bottom) for x in range(w)]
        for window in range(end - first):
            left, right = (-(-w * edge // (end - first)) for edge in (window, window + 1))
            middles.append((top + bottom) // 2 * w + (left + right) // 2)
    return numbers, middles
