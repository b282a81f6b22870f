"""Where an image's visual tokens lie and what became of them, for the page that draws them.

A *view* is a dictionary that becomes JSON: ``picture``, None for the picture that was asked about, "" for an
empty ground, else a data URI; and ``boxes``, for each of its tokens [left, top, right, bottom] as fractions
of that picture, or None for a token without a place. Boxes may lie outside the picture, on its padding.
"""

import torch
from PIL import Image

from libra import Compression
from libra.engine.places_on_pictures import Block
from libra.engine.trace import GONE, RowTrace, intervals
from libra.media import data_uri
from libra.methods import SELECTORS
from libra.places import BEFORE, IN_WORDS, INPUT

from ..mm_utils import get_anyres_image_grid_shape
from ..model.anyres import arrange_tiles

LONG_SIDE = 640  # pixels of a view's picture, at most


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


def of_boxes(boxes: list[torch.Tensor], size: tuple[int, int]) -> list[dict]:
    """The views of :func:`token_boxes` over an image of (width, height) pixels."""
    views = []
    for view in boxes:
        shares = (view / torch.tensor(size * 2)).tolist()
        views.append({"picture": None, "boxes": [_rounded(box) for box in shares]})
    return views


def of_blocks(blocks: list[Block]) -> list[dict]:
    """The views of a Hugging Face processor's blocks, each with the picture that the model saw."""
    views = []
    for block in blocks:
        boxes = []
        for i in range(block.tokens):
            y, x = divmod(i, block.width)
            edges = [
                x / block.columns,
                y / block.rows,
                (x + 1) / block.columns,
                (y + 1) / block.rows,
            ]
            boxes.append(_rounded(edges) if x < block.columns else None)
        views.append({"picture": _small(block.picture), "boxes": boxes})
    return views


def _rounded(box: list[float]) -> list[float] | None:
    return None if box[0] != box[0] else [round(edge, 5) for edge in box]


def _small(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    small = picture.copy()
    small.thumbnail((LONG_SIDE, LONG_SIDE))
    return data_uri(small)


def stages_of(trace: RowTrace, compression: Compression) -> list[dict]:
    """What each compression did, as JSON values.

    ``where`` in words; ``left``: tokens that are left; for each of the picture's n tokens ``fate`` (a number
    of :data:`libra.engine.trace.FATES`), ``slot`` (the target that it went into, -1 for none), ``weight``
    (its share there), ``importance`` (None where it is not known) and ``interval`` (its number; None for a
    method without intervals and for a list of steps).
    """
    stages = []
    per_interval = compression.steps is None and SELECTORS[compression.select].per_interval
    for number, stage in enumerate(trace.stages):
        where = IN_WORDS[INPUT] if stage.layer == BEFORE else f"after layer {stage.layer}"
        runs = intervals(trace, number)
        runs[stage.fate == GONE] = -1
        stages.append(
            {
                "where": where,
                "left": len(trace.kept(number)),
                "fate": stage.fate.tolist(),
                "slot": stage.slot.tolist(),
                "weight": _short(stage.weight),
                "importance": _short(stage.importance),
                "interval": runs.tolist() if per_interval else None,
            }
        )
    return stages


def _short(values: torch.Tensor) -> list[float | None]:
    return [None if value != value else float(f"{value:.4g}") for value in values.tolist()]
