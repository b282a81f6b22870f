"""Numbers: which count as whole, and how tables print them."""

from collections.abc import Sequence
from itertools import groupby
from numbers import Integral

# A lower sampling temperature takes the likeliest token: divided by it, logits might become infinite.
COLDEST = 1e-6


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def stages(counts: Sequence[int]) -> list[int]:
    """The numbers of tokens layer by layer, each stretch of equal ones once."""
    return [count for count, _ in groupby(counts)]


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def operations(count: float) -> str:
    return f"{count / 1e12:.3f} T" if count >= 1e11 else f"{count / 1e9:.3f} G"


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
