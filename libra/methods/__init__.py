"""Named points of the grid: how targets are chosen × what becomes of the rest, each with the keys it sets.

The layers and the ratio are the row's own (`configs/`); a key written beside `method` overrides the one set
here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

QUARTERS = (Fraction(1, 4), Fraction(2, 4), Fraction(3, 4))
EARLY = (Fraction(1, 8),)  # after layer 3 of 32

# What a compression without a method is: the paper's own choice, read as docs/method.md says.
DEFAULTS = {
    "select": "intervals",
    "merge": "igm",
    "score_layer": "same",
    "positions": "original",
    "rounding": "round",
}


# Who selects and who merges, by name. The names are here so that a configuration is checked without torch;
# select.py and merge.py put the functions in, and libra.register_select and libra.register_merge add a user's
# own.
SELECTORS: dict[str, Callable | None] = dict.fromkeys(("intervals", "topk", "information", "random"))
MERGERS: dict[str, Callable | None] = dict.fromkeys(("drop", "average", "igm", "igm-pos", "igm-neg"))


@dataclass(frozen=True)
class Method:
    """One named method.

    description: one line for tables and help; section: where the paper (or its source) speaks of it;
    keys: the fields of `Compression` that it sets, the others keep `DEFAULTS`; places: how much of the depth
        is behind each of its compressions where a compression names no layers.
    """

    description: str
    section: str
    keys: dict[str, str] = field(default_factory=dict)
    places: tuple[Fraction, ...] = EARLY


METHODS = {
    "vanilla": Method("the plain model: nothing is compressed", "Table 1, vanilla", places=()),
    "libra": Method(
        "the most important token of each interval; similar tokens merge by importance, the others form one token",
        "§3.2–3.4",
        {"select": "intervals", "merge": "igm"},
        QUARTERS,
    ),
    "fastv": Method(
        "the most important tokens; the rest is dropped", "§3.1, §4.1", {"select": "topk", "merge": "drop"}
    ),
    "turbo": Method(
        "the tokens of lowest information degree; each of the rest is averaged into its most similar target",
        "§3.1, §4.1",
        {"select": "information", "merge": "average"},
    ),
    "windowed-fastv": Method(
        "the most important token of each interval; the rest is dropped (a control)",
        "§3.2 without §3.3",
        {"select": "intervals", "merge": "drop"},
    ),
    "random": Method(
        "tokens drawn at random; the rest is dropped (a control)",
        "not in the paper",
        {"select": "random", "merge": "drop"},
    ),
    "pyramiddrop": Method(
        "the most important tokens by the next layer's query and keys; the rest is dropped, positions are renumbered",
        "not in the paper (PyramidDrop)",
        {
            "select": "topk",
            "merge": "drop",
            "score_layer": "next",
            "positions": "compact",
            "rounding": "floor",
        },
        QUARTERS,
    ),
}


def natural_layers(method: str | None, num_layers: int, last: int) -> tuple[int, ...]:
    """Where a method compresses in a model of `num_layers` layers when nobody says, such as libra after 7,
    15, 23 of 32.

    last: the last layer that may be one of them. Without a method: the paper's quarter points.
    """
    places = METHODS[method].places if method else QUARTERS
    layers = {max(0, round(place * num_layers) - 1) for place in places}
    return tuple(sorted(layer for layer in layers if layer <= last))
