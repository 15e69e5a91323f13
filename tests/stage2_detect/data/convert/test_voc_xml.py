"""VOC's XML in the spellings and encodings of its writers; XML of another format is an error, not an image without objects."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from converted_data import voc_xml, write

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.convert.voc_xml import Element, read_annotation


def name_in(file: Path) -> str:
    (one,) = read_annotation(file).all("object")
    return one.text_of("name")


@pytest.mark.parametrize(
    ("declared", "written", "name"),
    [
        ("GBK", "gbk", "安全帽"),
        ("gb2312", "gb18030", "鎔"),  # a letter that GB2312 itself lacks
        ("Big5", "big5", "安全帽"),
        ("Shift_JIS", "cp932", "髙"),
        ("EUC-KR", "euc-kr", "안전모"),
        ("windows-1251", "cp1251", "каска"),
        ("ISO-8859-1", "latin-1", "größe"),
        ("utf-8", "utf-8", "安全帽"),
        ("utf-8", "utf-8-sig", "安全帽"),
        ("utf-16", "utf-16", "安全帽"),
        ("utf-16", "utf-8", "安全帽"),  # .NET's string writers declare it whatever the file is saved as
        ("utf-16", "utf-16-le", "größe"),
        (None, "utf-8", "安全帽"),
        (None, "utf-8-sig", "安全帽"),
        (None, "utf-16", "安全帽"),
    ],
)
def test_encodings(tmp_path: Path, declared: str | None, written: str, name: str) -> None:
    head = f'<?xml version="1.0" encoding="{declared}"?>\n' if declared else ""
    text = head + voc_xml((name, 0, (1, 1, 2, 2)))
    (tmp_path / "a.xml").write_bytes(text.encode(written))
    assert name_in(tmp_path / "a.xml") == name


def test_a_line_before_the_declaration(tmp_path: Path) -> None:
    write(tmp_path / "a.xml", '\n\n<?xml version="1.0"\n encoding="UTF-8"?>\n' + voc_xml(("a", 0, (1, 1, 2, 2))))
    assert read_annotation(tmp_path / "a.xml").find("object") is not None
    assert read_annotation(tmp_path / "a.xml").all("object")[0].line == 8  # as an editor counts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '<?xml version="1.0" encoding="utf-8"?><annotation>安全帽'.encode("gbk"),
            "declares the encoding 'utf-8', but is",
        ),
        (
            "<annotation>安全帽</annotation>".encode("gbk"),
            "declares no encoding, which means UTF-8, but is not written in it (byte 12)",
        ),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "declares the encoding 'klingon', which is unknown"),
        (b'<?xml version="1.0" encoding="hex"?><annotation/>', "declares the encoding 'hex', which is unknown"),
        (b"", "line 1: is not well-formed XML: no element found"),
        (b"<annotation>\n<object>", "line 2: is not well-formed XML"),
        (
            b"<annotations><version>1.1</version><image/></annotations>",
            "line 1: begins with <annotations>, and Pascal VOC with",
        ),
        (b"<annotation><objects>\n<object/></objects></annotation>", "line 2: an <object> inside <objects>"),
        (
            b"<annotation>\n<item><bndbox/></item></annotation>",
            "line 2: <bndbox> inside <item>; VOC has boxes in <object>",
        ),
        (b"<annotation>\n<Obj><xmin>1</xmin></Obj></annotation>", "line 2: <xmin> inside <obj>"),
        (b"<annotation><bndbox/></annotation>", "<bndbox> inside <annotation>"),
        (b"<annotation><object>\n<object/></object></annotation>", "line 2: an <object> inside <object>"),
        (
            b"<annotation>\n<object><bndbox/><bndbox/></object></annotation>",
            "line 2: the object has 2 <bndbox>, expected one",
        ),
        (
            b"<annotation>\n<object><name>a</name><name>b</name></object></annotation>",
            "line 2: the object has 2 <name>",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_annotation(tmp_path / "a.xml")


def tags(text: str, spell: Callable[[str], str]) -> str:
    return re.sub(r"</?\w+>", lambda match: spell(match[0]), text)


def test_tags_in_any_case(tmp_path: Path) -> None:
    text = voc_xml(("Wide", 0, (1, 2, 3, 4)), ("tall", 0, (5, 6, 7, 8)))
    write(tmp_path / "plain.xml", text)
    changed = (text.replace("object>", "Object>"), tags(text, str.upper), tags(text, str.title))
    for number, other in enumerate(changed):
        file = tmp_path / f"{number}.xml"
        write(file, other)
        assert other != text

        def spelled(element: Element) -> object:
            return element.name, element.line, element.text, [spelled(child) for child in element.children]

        assert spelled(read_annotation(file)) == spelled(read_annotation(tmp_path / "plain.xml"))
        assert [one.text_of("name") for one in read_annotation(file).all("object")] == ["Wide", "tall"]


def test_parts_and_other_containers_stay(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part><attributes><attribute><name>x</name></attribute></attributes>"
    text = voc_xml(("a", 0, (1, 1, 2, 2))).replace("</object>", part + "</object>")
    text = text.replace("</annotation>", "<owner><name>me</name></owner><gps><lat>1</lat></gps></annotation>")
    write(tmp_path / "a.xml", text)
    assert name_in(tmp_path / "a.xml") == "a"
