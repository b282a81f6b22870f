"""One compression step: choose targets, treat the rest. Tensor maths on visual tokens, without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch.profiler import record_function

from . import budget
from .config import TOWER_SCORE, Compression
from .merge import MERGERS, Matches, check_slots
from .methods import Context
from .ops import NOWHERE
from .ops.reference import group_softmax, merge_groups, ordinals, take
from .ops.spans import Spans, on_device
from .select import SELECTORS, Candidates, check_targets, tower_score


@dataclass(frozen=True)
class Compressed:
    """The outcome of one compression step on a batch of B rows of at most N visual tokens, D wide.

    Attributes:
        tokens: (B, T, D), or (B, T + 1, D) where a row has a compensation token, which is the last slot.
        mask: (B, T[+1]) bool, False in the slots that a row does not fill.
        targets: (B, T), the numbers of the target tokens, ascending.
        groups: (B, N), the slot that each visual token went to; -1 if it was dropped or is padding.
        token_weights: (B, N) float32, each token's weight in its slot.
        importance: (B, N) float32, the α the choice was made by; 0 for padding.
        similarity: (B, N) float32, s^max of eq. 5; None where the merge does not ask for it.
        layout: the spans that went in and the targets kept of each.
        has_compensation: (B,) bool, which rows have a compensation token; None where the merge makes none.
        reserved: the same where it is known beforehand, on the host; otherwise None.
        order: (B, T), the place of each slot among the row's tokens, where a released code that is reproduced
            orders them otherwise; None: as they are.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    groups: torch.Tensor
    token_weights: torch.Tensor
    importance: torch.Tensor
    similarity: torch.Tensor | None
    layout: Spans
    has_compensation: torch.Tensor | None
    order: torch.Tensor | None = None
    reserved: list[bool] | None = None

    @cached_property
    def compensated(self) -> list[bool]:
        """For each row, whether it has a compensation token; asking waits for the device, unless reserved."""
        if self.reserved is not None and self.has_compensation is not None:
            return self.reserved
        return [False] * len(self.tokens) if self.has_compensation is None else self.has_compensation.tolist()

    def trimmed(self) -> "Compressed":
        """Without the compensation tokens' slot where no row fills it."""
        if self.has_compensation is None or any(self.compensated):
            return self
        slots = self.layout.targets
        return replace(self, tokens=self.tokens[:, :slots], mask=self.mask[:, :slots], has_compensation=None)

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
    with record_function("libra.select"):
        importance = importance.detach().float().masked_fill(~spans.valid, 0.0)
        candidates = Candidates(hidden, importance, spans, score_rows, row_seeds, context or Context())
        is_target = select.function(candidates, c)
        if not select.trusted:
            is_target = check_targets(c.select, is_target, spans)
        targets = ordinals(is_target, spans.targets)
    matches = Matches(candidates, None if isinstance(c.eta, str) else c.eta, is_target, targets)
    with record_function("libra.similarity"):
        returned = merge.function(matches, c)
        slot, logits = returned if merge.trusted else check_slots(c.merge, returned, matches)
        if c.reserves and not merge.trusted:
            slot = slot.masked_fill(matches.least_similar, matches.compensation)
    with record_function("libra.merge"):
        slot = slot.masked_fill(~spans.valid, NOWHERE)
        mask, slots, has_one, reserved = spans.target_valid, spans.targets, None, None
        if merge.drops:
            token_weights, tokens = is_target.float(), take(hidden, targets)
        else:
            token_weights = logits if merge.gives_weights else group_softmax(logits, slot, slots + 1)
            if merge.compensates and spans.target_counts != spans.lengths:
                if c.reserves:
                    reserved = [n > kept for n, kept in zip(spans.lengths, spans.target_counts)]
                    has_one = on_device(reserved, hidden.device)
                else:
                    has_one = (slot == matches.compensation).any(1)
                mask, slots = torch.cat([mask, has_one[:, None]], 1), slots + 1
            if merge.gives_tokens:
                tokens = candidates.memo["tokens"]
            else:
                tokens = merge_groups(hidden, slot, token_weights, slots)
    # A cached property: it is there if the merger used it.
    similarity = matches.nearest[0] if "nearest" in vars(matches) else None
    order = candidates.memo.get("order")
    return Compressed(
        tokens, mask, targets, slot, token_weights, importance, similarity, spans, has_one, order, reserved
    )


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
    context = context or Context()
    if isinstance(hidden, torch.Tensor) and hidden.ndim == 3:
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
    layout = Spans.build(lengths_of, budget.keeps(lengths_of, c), hidden.device)
    for name, finite in (("hidden", hidden.isfinite().all(-1)), ("importance", importance.isfinite())):
        if not bool((finite[:, : layout.tokens] | ~layout.valid).all()):
            raise ValueError(f"{name} has NaN or infinite numbers; correct the numbers that come in")
    longest, count = layout.tokens, hidden.shape[1]
    given = hidden[:, :longest], importance[:, :longest]
    step = compress_spans(*given, c, layout, context=context.cut(longest)).trimmed()
    return step if longest == count else _padded(step, count - longest)


def _padded(step: Compressed, count: int) -> Compressed:
    """What is returned per token is as long as what came in: ``count`` columns longer."""
    groups = torch.nn.functional.pad(step.groups, (0, count), value=NOWHERE)
    names = ("token_weights", "importance", "similarity")
    padded: dict[str, Any] = {
        name: torch.nn.functional.pad(value, (0, count))
        for name in names
        if (value := getattr(step, name)) is not None
    }
    return replace(step, groups=groups, **padded)


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
