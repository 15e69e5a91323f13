"""The parts of a prediction over many pictures and videos: which ones, what is found in them, what becomes of it."""

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ssld.shared.config.settings import did_you_mean
from ssld.shared.distributed.processes import DTYPES
from ssld.shared.errors import UserError
from ssld.shared.run_dir import RunDir
from ssld.shared.wording import count, duration
from ssld.stage2_detect.data.coco import CocoImage, Id
from ssld.stage2_detect.data.coco_json import read_table
from ssld.stage2_detect.data.image_files import Pictures, find_pictures, records_of
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.evaluation.coco_ap import result_rows
from ssld.stage2_detect.evaluation.scoring import detections
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.predict_config import PredictConfig
from ssld.stage2_detect.prediction.files import Parts, coco_json, picture_entry
from ssld.stage2_detect.prediction.loaders import PictureLoader, Sizing, batches_of
from ssld.stage2_detect.prediction.picture_files import PictureFiles, stem
from ssld.stage2_detect.prediction.tiles import merged_windows
from ssld.stage2_detect.prediction.video import FrameLoader, Segments
from ssld.stage2_detect.prediction.video_file import is_video, require_av


@dataclass(frozen=True)
class Work:
    """The pictures and videos of a run.

    Attributes:
        folder: the one that was given, or the deepest that holds them all.
        names: paths of the pictures below it, by id.
        records: of those whose header can be read; ids are 1, 2, ... in the order of the names.
        unreadable: names of the others.
        videos: paths of the videos below the folder.
        excluded: how many pictures were left out.
    """

    folder: str
    names: dict[Id, str]
    records: list[CocoImage]
    unreadable: list[str]
    videos: list[str]
    excluded: int = 0

    def describe(self) -> str:
        """What there is, for the log."""
        left_out = f", {self.excluded} more excluded" if self.excluded else ""
        return f"{self._amount()} below {self.folder}{left_out}"

    def _amount(self) -> str:
        pictures, videos = count(len(self.names), "picture"), count(len(self.videos), "video")
        return videos if not self.names else pictures if not self.videos else f"{pictures} and {videos}"


def find_work(config: PredictConfig) -> Work:
    """The pictures and videos that `config` names.

    Raises UserError where there are none, where `exclude` names none of them, where videos cannot be read here, and where files would be written over
    each other.
    """
    folder, names = find_pictures(config.images)
    excluded = 0
    if config.exclude:
        known = set(read_table(str(config.exclude), segmentations=False).file_names)
        excluded = sum(name in known for name in names)
        if not excluded:
            raise UserError(
                f"exclude: no picture below {folder} has a file name of {config.exclude}, such as {min(known, default='')!r}; "
                "both have to be relative to the same folder"
            )
        names = [name for name in names if name not in known]
        if not names:
            raise UserError(f"exclude: {config.exclude} names all pictures of {config.images}; nothing is left")
    videos = [name for name in names if is_video(f"{folder}/{name}")]
    if videos:
        require_av(f"{folder}/{videos[0]}")
        if config.pseudo_labels:
            raise UserError(
                f"{folder}/{videos[0]}: is a video, and training takes pictures: "
                f"save its frames as pictures first (ffmpeg -i {videos[0]} frames/%06d.jpg)"
            )
        names = sorted(set(names).difference(videos))
    if config.writes("yolo", "yolo_scores", "crops"):
        _check_names(names)
    by_id: dict[Id, str] = dict(enumerate(names, 1))
    records, unreadable = records_of(Pictures(folder, names), list(by_id))
    return Work(folder, by_id, records, unreadable, videos, excluded)


def check_detector(config: PredictConfig, loaded: LoadedDetector) -> None:
    """Raises UserError for classes that the detector does not have."""
    for name in config.classes:
        if name not in loaded.class_names:
            hint = did_you_mean(name, list(loaded.class_names))
            raise UserError(f"classes: {config.model} does not know {name!r}{hint}")


class PictureClock:
    """How fast this process's pictures and frames are done, as text and, on a terminal of the main process, as a bar above which log lines stand.

    `pictures` is how many there are, the frames of videos not counted, whose number nobody knows before.
    """

    def __init__(self, run: RunDir, pictures: int) -> None:
        self._run, self._pictures, self._done, self._began = run, pictures, 0, time.perf_counter()
        self._bar: tqdm | None = None
        if run.main and sys.stderr.isatty():
            self._print, run.write = run.write, tqdm.write
            self._bar = tqdm(total=pictures or None, unit="picture", dynamic_ncols=True, file=sys.stderr)

    def seen(self) -> None:
        """One more."""
        self._done += 1
        if self._bar:
            self._bar.update()

    def describe(self) -> str:
        """`3.2 a second, 4 min to go`."""
        rate = self._done / max(time.perf_counter() - self._began, 1e-9)
        left = self._pictures - self._done
        return f"{rate:.3g} a second" + (f", {duration(left / rate)} to go" if left > 0 < rate else "")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.close()
            self._bar, self._run.write = None, self._print


