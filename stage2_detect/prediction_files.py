"""What a prediction leaves on disk: parts while it runs, so that it can go on after a kill, and at the end one COCO JSON.

A part is a file of so many pictures, written whole by one process. Parts are cut by aspect ratio, so that a batch needs little padding, and do not
depend on the number of processes.
"""

import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_codec

from shared.errors import UserError
from shared.run_dir import write_atomically
from stage2_detect.batch_order import eval_batches
from stage2_detect.coco import CocoImage, Id

_PART = 128  # pictures, about


class Parts:
    """The parts of a prediction over `records`, in `folder`.

    Attributes:
        records: of each part, in the order in which they are detected.
    """

    def __init__(self, folder: Path, records: Sequence[CocoImage], batch_size: int) -> None:
        self._folder = folder
        order = [index for batch in eval_batches(records, batch_size) for index in batch]
        size = (
            max(1, _PART // batch_size) * batch_size
        )  # whole batches: they stay the same whatever parts are left to do
        self.records = [[records[index] for index in order[at : at + size]] for at in range(0, len(order), size)]

    def left(self) -> list[int]:
        """Numbers of those that are not there. Raises UserError when one that is there is of other pictures."""
        missing = []
        for number, records in enumerate(self.records):
            if not self._file(number).exists():
                missing.append(number)
            elif self.read(number)["images"] != [record.image_id for record in records]:
                raise UserError(
                    f"{self._folder.parent}: was begun on other pictures than there are now; give another --output or delete it"
                )
        return missing

    def write(
        self, number: int, rows: dict[Id, list[dict[str, Any]]], unreadable: list[list[str]], best: float
    ) -> None:
        """Write a part: COCO results of each image that has any, what could not be read and why, and the best score of all."""
        self._folder.mkdir(exist_ok=True)
        images = [record.image_id for record in self.records[number]]
        content = {"images": images, "unreadable": unreadable, "best": best, "found": list(rows.items())}
        write_atomically(self._file(number), json.dumps(content, allow_nan=False))

    def read(self, number: int) -> dict[str, Any]:
        """A part that is there."""
        content: dict[str, Any] = json.loads(self._file(number).read_text(encoding="utf-8"))
        return content

    def read_all(self) -> Iterator[dict[str, Any]]:
        """All parts."""
        return (self.read(number) for number in range(len(self.records)))

    def delete(self) -> None:
        """Remove them."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.json"


def coco_json(
    records: Sequence[CocoImage],
    names: Sequence[str],
    rows: dict[Id, list[dict[str, Any]]],
    categories: dict[Id, str],
    info: dict[str, Any],
) -> dict[str, Any]:
    """COCO's data set of these images and what was found in them; each annotation has its `score`."""
    images = [
        {"id": record.image_id, "file_name": name, "width": record.width, "height": record.height}
        for record, name in zip(records, names, strict=True)
    ]
    found = [row for record in records for row in rows.get(record.image_id, [])]
    annotations = [{"id": number, **row, "area": _area(row), "iscrowd": 0} for number, row in enumerate(found, 1)]
    listed = [{"id": category_id, "name": name} for category_id, name in categories.items()]
    return {"info": info, "images": images, "annotations": annotations, "categories": listed}


def table_text(content: dict[str, Any]) -> str:
    """A data set of `coco_json` as CSV, a box a line."""
    file_names = {image["id"]: image["file_name"] for image in content["images"]}
    classes = {category["id"]: category["name"] for category in content["categories"]}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file_name", "class", "score", "x", "y", "width", "height"])
    for row in content["annotations"]:
        table.writerow([file_names[row["image_id"]], classes[row["category_id"]], row["score"], *row["bbox"]])
    return text.getvalue()


def counts(content: dict[str, Any]) -> dict[str, Any]:
    """How many images, images with boxes and boxes a data set of `coco_json` has, in all and by class."""
    classes = {category["id"]: category["name"] for category in content["categories"]}
    by_class = Counter(classes[row["category_id"]] for row in content["annotations"])
    return {
        "images": len(content["images"]),
        "images_with_boxes": len({row["image_id"] for row in content["annotations"]}),
        "boxes": len(content["annotations"]),
        "boxes_of_class": {name: by_class[name] for name in classes.values()},
    }


def _area(row: dict[str, Any]) -> float:
    if "segmentation" in row:
        return float(mask_codec.area(row["segmentation"]))
    return round(row["bbox"][2] * row["bbox"][3], 3)
