"""Layouts of data sets with Pascal VOC's XML: the folders of XML files and images, and the files of each split.

Supported are VOC itself and CVAT (`Annotations/`, `JPEGImages/`, `ImageSets/Main/SPLIT.txt`), PaddleDetection and PaddleX (lists of `IMAGE XML`
beside the folders, and a list of classes), Label Studio and labelImg (`images/`, or XML beside the images), Roboflow (one folder per split, XML
beside the images). Names of folders and suffixes match in any case; hidden files are ignored.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES, is_hidden, list_files, list_images, read_text
from ssld.shared.wording import count, some
from ssld.stage2_detect.data.convert.file_index import FileIndex, subfolders
from ssld.stage2_detect.data.convert.records import check_splits

SPLITS = ("train", "val", "valid", "validation", "test")
_XML_FOLDERS = ("annotations", "annotation", "xml", "xmls", "labels", "label")
_IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")
_CLASS_LISTS = ("label_list.txt", "labels.txt")  # PaddleDetection's, PaddleX's
_PAIR = re.compile(rf"(?P<image>.+({'|'.join(map(re.escape, IMAGE_SUFFIXES))}))\s+(?P<xml>.+\.xml)", re.IGNORECASE)


class Entry(NamedTuple):
    """One XML file, and the image that a list pairs it with."""

    xml: Path
    image: Path | None = None


class Unit(NamedTuple):
    """A folder of XML files and the folder of their images, which may be equal."""

    xml: Path
    images: Path


@dataclass
class VocLayout:
    """Files of a data set.

    Attributes:
        splits: XML files of each split, in order, each once.
        units: folders of each split.
        repeated: by split, places in lists that name a file again.
        class_list: file with the classes in order, if the data set has one.
        listed: whether lists define which files belong to the data set.
        notes: lines for the log.
    """

    splits: dict[str, list[Entry]] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)
    repeated: dict[str, list[str]] = field(default_factory=dict)
    class_list: Path | None = None
    listed: bool = False
    notes: list[str] = field(default_factory=list)


def is_voc(path: Path) -> bool:
    """Whether a folder contains data in one of the layouts."""
    return path.is_dir() and bool(_unit(path) or _units_below(path) or _pair_lists(path))


def find_voc(folder: Path, splits: list[str]) -> VocLayout:
    """Find the layout of a folder, restricted to `splits` if any are named. Raises UserError for missing splits and for lists of missing files."""
    unit = _unit(folder) or (Unit(folder, folder) if _pair_lists(folder) else None)
    if unit is None:
        return _of_folders(folder, splits)
    layout = VocLayout(class_list=_class_list(folder))
    lists = _lists(folder)
    if not lists and (units := _units_by_split(unit)):
        layout.listed = unit.images in {one.images for one in units.values()}  # images of all splits lie together
        return _of_units(folder, units, layout, splits)
    if not lists:
        if splits and splits != ["train"]:
            raise UserError(
                f"{folder}: has no split {splits[0]!r} (there is neither ImageSets/Main/ nor a list beside {unit.xml.name}/)"
            )
        layout.splits["train"] = [Entry(unit.xml / name) for name in list_files(unit.xml, (".xml",))]
        layout.units["train"] = unit
        return layout
    layout.listed = True
    chosen = _chosen(folder, lists, splits)
    names = FileIndex(unit.xml, (".xml",))
    for split in chosen:
        entries: dict[Path, Entry] = {}
        layout.repeated[split] = []
        for place, entry in _entries(lists[split], unit, names):
            if entry.xml in entries:
                layout.repeated[split].append(place)
            entries.setdefault(entry.xml, entry)
        if not entries:
            raise UserError(f"{lists[split]}: names no image")
        layout.splits[split] = list(entries.values())
        layout.units[split] = unit
    read = {entry.xml for entries in layout.splits.values() for entry in entries}
    left = [name for name in names.names if unit.xml / name not in read]
    if left:
        layout.notes.append(
            f"{len(left)} of {count(len(names.names), 'XML file')} in no requested split (first: {left[0]})"
        )
    unread = [name for name, file in lists.items() if name not in chosen and name != "trainval" and not _of_class(file)]
    if unread and not splits:
        layout.notes.append(f"lists that are not read: {some(unread)}; name those to read by --splits")
    return layout


def _of_folders(folder: Path, splits: list[str]) -> VocLayout:
    """Find the layout of a folder with one subfolder per split."""
    below = _units_below(folder)
    units = {one.name: unit for one, unit in below.items()}
    whole = [one for one in below if _lists(one)]
    if whole and len(units) > 1:
        raise UserError(f"{folder}: holds {some(sorted(units))}, each with splits; give one of them")
    if whole:
        return find_voc(whole[0], splits)
    return _of_units(folder, units, VocLayout(class_list=_class_list(folder)), splits)


def _of_units(folder: Path, units: dict[str, Unit], layout: VocLayout, splits: list[str]) -> VocLayout:
    """Fill `layout` with all XML files of the unit of each split."""
    check_splits(splits, units, folder)
    for split in splits or units:
        layout.units[split] = units[split]
        layout.splits[split] = [Entry(units[split].xml / name) for name in list_files(units[split].xml, (".xml",))]
    return layout


def _unit(folder: Path) -> Unit | None:
    """Find the XML files of a folder: in a subfolder with a known name, or beside its images."""
    named = [one for one in subfolders(folder, _XML_FOLDERS) if list_files(one, (".xml",))]
    if len(named) > 1:
        raise UserError(
            f"{folder}: has XML files in {some([one.name for one in named])}; leave one of these folders there"
        )
    image_folders = subfolders(folder, _IMAGE_FOLDERS)
    images = next((one for one in image_folders if list_images(one)), folder)
    xml = named or [one for one in (folder, *image_folders) if _has_xml(one)]
    return Unit(xml[0], images) if xml else None


def _units_by_split(unit: Unit) -> dict[str, Unit]:
    """Return the units of a folder of XML files with one subfolder per split; empty if no subfolder has the name of a split."""
    inside = dict.fromkeys(name.partition("/")[0] for name in list_files(unit.xml, (".xml",)))
    folders = [name for name in inside if (unit.xml / name).is_dir()]
    if not any(name.lower() in SPLITS for name in folders):
        return {}
    if len(folders) < len(inside):
        raise UserError(
            f"{unit.xml}: has XML files beside {some(folders)}, which look like splits; move them into one of these"
        )
    image_folders = {one.name.lower(): one for one in subfolders(unit.images)}
    return {name: Unit(unit.xml / name, image_folders.get(name.lower(), unit.images)) for name in folders}


def _units_below(folder: Path) -> dict[Path, Unit]:
    """Return the unit of each split's folder in `folder` or its folder of images."""
    for parent in (folder, *subfolders(folder, _IMAGE_FOLDERS)):
        units = {one: unit for one in subfolders(parent) if (unit := _unit(one))}
        if units:
            return units
    return {}


