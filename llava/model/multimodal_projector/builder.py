"""The projector from vision features (width ``mm_hidden_size``) to the language model's embeddings (width ``hidden_size``)."""

import re

from torch import nn


def build_vision_projector(config, **kwargs) -> nn.Module:
    """Build the projector named by ``config.mm_projector_type``: ``linear``, ``mlp{depth}x_gelu`` or ``identity``.

    Maps (..., mm_hidden_size) to (..., hidden_size). The layers of an MLP are numbered 0, 2, 4 …, as in the published weights.

    Raises:
        ValueError: if the type is not one of the three.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(f"mm_projector_type {kind!r} is unknown; use 'linear', 'mlp2x_gelu' (any depth) or 'identity'")
    layers = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
