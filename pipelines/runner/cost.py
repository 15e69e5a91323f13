"""What a pipeline will cost before it has started: steps, and an estimate of the disk space. Does not import torch.

Counted is what files and settings say by themselves. Passes over images become steps where the images are there; stores of soft labels, scores and
copies of a curation, converted and exported files have a size where what they are made from is there. What a training writes depends on a network
that nobody has built yet: unknown. Nothing but names, sizes and the files' own counts is looked at.
"""

import json
from pathlib import Path

from ssld.pipelines.runner.stages import Stage
from ssld.shared.config.training import TrainingConfig
from ssld.shared.errors import UserError
from ssld.shared.files import list_images
from ssld.shared.wording import amount, count
from ssld.stage1_ssld.config import (
    ConvertPaddleConfig,
    CurateConfig,
    DistillConfig,
    ExportConfig,
    PrototypesConfig,
    SoftLabelsConfig,
    TeachConfig,
)
from ssld.stage1_ssld.data_config import SourceConfig
from ssld.stage2_detect.config import ConvertPaddleConfig as ConvertDetectorConfig
from ssld.stage2_detect.config import DetectionDataConfig, TrainConfig
from ssld.stage2_detect.export_config import ExportDetectorConfig

_SCORED = 100
"""Bytes an image that a curation writes at most: its name and numbers among the scores, the candidates and what is kept."""


def steps_text(stage: Stage) -> str:
    """How long a stage trains, as far as its settings alone can say; empty for a command that does not train."""
    config = stage.config
    if not isinstance(config, TrainingConfig):
        return ""
    if config.train_epochs is None:
        return f"{config.total_steps(0)} steps of {config.batch_size} images"
    images = _training_images(config)
    if images is None:
        return f"{config.train_epochs:g} epochs of {config.batch_size} images a step"
    passes = f"{config.train_epochs:g} epochs of {images} images"
    return f"{config.total_steps(images)} steps of {config.batch_size} images ({passes})"


def disk_bytes(stages: list[Stage]) -> dict[str, int | None]:
    """Bytes that each stage with large files will hold at most, by name; None where that is not known yet."""
    sizes: dict[str, int | None] = {}
    for stage in stages:
        match stage.config:
            case SoftLabelsConfig() as config:
                sizes[stage.name] = _store_bytes(config)
            case CurateConfig() as config:
                sizes[stage.name] = _curation_bytes(config)
            case ConvertPaddleConfig(weights=file) | ConvertDetectorConfig(weights=file):
                sizes[stage.name] = file.stat().st_size if file.is_file() else None
            case (
                ExportConfig(model=file) | ExportDetectorConfig(model=file)
            ):  # ONNX, torch.export, and the hub's folder
                sizes[stage.name] = 3 * file.stat().st_size if file.is_file() else None
            case TrainingConfig() | PrototypesConfig():
                sizes[stage.name] = None
    return sizes


def disk_text(size: int | None) -> str:
    """A number of bytes for people."""
    return "disk unknown" if size is None else f"about {amount(size)} of disk"


def total_text(disk: dict[str, int | None]) -> str:
    """The whole of `disk_bytes` for people: the sum of what is known, and how much is not."""
    known = [size for size in disk.values() if size is not None]
    missing = len(disk) - len(known)
    if not missing:
        return disk_text(sum(known))
    unknown = f"{count(missing, 'stage')} of unknown size"
    return f"{disk_text(sum(known))}, and {unknown}" if known else unknown


def _training_images(config: TrainingConfig) -> int | None:
    """Number of training images; None where they are not there yet, cannot be read, or only loading them would tell."""
    if isinstance(config, DistillConfig | TeachConfig):
        return _images(config.data.train, labels_needed=config.objective == "labels")
    if isinstance(config, TrainConfig):
        try:
            return _coco_images(config.data)
        except (OSError, UserError, ValueError, TypeError, KeyError, AttributeError):
            return None  # the stage itself will say what is wrong
    return None


def _images(sources: list[SourceConfig], *, labels_needed: bool = False) -> int | None:
    """Number of images of all sources; None where one is not there yet, cannot be read, or only loading it would tell."""
    import pyarrow as pa

    try:
        counts = [_source_images(source, labels_needed) for source in sources]
    except (OSError, UserError, ValueError, pa.ArrowException):
        return None  # the stage itself will say what is wrong
    return None if None in counts else sum(count or 0 for count in counts) or None


def _source_images(source: SourceConfig, labels_needed: bool) -> int | None:
    """Images of one source that take part: none of an unlabeled one where labels are needed. None when a label file decides, and for tars,
    patterns and what lies elsewhere."""
    import pyarrow.parquet as pq

    path = Path(source.path)
    if source.labels not in ("auto", "none") or not path.exists():
        return None
    if path.suffix == ".txt":
        lines = [words for line in path.read_text(encoding="utf-8").splitlines() if (words := line.split())]
        count, labeled = len(lines), all(len(words) > 1 and words[-1].isdecimal() for words in lines)
    elif files := sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        count = sum(pq.read_metadata(file).num_rows for file in files)
        labeled = source.label_column in pq.read_schema(files[0]).names
    else:
        names = list_images(path)
        count, labeled = len(names), all(name.count("/") == 1 for name in names)
        if not names or any(path.glob("*.tar")):
            return None
    return count if not labels_needed or (labeled and source.labels == "auto") else 0


def _coco_images(data: DetectionDataConfig) -> int:
    """Images of a COCO file, without those that have no box unless they are kept; whether a box lies in its image is not looked at."""
    content = json.loads(data.train_annotations.read_bytes())
    if data.keep_empty:
        return len(content["images"])
    boxes = (row for row in content["annotations"] if not row.get("iscrowd") and min(row["bbox"][2:]) > 0)
    return len({row["image_id"] for row in boxes})


def _store_bytes(config: SoftLabelsConfig) -> int | None:
    """A number for the rest, and class and log-probability of each kept class; networks of more than 65,536 classes take a little more."""
    images = _images(config.data.train)
    answer = 4 + config.top * (2 + (2 if config.store_precision == "fp16" else 4))
    return None if images is None else images * config.views * answer


def _curation_bytes(config: CurateConfig) -> int | None:
    """Scores of every image, and copies of as many as the pool has at most."""
    images = _images(config.pool)
    if images is None:
        return None
    copies = sum(_folder_bytes(Path(source.path)) for source in config.pool) if config.materialise else 0
    return images * _SCORED + copies


def _folder_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
