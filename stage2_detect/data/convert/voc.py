"""Reader of detection data in the layout of Pascal VOC: one XML file per image.

Layout: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf, and its variants (`voc_layout.py`). Corners are the first and the last pixel
of an object, counted from 1: [xmin - 1, ymin - 1, xmax, ymax] as edges. Some tools write edges counted from 0 in the same XML: fractions of pixels
in most boxes show it, else they need `voc_inclusive=False`, and a corner of 0 reveals them. Rectangles that CVAT has turned are read as the boxes
around them. Deliberately absent: parts, poses, segmentation images.
"""

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES
from ssld.shared.images import UnreadableImage
from ssld.shared.tally import Tally
from ssld.shared.wording import count
from ssld.stage2_detect.data.coco_rows import TURNED
from ssld.stage2_detect.data.convert.file_index import FileIndex
from ssld.stage2_detect.data.convert.records import (
    LISTED_AGAIN,
    SourceData,
    SourceImage,
    SourceObject,
    check_class_names,
    drop_image,
    finite_number,
    is_marked,
    read_class_list,
    size_of,
    unread_kind,
)
from ssld.stage2_detect.data.convert.voc_layout import Entry, Unit, find_voc
from ssld.stage2_detect.data.convert.voc_xml import Element, read_annotation
from ssld.stage2_detect.data.segmentations import turned_box

Difficult = Literal["ignore", "keep"]
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FRACTION = re.compile(r"\d*\.0*[1-9]\d*")
_NO_IMAGES = (".xml", ".txt", ".json", ".csv", ".yaml", ".yml")


def read_voc(
    path: Path,
    *,
    classes: Path | None,
    splits: list[str],
    voc_inclusive: bool = True,
    voc_difficult: Difficult = "ignore",
) -> SourceData:
    """Read a data set from a folder. Raises UserError, naming file and line, for any fault of the data.

    Classes are those of `classes`, else those of the data set's list, else the names that occur, sorted. With `voc_difficult="ignore"` objects marked
    difficult become crowd regions: VOC's evaluation does not count them, and detectors for VOC do not train on them.
    """
    folder = path.resolve()
    layout = find_voc(folder, splits)
    files = dict.fromkeys(entry.xml for entries in layout.splits.values() for entry in entries)
    trees = {file: read_annotation(file) for file in files}
    class_list = classes or layout.class_list
    occurring = {name for file, root in trees.items() for name in _names(file, root)}
    names = read_class_list(class_list) if class_list else sorted(occurring)
    check_class_names(names, str(class_list or folder))
    if class_list:
        _check_names(trees, names, class_list)
    images = {unit.images: _Images(unit.images) for unit in layout.units.values()}
    data = SourceData("Pascal VOC", names, notes=layout.notes)
    data.crowd = "marked difficult, which makes them iscrowd (--voc_difficult keep trains on them)"
    data.hint = "another --voc_inclusive, or the images of another size?"
    if voc_inclusive and _have_fractions(trees.values()):
        voc_inclusive = False
        data.notes.append(
            f"{folder}: most boxes have fractions of pixels, so their corners are read as edges counted from 0"
        )
    for split, entries in layout.splits.items():
        tally = data.tallies[split] = Tally()
        for place in layout.repeated.get(split, []):
            tally.change("image", LISTED_AGAIN, place)
        unit = layout.units[split]
        reader = _Reader(unit, images[unit.images], names, tally, voc_inclusive, voc_difficult)
        data.splits[split] = [one for entry in entries if (one := reader.read(entry, trees[entry.xml]))]
        data.searched[split] = f"of {count(len(entries), 'XML file')} in {unit.xml}"
        if not layout.listed:
            reader.count_images_without_xml()
    return data


def _have_fractions(roots: Iterable[Element]) -> bool:
    """Whether most boxes have corners with fractions, which numbers of pixels have not. VOC's own files have a few."""
    boxes = [box for root in roots for one in root.all("object") if (box := one.find("bndbox"))]
    return 2 * sum(any(_FRACTION.fullmatch(box.text_of(key)) for key in _CORNERS) for box in boxes) > len(boxes)


def _names(file: Path, root: Element) -> dict[str, str]:
    """Return the place of the first object of each class in a file."""
    places: dict[str, str] = {}
    for one in root.all("object"):
        place = f"{file}, line {one.line}"
        name = one.text_of("name")
        if not name:
            raise UserError(f"{place}: the object has no name")
        places.setdefault(name, place)
    return places


def _check_names(trees: dict[Path, Element], names: list[str], class_list: Path) -> None:
    known = set(names)
    for file, root in trees.items():
        for name, place in _names(file, root).items():
            if name not in known:
                raise UserError(f"{place}: class {name!r} is not among the {len(names)} of {class_list}")


