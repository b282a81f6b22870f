"""One compression of several pictures' tokens, in numbers that are known beforehand. Needs no vLLM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..config import Compression, Step
from ..engine.tokens import context_score
from ..engine.tower import Look, compress_pictures, context_of
from ..ops.spans import Spans
from ..places import BEFORE, TOWER
from ..step import compress_spans


@dataclass(frozen=True)
class Shortened:
    """What is left of one picture of N tokens: tokens (T, D), and places (T,), whole numbers from 0 to N - 1,
    the place of which of the N each takes."""

    tokens: torch.Tensor
    places: torch.Tensor


def shorten(
    c: Compression,
    embeddings: Sequence[torch.Tensor],
    looks: Sequence[Look] | None,
    kept: Sequence[int],
    project: Callable[[torch.Tensor], torch.Tensor],
) -> list[Shortened]:
    """The tokens that take each picture's place.

    Args:
        c: what to do, at the tower or the input; its budget is not looked at. Its positions say where a token
            stands: "original", "compact", or "centre", the whole number nearest to the middle of its
            interval, of two the later.
        embeddings: (N, D) of each picture, as the language model gets them.
        looks: what the tower says of each; None where the method asks nothing of it.
        kept: how many tokens of each are kept; of a picture that keeps all of them nothing changes.
        project: the model's own projector, from features (T, C) to embeddings (T, D).
    """
    found = [Shortened(one, torch.arange(len(one), device=one.device)) for one in embeddings]
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (one, count) in enumerate(zip(embeddings, kept, strict=True)):
        if count < len(one):
            alike.setdefault((len(one), count), []).append(i)
    for (n, count), members in alike.items():
        seen = None if looks is None else [looks[i] for i in members]
        own = replace(c, keep=count, ratio=None)
        if c.at == TOWER:
            results = _in_tower(own, seen, project)
        else:
            results = _at_input(own, [embeddings[i] for i in members], seen, n, count)
        for i, result in zip(members, results, strict=True):
            found[i] = result
    return found


def _in_tower(c: Compression, looks: Sequence[Look], project) -> list[Shortened]:
    lefts = compress_pictures(Step(BEFORE, c, 1), looks)
    return [
        Shortened(project(left.tokens), _places(left.columns, len(look), c.positions))
        for left, look in zip(lefts, looks)
    ]


def _at_input(c: Compression, embeddings, looks, n: int, count: int) -> list[Shortened]:
    hidden = torch.stack(list(embeddings))
    context = context_of([[one] for one in looks] if looks is not None else [])
    layout = Spans.build([[n]] * len(hidden), [[count]] * len(hidden), hidden.device)
    step = compress_spans(hidden, context_score(c, context, hidden), c, layout, context=context)
    found = []
    for tokens, targets in zip(step.tokens, step.targets):
        places = _places(targets, n, c.positions)
        if c.reserves:  # the compensation token stands where the last visual token does, or after the others
            last = count if c.positions == "compact" else n - 1
            places = torch.cat([places, places.new_tensor([last])])
        found.append(Shortened(tokens, places))
    return found


def _places(targets: torch.Tensor, n: int, positions: str) -> torch.Tensor:
    number = torch.arange(len(targets), device=targets.device)
    if positions == "compact":
        return number
    if positions == "centre":
        return (2 * number + 1) * n // (2 * len(targets))  # of two that are as near, the later
    return targets


def width(n: int, columns: int, positions: str) -> int:
    """How many positions a picture of ``n`` tokens takes that has so many columns."""
    return columns if positions == "compact" else n
