"""The parts of a prediction over many images and videos: which ones, what is found in them, what becomes of it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssld.shared.config.settings import did_you_mean
from ssld.shared.distributed.processes import DTYPES
from ssld.shared.errors import UserError
from ssld.shared.tally import Tally
from ssld.shared.wording import count
from ssld.stage2_detect.data.coco import CocoImage, Id
from ssld.stage2_detect.data.coco_json import ORIENTATION_KEY, read_table, result_rows
from ssld.stage2_detect.data.image_files import ImageFiles, find_images, records_of
from ssld.stage2_detect.data.loaders import ImageLoader
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.predict_config import PredictConfig
from ssld.stage2_detect.prediction.files import DrawingsAndCrops, Parts, coco_json, image_entry, stem
from ssld.stage2_detect.prediction.predictor import found_in_images
from ssld.stage2_detect.prediction.tiles import FileWindows, ImageWindow, pixels_of_window, window_batches
from ssld.stage2_detect.prediction.video import FoundInVideo, FrameReader, VideoParts
from ssld.stage2_detect.prediction.video_file import is_video, require_av

if TYPE_CHECKING:
    from ssld.stage2_detect.detector_file import LoadedDetector


@dataclass(frozen=True)
class Work:
    """The images and videos of a run.

    Attributes:
        folder: the one that was given, or the deepest that holds them all.
        names: paths of the images below it, by id.
        records: of those whose header can be read; ids are 1, 2, ... in the order of the names.
        unreadable: names of the others.
        videos: paths of the videos below the folder.
        excluded: how many images were left out.
        listed: what else lies in the folder that was given.
    """

    folder: str
    names: dict[Id, str]
    records: list[CocoImage]
    unreadable: list[str]
    videos: list[str]
    excluded: int = 0
    listed: Tally = field(default_factory=Tally)

    def describe(self) -> str:
        """What there is, for the log."""
        left_out = f", {self.excluded} more excluded" if self.excluded else ""
        return f"{self._amount()} below {self.folder}{left_out}"

    def tally(self, unreadable: Sequence[str]) -> Tally:
        """What was read and what was not, by suffix."""
        tally, videos = Tally(), set(self.videos)
        for name in unreadable:
            cause = f"that cannot be read ({Path(name).suffix.lower() or 'without a suffix'})"
            tally.drop("video" if name in videos else "image", cause, name)
        for what, names in (("image", set(self.names.values())), ("video", videos)):
            if names:
                tally.keep(what, len(names.difference(unreadable)))
        return tally

    def _amount(self) -> str:
        images, videos = count(len(self.names), "image"), count(len(self.videos), "video")
        return videos if not self.names else images if not self.videos else f"{images} and {videos}"


def find_work(config: PredictConfig) -> Work:
    """The images and videos that `config` names.

    Raises UserError where there are none, where `exclude` names none of them, where videos cannot be read here, and where files would be written over
    each other.
    """
    listed = Tally()
    folder, names = find_images(config.images, listed)
    excluded = 0
    if config.exclude:
        known = set(read_table(str(config.exclude), segmentations=False).file_names)
        excluded = sum(name in known for name in names)
        if not excluded:
            raise UserError(
                f"exclude: no image below {folder} has a file name of {config.exclude}, such as {min(known, default='')!r}; "
                "both have to be relative to the same folder"
            )
        names = [name for name in names if name not in known]
        if not names:
            raise UserError(f"exclude: {config.exclude} names all images of {config.images}; nothing is left")
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


def check_detector(config: PredictConfig, loaded: "LoadedDetector") -> None:
    """Raises UserError for classes that the detector does not have."""
    for name in config.classes:
        if name not in loaded.class_names:
            hint = did_you_mean(name, list(loaded.class_names))
            raise UserError(f"classes: {config.model} does not know {name!r}{hint}")


class Finder:
    """A detector that is asked as `config` says, on `device`; `each` is called after every image or frame."""

    def __init__(
        self, config: PredictConfig, loaded: "LoadedDetector", device: torch.device, each: Callable[[], None]
    ) -> None:
        self._each = each
        self.config, self.loaded, self.device = config, loaded, device
        self.sizing = Sizing.of(loaded.resize, short_side=config.short_side, long_side=config.long_side, tta=config.tta)
        wanted = set(config.classes or loaded.class_names)
        self._keep_K = torch.tensor([name in wanted for name in loaded.class_names])

    def found(self, loader: ImageLoader[ImageWindow]) -> Iterator[tuple[Any, Detections, float]]:
        """(image or frame, its objects of the wanted classes from the threshold on, best score of any of these classes), in the loader's order."""
        self.loaded.model.to(self.device)
        found = found_in_images(
            self.loaded.fast,
            loader,
            device=self.device,
            dtype=DTYPES[self.config.precision],
            threshold=self.config.least,
            keep_K=self._keep_K,
        )
        for one in found:
            yield one
            self._each()


