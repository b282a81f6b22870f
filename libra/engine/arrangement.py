"""From the patches of a vision tower to the visual tokens of an attached model, by the model's own functions.

What is known about patches (scores, keys, features) is arranged as the model arranges its features, so that
each visual token has its own.
"""

import inspect
import sys
from collections.abc import Sequence

import torch

from ..rows import patches_across
from .tower import grids_of


class Plain:
    """One picture, one input of the tower, one visual token a patch (LLaVA).

    Called with a picture's number and something about the patches of its inputs (n, P, W), it returns that of
    its visual tokens (N, W).
    """

    def __init__(self, body, name: str, given: dict, features: Sequence[torch.Tensor]):
        self.body, self.name, self.given = body, name, given
        self.lengths = self._lengths([len(tokens) for tokens in features])

    def _lengths(self, lengths: list[int]) -> list[int]:
        """The visual tokens of each picture, from those of each tensor that the model's function returned."""
        return lengths

    @property
    def counts(self) -> list[int]:
        """The tower's inputs of each picture."""
        return [1] * len(self.lengths)

    @property
    def side(self) -> int:
        """Patches along an edge of an input."""
        return patches_across(self.body.config.vision_config)

    def __call__(self, number: int, patches: torch.Tensor) -> torch.Tensor:
        return patches[0]

    def grid(self, number: int, outside: torch.Tensor):
        """The grids of a picture's parts."""
        return ((self.side, self.side),)


class Tiles(Plain):
    """Tiles with newlines, and the frames of a video with one newline (LLaVA-NeXT, LLaVA-OneVision)."""

    @property
    def counts(self) -> list[int]:
        if "video" in self.name:
            return [self.given["pixel_values_videos"].shape[1]] * len(self.lengths)
        count = sys.modules[type(self.body).__module__].image_size_to_num_patches
        config, sizes = self.body.config, self.given["image_sizes"]
        grouped = self.given.get("batch_num_images")
        several = [n == 1 for n in grouped for _ in range(n)] if grouped is not None else [True] * len(sizes)
        tiles = [count(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes]
        return [n if own else 1 for n, own in zip(tiles, several)]

    def __call__(self, number, patches):
        newline = patches.new_zeros(patches.shape[-1])
        if "video" in self.name:
            return torch.cat([self.body.apply_pooling(patches).flatten(0, 1), newline[None]])
        given = {
            "image_features": [patches],
            "image_sizes": self.given["image_sizes"][number : number + 1],
            "vision_feature_select_strategy": "default",
            "image_newline": newline,
            "vision_aspect_ratio": self.given.get("vision_aspect_ratio")
            or self.body.config.vision_aspect_ratio
            if hasattr(self.body.config, "vision_aspect_ratio")
            else None,
        }
        takes = inspect.signature(self.body.pack_image_features).parameters
        return self.body.pack_image_features(**{key: given[key] for key in given if key in takes})[0][0]

    def grid(self, number, outside):
        if "video" in self.name:
            frames = self.counts[number]
            side = round(((self.lengths[number] - 1) // frames) ** 0.5)
            return ((side, side),) * frames + ((1, 1),)
        return grids_of(outside, self.counts[number], self.side)


class Joined(Plain):
    """Groups of neighbouring patches are one visual token: what is said of it is their mean."""

    def _shuffle(self, patches):
        """(n, P, W) to (n, P / g, g · W)."""
        if hasattr(self.body, "pixel_shuffle"):  # InternVL
            square = patches.unflatten(1, (self.side, self.side))
            return self.body.pixel_shuffle(square, scale_factor=self.body.config.downsample_ratio).flatten(
                1, 2
            )
        return self.body.connector.pixel_shuffle(patches, self.body.connector.scale_factor)

    def __call__(self, number, patches):
        joined = self._shuffle(patches.contiguous())
        return joined.unflatten(2, (-1, patches.shape[2])).mean(2).flatten(0, 1)

    def _lengths(self, lengths):
        """SmolVLM returns the tiles of a sample together; with text between them they are pictures each."""
        if not hasattr(self.body, "connector"):
            return lengths
        own = (self.side // self.body.connector.scale_factor) ** 2
        return [own] * (sum(lengths) // own)

    def grid(self, number, outside):
        side = round(len(outside) ** 0.5)
        return ((side, side),)


class Windows(Plain):
    """One sequence for all pictures, four patches a token; Qwen2.5-VL's tower has it in the order of its
    windows."""

    @property
    def thw(self) -> torch.Tensor:
        """(pictures, 3): frames, rows and columns of patches."""
        return self.given["video_grid_thw" if "video" in self.name else "image_grid_thw"]

    def _arranged(self, patches):
        """(1, P, W) of all pictures to (P / 4, W), in the order of the visual tokens."""
        joined = patches[0].unflatten(0, (-1, self.body.visual.spatial_merge_size**2)).mean(1)
        index = self._window_index()
        return joined if index is None else joined[index.argsort()]

    def _window_index(self) -> torch.Tensor | None:
        visual = self.body.visual
        if not hasattr(visual, "window_size"):  # Qwen2-VL, Qwen3-VL
            return None
        if hasattr(visual, "get_window_index"):
            return visual.get_window_index(self.thw)[0].to(self.thw.device)
        index = sys.modules[type(visual).__module__].get_vision_window_index
        sizes = {name: getattr(visual, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
        return index(self.thw, **sizes, kwargs={})[0]

    def __call__(self, number, patches):
        return self._arranged(patches).split(self.lengths)[number]

    def grid(self, number, outside):
        t, h, w = self.thw[number].tolist()
        side = self.body.visual.spatial_merge_size
        return ((t, h // side, w // side),)


ARRANGERS = {"plain": Plain, "tiles": Tiles, "joined": Joined, "windows": Windows}
