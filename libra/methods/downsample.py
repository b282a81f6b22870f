"""A control: the picture is shrunk before the vision tower, so that fewer visual tokens come out
(VTC-Bench, ACL 2026).

For T tokens of a picture of h × w patches its pixels are scaled (bicubic, antialiased) to h' × w' patches,
w' = ⌈√(T·w/h)⌉ and h' = ⌈T/w'⌉, and the tower reads them with its position embeddings interpolated to that
grid. Of its h'·w' features, at most w' - 1 more than T, T at even distances stay, each in the place of the
middle one of the patches that it covers. Nothing is chosen by content, and the tower itself has less to do.
"""

from functools import lru_cache
from math import isqrt
from typing import TYPE_CHECKING

from .registry import Method, register_select

if TYPE_CHECKING:
    import torch

METHOD = Method(
    "downsample",
    description="the picture is shrunk before the vision tower, until it gives T tokens (a control)",
    section="VTC-Bench, ACL 2026",
    keys={"select": "downsample", "merge": "drop"},
    places=(),
    place="tower",
    cost="scaling the pixels; the tower reads fewer patches",
    deviation="the original scales pictures for models that take any size; a tower of one size, such as "
    "CLIP's, gets interpolated position embeddings here, and a picture that is cut into tiles is refused",
    family="control",
)


def shrunk_grid(h: int, w: int, k: int) -> tuple[int, int]:
    """The (h', w') patches, at least k, to which a picture of h × w patches is scaled for k tokens."""
    across = min(w, isqrt(-(-k * w // h) - 1) + 1)  # the smallest whole number above the root
    down = -(-k // across)
    return (down, across) if down <= h else (h, -(-k // h))


@lru_cache(maxsize=256)
def middles(h: int, w: int, k: int) -> tuple[int, ...]:
    """The places, among h × w, of k features of the shrunk picture, ascending."""
    down, across = shrunk_grid(h, w, k)
    features = down * across
    chosen = [(2 * i + 1) * features // (2 * k) for i in range(k)]
    return tuple(
        _middle(number // across, h, down) * w + _middle(number % across, w, across) for number in chosen
    )


def _middle(number: int, size: int, parts: int) -> int:
    """The middle one of the places, of ``size``, that fall into a part."""
    first, end = -(-number * size // parts), -(-(number + 1) * size // parts)
    return (first + end) // 2


@register_select("downsample", reads=(), needs=("grid",), trusted=True, shrinks=shrunk_grid)
def downsample(candidates, c) -> "torch.Tensor":
    """One place for each feature of the shrunk picture, whose features the vision tower has given.

    Raises ValueError for a picture of several parts.
    """
    layout, rows = candidates.layout, []
    for spans, keeps, grids in zip(layout.spans, layout.keeps, candidates.grids):
        chosen, first = [False] * layout.tokens, 0
        for n, k, parts in zip(spans, keeps, grids):
            if len(parts) > 1 or len(parts[0]) > 2:
                raise ValueError(
                    "method downsample shrinks pictures that the vision tower sees as one, and this one has"
                    f" parts of {' and '.join('×'.join(map(str, part)) for part in parts)} patches; make the"
                    " picture smaller before the processor"
                )
            for place in middles(*parts[0], k):
                chosen[first + place] = True
            first += n
        rows.append(chosen)
    return layout.valid & layout.index.new_tensor(rows).bool()
