"""Conversion of Hugging Face data sets, from Parquet files or the hub, to COCO files; errors name their place; real data are unchanged."""

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from converted_data import counted, line, read, write
from PIL import Image
from pycocotools import mask as mask_codec
from turned_images import save_as, save_turned, scenes

from ssld.stage2_detect.convert_data import main
from ssld.stage2_detect.data.coco import read_coco, require_masks
from ssld.stage2_detect.data.loaders import load_record
from ssld.stage2_detect.models.mask_targets import decode_rle


def encoded(size: tuple[int, int] = (40, 20), kind: str = "PNG", seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def parquet(file: Path, rows: list[dict[str, Any]], names: list[str] | None = None) -> None:
    table = pa.Table.from_pylist(rows)
    if names:
        feature = {"category": {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}}
        text = json.dumps({"info": {"features": {"objects": feature, "image": {"_type": "Image"}}}})
        table = table.replace_schema_metadata({"huggingface": text})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=2)


def hub_row(boxes: list[list[float]], categories: list[Any], seed: int = 0, **more: Any) -> dict[str, Any]:
    image = {"bytes": encoded(seed=seed, kind=("PNG", "JPEG", "WEBP")[seed % 3]), "path": "../escape.png"}
    return {"image": image, "objects": {"bbox": boxes, "category": categories}} | more


def test_hub_struct_of_lists(tmp_path: Path) -> None:
    source = tmp_path / "hub" / "data"
    rows = [
        hub_row([[1, 2, 10, 5], [0, 0, 40, 20]], [1, 0], seed=0, image_id=7),
        hub_row([], [], seed=1, image_id=9),
        hub_row([[3, 3, 4, 4]], [1], seed=2, image_id=3),
    ]
    parquet(source / "train-00000-of-00002-4f6a348405f3725f.parquet", rows[:2], ["cat", "dog"])
    parquet(source / "train-00001-of-00002-4f6a348405f3725f.parquet", rows[2:], ["cat", "dog"])
    parquet(source / "validation-00000-of-00001.parquet", rows[:1], ["cat", "dog"])
    assert main(line(tmp_path / "hub", tmp_path / "out")) == 0
    data = read(tmp_path / "out")
    assert data.class_names == ("cat", "dog")
    assert [record.image_id for record in data.images] == [7, 9, 3]
    np.testing.assert_array_equal(data.images[0].file_boxes_N4, [[1, 2, 10, 5], [0, 0, 40, 20]])
    assert data.images[0].labels_N.tolist() == [1, 0]
    for record, row in zip(data.images, rows, strict=True):
        assert Path(record.path).read_bytes() == row["image"]["bytes"]
        assert Path(record.path).parent == tmp_path / "out" / "train"
    assert [Path(record.path).suffix for record in data.images] == [".png", ".jpg", ".webp"]
    assert len(read(tmp_path / "out", "validation").images) == 1
    assert not (tmp_path / "out" / ".pending").exists()


def test_rows_that_nobody_has_labeled_are_counted_and_not_read(tmp_path: Path) -> None:
    rows = [hub_row([[1, 2, 10, 5]], [1]), hub_row([], []) | {"objects": None}, hub_row([], [])]
    rows.append(hub_row([], []) | {"objects": {"bbox": None, "category": None}})
    file = tmp_path / "hub" / "train-00000-of-00001.parquet"
    parquet(file, rows, ["cat", "dog"])
    assert main(line(tmp_path / "hub", tmp_path / "out", "--allow_loss", "true")) == 0
    assert [Path(record.path).stem for record in read(tmp_path / "out").images] == ["00000000", "00000002"]
    assert counted(tmp_path / "out")["image"]["skipped"] == {
        "whose row has no objects, not even an empty list": {"count": 2, "first": f"{file}, row 1"}
    }