class Finder:
    """A detector that is asked as `config` says, on `device`; `each` is called after every picture or frame."""

    def __init__(
        self, config: PredictConfig, loaded: LoadedDetector, device: torch.device, each: Callable[[], None]
    ) -> None:
        self._each = each
        self.config, self.loaded, self.device = config, loaded, device
        self.sizing = Sizing.of(
            loaded.resize,
            short_side=config.short_side,
            long_side=config.long_side,
            tta_sides=config.tta.short_sides if config.tta else None,
        )
        wanted = set(config.classes or loaded.class_names)
        self._keep_K = torch.tensor([name in wanted for name in loaded.class_names])

    def found(self, loader: PictureLoader | FrameLoader) -> Iterator[tuple[Any, Detections, float]]:
        """(picture or frame, its objects of the wanted classes from the threshold on, best score of any of these classes), in the loader's order."""
        config = self.config
        model = self.loaded.model.to(self.device)
        batches: Iterable[tuple[Any, Sequence[Any]]] = loader
        seen = detections(model, batches, device=self.device, dtype=DTYPES[config.precision], tta=config.tta)
        for _, views in itertools.groupby(seen, key=lambda pair: id(pair[0].record)):
            parts, best = [], 0.0
            for shown, found in views:
                found = found.where(self._keep_K[found.labels_N])
                best = max([best, *found.scores_N.tolist()])
                parts.append((shown.window, found.where(found.scores_N >= config.least)))
            record = shown.record
            yield record, merged_windows(parts, record.width, record.height), best
            self._each()


def detect_parts(finder: Finder, parts: Parts, numbers: Sequence[int], work: Work) -> Iterator[int]:
    """Detect in the parts with these numbers, in their order, and write each as soon as it is complete; its number is yielded then."""
    config, loaded = finder.config, finder.loaded
    part_of = {record.image_id: number for number in numbers for record in parts.records[number]}
    batches = [
        batch
        for number in numbers  # no batch of two parts: they stay the same whatever parts are left to do
        for batch in batches_of(parts.records[number], config.batch_size, config.tile, config.overlap)
    ]
    loader = PictureLoader(batches, finder.sizing, config.workers)
    id_of = {record.path: record.image_id for record in work.records}
    files = PictureFiles(config, loaded)

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
        if number not in written:  # none of its pictures can be read
            yield write(number, {}, 0.0)


def assemble(
    config: PredictConfig, loaded: LoadedDetector, parts: Parts, segments: Segments, work: Work
) -> tuple[dict[str, Any], list[str], float]:
    """(the COCO data set of all parts, what cannot be read, the best score of any box, below the threshold too).

    Frames of videos follow the pictures, with the ids after theirs. Raises UserError when nothing can be read, and for
    pseudo-labels when no box is left.
    """
    rows: dict[Id, list[dict[str, Any]]] = {}
    bad, best = set(work.unreadable), 0.0
    for part in parts.read_all():
        rows |= dict(part["found"])
        bad |= {name for name, _ in part["unreadable"]}
        best = max(best, part["best"])
    images = [picture_entry(one, work.names[one.image_id]) for one in work.records]
    images = [one for one in images if one["file_name"] not in bad]
    videos: list[dict[str, Any]] = []
    for name in work.videos:
        entry, frames, found, highest = segments.content(name, len(videos) + 1, len(work.names) + _frames(videos))
        if not frames:
            bad.add(name)
            continue
        videos.append(entry)
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
                f"{config.images}: no box{of} with a score of {config.least:g} or more in {count(len(work.names), 'picture')}; "
                f"the best has {best:.2f}: give a lower --threshold, or a detector that fits these pictures"
            )
    info = {
        "description": "found by a detector",
        "detector": loaded.metadata.get("content_sha256"),
        "threshold": config.least,
    }
    categories = dict(zip(loaded.category_ids, loaded.class_names, strict=True))
    return coco_json(images, rows, categories, info, videos), sorted(bad), best


def _frames(videos: Sequence[dict[str, Any]]) -> int:
    return sum(video["frames"] for video in videos)


def _check_names(names: Sequence[str]) -> None:
    """Raises UserError where two pictures differ in their suffix alone."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(stem(name), name)
        if other != name:
            raise UserError(
                f"write: labels and crops are named after their picture without its suffix, which {other} and {name} share: "
                "predict them separately, by patterns, or leave yolo and crops out"
            )
