"""The visual tokens of a ragged batch as rows of spans: small tensors that the batched maths indexes with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .reference import take


def on_device(rows, device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A small table made on the host, copied without waiting for the device, as ``torch.tensor(rows,
    device=…)`` would."""
    return torch.tensor(rows, dtype=dtype).to(device, non_blocking=True)


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

    @cached_property
    def lengths(self) -> list[int]:
        """Visual tokens of each row."""
        return [sum(row) for row in self.spans]

    @cached_property
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

    @cached_property
    def _rows(self) -> torch.Tensor:
        """(B, 2): the visual tokens and the target tokens of each row."""
        return on_device(
            [[*pair] for pair in zip(self.lengths, self.target_counts)], self.device, torch.long
        ).view(-1, 2)

    @cached_property
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

    @cached_property
    def valid(self) -> torch.Tensor:
        """(B, N) bool."""
        return self.index < self.tokens_of_row[:, None]

    @cached_property
    def target_valid(self) -> torch.Tensor:
        """(B, T) bool."""
        return self.target_index < self._rows[:, 1:]

    @cached_property
    def tokens_of_row(self) -> torch.Tensor:
        """(B,): the lengths as a tensor."""
        return self._rows[:, 0]

    @cached_property
    def index(self) -> torch.Tensor:
        """(1, N): 0 … N-1."""
        return torch.arange(self.tokens, device=self.device)[None]

    @property
    def target_index(self) -> torch.Tensor:
        """(1, T): 0 … T-1. Made anew each time: kept, it would lie in memory through the whole step."""
        return torch.arange(self.targets, device=self.device)[None]

    @cached_property
    def span(self) -> torch.Tensor:
        """(B, N): the number of a token's span in its row; padding gets the number after the last."""
        ends = self._spans[:, :-1, :2].sum(2)
        return torch.searchsorted(ends, self.index.expand(len(self.spans), -1).contiguous(), right=True)

    @cached_property
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
