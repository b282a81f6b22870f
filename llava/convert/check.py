"""Whether a checkpoint has exactly the weights that transformers' class wants."""

from pathlib import Path

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from libra.utils.sentences import first_line

from ..model import settings
from ..model.weights import is_float
from .keys import HEAD, held_from_hf
from .weights import Stored

CLASSES = {LlavaConfig: LlavaForConditionalGeneration, LlavaNextConfig: LlavaNextForConditionalGeneration}


def check_complete(source: Path, tensors: dict[str, Stored], config: LlavaConfig | LlavaNextConfig) -> None:
    """Compare names and shapes with those of the configuration's class, built without memory.

    Raises:
        ValueError: if weights are missing, unknown, of another shape, or not floating-point numbers.
    """
    settings.check_depth(source / "config.json", config.to_dict(), tensors)
    try:
        with torch.device("meta"):
            model = CLASSES[type(config)](config)
    except Exception as error:  # an unknown activation is a KeyError, no heads a division by zero …
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{source / 'config.json'} describes no model that can be built ({reason}); get it again"
        ) from error
    wanted = {held_from_hf(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings and HEAD not in tensors:
        wanted.pop(HEAD)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(
            f"the checkpoint {source} lacks {len(missing)} weights, {missing[0]!r} among them; get it again"
        )
    unknown = [name for name in tensors if name not in wanted]
    if unknown:
        raise ValueError(
            f"{type(model).__name__} has no place for {len(unknown)} weights of {source}, {unknown[0]!r}"
            " among them"
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name!r} of {source} has the shape {tensors[name].shape}; its config.json asks for {shape}"
            )
        if not is_float(tensors[name].dtype):
            raise ValueError(
                f"{name!r} of {source} is of type {tensors[name].dtype}, and weights are floating-point"
                " numbers"
            )
