"""Where the tower's [CLS] token looks; :mod:`mini.look` is the command.

Methods such as FasterVLM, VisionZip and VisPruner score visual tokens by its attention in the layer that
LLaVA selects.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionModel

from libra.mini.scenes import NOTHING, draw_scene

from .build import GRID
from .patches import pixels_of

KEPT = (0.5, 0.25, 0.125)  # shares of the patches


@dataclass(frozen=True)
class Look:
    """Means over scenes. ``area``: share of the patches with digits; ``mass``: share of the [CLS] attention
    on them.

    ``auc``: chance that a patch with a digit has more attention than one without; ``kept``: per cent of the
    patches with digits among the most attended half, quarter and eighth.
    """

    area: float
    mass: float
    auc: float
    kept: tuple[float, ...]


def area_under_curve(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """The chance that a positive entry of (N,) scores above a negative one."""
    ranks = scores.argsort().argsort().float()
    count = positive.sum()
    return float((ranks[positive].sum() - count * (count - 1) / 2) / (count * (len(scores) - count)))


@torch.no_grad()
def look(tower: CLIPVisionModel, layer: int, small: bool, scenes: int = 100, seed: int = 3) -> Look:
    """Measure ``layer`` (negative: from the end) on scenes with held-out glyphs, all big or all small."""
    rng = np.random.default_rng([seed, small])
    drawn = [draw_scene(rng, "test", GRID, small=small) for _ in range(scenes)]
    digits = torch.from_numpy(np.stack([scene.owners != NOTHING for scene in drawn]))
    pixels = torch.stack([pixels_of(scene.image) for scene in drawn])
    rows = [
        tower(part, output_attentions=True).attentions[layer][:, :, 0, 1:].mean(1)
        for part in pixels.split(20)
    ]
    scores = torch.cat(rows)
    kept = []
    for share in KEPT:
        top = torch.zeros_like(digits).scatter(1, scores.topk(int(share * scores.shape[1])).indices, True)
        kept.append(round(100 * float(((top & digits).sum(1) / digits.sum(1)).mean()), 1))
    return Look(
        area=round(float(digits.float().mean()), 3),
        mass=round(float(((scores * digits).sum(1) / scores.sum(1)).mean()), 3),
        auc=round(float(np.mean([area_under_curve(*pair) for pair in zip(scores, digits)])), 3),
        kept=tuple(kept),
    )


def measure(folder: Path) -> dict[str, dict]:
    """``{"-2 big": …}`` of the last two layers of the tower in ``folder``."""
    tower = CLIPVisionModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    sizes = {"big": False, "small": True}
    return {
        f"{layer} {name}": asdict(look(tower, layer, small))
        for layer in (-2, -1)
        for name, small in sizes.items()
    }
