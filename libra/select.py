"""Who is a target token (§3.2 and the baselines).

A selector takes what the compression layer knows and returns (B, N) bool with exactly ``layout.keeps``
targets in each span.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .methods import SELECTORS
from .ops.dispatch import fused
from .ops.similarity import cosine, most_similar
from .ops.spans import Layout, take
from .utils.sentences import show

if TYPE_CHECKING:
    from .config import Compression


@dataclass(frozen=True)
class Candidates:
    """What a selector may look at: hidden states (B, N, D), importance (B, N) float32 (0 for padding), the
    layout of the spans.

    ``score_rows`` (B, N) says which attention row of its row scored a token; None where there is one.
    ``keys`` (B,) has a number per row from which pseudo-random choices are drawn; None for zeros.
    """

    hidden: torch.Tensor
    importance: torch.Tensor
    layout: Layout
    score_rows: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    @cached_property
    def importance_mean(self) -> torch.Tensor:
        """(B, N) or (B, 1): the mean importance of the visual tokens that share a token's score row."""
        importance, valid = self.importance, self.layout.valid
        if self.score_rows is None:
            return importance.sum(1, keepdim=True) / self.layout.tokens_of_row[:, None].clamp(min=1)
        index = torch.where(valid, self.score_rows + 1, 0)
        empty = importance.new_zeros((len(index), importance.shape[1] + 1))  # no more score rows than tokens
        total = empty.scatter_add(1, index, importance)
        count = empty.scatter_add(1, index, valid.to(importance.dtype))
        return (total / count.clamp(min=1)).gather(1, index)


Selector = Callable[[Candidates, "Compression"], torch.Tensor]


def register_select(name: str) -> Callable[[Selector], Selector]:
    """Make a selector usable as ``select: name`` in every configuration.

    What it returns is checked at every use (:func:`check_targets`). Raises ValueError for a name that is
    taken.
    """
    return register(SELECTORS, "select", name)


def register(table: dict[str, Callable], what: str, name: str) -> Callable[[Callable], Callable]:
    """A decorator that puts a function into ``table``. Raises ValueError for what is no name, or another
    function's name."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(
            f'register_{what} takes a name: write @register_{what}("mine") above the function, not {show(name)}'
        )

    def add(function: Callable) -> Callable:
        # A notebook's cell that is run again defines the same function once more.
        if table.get(name) is not None and _path(table[name]) != _path(function):
            raise ValueError(f"{what}: {name} is taken by {_path(table[name])}; choose another name")
        table[name] = function
        return function

    return add


def _path(function: Callable) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def check_targets(name: str, is_target, layout: Layout) -> torch.Tensor:
    """What selector ``name`` returned, if it keeps to the contract; this waits for the device.

    Raises:
        ValueError: unless it is (B, N) bool with exactly ``layout.keeps`` targets in each span and none
            outside.
    """
    shape = layout.valid.shape
    if not isinstance(is_target, torch.Tensor) or is_target.dtype != torch.bool or is_target.shape != shape:
        given = type(is_target).__name__
        if isinstance(is_target, torch.Tensor):
            given = f"{tuple(is_target.shape)} {is_target.dtype}"
        raise ValueError(
            f"select {name} returned {given}; it has to return {tuple(shape)} bool, True at the targets"
        )
    is_target = is_target.to(layout.device)
    width = max(map(len, layout.spans)) + 1  # the last one collects what lies in the padding
    counts = torch.zeros(len(is_target), width, dtype=torch.long, device=layout.device)
    for row, found in enumerate(counts.scatter_add_(1, layout.span, is_target.long()).tolist()):
        wanted = [*layout.keeps[row], *[0] * (width - len(layout.keeps[row]))]
        wrong = next((i for i in range(width) if found[i] != wanted[i]), None)
        if wrong is not None:
            place = (
                f"span {wrong} of row {row}"
                if wrong < len(layout.keeps[row])
                else f"the padding of row {row}"
            )
            raise ValueError(
                f"select {name} chose {found[wrong]} targets in {place}, which keeps {wanted[wrong]}; choose exactly"
                " layout.keeps of each span, as libra.select.top_of_span does"
            )
    return is_target


def top_of_span(scores: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The highest scores (B, N) of each span, as many as it keeps; ties go to the first token. Returns (B, N)
    bool."""
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    by_span = layout.span.gather(1, by_score).argsort(
        dim=1, stable=True
    )  # keeps the order of the scores within a span
    order = by_score.gather(1, by_span)
    rank = torch.empty_like(order).scatter_(1, order, layout.index.expand_as(order)) - layout.first_token
    return layout.valid & (rank < layout.span_keeps)


