"""Parser of Pascal VOC's XML in its variants: elements with their line numbers, decoded by the declaration of the file.

expat parses the XML without document types, so no entity is expanded and no other file is read. Tags are compared in lower case. Boxes outside of
`annotation/object` are errors: another schema would otherwise be read as an image without objects.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from ssld.shared.errors import UserError
from ssld.shared.files import decode_text
from ssld.stage2_detect.layouts.others import other_tool

_DECLARATION = re.compile(r"\A\s*<\?xml\b[^>]*\?>")
_ENCODING = re.compile(rb"\A\s*<\?xml\b[^>]*?\bencoding\s*=\s*[\"']\s*([\w.:-]+)\s*[\"']", re.ASCII)
# Declared encoding -> the encoding that systems write under that name: a superset with a few more characters.
_WIDER = {"gb2312": "gb18030", "gb_2312-80": "gb18030", "gbk": "gb18030", "cp936": "gb18030", "shift_jis": "cp932", "euc-kr": "cp949"}  # fmt: skip
_BOXES = {"bndbox", "robndbox", "boundingbox", "bbox", "box", "xmin", "polygon", "points"}


@dataclass
class Element:
    """An XML element with its content."""

    name: str
    """tag in lower case"""
    line: int
    """number of the line in which it begins"""
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def find(self, name: str) -> "Element | None":
        """Return the first child with a name, if there is one."""
        return next((child for child in self.children if child.name == name), None)

    def all(self, name: str) -> list["Element"]:
        """Return all children with a name."""
        return [child for child in self.children if child.name == name]

    def text_of(self, name: str) -> str:
        """Return the text of the first child with a name, "" without one."""
        child = self.find(name)
        return child.text.strip() if child else ""


def read_annotation(file: Path) -> Element:
    """Read the `annotation` element of a VOC file. Raises UserError for another root element, and for objects or boxes where VOC has none."""
    root = parse_xml(file)
    if root.name != "annotation":
        other = other_tool(file)
        raise UserError(
            f"{file}, line {root.line}: begins with <{root.name}>, and Pascal VOC with <annotation>: {other or 'is it another XML format?'}"
        )
    for element, parents in _below(root, (root,)):
        inside = [parent.name for parent in parents]
        if element.name == "object" and len(parents) > 1:
            raise UserError(
                f"{file}, line {element.line}: an <object> inside <{inside[-1]}>; VOC has it in <annotation>"
            )
        if element.name in _BOXES and inside[1:2] != ["object"]:
            raise UserError(
                f"{file}, line {element.line}: <{element.name}> inside <{inside[-1]}>; VOC has boxes in <object>"
            )
    for one in root.all("object"):
        for name in ("name", "bndbox"):
            if len(one.all(name)) > 1:
                raise UserError(f"{file}, line {one.line}: the object has {len(one.all(name))} <{name}>, expected one")
    return root


def parse_xml(file: Path) -> Element:
    """Parse an XML file and return its root element. Raises UserError for XML that is not well formed, and for any document type."""
    top = Element("", 0)
    open_elements = [top]
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True

    def start(name: str, _attributes: dict[str, str]) -> None:
        element = Element(name.lower(), parser.CurrentLineNumber)
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
        parser.Parse(_decoded(file).encode(), True)
    except (expat.ExpatError, UnicodeEncodeError) as error:
        raise UserError(f"{file}, line {parser.CurrentLineNumber}: is not well-formed XML: {error}") from None
    return top.children[0]


def _decoded(file: Path) -> str:
    """Return the text of an XML file, decoded by its declaration, which is removed."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    declared = _ENCODING.match(content)
    name = declared[1].decode("ascii").lower() if declared else "utf-8"
    if declared and name.startswith(("utf-16", "ucs-2", "utf-32", "unicode")):
        name = "utf-8"  # a declaration readable with one byte per letter cannot be UTF-16; .NET declares it for text saved otherwise
    if content.startswith((b"<\0", b"\0<")):
        name = "utf-16-le" if content.startswith(b"<") else "utf-16-be"
    try:
        text = decode_text(content, _WIDER.get(name, name))
    except LookupError:
        raise UserError(f"{file}: declares the encoding {name!r}, which is unknown") from None
    except UnicodeError as error:
        where = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)
        declares = f"declares the encoding {name!r}" if declared else "declares no encoding, which means UTF-8"
        raise UserError(f"{file}: {declares}, but is not written in it ({where})") from None
    return _DECLARATION.sub(lambda match: "\n" * match[0].count("\n"), text)


def _below(element: Element, path: tuple[Element, ...]) -> Iterator[tuple[Element, tuple[Element, ...]]]:
    """Yield (element, its parents from the root on) of all descendants of an element."""
    pending = [(element, path)]
    while pending:
        parent, parents = pending.pop()
        for child in parent.children:
            yield child, parents
            pending.append((child, (*parents, child)))
