"""The visual tokens of one prefill, and all that is kept per column and becomes shorter with them."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.profiler import record_function

from ..budget import keeps
from ..config import TOWER_SCORE, Compression, Step
from ..methods import MERGERS, Context
from ..methods.sparsevlm import of_strongest_heads, raters
from ..ops.reference import flat_rows, ordinals, repack, take, take_last
from ..ops.spans import Spans, on_device
from ..places import TOWER
from ..select import tower_score
from ..step import Compressed, compress_spans

IGNORE_INDEX = -100
# Kinds of importance that read the rows of all the text after the picture, and those that choose among them.
OF_THE_TEXT, RATED = ("mean", "raters", "rater-heads"), ("raters", "rater-heads")


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
        seen: what the vision tower says about them, where a method asks.
    """

    visual: torch.Tensor
    labels: torch.Tensor | None = None
    score_columns: torch.Tensor | None = None
    row_seeds: torch.Tensor | None = None
    padding_side: str | None = None
    trace: bool = False
    seen: "Seen | None" = None


@dataclass(frozen=True)
class TowerLeft:
    """What a compression in the vision tower has left of a batch's visual tokens, all as (B, N) of each row's
    visual tokens, padded on the right.

    kept: bool, where the embeddings hold a token that is left. groups: the number, among the row's kept ones,
    of the token that each went into; -1 where it was dropped. weights: its weight there; importance: the
    score it was chosen by; these three are for traces only. tokens: for each row the numbers of the visual
    tokens whose embeddings are others now, and those (T, D); None where the embeddings have them already.
    """

    kept: torch.Tensor
    groups: torch.Tensor
    weights: torch.Tensor
    importance: torch.Tensor
    tokens: list[tuple[torch.Tensor, torch.Tensor]] | None = None


@dataclass(frozen=True)
class Seen:
    """What the vision tower says about the visual tokens of B rows.

    context: per visual token of a row, padded on the right; pictures: for each row the visual tokens of each
    of its pictures, which are spans of their own even where they touch; left: what a compression in the tower
    has left, where there was one.
    """

    context: Context
    pictures: list[list[int]]
    left: TowerLeft | None = None


@dataclass(frozen=True)
class Deep:
    """What a decoder layer says about all columns of a call: ``keys`` (B, S, C) of all its heads side by
    side, and the ``hidden`` states (B, S, D) that leave it, after the decoder's final norm."""

    keys: torch.Tensor
    hidden: torch.Tensor


@dataclass
class Queries:
    """Which attention rows score the visual tokens.

    Attributes:
        columns: (B, R), the query columns of a probe.
        weights: (B, G, R), which turn R attention rows into G score rows; None where the one is the other.
    """

    columns: torch.Tensor
    weights: torch.Tensor | None

    @classmethod
    def build(cls, queries: list[list[list[int]]], fill: list[int], device) -> "Queries":
        """``queries``: for each row and each of its score rows the columns whose attention is averaged;
        ``fill``: a valid column of each row."""
        groups = max(map(len, queries), default=0)
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
        table = on_device(columns, device, torch.long).view(len(flat), width)
        if groups == width == 1 and all(flat):  # the one query is the one score row
            return cls(table, None)
        return cls(table, on_device(weights, device).view(len(flat), groups, width))

    def moved(self, place: torch.Tensor) -> "Queries":
        """With ``place`` (B, S), the new column of each old one, -1 before the first that is left."""
        return Queries(place.gather(1, self.columns).clamp(min=0), self.weights)


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
        return take(x, self.source) if dim == 1 else take_last(x, self.source)