@register_select("intervals")
def intervals(candidates: Candidates, c: "Compression") -> torch.Tensor:
    """Position-driven token identification (§3.2): the most important token of each of N_t even intervals."""
    return best_of_intervals(candidates.importance, candidates.layout)


@fused
def best_of_intervals(importance: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The highest ``importance`` (B, N) of each interval, the first of several. Returns (B, N) bool.

    Interval i of a span of n tokens covers [⌊i·n/N_t⌋, ⌊(i+1)·n/N_t⌋), so token j lies in interval
    ⌊((j+1)·N_t − 1)/n⌋.
    """
    local = layout.index - layout.first_token
    interval = ((local + 1) * layout.span_keeps - 1) // layout.span_length.clamp(min=1) + layout.first_target
    interval = torch.where(
        layout.valid, interval, layout.targets
    )  # padded places share one slot behind the others
    batch, slots = len(interval), layout.targets + 1
    best = importance.new_full((batch, slots), -torch.inf).scatter_reduce(1, interval, importance, "amax")
    is_best = layout.valid & (importance == best.gather(1, interval))
    place = torch.where(is_best, layout.index, layout.tokens)
    first = place.new_full((batch, slots), layout.tokens).scatter_reduce(1, interval, place, "amin")
    return is_best & (first.gather(1, interval) == layout.index)


@register_select("topk")
def topk(candidates: Candidates, c: "Compression") -> torch.Tensor:
    """The most important tokens of each span (FastV, PyramidDrop)."""
    return top_of_span(candidates.importance, candidates.layout)


@register_select("information")
def information(candidates: Candidates, c: "Compression") -> torch.Tensor:
    """Turbo's information degree E = redundancy − λ · α / mean(α); the tokens with the lowest E are targets.

    Redundancy is a token's highest cosine similarity to another token of its span. It alone compares all with
    all.
    """
    layout, hidden = candidates.layout, candidates.hidden.detach()
    spans = layout.span.masked_fill(~layout.valid, -1)
    similarity, partner = most_similar(hidden, hidden, (spans, spans), itself=False)
    # Two tokens that are each other's nearest are equally redundant; rounding must not decide between them.
    redundancy = torch.where(similarity.isinf(), similarity, cosine(hidden, take(hidden, partner)))
    relative = torch.nan_to_num(candidates.importance / candidates.importance_mean, nan=1.0)
    return top_of_span(c.information_weight * relative - redundancy, layout)


@register_select("random")
def random(candidates: Candidates, c: "Compression") -> torch.Tensor:
    """A pseudo-random choice that depends on seed, row key and place alone: the same in any batch, on any
    device."""
    layout = candidates.layout
    start = (c.seed * 7_919 + 2**63) % 2**64 - 2**63  # as a 64-bit number, which wraps
    state = start + layout.index + layout.tokens_of_row[:, None] * 104_729
    if candidates.keys is not None:
        state = state + candidates.keys[:, None] * 1_000_003
    for _ in range(3):
        state = state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407  # wraps modulo 2^64
        state = state ^ ((state >> 29) & 0x7FFFFFFFF)
    return top_of_span((state & 0xFFFFFF).float(), layout)


BUILT_IN = frozenset(SELECTORS)  # tested here, so they are not checked at every use
