"""Settings of the images and boxes to train on, and the paths that they name. Does not import torch."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from ssld.shared.config.settings import Config
from ssld.shared.files import ImageFolder, is_pattern
from ssld.stage2_detect.layouts.coco import find_coco
from ssld.stage2_detect.layouts.yolo import find_yolo, input_places
from ssld.stage2_detect.model_config import Fraction

FILES = ("train_annotations", "train_images", "val_annotations", "val_images")


class DetectionDataConfig(Config):
    """Data set to train on: one path (`data: PATH`), or COCO JSON files and the image folders that their file names are relative to."""

    source: str | None = None
    """data set, also as --data PATH: data.yaml, folder (YOLO, VOC, LabelMe, COCO, Roboflow, Hugging Face), COCO JSON, Parquet, hub:ORG/NAME; null:
    COCO files by the next settings"""
    train_annotations: Path | list[Path] | None = None
    """COCO JSON file to train on, or a list of files"""
    train_images: Path | list[Path] | None = None
    """image folder of train_annotations, or a list with one for each file"""
    val_annotations: Path | list[Path] | None = None
    """COCO JSON file to evaluate on, or a list of files; null: no evaluation"""
    val_images: Path | list[Path] | None = None
    """image folder of val_annotations, or a list with one for each file"""
    keep_empty: bool = True
    """train on images without objects too"""
    allow_loss: bool = False
    """train even if more than half of all boxes, or of the boxes of one class, are unusable; false: stop with an error"""
    repeat_threshold: Fraction | None = None
    """share of the images, 0 to 1: images of classes that occur in a smaller share are repeated (repeat factors, arXiv 1908.03195); null: none"""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"source": str(value)} if isinstance(value, str | Path) else value

    @field_validator("train_annotations", "train_images", "val_annotations", "val_images", mode="before")
    @classmethod
    def _one_is_no_list(cls, value: Any) -> Any:
        return one_or_list(value)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        files = [key for key in FILES if getattr(self, key) is not None]
        if self.source is not None and files:
            raise ValueError(f"source has its own parts for training and evaluation; leave out {', '.join(files)}")
        for part in ("train", "val"):
            names = f"{part}_annotations", f"{part}_images"
            annotations, images = (getattr(self, name) for name in names)
            if (annotations is None) != (images is None):
                other = "" if part == "train" else ", or neither"
                raise ValueError(f"give both {names[0]} and {names[1]}{other}")
            require_pairs(*names, annotations, images)
        if self.source is None and self.train_annotations is None:
            raise ValueError(
                "names no images to train on; give a path (--data PATH: data.yaml or the folder of a data set), or train_annotations and train_images"
            )
        return self

    def pairs(self, part: Literal["train", "val"]) -> list[tuple[Path, Path]]:
        """Return (COCO file, image folder) of each file given for a part; empty with `source`."""
        return file_pairs(getattr(self, f"{part}_annotations"), getattr(self, f"{part}_images"))

    @property
    def may_evaluate(self) -> bool:
        """Whether there may be evaluation images; of a `source` this is known when its files are read."""
        return self.source is not None or self.val_annotations is not None

    def inputs(self, key: str) -> dict[str, Path]:
        """Files and folders of all parts, by key."""
        files = source_inputs(f"{key}.source", self.source) if self.source else {}
        for part in ("train", "val"):
            for name in (f"{part}_annotations", f"{part}_images"):
                files |= listed_inputs(f"{key}.{name}", getattr(self, name))
        return files


def one_or_list(value: Any) -> Any:
    """Return the only item of a list of one, which flags give for a single path; other values as they are. Raises ValueError for an empty list."""
    if isinstance(value, list) and not value:
        raise ValueError("is an empty list; give a path, or several")
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def require_pairs(first: str, second: str, annotations: Any, images: Any) -> None:
    """Raise ValueError unless there is a folder for each file, or one folder for all."""
    files, folders = (len(value) if isinstance(value, list) else 1 for value in (annotations, images))
    if folders not in (files, 1):
        raise ValueError(
            f"{second}: has {folders} folders for {files} files of {first}; give one folder for each file, or one for all"
        )


def file_pairs(annotations: Path | list[Path] | None, images: Path | list[Path] | None) -> list[tuple[Path, Path]]:
    """Return (COCO file, image folder) of each file; one folder belongs to all files."""
    files, folders = (
        value if isinstance(value, list) else [value] * (value is not None) for value in (annotations, images)
    )
    folders = folders * len(files) if len(folders) == 1 else folders
    return [
        (file, folder) for file, folder in zip(files, folders, strict=True) if file is not None and folder is not None
    ]


def listed_inputs(key: str, value: Path | list[Path] | None) -> dict[str, Path]:
    """Return a path by its key, or the paths of a list by their numbered keys."""
    if isinstance(value, list):
        return {f"{key}.{number}": path for number, path in enumerate(value)}
    return {} if value is None else {key: value}


def as_list(value: Path | list[Path]) -> list[Path]:
    """Return the paths of a setting that takes one or several."""
    return value if isinstance(value, list) else [value]


def source_files(key: str, sources: Path | list[Path]) -> dict[str, Path]:
    """Return the files and folders of unlabeled images by their keys; the files of a pattern are known when it is read."""
    return {
        name: ImageFolder(path) if path.is_dir() else path
        for name, path in listed_inputs(key, sources).items()
        if path.exists() or not is_pattern(str(path))
    }


def source_inputs(key: str, source: str) -> dict[str, Path]:
    """Return the files and folders of a data set given by one path, by a name for messages; none for one of the hub."""
    if source.startswith("hub:"):
        return {}
    path = Path(source)
    layout = find_yolo(path)
    if layout is None and (coco := find_coco(path)):
        files: dict[str, Path] = {}
        for name, (annotations, images) in coco.parts.items():
            files |= {f"{key}: {name} annotations": annotations, f"{key}: {name} images": ImageFolder(images)}
        return files
    places = {key: path}
    if layout and not layout.file.is_dir():  # a description file names folders outside its own
        places |= {f"{key}: {name}": place for name, place in input_places(layout).items()}
    return places
