"""One compression step: choose targets, treat the rest. Tensor maths on visual tokens, without a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch

from . import budget, ops
from .config import TOWER_SCORE, Compression
from .merge import MERGERS, Matches, OfRest, check_slots
from .methods import Context
from .ops import NOWHERE
from .ops.spans import Spans, on_device
from .select import SELECTORS, Candidates, check_targets, tower_score
from .utils.once import once
from .utils.ranges import profiled


@dataclass(frozen=True)
class Fates:
    """Where the tokens of B rows went, for whoever asks.

    Attributes:
        layout: their spans.
        slot: (B, M), the output slot of each; NOWHERE for one that was dropped or is not there.
        weights: (B, M) float32, its weight there.
        order: (B, M), which tokens they are, the targets first; None: all N, one after another.
        similarity: (B, M) or, with ``order``, (B, R) of those that are no targets; None where nobody asked.
    """

    layout: Spans
    slot: torch.Tensor
    weights: torch.Tensor
    order: torch.Tensor | None = None
    similarity: torch.Tensor | None = None

    def placed(self, values: torch.Tensor, nothing: float) -> torch.Tensor:
        """(B, N) of ``values`` (B, M), with ``nothing`` for tokens that have none."""
        if self.order is None:
            return values
        columns = self.layout.tokens
        index = self.order.masked_fill(self.slot == NOWHERE, columns)  # a column more, for what is not there
        whole = values.new_full((len(values), columns + 1), nothing)
        return whole.scatter(1, index, values)[:, :columns]

    def all_similarities(self) -> torch.Tensor | None:
        """(B, N); 1 for targets, which are like themselves."""
        if self.similarity is None or self.order is None:
            return self.similarity
        of_targets = self.similarity.new_ones(len(self.slot), self.layout.targets)
        return self.placed(torch.cat([of_targets, self.similarity], 1), 1.0)

    def padded(self, count: int) -> "Fates":
        """For tokens that are ``count`` more, padding."""
        pad, similarity = torch.nn.functional.pad, self.all_similarities()
        return Fates(
            self.layout,
            pad(self.placed(self.slot, NOWHERE), (0, count), value=NOWHERE),
            pad(self.placed(self.weights, 0.0), (0, count)),
            similarity=None if similarity is None else pad(similarity, (0, count)),
        )


@dataclass(frozen=True)
class Compressed:
    """The outcome of one compression step on a batch of B rows of at most N visual tokens, D wide.

    Attributes:
        tokens: (B, T, D), or (B, T + 1, D) where a row has a compensation token, which is the last slot.
        targets: (B, T), the numbers of the target tokens, ascending.
        importance: (B, N) float32, the α the choice was made by; 0 for padding.
        layout: the spans that went in and the targets kept of each.
        fates: where the tokens went.
        has_compensation: which rows have a compensation token, (B,) bool or, where it is known beforehand, a
            list; None where the merge makes none.
        order: (B, T), the place of each slot among the row's tokens, where a released code that is reproduced
            orders them otherwise; None: as they are.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    importance: torch.Tensor
    layout: Spans
    fates: Fates
    has_compensation: torch.Tensor | list[bool] | None = None
    order: torch.Tensor | None = None

    @once
    def groups(self) -> torch.Tensor:
        """(B, N), the slot that each visual token went to; -1 if it was dropped or is padding."""
        return self.fates.placed(self.fates.slot, NOWHERE)

    @once
    def token_weights(self) -> torch.Tensor:
        """(B, N) float32, each token's weight in its slot."""
        return self.fates.placed(self.fates.weights, 0.0)

    @once
    def similarity(self) -> torch.Tensor | None:
        """(B, N) float32, s^max of eq. 5; None where the merge does not ask for it."""
        return self.fates.all_similarities()

    @once
    def mask(self) -> torch.Tensor:
        """(B, T[+1]) bool, False in the slots that a row does not fill."""
        mask = self.layout.target_valid
        if self.has_compensation is None:
            return mask
        has_one = self.has_compensation
        if isinstance(has_one, list):
            has_one = on_device(has_one, mask.device)
        return torch.cat([mask, has_one[:, None]], 1)

    @once
    def compensated(self) -> list[bool]:
        """For each row, whether it has a compensation token; where it is not known beforehand, asking waits
        for the device."""
        if self.has_compensation is None:
            return [False] * len(self.tokens)
        if isinstance(self.has_compensation, list):
            return self.has_compensation
        return self.has_compensation.tolist()

    def trimmed(self) -> "Compressed":
        """Without the compensation tokens' slot where no row fills it."""
        if self.has_compensation is None or any(self.compensated):
            return self
        return replace(self, tokens=self.tokens[:, : self.layout.targets], has_compensation=None)

    @property
    def weights(self) -> torch.Tensor:
        """The importance-informed merging matrix W of eq. 7, dense: (B, T[+1], N); its last row is the
        compensation token's."""
        slots = torch.arange(self.tokens.shape[1], device=self.groups.device)
        return (self.groups[:, None, :] == slots[None, :, None]) * self.token_weights[:, None, :]


