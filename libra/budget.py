"""How many visual tokens each layer sees: as real numbers (the paper's FLOPs) and in whole tokens (a run).

A compression after layer L leaves layers 0..L on the longer sequence; layer L+1 is the first to see the
shorter one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from .config import ROUNDINGS, Compression
from .utils.sentences import ConfigError, show

UNKNOWN = (
    "keep: adaptive lets each picture decide how many tokens are kept, so nothing can be counted beforehand"
)
LARGEST_RATIO = 0.99  # what a budget may lead to; more would leave next to nothing


class Sizes(Protocol):
    """The sizes of a decoder, as :class:`libra.rows.ModelSpec` has them."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def kv_size(self) -> int: ...


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

    left: how many compressions are still to come, this one included; `keep` is reached with the last of them,
    and of several ratios the left-th from the end counts. ConfigError where the budget is one of a whole
    model.
    """
    if c.ratio is None and c.keep is None:
        raise ConfigError(
            f"{c.amount.replace(' ', ': ', 1)} is a budget of a whole model; give ratio or keep here"
        )
    return [[_kept_of_span(n, c, left) for n in row] for row in spans]


def _kept_of_span(n: int, c: Compression, left: int) -> int:
    if isinstance(c.keep, str):
        raise ConfigError(UNKNOWN)
    if c.keep is None:
        return kept(n, c.ratio[-left] if isinstance(c.ratio, tuple) else c.ratio, c.rounding)
    if left == 1 or n <= c.keep:
        return min(n, c.keep)
    return max(c.keep, kept(n, 1 - (c.keep / n) ** (1 / left), c.rounding))  # equal ratios at each step


def reserved(c: Compression, num_layers: int, spans: Sequence[int]) -> list[int]:
    """Compensation tokens that each of `num_layers` layers holds next to the visual tokens of :func:`actual`,
    as far as they are certain: one more after each step with `compensation: reserved` that removes anything.

    spans: lengths of one sample's spans. ConfigError when the compression names a layer that the model does
    not have.
    """
    return [slots for _, slots in _stages(c, num_layers, spans)]


def nominal(c: Compression, num_layers: int, n: float) -> list[float]:
    """Visual tokens of each of `num_layers` layers, real-valued: N·(1-R)^k after k compressions (§3.4, as
    Table 1 counts), where `keep` stands for the ratio that leaves so many after the last one.

    ConfigError when the compression names a layer that the model does not have.
    """
    schedule, counts, now = c.schedule(num_layers), [], n
    for layer in range(num_layers):
        for step in schedule:
            if step.layer == layer - 1:
                now *= _share(now, step.part, step.left)
        counts.append(now)
    return counts


def _share(n: float, c: Compression, left: int) -> float:
    """What one compression leaves of `n` tokens, `left` of them still to come: equal ratios lead to
    `keep`."""
    if isinstance(c.keep, str):
        raise ConfigError(UNKNOWN)
    if c.keep is not None:
        return min(1, c.keep / n) ** (1 / left)
    return 1 - (c.ratio[-left] if isinstance(c.ratio, tuple) else c.ratio)


def actual(c: Compression, num_layers: int, spans: Sequence[int]) -> list[int]:
    """Visual tokens of each of `num_layers` layers in whole tokens: every span is shortened by itself, then
    summed.

    spans: lengths of one sample's spans. The compensation tokens are not counted (§3.3: their FLOPs are
    negligible; :func:`reserved` has those that are certain). ConfigError when the compression names a layer
    that the model does not have.
    """
    return [tokens for tokens, _ in _stages(c, num_layers, spans)]


def _stages(c: Compression, num_layers: int, spans: Sequence[int]) -> Iterator[tuple[int, int]]:
    """For each layer its visual tokens and the compensation tokens that were reserved before it."""
    schedule = c.schedule(num_layers)
    lengths, slots = list(spans), 0
    for layer in range(num_layers):
        for step in schedule:
            if step.layer == layer - 1:
                before = sum(lengths)
                [lengths] = keeps([lengths], step.part, step.left)
                slots += step.part.reserves and sum(lengths) < before
        yield sum(lengths), slots


def average(counts: Sequence[float]) -> float:
    """Visual tokens of an average layer."""
    return sum(counts) / len(counts)


def layer_flops(n: float, d: int, m: int, d_kv: int) -> float:
    """Multiply-accumulates of one decoder layer over n visual tokens (§4.1).

    d: hidden size; m: intermediate size of the MLP; d_kv: width of the keys and values. With d_kv = d it is
    the paper's 4nd² + 2n²d + 3ndm; grouped-query attention makes the K and V projections smaller.
    """
    return (2 * d * d + 2 * d * d_kv) * n + 2 * n * n * d + 3 * n * d * m


def model_flops(spec: Sizes, counts: Sequence[float]) -> float:
    """Multiply-accumulates of all layers; counts: the visual tokens of one sequence in each layer."""
    return sum(layer_flops(n, spec.hidden_size, spec.intermediate_size, spec.kv_size) for n in counts)


def counted(c: Compression, num_layers: int, n: int, whole: bool = False) -> list[float]:
    """What FLOPs are counted of, in each of `num_layers` layers: the visual tokens of a sequence of `n`, as
    real numbers or `whole` ones, and its reserved compensation tokens. ConfigError as :func:`nominal`."""
    tokens = actual(c, num_layers, [n]) if whole else nominal(c, num_layers, n)
    return [sum(pair) for pair in zip(tokens, reserved(c, num_layers, [n]))]


def solve(c: Compression, spec: Sizes, n: int) -> Compression:
    """The same with a ratio in place of `tokens` or `flops`, for a model's sizes and `n` visual tokens.

    The ratio is the one, equal at all layers, whose nominal counts, with the reserved compensation tokens,
    meet the budget. ConfigError, which says
    the range, where none from 0 to 0.99 does. Another budget is returned as it is.
    """
    if c.tokens is None and c.flops is None:
        return c
    key, goal = ("tokens", c.tokens) if c.tokens is not None else ("flops", c.flops)
    whole = model_flops(spec, [n] * spec.layers)

    def with_ratio(ratio: float) -> Compression:
        return replace(c, tokens=None, flops=None, ratio=ratio)

    def reached(ratio: float) -> float:
        counts = counted(with_ratio(ratio), spec.layers, n)
        return average(counts) if key == "tokens" else model_flops(spec, counts) / whole

    low, high = 0.0, LARGEST_RATIO
    least, most = reached(high), reached(low)
    if not least <= goal <= most:
        layers = [step.layer for step in with_ratio(0.5).schedule(spec.layers)]
        ends = (
            f"{math.ceil(least)} to {math.floor(most)}" if key == "tokens" else f"{least:.3f} to {most:.0f}"
        )
        raise ConfigError(
            f"{key}: {goal:.4g} is out of range: after layers {show(layers)} of {spec.layers} and with {n} "
            f"visual tokens it can be {ends}; change the budget or the layers"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) > goal else (low, middle)
    return with_ratio(high)
