"""Cost of a pipeline before it starts: training steps, and an estimate of the disk space. Does not import torch.

The estimate uses settings, file names, file sizes and row counts only. Epochs are converted to steps if the images exist. Soft-label stores, scores
and copies of a curation, and converted or exported files get a size if their input exists. Training runs are reported as unknown, because their size
depends on a network that has not been built yet; a trial measures it (estimate.py).
"""

import json
from pathlib import Path

from ssld.pipelines.runner.stages import Stage
from ssld.shared.config.settings import CommandConfig
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
from ssld.stage1_ssld.config import EvaluateConfig as EvaluateBackboneConfig
from ssld.stage1_ssld.data_config import SourceConfig
from ssld.stage2_detect.config import ConvertForeignConfig, TrainConfig
from ssld.stage2_detect.config import ConvertPaddleConfig as ConvertPaddleDetectorConfig
from ssld.stage2_detect.config import EvaluateConfig as EvaluateDetectorConfig
from ssld.stage2_detect.data_config import DetectionDataConfig
from ssld.stage2_detect.export_config import ExportDetectorConfig
from ssld.stage2_detect.predict_config import AuditConfig, PredictConfig

_SCORED = 100
"""bytes per image that a curation writes at most: file name and numbers, in the scores, the candidates and the selection"""


def steps_text(stage: Stage) -> str:
    """Return the length of a training in steps or epochs; empty for a command that does not train."""
    config = stage.config
    if not isinstance(config, TrainingConfig):
        return ""
    if isinstance(config, DistillConfig) and not config.has_length:
        return "a length chosen from the images"
    images = None if config.train_epochs is None else training_images(config)
    steps = training_steps(config, images)
    if steps is None:
        return f"{config.train_epochs:g} epochs, {config.batch_size} images per step"
    passes = "" if images is None else f" ({config.train_epochs:g} epochs of {images} images)"
    return f"{steps} steps of {config.batch_size} images{passes}"


def training_steps(config: TrainingConfig, images: int | None) -> int | None:
    """Return the optimizer steps of a training on `images` images; None if they follow from images that are not known, or are chosen later."""
    if isinstance(config, DistillConfig) and not config.has_length:
        return None  # chosen when its images are read
    return None if config.train_epochs is not None and images is None else config.total_steps(images)


def disk_bytes(stages: list[Stage]) -> dict[str, int | None]:
    """Return the maximal bytes of each stage that writes large files, by name; None if not known yet."""
    sizes: dict[str, int | None] = {}
    for stage in stages:
        match stage.config:
            case SoftLabelsConfig() as config:
                sizes[stage.name] = _store_bytes(config)
            case CurateConfig() as config:
                sizes[stage.name] = _curation_bytes(config)
            case (
                ConvertPaddleConfig(weights=weights)
                | ConvertPaddleDetectorConfig(weights=weights)
                | ConvertForeignConfig(weights=weights)
            ):
                file = Path(weights)
                sizes[stage.name] = file.stat().st_size if file.is_file() else None
            case (
                ExportConfig(model=file) | ExportDetectorConfig(model=file)
            ):  # ONNX, torch.export, and the folder for the hub
                sizes[stage.name] = 3 * file.stat().st_size if file.is_file() else None
            case TrainingConfig() | PrototypesConfig():
                sizes[stage.name] = None
    return sizes


def disk_text(size: int | None) -> str:
    """Format a disk size in bytes."""
    return "disk unknown" if size is None else f"about {amount(size)} of disk"


def total_text(disk: dict[str, int | None]) -> str:
    """Format the sum of `disk_bytes`, with the number of stages of unknown size."""
    known = [size for size in disk.values() if size is not None]
    missing = len(disk) - len(known)
    if not missing:
        return disk_text(sum(known))
    unknown = f"{count(missing, 'stage')} of unknown size"
    return f"{disk_text(sum(known))}, and {unknown}" if known else unknown