@pytest.mark.parametrize("stored", [False, True])
def test_hub_orientation(tmp_path: Path, stored: bool) -> None:
    """Sizes in the rows decide the form of an image that its boxes refer to; images of equal size in both forms follow, in the other split too."""
    some = scenes(["landscape", "landscape", "square"])
    rows = []
    for one, value in zip(some, (6, 3, 8), strict=True):
        (save_as if stored else save_turned)(tmp_path / one.name, one.pixels, value)
        image = {"bytes": (tmp_path / one.name).read_bytes(), "path": one.name}
        height, width = one.pixels.shape[:2]
        boxes = {"bbox": [list(map(float, box)) for box in one.boxes], "category": [0] * len(one.boxes)}
        rows.append({"image": image, "objects": boxes, "width": width, "height": height})
    parquet(tmp_path / "hub" / "train.parquet", rows[:2], ["thing"])
    parquet(tmp_path / "hub" / "test.parquet", rows[2:], ["thing"])
    assert main(line(tmp_path / "hub", tmp_path / "out")) == 0
    records = [*read(tmp_path / "out").images, *read(tmp_path / "out", "test").images]
    for record, one in zip(records, some, strict=True):
        assert np.array_equal(load_record(record).permute(1, 2, 0).numpy(), one.pixels)


@pytest.mark.parametrize("form", ["text", "bytes", "runs"])
def test_hub_run_lengths(tmp_path: Path, form: str) -> None:
    shape_HW = np.zeros((20, 40), dtype=np.uint8, order="F")
    shape_HW[3:9, 5:25] = 1
    runs = [len(list(group)) for _, group in itertools.groupby(shape_HW.ravel(order="F").tolist())]
    packed = mask_codec.encode(shape_HW)["counts"]
    row = hub_row([[5.0, 3.0, 20.0, 6.0]], [0])
    counts = {"text": packed.decode(), "bytes": packed, "runs": runs}[form]
    row["objects"]["segmentation"] = [{"size": [20, 40], "counts": counts}]
    parquet(tmp_path / "train.parquet", [row], ["ant"])
    assert main(line(tmp_path / "train.parquet", tmp_path / "out")) == 0
    data = read_coco(tmp_path / "out" / "train.json", tmp_path / "out" / "train", training=False, segmentations=True)
    (record,) = require_masks(data).images
    assert record.areas_N.tolist() == [120]
    assert record.segmentations
    np.testing.assert_array_equal(decode_rle(record.segmentations[0]), shape_HW)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"size": [8, 8], "counts": "04P1"}, "not an RLE of an image 20 pixels high and 40 wide"),
        ({"size": [20, 40], "counts": "04P1"}, "not an RLE of an image 20 pixels high and 40 wide"),
        ({"points": [[1.0, 2.0]]}, "neither polygons, lists of x, y, x, y, ..., nor RLE"),
        ([[1.0, 2.0, 3.0]], "neither polygons, lists of x, y, x, y, ..., nor RLE"),
    ],
)
def test_hub_shapes_of_another_kind_are_refused(
    tmp_path: Path, user_error: Callable[..., str], shape: Any, message: str
) -> None:
    row = hub_row([[0.0, 0.0, 5.0, 5.0]], [0])
    row["objects"]["segmentation"] = [shape]
    parquet(tmp_path / "train.parquet", [row], ["ant"])
    error = user_error(main, line(tmp_path / "train.parquet", tmp_path / "out"))
    assert f"train.parquet, row 0, object 0: segmentation: {message}" in error
    assert not (tmp_path / "out" / "train.json").exists()


def test_hub_list_of_structs_with_names_and_polygons(tmp_path: Path) -> None:
    """Class names without metadata, `default/train/0000.parquet`, and the optional fields of objects."""
    one = {"bbox": [1.0, 2.0, 10.0, 5.0], "categories": "dog", "area": 25.5, "is_crowd": 0}
    one["segmentation"] = [[1.0, 2.0, 11.0, 2.0, 1.0, 7.0]]
    other = {"bbox": [0.0, 0.0, 5.0, 5.0], "categories": "ant", "area": 25.0, "is_crowd": 1, "segmentation": []}
    rows = [{"image": encoded(), "objects": [one, other]}]
    parquet(tmp_path / "hub" / "default" / "train" / "0000.parquet", rows)
    assert main(line(tmp_path / "hub", tmp_path / "out", "--allow_loss", "true")) == 0  # all of the ants are crowds
    data = read_coco(tmp_path / "out" / "train.json", tmp_path / "out" / "train", training=False, segmentations=True)
    (record,) = data.images
    assert data.class_names == ("ant", "dog")
    assert record.labels_N.tolist() == [1, 0]
    assert record.areas_N.tolist() == [25.5, 25]
    assert record.crowd_N.tolist() == [False, True]
    assert record.segmentations == ([[1.0, 2.0, 11.0, 2.0, 1.0, 7.0]], None)


