"""Which columns of a batch are what, known on the host: once the prompt was surveyed, and after every step.

Everything but two things follows from the prompt: which tokens of a span are targets, and whether a row gets
a compensation token. The first moves no other column, and the second is asked for, once a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Scorer:
    """A column whose attention scores visual tokens.

    begin: where the text begins that lies between the last of these tokens and ``column``; after ``column``
    where there is none.
    """

    column: int
    begin: int


@dataclass(frozen=True)
class Row:
    """One row of the batch: its valid columns are ``first`` … ``end`` - 1; both are 0 in a row without any.

    spans: the first column and the tokens of each run of visual tokens; scorers: ascending, the columns that
    score them; which: for each span the number of its scorer.
    """

    first: int
    end: int
    spans: tuple[tuple[int, int], ...] = ()
    scorers: tuple[Scorer, ...] = ()
    which: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each span."""
        return [count for _, count in self.spans]

    @property
    def last_visual(self) -> int:
        """-1 without visual tokens."""
        return sum(self.spans[-1]) - 1 if self.spans else -1

    def texts(self) -> list[tuple[int, int]]:
        """The columns (from, to) before, between and after the spans, one more than there are spans."""
        edges = [self.first, *(edge for start, n in self.spans for edge in (start, start + n)), self.end]
        return list(zip(edges[::2], edges[1::2]))

    def is_inside(self, column: int) -> bool:
        """Whether a column is a visual token with others of its span after it."""
        return any(start <= column < start + n - 1 for start, n in self.spans)

    def shortened(self, first: int, kept: Sequence[int], extra: bool, targets: Sequence[int] | None) -> "Row":
        """The row with its spans cut to ``kept`` tokens each, its first column at ``first``, and a column
        more after its last visual token where ``extra``.

        targets: the numbers of the tokens that are left, among the row's visual tokens; only looked at for a
        scorer inside of a span.
        """
        new, starts = first, []  # where each span begins now
        for (begin, end), count in zip(self.texts(), [*kept, 0]):
            starts.append(new + end - begin)
            new = starts[-1] + count
        new += extra if self.spans else 0
        spans = tuple(zip(starts, kept))

        def moved(column: int) -> int:
            """Where a column is now; of one that is gone, the last one left before it."""
            passed = 0
            for (start, n), (begin, count) in zip(self.spans, spans):
                if column < start:
                    return begin - (start - column)
                if column < start + n:
                    last = passed + column - start
                    left = (
                        count if last == passed + n - 1 else sum(passed <= t <= last for t in targets or ())
                    )
                    return max(0, begin - 1 + left)
                passed += n
            return new - (self.end - column)

        scorers = tuple(
            Scorer(at := moved(one.column), moved(one.begin) if one.begin <= one.column else at + 1)
            for one in self.scorers
        )
        return Row(first, new, spans, scorers, self.which)


