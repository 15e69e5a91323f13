"""COCO JSON parsed and validated into a few arrays and lists; detections written in COCO's results format.

Formats: https://cocodataset.org/#format-data and #format-results. Every fault of a file is a `UserError` that names the file and the id; the
rules are in `coco_rows.py`.

Legend: I images, N annotations of the file, or detections of an image.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.files import atomically
from ssld.shared.machine import without_collector
from ssld.shared.wording import some
from ssld.stage2_detect.data.coco_rows import FIXES, changes_of, validate_rows
from ssld.stage2_detect.data.coco_rows import Id as Id
from ssld.stage2_detect.layouts.others import other_tool

if TYPE_CHECKING:  # data are checked and converted without torch
    from ssld.stage2_detect.models.batch import Detections

Convention = Literal["upright", "stored"]
"""form of an EXIF-rotated image that the boxes refer to"""
ORIENTATION_KEY = "image_orientation"
"""key of `info` for the convention; an addition to COCO's format"""


@dataclass(frozen=True, slots=True, eq=False)
class CocoTable:
    """A COCO file in file order."""

    class_names: list[str]
    category_ids: list[Id]
    image_ids: list[Id]
    file_names: list[str]
    widths_I: np.ndarray
    """int64"""
    heights_I: np.ndarray
    """int64"""
    annotation_ids: list[Id]
    owners_N: np.ndarray
    """int64: position of the image"""
    labels_N: np.ndarray
    """int64: position in `class_names`"""
    boxes_N4: np.ndarray
    """float64 xywh"""
    crowd_N: np.ndarray
    """bool"""
    areas_N: np.ndarray
    """float64; width x height if the file gives no area"""
    changes: list[tuple[str, str, int, str]]
    """values read in another form than that of the file: (noun, cause, number, name of the first)"""
    segmentations: Sequence[Any] | None
    """raw polygons or RLE, None for an annotation without; None if they were not requested"""
    orientation: Convention | None = None
    """convention that the file states (`stated_orientation`)"""


@without_collector()
def read_table(file: str, *, segmentations: bool) -> CocoTable:
    """Read and check a file. Raises UserError for any fault."""
    content = load_content(file)
    rows = validate_rows(content)
    if not rows.category_ids:
        raise UserError(f"{file}: 'categories' is empty")
    if rows.faults:
        first = rows.faults[0]
        more = f" (the first of {len(first.names):,})" if len(first.names) > 1 else ""
        fix = FIXES.get((first.kind, first.cause))
        advice = f"; in a copy, `ssld doctor --fix DIR` {fix}" if fix else ""
        raise UserError(f"{file}: {first.sentence}{more}{advice}")
    kept = [index for index in range(len(rows.category_ids)) if index not in rows.unused]
    label_of = np.zeros(len(rows.category_ids), dtype=np.int64)
    label_of[kept] = np.arange(len(kept))
    sizes_I2 = rows.sizes_I2.astype(np.int64)
    return CocoTable(
        class_names=[str(rows.class_names[index]) for index in kept],
        category_ids=cast(list[Id], [rows.category_ids[index] for index in kept]),
        image_ids=cast(list[Id], rows.image_ids),
        file_names=cast(list[str], rows.file_names),
        widths_I=sizes_I2[:, 0],
        heights_I=sizes_I2[:, 1],
        annotation_ids=cast(list[Id], rows.annotation_ids),
        owners_N=rows.owners_N,
        labels_N=label_of[rows.labels_N],
        boxes_N4=rows.boxes_N4,
        crowd_N=rows.crowd_N,
        areas_N=rows.areas_N,
        changes=changes_of(rows),
        segmentations=[row.get("segmentation") for row in content["annotations"]] if segmentations else None,
        orientation=stated_orientation(content, f"{file}: "),
    )


def stated_orientation(content: Mapping[str, Any], place: str = "") -> Convention | None:
    """Return `info.image_orientation` of a file, or None. Raises UserError, which begins with `place`, for a value other than upright and stored."""
    info = content.get("info")
    value: Any = info.get(ORIENTATION_KEY) if isinstance(info, dict) else None
    if value is not None and value not in get_args(Convention):
        raise UserError(
            f"{place}info.{ORIENTATION_KEY} is {value!r}, expected one of {', '.join(get_args(Convention))}"
        )
    return value


def with_orientation(content: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
    """Return the content of a COCO file with `info.image_orientation` set to `convention`."""
    info = content.get("info")
    return {**content, "info": {**(info if isinstance(info, dict) else {}), ORIENTATION_KEY: convention}}


def load_content(file: str | Path) -> dict[str, Any]:
    """Load a COCO file; checks that `images`, `annotations` and `categories` are lists of objects. Raises UserError."""
    try:
        data = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = (
            f"is not text in UTF-8 (byte {error.start:,})"
            if isinstance(error, UnicodeDecodeError)
            else f"is not JSON: {error}"
        )
        raise UserError(f"{file} {reason}{_other(file)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{file} is not a COCO data set: expected an object, got a {type(data).__name__}{_other(file)}")
    for key in ("images", "annotations", "categories"):
        if key not in data:
            raise UserError(
                f"{file} is not a COCO data set: it has no key {key!r} (it has: {some([repr(one) for one in data], 8) or 'none'}){_other(file)}"
            )
        if not isinstance(data[key], list) or not all(isinstance(row, dict) for row in data[key]):
            raise UserError(f"{file} is not a COCO data set: {key!r} is not a list of objects")
    return data


def _other(file: str | Path) -> str:
    """Return the end of a message on a file that may be of another tool."""
    return f"; {other}" if (other := other_tool(Path(file))) else ""


def write_results(detections: "Mapping[Id, Detections]", category_ids: Sequence[Id], path: Path) -> None:
    """Write detections in COCO's results format, with the image and category ids of the annotation file; atomic.

    Args:
        detections: by image id.
        category_ids: id of each class index.
        path: file to write.
    """
    with atomically(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        between = "["
        for image_id, of_image in detections.items():
            # Row by row: as one string, 100 masks for each of 5,000 images take half a gigabyte.
            for row in result_rows(image_id, of_image, category_ids):
                file.write(between + json.dumps(row, allow_nan=False))
                between = ", "
        file.write("[]" if between == "[" else "]")


def result_rows(image_id: Id, detections: "Detections", category_ids: Sequence[Id]) -> Iterator[dict[str, Any]]:
    """Yield the detections of an image as rows of COCO's results format; boxes as x, y, width, height, rounded to a thousandth of a pixel."""
    # Rounded before the difference, so that no box leaves its image by it.
    corners_N4 = detections.boxes_N4.double().cpu().numpy().round(3)
    boxes = np.concatenate([corners_N4[:, :2], corners_N4[:, 2:] - corners_N4[:, :2]], 1).round(3).tolist()
    columns = zip(boxes, detections.scores_N.tolist(), detections.labels_N.tolist(), strict=True)
    for index, (box, score, label) in enumerate(columns):
        category_id = category_ids[label]
        row = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": float(f"{score:.9g}")}
        if detections.masks is not None:
            row["segmentation"] = _as_text(detections.masks[index])
        yield row


def _as_text(code: dict[str, Any]) -> dict[str, Any]:
    """Return an RLE whose counts are text, as JSON needs it."""
    counts = code["counts"]
    return {"size": list(code["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}