@pytest.mark.parametrize(
    ("form", "box"),
    [
        ("xywh", [4, 2, 20, 10]),
        ("xyxy", [4, 2, 24, 12]),
        ("xyxy_relative", [0.1, 0.1, 0.6, 0.6]),
        ("cxcywh_relative", [0.35, 0.35, 0.5, 0.5]),
    ],
)
def test_box_formats(tmp_path: Path, form: str, box: list[float]) -> None:
    parquet(tmp_path / "train.parquet", [hub_row([box], [0])], ["cat"])
    assert main(line(tmp_path / "train.parquet", tmp_path / "out", "--box_format", form)) == 0
    np.testing.assert_allclose(read(tmp_path / "out").images[0].file_boxes_N4, [[4, 2, 20, 10]])


@pytest.mark.parametrize(
    ("row", "names", "message"),
    [
        (hub_row([[1, 1, 2, 2]], [2]), ["a", "b"], "row 1, object 0: category 2, but there are 2 classes"),
        (hub_row([[1, 1, 2, 2]], [1]), None, "is a number without a class name; give --classes"),
        (hub_row([[1, 1, 2]], [0]), ["a"], "row 1, object 0: bbox [1.0, 1.0, 2.0], expected four"),
        (hub_row([[1, 1, float("nan"), 2]], [0]), ["a"], "row 1, object 0: bbox is 'nan', not a number"),
        (hub_row([[1, 1, -2, 2]], [0]), ["a"], "has a negative side as xywh; give another --box_format"),
        (hub_row([[30, 10, 38, 19]] * 3, [0] * 3), ["a"], "row 1, object 0: the box reaches out of its image"),
        (hub_row([[1, 1, 2, 2]], [0, 0]), ["a"], "row 1: objects: its lists are of unequal length"),
        (hub_row([[1, 1, 2, 2]], [0]) | {"image": {"bytes": b"x", "path": "p"}}, ["a"], "cannot read image"),
        (hub_row([[1, 1, 2, 2]], [0]) | {"image": {"bytes": None, "path": "p"}}, ["a"], "row 1: holds no image bytes"),
        (hub_row([[1, 1, 2, 2]], [0], width=41, height=20), ["a"], "row 1: gives the size 41x20, but the image"),
        (hub_row([[1, 1, 2, 2]], [0], width=float("inf"), height=20), ["a"], "row 1: width is 'inf', not a number"),
        (hub_row([[1, 1, 2, 2]], [0, 0]), None, "row 1: objects: its lists are of unequal length"),
    ],
)
def test_hub_faults(
    tmp_path: Path, user_error: Callable[..., str], row: dict[str, Any], names: list[str] | None, message: str
) -> None:
    sound = hub_row([[1.0, 1.0, 2.0, 2.0]], [0], width=40, height=20)
    parquet(tmp_path / "train.parquet", [sound, row], names)
    assert message in user_error(main, line(tmp_path / "train.parquet", tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("0*"))
    assert not (tmp_path / "out" / "train.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "a.png"}, "row 0: holds no image bytes"),
        ({"width": "40px"}, "row 0: width is '40px', not a number"),
        ({"width": [40]}, "row 0: width is '[40]', not a number"),
        ({"objects": {"bbox": [[1.0, 1.0, 2.0, 2.0]], "category": [["a"]]}}, "row 0: category ['a'], expected a name"),
        (
            {"objects": {"bbox": [[1.0, 1.0, 2.0, 2.0]], "category": [{"id": 1}]}},
            "row 0: category {'id': 1}, expected a name",
        ),
        (
            {"objects": {"bbox": [[1.0, 1.0, 2.0, 2.0]], "category": "a"}},
            "row 0: objects: expected lists, one entry for each",
        ),
        (
            {
                "objects": {
                    "bbox": [[1.0, 1.0, 2.0, 2.0]],
                    "category": ["a"],
                    "segmentation": [[[1.0, 1.0, 1e300, 2.0, 3.0, 3.0]]],
                }
            },
            "row 0, object 0: segmentation: a polygon reaches too far out of the image",
        ),
    ],
)
def test_columns_of_other_types(
    tmp_path: Path, user_error: Callable[..., str], change: dict[str, Any], message: str
) -> None:
    parquet(tmp_path / "train.parquet", [hub_row([[1.0, 1.0, 2.0, 2.0]], ["a"], width=40, height=20) | change])
    assert message in user_error(main, line(tmp_path / "train.parquet", tmp_path / "out"))


