"""Detections for other tools: supervision, Label Studio and CVAT."""

import csv
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from pycocotools import mask as mask_codec

from ssld.shared.errors import UserError
from ssld.stage2_detect import predict
from ssld.stage2_detect.prediction.files import table_text
from ssld.stage2_detect.prediction.label_tools import (
    cvat_xml,
    label_studio_config,
    label_studio_tasks,
    without_odd_names,
    write_label_files,
)
from ssld.stage2_detect.prediction.predictor import ImageDetections

CONTENT: dict[str, Any] = {
    "info": {"detector": "0123456789abcdef0123"},
    "categories": [{"id": 3, "name": "wide & low"}, {"id": 7, "name": "tall"}],
    "images": [
        {"id": 1, "file_name": "a b/ü.png", "width": 200, "height": 100},
        {"id": 2, "file_name": "c.png", "width": 50, "height": 50},
        {"id": 3, "file_name": "clip.mp4", "width": 50, "height": 50, "video_id": 1, "frame": 0},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [20.0, 10.0, 50.0, 25.0], "score": 0.75},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0.0, 0.0, 200.0, 100.0], "score": 0.5},
        {"id": 3, "image_id": 3, "category_id": 3, "bbox": [0.0, 0.0, 20.0, 10.0], "score": 0.5},
    ],
}


