"""Reads detection data in the layout of Pascal VOC: an XML file for each image.

Layout: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf (`Annotations/*.xml`, `JPEGImages/`,
`ImageSets/Main/SPLIT.txt`). Corners are the first and the last pixel of an object, counted from 1: [xmin - 1, ymin - 1,
xmax, ymax] as edges. Tools that write edges counted from 0 in the same XML need `voc_inclusive=False`; a corner of 0 tells
them apart. XML is parsed by expat without document types, so that no entity is expanded and nothing outside is read.
Deliberately absent: parts, poses, segmentation images.
"""

from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from ssld.shared.errors import UserError
from ssld.shared.files import list_images, read_text
from ssld.stage2_detect.data.convert.records import (
    Found,
    FoundImage,
    FoundObject,
    check_class_names,
    finite_number,
    read_class_list,
    size_of,
)

SPLITS = ("train", "val", "test")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class Element:
    """An XML element, the line it begins in, and what is in it."""

    name: str
    line: int
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def find(self, name: str) -> "Element | None":
        """The first child of a name."""
        return next((child for child in self.children if child.name == name), None)

    def all(self, name: str) -> list["Element"]:
        """All children of a name."""
        return [child for child in self.children if child.name == name]

    def text_of(self, name: str) -> str:
        """The text of the first child of a name, "" where there is none."""
        child = self.find(name)
        return child.text.strip() if child else ""


def is_voc(path: Path) -> bool:
    """Whether a path looks like such data."""
    return (path / "Annotations").is_dir()


def read_voc(
    path: Path, *, classes: Path | None, splits: list[str], voc_inclusive: bool = True, voc_difficult: str = "ignore"
) -> Found:
    """The data set at a folder. Raises UserError, naming file and line, for whatever is wrong in it.

    Classes are those of `classes`, else the names that occur, sorted. Objects marked difficult become crowd regions with
    `voc_difficult="ignore"`: VOC's own evaluation counts them neither as found nor as missed, and its detectors do not train
    on them.
    """
    folder = path.resolve()
    files = sorted((folder / "Annotations").glob("*.xml"))
    if not files:
        raise UserError(f"{folder / 'Annotations'}: holds no .xml file")
    stems = _stems_of_splits(folder, files, splits)
    trees = {stem: parse_xml(folder / "Annotations" / f"{stem}.xml") for every in stems.values() for stem in every}
    names = read_class_list(classes) if classes else sorted({name.text for _, name in _names(trees, folder)})
    check_class_names(names, str(folder / "Annotations"))
    _check_names(trees, folder, names)
    pictures = _Pictures(folder)
    found = {
        split: [_read_image(folder, stem, trees[stem], pictures, names, voc_inclusive, voc_difficult) for stem in every]
        for split, every in stems.items()
    }
    notes = []
    read = {stem for every in stems.values() for stem in every}
    if len(read) < len(files):
        notes.append(f"{len(files) - len(read)} of {len(files)} XML files belong to no split that was asked for")
    hint = "another --voc_inclusive, or the images of another size?"
    return Found("Pascal VOC", names, found, notes, hint)


