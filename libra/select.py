"""Who is a target token (§3.2 and the baselines).

A selector takes what the compression layer knows and returns (B, N) bool with exactly ``layout.keeps`` targets in each span.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .fuse import fused
from .layout import Layout
from .methods import SELECTORS
from .similarity import most_similar

if TYPE_CHECKING:
    from .config import Compression


@dataclass(frozen=True)
class Candidates:
    """What a selector may look at: hidden states (B, N, D), importance (B, N) float32 (0 for padding), the layout of the spans.

    ``score_rows`` (B, N) says which attention row of its row scored a token; None where there is one. ``keys`` (B,) has
    a number per row from which pseudo-random choices are drawn; None for zeros.
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
    """Make a selector usable as ``select: name`` in every configuration."""

    def add(function: Selector) -> Selector:
        SELECTORS[name] = function
        return function

    return add


def top_of_span(scores: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The highest scores (B, N) of each span, as many as it keeps; ties go to the first token. Returns (B, N) bool."""
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    by_span = layout.span.gather(1, by_score).argsort(dim=1, stable=True)  # keeps the order of the scores within a span
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

    Interval i of a span of n tokens covers [⌊i·n/N_t⌋, ⌊(i+1)·n/N_t⌋), so token j lies in interval ⌊((j+1)·N_t − 1)/n⌋.
    """
    local = layout.index - layout.first_token
    interval = ((local + 1) * layout.span_keeps - 1) // layout.span_length.clamp(min=1) + layout.first_target
    interval = torch.where(layout.valid, interval, layout.targets)  # padded places share one slot behind the others
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

    Redundancy is a token's highest cosine similarity to another token of its span. It alone compares all with all.
    """
    layout, hidden = candidates.layout, candidates.hidden.detach()
    spans = layout.span.masked_fill(~layout.valid, -1)
    redundancy, _ = most_similar(hidden, hidden, (spans, spans), itself=False)
    relative = torch.nan_to_num(candidates.importance / candidates.importance_mean, nan=1.0)
    return top_of_span(c.information_weight * relative - redundancy, layout)


@register_select("random")
def random(candidates: Candidates, c: "Compression") -> torch.Tensor:
    """A pseudo-random choice that depends on seed, row key and place alone: the same in any batch, on any device."""
    layout = candidates.layout
    state = c.seed * 7_919 + layout.index + layout.tokens_of_row[:, None] * 104_729
    if candidates.keys is not None:
        state = state + candidates.keys[:, None] * 1_000_003
    for _ in range(3):
        state = state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407  # wraps modulo 2^64
        state = state ^ ((state >> 29) & 0x7FFFFFFFF)
    return top_of_span((state & 0xFFFFFF).float(), layout)
