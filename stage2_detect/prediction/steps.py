"""Steps of a prediction over many images and videos: list them, detect in each part, assemble the results."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ssld.shared.distributed.processes import DTYPES
from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage
from ssld.shared.tally import Tally
from ssld.shared.wording import count, did_you_mean
from ssld.stage2_detect.data.coco import CocoImage, Id
from ssld.stage2_detect.data.coco_json import read_table, result_rows
from ssld.stage2_detect.data.image_files import ImageFiles, find_images, records_of
from ssld.stage2_detect.data.loaders import ImageLoader
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.predict_config import PredictConfig
from ssld.stage2_detect.prediction.files import DrawingsAndCrops, Parts, data_set, image_entry, stem
from ssld.stage2_detect.prediction.predictor import detect_images
from ssld.stage2_detect.prediction.tiles import FileWindows, ImageWindow, pixels_of_window, window_batches
from ssld.stage2_detect.prediction.video import FrameReader, VideoDetections, VideoParts
from ssld.stage2_detect.prediction.video_file import is_video, require_av

if TYPE_CHECKING:
    from ssld.stage2_detect.detector_file import LoadedDetector

Item = TypeVar("Item")


@dataclass(frozen=True)
class Work:
    """Images and videos of a run.

    Attributes:
        folder: the given folder, or the deepest one that holds all files.
        names: paths of the images below it, by id.
        records: of images whose header can be read; ids are 1, 2, ... in the order of the names.
        unreadable: names of the other images.
        videos: paths of the videos below the folder.
        excluded: number of images left out by `exclude`.
        listed: other files in the given folder.
    """

    folder: str
    names: dict[Id, str]
    records: list[CocoImage]
    unreadable: list[str]
    videos: list[str]
    excluded: int = 0
    listed: Tally = field(default_factory=Tally)

    def describe(self) -> str:
        """Describe the amount of work, for the log."""
        left_out = f", {self.excluded} more excluded" if self.excluded else ""
        return f"{self._amount()} below {self.folder}{left_out}"

    def tally(self, unreadable: Sequence[str]) -> Tally:
        """Count readable and unreadable files, by suffix."""
        tally, videos = Tally(), set(self.videos)
        for name in unreadable:
            cause = f"that cannot be read ({Path(name).suffix.lower() or 'without a suffix'})"
            tally.drop("video" if name in videos else "image", cause, name)
        for what, names in (("image", set(self.names.values())), ("video", videos)):
            if names:
                tally.keep(what, len(names.difference(unreadable)))
        return tally

    def unreadable_of(self, records: Sequence[CocoImage], failed: Iterable[UnreadableImage]) -> list[list[str]]:
        """Return [name, reason] of each of these images whose file could not be decoded."""
        reason_of = {one.name: one.reason for one in failed}
        return [[self.names[one.image_id], reason_of[one.path]] for one in records if one.path in reason_of]

    def _amount(self) -> str:
        images, videos = count(len(self.names), "image"), count(len(self.videos), "video")
        return videos if not self.names else images if not self.videos else f"{images} and {videos}"


def find_work(config: PredictConfig) -> Work:
    """List the images and videos of `config.images`.

    Raises UserError where there are none, `exclude` matches none of them, PyAV is missing for videos, or files would overwrite each other.
    """
    listed = Tally()
    folder, names, excluded = list_names(config.images, config.exclude, listed)
    videos = [name for name in names if is_video(f"{folder}/{name}")]
    if videos:
        require_av(f"{folder}/{videos[0]}")
        if config.pseudo_labels:
            raise UserError(
                f"{folder}/{videos[0]}: is a video, and training takes images: "
                f"save its frames as images first (ffmpeg -i {videos[0]} frames/%06d.jpg)"
            )
        names = sorted(set(names).difference(videos))
    if config.writes("yolo", "yolo_scores", "crops"):
        _check_names(names)
    by_id: dict[Id, str] = dict(enumerate(names, 1))
    records, unreadable = records_of(ImageFiles(folder, names), list(by_id))
    return Work(folder, by_id, records, unreadable, videos, excluded, listed)


def list_names(images: str, exclude: Path | None, listed: Tally) -> tuple[str, list[str], int]:
    """List the images and videos of the setting `images` without those of the COCO file `exclude`.

    Returns:
        The folder, the paths below it, and the number of files left out by `exclude`. `listed` counts other files of a folder.

    Raises UserError where there are none, or `exclude` matches none of them, or all.
    """
    folder, names = find_images(images, listed)
    if exclude is None:
        return folder, names, 0
    known = set(read_table(str(exclude), segmentations=False).file_names)
    left = [name for name in names if name not in known]
    if len(left) == len(names):
        raise UserError(
            f"exclude: no image below {folder} has a file name of {exclude}, such as {min(known, default='')!r}; "
            "both have to be relative to the same folder"
        )
    if not left:
        raise UserError(f"exclude: {exclude} names all images of {images}; nothing is left")
    return folder, left, len(names) - len(left)


def check_detector(config: PredictConfig, loaded: "LoadedDetector") -> None:
    """Raise UserError for classes that the detector does not have."""
    for name in config.classes:
        if name not in loaded.class_names:
            hint = did_you_mean(name, list(loaded.class_names))
            raise UserError(f"classes: {config.model} does not know {name!r}{hint}")


class Runner:
    """Runs a detector with the settings of `config` on `device`; `each` is called after every image or frame."""

    def __init__(
        self, config: PredictConfig, loaded: "LoadedDetector", device: torch.device, each: Callable[[], None]
    ) -> None:
        self._each = each
        self.config, self.loaded, self.device = config, loaded, device
        self.sizing = Sizing.of(loaded.resize, short_side=config.short_side, long_side=config.long_side, tta=config.tta)
        kept = set(config.classes or loaded.class_names)
        self._keep_K = torch.tensor([name in kept for name in loaded.class_names])

    def detect(self, loader: ImageLoader[ImageWindow]) -> Iterator[tuple[Any, Detections, float]]:
        """Yield (image or frame, its detections of the requested classes from the threshold on, highest score of these classes)."""
        self.loaded.model.to(self.device)
        results = detect_images(
            self.loaded.fast,
            loader,
            device=self.device,
            dtype=DTYPES[self.config.precision],
            threshold=self.config.least,
            keep_K=self._keep_K,
        )
        for one in results:
            yield one
            self._each()


def by_part(
    results: Iterable[Item], part_of: Callable[[Item], int], numbers: Sequence[int]
) -> Iterator[tuple[int, Iterable[Item]]]:
    """Group the results of images by their part: yields (number of the part, its results), at last the parts of `numbers` without any result, none of
    whose images can be read.

    No batch may span two parts, so that a part is complete when its last result comes, and batches do not depend on which parts are left to do.
    """
    seen = set()
    for number, part in itertools.groupby(results, key=part_of):
        seen.add(number)
        yield number, part
    yield from ((number, ()) for number in numbers if number not in seen)


def detect_parts(runner: Runner, parts: Parts, numbers: Sequence[int], work: Work) -> Iterator[int]:
    """Detect in the parts with these numbers, in order; write each part when it is complete, then yield its number."""
    config, loaded = runner.config, runner.loaded
    part_of = {record.image_id: number for number in numbers for record in parts.records[number]}
    batches = [
        batch
        for number in numbers
        for batch in window_batches(parts.records[number], config.batch_size, config.tile, config.overlap)
    ]
    loader = ImageLoader(batches, FileWindows(), runner.sizing, workers=config.workers, skip_unreadable=True)
    files = DrawingsAndCrops(config, loaded.class_names, work.names.values())

    with ThreadPoolExecutor(max(1, config.workers)) as pool:  # drawing and JPEG while the detector works
        results = runner.detect(loader) if batches else iter(())  # preparing the detector takes a second
        for number, part in by_part(results, lambda one: part_of[one[0].image_id], numbers):
            rows: dict[Id, list[dict[str, Any]]] = {}
            drawings = []
            best = 0.0
            for record, detections, highest in part:
                best = max(best, highest)
                if len(detections.scores_N):
                    rows[record.image_id] = list(result_rows(record.image_id, detections, loaded.category_ids))
                if files.drawing or files.cropping:
                    drawings.append(pool.submit(files.write, work.names[record.image_id], record, detections))
            for drawing in drawings:
                drawing.result()
            parts.write(number, rows, work.unreadable_of(parts.records[number], loader.unreadable), best)
            yield number


def detect_video(runner: Runner, videos: VideoParts, name: str) -> Iterator[int]:
    """Detect in a video and write its file at the end; yields the number of frames so far after each."""
    config = runner.config
    frames = FrameReader(f"{videos.folder}/{name}")
    loader = ImageLoader(
        window_batches(frames, config.batch_size, config.tile, config.overlap), pixels_of_window, runner.sizing
    )
    content = VideoDetections(runner.loaded.category_ids)
    for one in runner.detect(loader):
        content.add(*one)
        yield len(content.seconds)
    videos.write(name, content, frames.error)


def assemble(
    config: PredictConfig, loaded: "LoadedDetector", parts: Parts, videos: VideoParts, work: Work
) -> tuple[dict[str, Any], list[str], float]:
    """Assemble all parts.

    Returns:
        The COCO data set, in which frames of videos follow the images; names of unreadable files; the highest score of any box, below the
        threshold too.

    Raises UserError when nothing can be read, and for pseudo-labels when no box reaches the threshold.
    """
    rows: dict[Id, list[dict[str, Any]]] = {}
    bad, best = set(work.unreadable), 0.0
    for part in parts.read_all():
        rows |= dict(part["found"])
        bad |= {name for name, _ in part["unreadable"]}
        best = max(best, part["best"])
    images = [image_entry(one, work.names[one.image_id]) for one in work.records]
    images = [one for one in images if one["file_name"] not in bad]
    entries: list[dict[str, Any]] = []
    for name in work.videos:
        ids_before = len(work.names) + sum(entry["frames"] for entry in entries)
        entry, frames, of_video, highest = videos.entries(name, len(entries) + 1, ids_before)
        if not frames:
            bad.add(name)
            continue
        entries.append(entry)
        images += frames
        rows |= of_video
        best = max(best, highest)
    if not images:
        raise UserError(f"nothing can be read in {count(len(bad), 'file')} of {config.images}; the first is {min(bad)}")
    if config.pseudo_labels:
        images = [one for one in images if one["id"] in rows]
        if not images:
            of = f" of {', '.join(config.classes)}" if config.classes else ""
            raise UserError(
                f"{config.images}: no box{of} with a score of {config.least:g} or more in {count(len(work.names), 'image')}; "
                f"the best has {best:.2f}: give a lower --score_threshold, or a detector that fits these images"
            )
    content = data_set(loaded, images, rows, description="detections", threshold=config.least, videos=entries)
    return content, sorted(bad), best


def _check_names(names: Sequence[str]) -> None:
    """Raise UserError where two images differ in their suffix alone."""
    by_stem: dict[str, str] = {}
    for name in names:
        other = by_stem.setdefault(stem(name), name)
        if other != name:
            raise UserError(
                f"write: labels and crops are named after their image without its suffix, which {other} and {name} share: "
                "predict them separately, by patterns, or leave yolo and crops out"
            )
