"""Reading COCO JSON: kept, dropped and clipped boxes in both modes, and one clear line for every fault of a file."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filled_shapes import filled
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.images import decode_image
from ssld.stage2_detect.data import coco_json
from ssld.stage2_detect.data.coco import CocoData, read_coco


def small() -> dict[str, Any]:
    """Categories with holes and out of order; string and number image ids; one crowd; one image without objects."""
    return {
        "images": [
            {"id": "left", "file_name": "a.png", "width": 20, "height": 10},
            {"id": 7, "file_name": "sub/b.png", "width": 8, "height": 16},
            {"id": 3, "file_name": "c.png", "width": 5, "height": 5},
        ],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 11.5, "iscrowd": 0},
            {"id": 5, "image_id": "left", "category_id": 3, "bbox": [2.00049, 1, 4, 5]},
            {"id": "x", "image_id": 7, "category_id": 3, "bbox": [0, 0, 8, 16], "iscrowd": 1, "area": 100},
            {"id": 6, "image_id": 7, "category_id": 3, "bbox": [-2, 10, 6, 10]},
        ],
        "categories": [{"id": 90, "name": "cup"}, {"id": 3, "name": "dog"}],
    }


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., CocoData]:
    def write_and_read(data: Any, **options: Any) -> CocoData:
        path = tmp_path / "data.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return read_coco(path, options.pop("image_folder", None), **{"training": True, **options})

    return write_and_read


def test_training_drops_crowds_and_clips(read: Callable) -> None:
    data = read(small())
    assert data.class_names == ("cup", "dog")
    assert data.category_ids == (90, 3)
    left, seven, three = data.images
    assert [left.image_id, seven.image_id, three.image_id] == ["left", 7, 3]
    assert (left.width, left.height) == (20, 10)
    assert left.boxes_N4.tolist() == [[2, 1, 6, 6]]  # 2.00049 is rounded to 3 decimals
    assert left.boxes_N4.dtype == np.float32
    assert left.labels_N.tolist() == [1]
    assert left.areas_N.tolist() == [20]  # filled
    assert seven.boxes_N4.tolist() == [[1, 2, 4, 6], [0, 10, 4, 16]]
    assert seven.labels_N.tolist() == [0, 1]
    assert seven.areas_N.tolist() == [11.5, 60]
    assert seven.annotation_ids == (0, 6)
    assert not seven.crowd_N.any()
    assert three.boxes_N4.shape == (0, 4)
    assert data.counts["boxes"] == 3
    assert (data.counts["crowd"], data.counts["clipped"], data.counts["empty"]) == (1, 1, 1)
    assert data.counts["degenerate"] == data.counts["outside"] == data.counts["empty_dropped"] == 0
    text = data.describe()
    assert "\n" not in text
    for part in (
        "3 images",
        "3 boxes",
        "1 image without",
    ):
        assert part in text
    assert data.tally.describe() == (
        "1 box dropped: 1 marked iscrowd (first: annotation 'x'); 1 box changed: 1 clipped to the image (first: annotation 6)"
    )


def test_evaluation_keeps_everything_as_it_is(read: Callable) -> None:
    raw = small()
    raw["annotations"].append({"id": 9, "image_id": 3, "category_id": 3, "bbox": [1, 1, 0, 2]})
    data = read(raw, training=False, keep_empty=False)
    assert len(data.images) == 3
    seven = data.images[1]
    assert seven.crowd_N.tolist() == [False, True, False]
    assert data.tally.describe_kept() == "3 images, 4 boxes, 1 crowd region"  # 4 are scored
    assert ": 3 images, 4 boxes, " in data.describe()
    assert "1 crowd region kept, for scoring as COCO does" in data.describe()
    assert seven.file_boxes_N4.tolist() == [[1, 2, 3, 4], [0, 0, 8, 16], [-2, 10, 6, 10]]
    assert seven.boxes_N4.tolist()[2] == [-2, 10, 4, 20]
    assert data.images[0].file_boxes_N4[0, 0] == 2.00049
    assert data.images[2].file_boxes_N4.tolist() == [[1, 1, 0, 2]]
    assert "1 empty box kept" in data.describe()


def test_images_without_boxes_are_a_switch(read: Callable) -> None:
    raw = small()
    raw["annotations"] = [raw["annotations"][0], raw["annotations"][2] | {"image_id": "left"}]
    data = read(raw, keep_empty=False)  # a crowd alone does not keep an image
    assert [image.image_id for image in data.images] == [7]
    assert data.counts["empty_dropped"] == 2
    with pytest.raises(UserError, match="no image with a usable box"):
        read(raw | {"annotations": []}, keep_empty=False)
    assert len(read(raw | {"annotations": []}).images) == 3
    with pytest.raises(UserError, match="no image"):
        read(raw | {"annotations": [], "images": []})


def test_degenerate_and_outside_boxes_are_dropped_and_counted(read: Callable) -> None:
    raw = small()
    boxes = {
        "flat": [1, 1, 0, 3], "thin": [1, 1, 3, 1e-6], "negative": [5, 5, -2, 3], "sound": [1, 1, 0.01, 3],
        "right of it": [20, 1, 5, 5], "above": [3, -9, 5, 4], "touching": [-4, 0, 4, 4],
    }  # fmt: skip
    raw["annotations"] = [{"id": key, "image_id": "left", "category_id": 3, "bbox": box} for key, box in boxes.items()]
    data = read(raw)
    assert data.images[0].annotation_ids == ("sound",)
    assert (data.counts["degenerate"], data.counts["outside"], data.counts["clipped"]) == (3, 3, 0)
    assert data.tally.record()["box"] == {
        "kept": 1,
        "dropped": {
            "without width or height": {"count": 3, "first": "annotation 'flat'"},
            "outside the image": {"count": 3, "first": "annotation 'right of it'"},
        },
        "changed": {},
    }


FAULTS: list[tuple[str, Callable[[dict], Any], str]] = [
    ("not JSON", lambda d: "{", "is not JSON"),
    ("a list", lambda d: [1], "is not a COCO data set: expected an object"),
    ("no categories", lambda d: d.pop("categories"), "no key 'categories'"),
    ("annotations no list", lambda d: d.update(annotations={}), "'annotations' is not a list of objects"),
    ("no classes", lambda d: d.update(categories=[], annotations=[]), "'categories' is empty"),
    ("NaN", lambda d: d["annotations"][1].update(bbox=[1, float("nan"), 2, 2]), "annotation 5 has bbox"),
    ("infinite", lambda d: d["annotations"][1].update(bbox=[1, 1, float("inf"), 2]), "annotation 5 has bbox"),
    ("three numbers", lambda d: d["annotations"][1].update(bbox=[1, 1, 2]), "annotation 5 has bbox"),
    ("word in box", lambda d: d["annotations"][1].update(bbox=["one", 1, 2, 2]), "annotation 5 has bbox"),
    ("true in box", lambda d: d["annotations"][1].update(bbox=[True, 1, 2, 2]), "annotation 5 has bbox"),
    (
        "two pairs",
        lambda d: d["annotations"][1].update(bbox=[[2, 1], [4, 5]]),
        "annotation 5 has bbox [[2, 1], [4, 5]]",
    ),
    ("huge", lambda d: d["annotations"][1].update(bbox=[0, 0, 10**30, 2]), "annotation 5 has bbox"),
    ("no box", lambda d: d["annotations"][1].pop("bbox"), "annotation 5 has bbox None"),
    ("odd crowd", lambda d: d["annotations"][2].update(iscrowd="no"), "annotation 'x' has iscrowd 'no'"),
    (
        "unknown image",
        lambda d: d["annotations"][1].update(image_id=99),
        "annotation 5 has image_id 99, which is no image",
    ),
    ("nearly an id", lambda d: d["annotations"][0].update(image_id="07"), "has image_id '07', which is no image"),
    ("no image id", lambda d: d["annotations"][1].pop("image_id"), "annotation 5 has no image_id"),
    (
        "unknown class",
        lambda d: d["annotations"][1].update(category_id=1),
        "annotation 5 has category_id 1, which is no",
    ),
    (
        "no annotation id",
        lambda d: d["annotations"][1].pop("id"),
        "annotation number 2 has no id; in a copy, `ssld doctor --fix DIR` gives new ids",
    ),
    ("image twice", lambda d: d["images"][2].update(id=7), "image 7 has an id that occurs more than once"),
    (
        "annotation twice",
        lambda d: d["annotations"][1].update(id=0),
        "annotation 0 has an id that occurs more than once; in a copy, `ssld doctor --fix DIR` gives new ids",
    ),
    ("category twice", lambda d: d["categories"][1].update(id=90), "category 90 has an id that occurs more than once"),
    ("name twice", lambda d: d["categories"][1].update(name="cup"), "two categories are called 'cup'"),
    ("no name", lambda d: d["categories"][1].pop("name"), "category 3 has no name"),
    ("blanks for a name", lambda d: d["categories"][1].update(name="  "), "category 3 has no name"),
    ("no width", lambda d: d["images"][1].pop("width"), "image 7 has no width"),
    ("zero height", lambda d: d["images"][1].update(height=0), "image 7 has height 0"),
    ("no file name", lambda d: d["images"][1].pop("file_name"), "image 7 has no file_name"),
    ("float id", lambda d: d["images"][2].update(id=1.5), "image number 3 has id 1.5"),
]


@pytest.mark.parametrize(("change", "message"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
@pytest.mark.parametrize("training", [True, False])
def test_faults(read: Callable, change: Callable, message: str, training: bool) -> None:
    raw = small()
    changed = change(raw)
    with pytest.raises(UserError) as caught:
        read(changed if changed in ("{", [1]) else raw, training=training)
    assert message in str(caught.value)
    assert "data.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files(read: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_coco(tmp_path / "absent.json", None, training=True)
    with pytest.raises(UserError, match="does not exist"):
        read(small(), image_folder=tmp_path / "absent")
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of the 3 images of .*data\.json are missing; the first is .*a\.png"):
        read(small(), image_folder=folder)
    (folder / "a.png").write_bytes(b"")
    (folder / "c.png").write_bytes(b"")
    content = small()
    content["images"][0]["file_name"] = "a.png\n"
    with pytest.raises(UserError, match=r"the first is [^\n]*images/a\.png\\n; did you mean"):
        read(content, image_folder=folder)
    assert read(small(), image_folder=folder).images[1].path == str(folder / "sub" / "b.png")


def test_classes_of_another_file(read: Callable) -> None:
    train = read(small())
    raw = small()
    raw["categories"].reverse()
    swapped = read(raw)
    assert swapped.class_names == ("dog", "cup")
    same = read(raw, class_names=train.class_names)
    assert same.class_names == train.class_names
    assert same.category_ids == (90, 3)
    assert same.images[1].labels_N.tolist() == train.images[1].labels_N.tolist()
    raw["categories"][0]["name"] = "cat"
    with pytest.raises(UserError, match="unknown: cat; missing: dog"):
        read(raw, class_names=train.class_names)


def test_segmentations_are_kept_when_asked_for(read: Callable) -> None:
    raw = small()
    raw["annotations"][0]["segmentation"] = [[0, 0, 1, 0, 1, 1]]
    assert read(raw).images[1].segmentations is None
    assert read(raw, segmentations=True).images[1].segmentations == ([[0, 0, 1, 0, 1, 1]], None)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco(split: str, shared_data: Callable) -> None:
    root = shared_data("coco-mini")
    path = root / "annotations" / f"instances_{split}.json"
    raw = json.loads(path.read_text())
    crowds = [row for row in raw["annotations"] if row["iscrowd"]]
    train = read_coco(path, root / "images", training=True, segmentations=True)
    val = read_coco(path, root / "images", training=False, segmentations=True)
    assert len(train.class_names) == 80
    assert max(train.category_ids) == 90
    assert len(train.images) == len(val.images) == len(raw["images"])
    assert train.counts["empty"] >= 2
    assert train.counts["crowd"] == len(crowds) > 0
    assert val.counts["boxes"] == len(raw["annotations"])
    assert train.counts["boxes"] == len(raw["annotations"]) - len(crowds)
    dropping = read_coco(path, root / "images", training=True, keep_empty=False)
    assert len(dropping.images) == len(raw["images"]) - dropping.counts["empty_dropped"] < len(raw["images"])
    observed = {"list": 0, "dict": 0}
    for image in val.images:
        assert image.segmentations is not None
        for segmentation, box in zip(image.segmentations, image.boxes_N4, strict=True):
            observed[type(segmentation).__name__] += 1
            if type(segmentation) is dict or observed["list"] % 20 == 0:
                rows, columns = np.nonzero(filled(segmentation, image.height, image.width))
                assert abs(columns.min() - box[0]) <= 4
                assert abs(rows.max() + 1 - box[3]) <= 4
    assert min(observed.values()) > 0


def test_real_grey_image(shared_data: Callable) -> None:
    root = shared_data("coco-mini")
    for path in sorted((root / "images").iterdir()):
        with Image.open(path) as image:
            if image.mode == "L":
                break
    assert image.mode == "L"
    pixels = decode_image(path)
    assert pixels.shape[0] == 3
    assert (pixels[0] == pixels[2]).all()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_real_blood_cells(split: str, shared_data: Callable) -> None:
    root = shared_data("bccd")
    data = read_coco(root / "annotations" / f"instances_{split}.json", root / "images", training=True, keep_empty=False)
    assert data.class_names == ("RBC", "WBC", "Platelets")
    assert data.counts["boxes"] > 900


def test_the_garbage_collector_is_disabled_only_while_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.json").write_text("{")
    observed: list[bool] = []
    real = coco_json.load_content

    def watched(file: str) -> Any:
        observed.append(gc.isenabled())
        return real(file)

    monkeypatch.setattr(coco_json, "load_content", watched)
    with pytest.raises(UserError, match="is not JSON"):
        read_coco(tmp_path / "bad.json", None, training=True)
    assert observed == [False]
    assert gc.isenabled()
