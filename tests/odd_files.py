"""Picture files of every odd kind, each with the pixels that it shows, and files that are no pictures."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageCms, features

SIZE = (24, 16)  # width, height
# What turns stored pixels upright, by EXIF orientation.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def scene() -> np.ndarray:
    """(16, 24, 3) uint8, different in every corner."""
    y, x = np.mgrid[0:16, 0:24]
    return np.stack([x * 10, y * 15, (x + y) * 6], -1).astype(np.uint8)


def grey(array: np.ndarray) -> np.ndarray:
    return np.repeat(array[:, :, None], 3, 2)


def png_16_bit(array: np.ndarray) -> bytes:
    """A colour PNG with 16 bits a channel, which Pillow does not write, of a uint16 array."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that promises so many pixels."""
    small = BytesIO()
    Image.new("1", (8, 8)).save(small, "PNG")
    data = bytearray(small.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def stored(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain_pixels(data: bytes) -> np.ndarray:
    """What lies in a file that nothing is odd about."""
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def _modes(picture: Image.Image, array: np.ndarray) -> dict[str, tuple[bytes, np.ndarray]]:
    """Name → the file and its pixels, of PNG's and TIFF's modes."""
    level = array[:, :, 0]
    deep = level.astype(np.uint16) * 256 + 7  # its high byte is the picture
    half = Image.fromarray(np.dstack([array, np.where(level > 100, 255, 40).astype(np.uint8)]))
    indexed = picture.quantize(64)
    colours = np.asarray(indexed.convert("RGB"))
    on = Image.fromarray(level > 100)
    return {
        "rgb.png": (stored(picture, "PNG"), array),
        "see through.png": (stored(half, "PNG"), array),
        "opaque.png": (stored(picture.convert("RGBA"), "PNG"), array),
        "palette.png": (stored(indexed, "PNG"), colours),
        "palette, a clear colour.png": (stored(indexed, "PNG", transparency=3), colours),
        "palette, clear colours.png": (stored(indexed, "PNG", transparency=bytes(range(0, 252, 4))), colours),
        "grey.png": (stored(Image.fromarray(level), "PNG"), grey(level)),
        "grey and clear.png": (stored(Image.fromarray(np.dstack([level, 255 - level])), "PNG"), grey(level)),
        "one bit.png": (stored(on, "PNG"), grey((level > 100).astype(np.uint8) * 255)),
        "16 bits.png": (stored(Image.fromarray(deep), "PNG"), grey(level)),
        "16 bits, dark.png": (
            stored(Image.fromarray(deep // 300), "PNG"),
            grey((deep // 300 // 256).astype(np.uint8)),
        ),
        "16 bits, colour.png": (png_16_bit(array.astype(np.uint16) * 256 + 9), array),
        "16 bits.tif": (stored(Image.fromarray(deep), "TIFF"), grey(level)),
        "float.tif": (stored(Image.fromarray(level.astype(np.float32) / 255), "TIFF"), grey(level)),
        "float to 255.tif": (stored(Image.fromarray(level.astype(np.float32)), "TIFF"), grey(level)),
        "32 bits.tif": (stored(Image.fromarray(level.astype(np.int32)), "TIFF"), grey(level)),
        "cmyk.tif": (
            stored(picture.convert("CMYK"), "TIFF"),
            np.asarray(picture.convert("CMYK").convert("RGB")),
        ),
        "16 bits.pgm": (b"P5 24 16 65535\n" + deep.astype(">u2").tobytes(), grey(level)),
    }


def _formats(picture: Image.Image, array: np.ndarray) -> dict[str, tuple[bytes, np.ndarray]]:
    """Other formats, animations, and profiles, which the models never saw applied."""
    other = Image.fromarray(255 - array)
    jpeg = stored(picture, "JPEG")
    usual = {
        "photo.jpg": jpeg,
        "grey.jpeg": stored(picture.convert("L"), "JPEG"),
        "cmyk.jpg": stored(picture.convert("CMYK"), "JPEG"),
        "progressive.JPG": stored(picture, "JPEG", progressive=True),
        "lossy.webp": stored(picture, "WEBP"),
        "still.gif": stored(picture, "GIF"),
    }
    files = {name: (data, plain_pixels(data)) for name, data in usual.items()}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    files |= {
        "profile.png": (stored(picture, "PNG", icc_profile=profile), array),
        "bitmap.bmp": (stored(picture, "BMP"), array),
        "plain.ppm": (stored(picture, "PPM"), array),
        "lossless.webp": (stored(picture, "WEBP", lossless=True), array),
        "pages.tif": (stored(picture, "TIFF", save_all=True, append_images=[other]), array),
        "moving.png": (stored(picture, "PNG", save_all=True, append_images=[other]), array),
        "moving.webp": (stored(picture, "WEBP", save_all=True, append_images=[other], lossless=True), array),
        "moving.gif": (stored(picture, "GIF", save_all=True, append_images=[other]), files["still.gif"][1]),
        "two in one.mpo": (stored(picture, "MPO", save_all=True, append_images=[other]), plain_pixels(jpeg)),
        "a jpeg named.png": files["photo.jpg"],
        "no suffix": files["photo.jpg"],
        "a, b,c.jpg": files["photo.jpg"],
        "~tilde.png": (stored(picture, "PNG"), array),
        "ünï ☃.png": (stored(picture, "PNG"), array),
    }
    if features.check("jpg_2000"):
        files["wavelets.jp2"] = (stored(picture, "JPEG2000", irreversible=False), array)
    return files


def _turned(picture: Image.Image, array: np.ndarray) -> dict[str, tuple[bytes, np.ndarray]]:
    jpeg = plain_pixels(stored(picture, "JPEG"))
    files = {}
    for orientation, turn in TURNS.items():
        files[f"turned {orientation}.jpg"] = (stored(picture, "JPEG", exif=exif(orientation)), turn(jpeg))
    files["turned.png"] = (stored(picture, "PNG", exif=exif(6)), TURNS[6](array))
    files["turned.webp"] = (stored(picture, "WEBP", lossless=True, exif=exif(8)), TURNS[8](array))
    files["turned to nowhere.jpg"] = (stored(picture, "JPEG", exif=exif(9)), jpeg)
    torn = stored(picture, "JPEG", exif=exif(6))
    place = torn.index(b"Exif\0\0") + 14
    files["torn notes.jpg"] = (torn[:place] + b"\xff\xff\xff" + torn[place + 3 :], jpeg)
    return files


def write(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """Name → the file written into ``folder``, and its pixels (H, W, 3) uint8, upright."""
    array = scene()
    picture = Image.fromarray(array)
    files = {**_modes(picture, array), **_formats(picture, array), **_turned(picture, array)}
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: (folder / name, np.ascontiguousarray(pixels)) for name, (_, pixels) in files.items()}


def write_bad(folder: Path) -> dict[str, str]:
    """Name → a part of the sentence that refuses it."""
    picture = Image.fromarray(scene())
    png = stored(picture, "PNG")
    files = {
        "text.png": (b"no image", "is in no known format"),
        "empty.jpg": (b"", "is in no known format"),
        "cut.png": (png[: len(png) // 2], "is damaged"),
        "cut.jpg": (stored(picture, "JPEG")[:400], "is damaged"),
        "script.eps": (stored(picture, "EPS"), "is in no known format"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is in no known format"),
        "stick.png": (png_of_size(1, 20000), "is too narrow (1 × 20000 pixels"),
        "longer stick.png": (png_of_size(1, 65000), "is too narrow (1 × 65000 pixels"),
        "flat.png": (png_of_size(3000, 1), "is too narrow (3000 × 1 pixels"),
        "wide.png": (png_of_size(14000, 2000), "is too large (14000 × 2000 pixels"),
        "bomb.png": (png_of_size(50000, 50000), "is too large"),
        "far from colours.tif": (
            stored(Image.fromarray(np.full((4, 4), 1e6, np.float32)), "TIFF"),
            "has values from 1e+06",
        ),
        "nan.tif": (
            stored(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
            "has values from nan",
        ),
        "negative.tif": (
            stored(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"),
            "has values from -5",
        ),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: sentence for name, (_, sentence) in files.items()}


# A conversation about a picture, in LLaVA's format.
ASKED = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "a"}]


def training_on(loaded, folder: Path, *names: str, **settings):
    """Training data of files in ``folder``, one question each, for a loaded model (tokenizer, model,
    processor, length); ``settings`` go to the data set, ``pictures`` in place of the model's own."""
    from llava.train.data import LazySupervisedDataset
    from llava.train.labels import training_template

    tokenizer, model, processor, _ = loaded
    pictures = SimpleNamespace(image_aspect_ratio=model.config.image_aspect_ratio, image_grid_pinpoints=None)
    return LazySupervisedDataset(
        [{"image": name, "conversations": ASKED} for name in names],
        tokenizer,
        training_template("v1"),
        processor,
        settings.pop("pictures", pictures),
        str(folder),
        str(folder),
        1024,
        **settings,
    )