def _has_xml(folder: Path) -> bool:
    return any(one.suffix.lower() == ".xml" and not is_hidden(one.name) for one in folder.iterdir())


def _class_list(folder: Path) -> Path | None:
    return next(
        (entry for entry in sorted(folder.iterdir()) if entry.name.lower() in _CLASS_LISTS and entry.is_file()), None
    )


def _lists(folder: Path) -> dict[str, Path]:
    """Return the lists of a folder by split."""
    for sets in subfolders(folder, ("imagesets",)):
        for parent in (*subfolders(sets, ("main",)), sets):
            lists = {file.stem: file for file in _texts(parent)}
            if lists:
                return lists
    plain = {split_of(file): file for file in _texts(folder) if split_of(file) in (*SPLITS, "trainval")}
    return plain | _pair_lists(folder)


def _pair_lists(folder: Path) -> dict[str, Path]:
    """Return PaddleDetection's lists by split."""
    lists = {}
    for file in _texts(folder):
        try:
            lines = _lines(file)
        except UserError:  # another text file, in another encoding
            continue
        if lines and _PAIR.fullmatch(lines[0][1]):
            lists[split_of(file)] = file
    return lists


def split_of(file: Path) -> str:
    """Return the split of a list file: `train` for train.txt and train_list.txt."""
    return file.stem.removesuffix("_list")


def _texts(folder: Path) -> list[Path]:
    return sorted(
        one
        for one in folder.iterdir()
        if one.suffix.lower() == ".txt" and not is_hidden(one.name) and one.name.lower() not in _CLASS_LISTS
    )


def _lines(file: Path) -> list[tuple[int, str]]:
    """Return (number, text) of the lines that are not empty, without quotes around a whole line."""
    lines = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        text = line.strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1]
        if text:
            lines.append((number, text))
    return lines


def _of_class(file: Path) -> bool:
    """Whether a list is VOC's list of one class, with a second column of -1, 0 and 1."""
    words = next((text.split() for _, text in _lines(file)), [])
    return len(words) > 1 and words[-1] in ("-1", "0", "1")


def _chosen(folder: Path, lists: dict[str, Path], splits: list[str]) -> list[str]:
    check_splits(splits, sorted(lists), folder)
    if splits:
        return splits
    chosen = [name for name in sorted(lists, key=_order) if name.lower() in SPLITS]
    if "train" not in (name.lower() for name in chosen):
        chosen = [name for name in lists if name.lower() == "trainval"] + chosen
    chosen = chosen or [name for name, file in lists.items() if not _of_class(file)]
    if not chosen:
        raise UserError(f"{folder}: its lists are those of classes ({some(sorted(lists))}); give --splits")
    return chosen


def _order(split: str) -> int:
    return SPLITS.index(split.lower()) if split.lower() in SPLITS else len(SPLITS)


def _entries(file: Path, unit: Unit, names: FileIndex) -> Iterator[tuple[str, Entry]]:
    """Yield (place, entry) of each line of a list: a pair of image and XML file, or an image name with or without folder and suffix."""
    for number, text in _lines(file):
        place = f"{file}, line {number}"
        pair = _PAIR.fullmatch(text)
        if pair:
            image, xml = (_located(file.parent, pair[key], place) for key in ("image", "xml"))
            yield place, Entry(xml, image)
            continue
        matches = names.find(text)
        if not matches:
            words = text.split()
            if len(words) > 1 and names.find(words[0]):
                raise UserError(f"{place}: has {len(words)} columns; is it the list of one class?")
            raise UserError(f"{place}: there is no {unit.xml.name}/{text}.xml")
        if len(matches) > 1:
            raise UserError(f"{place}: {text} may be {matches[0]} or {matches[1]} of {unit.xml.name}/; name its folder")
        yield place, Entry(unit.xml / matches[0])


def _located(folder: Path, name: str, place: str) -> Path:
    for path in (folder / name, folder / name.replace("\\", "/")):
        if path.is_file():
            return Path(os.path.normpath(path))
    raise UserError(f"{place}: {name}: no such file below {folder}")
