"""How many visual tokens each layer sees: as real numbers (the paper's FLOPs) and in whole tokens (a run).

A compression after layer L leaves layers 0..L on the longer sequence; layer L+1 is the first to see the
shorter one.
"""

from collections.abc import Sequence

from .config import ROUNDINGS, Compression
from .utils.sentences import ConfigError, show


def kept(n: int, ratio: float, rounding: str = "round") -> int:
    """Targets N_t that a span of `n` visual tokens keeps when the fraction `ratio` in [0, 1) is removed
    (§3.1).

    rounding: "round" (to the nearest whole number, halves to the even one) | "floor" | "ceil", of (1-R)·N
    without float error. At least one token of a span stays; an empty span keeps none. ConfigError for another
    rounding.
    """
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding: {show(rounding)} is unknown; use one of {', '.join(ROUNDINGS)}")
    top, bottom = _fraction_left(n, ratio)
    whole, rest = divmod(top * n, bottom)
    if rounding == "ceil":
        whole += rest > 0
    elif rounding == "round":
        whole += 2 * rest > bottom or 2 * rest == bottom and whole % 2
    return min(n, max(1, whole))


def _fraction_left(n: int, ratio: float) -> tuple[int, int]:
    """1-R as a fraction of whole numbers: that of the decimal or fraction which the float R was written as,
    where it matters.

    It matters where (1-R)·N is whole or half-way between two whole numbers; R is then a fraction over 2·N.
    """
    halves = round(2 * (1 - ratio) * n)
    if n and (2 * n - halves) / (2 * n) == ratio:
        return halves, 2 * n
    top, bottom = float(ratio).as_integer_ratio()
    return bottom - top, bottom


def keeps(spans: Sequence[Sequence[int]], c: Compression, left: int = 1) -> list[list[int]]:
    """Targets of each span of each row, for B lists of span lengths.

    left: how many compressions are still to come, this one included; `keep` is reached with the last of them.
    """
    return [[_kept_of_span(n, c, left) for n in row] for row in spans]


def _kept_of_span(n: int, c: Compression, left: int) -> int:
    if c.keep is None:
        return kept(n, c.ratio, c.rounding)
    if left == 1 or n <= c.keep:
        return min(n, c.keep)
    return max(c.keep, kept(n, 1 - (c.keep / n) ** (1 / left), c.rounding))  # equal ratios at each step


def nominal(c: Compression, num_layers: int, n: float) -> list[float]:
    """Visual tokens of each of `num_layers` layers, real-valued: N·(1-R)^k after k compressions (§3.4, as
    Table 1 counts), where `keep` stands for the ratio that leaves so many after the last one.

    ConfigError when the compression names a layer that the model does not have.
    """
    stages = c.stages(num_layers)
    share = 1 - c.ratio if c.keep is None else min(1, c.keep / n) ** (1 / max(1, len(stages)))
    return [n * share ** sum(done < layer for done in stages) for layer in range(num_layers)]


def actual(c: Compression, num_layers: int, spans: Sequence[int]) -> list[int]:
    """Visual tokens of each of `num_layers` layers in whole tokens: every span is shortened by itself, then
    summed.

    spans: lengths of one sample's spans. The compensation tokens are not counted (§3.3: their FLOPs are
    negligible). ConfigError when the compression names a layer that the model does not have.
    """
    stages = c.stages(num_layers)
    lengths, counts = list(spans), []
    for layer in range(num_layers):
        for done, stage in enumerate(stages):
            if stage == layer - 1:
                [lengths] = keeps([lengths], c, len(stages) - done)
        counts.append(sum(lengths))
    return counts


def average(counts: Sequence[float]) -> float:
    """Visual tokens of an average layer."""
    return sum(counts) / len(counts)
