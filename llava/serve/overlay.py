"""What became of an image's visual tokens, drawn on the image."""

import torch
from PIL import Image, ImageDraw

from libra.engine.trace import COMPENSATION, DROPPED, GONE, MERGED, TARGET, StageTrace

from ..mm_utils import get_anyres_image_grid_shape
from ..model.anyres import arrange_tiles

LONG_SIDE = 480  # pixels of a drawing
LEGEND = (
    "yellow frame: target · blue: merged into one · orange: in the compensation token · dark: dropped "
    "· black: gone before"
)
_FRAME = (255, 214, 0)
# What lies over a token: red, green, blue and opacity.
_SHADES = {
    GONE: (0, 0, 0, 225),
    DROPPED: (0, 0, 0, 165),
    MERGED: (0, 114, 178, 130),
    COMPENSATION: (213, 94, 0, 150),
}


def token_boxes(image_size: tuple[int, int], model) -> list[torch.Tensor] | None:
    """Where the visual tokens of an image lie on it.

    Args:
        image_size: (width, height) in pixels.
        model: a LLaVA model, by whose configuration the image was processed.

    Returns:
        One tensor (n, 4) of left, top, right and bottom a view, in the tokens' order: of the whole image and,
        where it is cut into tiles, of the tiles. A newline token has no place: nan. None for models whose
        tokens are no parts of an image.
    """
    if model.takes_videos:  # the connector of videos mixes neighbouring patches of several frames
        return None
    tower, config, (width, height) = model.get_vision_tower(), model.config, image_size
    side, edge = tower.num_patches_per_side, tower.config.image_size
    corner = torch.arange(side) / side
    y, x = torch.meshgrid(corner, corner, indexing="ij")
    unit = torch.stack([x, y, x + 1 / side, y + 1 / side], -1).flatten(0, 1)  # (P, 4) of a square of edge 1
    aspect = getattr(config, "image_aspect_ratio", None)
    if aspect != "anyres":
        square = max(image_size) if aspect == "pad" else min(image_size)
        return [unit * square + torch.tensor([(width - square) / 2, (height - square) / 2] * 2)]
    columns, rows = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, edge)
    scale = min(columns * edge / width, rows * edge / height)
    border = torch.tensor([(columns * edge - width * scale) / 2, (rows * edge - height * scale) / 2] * 2)
    tiles = [(unit + torch.tensor([c, r] * 2)) * edge for r in range(rows) for c in range(columns)]
    boxes = torch.stack(
        [unit * torch.tensor([width, height] * 2), *((tile - border) / scale for tile in tiles)]
    )
    # The model's own way of putting tiles together puts their boxes in the order of the tokens.
    merge = getattr(config, "mm_patch_merge_type", "flat")
    newline = torch.full((4,), torch.nan)
    ordered = arrange_tiles(boxes, merge, image_size, config.image_grid_pinpoints, edge, newline)
    return list(ordered.split([len(unit), len(ordered) - len(unit)]))


def draw_stage(image: Image.Image, boxes: list[torch.Tensor], stage: StageTrace) -> Image.Image:
    """The image, once for each of :func:`token_boxes`' views side by side, with what a compression layer did
    to its tokens: targets framed, the others shaded (see ``LEGEND``).

    Raises:
        ValueError: if the record is of another number of tokens.
    """
    count = sum(map(len, boxes))
    if len(stage.fate) != count:
        raise ValueError(
            f"the image has {count} visual tokens and the record {len(stage.fate)}; record only the image"
        )
    scale = LONG_SIDE / max(image.size)
    size = [max(1, round(edge * scale)) for edge in image.size]
    base = image.convert("RGB").resize(size)
    views = []
    for view, fates in zip(boxes, stage.fate.split([len(view) for view in boxes])):
        shade = Image.new("RGBA", base.size)
        frames, draw = [], ImageDraw.Draw(shade)
        for box, fate in zip((view * scale).tolist(), fates.tolist()):
            if box[0] != box[0]:  # a newline's nan
                continue
            left, top, right, bottom = (round(edge) for edge in box)
            place = left, top, max(left, right - 1), max(top, bottom - 1)
            if fate == TARGET:
                frames.append(place)
            else:
                draw.rectangle(place, fill=_SHADES[fate])
        picture = Image.alpha_composite(base.convert("RGBA"), shade).convert("RGB")
        pen = ImageDraw.Draw(picture)
        for place in frames:
            pen.rectangle(place, outline=_FRAME)
        views.append(picture)
    whole = Image.new("RGB", (len(views) * (base.width + 8) - 8, base.height), "white")
    for i, view in enumerate(views):
        whole.paste(view, (i * (base.width + 8), 0))
    return whole
