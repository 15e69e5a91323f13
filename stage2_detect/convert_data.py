"""Convert detection data in YOLO, Pascal VOC or Hugging Face layout to checked COCO JSON.

    python stage2_detect/convert_data.py --source datasets/pets/data.yaml --output data/pets

Writes SPLIT.json for each split, and result.json with counts of input and output. Images in folders stay where they are; images inside Parquet files
are written to SPLIT/. Files are written only if every split can be converted; dropped images and boxes are counted by cause, and a large loss stops
the run.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.shared.errors import UserError
from ssld.shared.files import is_hidden
from ssld.shared.wording import count, some
from ssld.stage2_detect.config import ConvertDataConfig

if TYPE_CHECKING:
    from ssld.stage2_detect.data.convert.records import Content, SourceData


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ConvertDataConfig, convert_data, argv, program="convert_data.py", torch_threads=False)


def convert_data(config: ConvertDataConfig) -> None:
    """Convert the source and write result.json. Raises UserError for any fault of the data, naming file and line."""
    from ssld.shared.run_dir import RunDir
    from ssld.stage2_detect.data.coco_json import with_orientation
    from ssld.stage2_detect.data.convert.records import (
        check_split_name,
        coco_content,
        note_shared_images,
        settle_orientation,
    )

    run = RunDir(config, "convert_data")
    if run.status == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    pending = run.path / ".pending"
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir()
    try:
        data = _read(config, pending)
        for split in data.splits:
            check_split_name(split, config.source)
        note_shared_images(data)
        orientation = settle_orientation(data)
        contents = {
            split: coco_content(data, split, source=config.source, allow_loss=config.allow_loss)
            for split in data.splits
        }
        for split, content in contents.items():
            file = pending / f"{split}.json"
            coco = with_orientation(content.data, orientation.convention)
            file.write_text(json.dumps(coco, allow_nan=False), encoding="utf-8")
            _read_back(file, data, split, content)
        run.log(f"{config.source}: {data.kind}, {len(data.class_names)} classes: {', '.join(data.class_names[:20])}")
        for note in [*data.notes, *([text] if (text := orientation.describe()) else [])]:
            run.log(note)
        metrics: dict[str, Any] = {"classes": data.class_names, "orientation": orientation.record(), "splits": {}}
        for split, content in contents.items():
            folder = _publish(run.path, pending, split, content.folder)
            metrics["splits"][split] = {**content.counts, "image_folder": str(folder)}
            run.log(_summary(run.path / f"{split}.json", folder, content))
            run.tell(split, split, content.tally)
    finally:
        shutil.rmtree(pending, ignore_errors=True)
    run.finish(metrics, [run.path / f"{split}.json" for split in contents])


def _read(config: ConvertDataConfig, pending: Path) -> "SourceData":
    """Read the source with the reader of its format."""
    from ssld.stage2_detect.data.convert.hub import is_hub, read_hub
    from ssld.stage2_detect.data.convert.voc import read_voc
    from ssld.stage2_detect.data.convert.voc_layout import is_voc
    from ssld.stage2_detect.data.convert.yolo import read_yolo
    from ssld.stage2_detect.yolo_layout import find_yolo

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
    if is_hub(source):
        return read_hub(
            source, pending=pending, classes=config.classes, splits=config.splits, box_format=config.box_format
        )
    raise UserError(
        f"source: {source}: neither YOLO (data.yaml, or images/ and labels/) nor Pascal VOC (XML files in Annotations/ or beside the images) "
        f"nor Parquet files; {_content_of(path)}"
    )


def _content_of(path: Path) -> str:
    names = sorted(one.name for one in path.iterdir() if not is_hidden(one.name)) if path.is_dir() else []
    return (
        f"it holds {some(names, 6)}" if names else "it is an empty folder" if path.is_dir() else "it is a single file"
    )


def _read_back(file: Path, data: "SourceData", split: str, content: "Content") -> None:
    """Read a written file as training and evaluation do, and compare it with the source."""
    from ssld.stage2_detect.data.coco import read_coco

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


def _publish(run: Path, pending: Path, split: str, folder: Path) -> Path:
    """Move a split into the run directory; returns the folder of its images."""
    if pending.resolve() in folder.resolve().parents:
        target = run / split
        shutil.rmtree(target, ignore_errors=True)
        folder.replace(target)
        folder = target
    (pending / f"{split}.json").replace(run / f"{split}.json")
    return folder.resolve()


def _summary(file: Path, folder: Path, content: "Content") -> str:
    counts = content.counts
    parts = [count(counts["images"], "image"), count(counts["objects"], "object")]
    if counts["empty"]:
        parts.append(f"{count(counts['empty'], 'image')} without objects")
    return f"{file}: {', '.join(parts)}; images: {folder}"


if __name__ == "__main__":
    sys.exit(main())
