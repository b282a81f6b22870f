"""What an attached model did over its calls, in figures to read."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..utils.numbers import size


@dataclass(frozen=True)
class Summary:
    """Of the prefills that brought visual tokens since a compression was attached, added up.

    Attributes:
        prefills: calls; a batch is one.
        rows: prompts in them.
        visual_tokens: that the prompts brought.
        average_tokens: visual tokens that a layer saw, averaged over the layers.
        left: visual tokens that the last layer saw.
        flops_ratio: multiply-accumulates of the visual tokens over those of the plain model (§4.1's formula);
            None for a decoder that the formula does not describe.
        cache_bytes: of the KV caches after the prefills; None where no call had one.
        cache_bytes_plain: what they would have held without compression; None likewise.
    """

    prefills: int
    rows: int
    visual_tokens: int
    average_tokens: float
    left: int
    flops_ratio: float | None
    cache_bytes: int | None
    cache_bytes_plain: int | None

    def __str__(self) -> str:
        if not self.prefills:
            return "no prefill with visual tokens yet"
        calls = f"{self.prefills} prefill{'s' if self.prefills > 1 else ''}"
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''}"
        text = (
            f"{calls} of {rows}: {self.visual_tokens} visual tokens became"
            f" {self.left} ({self.average_tokens:.0f} in an average layer)"
        )
        if self.flops_ratio is not None:
            text = f"{text}, {self.flops_ratio:.0%} of their FLOPs"
        if self.cache_bytes is None:
            return text
        return f"{text}; KV cache {size(self.cache_bytes)} instead of {size(self.cache_bytes_plain)}"


def summed(history: Sequence[dict]) -> Summary:
    """The summary of calls' statistics, as ``handle.stats`` gives them."""
    given = sum(sum(one["given"]) for one in history)
    layers = [list(map(sum, one["visual_tokens"])) for one in history]
    counted = all(one["flops"] is not None for one in history)
    spent, plain = (
        sum(sum(one[key]) for one in history) if counted else 0 for key in ("flops", "flops_plain")
    )
    cached = [one for one in history if one["cache"] is not None]
    return Summary(
        prefills=len(history),
        rows=sum(len(one["given"]) for one in history),
        visual_tokens=given,
        average_tokens=sum(sum(one) / len(one) for one in layers),
        left=sum(one[-1] for one in layers),
        flops_ratio=(spent / plain if plain else 1.0) if counted else None,
        cache_bytes=sum(one["cache"]["total"] for one in cached) if cached else None,
        cache_bytes_plain=sum(one["cache_plain"] for one in cached) if cached else None,
    )
