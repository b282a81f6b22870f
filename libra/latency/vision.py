"""The vision towers whose true size is known, and how many pictures a row's prompt is made of."""

from math import ceil

from ..config import Compression, ConfigError
from ..engine.tower import Wants
from ..places import TOWER
from ..rows import ModelSpec, patches_across
from .random_weights import CLIP_L_336

MINI = dict(  # the embedded model's, 256 patches
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=4,
    image_size=96,
    patch_size=6,
    projection_dim=128,
)
TOWERS = {
    **dict.fromkeys(("llava-1.5-7b", "llava-1.5-13b", "llava-next-8b"), CLIP_L_336),
    "mini": MINI,
}
VIEWS = {"llava-next-8b": 5}  # the picture and its 2 × 2 tiles; 1 for every other model


def tower_of(spec: ModelSpec) -> dict:
    """The sizes of a model's vision tower. ConfigError for one that is not known here."""
    if spec.name not in TOWERS:
        raise ConfigError(
            f"the size of {spec.name}'s vision tower is not known here; leave --vision out, and take a method"
            " that does not read the tower"
        )
    return TOWERS[spec.name]


def reads_tower(c: Compression) -> bool:
    """Whether a compression works in the vision tower or asks it for something."""
    return Wants.of(c, has_cls=True) is not None or any(part.at == TOWER for part in c.parts)


def views_of(spec: ModelSpec, vision_config, visual: int) -> int:
    """Pictures that a prompt of ``visual`` tokens needs: the model's own number, or as many as give that many
    tokens."""
    if visual == sum(spec.visual_tokens):
        return VIEWS.get(spec.name, 1)
    return ceil(visual / patches_across(vision_config) ** 2)
