"""Settings of `predict.py` and `audit.py`. Does not import torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ssld.shared.config.bounds import Count
from ssld.shared.files import is_pattern
from ssld.stage2_detect.config import RunDetectorConfig, Side
from ssld.stage2_detect.model_config import Fraction

THRESHOLD, PSEUDO_THRESHOLD = 0.5, 0.4
DOUBTED, CONFIDENT = 0.2, 0.5
Written = Literal["json", "images", "csv", "yolo", "yolo_scores", "crops", "label_studio", "cvat"]


class PredictConfig(RunDetectorConfig):
    """Detect objects in images and videos; write COCO JSON, drawn images, CSV, YOLO labels, crops, or pseudo-labels."""

    other_names: ClassVar[Mapping[str, str]] = {
        "source": "images",
        "weights": "model",
        "threshold": "score_threshold",
        "conf": "score_threshold",
        "score": "score_threshold",
        "save": "write",
        "imgsz": "short_side",
    }

    images: str
    """images to predict on: image, video, folder (searched recursively), quoted pattern ('photos/**/*.jpg'), or text file with one path per line"""
    write: list[Written] | None = None
    """outputs to write: json, images (drawn images; a video for a video), csv, yolo (labels/), yolo_scores (with a sixth column), crops,
    label_studio and cvat (boxes of images to correct in these tools); null: json,images"""
    label_studio_prefix: str = "/data/local-files/?d="
    """text before the path of each image in label_studio.json: the place from which Label Studio reads the images"""
    pseudo_labels: bool = False
    """write only pseudo_labels.json, for ssld train --pseudo: the images with at least one box"""
    score_threshold: Fraction | None = None
    """lowest score of a written box, 0 to 1; null: 0.5, or 0.4 with pseudo_labels, from an older setting of SAD's code"""
    classes: list[str] = []
    """names of the classes to write; empty: all"""
    exclude: Path | None = None
    """COCO JSON file whose images are left out, such as the labeled ones; matched by path relative to the folder in `images`"""
    tile: Side | None = None
    """side, in pixels, of square tiles predicted in addition to the whole image, for small objects in large images; null: no tiles"""
    overlap: float = Field(0.2, ge=0, le=0.9)
    """overlap of neighboring tiles as a share of their side, 0 to 0.9; best at least the size of the small objects"""

    @model_validator(mode="after")
    def _writes_elsewhere(self) -> Self:
        require_elsewhere(self.images, self.output)
        return self

    @model_validator(mode="after")
    def _something_written(self) -> Self:
        if self.write is not None and self.pseudo_labels:
            raise ValueError("write: pseudo_labels writes its own file and nothing else; leave one of the two out")
        if self.write is not None and not self.write:
            raise ValueError(
                "write: is empty; name at least one of json, images, csv, yolo, yolo_scores, crops, label_studio, cvat"
            )
        if self.write is not None and {"yolo", "yolo_scores"} <= set(self.write):
            raise ValueError("write: yolo and yolo_scores would write the same files; choose one")
        return self

    @property
    def least(self) -> float:
        """The score threshold as it is for this run."""
        return (
            (PSEUDO_THRESHOLD if self.pseudo_labels else THRESHOLD)
            if self.score_threshold is None
            else self.score_threshold
        )

    def writes(self, *kinds: Written) -> bool:
        """Whether any of these files is written in this run."""
        if self.pseudo_labels:
            return False
        return not {"json", "images"}.isdisjoint(kinds) if self.write is None else not set(self.write).isdisjoint(kinds)

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model} | images_input(self.images)
        return files | ({"exclude": self.exclude} if self.exclude else {})


class AuditConfig(RunDetectorConfig):
    """List unlabeled photos to annotate next, by the doubts of a detector; with annotations, list labels to look at first."""

    other_names: ClassVar[Mapping[str, str]] = {
        "detector": "model",
        "weights": "model",
        "source": "images",
        "data": "annotations",
        "threshold": "score_threshold",
        "conf": "score_threshold",
        "imgsz": "short_side",
    }

    images: str
    """unlabeled photos: image, folder (searched recursively), quoted pattern ('photos/**/*.jpg'), or text file with one path per line; with
    annotations: folder that the file names in them are relative to"""
    annotations: Path | None = None
    """COCO JSON file whose labels are compared with the detections, to find labels to look at first; null: the photos are unlabeled"""
    count: Count = 100
    """number of unlabeled photos to list"""
    exclude: Path | None = None
    """COCO JSON file whose images are left out, such as the labeled ones; matched by path relative to the folder in `images`"""
    score_threshold: float | None = Field(None, ge=0, lt=1)
    """lowest score of the boxes that count, 0 to below 1; null: 0.2 for unlabeled photos, 0.5 with annotations"""
    write: list[Literal["label_studio", "cvat"]] = []
    """further outputs: label_studio and cvat, the boxes of the listed photos to correct in these tools"""
    label_studio_prefix: str = "/data/local-files/?d="
    """text before the path of each image in label_studio.json: the place from which Label Studio reads the images"""
    cache_annotations: bool = True
    """cache large annotation files, parsed, and the EXIF orientation of images in ~/.cache/ssld (or $XDG_CACHE_HOME/ssld) for later starts"""

    @model_validator(mode="after")
    def _writes_elsewhere(self) -> Self:
        require_elsewhere(self.images, self.output)
        return self

    @model_validator(mode="after")
    def _fits_the_photos(self) -> Self:
        if self.annotations is None and self.tta is not None:
            raise ValueError("tta: the two views that are compared are the image and its mirror image; leave it out")
        unlabeled_alone = [key for key in ("exclude", "write") if getattr(self, key)]
        if self.annotations is not None and unlabeled_alone:
            raise ValueError(
                f"{unlabeled_alone[0]}: is for unlabeled photos, and annotations are given; leave one of them out"
            )
        return self

    @property
    def least(self) -> float:
        """The score threshold as it is for this run."""
        default = DOUBTED if self.annotations is None else CONFIDENT
        return default if self.score_threshold is None else self.score_threshold

    def inputs(self) -> dict[str, Path]:
        files = {"model": self.model} | images_input(self.images)
        given = {"annotations": self.annotations, "exclude": self.exclude}
        return files | {key: path for key, path in given.items() if path is not None}


def require_elsewhere(images: str, output: Path) -> None:
    """Raise ValueError where `images` names nothing, or `output` is inside it: written images would be input of the next run."""
    if not images:
        raise ValueError("images: names no image, folder or list")
    folder = Path(images)
    if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"output: {output} is inside `images`: drawn images would be read as input; give another folder"
        )


def images_input(images: str) -> dict[str, Path]:
    """Return the input `images` of a run; none for a pattern, whose files may be anywhere."""
    return {"images": Path(images)} if Path(images).exists() or not is_pattern(images) else {}
