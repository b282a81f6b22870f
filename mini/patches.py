"""What lies on each patch: training pixels and labels, and the heads that learn to name them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from libra.mini.scenes import COLOR_NAMES, Scene
from libra.mini.shapes import COLORS as SHAPE_COLORS
from libra.mini.shapes import SHAPES, Shape
from llava.constants import IGNORE_INDEX

from .build import WIDTH

THINGS = (*(str(value) for value in range(10)), *SHAPES)
PAINTS = (*COLOR_NAMES, *(name for name in SHAPE_COLORS if name not in COLOR_NAMES), "<none>")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pixels_of(image: np.ndarray) -> torch.Tensor:
    """(96, 96, 3) uint8 to (3, 96, 96), as the image processor gives them but twenty times as fast."""
    values = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def _labels(owners: np.ndarray, things: list[str], paints: list[str]) -> dict[str, torch.Tensor]:
    """Labels (grid²,) of patches that belong to ``things``; each thing, and the background, has weight 1 in
    all."""
    areas = np.bincount(owners + 1, minlength=len(things) + 1)
    return {
        "things": torch.from_numpy(np.array([IGNORE_INDEX, *map(THINGS.index, things)])[owners + 1]),
        "paints": torch.from_numpy(
            np.array([PAINTS.index("<none>"), *map(PAINTS.index, paints)])[owners + 1]
        ),
        "patch_weights": torch.from_numpy((1 / areas.clip(min=1))[owners + 1]).float(),
    }


def scene_patches(scene: Scene) -> dict[str, torch.Tensor]:
    """Pixels and patch labels of a scene."""
    values, colors = [str(digit.value) for digit in scene.digits], [digit.color for digit in scene.digits]
    return {"images": pixels_of(scene.image), **_labels(scene.owners, values, colors)}


def shape_patches(shape: Shape) -> dict[str, torch.Tensor]:
    """Pixels and patch labels of an easy-VQA image."""
    return {"images": pixels_of(shape.image), **_labels(shape.owners, [shape.name], [shape.color])}


class PatchHeads(nn.Module):
    """Two linear heads on visual tokens (B, N, WIDTH): the thing and the colour on each patch."""

    def __init__(self):
        super().__init__()
        self.thing, self.paint = nn.Linear(WIDTH, len(THINGS)), nn.Linear(WIDTH, len(PAINTS))

    def forward(self, tokens, things, paints, patch_weights) -> torch.Tensor:
        """The loss. A digit counts as one, however many patches it covers: a small one is as hard to name as
        a big one."""
        on_things = patch_weights * (things != IGNORE_INDEX)
        return _loss(self.thing(tokens), things, on_things) + 0.5 * _loss(
            self.paint(tokens), paints, patch_weights
        )


def _loss(logits, labels, weights) -> torch.Tensor:
    """Weighted mean of the cross-entropies of (B, N, classes) logits."""
    each = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
    return (each * weights.flatten()).sum() / weights.sum()
