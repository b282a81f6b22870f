"""The vision tower named by a model's configuration."""

from .clip_encoder import CLIPVisionTower


def build_vision_tower(config, **kwargs) -> CLIPVisionTower:
    """Build the tower of ``config.mm_vision_tower`` (or ``vision_tower``, as the training arguments call
    it)."""
    name = getattr(config, "mm_vision_tower", getattr(config, "vision_tower", None))
    if name is None:
        raise ValueError(
            "the configuration names no vision tower: set mm_vision_tower to a CLIP folder or hub name"
        )
    return CLIPVisionTower(name, args=config, **kwargs)
