"""Who is a target token: what a selector is given, and the choices that several methods share (§3.2,
baselines).

A selector returns (B, N) bool with exactly ``candidates.layout.keeps`` targets in each span. Nothing here
imports torch before it is used, so that a configuration is checked without it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import ops
from .methods import SELECTORS, Context, register_select
from .utils.numbers import is_whole
from .utils.once import once
from .utils.sentences import show

if TYPE_CHECKING:
    import torch

    from .config import Compression
    from .ops.spans import Spans

__all__ = ["SELECTORS", "Candidates", "check_targets", "register_select", "top_of_span"]


@dataclass(frozen=True)
class Candidates:
    """What a selector may look at.

    hidden: (B, N, D) hidden states of the visual tokens; importance: (B, N) float32, 0 for padding;
    layout: the spans of the rows and how many targets each keeps;
    score_rows: (B, N), which attention row of its row scored a token; None where there is one a row;
    row_seeds: (B,) integers that pseudo-random choices are drawn from; None for zeros;
    context: what else is known; the fields that the selector needs are given.
    """

    hidden: "torch.Tensor"
    importance: "torch.Tensor"
    layout: "Spans"
    score_rows: "torch.Tensor | None" = None
    row_seeds: "torch.Tensor | None" = None
    context: Context = Context()
    # What a select leaves for the merge of the same method.
    memo: dict[str, "torch.Tensor"] = field(default_factory=dict)

    @once
    def importance_mean(self) -> "torch.Tensor":
        """(B, N) or (B, 1): the mean importance of the visual tokens that share a token's score row."""
        importance = self.importance
        if self.score_rows is None and self.layout.uniform:
            return importance.mean(1, keepdim=True)
        if self.score_rows is None:
            return importance.sum(1, keepdim=True) / self.layout.tokens_of_row[:, None]
        valid = self.layout.valid
        index = (self.score_rows + 1).masked_fill(~valid, 0)
        empty = importance.new_zeros((len(index), importance.shape[1] + 1))  # no more score rows than tokens
        total = empty.scatter_add(1, index, importance)
        count = empty.scatter_add(1, index, valid.to(importance.dtype))
        return (total / count.clamp(min=1)).gather(1, index)

    def choose(self, of_spans: "Callable[..., torch.Tensor]", *given: "torch.Tensor") -> "torch.Tensor":
        """(B, N) bool: True at what ``of_spans`` chooses, which is called once for all spans of the same
        size.

        ``given``: tensors (B, N, …); ``of_spans(k, *of_span)`` gets them as (S, n, …) and returns (S, k)
        places in the spans, k of each.
        """
        chosen = self.layout.valid.new_zeros(self.layout.valid.numel())
        for _, k, index in self.layout.alike():
            picks = of_spans(k, *(x.flatten(0, 1)[index] for x in given))
            chosen[index.gather(1, picks)] = True
        return chosen.view(self.layout.valid.shape)

    @once
    def flat_index(self) -> "torch.Tensor":
        """(B, N): the number of each token in the rows one after another."""
        rows, tokens = self.layout.valid.shape
        first = self.layout.index.new_ones(rows, 1).cumsum(0) - 1
        return first * tokens + self.layout.index

    def per_token(self, rows: "Sequence[list]", padding: int) -> "torch.Tensor":
        """(B, N) int64: for each row a list of one whole number a token, padded with ``padding``."""
        filled = [[*row, *[padding] * (self.layout.tokens - len(row))] for row in rows]
        return self.layout.index.new_tensor(filled)

    @once
    def grids(self) -> "list[list[tuple[tuple[int, ...], ...]]]":
        """For each row, for each span, the grids of its parts.

        Raises ValueError where they are not those of the spans, or do not have as many places as their span
        has tokens.
        """
        given = self.context.grid
        found = [list(map(_parts, row)) if isinstance(row, (list, tuple)) else [] for row in given]
        if list(map(len, found)) != list(map(len, self.layout.spans)) or any(() in row for row in found):
            raise ValueError(
                f"grid: {show(given)} does not tell of each row the (h, w) or (t, h, w) of each of its spans;"
                " write such as [[(24, 24)]]"
            )
        for spans, grids in zip(self.layout.spans, found):
            for n, parts in zip(spans, grids):
                if sum(map(math.prod, parts)) != n:
                    places, grid = sum(map(math.prod, parts)), parts[0] if len(parts) == 1 else parts
                    raise ValueError(f"grid: {grid} has {places} places and its span {n} tokens")
        return found

    @property
    def frames(self) -> "list[list[list[int]]]":
        """For each row, for each span, the tokens of its frames; of a picture of several parts, theirs."""
        return [
            [[math.prod(part[-2:]) for part in parts for _ in range(math.prod(part[:-2]))] for parts in row]
            for row in self.grids
        ]

    @once
    def grid_width(self) -> "torch.Tensor":
        """(B, N): the width of the grid of a token's span, or of its part of the span."""
        widths = [
            [int(part[-1]) for parts in row for part in parts for _ in range(math.prod(part))]
            for row in self.grids
        ]
        return self.per_token(widths, 1)

    @once
    def tower_score(self) -> "torch.Tensor":
        """(B, N) float32: the attention of the vision tower's [CLS] token, or the attention received where
        the tower has none; of the last layer given."""
        return tower_score(self.context)

    @property
    def tower_scores(self) -> "torch.Tensor":
        """(L, B, N) float32: :attr:`tower_score` of each layer given, the one whose features the model takes
        last. Raises ValueError as :func:`tower_score`."""
        given = _of_tower(self.context)
        return (given if given.ndim == 3 else given[None]).float()

    def top(self, scores: "torch.Tensor") -> "torch.Tensor":
        """:func:`top_of_span` of these spans."""
        return top_of_span(scores, self.layout)


