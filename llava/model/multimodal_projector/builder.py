"""The projector from vision features (width ``mm_hidden_size``) to the language model's embeddings (width
``hidden_size``)."""

import re

from torch import nn

from .stc_connector import PADDING, STCConnector


def build_vision_projector(config, **kwargs) -> nn.Module:
    """Build the projector that ``config.mm_projector_type`` names: ``linear``, ``mlp{depth}x_gelu``,
    ``identity`` or, for videos, an ``stc_connector`` (see :class:`STCConnector`).

    The first three map (..., mm_hidden_size) to (..., hidden_size). The layers of an MLP are numbered 0, 2, 4
    …, as in the published weights.

    Raises:
        ValueError: if the type is none of these.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        return nn.Identity()
    if kind in PADDING:
        return STCConnector(config.mm_hidden_size, config.hidden_size, PADDING[kind])
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        known = "'linear', 'mlp2x_gelu' (any depth), 'identity' or, for videos, " + " or ".join(
            map(repr, PADDING)
        )
        raise ValueError(f"mm_projector_type {kind!r} is unknown; use {known}")
    layers = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