def training_images(config: CommandConfig) -> int | None:
    """Return the number of training images; None if the command does not train, or if they do not exist yet, are
    unreadable, or would have to be loaded."""
    if isinstance(config, DistillConfig | TeachConfig):
        return _images(config.data.train, labels_needed=config.objective == "labels")
    if isinstance(config, TrainConfig):
        try:
            return _coco_images(config.data)
        except (OSError, UserError, ValueError, TypeError, KeyError, AttributeError):
            return None  # the stage itself reports the error
    return None


def evaluation_images(config: CommandConfig) -> int | None:
    """Return the number of images of an evaluation, 0 for a command without one; None as for `training_images`.

    The photos of an audit without annotations count twice: the detector gets each of them and its mirror image.
    """
    match config:
        case DistillConfig(data=data) if data.held_out:
            images = _images(data.train)
            return None if images is None else round(data.held_out * images)
        case DistillConfig() | TeachConfig():
            return _images([config.data.val]) if config.data.val else 0
        case EvaluateBackboneConfig():
            return _images([config.data])
        case TrainConfig():
            return None if config.data.source else _coco_rows([file for file, _ in config.data.pairs("val")])
        case EvaluateDetectorConfig():
            return None if config.data else _coco_rows([file for file, _ in config.pairs()])
        case PredictConfig():
            return _predicted(Path(config.images))
        case AuditConfig(annotations=None):
            photos = _predicted(Path(config.images))
            return None if photos is None else 2 * photos
        case AuditConfig(annotations=file) if file is not None:
            return _coco_rows([file])
    return 0


def _predicted(images: Path) -> int | None:
    """Return the number of images of a prediction; None for patterns, videos, and files that do not exist yet."""
    if images.is_dir():
        return len(list_images(images))
    if images.suffix == ".txt" and images.is_file():
        return len(images.read_bytes().split(b"\n")) - 1
    return None


def _coco_rows(files: list[Path]) -> int | None:
    """Return the number of images in COCO files; None if one does not exist yet or is unreadable."""
    try:
        return sum(len(json.loads(file.read_bytes())["images"]) for file in files)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # the stage itself reports the error


def _images(sources: list[SourceConfig], *, labels_needed: bool = False) -> int | None:
    """Return the number of images of all sources; None if one does not exist yet, is unreadable, or would have to be loaded."""
    import pyarrow as pa

    try:
        counts = [_source_images(source, labels_needed) for source in sources]
    except (OSError, UserError, ValueError, pa.ArrowException):
        return None  # the stage itself reports the error
    return None if None in counts else sum(count or 0 for count in counts) or None


def _source_images(source: SourceConfig, labels_needed: bool) -> int | None:
    """Return the number of images used from one source: 0 from an unlabeled one if labels are needed. None if a label file decides, and for tar
    files, glob patterns and remote paths."""
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


def _coco_images(data: DetectionDataConfig) -> int | None:
    """Return the number of training images in COCO files; images without boxes count only with `keep_empty`. Boxes outside their image are not
    detected. None for a data set that has to be converted first."""
    if data.source:
        return None
    images = 0
    for file, _ in data.pairs("train"):
        content = json.loads(file.read_bytes())
        boxes = (row for row in content["annotations"] if not row.get("iscrowd") and min(row["bbox"][2:]) > 0)
        images += len(content["images"]) if data.keep_empty else len({row["image_id"] for row in boxes})
    return images


def _store_bytes(config: SoftLabelsConfig) -> int | None:
    """Return the bytes of a soft-label store: per view the tail mass, then class and log-probability of each kept class. Networks with more than
    65,536 classes need slightly more."""
    images = _images(config.data.train)
    per_view = 4 + config.top * (2 + (2 if config.store_precision == "fp16" else 4))
    return None if images is None else images * config.views * per_view


def _curation_bytes(config: CurateConfig) -> int | None:
    """Return the bytes of the scores of all images and of copies of the whole pool, the most that can be kept."""
    images = _images(config.pool)
    if images is None:
        return None
    copies = sum(_folder_bytes(Path(source.path)) for source in config.pool) if config.materialise else 0
    return images * _SCORED + copies


def _folder_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
