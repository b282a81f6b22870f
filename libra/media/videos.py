"""Frames of video files."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from PIL import Image

from .pictures import check_size
from .sources import FILES, Limits, open_file, short_name

# FFmpeg's names. Left out are playlists (HLS, concat), which name other files and addresses.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,flv,ogg,asf,gif,mxf,"
    "nut,dv,rm"
)
_ROUNDING = 0.001  # seconds, to which some formats round a frame's time
# Where FFmpeg's display matrix puts the picture's axes (a, b, c, d) to what turns the picture so; without an
# entry it stays.
_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


class Video:
    """The frames of a video file, numbered as they are shown.

    Only regular files of the formats in ``CONTAINERS`` are opened: a playlist would make FFmpeg read what it
        names.

    Attributes:
        times: of each frame, in seconds from the first one's.
        rate: frames a second, on average.

    Raises:
        ValueError: for what is not a video file, and where PyAV is missing.
    """

    def __init__(self, path: str | os.PathLike, limits: Limits = FILES):
        try:
            import av
        except ImportError as error:
            raise ValueError(
                f"reading a video file needs PyAV ({error}); install it: pip install av"
            ) from error
        self._broken = (av.FFmpegError, EOFError, OSError, ValueError)
        self.name = short_name(os.fspath(path))
        try:
            self._file = open_file(path)
            whitelists = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
            self._container = av.open(self._file, container_options=whitelists)
            self._stream = next(iter(self._container.streams.video), None)
            points = self._packet_times() if self._stream else []
        except self._broken as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"the video {self.name} cannot be read ({reason}); give the path of a whole video file"
            ) from error
        if self._stream is None:
            raise ValueError(f"the video {self.name} has no pictures; give a video file")
        check_size((self._stream.width, self._stream.height), f"the video {self.name}", limits)
        self._stream.thread_type = "AUTO"
        self._points = sorted(points)
        start = self._points[0] if self._points else 0
        self.times = [float((point - start) * self._stream.time_base) for point in self._points]
        self.rate = float(self._stream.average_rate or Fraction(25))

    def _packet_times(self) -> list[int]:
        """In the stream's own unit; in the order of showing they number the frames, without decoding one."""
        shown = (
            packet for packet in self._container.demux(self._stream) if packet.size and not packet.is_discard
        )
        points = (packet.dts if packet.pts is None else packet.pts for packet in shown)
        return [point for point in points if point is not None]

    def __len__(self) -> int:
        return len(self.times)

    def frames(self, numbers: Sequence[int]) -> list[Image.Image]:
        """The frames of these numbers, turned upright."""
        try:
            pictures = {number: self._at(self._points[number]) for number in sorted(set(numbers))}
        except self._broken as error:
            raise ValueError(
                f"the video {self.name} cannot be decoded ({error}); give a whole video file"
            ) from error
        return [pictures[number] for number in numbers]

    def _at(self, point: int) -> Image.Image:
        """The frame of that time or, where the file ends before it can be decoded, the last one."""
        frame = None
        self._container.seek(point, stream=self._stream)  # to the key frame at or before it
        for frame in self._container.decode(self._stream):
            if frame.pts is not None and frame.pts >= point:
                break
        if frame is None:
            raise EOFError("it ends too early")
        turn = _TURNS.get(_axes(frame))  # type: ignore[arg-type]  # of any length
        return frame.to_image() if turn is None else frame.to_image().transpose(turn)


def _axes(frame) -> tuple[int, ...]:
    """The directions in a frame's display matrix; empty where it has none."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
            unit = max(map(abs, (a, b, c, d))) or 1
            return tuple(round(value / unit) for value in (a, b, c, d))
    return ()


def clip(times: Sequence[float], rate: float, start: float | None, end: float | None) -> range:
    """The numbers of the frames between two times in seconds, by the frames' own times.

    Each end is the last frame that has been shown by then, for a period of the rate or until the next one
    came. At a steady rate that is VideoLLaMA-2's rule, ``int(seconds * rate) - 1``. Where both ends are the
    same a clip lasts a second.
    """
    if start is not None and end is not None:
        start, end = sorted((max(start, 0.0), max(end, 0.0)))
        end = start + 1 if start == end else end
    shown_by = [min(time + 1 / rate, next_one) for time, next_one in zip(times, [*times[1:], float("inf")])]
    first, last = 0, len(times) - 1
    if start is not None:
        first = max(bisect_right(shown_by, start + _ROUNDING) - 1, 0)
    if end is not None:
        last = bisect_right(shown_by, end + _ROUNDING) - 1
    if start is not None and times and start > shown_by[-1] + _ROUNDING:
        return range(0)
    return range(first, last + 1)
