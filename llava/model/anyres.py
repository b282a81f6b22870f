"""From the tiles of a high-resolution image to one run of visual tokens (LLaVA-NeXT's anyres)."""

import math

import torch

from ..mm_utils import get_anyres_image_grid_shape, unpad_image

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


def arrange_tiles(
    tokens: torch.Tensor,
    merge: str,
    image_size: tuple[int, int] | None = None,
    grid_pinpoints: str | list | None = None,
    tile_edge: int | None = None,
    newline: torch.Tensor | None = None,
) -> torch.Tensor:
    """The visual tokens (N, D) of one image: those of the whole image, then its tiles' as one map, row by
    row.

    Args:
        tokens: (1 + tiles, P, D), the whole image first; P is a square number.
        merge: "flat" puts tile after tile; "spatial" puts the tiles together; "spatial_unpad" then cuts off
            what padding added and ends each row with ``newline``, as it does the tokens of an image without
            tiles.
        image_size: (width, height) of the image, in pixels; of no account without tiles.
        grid_pinpoints: the configuration's resolutions.
        tile_edge: pixels of a tile's edge.
        newline: (D,).

    Raises:
        ValueError: if the tiles are not those of an image of that size, or the image is so narrow that none
            of their tokens would be left.
    """
    base, tiles = tokens[0], tokens[1:]
    if merge == "flat":
        return tokens.flatten(0, 1)
    newline = newline.to(tokens)[:, None] if merge == "spatial_unpad" else None  # (D, 1)
    if not len(tiles):
        return base if newline is None else torch.cat([base, newline.T])
    columns, rows = get_anyres_image_grid_shape(image_size, grid_pinpoints, tile_edge)
    if columns * rows != len(tiles):
        raise ValueError(
            f"an image of {image_size[0]} x {image_size[1]} pixels has {columns} x {rows} tiles and "
            f"{len(tiles)} were given; pass process_images' pixels and, as image_sizes, each image's (width, "
            "height)"
        )
    side = math.isqrt(tokens.shape[1])
    grid = tiles.unflatten(0, (rows, columns)).unflatten(2, (side, side))  # (rows, columns, y, x, D)
    plane = grid.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)  # (D, H, W)
    if newline is not None:
        plane = unpad_image(plane, image_size)
        if not plane.numel():
            raise ValueError(
                f"the image is too narrow ({image_size[0]} x {image_size[1]} pixels): none of its tiles' "
                "tokens would be left; crop it"
            )
        plane = torch.cat([plane, newline[:, None].expand(-1, plane.shape[1], -1)], 2)
    return torch.cat([base, plane.flatten(1).T])
