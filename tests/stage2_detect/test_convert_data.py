"""YOLO, Pascal VOC and Hugging Face data sets become the COCO file they came from; every fault is one line with its place."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filled_shapes import filled
from PIL import Image

from stage2_detect.coco import CocoData, read_coco
from stage2_detect.convert_data import main

NAMES = ("wide", "tall")


def read(run: Path, split: str = "train") -> CocoData:
    result = json.loads((run / "result.json").read_text())
    assert set(result["outputs"]) == {f"{name}.json" for name in result["metrics"]["splits"]}
    return read_coco(run / f"{split}.json", result["metrics"]["splits"][split]["image_folder"], training=False)


def by_name(data: CocoData) -> dict[str, Any]:
    return {Path(record.path).stem: record for record in data.images}


def equal_objects(found: CocoData, wanted: CocoData, atol: float = 2e-3) -> None:
    assert found.class_names == wanted.class_names
    ours, theirs = by_name(found), by_name(wanted)
    assert ours.keys() == theirs.keys()
    for name, record in theirs.items():
        np.testing.assert_allclose(ours[name].file_boxes_N4, record.file_boxes_N4, atol=atol)
        np.testing.assert_array_equal(ours[name].labels_N, record.labels_N)
        np.testing.assert_array_equal(ours[name].crowd_N, record.crowd_N)
        assert (ours[name].width, ours[name].height) == (record.width, record.height)


def numbered(file: Path) -> dict[str, Any]:
    """A COCO file with numbers for ids, as hotcoco needs them."""
    content: dict[str, Any] = json.loads(file.read_text())
    number = {image["id"]: index for index, image in enumerate(content["images"], 1)}
    for image in content["images"]:
        image["id"] = number[image["id"]]
    for one in content["annotations"]:
        one["image_id"] = number[one["image_id"]]
    return content


def save(path: Path, size: tuple[int, int] = (40, 20), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Two images of 40 x 20 pixels, one with a box and a polygon."""
    root = tmp_path / "yolo"
    for name in ("a", "b"):
        save(root / "images" / "train" / f"{name}.png")
    write(root / "labels/train/a.txt", "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.6 0.1 0.1 0.9\n")
    write(root / "data.yaml", "train: images/train\nnames: [wide, tall]\n")
    return root


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def line(source: Path | str, output: Path, *flags: str) -> list[str]:
    return ["--source", str(source), "--output", str(output), *flags]


# ---- YOLO


def test_yolo_by_hand(yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line(yolo, tmp_path / "out")) == 0
    data = read_coco(tmp_path / "out" / "train.json", yolo / "images/train", training=False, segmentations=True)
    first, second = data.images
    np.testing.assert_allclose(first.file_boxes_N4, [[15, 5, 10, 10], [4, 2, 20, 16]])
    assert first.labels_N.tolist() == [1, 0]
    assert second.labels_N.size == 0
    assert data.class_names == NAMES
    assert first.segmentations is not None
    assert first.segmentations[0] is None
    assert first.segmentations[1] == [[4.0, 2.0, 24.0, 2.0, 4.0, 18.0]]
    assert first.areas_N[0] == 100
    assert first.areas_N[1] == filled(first.segmentations[1], 20, 40).sum()
    out = capsys.readouterr().out
    assert "2 images, 2 objects, 1 images without objects" in out
    assert "1 images have no label file" in out


