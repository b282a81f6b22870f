"""What becomes of the tokens that are not targets: what a merger is given, and what several methods share
(§3.3).

A merger says for each visual token which output slot it goes to and how much it counts there;
:mod:`libra.step` does the rest. Nothing here imports torch before it is used.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import ops
from .methods import MERGERS, register_merge
from .ops import NOWHERE
from .select import Candidates
from .utils.once import once

if TYPE_CHECKING:
    import torch

    from .config import Compression
    from .ops.spans import Spans

__all__ = ["MERGERS", "NOWHERE", "Matches", "check_slots", "register_merge"]


@dataclass(frozen=True)
class Matches:
    """What a merger may look at.

    candidates: what the choice was made from; eta: what importance is divided by, None for its mean;
    is_target: (B, N) bool.
    """

    candidates: Candidates
    eta: float | None
    is_target: "torch.Tensor"

    @property
    def targets(self) -> "torch.Tensor":
        """(B, T): the numbers of the targets, ascending."""
        return self.order[:, : self.layout.targets]

    @property
    def hidden(self) -> "torch.Tensor":
        """(B, N, D)."""
        return self.candidates.hidden

    @property
    def layout(self) -> "Spans":
        """The spans of the rows and the targets that each keeps."""
        return self.candidates.layout

    @property
    def divisor(self) -> "torch.Tensor | float":
        """η: (B, N), (B, 1) or a number."""
        return self.candidates.importance_mean if self.eta is None else self.eta

    @once
    def pull(self) -> "torch.Tensor":
        """(B, N) float32, α/η."""
        return ops.pull(self.candidates.importance, self.divisor)

    @property
    def compensation(self) -> int:
        """The slot of the compensation token: the one after the targets."""
        return self.layout.targets

    @once
    def own_slot(self) -> "torch.Tensor":
        """(B, N): the slot of a target, :data:`NOWHERE` for every other token."""
        slots = self.layout.target_index.expand_as(self.targets)
        own = self.targets.new_full(self.is_target.shape, NOWHERE).scatter(1, self.targets, slots)
        return own.masked_fill(~self.is_target, NOWHERE)

    @once
    def order(self) -> "torch.Tensor":
        """(B, T + R): the tokens of each row, targets first and then the others, which
        :attr:`~libra.ops.spans.Spans.rest_missing` does not name."""
        return self.layout.arranged(self.is_target)

    @property
    def rest(self) -> "torch.Tensor":
        """(B, R): the tokens that are not targets."""
        return self.order[:, self.layout.targets :]

    @once
    def ordered(self) -> "torch.Tensor":
        """(B, T + R, D): the hidden states in that :attr:`order`, a copy."""
        return ops.take(self.hidden, self.order)

    @once
    def precise(self) -> "torch.Tensor":
        """:attr:`ordered` as the torch definitions compute with it, at least float32; kernels convert what
        they read."""
        import torch

        from .ops.dispatch import runs_kernels

        as_is = runs_kernels(self.hidden) or self.hidden.dtype == torch.float64
        return self.ordered if as_is else self.ordered.float()

    @once
    def closest(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        """:attr:`nearest` of only the :attr:`rest`, both (B, R)."""
        from .ops.dispatch import runs_kernels

        spans, tokens, targets = self.layout, self.ordered.detach(), self.layout.targets
        lengths = floats = None
        if not runs_kernels(tokens):  # they measure what they read
            precise = self.precise.detach()
            floats, measured = (precise[:, targets:], precise[:, :targets]), ops.lengths_of(precise)
            lengths = measured[:, targets:], measured[:, :targets]
        pair = None
        if not spans.one_span or min(spans.target_counts) != spans.targets:
            pair = spans.span.gather(1, self.rest), spans.target_span
        others = tokens[:, :targets]
        return ops.most_similar(tokens[:, targets:], others, pair, lengths=lengths, floats=floats)

    @property
    def lowest(self) -> "torch.Tensor":
        """(B, 1): which of the :attr:`rest` has the lowest similarity, the first of several."""
        similarity, missing = self.closest[0], self.layout.rest_missing
        if missing is not None:
            similarity = similarity.masked_fill(missing, float("inf"))
        return similarity.argmin(1, keepdim=True)

    @property
    def least_similar(self) -> "torch.Tensor":
        """(B, N) bool: True at that token; nowhere in a row of targets only."""
        import torch

        found = torch.zeros_like(self.is_target).scatter(1, self.rest.gather(1, self.lowest), True)
        return found & self.layout.valid & ~self.is_target

    @once
    def nearest(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Eq. 5: each token's highest cosine similarity to a target of its span, and that target's slot, both
        (B, N).

        Float32; ties go to the first target; a target is nearest to itself, at similarity 1. Only targets are
        compared with the rest, a piece of them at a time.
        """
        similarity = self.candidates.importance.new_ones(self.is_target.shape)
        slot = self.own_slot.clamp(min=0)
        if not any(self.layout.rest_counts):
            return similarity, slot
        return self.placed(similarity, self.closest[0]), self.placed(slot, self.closest[1])

    def placed(self, values: "torch.Tensor", of_rest: "torch.Tensor") -> "torch.Tensor":
        """``values`` (B, N) with those (B, R) of the :attr:`rest` in their places."""
        import torch

        missing, columns = self.layout.rest_missing, self.layout.tokens
        if missing is None:
            return values.scatter(1, self.rest, of_rest)
        index = self.rest.masked_fill(missing, columns)  # a column more takes what is not there
        return torch.nn.functional.pad(values, (0, 1)).scatter(1, index, of_rest)[:, :columns]


