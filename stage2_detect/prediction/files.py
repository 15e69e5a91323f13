"""Files of a prediction: parts while it runs, so that it can resume after a kill; at the end COCO JSON, CSV, YOLO labels, drawn images and crops.

A part holds the detections of about 128 images and is written by one process at once. Parts group images by aspect ratio, so that a batch needs
little padding, and do not depend on the number of processes.
"""

import csv
import io
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as mask_codec

from ssld.shared.checksums import is_sound, write_with_sum
from ssld.shared.errors import UserError
from ssld.shared.files import write_atomically
from ssld.stage2_detect.data.batch_order import eval_batches
from ssld.stage2_detect.data.coco import CocoImage, Id
from ssld.stage2_detect.data.coco_json import ORIENTATION_KEY
from ssld.stage2_detect.data.loaders import load_record
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.predict_config import PredictConfig

if TYPE_CHECKING:
    from ssld.stage2_detect.detector_file import LoadedDetector

_PART = 128  # images per part, about
_QUALITY = 92  # of JPEGs, in 1..100


class Parts:
    """Parts of a prediction over `records`, in `folder`.

    Attributes:
        records: images of each part, in the order of detection.
    """

    def __init__(self, folder: Path, records: Sequence[CocoImage], batch_size: int) -> None:
        self._folder = folder
        order = [index for batch in eval_batches(records, batch_size) for index in batch]
        size = max(1, _PART // batch_size) * batch_size  # whole batches
        self.records = [[records[index] for index in order[at : at + size]] for at in range(0, len(order), size)]

    def files(self) -> list[Path]:
        """List the files of all parts, existing or not."""
        return [self._file(number) for number in range(len(self.records))]

    def left(self) -> list[int]:
        """List the numbers of parts that are missing or damaged. Raises UserError for a part of other images."""
        missing = []
        for number, records in enumerate(self.records):
            if not is_sound(self._file(number)):
                missing.append(number)
            elif self.read(number)["images"] != [record.image_id for record in records]:
                raise UserError(
                    f"{self._folder.parent}: was started on other images than `images` holds now; give another --output or delete it"
                )
        return missing

    def write(
        self, number: int, rows: dict[Id, list[dict[str, Any]]], unreadable: list[list[str]], best: float, **more: Any
    ) -> None:
        """Write a part.

        Args:
            rows: COCO results by image id, for images with detections.
            unreadable: (file name, reason) pairs.
            best: highest score of any detection, below the threshold too.
            more: further JSON values of the part, by key.
        """
        self._folder.mkdir(exist_ok=True)
        images = [record.image_id for record in self.records[number]]
        content = {"images": images, "unreadable": unreadable, "best": best, "found": list(rows.items())}
        write_with_sum(self._file(number), json.dumps(content | more, allow_nan=False))

    def read(self, number: int) -> dict[str, Any]:
        """Read an existing part."""
        content: dict[str, Any] = json.loads(self._file(number).read_text(encoding="utf-8"))
        return content

    def read_all(self) -> Iterator[dict[str, Any]]:
        """Read all parts."""
        return (self.read(number) for number in range(len(self.records)))

    def delete(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.json"


def image_entry(record: CocoImage, name: str) -> dict[str, Any]:
    """Build an entry of COCO's list of images."""
    return {"id": record.image_id, "file_name": name, "width": record.width, "height": record.height}


def coco_json(
    images: Sequence[dict[str, Any]],
    rows: dict[Id, list[dict[str, Any]]],
    categories: dict[Id, str],
    info: dict[str, Any],
    videos: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Build a COCO data set of images and detections; annotations have a `score`. `videos` is present unless empty."""
    detections = [row for image in images for row in rows.get(image["id"], [])]
    annotations = [{"id": number, **row, "area": _area(row), "iscrowd": 0} for number, row in enumerate(detections, 1)]
    listed = [{"id": category_id, "name": name} for category_id, name in categories.items()]
    content = {"info": info, "images": list(images), "annotations": annotations, "categories": listed}
    return content | ({"videos": list(videos)} if videos else {})


def data_set(
    loaded: "LoadedDetector",
    images: Sequence[dict[str, Any]],
    rows: dict[Id, list[dict[str, Any]]],
    *,
    description: str,
    threshold: float,
    videos: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Build the COCO data set of a detector's boxes in upright images.

    Args:
        images, rows, videos: as of `coco_json`.
        threshold: lowest score of the boxes.
    """
    info = {
        "description": description,
        "detector": loaded.metadata.get("content_sha256"),
        "threshold": threshold,
        ORIENTATION_KEY: "upright",
    }
    categories = dict(zip(loaded.category_ids, loaded.class_names, strict=True))
    return coco_json(images, rows, categories, info, videos)


def table_text(content: dict[str, Any]) -> str:
    """Format a data set of `coco_json` as CSV with one box per row; with videos, two more columns hold frame number and seconds.

    Rows end with a line feed. Names with a line break are quoted, so that `csv.reader` reads them back.
    """
    images = {image["id"]: image for image in content["images"]}
    classes = {category["id"]: category["name"] for category in content["categories"]}
    more = ["frame", "seconds"] if "videos" in content else []
    rows: list[list[Any]] = [["file_name", "class", "score", "x", "y", "width", "height", *more]]
    for row in content["annotations"]:
        image = images[row["image_id"]]
        place = [image.get(name, "") for name in more]
        rows.append([image["file_name"], classes[row["category_id"]], row["score"], *row["bbox"], *place])
    return "".join(f"{_csv_row(row)}\n" for row in rows)


def _csv_row(values: list[Any]) -> str:
    """Format a row of CSV without its end. Before Python 3.13 the writer quotes only those line breaks of which its line terminator consists."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(values)
    return text.getvalue().removesuffix("\r\n")


def write_yolo(folder: Path, content: dict[str, Any], *, scores: bool) -> list[Path]:
    """Write a data set of `coco_json` in YOLO's layout: labels/NAME.txt for each image, empty without detections, classes.txt and data.yaml.

    A line is `class cx cy w h`: the class's index in classes.txt, then center and size as shares of the image's sides. With `scores` the score
    follows, which trainers do not accept. Returns the two files beside labels/.
    """
    place = {category["id"]: number for number, category in enumerate(content["categories"])}
    names = [category["name"] for category in content["categories"]]
    lines: dict[Id, list[str]] = {image["id"]: [] for image in content["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for row in content["annotations"]:
        wide, high = sizes[row["image_id"]]
        x, y, width, height = row["bbox"]
        numbers = [(x + width / 2) / wide, (y + height / 2) / high, width / wide, height / high]
        numbers += [row["score"]] if scores else []
        lines[row["image_id"]].append(" ".join([str(place[row["category_id"]]), *(f"{one:.6f}" for one in numbers)]))
    for image in content["images"]:
        file = folder / "labels" / f"{stem(image['file_name'])}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines[image["id"]]), encoding="utf-8")
    files = [folder / "classes.txt", folder / "data.yaml"]
    write_atomically(files[0], "".join(f"{name}\n" for name in names))
    about = "# To train on these labels, put the images into images/ beside labels/, under the same names.\n"
    described = {"train": "images", "val": "images", "names": dict(enumerate(names))}
    write_atomically(files[1], about + yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
    return files


def stem(name: str) -> str:
    """Return a path without its suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def counts(content: dict[str, Any]) -> dict[str, Any]:
    """Count images, images with boxes, and boxes (in total and by class) of a data set of `coco_json`."""
    classes = {category["id"]: category["name"] for category in content["categories"]}
    by_class = Counter(classes[row["category_id"]] for row in content["annotations"])
    return {
        "images": len(content["images"]),
        "images_with_boxes": len({row["image_id"] for row in content["annotations"]}),
        "boxes": len(content["annotations"]),
        "boxes_of_class": {name: by_class[name] for name in classes.values()},
    }


class DrawingsAndCrops:
    """Writes drawn images and crops, as far as `config` requests them; thread-safe.

    Args:
        names: of all images, on which the names of drawn images depend.

    Attributes:
        drawing, cropping: whether `config` requests drawn images, and crops.
    """

    def __init__(self, config: PredictConfig, class_names: tuple[str, ...], names: Iterable[str] = ()) -> None:
        self.drawing, self.cropping = config.writes("images"), config.writes("crops")
        self._drawn = drawn_names(names, ".jpg", (".jpg", ".jpeg"))
        self._folder, self._class_names = config.output, class_names
        self._class_folders = folder_names(class_names)

    def write(self, name: str, record: CocoImage, detections: Detections) -> None:
        """Write the drawn image below pictures/, and the crops, of an image, which is decoded once more."""
        image = Image.fromarray(load_record(record).permute(1, 2, 0).numpy())
        if self.cropping:
            self.crops(name, image, detections)
        if self.drawing:
            file = self._folder / "pictures" / self._drawn[name]
            file.parent.mkdir(parents=True, exist_ok=True)
            draw_objects(image, detections, self._class_names, legend=True).save(file, quality=_QUALITY)

    def crops(self, name: str, image: Image.Image, detections: Detections) -> None:
        """Write crops/CLASS/NAME_i.jpg, i = 1, 2, ... in the order of the detections, best first; at least one pixel each."""
        limits_4 = np.array([*image.size, *image.size])
        corners_N4 = detections.boxes_N4.double().numpy()
        edges_N4 = np.concatenate([np.floor(corners_N4[:, :2]), np.ceil(corners_N4[:, 2:])], 1).clip(0, limits_4)
        for number, (edges_4, label) in enumerate(
            zip(edges_N4.astype(int).tolist(), detections.labels_N.tolist(), strict=True), 1
        ):
            left, top = (min(edge, limit - 1) for edge, limit in zip(edges_4[:2], image.size, strict=True))
            right, bottom = max(edges_4[2], left + 1), max(edges_4[3], top + 1)
            file = self._folder / "crops" / self._class_folders[label] / f"{stem(name)}_{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.crop((left, top, right, bottom)).save(
                file, quality=95, subsampling=0
            )  # crops are enlarged when viewed


def drawn_names(names: Iterable[str], suffix: str, kept: tuple[str, ...]) -> dict[str, str]:
    """Choose file names of drawn images or videos, by name of the input.

    An input with a suffix in `kept` keeps its name. Of others, `X.png` becomes `X.jpg` with the suffix .jpg, or `X.png.jpg` where another input
    differs from it in its suffix alone.
    """
    names = list(names)
    stems = Counter(stem(name).lower() for name in names)
    drawn = {name: name for name in names if name.lower().endswith(kept)}
    used = {name.lower() for name in drawn}
    for name in names:
        if name not in drawn:
            base = stem(name) if stems[stem(name).lower()] == 1 else name
            ends = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
            drawn[name] = next(f for end in ends if (f := f"{base}{end}{suffix}").lower() not in used)
            used.add(drawn[name].lower())
    return drawn


def folder_names(class_names: tuple[str, ...]) -> list[str]:
    """Choose a folder name for each class: characters that file systems refuse become _, and equal names get the class's index."""
    safe = [re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(". ") or "_" for name in class_names]
    lower = [name.lower() for name in safe]
    return [name if lower.count(name.lower()) == 1 else f"{name}_{number}" for number, name in enumerate(safe)]


def _area(row: dict[str, Any]) -> float:
    if "segmentation" in row:
        return float(mask_codec.area(row["segmentation"]))
    return round(row["bbox"][2] * row["bbox"][3], 3)