def test_yolo_from_an_independent_writer(tiny_coco: Any, tmp_path: Path) -> None:
    root = tmp_path / "yolo"
    for split in ("train", "val"):
        hotcoco.COCO(numbered(getattr(tiny_coco, f"{split}_annotations"))).to_yolo(str(root / "labels" / split))
        shutil.copytree(getattr(tiny_coco, f"{split}_images"), root / "images" / split)
        (root / "labels" / split / "data.yaml").unlink()
    write(root / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: {0: wide, 1: tall}\n")
    assert main(line(root / "data.yaml", tmp_path / "out")) == 0
    for split in ("train", "val"):
        wanted = read_coco(getattr(tiny_coco, f"{split}_annotations"), None, training=False)
        equal_objects(read(tmp_path / "out", split), wanted)
    assert main(line(root / "data.yaml", tmp_path / "one", "--splits", '["val"]')) == 0
    assert sorted(file.name for file in (tmp_path / "one").glob("*.json")) == [
        "environment.json",
        "result.json",
        "val.json",
    ]


def test_yolo_layouts(yolo: Path, tmp_path: Path) -> None:
    """Lists of images, Roboflow's ../ and a folder without data.yaml name the same images."""
    write(yolo / "list.txt", "images/train/a.png\n./images/train/b.png\n")
    robo = yolo / "train"
    shutil.copytree(yolo / "images" / "train", robo / "images")
    shutil.copytree(yolo / "labels" / "train", robo / "labels")
    bare = tmp_path / "bare"
    shutil.copytree(yolo / "images" / "train", bare / "images")
    shutil.copytree(yolo / "labels" / "train", bare / "labels")
    write(bare / "labels" / "classes.txt", "wide\ntall\n")
    write(tmp_path / "names.txt", "wide\ntall\n")
    shutil.copytree(yolo, tmp_path / "deep", ignore=shutil.ignore_patterns("data.yaml", "train.txt", "list.txt"))
    shutil.rmtree(tmp_path / "deep" / "train")
    assert main(line(yolo, tmp_path / "plain")) == 0
    wanted = read(tmp_path / "plain")
    for number, text in enumerate(("train: list.txt", "train: ../train/images", "train: [images/train]")):
        write(yolo / "data.yaml", f"{text}\nnames: [wide, tall]\n")
        assert main(line(yolo, tmp_path / f"out{number}")) == 0
        equal_objects(read(tmp_path / f"out{number}"), wanted)
    assert main(line(bare, tmp_path / "out_bare")) == 0
    equal_objects(read(tmp_path / "out_bare"), wanted)
    assert main(line(tmp_path / "deep", tmp_path / "out_deep", "--classes", str(tmp_path / "names.txt"))) == 0
    equal_objects(read(tmp_path / "out_deep"), wanted)


def test_boxes_over_the_border_are_clipped_and_empty_ones_dropped(
    yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["0 0.9 0.5 0.4 0.5", "1 0.5 0.5 0 0.5", "1 0.5 0.5 0.5 1.0000001"]
    write(yolo / "labels/train/b.txt", "\n".join(rows))
    assert main(line(yolo, tmp_path / "out")) == 0
    record = by_name(read(tmp_path / "out"))["b"]
    np.testing.assert_allclose(record.file_boxes_N4, [[28, 5, 12, 10], [10, 0, 20, 20]])
    counts = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]["splits"]["train"]
    assert (counts["objects"], counts["clipped"], counts["dropped"], counts["images"]) == (4, 1, 1, 2)
    assert f"first: {yolo}/labels/train/b.txt, line 2" in capsys.readouterr().out


def test_boxes_belong_to_the_upright_picture(yolo: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (yolo / "images/train/a.png").unlink()
    save(yolo / "images/train/a.jpg", (20, 40), exif=exif)
    assert main(line(yolo, tmp_path / "out")) == 0
    record = by_name(read(tmp_path / "out"))["a"]
    assert (record.width, record.height) == (40, 20)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "labels/train/a.txt",
            "1 .5 .5 .2 .2\n2 .5 .5 .2 .2",
            "a.txt, line 2: class 2, but there are 2 classes, 0 to 1",
        ),
        ("labels/train/a.txt", "0 20 10 5 5", "a.txt, line 1: 20 is outside 0..1; coordinates are shares"),
        ("labels/train/a.txt", "0 .5 .5 .2", "a.txt, line 1: has 4 values"),
        ("labels/train/a.txt", "0 .5 .5 .2 .2 .97", "a.txt, line 1: has 6 values"),
        ("labels/train/a.txt", "0 .5 nan .2 .2", "a.txt, line 1: value 3 is 'nan', not a number"),
        ("labels/train/a.txt", "wide .5 .5 .2 .2", "a.txt, line 1: the class is 'wide', not a number"),
        ("labels/train/c.txt", "0 .5 .5 .2 .2", "c.txt: no image in"),
        ("images/train/c.png", "no picture", "cannot read image"),
        ("data.yaml", "train: images/train\nnames: [a, a]", "two classes are called 'a'"),
        ("data.yaml", "train: images/train\nnames: [a, b]\nnc: 3", "nc is 3, but names has 2"),
        ("data.yaml", "train: images/train\nnames: {0: a, 2: b}", "the class numbers are not 0..1"),
        ("data.yaml", "train: images/trian\nnames: [a, b]", "is neither a folder nor a .txt list"),
        ("data.yaml", "names: [a, b]", "has none of the keys train, val, test"),
        ("data.yaml", "train: images/train\nnames: [a, b]\nkpt_shape: [17, 3]", "pose data"),
        ("data.yaml", "train: images/train", "no class names"),
        ("data.yaml", "train: list.txt\nnames: [a, b]", "list.txt, line 1: no image"),
    ],
)
def test_yolo_faults(
    yolo: Path, tmp_path: Path, user_error: Callable[..., str], file: str, text: str, message: str
) -> None:
    write(yolo / "list.txt", "images/train/z.png\n")
    write(yolo / file, text)
    assert message in user_error(main, line(yolo, tmp_path / "out"))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left <= {".lock", "config.yaml", "environment.json", "error.json"}


