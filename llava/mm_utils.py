"""Images to pixels and prompts to token ids, as the published LLaVA checkpoints expect them."""

import ast
import math
import re
from pathlib import Path

import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import StoppingCriteria

from libra.media import COMMAND, FILES, check_size, open_image, to_rgb
from libra.utils.sentences import check_characters

from .constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX


def select_best_resolution(
    original_size: tuple[int, int], possible_resolutions: list[tuple[int, int]]
) -> tuple[int, int]:
    """The (width, height) that keeps most of an image's pixels; among equals the one with the least
    padding."""
    width, height = original_size

    def quality(resolution):
        w, h = resolution
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - w * h

    return max(possible_resolutions, key=quality)


def resize_and_pad_image(image: Image.Image, target_resolution: tuple[int, int]) -> Image.Image:
    """Scale an image into (width, height), its aspect kept, in the middle of a black canvas."""
    width, height = target_resolution
    scale_w, scale_h = width / image.width, height / image.height
    if scale_w < scale_h:
        size = width, min(math.ceil(image.height * scale_w), height)
    else:
        size = min(math.ceil(image.width * scale_h), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles of an image, row by row."""
    corners = [(x, y) for y in range(0, image.height, patch_size) for x in range(0, image.width, patch_size)]
    return [image.crop((x, y, x + patch_size, y + patch_size)) for x, y in corners]


def _pinpoints(grid_pinpoints: str | list) -> list[tuple[int, int]]:
    """Resolutions (width, height) from a checkpoint's ``image_grid_pinpoints``, a list or its text."""
    try:
        points = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
        points = [(int(width), int(height)) for width, height in points]
        if not points or any(min(point) < 1 or math.prod(point) > FILES.pixels for point in points):
            raise ValueError
    except (ValueError, TypeError, SyntaxError):
        raise ValueError(
            f"image_grid_pinpoints {grid_pinpoints!r} is not a list of [width, height] in pixels; correct"
            " config.json"
        ) from None
    return points


def get_anyres_image_grid_shape(
    image_size: tuple[int, int], grid_pinpoints: str | list, patch_size: int
) -> tuple[int, int]:
    """Tiles across and down for an image of (width, height); ``patch_size`` is a tile's edge in pixels."""
    width, height = select_best_resolution(image_size, _pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def process_anyres_image(image: Image.Image, processor, grid_pinpoints: str | list) -> torch.Tensor:
    """(1 + tiles, 3, H, W): the whole image squeezed into a square, then the tiles of its best resolution."""
    canvas = resize_and_pad_image(image, select_best_resolution(image.size, _pinpoints(grid_pinpoints)))
    edge = processor.size["shortest_edge"]
    pictures = [image.resize((edge, edge)), *divide_to_patches(canvas, processor.crop_size["height"])]
    return torch.stack([_pixels(picture, processor) for picture in pictures])


def unpad_image(tensor: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
    """Cut off what padding added to the feature map (C, H, W) of an image that was (width, height) in the
    beginning."""
    width, height = original_size
    rows, columns = tensor.shape[1:]
    if width / height > columns / rows:
        margin = (rows - int(height * (columns / width))) // 2
        return tensor[:, margin : rows - margin]
    margin = (columns - int(width * (rows / height))) // 2
    return tensor[:, :, margin : columns - margin]


def expand2square(pil_img: Image.Image, background_color: tuple[int, int, int] | int) -> Image.Image:
    """Pad an image to a square, itself in the middle."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    edge = max(width, height)
    square = Image.new(pil_img.mode, (edge, edge), background_color)
    square.paste(pil_img, ((edge - width) // 2, (edge - height) // 2))
    return square


def load_image(path_or_url: str | Path) -> Image.Image:
    """An upright RGB image from a file, an http(s) address or a data URI (see
    :func:`libra.media.open_image`).

    Raises:
        ValueError: if it is missing, cannot be fetched, is not a readable image, or is too large.
    """
    return open_image(path_or_url, COMMAND)


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """An RGB image from base64 text. Raises ValueError where it is none."""
    text = image.decode("ascii", "replace") if isinstance(image, bytes) else image
    return open_image(f"data:;base64,{text}", name="in base64")


def _pixels(image: Image.Image, processor) -> torch.Tensor:
    """(3, H, W) normalised pixels of one image.

    The scaling is Pillow's, by which the checkpoints were trained, whatever the processor's own: torchvision
    rounds some values to the next grey level. What is left for the processor is the crop and the
    normalisation.
    """
    edge = processor.size["shortest_edge"] if processor.do_resize else None
    if edge:
        short = min(image.size)
        image = image.resize(
            [int(edge * side / short) if side > short else edge for side in image.size], processor.resample
        )
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def process_images(
    images: list[Image.Image], image_processor, model_cfg
) -> torch.Tensor | list[torch.Tensor]:
    """Images to what the model takes, by the configuration's ``image_aspect_ratio``.

    "pad" pads to a square of the mean colour and None or "square" cuts the middle out: both give (B, 3, H,
    W). "anyres" gives (1 + tiles, 3, H, W) an image, stacked if the shapes agree, else as a list.

    Images are taken as they lie, since the caller knows their sizes; :func:`load_image` turns them upright.

    Raises:
        ValueError: for another ``image_aspect_ratio``, and for an image too large or too narrow to be padded
            or scaled.
    """
    images = [_as_it_lies(image) for image in images]
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect == "pad":
        background = tuple(int(mean * 255) for mean in image_processor.image_mean)
        pixels = [_pixels(expand2square(image, background), image_processor) for image in images]
    elif aspect == "anyres":
        pixels = [
            process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in images
        ]
    elif aspect in (None, "square"):
        pixels = [_pixels(image, image_processor) for image in images]
    else:
        raise ValueError(
            f"image_aspect_ratio {aspect!r} is unknown; use pad, anyres or square in the checkpoint's"
            " config.json"
        )
    return torch.stack(pixels) if len({picture.shape for picture in pixels}) == 1 else pixels


def _as_it_lies(image) -> Image.Image:
    if not isinstance(image, Image.Image):
        return open_image(image)
    check_size(image.size, "the image")
    return to_rgb(image)


def _encode(tokenizer, text: str) -> list[int]:
    """Token ids of one piece of a prompt.

    SentencePiece puts a space in front of every text; the Metaspace pre-tokenizer that stands for it only if
    there is none yet.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        backend is not None
        and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace)
        and text.startswith(" ")
    ):
        text = " " + text
    return tokenizer(text).input_ids


def tokenizer_image_token(
    prompt: str, tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | torch.Tensor:
    """Token ids of a prompt with ``image_token_index`` for every ``<image>``; an int64 tensor (S,) for "pt".

    Raises:
        ValueError: for other values of ``return_tensors``.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(
            f"return_tensors {return_tensors!r} is unknown; use 'pt' for a tensor or None for a list"
        )
    first, *rest = [_encode(tokenizer, piece) for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    # Each piece was given a bos; only the first keeps it.
    extra = 1 if first and first[0] == tokenizer.bos_token_id else 0
    ids = first + [token for piece in rest for token in [image_token_index, *piece[extra:]]]
    return torch.tensor(ids, dtype=torch.long) if return_tensors else ids


def special_spellings(tokenizer) -> set[str]:
    """What a tokenizer takes for one token with a meaning of its own, such as ``</s>``, wherever it stands in
    a text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {
        spelling
        for spelling in added.union(tokenizer.all_special_tokens)
        if re.fullmatch(r"\S{2,}", spelling)
    }


def as_text(text: str, tokenizer, spellings: set[str]) -> str:
    """Somebody else's text with a space inside each of ``spellings``, so that none of them does anything in a
    prompt.

    Raises:
        ValueError: where the tokenizer, which may change letters first, finds one all the same, and for what
            is not a character.
    """
    check_characters(text, "the text")
    longest_first = "|".join(re.escape(spelling) for spelling in sorted(spellings, key=len, reverse=True))
    text = re.sub(longest_first, lambda found: f"{found[0][0]} {found[0][1:]}", text) if spellings else text
    tokens = set(tokenizer.convert_tokens_to_ids(sorted(spellings))) - {tokenizer.unk_token_id, None}
    if tokens.intersection(tokenizer(text, add_special_tokens=False).input_ids):
        raise ValueError(
            f"the text holds one of {', '.join(sorted(spellings))} in letters that mean the same; leave it"
            " out"
        )
    return text


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path; for a ``checkpoint-*`` folder with its parent's name in front."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops a row that ends with a keyword's tokens or has the keyword in its newest text.

    Args:
        keywords: the texts to stop at.
        tokenizer: of the model.
        input_ids: (B, S) the prompt; what is generated may come with it or without it, as from embeddings.
    """

    def __init__(self, keywords: list[str], tokenizer, input_ids: torch.Tensor):
        self.keywords, self.tokenizer, self.input_ids = keywords, tokenizer, input_ids
        self.keyword_ids = []
        for keyword in keywords:
            ids = tokenizer(keyword).input_ids
            self.keyword_ids.append(
                torch.tensor(ids[1:] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else ids)
            )
        self.max_keyword_len = max(len(ids) for ids in self.keyword_ids)
        self.start_len = input_ids.shape[1]

    def __call__(self, output_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        """(B,) bool, True for the rows that are done."""
        with_prompt = torch.equal(output_ids[0, : self.start_len].cpu(), self.input_ids[0].cpu())
        new = output_ids[:, self.start_len :] if with_prompt else output_ids
        return torch.tensor([self._is_done(row) for row in new], dtype=torch.bool, device=output_ids.device)

    def _is_done(self, new: torch.Tensor) -> bool:
        if any(torch.equal(new[-len(ids) :].cpu(), ids) for ids in self.keyword_ids):
            return True
        text = self.tokenizer.decode(new[-self.max_keyword_len :], skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)
