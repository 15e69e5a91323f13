"""Detections as pre-annotations for labeling tools: Label Studio's JSON tasks and CVAT for images 1.1.

Label Studio: https://labelstud.io/guide/predictions, coordinates in percent of the image. CVAT: https://docs.cvat.ai/docs/manual/advanced/formats/format-cvat/,
corners in pixels. Both have boxes of images; masks and frames of videos are left out. Characters that XML cannot hold are escaped in class names. An
image whose name a file cannot hold is left out of it and counted: under another name the tool would not find the image.
"""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from ssld.shared.files import escaped, write_atomically
from ssld.shared.wording import count, printable

_TAGS = ("label", "image")  # names of the controls in Label Studio's labeling configuration
# All but those of XML 1.0; also the carriage return, which XML's readers replace in text.
_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NOT_XML_NAME = re.compile(
    "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # in attributes a carriage return is kept
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # bytes of a file name that are no UTF-8


def write_label_files(
    folder: Path, content: dict[str, Any], tools: Collection[str], *, prefix: str, log: Callable[[str], None]
) -> list[Path]:
    """Write a data set of `coco_json` into `folder` for `label_studio` and `cvat`, those of them that `tools` holds; returns the files.

    Args:
        prefix: as of `label_studio_tasks`.
        log: called with a line on the images that are left out of a file.
    """
    texts = {}
    if "label_studio" in tools:
        part = without_odd_names(content, "label_studio.json", log)
        texts["label_studio.json"] = json.dumps(label_studio_tasks(part, prefix), allow_nan=False)
        texts["label_studio.xml"] = label_studio_config(content)
    if "cvat" in tools:
        texts["cvat.xml"] = cvat_xml(without_odd_names(content, "cvat.xml", log))
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def without_odd_names(content: dict[str, Any], file: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Return a data set without the images whose names `file` cannot hold: no file those that are not UTF-8, XML no control characters.

    Args:
        log: called with a line that counts them and names the first.
    """
    odd = _NOT_XML_NAME if file.endswith(".xml") else _NOT_UTF8
    names = {image["id"]: image["file_name"] for image in content["images"] if odd.search(image["file_name"])}
    if not names:
        return content
    why = "has a character that XML cannot hold" if odd is _NOT_XML_NAME else "is not UTF-8"
    first = printable(escaped(min(names.values())))
    log(
        f"{file}: {count(len(names), 'image')} left out, whose name {why} (first: {first}); rename them to have them in it"
    )
    kept = {
        key: [row for row in content[key] if row[of] not in names]
        for key, of in (("images", "id"), ("annotations", "image_id"))
    }
    return content | kept


def label_studio_tasks(content: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """Convert a data set of `coco_json` to tasks of Label Studio, one per image, with its boxes as a prediction.

    The labeling configuration is `label_studio_config`.

    Args:
        prefix: what precedes the path of an image in the task, such as `/data/local-files/?d=` for files that Label Studio serves itself.
    """
    names = {category["id"]: _in_xml(category["name"]) for category in content["categories"]}
    rows: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for row in content["annotations"]:
        rows[row["image_id"]].append(row)
    version = str(content["info"].get("detector") or "ssld")[:16]
    return [
        {
            "data": {"image": prefix + quote(image["file_name"])},
            "predictions": [
                {
                    "model_version": version,
                    "score": min((row["score"] for row in rows[image["id"]]), default=0.0),
                    "result": [_result(row, image, names) for row in rows[image["id"]]],
                }
            ],
        }
        for image in _images(content)
    ]


def label_studio_config(content: dict[str, Any]) -> str:
    """Return the labeling configuration for the classes of a data set of `coco_json`, to paste into a project's settings."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=_TAGS[1], value="$image")
    labels = ElementTree.SubElement(view, "RectangleLabels", name=_TAGS[0], toName=_TAGS[1])
    for category in content["categories"]:
        ElementTree.SubElement(labels, "Label", value=_in_xml(category["name"]))
    return _text(view)


def cvat_xml(content: dict[str, Any]) -> str:
    """Convert a data set of `coco_json` to CVAT's XML for images 1.1; images are matched by name when it is uploaded to a task."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    names = {category["id"]: _in_xml(category["name"]) for category in content["categories"]}
    for name in names.values():
        ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = name
    elements = {}
    for number, image in enumerate(_images(content)):
        sides = {"width": str(image["width"]), "height": str(image["height"])}
        facts = {"id": str(number), "name": image["file_name"], **sides}
        elements[image["id"]] = ElementTree.SubElement(root, "image", facts)
    for row in content["annotations"]:
        if row["image_id"] not in elements:
            continue
        x, y, width, height = row["bbox"]
        corners = {"xtl": x, "ytl": y, "xbr": x + width, "ybr": y + height}
        facts = {"label": names[row["category_id"]], "source": "auto", "occluded": "0", "z_order": "0"}
        facts |= {key: f"{value:.2f}" for key, value in corners.items()}
        ElementTree.SubElement(elements[row["image_id"]], "box", facts)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _text(root)


def _in_xml(name: str) -> str:
    """Escape the characters of a class name that XML 1.0 cannot hold, in the form of `printable`: an escape character is `\\x1b`."""
    return _NOT_XML.sub(lambda match: match[0].encode("unicode_escape").decode(), name)


def _images(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [image for image in content["images"] if "video_id" not in image]


def _result(row: dict[str, Any], image: dict[str, Any], names: dict[Any, str]) -> dict[str, Any]:
    x, y, width, height = row["bbox"]
    wide, high = image["width"], image["height"]
    shares = {"x": x / wide, "y": y / high, "width": width / wide, "height": height / high}
    return {
        "id": str(row["id"]),
        "from_name": _TAGS[0],
        "to_name": _TAGS[1],
        "type": "rectanglelabels",
        "original_width": wide,
        "original_height": high,
        "image_rotation": 0,
        "score": row["score"],
        "value": {**{key: 100 * share for key, share in shares.items()}, "rotation": 0, "rectanglelabels": [names[row["category_id"]]]},
    }  # fmt: skip


def _text(root: ElementTree.Element) -> str:
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"
