"""How many visual tokens each layer sees: as real numbers (the paper's FLOPs) and in whole tokens (a run).

A compression after layer L leaves layers 0..L on the longer sequence; layer L+1 is the first to see the shorter one.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from .config import ROUNDINGS, Compression
from .sentences import ConfigError


@lru_cache(maxsize=1 << 12)
def kept(n: int, ratio: float, rounding: str = "round") -> int:
    """Targets N_t that a span of `n` visual tokens keeps when the fraction `ratio` in [0, 1) is removed (§3.1).

    rounding: "round" (to the nearest whole number, halves to the even one) | "floor" | "ceil", of (1-R)·N without float error.
    At least one token of a span stays; an empty span keeps none. ConfigError for another rounding.
    """
    exact = (1 - _written(ratio, n)) * n
    if rounding == "round":
        whole = round(exact)
    elif rounding == "floor":
        whole = math.floor(exact)
    elif rounding == "ceil":
        whole = math.ceil(exact)
    else:
        raise ConfigError(f"rounding: {rounding} is unknown; use one of {', '.join(ROUNDINGS)}")
    return min(n, max(1, whole))


def _written(ratio: float, n: int) -> Fraction:
    """The fraction that a float was written as, such as 7/10 or 2/3, where it matters for a span of `n` tokens.

    (1-R)·N is whole or half-way between two whole numbers only for an R whose denominator is at most 2·N.
    """
    simple = Fraction(ratio).limit_denominator(max(1, 2 * n))
    return simple if float(simple) == ratio else Fraction(ratio)


def nominal(c: Compression, num_layers: int, n: float) -> list[float]:
    """Visual tokens of each of `num_layers` layers, real-valued: N·(1-R)^k after k compressions (§3.4, as Table 1 counts).

    ConfigError when the compression names a layer that the model does not have.
    """
    c = c.at_depth(num_layers)
    return [n * (1 - c.ratio) ** sum(done < layer for done in c.layers) for layer in range(num_layers)]


def actual(c: Compression, num_layers: int, spans: Sequence[int]) -> list[int]:
    """Visual tokens of each of `num_layers` layers in whole tokens: every span is shortened by itself, then summed.

    spans: lengths of one sample's spans. The compensation tokens are not counted (§3.3: their FLOPs are negligible).
    ConfigError when the compression names a layer that the model does not have.
    """
    c = c.at_depth(num_layers)
    lengths, counts = list(spans), []
    for layer in range(num_layers):
        counts.append(sum(lengths))
        if layer in c.layers:
            lengths = [kept(n, c.ratio, c.rounding) for n in lengths]
    return counts


def average(counts: Sequence[float]) -> float:
    """Visual tokens of an average layer."""
    return sum(counts) / len(counts)