def test_a_mended_fault_needs_no_other_output(yolo: Path, tmp_path: Path, user_error: Callable[..., str]) -> None:
    sound = (yolo / "labels/train/a.txt").read_text()
    write(yolo / "labels/train/a.txt", "9 .5 .5 .1 .1")
    user_error(main, line(yolo, tmp_path / "out"))
    write(yolo / "labels/train/a.txt", sound)
    assert main(line(yolo, tmp_path / "out")) == 0
    before = (tmp_path / "out" / "train.json").stat().st_mtime_ns
    assert main(line(yolo, tmp_path / "out")) == 0
    assert (tmp_path / "out" / "train.json").stat().st_mtime_ns == before


# ---- Pascal VOC


OBJECT = (
    "<object>\n<name>{name}</name><difficult>{difficult}</difficult>\n<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>\
<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
)


def voc_xml(*objects: tuple[str, int, tuple[Any, ...]], size: tuple[int, int] = (40, 20)) -> str:
    texts = [OBJECT.format(name=name, difficult=difficult, box=box) for name, difficult, box in objects]
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation>\n<filename>x.png</filename>\n{sides}\n" + "\n".join(texts) + "\n</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two images of 40 x 20 pixels; one is of the training split."""
    root = tmp_path / "voc"
    for name in ("a", "b"):
        save(root / "JPEGImages" / f"{name}.png")
    whole, pixel = ("tall", 0, (1, 1, 40, 20)), ("wide", 1, (3, 4, 3, 4))
    write(root / "Annotations/a.xml", voc_xml(whole, pixel))
    write(root / "Annotations/b.xml", voc_xml())
    for split, names in (("train", "a"), ("val", "b"), ("trainval", "a\nb"), ("tall_train", "a 1")):
        write(root / f"ImageSets/Main/{split}.txt", names + "\n")
    return root


def test_voc_by_hand(voc: Path, tmp_path: Path) -> None:
    """Pixels are counted from 1 and the last one belongs to the box: 1..40 is the whole width, 3..3 one pixel."""
    assert main(line(voc, tmp_path / "out")) == 0
    data = read(tmp_path / "out")
    assert data.class_names == ("tall", "wide")
    (record,) = data.images
    np.testing.assert_array_equal(record.file_boxes_N4, [[0, 0, 40, 20], [2, 3, 1, 1]])
    assert record.labels_N.tolist() == [0, 1]
    assert record.crowd_N.tolist() == [False, True]
    assert len(read(tmp_path / "out", "val").images) == 1
    assert not (tmp_path / "out" / "trainval.json").exists()
    flags = ("--voc_inclusive", "false", "--voc_difficult", "keep", "--splits", '["trainval"]')
    assert main(line(voc, tmp_path / "edges", *flags)) == 0
    record = by_name(read(tmp_path / "edges", "trainval"))["a"]
    np.testing.assert_array_equal(record.file_boxes_N4, [[1, 1, 39, 19]])  # nothing is left of the other
    assert not record.crowd_N.any()


def test_voc_from_an_independent_writer(tiny_coco: Any, tmp_path: Path) -> None:
    """hotcoco too counts pixels from 1, the last included, and writes crowds as difficult."""
    content = numbered(tiny_coco.train_annotations)
    content["annotations"][2]["iscrowd"] = 1
    write(tmp_path / "coco.json", json.dumps(content))
    root = tmp_path / "voc"
    hotcoco.COCO(content).to_voc(str(root))
    shutil.copytree(tiny_coco.train_images, root / "JPEGImages")
    write(tmp_path / "names.txt", "wide\ntall")
    assert main(line(root, tmp_path / "out", "--classes", str(tmp_path / "names.txt"))) == 0
    wanted = read_coco(tmp_path / "coco.json", None, training=False)
    equal_objects(read(tmp_path / "out"), wanted)
    assert wanted.counts["crowd"] == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Annotations/a.xml", "<annotation>\n<object></annotation>", "a.xml, line 2: is not well-formed XML"),
        (
            "Annotations/a.xml",
            "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>\n<x>&e;</x>",
            "has a document type",
        ),
        ("Annotations/a.xml", "<annotation><object/></annotation>", "line 1: the object has no name"),
        ("Annotations/a.xml", voc_xml(("tall", 0, (0, 1, 5, 5))), "a.xml, line 4: a corner at 0, but VOC counts"),
        ("Annotations/a.xml", voc_xml(("tall", 0, (5, 1, 4, 5))), "line 4: xmax or ymax lies before"),
        ("Annotations/a.xml", voc_xml(("tall", 0, ("", 1, 4, 5))), "line 4: xmin is '', not a number"),
        (
            "Annotations/a.xml",
            voc_xml(("tall", 0, (1, 1, 2, 2)), size=(41, 20)),
            "a.xml, line 3: says 41x20, but the image",
        ),
        ("Annotations/a.xml", "<annotation><object><name>a</name></object></annotation>", "has no bndbox"),
        ("ImageSets/Main/train.txt", "a\nz\n", "train.txt, line 2: there is no Annotations/z.xml"),
        ("ImageSets/Main/train.txt", "a 1\n", "train.txt, line 1: has 2 columns"),
        ("JPEGImages/a.png", "", "cannot read image"),
    ],
)
def test_voc_faults(
    voc: Path, tmp_path: Path, user_error: Callable[..., str], file: str, text: str, message: str
) -> None:
    write(voc / file, text)
    assert message in user_error(main, line(voc, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*rain.json"))


def test_voc_class_that_is_not_listed(voc: Path, tmp_path: Path, user_error: Callable[..., str]) -> None:
    write(tmp_path / "names.txt", "tall\nsmall\n")
    message = user_error(main, line(voc, tmp_path / "out", "--classes", str(tmp_path / "names.txt")))
    assert "a.xml, line 7: class 'wide' is not among the 2 given" in message
    (voc / "JPEGImages/a.png").unlink()
    assert "a.xml: its image is not in" in user_error(main, line(voc, tmp_path / "out2"))


# ---- Hugging Face


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


def test_hub_shapes_that_are_no_polygons_are_refused(tmp_path: Path, user_error: Callable[..., str]) -> None:
    row = hub_row([[0.0, 0.0, 5.0, 5.0]], [0])
    row["objects"]["segmentation"] = [{"size": [8, 8], "counts": "04P1"}]
    parquet(tmp_path / "train.parquet", [row], ["ant"])
    error = user_error(main, line(tmp_path / "train.parquet", tmp_path / "out"))
    assert "train.parquet, row 0, object 0: segmentation: only polygons are read" in error
    assert not (tmp_path / "out" / "train.json").exists()


def test_hub_list_of_structs_with_names_and_polygons(tmp_path: Path) -> None:
    """Names of classes without metadata, `default/train/0000.parquet`, and what objects carry besides."""
    one = {"bbox": [1.0, 2.0, 10.0, 5.0], "categories": "dog", "area": 25.5, "is_crowd": 0}
    one["segmentation"] = [[1.0, 2.0, 11.0, 2.0, 1.0, 7.0]]
    other = {"bbox": [0.0, 0.0, 5.0, 5.0], "categories": "ant", "area": 25.0, "is_crowd": 1, "segmentation": []}
    rows = [{"image": encoded(), "objects": [one, other]}]
    parquet(tmp_path / "hub" / "default" / "train" / "0000.parquet", rows)
    assert main(line(tmp_path / "hub", tmp_path / "out")) == 0
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
def test_forms_of_boxes(tmp_path: Path, form: str, box: list[float]) -> None:
    parquet(tmp_path / "train.parquet", [hub_row([box], [0])], ["cat"])
    assert main(line(tmp_path / "train.parquet", tmp_path / "out", "--box_format", form)) == 0
    np.testing.assert_allclose(read(tmp_path / "out").images[0].file_boxes_N4, [[4, 2, 20, 10]])


@pytest.mark.parametrize(
    ("row", "names", "message"),
    [
        (hub_row([[1, 1, 2, 2]], [2]), ["a", "b"], "row 1, object 0: category 2, but there are 2 classes"),
        (hub_row([[1, 1, 2, 2]], [1]), None, "nothing says what it means; give --classes"),
        (hub_row([[1, 1, 2]], [0]), ["a"], "row 1, object 0: bbox [1.0, 1.0, 2.0], expected four"),
        (hub_row([[1, 1, float("nan"), 2]], [0]), ["a"], "row 1, object 0: bbox is 'nan', not a number"),
        (hub_row([[1, 1, -2, 2]], [0]), ["a"], "has a negative side as xywh; give another --box_format"),
        (hub_row([[30, 10, 38, 19]] * 3, [0] * 3), ["a"], "row 1, object 0: the box reaches out of its image"),
        (hub_row([[1, 1, 2, 2]], [0, 0]), ["a"], "row 1: objects: its lists are of unequal length"),
        (hub_row([[1, 1, 2, 2]], [0]) | {"image": {"bytes": b"x", "path": "p"}}, ["a"], "cannot read image"),
        (hub_row([[1, 1, 2, 2]], [0]) | {"image": {"bytes": None, "path": "p"}}, ["a"], "row 1: holds no image bytes"),
        (hub_row([[1, 1, 2, 2]], [0], width=41, height=20), ["a"], "row 1: says 41x20, but the image"),
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


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_error: Callable[..., str]) -> None:
    parquet(tmp_path / "hub" / "train.parquet", [hub_row([[1, 1, 2, 2]], [0])], ["a"])
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"]))
        if name == "org/none":
            raise OSError("offline\nhere")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert main(line("hub:org/name", tmp_path / "out")) == 0
    assert asked == [("org/name", "dataset")]
    assert len(read(tmp_path / "out").images) == 1
    assert "hub:org/none: cannot be fetched: offline here" in user_error(main, line("hub:org/none", tmp_path / "o"))


# ---- real data


def test_real_data_come_back(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    bccd = shared_data("bccd")
    truth = read_coco(bccd / "annotations/instances_val.json", bccd / "images", training=False)
    rows = []
    for record in truth.images:
        objects = {"bbox": record.file_boxes_N4.tolist(), "category": record.labels_N.tolist()}
        rows.append({"image": {"bytes": Path(record.path).read_bytes(), "path": None}, "objects": objects})
    parquet(tmp_path / "val.parquet", rows, list(truth.class_names))
    assert main(line(tmp_path / "val.parquet", tmp_path / "out")) == 0
    found = read(tmp_path / "out", "val")
    assert len(found.images) == len(truth.images) == 87
    for ours, theirs in zip(found.images, truth.images, strict=True):
        assert Path(ours.path).read_bytes() == Path(theirs.path).read_bytes()
        np.testing.assert_allclose(ours.file_boxes_N4, theirs.file_boxes_N4, atol=2e-3)
        np.testing.assert_array_equal(ours.labels_N, theirs.labels_N)
