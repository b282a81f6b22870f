"""Where a model's visual tokens lie on the picture that they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isqrt

import torch
from PIL import Image

from ..rows import patches_across

STRIP = 32  # tokens in a line, where nothing is known of their places
LONG_SIDE = 1024  # pixels of a picture in a figure or a trace file, at most


@dataclass(frozen=True)
class Block:
    """Visual tokens on a grid, in raster order.

    Attributes:
        tokens: their number.
        columns: tokens of a row, without its newline token; the last row may be shorter.
        picture: what the model saw there; without one only the cells are drawn, with the numbers of the
            tokens.
        newline: whether each row ends in a newline token, which stands next to the picture (LLaVA-NeXT).
    """

    tokens: int
    columns: int
    picture: Image.Image | None = None
    newline: bool = False

    def __post_init__(self):
        if self.tokens < 1 or self.columns < 1:
            raise ValueError(
                f"a block needs tokens and columns, at least 1 each, not {self.tokens} and {self.columns}"
            )

    @property
    def width(self) -> int:
        return self.columns + self.newline

    @property
    def rows(self) -> int:
        return ceil(self.tokens / self.width)


def strip(tokens: int) -> Block:
    """Tokens of unknown places: lines of ``STRIP`` in their order."""
    return Block(tokens, min(tokens, STRIP))


def blocks_of(inputs: Mapping, image: Image.Image, spans: Sequence[int], processor, config) -> list[Block]:
    """Where the visual tokens of one image lie, as far as the processor's ``inputs`` say; else a strip for
    each span.

    Places are given only where they account for exactly the number of tokens.
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
    side, size = patches_across(config.vision_config), inputs["image_sizes"][0].tolist()
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge)
    rows, columns = unpad_image(torch.empty(1, side * down, side * across), size).shape[1:]
    overview = Block(side * side, side, _seen(inputs["pixel_values"][0, 0], processor))
    return [overview, Block(rows * (columns + 1), columns, whole, newline=True)]


def _seen(pixels: torch.Tensor, processor) -> Image.Image:
    """The picture that was normalised to pixels (3, H, W)."""
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std")
    )
    values = pixels.float().cpu() * std[:, None, None] + mean[:, None, None]
    return Image.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
