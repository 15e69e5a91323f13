"""Prediction on videos: what is found in one is a file, written when the video has been seen to its end; a killed run begins a video again.

Then the video is drawn, for which it is read a second time.

Legend: N objects of a frame.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssld.shared.checksums import is_sound, write_with_sum
from ssld.shared.errors import UserError
from ssld.shared.files import atomically
from ssld.shared.images import UnreadableImage
from ssld.stage2_detect.data.coco import Id
from ssld.stage2_detect.data.coco_json import result_rows
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.prediction.files import DrawingsAndCrops
from ssld.stage2_detect.prediction.video_file import Frame, VideoFile, read_frames


def frame_name(video: str, number: int) -> str:
    """A frame as a file name: what `ffmpeg -i VIDEO -start_number 0 VIDEO/%06d.jpg` would call it, in a folder named as the video."""
    return f"{video}/{number:06d}.jpg"


class FrameReader:
    """Iterates over the frames of a video. One that cannot be read, or not to its end, ends where it does, and `error` says why."""

    def __init__(self, path: str) -> None:
        self.path, self.error = path, ""

    def __iter__(self) -> Iterator[Frame]:
        try:
            yield from read_frames(self.path)
        except UnreadableImage as error:
            self.error = error.reason


class FoundInVideo:
    """What is found in a video, frame by frame."""

    def __init__(self, category_ids: Sequence[Id]) -> None:
        self._category_ids = category_ids
        self.seconds: list[float] = []
        self.sizes: list[tuple[int, int]] = []
        self.found: list[tuple[int, list[dict[str, Any]]]] = []
        self.best = 0.0

    def add(self, frame: Frame, found: Detections, best: float) -> None:
        """The next frame."""
        self.seconds.append(frame.seconds)
        self.sizes.append((frame.width, frame.height))
        if len(found.scores_N):
            self.found.append((frame.number, list(result_rows(0, found, self._category_ids))))
        self.best = max(self.best, best)


class VideoParts:
    """What has been found in the videos `names` of `folder`: a file each, below `kept`."""

    def __init__(self, kept: Path, folder: str, names: Sequence[str]) -> None:
        self.folder, self.names, self._kept = folder, list(names), kept

    def files(self) -> list[Path]:
        """Of the videos, whether they are there or not."""
        return [self._file(name) for name in self.names]

    def left(self) -> list[str]:
        """The videos that have no file, or a damaged one. Raises UserError where a file is of another video."""
        return [name for name in self.names if not is_sound(self._file(name)) or not self.read(name)]

    def write(self, name: str, found: FoundInVideo, error: str) -> None:
        """Write the file of a video; `error` is why it ends before its end, if it does."""
        content = {"video": name, "seconds": found.seconds, "sizes": found.sizes, "found": found.found}
        self._kept.mkdir(exist_ok=True)
        write_with_sum(self._file(name), json.dumps(content | {"best": found.best, "error": error}, allow_nan=False))

    def read(self, name: str) -> dict[str, Any]:
        """The content of the file of a video. Raises UserError where it is of another."""
        content: dict[str, Any] = json.loads(self._file(name).read_text(encoding="utf-8"))
        if content["video"] != name:
            raise UserError(
                f"{self._kept.parent}: was begun on other videos than there are now; give another --output or delete it"
            )
        return content

    def entries(
        self, name: str, video_id: int, ids_before: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]], dict[Id, list[dict[str, Any]]], float]:
        """(COCO entry of a video, entries of its frames, rows by image id, best score); ids of frames follow `ids_before`."""
        content = self.read(name)
        seconds = content["seconds"]
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
            for number, (time, (width, height)) in enumerate(zip(seconds, content["sizes"], strict=True))
        ]
        rows: dict[Id, list[dict[str, Any]]] = {
            ids_before + number + 1: [row | {"image_id": ids_before + number + 1} for row in found]
            for number, found in content["found"]
        }
        entry = {"id": video_id, "file_name": name, "frames": len(frames)}
        if frames:
            entry |= {"width": frames[0]["width"], "height": frames[0]["height"], "frames_per_second": _rate(seconds)}
        return entry, frames, rows, content["best"]

    def _file(self, name: str) -> Path:
        return self._kept / f"video_{self.names.index(name):06d}.json"


def write_video(
    output: Path, parts: VideoParts, name: str, class_names: Sequence[str], category_ids: Sequence[Id], files: DrawingsAndCrops
) -> Path | None:  # fmt: skip
    """The drawn video, `pictures/NAME` as MP4, and the crops of its frames; None where no frame can be read."""
    file = video_file(output / "pictures", name)
    _, frames, rows, _ = parts.entries(name, 1, -1)  # a frame's id is its number
    if not frames:
        return None
    if file.exists() and not files.cropping:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    rate = _rate([frame["seconds"] for frame in frames])
    video: VideoFile | None = None
    with ExitStack() as stack:
        temporary = stack.enter_context(atomically(file)) if files.drawing else file
        for frame in itertools.islice(read_frames(f"{parts.folder}/{name}"), len(frames)):
            found = _detections(rows.get(frame.number, []), category_ids)
            image = Image.fromarray(frame.pixels_HWC)
            if files.cropping:
                files.crops(frame_name(name, frame.number), image, found)
            if files.drawing:
                drawn = draw_objects(image, found, class_names)
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
