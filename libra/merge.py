"""What becomes of the tokens that are no targets (§3.3 and the baselines).

A merger says for each visual token which output slot it goes to and how much it counts there;
:mod:`libra.compress` does the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .methods import MERGERS
from .ops.dispatch import fused
from .ops.similarity import most_similar
from .ops.spans import Layout, flat_rows, ordinals, take
from .select import Candidates, register

if TYPE_CHECKING:
    from .config import Compression

NOWHERE = -1  # the group of a dropped token


@dataclass(frozen=True)
class Matches:
    """What a merger may look at.

    ``candidates`` the choice was made from; ``eta``, by which importance is divided, None for its mean;
    ``is_target`` (B, N) bool; ``targets`` (B, T), their numbers.
    """

    candidates: Candidates
    eta: float | None
    is_target: torch.Tensor
    targets: torch.Tensor

    @property
    def hidden(self) -> torch.Tensor:
        """(B, N, D)."""
        return self.candidates.hidden

    @property
    def layout(self) -> Layout:
        """Of the spans."""
        return self.candidates.layout

    @cached_property
    def pull(self) -> torch.Tensor:
        """(B, N) float32, α/η."""
        eta = self.candidates.importance_mean if self.eta is None else self.eta
        # Where every α is 0 the quotient is 0/0: equal logits, hence uniform weights.
        return torch.nan_to_num(self.candidates.importance / eta, nan=0.0)

    @property
    def compensation(self) -> int:
        """The slot of the compensation token: the one behind the targets."""
        return self.layout.targets

    @cached_property
    def own_slot(self) -> torch.Tensor:
        """(B, N): the slot of a target, :data:`NOWHERE` for every other token."""
        slots = torch.arange(self.layout.targets, device=self.targets.device).expand_as(self.targets)
        own = torch.full_like(self.is_target, NOWHERE, dtype=torch.long).scatter(1, self.targets, slots)
        return own.masked_fill(~self.is_target, NOWHERE)

    @cached_property
    def nearest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 5: each token's highest cosine similarity to a target of its span, and that target's slot, both
        (B, N).

        Float32; ties go to the first target; a target is nearest to itself, at similarity 1. Only targets ×
        the rest is built, a piece of it at a time.
        """
        layout, hidden = self.layout, self.hidden.detach()
        similarity = torch.ones_like(self.candidates.importance)
        slot = self.own_slot.clamp(min=0)
        rest_count = max((n - t for n, t in zip(layout.lengths, layout.target_counts)), default=0)
        if rest_count == 0:
            return similarity, slot
        rest = ordinals(layout.valid & ~self.is_target, rest_count)
        groups = None
        if not layout.one_span or min(layout.target_counts) != layout.targets:
            span, target_span = (layout.span.gather(1, index) for index in (rest, self.targets))
            groups = span, target_span.masked_fill(~layout.target_valid, -1)
        best, best_slot = most_similar(take(hidden, rest), take(hidden, self.targets), groups)
        # A shorter row's list of non-targets runs on into targets and padding: those keep what they have.
        real = (layout.valid & ~self.is_target).gather(1, rest)
        best = torch.where(real, best, similarity.gather(1, rest))
        best_slot = torch.where(real, best_slot, slot.gather(1, rest))
        return similarity.scatter(1, rest, best), slot.scatter(1, rest, best_slot)


Merger = Callable[[Matches, "Compression"], tuple[torch.Tensor, torch.Tensor]]


def register_merge(name: str) -> Callable[[Merger], Merger]:
    """Make a merger usable as ``merge: name`` in every configuration.

    It returns, both (B, N): the output slot of each token (:data:`NOWHERE`, a target's slot or
    ``matches.compensation``) and the logit of its weight there; weights are the softmax of the logits within
    a slot. That is checked at every use (:func:`check_slots`). Raises ValueError for a name that is taken.
    """
    return register(MERGERS, "merge", name)


