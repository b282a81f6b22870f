"""The visual tokens of one prefill, and all that is kept per column and becomes shorter with them."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from ..budget import keeps
from ..config import TOWER_SCORE, Compression, Step
from ..methods import MERGERS, Context
from ..methods.sparsevlm import of_strongest_heads, raters
from ..ops.reference import ordinals, tables_on_device, take, take_last
from ..ops.spans import Spans, on_device
from ..places import TOWER
from ..select import tower_score
from ..step import Compressed, Fates, compress_spans
from ..utils.ranges import profiled
from .columns import IGNORE_INDEX, Columns, Scorer, survey

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
        columns: the same as the host knows it, see :meth:`surveyed`; None: found when it is needed.
    """

    visual: torch.Tensor
    labels: torch.Tensor | None = None
    score_columns: torch.Tensor | None = None
    row_seeds: torch.Tensor | None = None
    padding_side: str | None = None
    trace: bool = False
    seen: "Seen | None" = None
    columns: Columns | None = None

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError where visual mask or labels are not of the call's ``shape`` (B, S)."""
        for name, part in (("visual mask is", self.visual), ("labels are", self.labels)):
            if part is not None and tuple(part.shape) != tuple(shape):
                raise ValueError(
                    f"the {name} {tuple(part.shape)} but the prompt is {tuple(shape)}: give one entry for"
                    " each token"
                )

    def surveyed(self, valid: torch.Tensor | None = None) -> "Prefill":
        """With its columns; this waits for the device, where they are not known yet.

        valid: (B, S), 0 for padding, which is all on the left or all on the right of a row; None if there is
            none. Raises ValueError if there is padding in the middle or on both sides of the batch's rows.
        """
        if self.columns is not None:
            return self
        side = self.padding_side or ("left" if self.labels is None else "right")
        pictures = None if self.seen is None else self.seen.pictures
        valid = None if valid is None else valid.bool()
        found = survey(self.visual, valid, self.labels, self.score_columns, pictures, side)
        return replace(self, columns=found)


def check_kept(logits_to_keep) -> None:
    """Raise ValueError for columns of logits that are named one by one, of a call that was compressed."""
    if isinstance(logits_to_keep, torch.Tensor):
        raise ValueError(
            "a tensor of logits_to_keep names columns of the prompt, and compression moves them; give how"
            " many of the last ones to keep, or take the logits of all"
        )


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
        columns: the query columns of a probe: (B, R), or a range where they are the same in all rows.
        weights: (B, G, R), which turn R attention rows into G score rows; None where their mean is the one.
    """

    columns: torch.Tensor | range
    weights: torch.Tensor | None = None

    @classmethod
    def of(cls, columns: Columns, importance: str, device) -> "Queries":
        """For a kind of importance."""
        queries = [[_asked(one, importance) for one in row.scorers] for row in columns.rows]
        alike = all(row == queries[0] for row in queries) and len(queries[0]) == 1
        if alike and importance not in RATED:
            return cls(queries[0][0])
        return cls.build(queries, [max(row.end - 1, 0) for row in columns.rows], device)

    @classmethod
    def build(cls, queries: list[list[range]], fill: list[int], device) -> "Queries":
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
        table = on_device(columns, device, torch.long).view(len(flat), width)
        if groups == width == 1 and all(flat):  # the one query is the one score row
            return cls(table)
        weights = [[[0.0] * width for _ in range(groups)] for _ in flat]
        for b, row in enumerate(flat):
            for r, (g, _, share) in enumerate(row):
                weights[b][g][r] = share
        return cls(table, on_device(weights, device).view(len(flat), groups, width))

    def score_rows(self, attention: torch.Tensor) -> torch.Tensor:
        """(B, G, S) of the probe's answer (B, R, S)."""
        if self.weights is not None:
            return self.weights @ attention
        return attention if attention.shape[1] == 1 else attention.mean(1, keepdim=True)


