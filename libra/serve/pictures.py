"""Pictures and videos of a request, let in by the gate of :mod:`libra.media`."""

import re
import tempfile
from dataclasses import dataclass, field, replace

from PIL import Image

from ..media import SERVED, Limits, Video, open_image
from ..media.sources import read

MOST = 32  # pictures of a request, a video's frames among them
PIXELS = 100_000_000  # of all of them together
FRAMES = 8  # taken from a video where the request does not say how many
LONGEST_VIDEO = 20_000  # frames of the file
_LIST = re.compile(r"data:(video|image)/jpe?g;base64,[^,]*,", re.IGNORECASE)


@dataclass
class Album:
    """Opens the pictures of one request and keeps count of them.

    Attributes:
        limits: what the gate lets in; :func:`limits_of` makes them.
        count, pixels: what was opened so far.
    """

    limits: Limits
    count: int = field(default=0, init=False)
    pixels: int = field(default=0, init=False)

    def picture(self, source: str) -> Image.Image:
        """The RGB picture of a data URI or an address. Raises ValueError in one sentence."""
        self._room(1)
        return self._counted(self._open(source, f"no. {self.count + 1}"))

    def video(self, source: str, frames: int) -> list[Image.Image]:
        """Frames of a video, evenly spread from the first to the last one.

        Args:
            source: a data URI or an address of a video file, or a list of JPEG frames in one data URI:
                ``data:video/jpeg;base64,FRAME,FRAME,…``, of which all are taken.
            frames: how many are taken from a file.

        Raises:
            ValueError: in one sentence.
        """
        if _LIST.match(source):
            _, *parts = source.split(",")
            self._room(len(parts))
            heads = [f"data:image/jpeg;base64,{part}" for part in parts]
            return [self._counted(self._open(one, f"no. {i + 1} of a video")) for i, one in enumerate(heads)]
        self._room(frames)
        data = read(source, "the video", self.limits)
        with tempfile.NamedTemporaryFile(prefix="libra-serve-") as file:
            file.write(data)
            file.flush()
            try:
                pictures = self._frames(Video(file.name, self.limits), frames)
            except ValueError as error:  # its sentence names the file
                raise ValueError(str(error).replace(f"the video {file.name}", "the video")) from error
        return [self._counted(picture) for picture in pictures]

    def _open(self, source: str, name: str) -> Image.Image:
        return open_image(source, self.limits, name=name, say=lambda *remark: None)

    @staticmethod
    def _frames(video: Video, count: int) -> list[Image.Image]:
        length = len(video)
        if not 0 < length <= LONGEST_VIDEO:
            raise ValueError(
                f"the video has {length:,} frames; give one of 1 to {LONGEST_VIDEO:,}, or send its frames"
            )
        count = min(count, length)
        return video.frames([i * (length - 1) // max(count - 1, 1) for i in range(count)])

    def _room(self, more: int) -> None:
        if self.count + more > MOST:
            raise ValueError(f"the request has more than {MOST} pictures and frames; send fewer")

    def _counted(self, picture: Image.Image) -> Image.Image:
        self.count += 1
        self.pixels += picture.width * picture.height
        if self.pixels > PIXELS:
            raise ValueError(
                f"the pictures have more than {PIXELS:,} pixels together; scale them down or send fewer"
            )
        return picture


def limits_of(fetch: bool) -> Limits:
    """The gate's limits for a server: no files of this machine, and addresses only with ``fetch``, only of
    the public internet."""
    return replace(SERVED, addresses="public" if fetch else "none")
