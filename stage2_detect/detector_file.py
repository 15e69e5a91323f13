"""Detector files: weights, architecture, sizes, class names and category ids, all that evaluation and prediction need."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import timm
from pydantic import BaseModel, ValidationError

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings, create_body
from ssld.shared.models.model_file import read_metadata, read_tensors, save_model_file
from ssld.shared.models.references import ModelReference
from ssld.shared.models.timm_names import known_arch
from ssld.shared.training.checkpoint import load_module
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import CocoData
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.build import Detector, build_detector
from ssld.stage2_detect.models.inference import for_inference
from ssld.stage2_detect.prediction.predictor import GivenImage, ImageDetections, predict

Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True)
class LoadedDetector:
    """Detector in evaluation mode, with its classes and image sizes."""

    model: Detector
    class_names: tuple[str, ...]
    category_ids: tuple[int | str, ...]
    resize: ResizeConfig
    metadata: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """one line per part of the network whose BatchNorm `predict` could not fold into the convolutions"""

    @cached_property
    def fast(self) -> Detector:
        """The model prepared for inference, at the first use, on the device where `model` is then."""
        return for_inference(self.model, self.notes.append)

    @property
    def has_masks(self) -> bool:
        """Whether it predicts masks beside boxes."""
        return getattr(self.model, "mask_head", None) is not None

    def predict(
        self,
        images: Sequence[GivenImage],
        *,
        score_threshold: float = 0.5,
        batch_size: int = 4,
        tile: int | None = None,
        overlap: float = 0.2,
    ) -> list[ImageDetections]:
        """Detect objects in images; see `predictor.predict`."""
        return predict(self, images, score_threshold=score_threshold, batch_size=batch_size, tile=tile, overlap=overlap)


def save_detector(
    path: Path,
    model: Detector,
    *,
    config: DetectorConfig,
    resize: ResizeConfig,
    arch: str,
    inputs: InputSettings,
    data: CocoData,
    **facts: Any,
) -> str:
    """Write a detector file; `facts` (step, metrics, backbone ...) are added to its metadata. Returns the content hash."""
    metadata = {
        "kind": "detector",
        "arch": arch,
        "timm_version": timm.__version__,
        "class_names": data.class_names,
        "category_ids": data.category_ids,
        "mean": inputs.mean,
        "std": inputs.std,
        "model": config.model_dump(mode="json"),
        "resize": resize.model_dump(mode="json"),
        **facts,
    }
    return save_model_file(path, model.state_dict(), metadata)


def settings_of(metadata: dict[str, Any], key: str, kind: type[Settings], path: Path) -> Settings:
    """Parse a group of settings in a detector file's metadata. Raises UserError for settings that this version does not have."""
    try:
        return kind(**metadata[key])
    except ValidationError as error:
        setting = ".".join([key, *map(str, error.errors()[0]["loc"])])
        raise UserError(
            f"{path}: was written by an earlier version of this project ({setting} is not a setting of this version): "
            "use that version, or train or convert the detector again with this one"
        ) from None


def load_detector(path: str | Path) -> LoadedDetector:
    """Load a detector file for prediction.

        detector = ssld.load_detector("runs/detector/detector.safetensors")
        for name, score, box in detector.predict(["photo.jpg"])[0]:
            print(name, score, box)

    Args:
        path: the `detector.safetensors` of a training, or a file written by `NewDetector.save`.

    Returns:
        The detector on the CPU, in evaluation mode, with its class names and image sizes.

    Raises:
        UserError: no such file, or no detector file.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"load_detector: expected the path of a detector file, got {type(path).__name__}")
    path = Path(path)
    metadata = read_metadata(path, kind="detector")
    if metadata.get("kind") != "detector":
        raise UserError(
            f"{path}: not a detector file of this project; give the detector.safetensors of a training, or convert another project's "
            "file with ssld convert-detector"
        )
    names, arch = tuple(metadata["class_names"]), known_arch(metadata["arch"], path)
    inputs = InputSettings.of_detector(metadata["mean"], metadata["std"])
    config = settings_of(metadata, "model", DetectorConfig, path)
    body, _ = create_body(ModelReference(f"{path}", arch, metadata={"model_args": metadata.get("model_args")}))
    model = build_detector(config, classes=len(names), body=body, arch=arch, inputs=inputs)
    load_module(model, read_tensors(path), path)
    resize = settings_of(metadata, "resize", ResizeConfig, path)
    return LoadedDetector(model.eval(), names, tuple(metadata["category_ids"]), resize, metadata)


def load_named(path: Path, key: str = "model") -> LoadedDetector:
    """Load the detector file that the setting `key` names; the messages of its errors begin with it."""
    try:
        return load_detector(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
