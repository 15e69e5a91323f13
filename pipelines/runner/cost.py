"""What a pipeline will cost before it has started: steps, and an estimate of the disk space. Does not import torch.

The size of a network that timm knows by name is asked of timm in another process, on the meta device; a stage whose network or images nobody can see
yet is said to be so. The estimate counts what is large: model files, checkpoints, stores of soft labels, scores and copies of a curation. Passes over
images become steps where the images are there already; nothing but names, sizes and the files' own counts is looked at.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from ssld.pipelines.runner.stages import Stage
from ssld.shared.config.training import TrainingConfig
from ssld.shared.errors import UserError
from ssld.shared.files import list_images
from ssld.stage1_ssld.config import (
    ConvertPaddleConfig,
    CurateConfig,
    DistillConfig,
    ExportConfig,
    PrototypesConfig,
    SoftLabelsConfig,
    Stage1Config,
    TeachConfig,
)
from ssld.stage1_ssld.data_config import SourceConfig
from ssld.stage2_detect.config import ConvertPaddleConfig as ConvertDetectorConfig
from ssld.stage2_detect.config import DetectionDataConfig, TrainConfig
from ssld.stage2_detect.export_config import ExportDetectorConfig
from ssld.stage2_detect.model_config import DetectorConfig

_ASK_TIMM = """
import json, sys, timm, torch
answer = {}
for name in sys.argv[1:]:
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
    except Exception:
        continue
    answer[name] = [sum(p.numel() for p in model.parameters()), [f["num_chs"] for f in model.feature_info]]
print(json.dumps(answer))
"""
_SCORED = 100
"""Bytes an image that a curation writes at most: its name and numbers among the scores, the candidates and what is kept."""


@dataclass(frozen=True)
class Network:
    """A timm network: number of its values, channels of its feature maps."""

    values: int
    channels: tuple[int, ...]


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
    """Bytes that each stage with large files will hold at most, by name; None where its network's size or its images are not known yet."""
    architectures = {stage.name: _architecture(stage, stages) for stage in stages if _reference(stage)}
    known = _ask_timm(sorted({name for name in architectures.values() if name}))
    sizes: dict[str, int | None] = {}
    for stage in stages:
        match stage.config:
            case SoftLabelsConfig() as config:
                sizes[stage.name] = _store_bytes(config)
            case CurateConfig() as config:
                sizes[stage.name] = _curation_bytes(config)
            case ConvertPaddleConfig(weights=file) | ConvertDetectorConfig(weights=file):
                sizes[stage.name] = file.stat().st_size if file.is_file() else None
            case ExportConfig(model=file) | ExportDetectorConfig(model=file) if file.is_file():
                sizes[stage.name] = 3 * file.stat().st_size  # ONNX, torch.export, and the folder for the hub
            case PrototypesConfig() as config:
                sizes[stage.name] = _prototypes_bytes(config, known.get(architectures.get(stage.name) or ""))
            case _ if stage.name in architectures:
                network = known.get(architectures[stage.name] or "")
                sizes[stage.name] = _network_bytes(stage, network) if network else None
    return sizes


def disk_text(size: int | None) -> str:
    """A number of bytes for people."""
    if size is None:
        return "disk unknown: its network or its images are not there to be looked at yet"
    return f"about {size / 1e9:.1f} GB of disk" if size >= 1e9 else f"about {max(1, round(size / 1e6))} MB of disk"


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
    """Images of one source that take part: none of an unlabelled one where labels are needed. None when a label file decides, and for tars,
    patterns and what lies elsewhere."""
    import pyarrow.parquet as pq

    path = Path(source.path)
    if source.labels not in ("auto", "none") or not path.exists():
        return None
    if path.suffix == ".txt":
        lines = [words for line in path.read_text(encoding="utf-8").splitlines() if (words := line.split())]
        count, labelled = len(lines), all(len(words) > 1 and words[-1].isdecimal() for words in lines)
    elif files := sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        count = sum(pq.read_metadata(file).num_rows for file in files)
        labelled = source.label_column in pq.read_schema(files[0]).names
    else:
        names = list_images(path)
        count, labelled = len(names), all(name.count("/") == 1 for name in names)
        if not names or any(path.glob("*.tar")):
            return None
    return count if not labels_needed or (labelled and source.labels == "auto") else 0


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


def _prototypes_bytes(config: PrototypesConfig, network: Network | None) -> int | None:
    """The teacher, and while it is made the embedding of every image, of as many numbers as the last feature map has channels."""
    images = _images(config.pool)
    return None if images is None or network is None else 4 * (network.values + images * network.channels[-1])


def _folder_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _network_bytes(stage: Stage, network: Network) -> int:
    """Models and checkpoints of a training stage, or the copies of an export."""
    config, values, ema = stage.config, network.values, False
    if not isinstance(config, TrainingConfig):
        return 3 * 4 * values
    optim = config.optim if isinstance(config, Stage1Config | TrainConfig) else None
    if isinstance(config, Stage1Config):
        ema = config.ema is not None
    elif isinstance(config, TrainConfig):
        values += _detector_values(config.model, network.channels)
    state = 2 if optim and optim.name == "adamw" else 1
    checkpoints = config.keep_checkpoints + 1  # the next one is complete before the oldest goes
    if config.train_epochs is None:
        checkpoints = min(checkpoints, ceil(config.total_steps(0) / config.save_every))
    files = 2  # the last model and the best
    return 4 * values * (files + checkpoints * (1 + state + ema))


def _detector_values(model: DetectorConfig, channels: tuple[int, ...]) -> int:
    """Values of the pyramid, the proposal network and a box head; the few of the class layer, whose size the data say, are left out."""
    width, hidden = model.fpn_channels, model.roi.hidden
    pyramid = sum(channels[-4:]) * width + 4 * 9 * width**2
    proposals = 9 * width**2 + width * 5 * len(model.rpn.anchor_ratios)
    return pyramid + proposals + 49 * width * hidden + hidden**2


def _reference(stage: Stage) -> str | None:
    """The network a stage trains or exports, as its settings name it."""
    match stage.config:
        case DistillConfig(student=network) | TeachConfig(model=network) | PrototypesConfig(encoder=network):
            return network.arch or network.model
        case TrainConfig(backbone=backbone, arch=arch):
            return arch or backbone
        case ExportConfig(model=file):
            return str(file)
    return None


def _architecture(stage: Stage, stages: list[Stage]) -> str | None:
    """The timm name behind a stage's network, followed through the stages whose files it starts from."""
    reference = _reference(stage)
    if reference is None:
        return None
    for earlier in stages:
        if earlier is not stage and Path(reference).is_relative_to(earlier.run):
            return _architecture(earlier, stages)
    name = reference.removeprefix("random:").removeprefix("timm:")
    return None if "/" in name or ":" in name or name.endswith(".safetensors") else name


def _ask_timm(names: list[str]) -> dict[str, Network]:
    if not names:
        return {}
    answer = subprocess.run([sys.executable, "-c", _ASK_TIMM, *names], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return {}
    found = json.loads(answer.stdout.splitlines()[-1])
    return {name: Network(values, tuple(channels)) for name, (values, channels) in found.items()}
