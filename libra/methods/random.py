"""A control: targets drawn at random, which later work found hard to beat. The rest is dropped."""

from typing import TYPE_CHECKING

from .registry import Method, register_select

if TYPE_CHECKING:
    import torch

METHOD = Method(
    "random",
    description="tokens drawn at random; the rest is dropped (a control)",
    section="not in the paper",
    keys={"select": "random", "merge": "drop"},
    family="control",
)


@register_select("random", reads=("seed",), trusted=True)
def random(candidates, c) -> "torch.Tensor":
    """Pseudo-random targets: a function of the seed, the row's seed, its length and the token's number only,
    so that they are the same in any batch and on any device."""
    spans = candidates.layout
    start = (c.seed * 7_919 + 2**63) % 2**64 - 2**63  # as a 64-bit number, which wraps
    state = start + spans.index + spans.tokens_of_row[:, None] * 104_729
    if candidates.row_seeds is not None:
        state = state + candidates.row_seeds[:, None] * 1_000_003
    for _ in range(3):
        state = state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407  # wraps modulo 2^64
        state = state ^ ((state >> 29) & 0x7FFFFFFFF)
    return candidates.top((state & 0xFFFFFF).float())