@pytest.mark.parametrize("text", ["[]", '{"info": null}', '{"info": {"features": "x"}}'])
def test_metadata_of_another_form_name_no_classes(tmp_path: Path, text: str) -> None:
    rows = [hub_row([[1.0, 1.0, 2.0, 2.0]], ["a"], width=float("nan"), height=20.0)]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "train.parquet")
    assert main(line(tmp_path / "train.parquet", tmp_path / "out")) == 0
    assert read(tmp_path / "out").class_names == ("a",)


def test_metadata_that_are_not_json(tmp_path: Path, user_error: Callable[..., str]) -> None:
    table = pa.Table.from_pylist([hub_row([[1.0, 1.0, 2.0, 2.0]], ["a"])]).replace_schema_metadata({"huggingface": "{"})
    pq.write_table(table, tmp_path / "train.parquet")
    message = user_error(main, line(tmp_path / "train.parquet", tmp_path / "out"))
    assert "train.parquet: its metadata 'huggingface' is not JSON: " in message


def test_hub_layout_faults(tmp_path: Path, user_error: Callable[..., str]) -> None:
    sound = [hub_row([[1, 1, 2, 2]], [0])]
    for subset in ("small", "large"):
        parquet(tmp_path / "subsets" / subset / "train-00000-of-00001.parquet", sound, ["a"])
    assert "several subsets have a split 'train'" in user_error(main, line(tmp_path / "subsets", tmp_path / "o1"))
    parquet(tmp_path / "plain.parquet", [{"image": b"x", "label": 1}])
    assert "has no column 'objects' (it has image, label)" in user_error(
        main, line(tmp_path / "plain.parquet", tmp_path / "o2")
    )
    write(tmp_path / "text.parquet", "no parquet")
    assert "is not a Parquet file" in user_error(main, line(tmp_path / "text.parquet", tmp_path / "o3"))
    write(tmp_path / "empty" / "notes.txt", "nothing")
    assert "neither YOLO" in user_error(main, line(tmp_path / "empty", tmp_path / "o4"))
    assert "no such file or folder" in user_error(main, line(tmp_path / "nowhere", tmp_path / "o5"))
    flags = ("--splits", '["test"]')
    folder = tmp_path / "subsets" / "small"
    assert "has no split 'test' (it has train)" in user_error(main, line(folder, tmp_path / "o6", *flags))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("-x-00000-of-00001.parquet", "its split would be called '-x'; rename the file"),
        ("tr ain-00000-of-00001.parquet", "its split would be called 'tr ain'"),
        ("a\u2215b.parquet", "its split would be called 'a\u2215b'"),
        ("\\..\\x.parquet", "its split would be called '\\\\..\\\\x'"),
        ("result-00000-of-00001.parquet", "a split is called 'result', like a file of a run"),
        ("error.parquet", "a split is called 'error', like a file of a run"),
        ("config.yaml.parquet", "a split is called 'config.yaml', like a file of a run"),
        ("log.txt-00000-of-00001.parquet", "a split is called 'log.txt', like a file of a run"),
    ],
)
def test_split_names_cannot_leave_the_run_folder(
    tmp_path: Path, user_error: Callable[..., str], name: str, message: str
) -> None:
    """Splits are named after untrusted file names, and become names of files and folders in the run."""
    parquet(tmp_path / "hub" / name, [hub_row([[1, 1, 2, 2]], [0])], ["a"])
    assert message in user_error(main, line(tmp_path / "hub", tmp_path / "out"))
    assert {one.name for one in (tmp_path / "out").iterdir()} <= {".lock", "config.yaml", "environment.json"}


def test_hidden_files_are_no_part_of_a_data_set(tmp_path: Path, user_error: Callable[..., str]) -> None:
    for name in ("._train-00000-of-00001.parquet", "..-00000-of-00001.parquet", ".-00000-of-00001.parquet"):
        write(tmp_path / "hub" / name, "no Parquet file")
        error = user_error(main, line(tmp_path / "hub" / name, tmp_path / "out"))
        assert "its split would be called '." in error
    assert "neither YOLO" in user_error(main, line(tmp_path / "hub", tmp_path / "out"))
    parquet(tmp_path / "hub" / "train-00000-of-00001.PARQUET", [hub_row([[1, 1, 2, 2]], [0])], ["a"])
    assert main(line(tmp_path / "hub", tmp_path / "out")) == 0
    assert len(read(tmp_path / "out").images) == 1


