"""The vision towers whose true size is known, and how many pictures a row's prompt is made of."""

from math import ceil

from ..config import ConfigError
from ..rows import ModelSpec
from .random_weights import CLIP_L_336

TOWERS = {"llava-1.5-7b": CLIP_L_336, "llava-1.5-13b": CLIP_L_336, "llava-next-8b": CLIP_L_336}
VIEWS = {"llava-next-8b": 5}  # the picture and its 2 × 2 tiles; 1 for every other model


def tower_of(spec: ModelSpec) -> dict:
    """The sizes of a model's vision tower. ConfigError for one that is not known here."""
    if spec.name not in TOWERS:
        raise ConfigError(
            f"--vision: the size of {spec.name}'s vision tower is not known here; leave --vision out"
        )
    return TOWERS[spec.name]


def views_of(spec: ModelSpec, vision_config, visual: int) -> int:
    """Pictures that a prompt of ``visual`` tokens needs: the model's own number, or as many as give that many
    tokens."""
    if visual == sum(spec.visual_tokens):
        return VIEWS.get(spec.name, 1)
    return ceil(visual / (vision_config.image_size // vision_config.patch_size) ** 2)