def _asked(scorer: Scorer, importance: str) -> range:
    """The columns whose attention a scorer stands for."""
    if importance in OF_THE_TEXT and scorer.begin <= scorer.column:
        return range(scorer.begin, scorer.column + 1)
    return range(scorer.column, scorer.column + 1)


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
        prefill: which columns are visual tokens, and what else is known of the call; surveyed.
        valid: (B, S), 0 for padding; None if there is none.
    """

    def __init__(self, schedule: tuple[Step, ...], prefill: Prefill, valid: torch.Tensor | None = None):
        self.schedule, self.labels, self._row_seeds = schedule, prefill.labels, prefill.row_seeds
        self._left = None if prefill.seen is None else prefill.seen.left
        self._device = prefill.visual.device
        self.columns: Columns = prefill.surveyed(valid).columns
        self.valid = valid.bool() if valid is not None and self.columns.is_padded else None
        # Visual tokens of each row, stage by stage, without compensation tokens.
        self.counts = [list(map(sum, self.columns.span_lengths))]
        # Which rows got a compensation token at each compression layer.
        self.compensated: list[list[bool]] = []
        self.last_visual = max(row.last_visual for row in self.columns.rows)
        self._queries: Queries | None = None
        self._rated: dict[str, torch.Tensor] = {}  # the weights of queries that were chosen among the text
        self._context = self._repeat(None if prefill.seen is None else prefill.seen.context)
        self.deep: Deep | None = None  # of the layer after which is compressed next, where a method asks
        if any(step.part.positions == "centre" for step in schedule):
            self._places = self._places_in_spans()

    def _repeat(self, context: Context | None) -> Context:
        """The context for the rows of this batch, which beams and returned sequences repeat."""
        given = None if context is None else context.rows
        if not given or given == len(self.columns.rows):
            return context or Context()
        return context.repeated(len(self.columns.rows) // given)

    def rate(self, embeds: torch.Tensor) -> None:
        """Choose the raters of the question (SparseVLM) by the embeddings (B, S, D), where a step asks."""
        for kind in {step.part.importance for step in self.schedule if step.part.importance in RATED}:
            asked = Queries.of(self.columns, kind, self._device)
            if asked.weights is not None:
                text = take(embeds, asked.columns)  # type: ignore[arg-type]  # a range has no weights
                weights = raters(embeds.detach(), text.detach(), self.spans > 0, asked.weights > 0)
                self._rated[kind] = weights

    @property
    def over_heads(self):
        """What the probe of the next compression makes of the attention of each head; None for the mean."""
        if self.step.part.importance != "rater-heads":
            return None
        asked = self.queries
        rates = asked.columns >= 0 if asked.weights is None else (asked.weights > 0).any(1)
        return partial(of_strongest_heads, rates=rates, visual=self.spans > 0)  # type: ignore[arg-type]

    @property
    def step(self) -> Step:
        """The compression that comes next."""
        return self.schedule[len(self.counts) - 1]

    @property
    def span_lengths(self) -> list[list[int]]:
        """Visual tokens of each span of each row."""
        return self.columns.span_lengths

    @property
    def row_lengths(self) -> list[int]:
        """Valid columns of each row."""
        return self.columns.lengths

    @property
    def spans(self) -> torch.Tensor:
        """(B, S): 0 for text and padding, k for the row's k-th span."""
        return on_device(self.columns.numbers(), self._device)

    @property
    def queries(self) -> Queries:
        """The columns whose attention the next compression reads."""
        if self._queries is None:
            kind = self.step.part.importance
            self._queries = Queries.of(self.columns, kind, self._device)
            self._queries.weights = self._rated.get(kind, self._queries.weights)
        return self._queries

    @property
    def padding(self) -> str | None:
        """The side on which the rows are padded now; None if no row is."""
        if self.valid is None:
            return None
        return "left" if self.columns.pads_left else "right"

    def _visual(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, …) of the visual tokens, from ``x`` (B, S, …), and their columns (B, N) where a table of
        them was made."""
        if self.columns.alike and self.columns.rows[0].spans:
            parts = [x[:, start : start + n] for start, n in self.columns.rows[0].spans]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1), None
        columns = on_device(self.columns.visual(), x.device)
        return take(x, columns), columns

    def _importance(self, attention: torch.Tensor, columns: torch.Tensor | None):
        """α of the visual tokens (B, N) from attention (B, R, S), and which score row each token has (B, N)
        or None for one."""
        scores = self.queries.score_rows(attention)  # (B, G, S)
        groups = scores.shape[1]
        if groups == 1:
            row = scores[:, 0]
            return self._visual(row)[0] if columns is None else row.gather(1, columns), None
        which = [[by for by, n in zip(row.which, row.lengths) for _ in range(n)] for row in self.columns.rows]
        width = max(1, *map(len, which))
        owner = on_device([row + [0] * (width - len(row)) for row in which], attention.device)
        if columns is None:
            columns = on_device(self.columns.visual(), attention.device)
        by_group = scores.gather(2, columns[:, None].expand(-1, groups, -1))
        return by_group.gather(1, owner[:, None])[:, 0], owner

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
        part = self.step.part
        with profiled("libra.layout"):
            # A row without visual tokens gets a span of one column, so that shapes stay valid; nothing is
            # made of it.
            spans = [row or [1] for row in self.span_lengths]
            kept = self._left_of_spans() if part.at == TOWER else keeps(spans, part, self.step.left)
            layout = Spans.build(spans, kept, hidden.device)
        with profiled("libra.gather"):
            visual, columns = self._visual(hidden)
        if part.at == TOWER:
            step = self._left_by_tower(visual, layout)
        else:
            context = self._context_for(part, hidden, layout)
            if attention is None:
                importance, owner = context_score(part, context, visual), None
            else:
                importance, owner = self._importance(attention, columns)
            step = compress_spans(visual, importance, part, layout, owner, self._row_seeds, context)
        if len(self.counts) < len(self.schedule):
            self._context = self._context.at(step.targets)
        with profiled("libra.gather"):
            new_hidden, shortened = self._shorten(hidden, columns, step)
        return new_hidden, shortened, step

    def _context_for(self, part: Compression, hidden: torch.Tensor, layout: Spans) -> Context:
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
                layer_keys=self._visual(self.deep.keys)[0],
                text_keys=self._question(self.deep.keys),
                final_hidden=self._visual(self.deep.hidden)[0],
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
        rows = []
        for b, (row, (before, tail, answers)) in enumerate(zip(self.columns.rows, self.columns.around)):
            first, end = row.first, row.end
            text = hidden[b, end - tail : end - answers]
            text = text if tail > answers else hidden[b, first : first + before]
            # A row of nothing but pictures, or without any, compares with itself: without text, nothing is
            # preferred.
            rows.append((text if len(text) else hidden[b, first : end or 1]).detach())
        return rows

    def _left_of_spans(self) -> list[list[int]]:
        """How many tokens of each span the tower has left; asking waits for the device."""
        if self._left is None:
            raise ValueError(
                "a compression in the vision tower needs pictures: embeddings cannot go back there;"
                " write at: input"
            )
        repeats = len(self.columns.rows) // len(self._left.kept)
        kept = self._left.kept.repeat_interleave(repeats, 0).tolist()
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
        fates = Fates(layout, fitted(self._left.groups), weights)
        return Compressed(take(visual, targets), targets, importance, layout, fates)

    def _shorten(
        self, hidden: torch.Tensor, columns: torch.Tensor | None, step: Compressed
    ) -> tuple[torch.Tensor, Shortened]:
        """Drop the non-target columns, put in compensation tokens, move everything that is kept per column.

        Only the device knows which rows have a compensation token, unless they are reserved. A GPU would be
        idle while the host waits for that and then moves columns; so they are moved first as if every row had
        one in which anything was removed, which is the rule, and then the host asks, once. Where it is not
        so, they are moved again.
        """
        kept = step.layout.keeps
        may_have = [
            bool(row.spans) and count > 0 for row, count in zip(self.columns.rows, step.layout.rest_counts)
        ]
        guessed = may_have if step.has_compensation is not None else [False] * len(may_have)
        numbers = None
        waits = hidden.device.type != "cpu" and not isinstance(step.has_compensation, (list, type(None)))
        inside = any(row.is_inside(one.column) for row in self.columns.rows for one in row.scorers)
        if inside:  # a scorer that may be dropped hands over to the one before it
            numbers = step.targets.tolist()
        if waits and not inside:
            new = self.columns.shortened(kept, guessed, None)
            moved = self._moved(hidden, columns, step, new, guessed)
        compensated = [has and may for has, may in zip(step.compensated, may_have)]
        if not waits or inside or compensated != guessed:
            new = self.columns.shortened(kept, compensated, numbers)
            moved = self._moved(hidden, columns, step, new, compensated)
        new_hidden, source = moved
        self._carry(source, new, compensated)
        self.columns, self._queries = new, None
        self.counts.append(list(map(sum, new.span_lengths)))
        self.compensated.append(compensated)
        return new_hidden, Shortened(source, self.valid)

    def _moved(self, hidden, columns, step: Compressed, new: Columns, extra: list[bool]):
        """The hidden states (B, S', D) in their ``new`` columns, and the old column of each (B, S'): of a
        compensation token that of the last visual token, and a padded column stays the one it is."""
        alike = self.columns.alike and len(set(step.layout.keeps)) == 1  # pictures may decide how many stay
        if alike and self.columns.rows[0].spans and len(set(extra)) == 1:
            return self._joined(hidden, step, extra[0])
        return self._gathered(hidden, columns, step, new, extra)

    def _joined(self, hidden: torch.Tensor, step: Compressed, extra: bool):
        """:meth:`_moved` where all rows are alike: text and tokens are put one after another."""
        place = torch.arange(hidden.shape[1], device=hidden.device)[None].expand(len(hidden), -1)
        (row, *_), kept = self.columns.rows, step.layout.keeps[0]
        states, sources = [], []
        end = before = passed = 0  # of the columns, the targets and the visual tokens so far
        for (start, n), count in zip(row.spans, kept):
            targets = step.targets[:, before : before + count]
            states += [hidden[:, end:start], step.tokens[:, before : before + count]]
            sources += [place[:, end:start], targets if start == passed else targets + (start - passed)]
            end, before, passed = start + n, before + count, passed + n
        states += [step.tokens[:, before : before + extra], hidden[:, end:]]
        sources += [place[:, end - extra : end], place[:, end:]]
        return torch.cat(states, 1), torch.cat(sources, 1)

    def _gathered(self, hidden, columns, step: Compressed, new: Columns, extra: list[bool]):
        """:meth:`_moved` by a table of where each new column comes from: an old column, or a target."""
        batch, length, width = hidden.shape
        if columns is None:
            columns = on_device(self.columns.visual(), hidden.device)
        slots, plan = step.tokens.shape[1], []
        filled: list[int] = []
        into: list[int] = []
        for b, (row, moved) in enumerate(zip(self.columns.rows, new.rows)):
            origins = [min(column, length - 1) for column in range(new.width)]
            for (begin, end), stop in zip(row.texts(), [*(start for start, _ in moved.spans), moved.end]):
                origins[stop - (end - begin) : stop] = range(begin, end)
            slot = 0
            for start, count in moved.spans:
                origins[start : start + count] = range(length + slot, length + slot + count)
                into += range(b * new.width + start, b * new.width + start + count)
                filled += range(b * slots + slot, b * slots + slot + count)
                slot += count
            if extra[b]:
                origins[moved.last_visual + 1] = row.last_visual
                into.append(b * new.width + moved.last_visual + 1)
                filled.append(b * slots + step.layout.targets)
            plan.append(origins)
        place = torch.arange(length, device=hidden.device)[None].expand(batch, -1)
        pool = torch.cat([place, columns.gather(1, step.targets)], 1)
        places, new_places, slots_of = tables_on_device([plan, [into], [filled]], hidden.device)
        source = pool.gather(1, places)
        new_hidden, tokens = take(hidden, source), step.tokens.reshape(-1, width)
        part = self.step.part
        if part.at == TOWER and self._left.tokens is None or MERGERS[part.merge].drops:
            return new_hidden, source  # the targets are what they were
        if slots_of.numel() < len(tokens):
            tokens = tokens.index_select(0, slots_of[0])
        new_hidden.view(-1, width).index_copy_(0, new_places[0], tokens)
        return new_hidden, source

    def _carry(self, source: torch.Tensor, new: Columns, compensated: list[bool]) -> None:
        """Shorten what is kept per column. A compensation token belongs to no span: later layers treat it as
        text, and nobody predicts it."""
        # None where no row has padding: a mask would keep flash attention and SDPA from their fast kernels.
        self.valid = None
        if new.is_padded:
            rows = [[row.first <= column < row.end for column in range(new.width)] for row in new.rows]
            self.valid = on_device(rows, source.device)
        if self.labels is None:
            return
        self.labels = take(self.labels, source)
        if new.is_padded or any(compensated):
            nobody = [
                [
                    not row.first <= column < row.end or extra and column == row.last_visual + 1
                    for column in range(new.width)
                ]
                for row, extra in zip(new.rows, compensated)
            ]
            self.labels = self.labels.masked_fill(on_device(nobody, source.device), IGNORE_INDEX)

    def _places_in_spans(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, M): the first column of each span and its tokens, as they came in."""
        most = max(len(row.spans) for row in self.columns.rows)
        padded = [[*row.spans, *[(0, 0)] * (most - len(row.spans))] for row in self.columns.rows]
        table = on_device(padded, self._device, torch.long).view(-1, most, 2)
        return table[..., 0], table[..., 1]

    def _members(self) -> torch.Tensor:
        """(B, M, S) bool: which columns belong to each span."""
        most = max(map(len, self.span_lengths), default=0)
        spans = self.spans
        return spans[:, None, :] == torch.arange(1, most + 1, device=spans.device)[:, None]

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
