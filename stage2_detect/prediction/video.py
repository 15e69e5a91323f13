"""Prediction on videos: the detections of a video are one file, written after its last frame; a killed run starts the video again.

Then the drawn video is written, for which the video is read a second time.

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
from ssld.stage2_detect.prediction.files import DrawingsAndCrops, drawn_names
from ssld.stage2_detect.prediction.video_file import Frame, VideoFile, read_frames


def frame_name(video: str, number: int) -> str:
    """Name a frame as `ffmpeg -i VIDEO -start_number 0 VIDEO/%06d.jpg` does, in a folder named as the video."""
    return f"{video}/{number:06d}.jpg"


class FrameReader:
    """Iterate over the readable frames of a video; `error` is the reason if decoding stopped early."""

    def __init__(self, path: str) -> None:
        self.path, self.error = path, ""

    def __iter__(self) -> Iterator[Frame]:
        try:
            yield from read_frames(self.path)
        except UnreadableImage as error:
            self.error = error.reason


class VideoDetections:
    """Detections of a video, frame by frame."""

    def __init__(self, category_ids: Sequence[Id]) -> None:
        self._category_ids = category_ids
        self.seconds: list[float] = []
        self.sizes: list[tuple[int, int]] = []
        self.rows: list[tuple[int, list[dict[str, Any]]]] = []
        self.best = 0.0

    def add(self, frame: Frame, detections: Detections, best: float) -> None:
        """Add the next frame; `best` is the highest score in it, below the threshold too."""
        self.seconds.append(frame.seconds)
        self.sizes.append((frame.width, frame.height))
        if len(detections.scores_N):
            self.rows.append((frame.number, list(result_rows(0, detections, self._category_ids))))
        self.best = max(self.best, best)


class VideoParts:
    """Detections in the videos `names` of `folder`: one file per video, below `kept`."""

    def __init__(self, kept: Path, folder: str, names: Sequence[str]) -> None:
        self.folder, self.names, self._kept = folder, list(names), kept

    def files(self) -> list[Path]:
        """List the files of all videos, existing or not."""
        return [self._file(name) for name in self.names]

    def left(self) -> list[str]:
        """List the videos whose file is missing or damaged. Raises UserError for a file of another video."""
        return [name for name in self.names if not is_sound(self._file(name)) or not self.read(name)]

    def write(self, name: str, detections: VideoDetections, error: str) -> None:
        """Write the file of a video; `error` is the reason if decoding stopped early, else empty."""
        content = {
            "video": name,
            "seconds": detections.seconds,
            "sizes": detections.sizes,
            "found": detections.rows,
        }
        self._kept.mkdir(exist_ok=True)
        write_with_sum(
            self._file(name), json.dumps(content | {"best": detections.best, "error": error}, allow_nan=False)
        )

    def read(self, name: str) -> dict[str, Any]:
        """Read the file of a video. Raises UserError for a file of another video."""
        content: dict[str, Any] = json.loads(self._file(name).read_text(encoding="utf-8"))
        if content["video"] != name:
            raise UserError(
                f"{self._kept.parent}: was started on other videos than `images` holds now; give another --output or delete it"
            )
        return content

    def entries(
        self, name: str, video_id: int, ids_before: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]], dict[Id, list[dict[str, Any]]], float]:
        """Build the COCO entry of a video, entries of its frames, and rows by image id, and return the highest score.

        Ids of frames are `ids_before` + 1, + 2, ...
        """
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
            ids_before + number + 1: [row | {"image_id": ids_before + number + 1} for row in of_frame]
            for number, of_frame in content["found"]
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
    """Write the drawn video below pictures/, as MP4, and the crops of its frames; returns None where no frame can be read."""
    file = output / "pictures" / drawn_names(parts.names, ".mp4", (".mp4",))[name]
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
            detections = _detections(rows.get(frame.number, []), category_ids)
            image = Image.fromarray(frame.pixels_HWC)
            if files.cropping:
                files.crops(frame_name(name, frame.number), image, detections)
            if files.drawing:
                drawn = draw_objects(image, detections, class_names)
                video = video or stack.enter_context(VideoFile(temporary, *drawn.size, rate))
                video.add(np.asarray(drawn.resize(video.size)), frame.seconds)  # some videos change their size
    return file


def _detections(rows: Sequence[dict[str, Any]], category_ids: Sequence[Id]) -> Detections:
    """Convert rows of COCO's results of one frame to detections."""
    boxes_N4 = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).view(-1, 4)
    boxes_N4[:, 2:] += boxes_N4[:, :2]
    labels_N = torch.tensor([category_ids.index(row["category_id"]) for row in rows], dtype=torch.int64)
    masks = [row["segmentation"] for row in rows] if rows and "segmentation" in rows[0] else None
    return Detections(boxes_N4.float(), torch.tensor([row["score"] for row in rows]), labels_N, masks)


def _rate(seconds: Sequence[float]) -> float:
    """Average frames per second; 25 where the times do not give it."""
    return (
        round((len(seconds) - 1) / (seconds[-1] - seconds[0]), 3)
        if len(seconds) > 1 and seconds[-1] > seconds[0]
        else 25.0
    )