@dataclass(frozen=True)
class Columns:
    """The columns of a batch, ``width`` of them; ``pads_left``: on which side rows get padding, should their
    lengths become unequal; ``around``: for each row of the prompt its columns before the first picture, after
    the last one, and those of answers."""

    width: int
    rows: tuple[Row, ...]
    pads_left: bool
    around: tuple[tuple[int, int, int], ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Valid columns of each row."""
        return [row.end - row.first for row in self.rows]

    @property
    def is_padded(self) -> bool:
        return any(length < self.width for length in self.lengths)

    @property
    def span_lengths(self) -> list[list[int]]:
        return [row.lengths for row in self.rows]

    @property
    def alike(self) -> bool:
        """Whether all rows have all their columns and the same spans."""
        return not self.is_padded and len({row.spans for row in self.rows}) == 1

    def shortened(
        self, kept: Sequence[Sequence[int]], extra: Sequence[bool], targets: Sequence | None
    ) -> "Columns":
        """With each row's spans cut to ``kept`` tokens and the compensation tokens of the rows with ``extra``
        (:meth:`Row.shortened`). Rows are packed anew, towards the side away from the padding."""
        lengths = [
            length - sum(row.lengths) + (sum(counts) + more if row.spans else 0)
            for row, length, counts, more in zip(self.rows, self.lengths, kept, extra)
        ]
        width = max(lengths)
        rows = (
            row.shortened(
                width - length if self.pads_left and length else 0,
                counts if row.spans else (),
                more,
                None if targets is None else targets[b][: sum(counts)],
            )
            for b, (row, length, counts, more) in enumerate(zip(self.rows, lengths, kept, extra))
        )
        return replace(self, width=width, rows=tuple(rows))

    def numbers(self) -> list[list[int]]:
        """(B, S): 0 for text and padding, k for a row's k-th span."""
        found = []
        for row in self.rows:
            numbers = [0] * self.width
            for number, (start, n) in enumerate(row.spans, 1):
                numbers[start : start + n] = [number] * n
            found.append(numbers)
        return found

    def visual(self) -> list[list[int]]:
        """(B, N): the columns of each row's visual tokens, ascending; a shorter row repeats a column of its
        own, as a row without any has one that stands for it."""
        rows = [[c for start, n in row.spans for c in range(start, start + n)] for row in self.rows]
        width = max(1, *map(len, rows))
        return [found + [row.first] * (width - len(found)) for row, found in zip(self.rows, rows)]


def survey(
    visual: torch.Tensor,
    valid: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    score_columns: torch.Tensor | None = None,
    pictures: Sequence[Sequence[int]] | None = None,
    side: str = "left",
) -> Columns:
    """The columns of a prompt; this waits for the device, once.

    Args:
        visual, valid: (B, S) bool; None: all are valid.
        labels: (B, S), -100 where nothing is supervised.
        score_columns: (B,), the column that scores a row's visual tokens. Without: the last valid one or,
            with labels, for each span the last before the first answer after it.
        pictures: for each row the tokens of its pictures, which are spans of their own even where they
            touch.
        side: where rows without padding get it.

    Raises:
        ValueError: if rows with visual tokens are padded in the middle, or on both sides of the batch.
    """
    batch, width = visual.shape
    parts = [visual]
    parts += [] if valid is None else [valid]
    parts += [] if labels is None else [labels != IGNORE_INDEX]
    parts += [] if score_columns is None else [score_columns[:, None]]
    whole = parts[0] if len(parts) == 1 else torch.cat([part.to(torch.int32) for part in parts], 1)
    found = iter(np.split(np.asarray(whole.cpu()), range(width, width * len(parts), width), axis=1))
    is_visual = next(found).astype(bool)
    is_valid = np.ones_like(is_visual) if valid is None else next(found).astype(bool)
    answers = np.zeros_like(is_visual) if labels is None else next(found).astype(bool)
    asked = None if score_columns is None else next(found)[:, 0]
    repeats = 1 if pictures is None else batch // max(1, len(pictures))  # beams and returned sequences
    rows = []
    for b in range(batch):
        inside = np.flatnonzero(is_valid[b])
        first, end = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
        own = () if pictures is None else pictures[b // repeats]
        row = Row(first, end, _spans(np.flatnonzero(is_visual[b]), own, first, end))
        rows.append(_scored(row, np.flatnonzero(answers[b]), None if asked is None else int(asked[b])))
    # A row of nothing but padding has it on the side where the others have theirs.
    left, right = any(row.first for row in rows), any(0 < row.end < width for row in rows)
    gaps = any(row.end - row.first != count for row, count in zip(rows, is_valid.sum(1)))
    if (left and right or gaps) and any(row.spans for row in rows):
        raise ValueError("the attention mask has padding on both sides or inside a row; pad on one side only")
    around = tuple(_around(row, np.flatnonzero(answers[b])) for b, row in enumerate(rows))
    return Columns(width, tuple(rows), left or not right and side == "left", around)


def _spans(columns, pictures: Sequence[int], first: int, end: int) -> tuple[tuple[int, int], ...]:
    """Runs of visual columns, cut where a picture begins, as far as they are valid."""
    if not len(columns):
        return ()
    begins = np.flatnonzero(np.diff(columns) != 1) + 1
    borders = [border for border in np.cumsum([0, *pictures]) if 0 < border < len(columns)]
    edges = sorted({0, *begins.tolist(), *map(int, borders), len(columns)})
    runs = ((max(first, int(columns[a])), min(end, int(columns[b - 1]) + 1)) for a, b in pairwise(edges))
    return tuple((start, stop - start) for start, stop in runs if stop > start)


def _scored(row: Row, answers, asked: int | None) -> Row:
    """With the columns that score its spans."""
    by_span = []
    for start, n in row.spans:
        later = answers[answers >= start + n]
        column = row.end - 1 if asked is None else asked
        if asked is None and len(later):
            column = int(later[0]) - 1
        by_span.append(column)
    columns = sorted(set(by_span))
    ends = [max(s + n for (s, n), by in zip(row.spans, by_span) if by == column) for column in columns]
    scorers = tuple(Scorer(column, begin) for column, begin in zip(columns, ends))
    return replace(row, scorers=scorers, which=tuple(map(columns.index, by_span)))


def _around(row: Row, answers) -> tuple[int, int, int]:
    if not row.spans:
        return 0, 0, 0
    said = answers[answers > row.last_visual]
    answered = min(int(said[0]), row.end) if len(said) else row.end
    return row.spans[0][0] - row.first, row.end - 1 - row.last_visual, row.end - answered