class VisualTokens:
    """The visual tokens of one batch: where they are now, which text token scores them, labels.

    Args:
        schedule: the compressions, one after another.
        prefill: which columns are visual tokens, and what else is known of the call.
        valid: (B, S), 0 for padding, which is all on the left or all on the right of a row; None if there is
            none.

    Raises:
        ValueError: if there is padding in the middle or on both sides of the batch's rows.
    """

    def __init__(self, schedule: tuple[Step, ...], prefill: Prefill, valid: torch.Tensor | None = None):
        self.schedule, self.labels, self._row_seeds = schedule, prefill.labels, prefill.row_seeds
        self._left = None if prefill.seen is None else prefill.seen.left
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
            if prefill.seen is not None:
                begins = begins | self._borders(visual, prefill.seen.pictures)
            self.spans = (
                begins.cumsum(1) * visual
            )  # (B, S): 0 for text and padding, k for the row's k-th span
            self._survey(prefill.score_columns)
        self._context = self._repeat(None if prefill.seen is None else prefill.seen.context)
        self.deep: Deep | None = None  # of the layer after which is compressed next, where a method asks
        if any(step.part.positions == "centre" for step in schedule):
            self._places = self._places_in_spans()

    @staticmethod
    def _borders(visual: torch.Tensor, pictures: list[list[int]]) -> torch.Tensor:
        """(B, S) bool: the first column of each picture."""
        batch = len(visual)
        repeats = batch // len(pictures)  # beams and returned sequences
        rows = [row for row in pictures for _ in range(repeats)]
        first = torch.zeros(batch, visual.shape[1] + 1, dtype=torch.bool)
        for b, row in enumerate(rows):
            for end in torch.tensor([0, *row]).cumsum(0)[:-1].tolist():
                first[b, min(end, visual.shape[1])] = True
        number = (visual.cumsum(1) - 1).clamp(min=0)
        return visual & first.to(visual.device).gather(1, number)

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
        last_of_row = torch.where(self.spans > 0, columns, -1).amax(1)
        first_of_row = torch.where(self.spans > 0, columns, length).amin(1)
        answered = last_valid + 1
        if self.labels is not None:
            said = (self.labels != IGNORE_INDEX) & (columns > last_of_row[:, None])
            answered = torch.where(said, columns, length).amin(1).minimum(last_valid + 1)
        around = torch.stack(
            [first_of_row - first_valid, last_valid - last_of_row, last_valid + 1 - answered], 1
        )
        extent = torch.cat([around, torch.stack([valid.sum(1), first_valid, last_valid], 1)], 1)
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
        # Of each row: its columns before the first picture, after the last one, and those of answers.
        self._around = [
            (entry[-6], entry[-5], entry[-4]) if row else (0, 0, 0)
            for entry, row in zip(summary, self.span_lengths)
        ]
        self._set_queries(scorers, last_visual, fill=[entry[-1] for entry in summary])

    def _repeat(self, context: Context | None) -> Context:
        """The context for the rows of this batch, which beams and returned sequences repeat."""
        given = None if context is None else context.rows
        if not given or given == len(self.spans):
            return context or Context()
        return context.repeated(len(self.spans) // given)

    def _set_queries(self, scorers, last_visual, fill) -> None:
        """The probes' queries for each kind of importance that a step after a layer reads."""
        self._queries = {}
        for kind in {step.part.importance for step in self.schedule}:
            if kind in OF_THE_TEXT:
                queries = [
                    [list(range(end + 1, column + 1)) or [column] for column, end in zip(*row)]
                    for row in zip(scorers, last_visual)
                ]
            else:
                queries = [[[column] for column in row] for row in scorers]
            self._queries[kind] = Queries.build(queries, fill, self.spans.device)

    def rate(self, embeds: torch.Tensor) -> None:
        """Choose the raters of the question (SparseVLM) by the embeddings (B, S, D), where a step asks."""
        for kind, asked in self._queries.items():
            if kind in RATED and asked.weights is not None:
                text = take(embeds, asked.columns)
                asked.weights = raters(embeds.detach(), text.detach(), self.spans > 0, asked.weights > 0)

    @property
    def over_heads(self):
        """What the probe of the next compression makes of the attention of each head; None for the mean."""
        asked = self._queries[self.step.part.importance]
        if self.step.part.importance != "rater-heads":
            return None
        rates = asked.columns >= 0 if asked.weights is None else (asked.weights > 0).any(1)
        return partial(of_strongest_heads, rates=rates, visual=self.spans > 0)

    @property
    def step(self) -> Step:
        """The compression that comes next."""
        return self.schedule[len(self.counts) - 1]

    @property
    def queries(self) -> torch.Tensor:
        """(B, R): the columns whose attention the next compression reads."""
        return self._queries[self.step.part.importance].columns

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
        weights = self._queries[self.step.part.importance].weights
        scores = attention if weights is None else weights @ attention  # (B, G, S)
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
        self, hidden: torch.Tensor, attention: torch.Tensor | None
    ) -> tuple[torch.Tensor, Shortened, Compressed]:
        """Shorten the columns for the stage after a compression.

        Args:
            hidden: (B, S, D) what leaves the layer, or the embeddings.
            attention: (B, R, S) the probe's answer for the columns of this call; None where the decoder's
                attention is not read.

        Returns:
            the new hidden states (B, S', D), how their columns come from the old ones, and the compression
            step itself.

        Raises:
            ValueError: where the context lacks what the step needs.
        """
        device, part = hidden.device, self.step.part
        with record_function("libra.layout"):
            # A row without visual tokens gets a span of one column, so that shapes stay valid; it is put back
            # untouched.
            spans = [row or [1] for row in self.span_lengths]
            kept = self._left_of_spans() if part.at == TOWER else keeps(spans, part, self.step.left)
            layout = Spans.build(spans, kept, device)
            columns = self._columns(layout.tokens)
        with record_function("libra.gather"):
            visual = take(hidden, columns)
        if part.at == TOWER:
            step = self._left_by_tower(visual, layout)
        else:
            context = self._context_for(part, hidden, layout, columns)
            importance, owner = context_score(part, context, visual), None
            if attention is not None:
                importance, owner = self._importance(attention, columns, layout)
            step = compress_spans(visual, importance, part, layout, owner, self._row_seeds, context)
        if len(self.counts) < len(self.schedule):
            self._context = self._context.at(step.targets)
        with record_function("libra.gather"):
            new_hidden, shortened = self._shorten(hidden, columns, step)
        return new_hidden, shortened, step

    def _context_for(
        self, part: Compression, hidden: torch.Tensor, layout: Spans, columns: torch.Tensor
    ) -> Context:
        """What the step may look at. Raises ValueError where something that it needs is not there."""
        context = self._context
        if context.grid is not None:
            grid = [list(row[: len(n)]) or [(1, 1)] for row, n in zip(context.grid, self.span_lengths)]
            context = replace(context, grid=grid)
        if any("text" in need.split("|") for need in part.needs) and context.relevance is None:
            context = replace(context, text=self._question(hidden))
        if part.compares_keys and self.deep is not None:
            context = replace(
                context,
                layer_keys=take(self.deep.keys, columns),
                text_keys=self._question(self.deep.keys),
                final_hidden=take(self.deep.hidden, columns),
                final_text=self._question(self.deep.hidden),
            )
        if missing := context.missing(part.needs):
            raise ValueError(
                f"{part.name} needs {missing.replace('|', ' or ')} of the vision tower, which this call does"
                " not give: call the model with pictures, or choose a method that needs none"
            )
        return context.cut(layout.tokens)

    def _question(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Of each row (P, D): the text after its last picture as far as it is not an answer, or the text
        before the first one where nothing follows."""
        rows, length = [], hidden.shape[1]
        for b, (count, (before, tail, answers)) in enumerate(zip(self.row_lengths, self._around)):
            first = length - count if self.pads_left else 0
            end = first + count
            text = hidden[b, end - tail : end - answers]
            text = text if tail > answers else hidden[b, first : first + before]
            # A row of nothing but pictures, or without any, compares with itself: no text is no preference.
            rows.append((text if len(text) else hidden[b, first:end]).detach())
        return rows

    def _left_of_spans(self) -> list[list[int]]:
        """How many tokens of each span the tower has left; asking waits for the device."""
        if self._left is None:
            raise ValueError(
                "a compression in the vision tower needs pictures: embeddings alone cannot go back there;"
                " write at: input"
            )
        kept = self._left.kept.repeat_interleave(len(self.spans) // len(self._left.kept), 0).tolist()
        counts = []
        for row, spans in zip(kept, self.span_lengths):
            ends = torch.tensor([0, *spans]).cumsum(0).tolist()
            counts.append([sum(row[a:b]) for a, b in zip(ends, ends[1:])] or [1])
        return counts

    def _left_by_tower(self, visual: torch.Tensor, layout: Spans) -> Compressed:
        """The tower's step in terms of the columns: its tokens stand where they are kept."""
        repeats = len(visual) // len(self._left.kept)

        def fitted(x):
            x = x.repeat_interleave(repeats, 0)
            return torch.nn.functional.pad(x, (0, max(0, layout.tokens - x.shape[1])))[:, : layout.tokens]

        kept = fitted(self._left.kept)
        kept = kept | ((layout.index == 0) & ~kept.any(1, keepdim=True))  # a row without pictures
        targets = ordinals(kept & layout.valid, layout.targets)
        if self._left.tokens is not None:
            visual = visual.clone()
            for b in range(len(visual)):
                places, tokens = self._left.tokens[b // repeats]
                visual[b] = visual[b].index_copy(0, places, tokens.to(visual))
        weights, importance = fitted(self._left.weights).float(), fitted(self._left.importance).float()
        return Compressed(
            take(visual, targets), layout.target_valid, targets, fitted(self._left.groups), weights,
            importance, None, layout, None,
        )  # fmt: skip

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
        part = self.step.part
        put = self._left.tokens is not None if part.at == TOWER else not MERGERS[part.merge].drops
        if put:
            slots = place.gather(1, columns.gather(1, step.targets))
            self._put(new_hidden, step, torch.cat([slots, compensation], 1) if room else slots)

        new_columns = torch.arange(width, device=device)
        valid = new_columns >= width - ends if self.pads_left else new_columns < ends
        # A compensation token belongs to no span: later layers treat it as text, and nobody predicts it.
        nobody = ~valid if not room else ~valid | (new_columns == compensation)
        spans = take(self.spans, source).masked_fill(nobody, 0)
        labels = None if self.labels is None else take(self.labels, source).masked_fill(nobody, IGNORE_INDEX)
        # A scoring column that is dropped (a row that ends with its image) hands over to the one before it.
        queries = {kind: asked.moved(place) for kind, asked in self._queries.items()}

        lengths = [n + c for n, c in zip(kept, step.compensated)]  # the step's one device synchronisation
        if spare := width - max(lengths):
            cut = slice(spare, None) if self.pads_left else slice(-spare)
            new_hidden, source, valid, spans = (x[:, cut] for x in (new_hidden, source, valid, spans))
            labels = None if labels is None else labels[:, cut]
            for asked in queries.values() if self.pads_left else ():
                asked.columns = asked.columns - spare
        # None where no row has padding: a mask would keep flash attention and SDPA from their fast kernels.
        self.valid = None if min(lengths) == max(lengths) else valid
        self.spans, self.labels, self._queries, self.row_lengths = spans, labels, queries, lengths
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

    def _places_in_spans(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, M): the first column of each span and its tokens, as they came in."""
        members = self._members()
        columns = torch.arange(members.shape[2], device=members.device)
        first = torch.where(members, columns, members.shape[2] - 1).amin(2)
        return first, members.sum(2)

    def _members(self) -> torch.Tensor:
        """(B, M, S) bool: which columns belong to each span."""
        most = max(map(len, self.span_lengths), default=0)
        numbers = torch.arange(1, most + 1, device=self.spans.device)
        return self.spans[:, None, :] == numbers[:, None]

    def starts(self, positions: torch.Tensor) -> torch.Tensor:
        """(B, M): where each span begins, of the ``positions`` (B or 1, S) of the columns that came in."""
        first = self._places[0]
        return positions.expand(len(first), -1).gather(1, first)

    def centred(self, positions: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """``positions`` (B or 1, S) of the columns that are left, where the i-th of a span's T tokens stands
        at the centre of the i-th of T even intervals of the positions that the span had from ``starts``
        on."""
        members = self._members()
        number = (members.cumsum(2) - 1).float()  # (B, M, S)
        interval = self._places[1] / members.sum(2).clamp(min=1)
        centre = starts[..., None] + ((number + 0.5) * interval[..., None] - 0.5)
        return torch.where(members.any(1), (centre * members).sum(1), positions.float())


def context_score(part: Compression, context: Context, visual: torch.Tensor) -> torch.Tensor:
    """(B, N) importance where the decoder's attention is not read: the tower's score, or zeros."""
    if part.importance == "tower" and not context.missing([TOWER_SCORE]):
        return tower_score(context)
    return visual.new_zeros(visual.shape[:2])