def test_label_studio() -> None:
    """Keys and units of https://labelstud.io/guide/predictions: percent of the image, tags that the configuration names."""
    first, second = label_studio_tasks(CONTENT, "https://example.org/")
    assert first["data"] == {"image": "https://example.org/a%20b/%C3%BC.png"}
    (prediction,) = first["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("0123456789abcdef", 0.5)
    result = prediction["result"][0]
    assert result["value"] == {"x": 10, "y": 10, "width": 25, "height": 25, "rotation": 0, "rectanglelabels": ["tall"]}
    assert (result["original_width"], result["original_height"], result["score"]) == (200, 100, 0.75)
    assert second["predictions"][0]["result"] == []
    view = ElementTree.fromstring(label_studio_config(CONTENT))
    image, labels = view
    assert (image.tag, image.attrib) == ("Image", {"name": result["to_name"], "value": "$image"})
    assert (labels.tag, labels.attrib) == (
        "RectangleLabels",
        {"name": result["from_name"], "toName": result["to_name"]},
    )
    assert result["type"] == labels.tag.lower()
    assert [label.get("value") for label in labels] == ["wide & low", "tall"]


def test_cvat() -> None:
    """Elements of CVAT for images 1.1: corners in pixels, labels of the task, images in order."""
    root = ElementTree.fromstring(cvat_xml(CONTENT).split("\n", 1)[1])
    assert root.findtext("version") == "1.1"
    assert [label.text for label in root.iterfind("meta/task/labels/label/name")] == ["wide & low", "tall"]
    first, second = root.iterfind("image")
    assert first.attrib == {"id": "0", "name": "a b/ü.png", "width": "200", "height": "100"}
    box = first[0].attrib
    assert (box["label"], box["source"], box["occluded"], box["z_order"]) == ("tall", "auto", "0", "0")
    assert [float(box[key]) for key in ("xtl", "ytl", "xbr", "ybr")] == [20, 10, 70, 35]
    assert (second.get("name"), len(second)) == ("c.png", 0)


def test_class_names_that_xml_cannot_hold_are_escaped() -> None:
    """All characters that XML 1.0 forbids; the class names of both files of Label Studio agree."""
    forbidden = [*map(chr, range(0x20)), "\ud800", "\udfff", "\ufffe", "\uffff"]
    forbidden = [
        one for one in forbidden if one not in "\t\n"
    ]  # a carriage return is not forbidden, but read as another
    kept = "\t\n é細\U0001f600\ufffd<&\"'"
    categories = [{"id": number, "name": f"a{one}{kept}b"} for number, one in enumerate(forbidden)]
    images = [{"id": 0, "file_name": "a.png", "width": 9, "height": 9}]
    rows = [
        {"id": number, "image_id": 0, "category_id": number, "bbox": [0.0, 0, 5, 5], "score": 0.5}
        for number in range(len(forbidden))
    ]
    content = {"info": {}, "categories": categories, "images": images, "annotations": rows}
    names = [f"a{one.encode('unicode_escape').decode()}{kept}b" for one in forbidden]
    assert names[0] == f"a\\x00{kept}b"
    root = ElementTree.fromstring(cvat_xml(content).encode())
    assert [label.text for label in root.iterfind("meta/task/labels/label/name")] == names
    assert [box.get("label") for box in root.iterfind("image/box")] == names
    view = ElementTree.fromstring(label_studio_config(content).encode())
    assert [label.get("value") for label in view[1]] == names
    (task,) = label_studio_tasks(content, "")
    assert [one["value"]["rectanglelabels"] for one in task["predictions"][0]["result"]] == [[name] for name in names]


NAMES = [
    'a b/q"uo\'te&<>.png', "n\u00fc \u65e5\u672c.png", "new\nline.png", "tab\t.png", "cr\r.png", "100%25#?.png", "back\\slash.png", " =lead.png",
    "\u2028.png",
]  # fmt: skip
ODD = {"esc\x1b.png": ("cvat.xml",), "\uffff.png": ("cvat.xml",), "not\udcff.png": ("cvat.xml", "label_studio.json")}


def test_names_of_images_come_back_or_are_left_out(tmp_path: Path) -> None:
    """A tool finds an image by its name: no file has a name that no image has, and what is left out is counted."""
    names = [*NAMES, *ODD]
    content = dict(CONTENT)
    content["images"] = [{"id": n, "file_name": name, "width": 9, "height": 9} for n, name in enumerate(names)]
    content["annotations"] = [
        {"id": n, "image_id": n, "category_id": 3, "bbox": [0.0, 0.0, 5.0, 5.0], "score": 0.5}
        for n in range(len(names))
    ]
    log: list[str] = []
    write_label_files(tmp_path, content, ("label_studio", "cvat"), prefix="?d=", log=log.append)
    root = ElementTree.parse(tmp_path / "cvat.xml").getroot()
    assert [image.get("name") for image in root.iterfind("image")] == NAMES
    assert len(root.findall("image/box")) == len(NAMES)
    tasks = json.loads((tmp_path / "label_studio.json").read_text())
    assert [unquote(task["data"]["image"]) for task in tasks] == [f"?d={name}" for name in names[:-1]]
    assert log == [
        "label_studio.json: 1 image left out, whose name is not UTF-8 (first: not\\udcff.png); rename them to have them in it",
        "cvat.xml: 3 images left out, whose name has a character that XML cannot hold (first: esc\\x1b.png); "
        "rename them to have them in it",
    ]
    table = table_text(without_odd_names(content, "predictions.csv", log.append))
    (tmp_path / "predictions.csv").write_bytes(table.encode())
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        assert [row[0] for row in csv.reader(file)][1:] == names[:-1]
    assert len(log) == 3


def test_the_files_of_a_prediction(predict_line: Any, call: Any, tmp_path: Path) -> None:
    words = predict_line("--write", "json,label_studio,cvat", "--label_studio_prefix", "/data/local-files/?d=photos/")
    assert call(predict.main, words) == 0
    content = json.loads((tmp_path / "predicted/predictions.json").read_text())
    tasks = json.loads((tmp_path / "predicted/label_studio.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [
        f"/data/local-files/?d=photos/{image['file_name']}" for image in content["images"]
    ]
    boxes = sum(len(task["predictions"][0]["result"]) for task in tasks)
    assert boxes == len(content["annotations"]) > 5
    assert (tmp_path / "predicted/cvat.xml").read_text().count("<box ") == boxes
    assert (tmp_path / "predicted/label_studio.xml").read_text() == label_studio_config(content)


def detections(masks: bool, count: int = 2) -> ImageDetections:
    boxes = np.array([[1, 2, 5, 6], [0, 0, 3, 3]], np.float32)[:count]
    grids = np.zeros((6, 8, 2), np.uint8, order="F")
    grids[2:6, 1:5, 0] = grids[:3, :3, 1] = 1
    codes = mask_codec.encode(grids)[:count] if masks else None
    names = ["b", "a"][:count]
    return ImageDetections(
        boxes, np.array([0.9, 0.5], np.float32)[:count], np.array([1, 0])[:count], names, codes, ("a", "b")
    )


@pytest.mark.parametrize("masks", [False, True])
def test_supervision(masks: bool) -> None:
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    ours = detections(masks)
    result = ours.to_supervision()
    assert isinstance(result, supervision.Detections)
    np.testing.assert_array_equal(result.xyxy, ours.boxes_N4)
    np.testing.assert_array_equal(result.confidence, ours.scores_N)
    np.testing.assert_array_equal(result.class_id, [1, 0])
    assert result.data["class_name"].tolist() == ["b", "a"]
    if masks:
        assert result.mask.shape == (2, 6, 8)
        assert result.mask.sum(axis=(1, 2)).tolist() == [16, 9]
    else:
        assert result.mask is None
    assert len(result[result.confidence > 0.6]) == 1  # its own filter works on all fields
    assert len(detections(masks, 0).to_supervision()) == 0


def test_supervision_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="to_supervision: supervision is not installed; pip install supervision"):
        detections(False).to_supervision()
