"""Named points of the grid: how targets are chosen × what becomes of the rest. One file a method.

A file holds a method's paper, formula, constants and traits; what several methods share is in
:mod:`libra.select` and :mod:`libra.merge`. Layers and ratio are the row's own (`configs/`); a key written
next to `method` overrides the one that the method sets.
"""

from . import (
    cdpruner,
    dart,
    divprune,
    downsample,
    evs,
    fastervlm,
    fastv,
    hiprune,
    holov,
    libra,
    libra_input,
    libra_mean,
    mmtok,
    pool,
    prumerge,
    prumerge_plus,
    pyramiddrop,
    random,
    sparsevlm,
    sparsevlm_v2,
    tome,
    turbo,
    uniform_frames,
    vanilla,
    vidcom2,
    visionzip,
    vispruner,
    vscan,
    windowed_fastv,
)
from .context import Context
from .registry import (
    KEYS,
    MERGERS,
    QUARTERS,
    SELECTORS,
    Merge,
    Method,
    Select,
    register_merge,
    register_select,
)

__all__ = [
    "DEFAULTS", "FILES", "KEYS", "MERGERS", "METHODS", "SELECTORS", "Context", "Merge", "Method", "Select",
    "natural_layers",
    "register_merge", "register_select",
]  # fmt: skip

# What a compression without a method is: the paper's own choice, read as docs/method.md says.
DEFAULTS = {
    "select": "intervals",
    "merge": "igm",
    "importance": "last",
    "score_layer": "same",
    "positions": "original",
    "rounding": "round",
}

FILES = (
    vanilla, libra, libra_mean, fastv, turbo, windowed_fastv, random, pyramiddrop, sparsevlm, sparsevlm_v2,
    dart, libra_input, fastervlm, divprune, cdpruner, vispruner, hiprune, holov, vscan, mmtok, visionzip,
    prumerge, prumerge_plus, tome, pool, downsample, evs, vidcom2, uniform_frames,
)  # fmt: skip
METHODS: dict[str, Method] = {file.METHOD.name: file.METHOD for file in FILES}


def natural_layers(method: str | None, num_layers: int, last: int) -> tuple[int, ...]:
    """Where a method compresses in a model of `num_layers` layers where no layers are named, such as libra
    after 7, 15, 23 of 32.

    last: the last layer that may be one of them. Without a method: the paper's quarter points.
    """
    places = METHODS[method].places if method else QUARTERS
    layers = {max(0, round(place * num_layers) - 1) for place in places}
    return tuple(sorted(layer for layer in layers if layer <= last))