def detect_parts(finder: Finder, parts: Parts, numbers: Sequence[int], work: Work) -> Iterator[int]:
    """Detect in the parts with these numbers, in their order, and write each as soon as it is complete; its number is yielded then."""
    config, loaded = finder.config, finder.loaded
    part_of = {record.image_id: number for number in numbers for record in parts.records[number]}
    batches = [
        batch
        for number in numbers  # no batch of two parts: they stay the same whatever parts are left to do
        for batch in window_batches(parts.records[number], config.batch_size, config.tile, config.overlap)
    ]
    loader = ImageLoader(batches, FileWindows(), finder.sizing, workers=config.workers, skip_unreadable=True)
    id_of = {record.path: record.image_id for record in work.records}
    files = DrawingsAndCrops(config, loaded.class_names)

    def write(number: int, rows: dict[Id, list[dict[str, Any]]], best: float) -> int:
        unreadable = {id_of[one.name]: one.reason for one in loader.unreadable}
        here = [record.image_id for record in parts.records[number] if record.image_id in unreadable]
        parts.write(number, rows, [[work.names[image_id], unreadable[image_id]] for image_id in here], best)
        return number

    written = set()
    with ThreadPoolExecutor(max(1, config.workers)) as pool:  # drawing and JPEG while the detector works
        seen = finder.found(loader) if batches else iter(())  # preparing the detector takes a second
        for number, part in itertools.groupby(seen, key=lambda one: part_of[one[0].image_id]):
            rows: dict[Id, list[dict[str, Any]]] = {}
            drawings = []
            best = 0.0
            for record, found, highest in part:
                best = max(best, highest)
                if len(found.scores_N):
                    rows[record.image_id] = list(result_rows(record.image_id, found, loaded.category_ids))
                if files.drawing or files.cropping:
                    drawings.append(pool.submit(files.write, work.names[record.image_id], record, found))
            for drawing in drawings:
                drawing.result()
            written.add(number)
            yield write(number, rows, best)
    for number in numbers:
        if number not in written:  # none of its images can be read
            yield write(number, {}, 0.0)


def detect_video(finder: Finder, videos: VideoParts, name: str) -> Iterator[int]:
    """Detect in a video and write its file at the end; the number of frames so far is yielded after each."""
    config = finder.config
    frames = FrameReader(f"{videos.folder}/{name}")
    loader = ImageLoader(
        window_batches(frames, config.batch_size, config.tile, config.overlap), pixels_of_window, finder.sizing
    )
    content = FoundInVideo(finder.loaded.category_ids)
    for one in finder.found(loader):
        content.add(*one)
        yield len(content.seconds)
    videos.write(name, content, frames.error)


def assemble(
    config: PredictConfig, loaded: "LoadedDetector", parts: Parts, videos: VideoParts, work: Work
) -> tuple[dict[str, Any], list[str], float]:
    """(the COCO data set of all parts, what cannot be read, the best score of any box, below the threshold too).

    Frames of videos follow the images, with the ids after theirs. Raises UserError when nothing can be read, and for
    pseudo-labels when no box is left.
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
        entry, frames, found, highest = videos.entries(name, len(entries) + 1, ids_before)
        if not frames:
            bad.add(name)
            continue
        entries.append(entry)
        images += frames
        rows |= found
        best = max(best, highest)
    if not images:
        raise UserError(f"nothing can be read in {count(len(bad), 'file')} of {config.images}; the first is {min(bad)}")
    if config.pseudo_labels:
        images = [one for one in images if one["id"] in rows]
        if not images:
            of = f" of {', '.join(config.classes)}" if config.classes else ""
            raise UserError(
                f"{config.images}: no box{of} with a score of {config.least:g} or more in {count(len(work.names), 'image')}; "
                f"the best has {best:.2f}: give a lower --threshold, or a detector that fits these images"
            )
    info = {
        "description": "found by a detector",
        "detector": loaded.metadata.get("content_sha256"),
        "threshold": config.least,
        ORIENTATION_KEY: "upright",
    }
    categories = dict(zip(loaded.category_ids, loaded.class_names, strict=True))
    return coco_json(images, rows, categories, info, entries), sorted(bad), best


def _check_names(names: Sequence[str]) -> None:
    """Raises UserError where two images differ in their suffix alone."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(stem(name), name)
        if other != name:
            raise UserError(
                f"write: labels and crops are named after their image without its suffix, which {other} and {name} share: "
                "predict them separately, by patterns, or leave yolo and crops out"
            )
