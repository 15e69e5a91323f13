"""The parts of a prediction over many pictures: which pictures, what is found in them, what becomes of it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from shared.config import did_you_mean
from shared.errors import UserError
from shared.processes import DTYPES
from stage2_detect.batches import load_record
from stage2_detect.coco import CocoData, CocoImage, Id
from stage2_detect.coco_ap import result_rows
from stage2_detect.coco_table import read_table
from stage2_detect.detector_file import LoadedDetector
from stage2_detect.drawing import draw_objects
from stage2_detect.models.batch import Detections
from stage2_detect.pictures import Pictures, find_pictures, records_of
from stage2_detect.predict_config import PredictConfig
from stage2_detect.prediction_files import Parts, coco_json
from stage2_detect.scoring import detections, loader_of


@dataclass(frozen=True)
class Work:
    """The pictures of a run.

    Attributes:
        folder: the one that was given, or the deepest that holds them all.
        names: their paths below it, by id.
        records: of those whose header can be read; ids are 1, 2, ... in the order of the names.
        unreadable: names of the others.
        excluded: how many pictures were left out.
    """

    folder: str
    names: dict[Id, str]
    records: list[CocoImage]
    unreadable: list[str]
    excluded: int = 0

    def describe(self) -> str:
        """A line for the log."""
        left_out = f", {self.excluded} more are excluded" if self.excluded else ""
        return f"{len(self.names)} pictures below {self.folder}{left_out}"


def find_work(config: PredictConfig) -> Work:
    """The pictures that `config` names. Raises UserError where there are none, and where `exclude` names none of them."""
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
    by_id: dict[Id, str] = dict(enumerate(names, 1))
    records, unreadable = records_of(Pictures(folder, names), list(by_id))
    return Work(folder, by_id, records, unreadable, excluded)


def check_detector(config: PredictConfig, loaded: LoadedDetector) -> None:
    """Raises UserError for classes that the detector does not have, and for test-time augmentation of masks."""
    for name in config.classes:
        if name not in loaded.class_names:
            hint = did_you_mean(name, list(loaded.class_names))
            raise UserError(f"classes: {config.model} does not know {name!r}{hint}")
    if config.tta and loaded.has_masks:
        raise UserError(
            f"tta: views are merged by their boxes, but the detector {config.model} gives masks; leave tta out"
        )


def detect_parts(
    config: PredictConfig,
    loaded: LoadedDetector,
    parts: Parts,
    numbers: Sequence[int],
    work: Work,
    device: torch.device,
) -> Iterator[int]:
    """Detect in the parts with these numbers, in their order, and write each as soon as it is complete; its number is yielded then."""
    records = [record for number in numbers for record in parts.records[number]]
    part_of = {record.image_id: number for number in numbers for record in parts.records[number]}
    loader = loader_of(
        CocoData(config.images, False, loaded.class_names, loaded.category_ids, records),
        short_side=config.short_side or loaded.resize.val_short_side,
        long_side=config.long_side or loaded.resize.val_long_side,
        interpolation=loaded.resize.interpolation,
        kernel=loaded.resize.kernel,
        batch_size=config.batch_size,
        workers=config.workers,
        tta=config.tta,
        skip_unreadable=True,
    )
    wanted = set(config.classes or loaded.class_names)
    keep_K = torch.tensor([name in wanted for name in loaded.class_names])
    id_of = {record.path: record.image_id for record in records}

    def write(number: int, rows: dict[Id, list[dict[str, Any]]], best: float) -> int:
        unreadable = [[work.names[id_of[one.name]], one.reason] for one in loader.unreadable]
        here = {work.names[record.image_id] for record in parts.records[number]}
        parts.write(number, rows, [line for line in unreadable if line[0] in here], best)
        return number

    model = loaded.model.to(device)
    seen = detections(model, loader, device=device, dtype=DTYPES[config.precision], tta=config.tta)
    written = set()
    for number, part in itertools.groupby(seen, key=lambda pair: part_of[pair[0].image_id]):
        rows: dict[Id, list[dict[str, Any]]] = {}
        best = 0.0
        for record, found in part:
            found = found.where(keep_K[found.labels_N])
            best = max([best, *found.scores_N.tolist()])
            found = found.where(found.scores_N >= config.least)
            if len(found.scores_N):
                rows[record.image_id] = list(result_rows(record.image_id, found, loaded.category_ids))
            if config.draws:
                _draw(config.output / "pictures", work.names[record.image_id], record, found, loaded.class_names)
        written.add(number)
        yield write(number, rows, best)
    for number in numbers:
        if number not in written:  # none of its pictures can be read
            yield write(number, {}, 0.0)


def assemble(
    config: PredictConfig, loaded: LoadedDetector, parts: Parts, work: Work
) -> tuple[dict[str, Any], list[str], float]:
    """(the COCO data set of all parts, the pictures that cannot be read, the best score of any box, below the threshold too).

    Raises UserError when no picture can be read, and for pseudo-labels when no box is left.
    """
    rows: dict[Id, list[dict[str, Any]]] = {}
    bad, best = set(work.unreadable), 0.0
    for part in parts.read_all():
        rows |= dict(part["found"])
        bad |= {name for name, _ in part["unreadable"]}
        best = max(best, part["best"])
    if len(bad) == len(work.names):
        raise UserError(f"none of the {len(bad)} pictures of {config.images} can be read; the first is {min(bad)}")
    shown = [record for record in work.records if work.names[record.image_id] not in bad]
    if config.pseudo_labels:
        shown = [record for record in shown if record.image_id in rows]
        if not shown:
            of = f" of {', '.join(config.classes)}" if config.classes else ""
            raise UserError(
                f"{config.images}: no box{of} with a score of {config.least:g} or more in {len(work.names)} pictures; the best has {best:.2f}: "
                "give a lower --threshold, or a detector that fits these pictures"
            )
    info = {
        "description": "found by a detector",
        "detector": loaded.metadata.get("content_sha256"),
        "threshold": config.least,
    }
    categories = dict(zip(loaded.category_ids, loaded.class_names, strict=True))
    names = [work.names[record.image_id] for record in shown]
    return coco_json(shown, names, rows, categories, info), sorted(bad), best


def picture_file(folder: Path, name: str) -> Path:
    """Where the drawing of a picture lies: a JPEG below `folder`, at the picture's own path."""
    return folder / (name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg")


def _draw(folder: Path, name: str, record: CocoImage, found: Detections, class_names: Sequence[str]) -> None:
    file = picture_file(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(load_record(record).permute(1, 2, 0).numpy())
    draw_objects(picture, found, class_names).save(file, quality=92)