def parse_xml(file: Path) -> Element:
    """The root element of an XML file. Raises UserError for what is not well formed, and for any document type."""
    top = Element("", 0)
    open_elements = [top]
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(name: str, _attributes: dict[str, str]) -> None:
        element = Element(name, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def end(_name: str) -> None:
        open_elements.pop()

    def text(data: str) -> None:
        open_elements[-1].text += data

    def refuse(*_: object) -> None:
        raise UserError(f"{file}, line {parser.CurrentLineNumber}: has a document type (<!DOCTYPE>); remove it")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(file.read_bytes(), True)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (expat.ExpatError, LookupError, ValueError) as error:  # the last two: of an unknown encoding
        raise UserError(f"{file}, line {parser.CurrentLineNumber}: is not well-formed XML: {error}") from None
    return top.children[0]


def _stems_of_splits(folder: Path, files: list[Path], splits: list[str]) -> dict[str, list[str]]:
    """File names without suffix, by split."""
    lists = folder / "ImageSets" / "Main"
    if not lists.is_dir():
        if splits:
            raise UserError(f"{folder}: has no split {splits[0]!r} (ImageSets/Main is not there)")
        return {"train": [file.stem for file in files]}
    present = sorted(file.stem for file in lists.glob("*.txt"))
    chosen = (
        splits or [name for name in SPLITS if name in present] or [name for name in ("trainval",) if name in present]
    )
    if not chosen:
        raise UserError(f"{lists}: has none of {', '.join(SPLITS)}, trainval; give --splits")
    known = {file.stem for file in files}
    found: dict[str, list[str]] = {}
    for split in chosen:
        file = lists / f"{split}.txt"
        if split not in present:
            raise UserError(f"{folder}: has no split {split!r} (it has {', '.join(present[:12])})")
        found[split] = []
        for number, line in enumerate(read_text(file).splitlines(), 1):
            words = line.split()
            if len(words) > 1:
                raise UserError(f"{file}, line {number}: has {len(words)} columns; is it the list of one class?")
            if words and words[0] not in known:
                raise UserError(f"{file}, line {number}: there is no Annotations/{words[0]}.xml")
            found[split] += words
        if not found[split]:
            raise UserError(f"{file}: names no image")
    return found


def _names(trees: dict[str, Element], folder: Path) -> list[tuple[str, Element]]:
    """(place, name element) of every object; the text is stripped."""
    found = []
    for stem, root in trees.items():
        for one in root.all("object"):
            place = f"{folder / 'Annotations' / stem}.xml, line {one.line}"
            name = one.find("name")
            if name is None or not name.text.strip():
                raise UserError(f"{place}: the object has no name")
            name.text = name.text.strip()
            found.append((place, name))
    return found


def _check_names(trees: dict[str, Element], folder: Path, names: list[str]) -> None:
    known = set(names)
    for place, name in _names(trees, folder):
        if name.text not in known:
            raise UserError(f"{place}: class {name.text!r} is not among the {len(names)} given")


class _Pictures:
    """Finds the image of an XML file: of the same name, else the one it mentions."""

    def __init__(self, folder: Path) -> None:
        self.folder = next(folder / name for name in _IMAGE_FOLDERS if (folder / name).is_dir())
        self._by_stem: dict[str, str] = {}
        names = list_images(self.folder)
        for name in names:
            self._by_stem.setdefault(Path(name).with_suffix("").as_posix(), name)
        self._names = set(names)

    def find(self, stem: str, mentioned: str, place: str) -> Path:
        name = self._by_stem.get(stem) or (mentioned if mentioned in self._names else None)
        if name is None:
            raise UserError(f"{place}: its image is not in {self.folder}, neither as {stem}.* nor as {mentioned!r}")
        return self.folder / name


def _read_image(
    folder: Path,
    stem: str,
    root: Element,
    pictures: _Pictures,
    names: list[str],
    voc_inclusive: bool,
    voc_difficult: str,
) -> FoundImage:
    file = folder / "Annotations" / f"{stem}.xml"
    image = pictures.find(stem, root.text_of("filename"), str(file))
    size = root.find("size")
    said, place = None, str(file)
    if size is not None:
        place = f"{file}, line {size.line}"
        width, height = (int(finite_number(size.text_of(key), place, key)) for key in ("width", "height"))
        said = (width, height) if width and height else None  # some tools write 0 where they do not know
    width, height = size_of(image, said, place)
    objects = []
    for one in root.all("object"):
        place = f"{file}, line {one.line}"
        box = one.find("bndbox")
        if box is None:
            raise UserError(f"{place}: the object has no bndbox")
        x1, y1, x2, y2 = (finite_number(box.text_of(key), place, key) for key in _CORNERS)
        if x2 < x1 or y2 < y1:
            raise UserError(f"{place}: xmax or ymax lies before xmin or ymin")
        if voc_inclusive and min(x1, y1) < 1:
            raise UserError(
                f"{place}: a corner at {min(x1, y1):g}, but VOC counts pixels from 1; give --voc_inclusive false for edges "
                "counted from 0"
            )
        corners = (x1 - 1, y1 - 1, x2, y2) if voc_inclusive else (x1, y1, x2, y2)
        difficult = one.text_of("difficult") not in ("", "0")
        objects.append(
            FoundObject(names.index(one.text_of("name")), corners, place, crowd=difficult and voc_difficult == "ignore")
        )
    return FoundImage(image, width, height, objects, unsized=said is None)
