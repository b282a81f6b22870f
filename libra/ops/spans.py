"""Where the visual tokens of a ragged batch lie: rows of spans, as small tensors that the batched maths
indexes with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..budget import kept
from .dispatch import fused


def on_device(rows, device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A small table made on the host, copied without waiting for the device, as ``torch.tensor(rows,
    device=…)`` would."""
    return torch.tensor(rows, dtype=dtype).to(device, non_blocking=True)


@dataclass(frozen=True)
class Layout:
    """The spans of B rows and how many target tokens each span keeps.

    A row's visual tokens are numbered 0 … n-1 span after span; rows are padded on the right to N, their
    targets to T. Everything per token is (B, N); padded places belong to no span and their values mean
    nothing.
    """

    spans: tuple[tuple[int, ...], ...]  # tokens of each span of each row
    keeps: tuple[tuple[int, ...], ...]  # target tokens of each span of each row
    device: torch.device

    @classmethod
    def build(cls, spans: Sequence[Sequence[int]], ratio: float, rounding: str, device) -> "Layout":
        """``spans``: B lists of span lengths (each at least 1); ``ratio`` and ``rounding`` as in
        :class:`libra.Compression`."""
        keeps = tuple(tuple(kept(n, ratio, rounding) for n in row) for row in spans)
        return cls(tuple(tuple(row) for row in spans), keeps, torch.device(device))

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

    @cached_property
    def _rows(self) -> torch.Tensor:
        """(B, 2): the visual tokens and the target tokens of each row."""
        return on_device(
            [[*pair] for pair in zip(self.lengths, self.target_counts)], self.device, torch.long
        ).view(-1, 2)

    @cached_property
    def _spans(self) -> torch.Tensor:
        """(B, M + 1, 4): of each span its first token, its tokens, its first target and its targets.

        What is no span begins behind the row's last one and has nothing; the last column is what a padded
        place points to.
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
        return torch.arange(self.targets, device=self.device) < self._rows[:, 1:]

    @cached_property
    def tokens_of_row(self) -> torch.Tensor:
        """(B,): the lengths as a tensor."""
        return self._rows[:, 0]

    @cached_property
    def index(self) -> torch.Tensor:
        """(1, N): 0 … N-1."""
        return torch.arange(self.tokens, device=self.device)[None]

    @cached_property
    def span(self) -> torch.Tensor:
        """(B, N): the number of a token's span in its row; padded places get the number behind the last."""
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
        """(B, N): the tokens of a token's span; 0 for padded places."""
        return self._of_token[1]

    @property
    def first_target(self) -> torch.Tensor:
        """(B, N): the number of the first target of a token's span."""
        return self._of_token[2]

    @property
    def span_keeps(self) -> torch.Tensor:
        """(B, N): the targets of a token's span; 0 for padded places."""
        return self._of_token[3]


@fused
def ordinals(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N) bool to the ascending numbers of the chosen places, (B, count); a row with fewer goes on with
    others."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def flat_rows(index: torch.Tensor, length: int) -> torch.Tensor:
    """Rows ``index`` (B, K) of B tables of ``length`` rows each, numbered through all of them: (B·K,)."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * length).flatten()


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` (B, K) of ``x`` (B or 1, S, …): (B, K, …). Whole rows are copied, which gather does
    number by number."""
    flat = flat_rows(index, x.shape[1]) if len(x) == len(index) > 1 else index.flatten()
    return x.reshape(-1, *x.shape[2:]).index_select(0, flat).view(*index.shape, *x.shape[2:])


@fused
def repack(
    keep: torch.Tensor, behind: torch.Tensor, extra: torch.Tensor, shift: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the columns that stay together, ``shift`` columns from the left, with room for an extra column
    behind one of them.

    Args:
        keep: (B, S) bool.
        behind: (B, 1), the column that the extra one follows, whether it stays itself or not.
        extra: (B, 1), 1 in a row with an extra column, otherwise 0.
        shift: (B, 1).
        width: of the new rows, S'.

    Returns:
        source (B, S'): the old column of each new one; of the extra one ``behind``; of one that stays empty
        its own number.
        place (B, S): the new column of each old one; of one that goes the last new column before it, which
        may be -1.
    """
    batch, length = keep.shape
    columns = torch.arange(length, device=keep.device)
    rank = keep.cumsum(1)
    place = rank - 1 + shift + extra * (columns > behind)
    # A padded column stays the column it is, so that a step that removes nothing changes nothing.
    source = torch.arange(width + 1, device=keep.device).clamp(max=length - 1).repeat(batch, 1)
    source = source.scatter(1, torch.where(keep, place, width), columns.expand(batch, -1))
    gap = torch.where(extra > 0, rank.gather(1, behind) + shift, width)
    return source.scatter(1, gap, behind)[:, :width].contiguous(), place