def compress_spans(
    hidden: torch.Tensor,
    importance: torch.Tensor,
    c: Compression,
    spans: Spans,
    score_rows: torch.Tensor | None = None,
    row_seeds: torch.Tensor | None = None,
    context: Context | None = None,
) -> Compressed:
    """:func:`compress` for ready :class:`~libra.ops.spans.Spans`, without waiting for the device.

    The outcome is not trimmed: where the merge may make compensation tokens, all rows have a slot for one.

    Args:
        hidden, importance, c, context: as of :func:`compress`; importance is not looked at in padding.
        score_rows: (B, N), which of its row's attention rows scored a token; None where there is one a row.
        row_seeds: (B,) integers that pseudo-random selection draws from; None for zeros.
    """
    select, merge = SELECTORS[c.select], MERGERS[c.merge]
    with profiled("libra.select"):
        importance = importance.detach().float()
        if not spans.uniform:
            importance = importance.masked_fill(spans.padding, 0.0)
        candidates = Candidates(hidden, importance, spans, score_rows, row_seeds, context or Context())
        is_target = select.function(candidates, c)
        if not select.trusted:
            is_target = check_targets(c.select, is_target, spans)
        matches = Matches(candidates, None if isinstance(c.eta, str) else c.eta, is_target)
    with profiled("libra.similarity"):
        said = merge.function(matches, c)
        if not merge.trusted:
            said = check_slots(c.merge, said, matches)
    with profiled("libra.merge"):
        if merge.drops:
            tokens, fates, has_one = _dropped(matches)
        elif isinstance(said, OfRest):
            tokens, fates, has_one = _merged_rest(matches, said, c)
        else:
            tokens, fates, has_one = _merged(matches, said, c)
    order = candidates.memo.get("order")
    return Compressed(tokens, matches.targets, importance, spans, fates, has_one, order)


def _dropped(matches: Matches):
    """The targets as they are."""
    spans, targets = matches.layout, matches.targets
    own = spans.target_slots
    fates = Fates(spans, own, own.new_ones(own.shape, dtype=torch.float32), targets)
    return ops.take(matches.hidden, targets), fates, None


def _merged_rest(matches: Matches, said: OfRest, c: Compression):
    """What a merger said of the tokens that are no targets, done to all in their order."""
    spans, order = matches.layout, matches.order
    eta = matches.divisor if said.pulls else math.inf
    has_one: torch.Tensor | list[bool] | None
    slot, logits, has_one = ops.slots_and_logits(
        matches.candidates.importance, eta, order, spans, said.closest, said.tau, said.lowest
    )
    if not (MERGERS[c.merge].compensates and any(spans.rest_counts)):
        has_one = None
    elif has_one is None:
        has_one = [count > 0 for count in spans.rest_counts]
    slots, whole = spans.targets + (has_one is not None), spans.uniform
    weights = ops.group_softmax(logits, slot, slots, whole)
    tokens = ops.merge_groups(matches.precise, slot, weights, slots, whole).to(matches.hidden.dtype)
    similarity = None if said.closest is None else said.closest[0]
    return tokens, Fates(spans, slot, weights, order, similarity), has_one


def _merged(matches: Matches, said, c: Compression):
    """What a merger said of every token: slots and logits, or weights."""
    merge, spans = MERGERS[c.merge], matches.layout
    slot, logits = said
    if c.reserves and any(spans.rest_counts):
        slot = slot.masked_fill(matches.least_similar, matches.compensation)
    slot = slot.masked_fill(~spans.valid, NOWHERE)
    weights = logits if merge.gives_weights else ops.group_softmax(logits, slot, spans.targets + 1)
    has_one: torch.Tensor | list[bool] | None = None
    if merge.compensates and any(spans.rest_counts):
        has_one = (slot == matches.compensation).any(1)
        if c.reserves:
            has_one = [count > 0 for count in spans.rest_counts]
    if merge.gives_tokens:
        tokens = matches.candidates.memo["tokens"]
    else:
        tokens = ops.merge_groups(matches.hidden, slot, weights, spans.targets + (has_one is not None))
    similarity = vars(matches).get("nearest", (None,))[0]
    return tokens, Fates(spans, slot, weights, similarity=similarity), has_one


