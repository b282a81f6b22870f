"""A picture of any kind to the upright 8-bit RGB picture that every model here sees, and pictures as PNG."""

import base64
import os
import struct
import sys
from collections.abc import Callable
from contextlib import contextmanager
from io import BytesIO
from threading import Lock

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from .sources import FILES, Limits, read, short_name, within

# Left out are the formats for which Pillow runs another program (EPS) and those that nobody photographs in.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
# What Pillow raises for a damaged picture.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)
Say = Callable[[str, str], None]
_STRICT = Lock()  # the switch is the process's


def note(what: str, remark: str) -> None:
    """One line on stderr."""
    print(f"note: {what} {remark}", file=sys.stderr)


def open_image(source, limits: Limits = FILES, *, name: str | None = None, say: Say = note) -> Image.Image:
    """A picture as every model here sees it: upright by its EXIF orientation, 8 bits a channel, RGB.

    Transparency is dropped as ``convert("RGB")`` does, an animation is its first frame; both are said. 16
    bits are scaled to 8 by their high byte, and numbers by :func:`to_bytes`.

    Args:
        source: a file's name (``~`` is the home folder), an http(s) address, a data URI, the bytes of a file,
            a PIL image, or an array or tensor of shape (H, W), (H, W, C) or (C, H, W) with 1 to 4 channels.
        limits: what is let in.
        name: of the picture in messages; by default its source.
        say: is given the picture's name and what was dropped, the two parts of a sentence.

    Returns:
        An RGB image; a PIL image that is already one is returned itself.

    Raises:
        ValueError: in one sentence, for what cannot be read, is not a picture, or passes a limit.
    """
    what = f"the image {short_name(name) if name else _name_of(source)}"
    if isinstance(source, (str, os.PathLike)):
        image = _decode(read(os.fsdecode(source), what, limits), what, limits, say)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        image = _decode(within(bytes(source), what, limits), what, limits, say)
    elif isinstance(source, Image.Image):
        image = _load(source, what, limits)
    else:
        image = _from_numbers(source, what, limits)
    return to_rgb(_upright(image), what, say)


def _name_of(source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return short_name(os.fsdecode(source))
    if isinstance(source, Image.Image):
        return short_name(os.fsdecode(getattr(source, "filename", ""))) or "given"
    return f"given as {type(source).__name__}"


def check_size(size: tuple[int, int], what: str, limits: Limits = FILES) -> None:
    """Raises ValueError for a picture of (width, height) that would cost too much, padded to a square or
    scaled."""
    width, height = size
    if min(size) < 1:
        raise ValueError(f"{what} has no pixels ({width} × {height}); give another one")
    if max(size) > limits.ratio * min(size):
        raise ValueError(
            f"{what} is too narrow ({width} × {height} pixels, at most {limits.ratio}:1 is taken); crop it"
        )
    if max(size) ** 2 > limits.pixels:
        raise ValueError(
            f"{what} is too large ({width} × {height} pixels; at most {int(limits.pixels**0.5):,} a side are "
            "taken); scale it down"
        )


def to_rgb(image: Image.Image, what: str = "the image", say: Say = note) -> Image.Image:
    """A picture of any of Pillow's modes in RGB; itself where it is already that.

    Raises:
        ValueError: for numbers that are no colours (see :func:`to_bytes`).
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        numbers = np.asarray(image)
        if image.mode == "I" and image.format in ("PNG", "PPM"):  # how Pillow opens some with 16 bits
            numbers = numbers.astype(np.uint16)
        return Image.fromarray(to_bytes(numbers, what)).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert("RGBA") if image.mode == "RGBa" else Image.merge("LA", image.split())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]  # one band
            say(what, "is transparent in places; the colours stored there are taken, without a background")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_bytes(numbers: np.ndarray, what: str = "the image") -> np.ndarray:
    """Numbers of any type as uint8 of the same shape.

    8 bits stay as they are and 16 bits give their high byte, whether their type says so or their values;
    floats from 0 to 1 are scaled to 255, and others are taken for 0 to 255.

    Raises:
        ValueError: for negative numbers, NaN, and numbers beyond all of these ranges.
    """
    if numbers.dtype == np.uint8:
        return numbers
    if numbers.dtype == bool:
        return numbers.astype(np.uint8) * 255
    low, high = numbers.min(), numbers.max()
    if numbers.dtype.kind in "iu" and low >= 0 and high < 2**16:
        has_16_bits = high > 255 or numbers.dtype.kind == "u" and numbers.dtype.itemsize == 2
        return (numbers >> 8 if has_16_bits else numbers).astype(np.uint8)
    # Interpolation oversteps by a little; a largest value a little above 1 belongs to neither range.
    if numbers.dtype.kind == "f" and low >= -0.01 and (high <= 1.01 or 2 <= high <= 255.5):
        scale = 255.0 if high <= 1.01 else 1.0
        return np.rint(numbers.astype(np.float32) * scale).clip(0, 255).astype(np.uint8)
    raise ValueError(
        f"{what} has values from {low:g} to {high:g} ({numbers.dtype}); give 0 to 255, or 0 to 1 as floats"
    )


def _from_numbers(source, what: str, limits: Limits) -> Image.Image:
    """An array's or tensor's picture. Channels are looked for where its library has them: torch first, others
    last."""
    first = hasattr(source, "detach")
    if first:
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source  # numpy has no bfloat16
    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError):
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{what} is not a picture; give a file, an address, a PIL image, or an array of numbers"
        )
    shape = array.shape
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[:, :, None]
    places = [
        place for place in ((0, 2) if first else (2, 0)) if array.ndim == 3 and 1 <= array.shape[place] <= 4
    ]
    if not places:
        raise ValueError(
            f"{what} has the shape {tuple(shape)}; give (height, width), (height, width, channels) or"
            " (channels, height, width) with 1 to 4 channels"
        )
    array = np.moveaxis(array, places[0], 2)
    check_size(array.shape[1::-1], what, limits)
    values = np.ascontiguousarray(to_bytes(array, what))
    return Image.fromarray(
        values[:, :, 0] if values.shape[2] == 1 else values
    )  # two channels are grey and opacity


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except BROKEN:  # damaged notes about a picture do not make it unreadable
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _decode(data: bytes, what: str, limits: Limits, say: Say) -> Image.Image:
    """The first picture of a file's bytes."""
    Image.init()
    try:
        image: Image.Image = Image.open(
            BytesIO(data), formats=[kind for kind in FORMATS if kind in Image.OPEN]
        )
        several = (
            getattr(image, "is_animated", False) and image.format != "MPO"
        )  # an MPO's others are previews
    except UnidentifiedImageError as error:
        raise ValueError(f"{what} is in no known format; give a PNG, JPEG or WebP file") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{what} is too large (its header promises more than {limits.pixels:,} pixels)"
        ) from error
    except BROKEN as error:
        raise ValueError(f"{what} is damaged ({error}); give a whole file") from error
    image = _load(image, what, limits)
    if several:
        say(what, "has several frames; the first one is taken")
    return image


@contextmanager
def _whole_files():
    """Pillow refuses cut files, as it does by default: lmms-eval switches that off for its whole process."""
    with _STRICT:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _load(image: Image.Image, what: str, limits: Limits) -> Image.Image:
    check_size(image.size, what, limits)
    try:
        with _whole_files():
            image.load()
    except BROKEN as error:
        raise ValueError(f"{what} is damaged ({error}); give a whole file") from error
    return image


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_uri(image: Image.Image) -> str:
    """:func:`png` as text, as :func:`open_image` and browsers take it."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode('ascii')}"