def check_slots(name: str, returned, matches: Matches) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots and logits that merger ``name`` returned, if they keep to the contract; this waits for the
    device.

    Raises:
        ValueError: unless both are (B, N), every target is in its own slot, every other token nowhere, in the
            slot of a target of its own span or in the compensation token's, and every logit is finite.
    """
    layout = matches.layout
    shape, own = tuple(layout.valid.shape), matches.own_slot
    pair = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    if not all(isinstance(part, torch.Tensor) and tuple(part.shape) == shape for part in pair):
        raise ValueError(
            f"merge {name} has to return two tensors of {shape}: slots, and the logits of the weights in them"
        )
    slots, logits = pair
    if slots.dtype != torch.long or not logits.is_floating_point():
        raise ValueError(
            f"merge {name} returned {slots.dtype} slots and {logits.dtype} logits; return torch.long and floats"
        )
    of_own_span = (slots >= layout.first_target) & (slots < layout.first_target + layout.span_keeps)
    allowed = of_own_span | (slots == NOWHERE) | (slots == matches.compensation)
    allowed = torch.where(matches.is_target, slots == own, allowed) | ~layout.valid
    for wrong, problem in (
        (
            ~allowed,
            "slot {slot}; a target stays in its own slot, the rest goes to NOWHERE, to a target of its span or to"
            " matches.compensation",
        ),
        (
            layout.valid & (slots != NOWHERE) & ~logits.isfinite(),
            "a weight's logit {logit}; give finite numbers",
        ),
    ):
        if bool(wrong.any()):
            row, token = wrong.nonzero()[0].tolist()
            told = problem.format(slot=int(slots[row, token]), logit=float(logits[row, token]))
            raise ValueError(f"merge {name} gave token {token} of row {row} {told}")
    return slots, logits.float()


@register_merge("drop")
def drop(matches: Matches, c: "Compression"):
    """Pruning: targets stay as they are, the rest is gone (FastV)."""
    return matches.own_slot, torch.zeros_like(matches.candidates.importance)


@register_merge("average")
def average(matches: Matches, c: "Compression"):
    """Every token joins its most similar target; a group's plain mean (Turbo)."""
    return matches.nearest[1], torch.zeros_like(matches.candidates.importance)


@register_merge("igm")
def igm(matches: Matches, c: "Compression"):
    """Importance-informed grouped merging (§3.3): positive tokens join targets, negative ones the
    compensation token."""
    similarity, slot = matches.nearest
    positive = matches.is_target | (similarity > c.tau)
    return torch.where(positive, slot, matches.compensation), matches.pull


@register_merge("igm-pos")
def igm_pos(matches: Matches, c: "Compression"):
    """Table 5: everybody is in the positive set."""
    return matches.nearest[1], matches.pull


@register_merge("igm-neg")
def igm_neg(matches: Matches, c: "Compression"):
    """Table 5: every non-target is in the negative set, like EViT's fused token."""
    return torch.where(matches.is_target, matches.own_slot, matches.compensation), matches.pull


BUILT_IN = frozenset(MERGERS)  # tested here, so they are not checked at every use


@fused
def group_softmax(logits: torch.Tensor, groups: torch.Tensor, slots: int) -> torch.Tensor:
    """Softmax of ``logits`` (B, N) within each of ``slots`` groups; a token whose group is :data:`NOWHERE`
    gets weight 0."""
    index = torch.where(groups == NOWHERE, slots, groups)
    shape = (len(logits), slots + 1)
    top = logits.new_full(shape, -torch.inf).scatter_reduce(1, index, logits, "amax")
    power = (logits - top.gather(1, index)).exp()
    total = logits.new_zeros(shape).scatter_add(1, index, power)
    return (power / total.gather(1, index)).masked_fill(groups == NOWHERE, 0.0)


@fused
def merge_groups(
    hidden: torch.Tensor, groups: torch.Tensor, weights: torch.Tensor, slots: int
) -> torch.Tensor:
    """Eq. 7, V′ = W V, with W given by its one non-zero a column: (B, N, D) to (B, slots, D).

    Summed in float32, and float64 hidden states in float64.
    """
    batch, _, width = hidden.shape
    precise = torch.promote_types(hidden.dtype, torch.float32)
    index = flat_rows(torch.where(groups == NOWHERE, slots, groups), slots + 1)
    merged = hidden.new_zeros((batch * (slots + 1), width), dtype=precise)
    merged = merged.index_add(0, index, (hidden.to(precise) * weights[..., None]).flatten(0, 1))
    return merged.view(batch, slots + 1, width)[:, :slots].to(hidden.dtype)
