"""Data sets of tools that are not read: the message says what they are and which export to choose."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from converted_data import save, write

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.coco_json import load_content
from ssld.stage2_detect.data.convert.parts import find_data
from ssld.stage2_detect.data_config import DetectionDataConfig

REGION = {"shape_attributes": {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4}, "region_attributes": {}}
RESULT = {"x": 1, "y": 2, "width": 3, "height": 4, "rotation": 0, "rectanglelabels": ["cat"], "original_width": 40}
FILES: dict[str, tuple[str, Any, str]] = {
    "via": ("via.json", {"a.png12": {"filename": "a.png", "size": 12, "regions": [REGION]}}, "VIA's JSON; export"),
    "via project": ("via.json", {"_via_settings": {}, "_via_img_metadata": {}}, "VIA's project; export"),
    "supervisely": ("ds/ann/a.png.json", {"objects": [{"classTitle": "cat", "geometryType": "rectangle"}]}, "Supervisely's"),
    "label studio": ("project.json", [{"image": "/data/upload/1/a.png", "label": [RESULT]}], "Label Studio's JSON; export"),
    "fiftyone": ("metadata.json", {"name": "pets", "sample_fields": []}, "FiftyOne's own format; export it as COCO"),
    "cvat": ("annotations.xml", "<annotations><image id='0' name='a.png'/></annotations>", "CVAT's own XML; export it as COCO 1.0"),
    "createml": ("_annotations.createml.json", [{"image": "a.png", "annotations": [{"label": "cat", "coordinates": {"x": 1}}]}], "CreateML's JSON"),
    "vott": ("a-asset.json", {"asset": {"name": "a.png"}, "regions": [{"tags": ["cat"], "boundingBox": {"left": 1}}]}, "VoTT's JSON"),
    "datumaro": ("default.json", {"categories": {"label": {}}, "items": [{"annotations": [{"label_id": 0}]}]}, "Datumaro's own JSON"),
    "sagemaker": ("output.manifest", '{"source-ref": "s3://b/a.png"}\n{"source-ref": "s3://b/b.png"}\n', "a manifest of SageMaker"),
    "labelbox": ("export.ndjson", '{"data_row": {"id": "x"}}\n{"data_row": {"id": "y"}}\n', "Labelbox's export"),
    "table": ("train.csv", "image_id,bbox\na,[1 2 3 4]\n", "is a table, whose columns have no fixed meaning; write COCO JSON"),
}  # fmt: skip


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


@pytest.mark.parametrize("name", FILES)
def test_the_tool_is_named(tmp_path: Path, name: str) -> None:
    file, content, expected = FILES[name]
    root = tmp_path / "export"
    save(root / "images" / "a.png")
    write(root / file, text_of(content))
    for path in (root, root / file):
        with pytest.raises(UserError) as caught:
            find_data(DetectionDataConfig(source=str(path)))
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"export.*(is not JSON|is not a COCO data set)") as caught:
        read_coco(root / file, root, training=True)
    assert expected in str(caught.value)


def test_a_file_of_keypoints_is_read_only_if_it_is_named(tmp_path: Path) -> None:
    """CVAT's COCO Keypoints: the keypoints that were asked for are not read, the boxes are."""
    save(tmp_path / "images" / "default" / "a.png")
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "keypoints": [1, 2, 2], "num_keypoints": 1}
    image = {"id": 1, "file_name": "a.png", "width": 40, "height": 20}
    file = tmp_path / "annotations" / "person_keypoints_default.json"
    write(file, text_of({"images": [image], "annotations": [row], "categories": [{"id": 1, "name": "cat"}]}))
    with pytest.raises(
        UserError, match=r"person_keypoints_default\.json is COCO's file of keypoints.* give the file itself"
    ):
        find_data(DetectionDataConfig(source=str(tmp_path)))
    part = find_data(DetectionDataConfig(source=str(file))).train
    assert (part.annotations, part.images) == (file, tmp_path / "images" / "default")
    write(file, "{")
    with pytest.raises(UserError) as damaged:
        load_content(file)
    assert "is not JSON" in str(damaged.value)
    assert "give the file itself" not in str(damaged.value)


def test_packed_files_and_other_texts(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("train/_annotations.coco.json", "{}")
    (tmp_path / "train.json").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "latin.json").write_bytes('{"images": "Käse"}'.encode("latin-1"))
    write(tmp_path / "comma.json", '{"images": [],}')
    with pytest.raises(UserError, match=r"export\.zip is packed; unpack it"):
        find_data(DetectionDataConfig(source=str(tmp_path / "export.zip")))
    for name, expected in (
        ("train.json", "is not text in UTF-8 (byte 1); train.json is packed; unpack it"),
        ("latin.json", "latin.json is not text in UTF-8 (byte 13)"),
        ("comma.json", "comma.json is not JSON: Expecting property name"),
    ):
        with pytest.raises(UserError) as caught:
            read_coco(tmp_path / name, tmp_path, training=True)
        assert expected in str(caught.value)