@dataclass(frozen=True)
class OfRest:
    """What a merger of this module says: only of the tokens that are not targets.

    closest: the similarity and the slot of each, both (B, R); None: all go to the compensation token. tau:
    those at most so similar go there nevertheless; lowest: (B, 1), one that goes there in any case; pulls:
    whether weights come from importance (:attr:`Matches.pull`), otherwise they are equal.
    """

    closest: "tuple[torch.Tensor, torch.Tensor] | None"
    tau: float | None = None
    lowest: "torch.Tensor | None" = None
    pulls: bool = True


def check_slots(name: str, returned, matches: Matches) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The slots and logits that merger ``name`` returned, if they keep to the contract; this waits for the
    device.

    Raises:
        ValueError: unless both are (B, N), every target is in its own slot, every other token nowhere, in the
            slot of a target of its own span or in the compensation token's, and every logit is finite.
    """
    import torch

    spans = matches.layout
    shape = tuple(spans.valid.shape)
    pair = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    if not all(isinstance(part, torch.Tensor) and tuple(part.shape) == shape for part in pair):
        raise ValueError(
            f"merge {name} has to return two tensors of {shape}: slots, and the logits of the weights in them"
        )
    slots, logits = pair
    if slots.dtype != torch.long or not logits.is_floating_point():
        raise ValueError(
            f"merge {name} returned {slots.dtype} slots and {logits.dtype} logits; return torch.long and"
            " floats"
        )
    of_own_span = (slots >= spans.first_target) & (slots < spans.first_target + spans.span_keeps)
    allowed = of_own_span | (slots == NOWHERE) | (slots == matches.compensation)
    allowed = torch.where(matches.is_target, slots == matches.own_slot, allowed) | ~spans.valid
    if not bool(allowed.all()):
        row, token = (~allowed).nonzero()[0].tolist()
        raise ValueError(
            f"merge {name} gave token {token} of row {row} slot {int(slots[row, token])}; a target stays in "
            "its own slot, the rest goes to NOWHERE, to a target of its span or to matches.compensation"
        )
    wrong = spans.valid & (slots != NOWHERE) & ~logits.isfinite()
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"merge {name} gave token {token} of row {row} a weight's logit {float(logits[row, token])}; "
            "give finite numbers"
        )
    return slots, logits.float()


@register_merge("drop", drops=True, reads=(), trusted=True)
def drop(matches: Matches, c: "Compression"):
    """Pruning: targets stay as they are, the rest is gone (FastV), so there is nothing to say of it."""
    return None


@register_merge("average", compensates=False, reads=("hidden",), trusted=True)
def average(matches: Matches, c: "Compression"):
    """Every token joins its most similar target, as a plain mean of the group (Turbo)."""
    return OfRest(matches.closest, pulls=False)


@register_merge("igm", reads=("hidden", "importance", "tau", "eta"), trusted=True)
def igm(matches: Matches, c: "Compression"):
    """Importance-informed grouped merging (§3.3): tokens more similar than τ join their target, the others
    the compensation token."""
    reserves = c.reserves and any(matches.layout.rest_counts)
    return OfRest(matches.closest, c.tau, matches.lowest if reserves else None)


@register_merge("igm-pos", compensates=False, reads=("hidden", "importance", "eta"), trusted=True)
def igm_pos(matches: Matches, c: "Compression"):
    """Table 5: all tokens are in the positive set."""
    return OfRest(matches.closest)


@register_merge("igm-neg", reads=("importance", "eta"), trusted=True)
def igm_neg(matches: Matches, c: "Compression"):
    """Table 5: every non-target is in the negative set, like EViT's fused token."""
    return OfRest(None)
