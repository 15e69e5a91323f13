"""Files of one picture and what was found in it: the drawing, and a crop of each object."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from ssld.stage2_detect.data.coco import CocoImage
from ssld.stage2_detect.data.loaders import load_record
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.predict_config import PredictConfig
from ssld.stage2_detect.prediction.files import stem

_QUALITY = 92  # of JPEGs


class PictureFiles:
    """Writes the drawing and the crops of pictures, as far as `config` asks for them; several threads may at once.

    Attributes:
        drawing, cropping: which of the two it asks for.
    """

    def __init__(self, config: PredictConfig, loaded: LoadedDetector) -> None:
        self.drawing, self.cropping = config.writes("pictures"), config.writes("crops")
        self._folder, self._class_names = config.output, loaded.class_names
        self._class_folders = folder_names(loaded.class_names)

    def write(self, name: str, record: CocoImage, found: Detections) -> None:
        """pictures/NAME and crops of a picture, which is decoded once more."""
        picture = Image.fromarray(load_record(record).permute(1, 2, 0).numpy())
        if self.cropping:
            self.crops(name, picture, found)
        if self.drawing:
            file = picture_file(self._folder / "pictures", name)
            file.parent.mkdir(parents=True, exist_ok=True)
            draw_objects(picture, found, self._class_names, legend=True).save(file, quality=_QUALITY)

    def crops(self, name: str, picture: Image.Image, found: Detections) -> None:
        """crops/CLASS/NAME_i.jpg, i = 1, 2, ... as the objects come, the best first; at least a pixel each."""
        limits_4 = np.array([*picture.size, *picture.size])
        corners_N4 = found.boxes_N4.double().numpy()
        edges_N4 = np.concatenate([np.floor(corners_N4[:, :2]), np.ceil(corners_N4[:, 2:])], 1).clip(0, limits_4)
        for number, (edges_4, label) in enumerate(
            zip(edges_N4.astype(int).tolist(), found.labels_N.tolist(), strict=True), 1
        ):
            left, top = (min(edge, limit - 1) for edge, limit in zip(edges_4[:2], picture.size, strict=True))
            right, bottom = max(edges_4[2], left + 1), max(edges_4[3], top + 1)
            file = self._folder / "crops" / self._class_folders[label] / f"{stem(name)}_{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.crop((left, top, right, bottom)).save(file, quality=95, subsampling=0)  # to be looked at closely


def picture_file(folder: Path, name: str) -> Path:
    """Where the drawing of a picture lies: a JPEG below `folder`, at the picture's own path."""
    return folder / (name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg")


def folder_names(class_names: tuple[str, ...]) -> list[str]:
    """A folder name for each class: what file systems do not take becomes _, and equal names get the class's number."""
    safe = [re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(". ") or "_" for name in class_names]
    lower = [name.lower() for name in safe]
    return [name if lower.count(name.lower()) == 1 else f"{name}_{number}" for number, name in enumerate(safe)]