class _Images:
    """Lookup of the image of an XML file: the one of the same name, else the one that the file mentions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = FileIndex(folder, IMAGE_SUFFIXES)
        self._all_files: FileIndex | None = None

    def find(self, stem: str, mentioned: str, place: str) -> Path | None:
        """Return the image with the stem of the XML file, else the mentioned one; None without such an image."""
        last = mentioned.replace("\\", "/").rpartition("/")[2]
        named = [name for name in self.index.find(mentioned) if name.rpartition("/")[2] == last] if last else []
        matches = self.index.find(stem) or named or (self.index.find(mentioned) if last else [])
        if len(matches) > 1:
            matches = [name for name in matches if name in named] or matches
        if len(matches) > 1:
            raise UserError(
                f"{place}: its image may be {matches[0]} or {matches[1]} of {self.folder}; remove one of them"
            )
        return self.folder / matches[0] if matches else None

    def other(self, stem: str) -> Path | None:
        """Return a file of this name with neither an image nor a text suffix, if there is one."""
        self._all_files = self._all_files or FileIndex(self.folder, ("",))
        others = [name for name in self._all_files.find(stem) if not name.lower().endswith(_NO_IMAGES)]
        return self.folder / others[0] if others else None


class _Reader:
    """Reader of the XML files of a split; counts dropped images and boxes in `tally`."""

    def __init__(
        self,
        unit: Unit,
        images: _Images,
        names: list[str],
        tally: Tally,
        voc_inclusive: bool,
        voc_difficult: Difficult,
    ) -> None:
        self._unit, self._images, self._names, self._tally = unit, images, names, tally
        self._inclusive, self._difficult = voc_inclusive, voc_difficult
        self._used: set[Path] = set()

    def read(self, entry: Entry, root: Element) -> SourceImage | None:
        """Return the image of an XML file with its objects; None for an unsupported kind of image."""
        image = entry.image or self._image_of(entry.xml, root)
        self._used.add(image)
        labels = [self._names.index(one.text_of("name")) for one in root.all("object")]
        kind = unread_kind(image)
        if kind:
            drop_image(self._tally, image, kind, [self._names[label] for label in labels])
            return None
        size = root.find("size")
        stated, place = None, str(entry.xml)
        if size is not None:
            place = f"{entry.xml}, line {size.line}"
            width, height = (int(finite_number(size.text_of(key) or "0", place, key)) for key in ("width", "height"))
            stated = (width, height) if width and height else None  # some tools write 0 for an unknown size
        try:
            width, height = size_of(image, stated, place)
        except UnreadableImage:
            drop_image(self._tally, image, None, [self._names[label] for label in labels])
            return None
        objects = [self._object(one, label, entry.xml) for one, label in zip(root.all("object"), labels, strict=True)]
        return SourceImage(image, width, height, objects, unsized=stated is None)

    def count_images_without_xml(self) -> None:
        """Count the images without an XML file in the folders of the others."""
        folders = {image.parent for image in self._used}
        for name in self._images.index.names:
            image = self._images.folder / name
            if image not in self._used and image.parent in folders:
                self._tally.drop("image", "without an XML file", image)

    def _image_of(self, xml: Path, root: Element) -> Path:
        stem = xml.relative_to(self._unit.xml).with_suffix("").as_posix()
        mentioned = root.text_of("filename")
        image = self._images.find(stem, mentioned, str(xml)) or self._images.other(stem)
        if image is None:
            raise UserError(
                f"{xml}: its image is not in {self._images.folder}, neither as {stem}.* nor as {mentioned!r}"
            )
        return image

    def _object(self, one: Element, label: int, xml: Path) -> SourceObject:
        place = f"{xml}, line {one.line}"
        box = one.find("bndbox")
        if box is None:
            other = ", but a polygon, as in LabelMe's XML; export it as COCO" if one.find("polygon") else ""
            raise UserError(f"{place}: the object has no bndbox{other}")
        x1, y1, x2, y2 = (finite_number(box.text_of(key), place, key) for key in _CORNERS)
        if x2 < x1 or y2 < y1:
            raise UserError(f"{place}: xmax or ymax lies before xmin or ymin")
        if self._inclusive and min(x1, y1) < 1:
            raise UserError(
                f"{place}: a corner at {min(x1, y1):g}, but VOC counts pixels from 1; give --voc_inclusive false for edges "
                "counted from 0"
            )
        corners = (x1 - 1, y1 - 1, x2, y2) if self._inclusive else (x1, y1, x2, y2)
        if degrees := _rotation(one):
            left, top, width, height = turned_box(
                (corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]), degrees
            )
            corners = (left, top, left + width, top + height)
            self._tally.change("box", TURNED, place)
        difficult = is_marked(one.text_of("difficult"), place, "difficult")
        return SourceObject(label, corners, place, crowd=difficult and self._difficult == "ignore")


def _rotation(one: Element) -> float:
    """Return the degrees by which CVAT's rectangle is turned about its center; 0 without such an attribute, and for half a turn."""
    attributes = one.find("attributes")
    for each in attributes.all("attribute") if attributes else ():
        if each.text_of("name") == "rotation":
            with suppress(ValueError):
                degrees = float(each.text_of("value")) % 180
                return degrees if math.isfinite(degrees) else 0.0
    return 0.0