def compress(
    hidden: torch.Tensor,
    importance: torch.Tensor | None,
    c: Compression,
    lengths: torch.Tensor | Sequence[int] | None = None,
    spans: Sequence[Sequence[int]] | None = None,
    context: Context | None = None,
) -> Compressed:
    """Choose target tokens and treat the rest, as one compression of §3 does.

    Args:
        hidden: (B, N, D) hidden states of the visual tokens, rows padded on the right.
        importance: (B, N) attention α of the score row on them (eq. 4); no gradient flows through it. None
            for methods that read no α, and for ``importance: tower``, which takes the context's.
        c: what to do; ``c.layers`` is not looked at.
        lengths: (B,) visual tokens of each row; all N where None.
        spans: for each row the lengths of its contiguous runs of visual tokens; they sum to its length. One
            run where None.
        context: what the vision tower, the question and the picture say about the tokens.

    Raises:
        ValueError: if shapes, lengths and spans do not agree, there is no row or a row without visual tokens,
            hidden states are not floating-point numbers, anything but padding is NaN or infinite, the context
            lacks what the method needs, or ``c`` is vanilla, which does nothing.
    """
    if not isinstance(c, Compression) or not c.acts:
        raise ValueError(
            "libra.compress needs a libra.Compression that compresses, such as Compression(method='libra')"
        )
    if c.steps is not None:
        raise ValueError("libra.compress does one step; give it one of the compression's steps after another")
    context = context or Context()
    if isinstance(hidden, torch.Tensor) and hidden.ndim == 3:
        context.check_rows(len(hidden))
        context = context.cut(hidden.shape[1])
    if missing := context.missing([need for need in c.needs if importance is None or need != TOWER_SCORE]):
        what = missing.replace("|", " or ")
        raise ValueError(f"{c.name} needs {what}: give context=libra.Context({missing.split('|')[0]}=…)")
    if importance is None and c.importance == "tower":
        importance = tower_score(context)
    elif importance is None and c.reads_importance:
        raise ValueError(
            f"{c.name} reads the importance of the visual tokens; give it as the second argument"
        )
    if importance is None and isinstance(hidden, torch.Tensor):
        importance = hidden.new_zeros(hidden.shape[:2])
    _check_tensors(hidden, importance)
    lengths_of = _spans(hidden, lengths, spans)
    kept = _own_counts(c, context, lengths_of) if c.adaptive else budget.keeps(lengths_of, c)
    layout = Spans.build(lengths_of, kept, hidden.device)
    for name, finite in (("hidden", hidden.isfinite().all(-1)), ("importance", importance.isfinite())):
        if not bool((finite[:, : layout.tokens] | ~layout.valid).all()):
            raise ValueError(f"{name} has NaN or infinite numbers; correct the numbers that come in")
    longest, count = layout.tokens, hidden.shape[1]
    given = hidden[:, :longest], importance[:, :longest]
    step = compress_spans(*given, c, layout, context=context.cut(longest)).trimmed()
    return step if longest == count else _padded(step, count - longest)


def _own_counts(c: Compression, context: Context, lengths: list[list[int]]) -> list[list[int]]:
    """How many tokens of each span the method itself keeps."""
    count, found = SELECTORS[c.select].own_count, []
    for scores, row in zip(context.tower_next, lengths):
        found.append([count(part) for part in scores[: sum(row)].split(row)])
    return found


def _padded(step: Compressed, count: int) -> Compressed:
    """What is returned per token is as long as what came in: ``count`` columns longer."""
    importance = torch.nn.functional.pad(step.importance, (0, count))
    return replace(step, fates=step.fates.padded(count), importance=importance)


def _check_tensors(hidden, importance) -> None:
    """Raises ValueError unless they are (B, N, D) and (B, N), with numbers that can be merged and
    compared."""
    if not isinstance(hidden, torch.Tensor) or not isinstance(importance, torch.Tensor):
        raise ValueError(
            f"hidden and importance must be tensors, not {type(hidden).__name__} and"
            f" {type(importance).__name__}"
        )
    if hidden.ndim != 3 or importance.shape != hidden.shape[:2] or not hidden.numel():
        raise ValueError(
            "hidden must be (B, N, D) and importance (B, N), none of them 0, but they are "
            f"{tuple(hidden.shape)} and {tuple(importance.shape)}"
        )
    if not hidden.is_floating_point() or importance.is_complex():
        kinds = f"{hidden.dtype} and {importance.dtype}"
        raise ValueError(
            f"hidden must be floating-point numbers and importance real ones, but they are {kinds}"
        )


def _spans(hidden: torch.Tensor, lengths, spans) -> list[list[int]]:
    """The lengths of each row's spans. Raises ValueError where they do not describe ``hidden``."""
    batch, count, _ = hidden.shape
    if isinstance(lengths, torch.Tensor):
        lengths = lengths.tolist()
    try:
        spans = None if spans is None else [list(row) for row in spans]
        if lengths is None:
            lengths = [count] * batch if spans is None else [sum(row) for row in spans]
        spans = [[n] for n in lengths] if spans is None else spans
        agree = len(lengths) == len(spans) == batch and [sum(row) for row in spans] == list(lengths)
    except TypeError:
        agree = False
    if not agree:
        raise ValueError(
            f"lengths and spans must describe {batch} rows and agree, but they are {lengths} and {spans}"
        )
    whole = all(isinstance(n, Integral) and int(n) >= 1 for row in spans for n in row)
    if not whole or min(lengths) < 1 or max(lengths) > count:
        raise ValueError(
            f"every row needs 1 to {count} visual tokens and no empty span, but the spans are {spans}"
        )
    return [[int(n) for n in row] for row in spans]
