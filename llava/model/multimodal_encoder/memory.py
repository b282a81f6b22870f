"""Features of pictures that a vision tower has seen before, for a table whose rows all show the same
pictures."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch


class FeatureMemory:
    """What a vision tower gave for earlier batches of pixels; the oldest go when ``limit`` bytes are reached.

    Whole batches are remembered, not single pictures: a picture's features may round otherwise in another
    batch, and a remembered answer must be the very bits that computing it again would give.
    """

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._features: OrderedDict[tuple[bytes, Hashable], Any] = OrderedDict()

    def get(self, pixels: torch.Tensor, compute: Callable[[torch.Tensor], Any], what: Hashable = None) -> Any:
        """``compute(pixels)``, or what it gave for the same pixels before: something with ``nbytes``.

        pixels: (B, 3, H, W); what: of several things that are computed from pixels, which one. Called with
            gradients on, it computes and remembers nothing.
        """
        if torch.is_grad_enabled():
            return compute(pixels)
        key = self._key(pixels), what
        if key in self._features:
            self._features.move_to_end(key)
            return self._features[key]
        features = compute(pixels)
        if features.nbytes <= self.limit:
            self._features[key] = features
            self.held += features.nbytes
        while self.held > self.limit:
            self.held -= self._features.popitem(last=False)[1].nbytes
        return features

    @staticmethod
    def _key(pixels: torch.Tensor) -> bytes:
        data = pixels.detach().cpu().contiguous().view(torch.uint8).numpy()
        return hashlib.blake2b(data, person=str(pixels.dtype).encode()[-16:]).digest() + bytes(
            str(tuple(pixels.shape)), "ascii"
        )
