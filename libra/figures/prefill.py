"""One real prefill of a model, traced."""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from llava.model import huggingface
from llava.model.settings import is_original

from ..checkpoints import find_reachable
from ..config import Compression
from ..engine.attach import attach
from ..engine.places_on_pictures import blocks_of
from ..engine.transformers_api import PreTrainedConfig
from ..media.asking import image_question
from ..utils.devices import find_device
from ..utils.sentences import first_line
from .drawing import Record


def trace_image(model, processor, compression: Compression, image: Image.Image, prompt: str) -> Record:
    """One prefill of a Hugging Face model with compression attached, and what became of the image's tokens.

    Raises:
        ValueError: if the model is not supported or the compression does not fit it.
    """
    inputs = image_question(processor, image, prompt).to(model.device, model.dtype)
    with attach(model, compression, trace=True) as handle, torch.no_grad():
        model(**inputs)
    trace = handle.trace[0]
    return Record(
        trace, handle.compression, tuple(blocks_of(inputs, image, trace.spans, processor, model.config))
    )


def load(path: str):
    """A model and its processor. Raises ValueError."""
    path = find_reachable(path)
    try:
        config = PreTrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"the model {path} cannot be loaded: {first_line(error)}") from error
    if is_original(config):
        command = f"python -m llava.convert {path} {Path(path).name}-hf"
        raise ValueError(
            f"the model {path} cannot be loaded: it is in LLaVA's own format; convert it with {command}"
        )
    processor = huggingface.load_processor(path)
    model = huggingface.load(AutoModelForImageTextToText, path, dtype="auto")
    return model.to(find_device()).eval(), processor
