"""One real prefill, and where its visual tokens lie on the image."""

from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.model import huggingface

from ..checkpoints import find_checkpoint
from ..config import Compression
from ..engine.attach import attach
from ..engine.transformers_api import PreTrainedConfig
from ..utils.devices import find_device
from .drawing import Block, Record, strip

LONG_SIDE = 1024  # pixels of a picture in a figure or a trace file, at most


def blocks_of(inputs: Mapping, image: Image.Image, spans: Sequence[int], processor, config) -> list[Block]:
    """Where the visual tokens of one image lie, as far as the processor's ``inputs`` tell; else a strip for
    each span.

    A place is told only where the number of tokens is exactly the one that it leads to.
    """
    tokens, whole = sum(spans), image.copy()
    whole.thumbnail((LONG_SIDE, LONG_SIDE))
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    blocks: list[Block] = []
    if inputs.get("image_grid_thw") is not None:  # Qwen: the whole image, at its own shape
        (_, rows, columns), merge = inputs["image_grid_thw"][0].tolist(), processor.image_processor.merge_size
        blocks = [Block(rows * columns // merge**2, columns // merge, whole)]
    elif (
        pixels is not None and pixels.ndim == 4 and pixels.shape[-1] == pixels.shape[-2]
    ):  # one square, or tiles
        side = max(1, isqrt(tokens // len(pixels)))
        blocks = [Block(side * side, side, _seen(square, processor)) for square in pixels]
    elif pixels is not None and pixels.ndim == 5:  # an overview, then the whole image from its tiles
        blocks = _overview_and_tiles(inputs, whole, processor, config)
    return blocks if sum(block.tokens for block in blocks) == tokens else [strip(span) for span in spans]


def _overview_and_tiles(inputs: Mapping, whole: Image.Image, processor, config) -> list[Block]:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    edge = config.vision_config.image_size
    side, size = edge // config.vision_config.patch_size, inputs["image_sizes"][0].tolist()
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge)
    rows, columns = unpad_image(torch.empty(1, side * down, side * across), size).shape[1:]
    overview = Block(side * side, side, _seen(inputs["pixel_values"][0, 0], processor))
    return [overview, Block(rows * (columns + 1), columns, whole, newline=True)]


def _seen(pixels: torch.Tensor, processor) -> Image.Image:
    """The picture behind normalised pixels (3, H, W)."""
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std")
    )
    values = pixels.float().cpu() * std[:, None, None] + mean[:, None, None]
    return Image.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def trace_image(model, processor, compression: Compression, image: Image.Image, prompt: str) -> Record:
    """One prefill of a Hugging Face model with compression attached, and what became of the image's tokens.

    Raises:
        ValueError: if the model is not supported or the compression does not fit it.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        text = prompt if processor.image_token in prompt else f"{processor.image_token}\n{prompt}"
        inputs = processor(images=[image], text=[text], return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    with attach(model, compression, trace=True) as handle, torch.no_grad():
        model(**inputs)
    trace = handle.trace[0]
    return Record(
        trace, handle.compression, tuple(blocks_of(inputs, image, trace.spans, processor, model.config))
    )


def load(path: str):
    """A model and its processor. Raises ValueError."""
    path = find_checkpoint(path)
    try:
        if "mm_vision_tower" in PreTrainedConfig.get_config_dict(path)[0]:
            command = f"python -m llava.convert {path} {Path(path).name}-hf"
            raise ValueError(f"it is in LLaVA's own format; convert it with {command}")
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ImportError, ValueError, KeyError) as error:
        raise ValueError(f"the model {path} cannot be loaded: {str(error).splitlines()[0]}") from error
    return huggingface.load(AutoModelForImageTextToText, path, dtype="auto").to(
        find_device()
    ).eval(), processor
