"""Figures with standard errors, and what follows from them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

LEARNED_AT, LEARNED_AT_SMALL = 80.0, 65.0  # percent; of half-size digits, which the tower reads less well
LEARNED_ABOVE = 25.0  # points above the better of majority and blind
FEWEST = 30  # answers from which the normal approximation of ± is usual


@dataclass(frozen=True)
class Figure:
    """A measured value with its standard error, which is None where it cannot be had, and the number of
    answers that it is made of."""

    value: float
    stderr: float | None = None
    n: int = 0

    @property
    def error(self) -> float | None:
        """The standard error where the answers carry one: there are :data:`FEWEST` of them, and they are not
        all alike."""
        return self.stderr if self.stderr and self.n >= FEWEST else None

    @property
    def stored_error(self) -> str:
        """:attr:`error` for a CSV; empty where there is none."""
        return "" if self.error is None else f"{self.error:.4f}"

    @property
    def significant(self) -> bool:
        """Whether a difference exceeds two of its standard errors."""
        return self.error is not None and abs(self.value) > 2 * self.error

    def show(self, digits: int = 1, sign: bool = False) -> str:
        text = f"{self.value:{'+' if sign else ''}.{digits}f}"
        return text if self.error is None else f"{text} ± {self.error:.{digits}f}"


def paired_difference(correct: Sequence[float], baseline: Sequence[float]) -> Figure:
    """Mean of the differences on the same questions, and their standard deviation over sqrt(n), in points.

    ValueError where the two did not answer the same number of questions.
    """
    if len(correct) != len(baseline):
        raise ValueError(
            f"paired answers differ in number, {len(correct)} and {len(baseline)}: use one limit for both"
            " rows"
        )
    difference = np.asarray(correct, float) - np.asarray(baseline, float)
    deviation = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    return Figure(100 * float(difference.mean()), 100 * deviation / sqrt(len(difference)), len(difference))


def mean_of(figures: Iterable[Figure]) -> Figure:
    """Mean of independent figures: their standard errors add in squares."""
    figures = list(figures)
    stderrs = [figure.stderr for figure in figures]
    stderr = None if None in stderrs else sqrt(sum(s * s for s in stderrs)) / len(figures)
    return Figure(
        sum(figure.value for figure in figures) / len(figures), stderr, sum(figure.n for figure in figures)
    )


def is_learned(vanilla: float, majority: float, blind: float, least: float = LEARNED_AT) -> bool:
    """Whether a question type counts for Avg (all in percent): decided without a look at any compressed
    result."""
    return vanilla >= least and vanilla - max(majority, blind) >= LEARNED_ABOVE


@dataclass(frozen=True)
class Spread:
    """Median of a sample with its quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        lower, median, upper = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(lower), float(upper))

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.lower:.{digits}f}–{self.upper:.{digits}f})"