def test_flags_and_numbers_as_tables_hold_them(tmp_path: Path, user_error: Callable[..., str]) -> None:
    """Text for a flag; a number with a decimal point for a class."""
    one = {"bbox": [1.0, 2.0, 10.0, 5.0], "category": 1.0, "iscrowd": "0"}
    other = {"bbox": [0.0, 0.0, 5.0, 5.0], "category": 0.0, "iscrowd": "True"}
    parquet(tmp_path / "train.parquet", [{"image": encoded(), "objects": [one, other]}])
    write(tmp_path / "names.txt", "ant\ndog\n")
    flags = ("--classes", str(tmp_path / "names.txt"), "--allow_loss", "true")
    assert main(line(tmp_path / "train.parquet", tmp_path / "out", *flags)) == 0
    (record,) = read(tmp_path / "out").images
    assert record.labels_N.tolist() == [1, 0]
    assert record.crowd_N.tolist() == [False, True]
    for change, message in (
        ({"category": 0.5}, "category 0.5, but there are 2"),
        ({"iscrowd": "?"}, "iscrowd is '?', neither"),
    ):
        parquet(tmp_path / "train.parquet", [{"image": encoded(), "objects": [one | change, other]}])
        assert f"row 0, object 0: {message}" in user_error(
            main, line(tmp_path / "train.parquet", tmp_path / "o", *flags)
        )


def test_a_split_without_objects_and_bulk_loss(tmp_path: Path, user_error: Callable[..., str]) -> None:
    parquet(tmp_path / "hub" / "train.parquet", [hub_row([[1, 1, 2, 2]], [0])], ["a"])
    parquet(tmp_path / "hub" / "test.parquet", [hub_row([], []), hub_row([], [])], ["a"])
    message = user_error(main, line(tmp_path / "hub", tmp_path / "out"))
    assert f"split test: no object in 2 images (in 1 file, the first {tmp_path}/hub/test.parquet)" in message
    parquet(tmp_path / "hub" / "test.parquet", [hub_row([[1, 1, 2, 2], [3, 3, 0, 4], [3, 3, 0, 0]], [0, 0, 0])], ["a"])
    message = user_error(main, line(tmp_path / "hub", tmp_path / "out"))
    assert "split test: 2 of the 3 boxes would be left out: 2 without width or height (first: " in message
    assert "test.parquet, row 0, object 1)" in message
    assert main(line(tmp_path / "hub", tmp_path / "out", "--allow_loss", "true")) == 0
    assert len(read(tmp_path / "out", "test").images[0].labels_N) == 1


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_error: Callable[..., str]) -> None:
    parquet(tmp_path / "hub" / "train.parquet", [hub_row([[1, 1, 2, 2]], [0])], ["a"])
    requests = []

    def download(name: str, **options: Any) -> str:
        requests.append((name, options["repo_type"]))
        if name == "org/none":
            raise OSError("offline\nhere")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert main(line("hub:org/name", tmp_path / "out")) == 0
    assert requests == [("org/name", "dataset")]
    assert len(read(tmp_path / "out").images) == 1
    assert "hub:org/none: cannot be fetched: offline here" in user_error(main, line("hub:org/none", tmp_path / "o"))


def test_real_data_come_back(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    bccd = shared_data("bccd")
    truth = read_coco(bccd / "annotations/instances_val.json", bccd / "images", training=False)
    rows = []
    for record in truth.images:
        objects = {"bbox": record.file_boxes_N4.tolist(), "category": record.labels_N.tolist()}
        rows.append({"image": {"bytes": Path(record.path).read_bytes(), "path": None}, "objects": objects})
    parquet(tmp_path / "val.parquet", rows, list(truth.class_names))
    assert main(line(tmp_path / "val.parquet", tmp_path / "out")) == 0
    converted = read(tmp_path / "out", "val")
    assert len(converted.images) == len(truth.images) == 87
    for converted_image, original in zip(converted.images, truth.images, strict=True):
        assert Path(converted_image.path).read_bytes() == Path(original.path).read_bytes()
        np.testing.assert_allclose(converted_image.file_boxes_N4, original.file_boxes_N4, atol=2e-3)
        np.testing.assert_array_equal(converted_image.labels_N, original.labels_N)
