"""Where a data set in Pascal VOC's XML keeps its files: the folders of XML and images, and which file is of which split.

Known are VOC itself and CVAT (`Annotations/`, `JPEGImages/`, `ImageSets/Main/SPLIT.txt`), PaddleDetection and PaddleX (lists of `IMAGE XML` beside
the folders, and a list of classes), Label Studio and labelImg (`images/`, or XML beside the images), Roboflow (a folder for each split, XML beside
the images). Names of folders and suffixes count in any case; hidden files do not count.
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
    """A folder of XML files and the one of their images, which may be the same."""

    xml: Path
    images: Path


@dataclass
class VocLayout:
    """What is where.

    Attributes:
        splits: the XML files of each split, in order, each once.
        units: of each split, where its files lie.
        repeated: of each split, places in lists that name a file again.
        class_list: file with the classes in order, where the data set has one.
        listed: whether lists say what belongs to the data set.
    """

    splits: dict[str, list[Entry]] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)
    repeated: dict[str, list[str]] = field(default_factory=dict)
    class_list: Path | None = None
    listed: bool = False
    notes: list[str] = field(default_factory=list)


def is_voc(path: Path) -> bool:
    """Whether a path looks like such data."""
    return path.is_dir() and bool(_unit(path) or _units_below(path) or _pair_lists(path))


def find_voc(folder: Path, splits: list[str]) -> VocLayout:
    """The layout of a folder, of the `splits` alone where any are named. Raises UserError for splits that are not there, and for lists of what is not
    there."""
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
            f"{len(left)} of {count(len(names.names), 'XML file')} in no split that was asked for (first: {left[0]})"
        )
    unread = [name for name, file in lists.items() if name not in chosen and name != "trainval" and not _of_class(file)]
    if unread and not splits:
        layout.notes.append(f"lists that are not read: {some(unread)}; --splits names those to read")
    return layout


def _of_folders(folder: Path, splits: list[str]) -> VocLayout:
    """Of a folder that has one for each split."""
    below = _units_below(folder)
    units = {one.name: unit for one, unit in below.items()}
    whole = [one for one in below if _lists(one)]
    if whole and len(units) > 1:
        raise UserError(f"{folder}: holds {some(sorted(units))}, with splits of their own; give one of them")
    if whole:
        return find_voc(whole[0], splits)
    return _of_units(folder, units, VocLayout(class_list=_class_list(folder)), splits)


def _of_units(folder: Path, units: dict[str, Unit], layout: VocLayout, splits: list[str]) -> VocLayout:
    """`layout` with all XML files of the unit of each split."""
    unknown = [split for split in splits if split not in units]
    if unknown:
        raise UserError(f"{folder}: has no split {unknown[0]!r} (it has {', '.join(units)})")
    for split in splits or units:
        layout.units[split] = units[split]
        layout.splits[split] = [Entry(units[split].xml / name) for name in list_files(units[split].xml, (".xml",))]
    return layout


def _unit(folder: Path) -> Unit | None:
    """Where a folder has its XML files: in one with a known name, or beside its images."""
    named = [one for one in subfolders(folder, _XML_FOLDERS) if list_files(one, (".xml",))]
    if len(named) > 1:
        raise UserError(
            f"{folder}: has XML files in {some([one.name for one in named])}; leave one of these folders there"
        )
    pictured = subfolders(folder, _IMAGE_FOLDERS)
    images = next((one for one in pictured if list_images(one)), folder)
    xml = named or [one for one in (folder, *pictured) if _has_xml(one)]
    return Unit(xml[0], images) if xml else None


def _units_by_split(unit: Unit) -> dict[str, Unit]:
    """Of a folder of XML files that has one for each split inside; nothing where none of those is called like a split."""
    inside = dict.fromkeys(name.partition("/")[0] for name in list_files(unit.xml, (".xml",)))
    folders = [name for name in inside if (unit.xml / name).is_dir()]
    if not any(name.lower() in SPLITS for name in folders):
        return {}
    if len(folders) < len(inside):
        raise UserError(
            f"{unit.xml}: has XML files beside {some(folders)}, which look like splits; put them into one of these"
        )
    pictured = {one.name.lower(): one for one in subfolders(unit.images)}
    return {name: Unit(unit.xml / name, pictured.get(name.lower(), unit.images)) for name in folders}


def _units_below(folder: Path) -> dict[Path, Unit]:
    """The folders of the splits, below `folder` or its folder of images, and what they hold."""
    for place in (folder, *subfolders(folder, _IMAGE_FOLDERS)):
        units = {one: unit for one in subfolders(place) if (unit := _unit(one))}
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
    """The lists of a folder by split."""
    for sets in subfolders(folder, ("imagesets",)):
        for place in (*subfolders(sets, ("main",)), sets):
            found = {file.stem: file for file in _texts(place)}
            if found:
                return found
    plain = {split_of(file): file for file in _texts(folder) if split_of(file) in (*SPLITS, "trainval")}
    return plain | _pair_lists(folder)


def _pair_lists(folder: Path) -> dict[str, Path]:
    """PaddleDetection's lists, by split."""
    found = {}
    for file in _texts(folder):
        try:
            lines = _lines(file)
        except UserError:  # some other text, in another encoding
            continue
        if lines and _PAIR.fullmatch(lines[0][1]):
            found[split_of(file)] = file
    return found


def split_of(file: Path) -> str:
    """`train` for train.txt and train_list.txt."""
    return file.stem.removesuffix("_list")


def _texts(folder: Path) -> list[Path]:
    return sorted(
        one
        for one in folder.iterdir()
        if one.suffix.lower() == ".txt" and not is_hidden(one.name) and one.name.lower() not in _CLASS_LISTS
    )


def _lines(file: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that say something; quotes around a whole line are taken off."""
    lines = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        text = line.strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1]
        if text:
            lines.append((number, text))
    return lines


def _of_class(file: Path) -> bool:
    """Whether a list is the one of a class, which has a second column of -1, 0 and 1."""
    words = next((text.split() for _, text in _lines(file)), [])
    return len(words) > 1 and words[-1] in ("-1", "0", "1")


def _chosen(folder: Path, lists: dict[str, Path], splits: list[str]) -> list[str]:
    for split in splits:
        if split not in lists:
            raise UserError(f"{folder}: has no split {split!r} (it has {', '.join(sorted(lists)[:12])})")
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
    """(place, entry) of each line of a list: a pair of image and XML file, or an image's name, with or without folder and suffix."""
    for number, text in _lines(file):
        place = f"{file}, line {number}"
        pair = _PAIR.fullmatch(text)
        if pair:
            image, xml = (_located(file.parent, pair[key], place) for key in ("image", "xml"))
            yield place, Entry(xml, image)
            continue
        found = names.find(text)
        if not found:
            words = text.split()
            if len(words) > 1 and names.find(words[0]):
                raise UserError(f"{place}: has {len(words)} columns; is it the list of one class?")
            raise UserError(f"{place}: there is no {unit.xml.name}/{text}.xml")
        if len(found) > 1:
            raise UserError(f"{place}: {text} may be {found[0]} or {found[1]} of {unit.xml.name}/; name its folder")
        yield place, Entry(unit.xml / found[0])


def _located(folder: Path, name: str, place: str) -> Path:
    for path in (folder / name, folder / name.replace("\\", "/")):
        if path.is_file():
            return Path(os.path.normpath(path))
    raise UserError(f"{place}: {name}: no such file below {folder}")
