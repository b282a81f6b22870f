"""The visual tokens of one prefill, and all that is kept per column and becomes shorter with them."""

from dataclasses import dataclass

import torch
from torch.profiler import record_function

from ..budget import keeps
from ..config import Compression
from ..methods import MERGERS
from ..ops.reference import flat_rows, ordinals, repack, take
from ..ops.spans import Spans, on_device
from ..step import Compressed, compress_spans

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Prefill:
    """What the engine is told of a call that brings visual tokens.

    Attributes:
        visual: (B, S) bool, True at the columns of visual tokens; each contiguous run of them is a span.
        labels: (B, S) with -100 where nothing is supervised; None outside training.
        score_columns: (B,) the column that scores each row's visual tokens. By default the last valid column
            or, with labels, for each span the last column before the first answer that follows it.
        row_seeds: (B,) integers for pseudo-random selection.
        padding_side: where rows that come without padding get it, should their lengths become unequal:
            "left", which generation needs, or "right". None: right with labels, left without. Padding that is
            there keeps its side.
        trace: whether to record what becomes of each visual token.
    """

    visual: torch.Tensor
    labels: torch.Tensor | None = None
    score_columns: torch.Tensor | None = None
    row_seeds: torch.Tensor | None = None
    padding_side: str | None = None
    trace: bool = False


