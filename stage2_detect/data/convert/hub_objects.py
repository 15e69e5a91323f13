"""Objects of one image as data sets of Hugging Face write them: a struct of lists, or a list of structs.

Layout: https://huggingface.co/docs/datasets/object_detection. `bbox` and `category` (numbers or names), and optionally `area`, `iscrowd` and
`segmentation` (polygons, or RLE). Empty lists say that an image shows nothing; an image without objects (null, {}, or null in place of every list)
is not labeled yet.
"""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.convert.records import Corners, SourceObject, finite_number, is_marked
from ssld.stage2_detect.data.segmentations import is_shape

BoxFormat = Literal["xywh", "xyxy", "xyxy_relative", "cxcywh_relative"]
NO_OBJECTS = "whose row has no objects, not even an empty list"
_CATEGORIES = ("category", "categories", "category_id", "label", "labels")
_CROWDS = ("iscrowd", "is_crowd", "crowd")


class Keys(NamedTuple):
    """Names of the fields of `objects`."""

    category: str
    crowd: str | None
    area: str | None
    shape: str | None


def keys_of(names: Collection[str], place: str) -> Keys:
    """Return the fields of objects that have fields of these `names`. Raises UserError without a box or a category."""
    category = next((name for name in _CATEGORIES if name in names), None)
    if "bbox" not in names or category is None:
        raise UserError(f"{place}: objects: needs bbox and one of {', '.join(_CATEGORIES)} (it has {', '.join(names)})")
    crowd = next((name for name in _CROWDS if name in names), None)
    return Keys(category, crowd, *(name if name in names else None for name in ("area", "segmentation")))


def is_labeled(objects: Any) -> bool:
    """Whether somebody has looked for objects in the image: an empty list says so, null does not."""
    return isinstance(objects, list) or any(value is not None for value in (objects or {}).values())


def objects_of(objects: Any, place: str) -> list[dict[str, Any]]:
    """Return the objects of a struct of lists or a list of structs. Raises UserError for lists of unequal length."""
    if isinstance(objects, list):
        return [one or {} for one in objects]
    lists = {key: value for key, value in objects.items() if value is not None}
    if not all(isinstance(value, list) for value in lists.values()):
        raise UserError(f"{place}: objects: expected lists, one entry for each object")
    if len({len(value) for value in lists.values()}) > 1:
        raise UserError(f"{place}: objects: its lists are of unequal length")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def read_object(
    one: dict[str, Any],
    keys: Keys,
    place: str,
    label_of: dict[Any, int],
    box_format: BoxFormat,
    size: tuple[int, int],
) -> SourceObject:
    """Convert one entry of an image's objects.

    Args:
        keys: names of its values.
        place: file and row, for messages.
        label_of: class numbers by name.
        size: width and height of the image in pixels, for boxes in fractions of it.

    Raises UserError for an unknown class, a box that is not four numbers or has a negative side, and outlines that do not fit the image.
    """
    category = one.get(keys.category)
    if isinstance(category, float) and category.is_integer():  # a column with empty cells has floats
        category = int(category)
    if isinstance(category, list | dict):
        label = -1
    elif isinstance(category, int) and not isinstance(category, bool):
        label = category
    else:
        label = label_of.get(category, -1)
    if not 0 <= label < len(label_of):
        raise UserError(f"{place}: category {category!r}, but there are {len(label_of)} classes")
    box = one.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise UserError(f"{place}: bbox {box!r}, expected four numbers")
    a, b, c, d = (finite_number(str(value), place, "bbox") for value in box)
    corners = _corners((a, b, c, d), box_format, size)
    if corners[2] < corners[0] or corners[3] < corners[1]:
        raise UserError(f"{place}: bbox {box!r} has a negative side as {box_format}; give another --box_format")
    area = one.get(keys.area) if keys.area else None
    return SourceObject(
        label,
        corners,
        place,
        crowd=keys.crowd is not None and is_marked(one.get(keys.crowd), place, keys.crowd),
        shape=_shape(one.get(keys.shape) if keys.shape else None, place, size),
        area=None if area is None else finite_number(str(area), place, "area"),
    )


def _shape(value: Any, place: str, size: tuple[int, int]) -> list[list[float]] | dict[str, Any] | None:
    """Return an RLE, or the polygons of at least three points; None without any."""
    if not value:
        return None
    if isinstance(value, dict) and {"size", "counts"} <= value.keys():
        counts = value["counts"]
        code = {"size": value["size"], "counts": counts.decode("latin-1") if isinstance(counts, bytes) else counts}
        width, height = size
        if not is_shape(code, height, width):
            raise UserError(f"{place}: segmentation: not an RLE of an image {height} pixels high and {width} wide")
        return code
    if not isinstance(value, list) or not all(isinstance(one, list) and len(one) % 2 == 0 for one in value):
        raise UserError(f"{place}: segmentation: neither polygons, lists of x, y, x, y, ..., nor RLE, size and counts")
    polygons = [[finite_number(str(number), place, "segmentation") for number in one] for one in value]
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    if polygons and not is_shape(polygons, size[1], size[0]):
        raise UserError(f"{place}: segmentation: a polygon reaches too far out of the image")
    return polygons or None


def _corners(box: Corners, box_format: BoxFormat, size: tuple[int, int]) -> Corners:
    """Convert a box to x1, y1, x2, y2 in pixels."""
    a, b, c, d = box
    if box_format == "xywh":
        return a, b, a + c, b + d
    if box_format == "xyxy":
        return box
    width, height = size
    if box_format == "xyxy_relative":
        return a * width, b * height, c * width, d * height
    return (a - c / 2) * width, (b - d / 2) * height, (a + c / 2) * width, (b + d / 2) * height


def side_of(value: Any, place: str, name: str) -> int:
    """Return a width or height; 0 for a missing one (None, or NaN in an empty cell of a table)."""
    return 0 if value is None or value != value else int(finite_number(str(value), place, name))
