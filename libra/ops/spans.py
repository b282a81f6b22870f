"""The visual tokens of a ragged batch as rows of spans: small tensors that the batched maths indexes with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..utils.once import once
from . import NOWHERE
from .reference import on_device, ordinals, tables_on_device, take

__all__ = ["Spans", "on_device"]


@dataclass(frozen=True)
class Spans:
    """The spans of B rows and how many target tokens each span keeps.

    A span is a contiguous run of visual tokens. A row's visual tokens are numbered 0 … n-1, span after span;
    rows are padded on the right to N, their targets to T. Everything per token is (B, N); padding belongs to
    no span and its values mean nothing.
    """

    spans: tuple[tuple[int, ...], ...]  # tokens of each span of each row
    keeps: tuple[tuple[int, ...], ...]  # target tokens of each span of each row
    device: torch.device

    @classmethod
    def build(cls, spans: Sequence[Sequence[int]], keeps: Sequence[Sequence[int]], device) -> "Spans":
        """``spans``: B lists of span lengths, each at least 1; ``keeps``: the targets of each, as
        :func:`libra.budget.keeps` counts them."""
        return cls(tuple(map(tuple, spans)), tuple(map(tuple, keeps)), torch.device(device))

    @once
    def lengths(self) -> list[int]:
        """Visual tokens of each row."""
        return [sum(row) for row in self.spans]

    @once
    def target_counts(self) -> list[int]:
        """Target tokens of each row."""
        return [sum(row) for row in self.keeps]

    @property
    def tokens(self) -> int:
        """N, the longest row."""
        return max(self.lengths, default=0)

    @property
    def targets(self) -> int:
        """T, the most targets of a row."""
        return max(self.target_counts, default=0)

    @property
    def one_span(self) -> bool:
        """Whether no row has more than one span."""
        return all(len(row) <= 1 for row in self.spans)

    @once
    def uniform(self) -> bool:
        """Whether all rows have the same spans and keep the same of them, so that nothing is padded."""
        return len(set(self.spans)) == len(set(self.keeps)) == 1

    @property
    def intervals(self) -> list[list[list[int]]]:
        """(1 or B, T, m): the tokens of each target's interval; a shorter one repeats its first token. One
        row stands for all where they are uniform; slots that a row does not fill have the token N."""
        rows = [
            [cell for n, k, first in self._starts(b) for cell in _cells(n, k, first)]
            for b in range(1 if self.uniform else len(self.spans))
        ]
        width = max((len(cell) for row in rows for cell in row), default=1)
        rows = [[cell + [cell[0]] * (width - len(cell)) for cell in row] for row in rows]
        return [row + [[self.tokens] * width] * (self.targets - len(row)) for row in rows]

    @property
    def interval_cells(self) -> int:
        """T × m, the cells of a row of :attr:`intervals`."""
        pairs = {pair for row in zip(self.spans, self.keeps) for pair in zip(*row)}
        return self.targets * max((-(-n // k) for n, k in pairs), default=1)

    def _starts(self, row: int) -> Iterator[tuple[int, int, int]]:
        """Of each span of a row: its tokens, its targets, and the number of its first token."""
        first = 0
        for n, k in zip(self.spans[row], self.keeps[row]):
            yield n, k, first
            first += n

    def alike(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The spans in groups of the same size: (tokens n, targets k, index (S, n) of their S · n tokens in
        the rows one after another, (B · N,))."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (spans, keeps) in enumerate(zip(self.spans, self.keeps)):
            first = row * self.tokens
            for n, k in zip(spans, keeps):
                groups.setdefault((n, k), []).append(first)
                first += n
        for (n, k), firsts in groups.items():
            starts = on_device(firsts, self.device, torch.long)
            yield n, k, starts[:, None] + torch.arange(n, device=self.device)

    @once
    def _spans(self) -> torch.Tensor:
        """(B, M + 1, 4): of each span its first token, its tokens, its first target and its targets.

        Shorter rows are filled with empty spans after their last one; padded tokens point to the last column.
        """
        width = max(map(len, self.spans), default=0) + 1
        rows = []
        for spans, keeps in zip(self.spans, self.keeps):
            row, first, target = [], 0, 0
            for n, k in zip(spans, keeps):
                row.append([first, n, target, k])
                first, target = first + n, target + k
            rows.append(row + [[first, 0, target, 0]] * (width - len(row)))
        return on_device(rows, self.device, torch.long).view(-1, width, 4)

    @once
    def valid(self) -> torch.Tensor:
        """(B, N) bool."""
        return self._filled(self.lengths)

    @once
    def padding(self) -> torch.Tensor:
        """(B, N) bool: where there is no token."""
        return self._filled(self.lengths, False)

    @once
    def target_valid(self) -> torch.Tensor:
        """(B, T) bool."""
        return self._filled(self.target_counts)

    def _filled(self, counts: list[int], there: bool = True) -> torch.Tensor:
        """(B, most of ``counts``) bool: ``there`` in the first ``counts`` columns of each row."""
        width = max(counts, default=0)
        rows = [[there] * count + [not there] * (width - count) for count in counts]
        return on_device(rows, self.device, torch.bool).view(-1, width)

    @once
    def rest_counts(self) -> list[int]:
        """Tokens of each row that are not targets."""
        return [n - kept for n, kept in zip(self.lengths, self.target_counts)]

    @once
    def rest_missing(self) -> torch.Tensor | None:
        """(B, R) bool, which of the rows' non-targets are not there; None if all are."""
        return None if len(set(self.rest_counts)) == 1 else self._filled(self.rest_counts, False)

    def arranged(self, is_target: torch.Tensor) -> torch.Tensor:
        """(B, T + R): the tokens of each row, its targets (B, N bool) first and then the others, each
        ascending; where a row has fewer than T or R of them there are others."""
        order = ordinals(is_target, self.tokens)
        rest = max(self.rest_counts, default=0)
        if len(set(self.target_counts)) == 1:
            return order[:, : self.targets + rest]
        return order.gather(1, self._tables[2])

    @once
    def tokens_of_row(self) -> torch.Tensor:
        """(B,): the lengths as a tensor."""
        return on_device(self.lengths, self.device, torch.long)

    @once
    def index(self) -> torch.Tensor:
        """(1, N): 0 … N-1."""
        return torch.arange(self.tokens, device=self.device)[None]

    @property
    def target_index(self) -> torch.Tensor:
        """(1, T): 0 … T-1."""
        return self.index[:, : self.targets]

    @property
    def target_slots(self) -> torch.Tensor:
        """(B, T): 0 … T-1, :data:`NOWHERE` where there is no target."""
        if len(set(self.target_counts)) == 1:
            return self.target_index.expand(len(self.spans), -1)
        return self._tables[3]

    @once
    def span(self) -> torch.Tensor:
        """(B, N): the number of a token's span in its row; padding gets the number after the last."""
        return self._tables[0].expand(len(self.spans), -1)

    @once
    def target_span(self) -> torch.Tensor:
        """(B, T): the number of a target's span in its row; -1 where there is no target."""
        return self._tables[1].expand(len(self.spans), -1)

    @once
    def _tables(self) -> list[torch.Tensor]:
        """:attr:`span`, :attr:`target_span`, the places of :meth:`arranged` and :attr:`target_slots`, copied
        together; a row stands for all where they are uniform."""
        rows = 1 if self.uniform else len(self.spans)
        last, rest = self.tokens - 1, max(self.rest_counts, default=0)
        plan = [
            [*range(self.targets), *(min(kept + i, last) for i in range(rest))]
            for kept in self.target_counts[:rows]
        ]
        spans = _numbered(self.spans[:rows], self.tokens, max(map(len, self.spans), default=0))
        targets = _numbered(self.keeps[:rows], self.targets, -1)
        slots = [[*range(kept), *[NOWHERE] * (self.targets - kept)] for kept in self.target_counts[:rows]]
        return tables_on_device([spans, targets, plan, slots], self.device)

    @once
    def _of_token(self) -> tuple[torch.Tensor, ...]:
        return take(self._spans, self.span).unbind(-1)

    @property
    def first_token(self) -> torch.Tensor:
        """(B, N): the number of the first token of a token's span."""
        return self._of_token[0]

    @property
    def span_length(self) -> torch.Tensor:
        """(B, N): the tokens of a token's span; 0 for padding."""
        return self._of_token[1]

    @property
    def first_target(self) -> torch.Tensor:
        """(B, N): the number of the first target of a token's span."""
        return self._of_token[2]

    @property
    def span_keeps(self) -> torch.Tensor:
        """(B, N): the targets of a token's span; 0 for padding."""
        return self._of_token[3]


def _numbered(counts: Sequence[Sequence[int]], width: int, padding: int) -> list[list[int]]:
    """(B, width): for each span of a row its number, ``counts`` times."""
    rows = [[number for number, count in enumerate(row) for _ in range(count)] for row in counts]
    return [numbers + [padding] * (width - len(numbers)) for numbers in rows]


def _cells(n: int, k: int, first: int) -> Iterator[list[int]]:
    """The tokens of each of the k intervals of a span of n, whose first token is ``first``."""
    for i in range(k):
        yield list(range(first + i * n // k, first + (i + 1) * n // k))
