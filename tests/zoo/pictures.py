"""Images and videos as processors hand them to the models: placeholder tokens, and tensors of noise."""

from collections.abc import Callable

import torch
from families import END, IMAGE, START, VIDEO, Picture, noise

Maker = Callable[[torch.Generator], Picture]


def tile(tokens: int, size: int = 28, **more) -> Maker:
    """One square image of ``tokens`` tokens; ``more`` are further arguments, each a list for one image."""

    def image(draw):
        given = {name: torch.tensor([value]) for name, value in more.items()}
        return Picture([IMAGE] * tokens, {"pixel_values": noise(draw, 1, 3, size, size), **given})

    return image


def nested(tokens: int, size: int = 28, **more) -> Maker:
    """The same with a dimension for the images of a sample."""

    def image(draw):
        flat = tile(tokens, size, **more)(draw)
        return Picture(flat.ids, {**flat.given, "pixel_values": flat.given["pixel_values"][:, None]})

    return image


PATCH = (3 * 2 * 4 * 4,)


def grid_image(patch: tuple[int, ...] = PATCH, tokens: int = 24, **more) -> Maker:
    """4 x 6 merged patches of the shape ``patch`` between the marks of start and end, which are text."""

    def image(draw):
        given = {name: torch.tensor([value]) for name, value in more.items()}
        pixels, grid = noise(draw, 8 * 12, *patch), torch.tensor([[1, 8, 12]])
        return Picture(
            [START, *[IMAGE] * tokens, END], {"pixel_values": pixels, "image_grid_thw": grid, **given}
        )

    return image


def grid_video(patch: tuple[int, ...] = PATCH, apart: bool = False, token: int = VIDEO, **more) -> Maker:
    """Two steps in time of 2 x 4 merged patches, ``apart``: each between its own marks, after the text of its
    time."""

    def video(draw):
        given = {name: torch.tensor([value]) for name, value in more.items()}
        pixels, grid = noise(draw, 2 * 4 * 8, *patch), torch.tensor([[2, 4, 8]])
        step = [START, *[token] * 8, END]
        ids = [10, 11, *step, 10, 12, *step] if apart else [START, *[token] * 16, END]
        return Picture(ids, {"pixel_values_videos": pixels, "video_grid_thw": grid, **given})

    return video
