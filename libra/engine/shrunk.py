"""A picture that goes smaller into a vision tower of one size, for methods whose select `shrinks` it."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..budget import keeps
from ..config import Compression
from ..methods import SELECTORS


@lru_cache(maxsize=256)
def covering(h: int, w: int, down: int, across: int) -> tuple[int, ...]:
    """For each of the h × w places the number of the one of ``down`` × ``across`` features that covers it."""
    return tuple((y * down // h) * across + x * across // w for y in range(h) for x in range(w))


@dataclass(frozen=True)
class Shrunk:
    """What a tower of ``side`` × ``side`` patches reads instead: ``grid`` (h', w') patches. Hashable."""

    side: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, c: Compression | None, num_layers: int, side: int) -> "Shrunk | None":
        """Of a compression in a decoder of so many layers; None where the picture stays as it is."""
        for step in () if c is None or not c.compresses else c.schedule(num_layers):
            shrinks = SELECTORS[step.part.select].shrinks
            if shrinks is not None:
                kept = keeps([[side * side]], step.part, step.left)[0][0]
                return cls(side, shrinks(side, side, kept)) if kept < side * side else None
        return None

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """(I, 3, H, W) scaled to the grid's patches, in its own dtype."""
        size = [edge // self.side * patches for edge, patches in zip(pixels.shape[-2:], self.grid)]
        scaled = torch.nn.functional.interpolate(pixels.float(), size, mode="bicubic", antialias=True)
        return scaled.to(pixels.dtype)

    def spread(self, features: torch.Tensor) -> torch.Tensor:
        """(I, h'·w', C) to (I, side², C): at each place the feature that covers it."""
        index = torch.tensor(covering(self.side, self.side, *self.grid), device=features.device)
        return features[:, index]