def _parts(grid) -> tuple[tuple[int, ...], ...]:
    """The grids of a span's parts; () for what is none of a span."""
    if not isinstance(grid, (list, tuple)) or not grid:
        return ()
    parts = [grid] if is_whole(grid[0]) else grid
    if not all(isinstance(part, (list, tuple)) and len(part) in (2, 3) for part in parts):
        return ()
    whole = all(is_whole(n) and n > 0 for part in parts for n in part)
    return tuple(tuple(map(int, part)) for part in parts) if whole else ()


def tower_score(context: Context) -> "torch.Tensor":
    """(B, N) float32, see :attr:`Candidates.tower_score`. Raises ValueError where the context has neither
    score."""
    given = _of_tower(context)
    return (given if given.ndim == 2 else given[-1]).float()


def _of_tower(context: Context) -> "torch.Tensor":
    given = context.tower_received if context.tower_cls is None else context.tower_cls
    if given is None:
        raise ValueError(
            "the score of the vision tower is not given: give context=libra.Context(tower_cls=…)"
        )
    return given


def check_targets(name: str, is_target, spans: "Spans") -> "torch.Tensor":
    """What selector ``name`` returned, if it keeps to the contract; this waits for the device.

    Raises:
        ValueError: unless it is (B, N) bool with exactly ``spans.keeps`` targets in each span and none
            outside.
    """
    import torch

    shape = spans.valid.shape
    if not isinstance(is_target, torch.Tensor) or is_target.dtype != torch.bool or is_target.shape != shape:
        given = type(is_target).__name__
        if isinstance(is_target, torch.Tensor):
            given = f"{tuple(is_target.shape)} {is_target.dtype}"
        raise ValueError(
            f"select {name} returned {given}; it has to return {tuple(shape)} bool, True at the targets"
        )
    is_target = is_target.to(spans.device)
    width = max(map(len, spans.spans)) + 1  # the last one collects what lies in the padding
    counts = torch.zeros(len(is_target), width, dtype=torch.long, device=spans.device)
    for row, found in enumerate(counts.scatter_add_(1, spans.span, is_target.long()).tolist()):
        wanted = [*spans.keeps[row], *[0] * (width - len(spans.keeps[row]))]
        wrong = next((i for i in range(width) if found[i] != wanted[i]), None)
        if wrong is None:
            continue
        place = f"span {wrong}" if wrong < len(spans.keeps[row]) else "the padding"
        raise ValueError(
            f"select {name} chose {found[wrong]} targets in {place} of row {row}, which keeps "
            f"{wanted[wrong]}; choose exactly layout.keeps of each span, as libra.select.top_of_span does"
        )
    return is_target


def top_of_span(scores: "torch.Tensor", spans: "Spans") -> "torch.Tensor":
    """The highest scores (B, N) of each span, as many as it keeps; ties go to the first token. Returns (B, N)
    bool."""
    import torch

    by_score = scores.argsort(dim=1, descending=True, stable=True)
    if spans.uniform and spans.one_span:
        chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        return chosen.scatter(1, by_score[:, : spans.targets], True)
    # A stable sort by span keeps the order of the scores within a span.
    by_span = spans.span.gather(1, by_score).argsort(dim=1, stable=True)
    order = by_score.gather(1, by_span)
    place = order.new_empty(order.shape).scatter_(1, order, spans.index.expand_as(order))
    return spans.valid & (place - spans.first_token < spans.span_keeps)


@register_select("intervals", reads=("importance",), per_interval=True, trusted=True)
def intervals(candidates: Candidates, c: "Compression") -> "torch.Tensor":
    """Position-driven token identification (§3.2): the most important token of each of N_t even intervals."""
    return ops.best_of_intervals(candidates.importance, candidates.layout)


@register_select("topk", reads=("importance",), trusted=True)
def topk(candidates: Candidates, c: "Compression") -> "torch.Tensor":
    """The most important tokens of each span (FastV, PyramidDrop)."""
    return candidates.top(candidates.importance)


@register_select("information", reads=("hidden", "importance", "information_weight"), trusted=True)
def information(candidates: Candidates, c: "Compression") -> "torch.Tensor":
    """Turbo's information degree E = redundancy − λ · α / mean(α); the tokens with the lowest E are targets.

    Redundancy is a token's highest cosine similarity to another token of its span, so all are compared with
    all.
    """
    spans, hidden = candidates.layout, candidates.hidden.detach()
    pair = None
    if not (spans.uniform and spans.one_span):
        span = spans.span.masked_fill(~spans.valid, -1)
        pair = span, span
    similarity, partner = ops.most_similar(hidden, hidden, pair, itself=False)
    # Two tokens that are each other's nearest are equally redundant; rounding must not decide between them.
    exact = ops.cosine(hidden, ops.take(hidden, partner))
    redundancy = exact.where(similarity != -math.inf, similarity)
    relative = (candidates.importance / candidates.importance_mean).nan_to_num(nan=1.0)
    return candidates.top(c.information_weight * relative - redundancy)
