"""Reading and writing video files by PyAV (FFmpeg), an optional package.

Frames are turned upright by the rotation that the file records. Deliberately absent: sound, seeking.

Legend: H height, W width, C 3 channels (RGB).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.files import VIDEO_SUFFIXES
from ssld.shared.images import UnreadableImage

_TICKS = (
    90_000  # per second: MPEG's clock; at 24, 25, 30, 50 and 60 frames per second a frame is a whole number of ticks
)


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of a video.

    Attributes:
        number: 0, 1, ... in display order.
        seconds: since the first frame.
        pixels_HWC: uint8 RGB.
    """

    number: int
    seconds: float
    pixels_HWC: np.ndarray

    @property
    def pixels_CHW(self) -> Tensor:
        """uint8, a view."""
        return torch.from_numpy(self.pixels_HWC).permute(2, 0, 1)

    @property
    def width(self) -> int:
        return int(self.pixels_HWC.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels_HWC.shape[0])


def is_video(path: str) -> bool:
    """Whether a file is a video, by its name; a GIF by its content, since most have one frame."""
    if not path.lower().endswith(".gif"):
        return path.lower().endswith(VIDEO_SUFFIXES)
    try:
        with Image.open(path) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # PIL raises many kinds for damaged files
        return False


def require_av(path: str) -> None:
    """Raise UserError where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError(
            f"{path}: is a video, and PyAV, which reads them, is not installed: pip install 'av>=18', "
            "or leave videos out by a pattern ('photos/**/*.jpg')"
        ) from None


def read_frames(path: str) -> Iterator[Frame]:
    """Yield the frames of a video.

    Raises `UnreadableImage` where FFmpeg fails: at once for a file that is no video, later for one that is damaged later on.
    """
    import av

    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise UnreadableImage(path, "has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or 25)
            first: float | None = None
            for number, frame in enumerate(container.decode(stream)):
                seconds = number / rate if frame.time is None else float(frame.time)
                first = seconds if first is None else first
                yield Frame(number, round(seconds - first, 6), _upright(frame))
    except av.FFmpegError as error:
        raise UnreadableImage(path, error.strerror or str(error)) from None


class VideoFile:
    """MP4 file (H.264) written frame by frame; a context manager, completed at its end.

    Args:
        width, height: of the frames; an odd last column or row is repeated, since the format needs even numbers.
        rate: nominal frames per second; players use the time of each frame.

    Attributes:
        size: (width, height) of the frames.
    """

    def __init__(self, path: Path, width: int, height: int, rate: float) -> None:
        import av

        self._container = av.open(str(path), "w", format="mp4")
        self._stream: Any = self._container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "20", "preset": "veryfast"}
        self._stream.codec_context.time_base = Fraction(1, _TICKS)
        self.size, self._last = (width, height), -1

    def add(self, pixels_HWC: np.ndarray, seconds: float) -> None:
        """Add a frame, uint8 RGB, in the order of times."""
        import av

        height, width = pixels_HWC.shape[:2]
        assert (width, height) == self.size, "frames of one size"
        if width % 2 or height % 2:
            pixels_HWC = np.pad(pixels_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
        self._last = max(self._last + 1, round(seconds * _TICKS))
        frame.pts, frame.time_base = self._last, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()


def _upright(frame: Any) -> np.ndarray:
    pixels_HWC: np.ndarray = frame.to_ndarray(format="rgb24")
    # PyAV's angle is counter-clockwise, as is NumPy's turn.
    return np.ascontiguousarray(np.rot90(pixels_HWC, round(frame.rotation / 90)))
