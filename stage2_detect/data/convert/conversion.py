"""Conversion of a data set in another format to COCO files, written to a folder and read back."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ssld.shared.errors import UserError
from ssld.shared.files import is_hidden
from ssld.shared.wording import some
from ssld.stage2_detect.config import ConvertDataConfig
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.coco_json import with_orientation
from ssld.stage2_detect.data.convert.hub import files_by_split, is_hub, read_hub
from ssld.stage2_detect.data.convert.imagefolder import imagefolder_splits, is_imagefolder, read_imagefolder
from ssld.stage2_detect.data.convert.labelme import is_labelme, labelme_files, read_labelme
from ssld.stage2_detect.data.convert.records import (
    Content,
    SourceData,
    check_split_name,
    coco_content,
    note_shared_images,
    settle_orientation,
)
from ssld.stage2_detect.data.convert.voc import read_voc
from ssld.stage2_detect.data.convert.voc_layout import find_voc, is_voc
from ssld.stage2_detect.data.convert.yolo import read_yolo
from ssld.stage2_detect.data.orientation import Orientation
from ssld.stage2_detect.layouts.others import other_tool
from ssld.stage2_detect.layouts.yolo import find_yolo

LOOKED_FOR = (
    "neither YOLO (data.yaml, or images/ and labels/) nor Pascal VOC (XML files in Annotations/ or beside the images) nor Parquet files "
    "nor LabelMe's JSON nor metadata.jsonl, .csv or .parquet of Hugging Face"
)


class Conversion(NamedTuple):
    """A converted data set, whose files are in a folder that the caller moves to its place."""

    data: SourceData
    contents: dict[str, Content]
    """by split; `folder` is that of its images"""
    orientation: Orientation


def find_splits(source: str) -> list[str] | None:
    """Return the names of the splits of a data set on the disk that can be converted; None for other data."""
    path = Path(source)
    if layout := find_yolo(path):
        return list(layout.places)
    if is_voc(path):
        return list(find_voc(path.resolve(), []).splits)
    if is_labelme(path):
        return list(labelme_files(path))
    if is_imagefolder(path):
        return imagefolder_splits(path)
    return list(files_by_split(path)) if is_hub(source) else None


def convert(config: ConvertDataConfig, folder: Path, *, may_be_empty: Collection[str] = ()) -> Conversion:
    """Convert a source; writes SPLIT.json for each split, and images that are inside Parquet files, to `folder`.

    Args:
        config: source and options; its output is not used.
        folder: an empty folder.
        may_be_empty: splits that are left out, with a note, where none of their images has an object.

    Raises:
        UserError: any fault of the data, naming file and line.
    """
    data = _read(config, folder)
    for split in data.splits:
        check_split_name(split, config.source)
    for split in [name for name in data.splits if name in may_be_empty]:
        if not data.tallies[split].dropped("box") and not any(image.objects for image in data.splits[split]):
            data.notes.append(f"{config.source}: {split}: no image has an object ({data.searched[split]}); not used")
            del data.splits[split]
    note_shared_images(data)
    orientation = settle_orientation(data)
    contents = {
        split: coco_content(data, split, source=config.source, allow_loss=config.allow_loss) for split in data.splits
    }
    for split, content in contents.items():
        file = folder / f"{split}.json"
        coco = with_orientation(content.data, orientation.convention)
        file.write_text(json.dumps(coco, allow_nan=False), encoding="utf-8")
        _read_back(file, data, split, content)
    return Conversion(data, contents, orientation)


def _read(config: ConvertDataConfig, folder: Path) -> SourceData:
    """Read the source with the reader of its format."""
    source, path = config.source, Path(config.source)
    if not is_hub(source) and not path.exists():
        raise UserError(f"source: {source}: no such file or folder")
    if layout := find_yolo(path):
        return read_yolo(layout, classes=config.classes, splits=config.splits)
    if is_voc(path):
        return read_voc(
            path,
            classes=config.classes,
            splits=config.splits,
            voc_inclusive=config.voc_inclusive,
            voc_difficult=config.voc_difficult,
        )
    if is_labelme(path):
        return read_labelme(path, classes=config.classes, splits=config.splits)
    if is_imagefolder(path):
        return read_imagefolder(path, classes=config.classes, splits=config.splits, box_format=config.box_format)
    if is_hub(source):
        return read_hub(
            source, pending=folder, classes=config.classes, splits=config.splits, box_format=config.box_format
        )
    raise UserError(f"source: {source}: {other_tool(path) or f'{LOOKED_FOR}; {content_of(path)}'}")


def content_of(path: Path) -> str:
    """Describe what is at a path whose format is unknown: `it holds a.txt, b.txt`."""
    names = sorted(one.name for one in path.iterdir() if not is_hidden(one.name)) if path.is_dir() else []
    return (
        f"it holds {some(names, 6)}" if names else "it is an empty folder" if path.is_dir() else "it is a single file"
    )


def _read_back(file: Path, data: SourceData, split: str, content: Content) -> None:
    """Read a written file as training and evaluation do, and compare it with the source."""
    coco = read_coco(file, content.folder, training=False, class_names=data.class_names)
    images = data.splits[split]
    objects = content.counts["objects"]
    sizes = [(image.width, image.height) for image in images]
    if (
        len(coco.images) != len(images)
        or coco.counts["boxes"] != objects
        or coco.counts["outside"] + coco.counts["degenerate"] + coco.counts["clipped"]
        or [(record.width, record.height) for record in coco.images] != sizes
    ):
        raise AssertionError(f"{file.name}: {coco.describe()}; expected {len(images)} images and {objects} objects")
