"""The one gate for pictures and videos: whatever a caller gives becomes upright 8-bit RGB pictures, or one
sentence.

Nothing is allocated for a picture before its size was checked, no file is read that is not a regular one, and
no address is fetched unless the caller's :class:`Limits` allow it.
"""

from .pictures import BROKEN, check_size, data_uri, open_image, png, to_rgb
from .sources import COMMAND, FILES, FOLDER_RATE, SERVED, Limits, is_picture, picture_files, split_names
from .videos import Video, clip

__all__ = [
    "BROKEN",
    "COMMAND",
    "FILES",
    "FOLDER_RATE",
    "SERVED",
    "Limits",
    "Video",
    "check_size",
    "clip",
    "data_uri",
    "is_picture",
    "open_image",
    "picture_files",
    "png",
    "split_names",
    "to_rgb",
]
