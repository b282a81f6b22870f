"""Where pictures come from: files, addresses, data URIs, lists of names and folders, and how much of each is
taken."""

import base64
import binascii
import errno
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

SUFFIXES = frozenset(
    (
        ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .avif"
        " .jp2 .j2k .heic .heif"
    ).split()
)
FOLDER_RATE = 3  # frames a second that a folder of pictures stands for
_SHOWN = 120  # characters of a name in a message


@dataclass(frozen=True)
class Limits:
    """What a caller lets in.

    Attributes:
        bytes: of a picture's file, body or text.
        pixels: of a picture, and of the square that it is padded to. The default is where Pillow itself
            refuses.
        ratio: of the longer side to the shorter one; models scale by the shorter one.
        seconds: for a whole download.
        files: whether names of files are taken.
        addresses: "none" of http(s), "public" ones only, or "any".
    """

    bytes: int = 256 * 2**20
    pixels: int = 178_956_970
    ratio: int = 200
    seconds: float = 60.0
    files: bool = True
    addresses: str = "none"


FILES = Limits()  # of data sets and folders
COMMAND = Limits(addresses="any")  # of a command that a user types
SERVED = Limits(bytes=20 * 2**20, pixels=36_000_000, seconds=20.0, files=False)  # of somebody else's request


def read(text: str, what: str, limits: Limits) -> bytes:
    """What a file's name, an address or a data URI stands for."""
    kind = text[:8].lower()
    if kind.startswith("data:"):
        return within(_data_uri(text, what, limits), what, limits)
    if kind.startswith(("http://", "https://")):
        if limits.addresses == "none":
            raise ValueError(f"{what} is an address, which is not taken here; give a file or a data URI")
        from .fetch import fetch

        try:
            return fetch(text, limits.bytes, limits.seconds, public_only=limits.addresses == "public")
        except ValueError as error:
            raise ValueError(
                f"{what} cannot be fetched: {error}; check the address, or give a file"
            ) from error
    if not limits.files:
        raise ValueError(
            "files of this machine are not read here; send the image itself, as a data URI for example"
        )
    try:
        with open_file(text) as file:
            return within(file.read(limits.bytes + 1), what, limits)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{what} cannot be opened ({reason}); give the path of an image file") from error


def within(data: bytes, what: str, limits: Limits) -> bytes:
    if len(data) > limits.bytes:
        raise ValueError(f"{what} has more than {limits.bytes:,} bytes; scale it down")
    return data


def _data_uri(text: str, what: str, limits: Limits) -> bytes:
    about, comma, content = text.partition(",")
    if len(content) > 4 * limits.bytes:  # more than any of the two ways to write it needs
        raise ValueError(f"{what} has more than {limits.bytes:,} bytes; scale it down")
    try:
        if not comma:
            raise ValueError("there is no comma in it")
        data = unquote_to_bytes(content)
        return (
            base64.b64decode(b"".join(data.split()), validate=True)
            if about.lower().endswith(";base64")
            else data
        )
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{what} is damaged ({error}); give the whole text") from error


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A regular file for reading; ``~`` is the home folder. A pipe or a device is refused and never waited
    for.

    Raises:
        OSError: where there is none.
    """
    path = os.path.expanduser(path)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def short_name(text: str) -> str:
    """A file's name or an address as messages show it."""
    if text[:5].lower() == "data:":
        return "in the data URI"
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]}…{text[-19:]}"


def split_names(text: str, separator: str = ",") -> list[str]:
    """The names in a list of files, addresses and data URIs; a separator inside one is recognised where such
    a file exists, and in an address or a data URI."""
    parts, names = text.split(separator), []
    while parts:
        count = _parts_of_a_file(parts, separator)
        if parts[0].strip().lower().startswith("data:"):
            count = 2 if separator == "," else 1
        elif parts[0].strip().lower().startswith(("http://", "https://")):
            count = 1
            while count < len(parts) and not _begins_a_name(parts[count].strip()):
                count += 1
        name = separator.join(parts[:count]).strip()
        names += [name] if name else []
        parts = parts[count:]
    return names


def _parts_of_a_file(parts: list[str], separator: str) -> int:
    """How many parts, from the first, make the longest name of an existing file; 1 where there is none."""
    for count in range(min(len(parts), 20), 1, -1):
        if _exists(separator.join(parts[:count]).strip()):
            return count
    return 1


def _begins_a_name(part: str) -> bool:
    return (
        part.lower().startswith(("http://", "https://", "data:"))
        or _exists(part)
        or Path(part).suffix.lower() in SUFFIXES
    )


def _exists(name: str) -> bool:
    with suppress(ValueError, OSError):  # a name that no file can have
        return os.path.exists(os.path.expanduser(name))
    return False


def natural(name: str) -> list[str | int]:
    """A sort key by which frame 2 comes before frame 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def picture_files(folder: str | os.PathLike) -> list[Path]:
    """The pictures in a folder, in natural order; hidden files and files of other kinds are left out.

    Raises:
        ValueError: for a folder without one, or that cannot be read.
    """
    try:
        entries = list(Path(os.path.expanduser(folder)).iterdir())
    except OSError as error:
        raise ValueError(f"the folder {short_name(str(folder))} cannot be read ({error.strerror})") from error
    files = [
        path for path in entries if is_picture(path.name) and not path.name.startswith(".") and path.is_file()
    ]
    if not files:
        raise ValueError(
            f"the folder {short_name(str(folder))} holds no pictures; give a folder of PNG or JPEG frames"
        )
    return sorted(files, key=lambda path: natural(path.name))


def is_picture(name: str) -> bool:
    """Whether a file's name ends as a picture's does."""
    return Path(name).suffix.lower() in SUFFIXES
