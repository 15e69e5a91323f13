"""Prediction on videos: frames are detected in batches and kept in segments, so that a killed run goes on in the middle of a video.

Then the video is drawn, for which it is read a second time.

Legend: N objects of a frame.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.files import atomically, write_atomically
from ssld.shared.images import UnreadableImage
from ssld.stage2_detect.data.coco import Id
from ssld.stage2_detect.evaluation.coco_ap import result_rows
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.evaluation.tta import Sizes
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.prediction.loaders import Sizing, ahead
from ssld.stage2_detect.prediction.picture_files import PictureFiles
from ssld.stage2_detect.prediction.tiles import Window, windows_of
from ssld.stage2_detect.prediction.video_file import Frame, VideoFile, read_frames

_SEGMENT = 128  # frames


@dataclass(frozen=True, eq=False)
class FrameOf:
    """A frame, and the name of its video."""

    name: str
    frame: Frame
    width: int
    height: int


class ShownFrame(NamedTuple):
    """A window of a frame."""

    record: FrameOf
    window: Window


def frame_name(video: str, number: int) -> str:
    """A frame as a file name: what `ffmpeg -i VIDEO -start_number 0 VIDEO/%06d.jpg` would call it, in a folder named as the video."""
    return f"{video}/{number:06d}.jpg"


class Segments:
    """What has been found in the videos `names` of `folder`, in files of so many frames below `kept`."""

    def __init__(self, kept: Path, folder: str, names: Sequence[str], category_ids: Sequence[Id]) -> None:
        self.folder, self.names = folder, list(names)
        self._kept, self._category_ids = kept, category_ids
        self._there: dict[str, int] = {}  # segments of each video, so that writing looks at no earlier one again

    def read(self, name: str) -> list[dict[str, Any]]:
        """Those of a video that are there. Raises UserError where one is of another video."""
        found: list[dict[str, Any]] = []
        for number in itertools.count():
            file = self._file(name, number)
            if not file.exists():
                return found
            segment = json.loads(file.read_text(encoding="utf-8"))
            if segment["video"] != name:
                raise UserError(
                    f"{self._kept.parent}: was begun on other videos than there are now; give another --output or delete it"
                )
            found.append(segment)
        raise AssertionError("unreachable")

    def begun(self, name: str) -> int | None:
        """How many frames of a video are done; None when it is complete."""
        segments = self.read(name)
        if segments and segments[-1]["last"]:
            return None
        return sum(len(segment["seconds"]) for segment in segments)

    def write(self, name: str, frames: Sequence[tuple[FrameOf, Detections, float]], *, last: bool, error: str) -> None:
        """Write the next segment of a video; `error` is why it ends before its end, if it does."""
        number = self._there.get(name, 0)
        while self._file(name, number).exists():
            number += 1
        found = [
            [one.frame.number, list(result_rows(0, seen, self._category_ids))] for one, seen, _ in frames if len(seen.scores_N)
        ]  # fmt: skip
        content = {
            "video": name,
            "seconds": [one.frame.seconds for one, _, _ in frames],
            "sizes": [[one.width, one.height] for one, _, _ in frames],
            "found": found,
            "best": max((best for _, _, best in frames), default=0.0),
            "last": last,
            "error": error,
        }
        self._kept.mkdir(exist_ok=True)
        write_atomically(self._file(name, number), json.dumps(content, allow_nan=False))
        self._there[name] = number + 1

    def content(
        self, name: str, video_id: int, ids_before: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]], dict[Id, list[dict[str, Any]]], float]:
        """(COCO entry of a complete video, entries of its frames, rows by image id, best score); ids of frames follow `ids_before`."""
        segments = self.read(name)
        seconds = [one for segment in segments for one in segment["seconds"]]
        sizes = [one for segment in segments for one in segment["sizes"]]
        frames: list[dict[str, Any]] = [
            {
                "id": ids_before + number + 1,
                "file_name": frame_name(name, number),
                "width": width,
                "height": height,
                "video_id": video_id,
                "frame": number,
                "seconds": time,
            }
            for number, (time, (width, height)) in enumerate(zip(seconds, sizes, strict=True))
        ]
        rows: dict[Id, list[dict[str, Any]]] = {
            ids_before + number + 1: [row | {"image_id": ids_before + number + 1} for row in found]
            for segment in segments
            for number, found in segment["found"]
        }
        entry = {"id": video_id, "file_name": name, "frames": len(frames)}
        if frames:
            entry |= {"width": frames[0]["width"], "height": frames[0]["height"], "frames_per_second": _rate(seconds)}
        return entry, frames, rows, max((segment["best"] for segment in segments), default=0.0)

    def _file(self, name: str, number: int) -> Path:
        return self._kept / f"video_{self.names.index(name):06d}_{number:06d}.json"


class FrameLoader:
    """Iterates over (batch, the windows in it) of what is left of the videos `begun`, a dict of names and frames that are done.

    The next batch is decoded while one is in use. A video that cannot be read, or not to its end, is noted in `errors`.
    """

    def __init__(
        self, folder: str, begun: dict[str, int], sizing: Sizing, batch_size: int, tile: int | None, overlap: float
    ) -> None:
        self.errors: dict[str, str] = {}
        self._folder, self._begun, self._sizing = folder, begun, sizing
        self._batch_size, self._tile, self._overlap = batch_size, tile, overlap

    def __iter__(self) -> Iterator[tuple[ImageBatch | Sizes, list[ShownFrame]]]:
        return ahead(self._batches())

    def _batches(self) -> Iterator[tuple[ImageBatch | Sizes, list[ShownFrame]]]:
        for name, start in self._begun.items():
            shown: list[ShownFrame] = []
            for frame in self._frames(name, start):
                if frame.number % _SEGMENT == 0 and shown:  # batches are the same after a new start
                    yield self._batch(shown)
                    shown = []
                record = FrameOf(name, frame, frame.width, frame.height)
                shown += [
                    ShownFrame(record, window)
                    for window in windows_of(frame.width, frame.height, self._tile, self._overlap)
                ]
                while len(shown) >= self._batch_size:
                    yield self._batch(shown[: self._batch_size])
                    shown = shown[self._batch_size :]
            if shown:
                yield self._batch(shown)

    def _batch(self, shown: list[ShownFrame]) -> tuple[ImageBatch | Sizes, list[ShownFrame]]:
        images = [one.window.of(torch.from_numpy(one.record.frame.pixels_HWC).permute(2, 0, 1)) for one in shown]
        return self._sizing.batch(images), shown

    def _frames(self, name: str, start: int) -> Iterator[Frame]:
        try:
            yield from read_frames(f"{self._folder}/{name}", start=start)
        except UnreadableImage as error:
            self.errors[name] = error.reason


def detect_videos(
    found: Callable[[FrameLoader], Iterator[tuple[FrameOf, Detections, float]]],
    segments: Segments,
    loader: FrameLoader,
    begun: dict[str, int],
) -> Iterator[tuple[str, int]]:
    """Write the segments of the videos `begun`; yields (name, frames done so far) after each."""
    complete = set()
    seen = found(loader) if begun else iter(())  # preparing the detector takes a second
    for name, frames in itertools.groupby(seen, key=lambda one: one[0].name):
        done = begun[name]
        kept: list[tuple[FrameOf, Detections, float]] = []
        for one in frames:
            if len(kept) == _SEGMENT:  # only now, so that the last segment is known to be it
                segments.write(name, kept, last=False, error="")
                done, kept = done + len(kept), []
                yield name, done
            kept.append(one)
        segments.write(name, kept, last=True, error=loader.errors.get(name, ""))
        complete.add(name)
        yield name, done + len(kept)
    for name in begun:
        if name not in complete:  # no frame of it can be read, or none was left
            segments.write(name, [], last=True, error=loader.errors.get(name, ""))


def write_video(
    output: Path, segments: Segments, name: str, class_names: Sequence[str], category_ids: Sequence[Id], files: PictureFiles
) -> Path | None:  # fmt: skip
    """The drawn video, `pictures/NAME` as MP4, and the crops of its frames; None where no frame can be read."""
    file = video_file(output / "pictures", name)
    _, frames, rows, _ = segments.content(name, 1, -1)  # a frame's id is its number
    if not frames:
        return None
    if file.exists() and not files.cropping:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    rate = _rate([frame["seconds"] for frame in frames])
    video: VideoFile | None = None
    with ExitStack() as stack:
        temporary = stack.enter_context(atomically(file)) if files.drawing else file
        for frame in itertools.islice(read_frames(f"{segments.folder}/{name}"), len(frames)):
            found = _detections(rows.get(frame.number, []), category_ids)
            picture = Image.fromarray(frame.pixels_HWC)
            if files.cropping:
                files.crops(frame_name(name, frame.number), picture, found)
            if files.drawing:
                drawn = draw_objects(picture, found, class_names)
                video = video or stack.enter_context(VideoFile(temporary, *drawn.size, rate))
                video.add(np.asarray(drawn.resize(video.size)), frame.seconds)  # some videos change their size
    return file


def video_file(folder: Path, name: str) -> Path:
    """Where the drawing of a video lies: an MP4 below `folder`, at the video's own path."""
    return folder / (name if name.lower().endswith(".mp4") else f"{name}.mp4")


def _detections(rows: Sequence[dict[str, Any]], category_ids: Sequence[Id]) -> Detections:
    """Rows of COCO's results, all of one frame."""
    boxes_N4 = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).view(-1, 4)
    boxes_N4[:, 2:] += boxes_N4[:, :2]
    labels_N = torch.tensor([category_ids.index(row["category_id"]) for row in rows], dtype=torch.int64)
    masks = [row["segmentation"] for row in rows] if rows and "segmentation" in rows[0] else None
    return Detections(boxes_N4.float(), torch.tensor([row["score"] for row in rows]), labels_N, masks)


def _rate(seconds: Sequence[float]) -> float:
    """Frames a second, in the mean."""
    return (
        round((len(seconds) - 1) / (seconds[-1] - seconds[0]), 3)
        if len(seconds) > 1 and seconds[-1] > seconds[0]
        else 25.0
    )