@dataclass
class Shortened:
    """How the columns of a shorter stage come from those of the longer one.

    Attributes:
        source: (B, S'), the old column of each new one; a compensation token has the last visual column's.
        valid: (B, S') bool, False for padding; None if no row has any.
    """

    source: torch.Tensor
    valid: torch.Tensor | None

    def gather(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Take the new columns of ``x`` along ``dim`` 1 (B, S, …) or the last (…, B or 1, S)."""
        if dim == 1:
            return take(x, self.source)
        shape = (*x.shape[:-2], *self.source.shape)
        return x.expand(*shape[:-1], x.shape[-1]).gather(-1, self.source.expand(shape))


class VisualTokens:
    """The visual tokens of one batch: where they are now, which text token scores them, labels.

    Args:
        compression: what happens at each compression layer.
        prefill: which columns are visual tokens, and what else is known of the call.
        valid: (B, S), 0 for padding, which is all on the left or all on the right of a row; None if there is
            none.

    Raises:
        ValueError: if there is padding in the middle or on both sides of the batch's rows.
    """

    def __init__(self, compression: Compression, prefill: Prefill, valid: torch.Tensor | None = None):
        self.compression, self.labels, self._row_seeds = compression, prefill.labels, prefill.row_seeds
        self.valid = None if valid is None else valid.bool()
        self._side = prefill.padding_side or ("left" if prefill.labels is None else "right")
        visual = prefill.visual
        self.counts: list[
            list[int]
        ] = []  # visual tokens of each row, stage by stage, without compensation tokens
        self.compensated: list[
            list[bool]
        ] = []  # which rows got a compensation token at each compression layer
        with record_function("libra.layout"):
            begins = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
            self.spans = (
                begins.cumsum(1) * visual
            )  # (B, S): 0 for text and padding, k for the row's k-th span
            self._survey(prefill.score_columns)

    def _survey(self, score_columns) -> None:
        """Bring the batch's layout to the host once: after it every shape is known but for compensation
        tokens."""
        batch, length = self.spans.shape
        device = self.spans.device
        columns = torch.arange(length, device=device)
        valid = torch.ones_like(self.spans, dtype=torch.bool) if self.valid is None else self.valid
        self.spans = self.spans.masked_fill(~valid, 0)
        most = int(self.spans.max()) if self.spans.numel() else 0
        numbers = torch.arange(1, most + 1, device=device)
        members = self.spans[:, None, :] == numbers[:, None]  # (B, M, S)
        last_valid = torch.where(valid, columns, -1).amax(1)
        last_of_span = torch.where(members, columns, -1).amax(2)
        scorer = (
            last_valid[:, None].expand(-1, most)
            if score_columns is None
            else score_columns[:, None].expand(-1, most)
        )
        if score_columns is None and self.labels is not None:
            answers = (self.labels != IGNORE_INDEX)[:, None, :] & (columns > last_of_span[..., None])
            first_answer = torch.where(answers, columns, length).amin(2)
            scorer = torch.where(first_answer < length, first_answer - 1, scorer)
        first_valid = torch.where(valid, columns, length).amin(1)
        extent = torch.stack([valid.sum(1), first_valid, last_valid], 1)
        summary = torch.cat([members.sum(2), scorer, last_of_span, extent], 1).tolist()

        self.span_lengths, self.row_lengths = [], []
        scorers: list[list[int]] = []  # the distinct score columns of each row
        last_visual: list[list[int]] = []  # the last visual column each of them scores
        which: list[list[int]] = []  # span → place in the row's list of score columns
        for entry in summary:
            lengths, scored_by, ends = entry[:most], entry[most : 2 * most], entry[2 * most : 3 * most]
            real = [i for i in range(most) if lengths[i]]
            distinct = sorted({scored_by[i] for i in real})
            self.span_lengths.append([lengths[i] for i in real])
            which.append([distinct.index(scored_by[i]) for i in real])
            scorers.append(distinct)
            last_visual.append([max(ends[i] for i in real if scored_by[i] == column) for column in distinct])
            self.row_lengths.append(entry[-3])
        padded_left = any(entry[-2] > 0 for entry in summary)
        padded_right = any(entry[-1] < length - 1 for entry in summary)
        if padded_left and padded_right or any(entry[-3] != entry[-1] - entry[-2] + 1 for entry in summary):
            raise ValueError(
                "the attention mask has padding on both sides or inside a row; pad on one side only"
            )
        self.pads_left = padded_left or not padded_right and self._side == "left"
        if not (padded_left or padded_right):
            self.valid = None
        self.last_visual = max((end for row in last_visual for end in row), default=-1)
        self.counts.append([sum(row) for row in self.span_lengths])
        self._which = which
        self._set_queries(scorers, last_visual, fill=[entry[-1] for entry in summary])

    def _set_queries(self, scorers, last_visual, fill) -> None:
        """The query columns (B, R) of the probes and the weights (B, G, R) that turn R attention rows into G
        score rows."""
        groups = max((len(row) for row in scorers), default=0)
        if self.compression.importance == "mean":
            queries = [
                [list(range(end + 1, column + 1)) or [column] for column, end in zip(*row)]
                for row in zip(scorers, last_visual)
            ]
        else:
            queries = [[[column] for column in row] for row in scorers]
        flat = [[(g, column, 1 / len(run)) for g, run in enumerate(row) for column in run] for row in queries]
        width = max((len(row) for row in flat), default=0)
        # Shorter lists are filled with a valid column: a padding token sees no key, and its attention would
        # be undefined.
        columns = [
            [column for _, column, _ in row] + [valid] * (width - len(row)) for row, valid in zip(flat, fill)
        ]
        weights = [[[0.0] * width for _ in range(groups)] for _ in flat]
        for b, row in enumerate(flat):
            for r, (g, _, share) in enumerate(row):
                weights[b][g][r] = share
        device = self.spans.device
        self.queries = on_device(columns, device, torch.long).view(len(flat), width)
        alone = groups == width == 1 and all(flat)  # the one query is the one score row
        self._query_weights = None if alone else on_device(weights, device).view(len(flat), groups, width)

    @property
    def padding(self) -> str | None:
        """The side on which the rows are padded now; None if no row is."""
        if self.valid is None:
            return None
        return "left" if self.pads_left else "right"

    def _columns(self, count: int) -> torch.Tensor:
        """(B, count): the columns of each row's visual tokens, ascending; a shorter row goes on with other
        columns."""
        return ordinals(self.spans > 0, count)

    def _importance(self, attention: torch.Tensor, columns: torch.Tensor, layout: Spans):
        """α of the visual tokens (B, N) from attention (B, R, S), and which score row each token has (B, N)
        or None for one."""
        scores = attention if self._query_weights is None else self._query_weights @ attention  # (B, G, S)
        groups = scores.shape[1]
        if groups == 1:
            return scores[:, 0].gather(1, columns), None
        width = 1 + max(map(len, self._which))
        table = on_device([row + [0] * (width - len(row)) for row in self._which], attention.device)
        owner = table.gather(1, layout.span)
        return scores.gather(2, columns[:, None].expand(-1, groups, -1)).gather(1, owner[:, None])[
            :, 0
        ], owner

    def compress(
        self, hidden: torch.Tensor, attention: torch.Tensor
    ) -> tuple[torch.Tensor, Shortened, Compressed]:
        """Shorten the columns for the stage after a compression layer.

        Args:
            hidden: (B, S, D) what leaves the layer.
            attention: (B, R, S) the probe's answer for the columns of this call.

        Returns:
            the new hidden states (B, S', D), how their columns come from the old ones, and the compression
            step itself.
        """
        device = hidden.device
        with record_function("libra.layout"):
            # A row without visual tokens gets a span of one column, so that shapes stay valid; it is put back
            # untouched.
            spans = [row or [1] for row in self.span_lengths]
            layout = Spans.build(
                spans,
                keeps(spans, self.compression, len(self.compression.layers) - len(self.counts) + 1),
                device,
            )
            columns = self._columns(layout.tokens)
            importance, owner = self._importance(attention, columns, layout)
        with record_function("libra.gather"):
            visual = take(hidden, columns)
        step = compress_spans(visual, importance, self.compression, layout, owner, self._row_seeds)
        with record_function("libra.gather"):
            new_hidden, shortened = self._shorten(hidden, columns, step)
        return new_hidden, shortened, step

    def _shorten(
        self, hidden: torch.Tensor, columns: torch.Tensor, step: Compressed
    ) -> tuple[torch.Tensor, Shortened]:
        """Drop the non-target columns, make room for compensation tokens, move everything that is kept per
        column.

        Only the device knows which rows have a compensation token. Waiting for it before columns are moved
        would leave a GPU idle at every compression layer. So one slot is reserved in every row, everything is
        queued with it, and only then the host asks, once; a slot that no row uses is cut off again.

        Rows are packed anew, towards the side away from the padding: left padded for generation, where the
        newest column of every row must be the last one. A row without a compensation token (of a batch where
        another row has one) leaves its slot among its padding, and `valid` masks it.
        """
        device, layout = self.spans.device, step.layout
        room = step.has_compensation is not None
        kept = [
            n - before + after
            for n, before, after in zip(self.row_lengths, layout.lengths, layout.target_counts)
        ]
        width = max(kept) + room
        extra = (
            step.has_compensation[:, None].long()
            if room
            else torch.zeros(len(kept), 1, dtype=torch.long, device=device)
        )
        ends = on_device(kept, device)[:, None] + extra

        keep = torch.ones_like(self.spans, dtype=torch.bool) if self.valid is None else self.valid.clone()
        chosen = torch.zeros_like(layout.valid).scatter(1, step.targets, layout.target_valid)
        current = keep.gather(1, columns)
        keep = keep.scatter(1, columns, torch.where(layout.valid, chosen & current, current))
        last_visual = columns.gather(1, layout.tokens_of_row[:, None] - 1)
        shift = width - ends if self.pads_left else torch.zeros_like(ends)
        source, place = repack(keep, last_visual, extra, shift, width)
        # A row without one sends the slot of the compensation token to a column that it leaves empty.
        compensation = torch.where(
            extra > 0, place.gather(1, last_visual) + 1, 0 if self.pads_left else width - 1
        )
        new_hidden = take(hidden, source)
        if not MERGERS[self.compression.merge].drops:
            slots = place.gather(1, columns.gather(1, step.targets))
            self._put(new_hidden, step, torch.cat([slots, compensation], 1) if room else slots)

        new_columns = torch.arange(width, device=device)
        valid = new_columns >= width - ends if self.pads_left else new_columns < ends
        # A compensation token belongs to no span: later layers treat it as text, and nobody predicts it.
        nobody = ~valid if not room else ~valid | (new_columns == compensation)
        spans = take(self.spans, source).masked_fill(nobody, 0)
        labels = None if self.labels is None else take(self.labels, source).masked_fill(nobody, IGNORE_INDEX)
        # A scoring column that is dropped (a row that ends with its image) hands over to the one before it.
        queries = place.gather(1, self.queries).clamp(min=0)

        lengths = [n + c for n, c in zip(kept, step.compensated)]  # the step's one device synchronisation
        if spare := width - max(lengths):
            cut = slice(spare, None) if self.pads_left else slice(-spare)
            new_hidden, source, valid, spans = (x[:, cut] for x in (new_hidden, source, valid, spans))
            labels = None if labels is None else labels[:, cut]
            queries = queries - spare if self.pads_left else queries
        # None where no row has padding: a mask would keep flash attention and SDPA from their fast kernels.
        self.valid = None if min(lengths) == max(lengths) else valid
        self.spans, self.labels, self.queries, self.row_lengths = spans, labels, queries, lengths
        self.span_lengths = [list(k) if n else [] for k, n in zip(layout.keeps, self.span_lengths)]
        self.counts.append([sum(row) for row in self.span_lengths])
        self.compensated.append(step.compensated)
        return new_hidden, Shortened(source, self.valid)

    def _put(self, hidden: torch.Tensor, step: Compressed, place: torch.Tensor) -> None:
        """Write the merged tokens (B, T[+1], D) into their columns ``place`` (B, T[+1]) of the new ``hidden``
        (B, S', D)."""
        batch, length, width = hidden.shape
        slots, targets = place.shape[1], step.layout.targets
        flat = flat_rows(place, length)
        tokens = step.tokens.reshape(-1, width)
        # Of the slots that rows fill as far as the host knows; a row without visual tokens keeps its one
        # column as it is.
        filled = [
            row * slots + slot
            for row, (count, spans) in enumerate(zip(step.layout.target_counts, self.span_lengths))
            if spans
            for slot in (*range(count), *range(targets, slots))
        ]
        if len(filled) < batch * slots:
            chosen = on_device(filled, hidden.device, torch.long)
            flat, tokens = flat[chosen], tokens[chosen]
        hidden.view(-1, width).index_copy_(0, flat, tokens)
