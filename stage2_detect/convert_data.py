"""Convert detection data in the layout of YOLO, Pascal VOC, LabelMe or Hugging Face to checked COCO JSON.

    python stage2_detect/convert_data.py --source datasets/pets/data.yaml --output data/pets

Writes SPLIT.json for each split, and result.json with counts of input and output. Images in folders stay where they are; images inside Parquet files
are written to SPLIT/. Files are written only if every split can be converted; dropped images and boxes are counted by cause, and a large loss stops
the run.
"""

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
from ssld.shared.wording import count
from ssld.stage2_detect.config import ConvertDataConfig

if TYPE_CHECKING:
    from ssld.stage2_detect.data.convert.records import Content


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ConvertDataConfig, convert_data, argv, program="convert_data.py", torch_threads=False)


def convert_data(config: ConvertDataConfig) -> None:
    """Convert the source and write result.json. Raises UserError for any fault of the data, naming file and line."""
    from ssld.shared.run_dir import RunDir
    from ssld.stage2_detect.data.convert.conversion import convert

    run = RunDir(config, "convert_data")
    if run.finished_earlier():
        return
    pending = run.path / ".pending"
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir()
    try:
        data, contents, orientation = convert(config, pending)
        run.log(f"{config.source}: {data.kind}, {len(data.class_names)} classes: {', '.join(data.class_names[:20])}")
        run.log(*data.notes)
        run.log_if(orientation.describe())
        metrics: dict[str, Any] = {"classes": data.class_names, "orientation": orientation.record(), "splits": {}}
        for split, content in contents.items():
            folder = _publish(run.path, pending, split, content.folder)
            metrics["splits"][split] = {**content.counts, "image_folder": str(folder)}
            run.log(_summary(run.path / f"{split}.json", folder, content))
            run.tell(split, split, content.tally)
    finally:
        shutil.rmtree(pending, ignore_errors=True)
    run.finish(metrics, [run.path / f"{split}.json" for split in contents])


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
