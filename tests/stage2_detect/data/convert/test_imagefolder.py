"""Hugging Face's image folders: rows as JSON lines, table and Parquet, splits by folders, what is not labeled, and the faults."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from converted_data import by_name, counted, line, read, save, write
from PIL import Image

from ssld.stage2_detect.convert_data import main
from ssld.stage2_detect.data.convert.imagefolder import read_imagefolder
from ssld.stage2_detect.data.convert.parts import find_data
from ssld.stage2_detect.data_config import DetectionDataConfig

CAT, DOG = [1, 2, 10, 5], [20, 4, 15, 12]
BOTH = {"bbox": [CAT, DOG], "categories": ["cat", "dog"]}


def lines(file: Path, *rows: Any, encoding: str = "utf-8") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\r\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_bytes((text + "\r\n").encode(encoding))


def table(file: Path, rows: list[dict[str, Any]], text: Callable[[Any], str]) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as opened:
        writer = csv.DictWriter(opened, ["file_name", "objects"])
        writer.writeheader()
        writer.writerows([{**row, "objects": text(row["objects"])} for row in rows])


@pytest.mark.parametrize("kind", ["jsonl", "utf-16", "json in csv", "python in csv", "parquet"])
def test_every_kind_of_metadata(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "fotos für heute"
    rows = [
        {"file_name": "a.png", "objects": BOTH},
        {"file_name": "sub/größe 1.png", "objects": {"bbox": [DOG], "categories": ["dog"]}},
        {"file_name": "empty.png", "objects": {"bbox": [], "categories": []}},
    ]
    for row in rows:
        save(root / str(row["file_name"]))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
    elif kind == "jsonl":
        lines(root / "metadata.jsonl", *rows)
    elif kind == "utf-16":
        lines(root / "metadata.jsonl", *rows, encoding="utf-16")
    else:
        table(root / "metadata.csv", rows, json.dumps if kind.startswith("json") else repr)
    assert main(line(root, tmp_path / "out")) == 0
    data = read(tmp_path / "out")
    assert data.class_names == ("cat", "dog")
    images = by_name(data)
    assert images.keys() == {"a", "größe 1", "empty"}
    assert images["a"].file_boxes_N4.tolist() == [CAT, DOG]
    assert images["a"].labels_N.tolist() == [0, 1]
    assert images["größe 1"].file_boxes_N4.tolist() == [DOG]
    assert len(images["empty"].file_boxes_N4) == 0


def test_splits_and_what_is_not_read(tmp_path: Path) -> None:
    """Splits by the folders above the images; images without a row, and rows without objects, are no negatives; all are counted by name."""
    root = tmp_path / "set"
    names = ["train/a.png", "train/b.png", "train/later.png", "train/unlisted.png", "test/c.png"]
    for name in names:
        save(root / name)
    write(root / "train" / "broken.png", "no image")
    objects = [
        {"bbox": [CAT, [50, 50, 5, 5], [35, 10, 5.5, 5]], "category": ["cat", "cat", "cat"]},
        [{"bbox": DOG, "category": "dog"}],
    ]
    lines(
        root / "train" / "metadata.jsonl",
        {"file_name": "a.png", "objects": objects[0]},
        {"file_name": "b.png", "objects": objects[1]},
        {"file_name": "later.png", "objects": None},
        {"file_name": "broken.png", "objects": {"bbox": [CAT], "category": ["cat"]}},
    )
    lines(root / "test" / "metadata.jsonl", {"file_name": "c.png", "objects": {"bbox": [DOG], "category": ["dog"]}})
    assert main(line(root, tmp_path / "out", "--allow_loss", "true")) == 0
    data = by_name(read(tmp_path / "out", "train"))
    assert data["a"].file_boxes_N4.tolist() == [CAT, [35, 10, 5, 5]]
    assert data["b"].file_boxes_N4.tolist() == [DOG]
    assert data.keys() == {"a", "b"}
    assert by_name(read(tmp_path / "out", "test")).keys() == {"c"}
    counts = counted(tmp_path / "out", "train")
    file = f"{root}/train/metadata.jsonl"
    assert counts["image"]["skipped"] == {
        "whose row has no objects, not even an empty list": {"count": 1, "first": f"{file}, line 3"},
        "without a row in the metadata": {"count": 1, "first": f"{root}/train/unlisted.png"},
    }
    assert counts["image"]["dropped"] == {"that cannot be read": {"count": 1, "first": f"{root}/train/broken.png"}}
    assert counts["box"]["dropped"] == {
        "outside the image": {"count": 1, "first": f"{file}, line 1, object 2"},
        "on images that cannot be read": {"count": 1, "first": f"{root}/train/broken.png"},
    }


def test_one_split_of_several(tmp_path: Path) -> None:
    """Images of the splits that are not asked for are not counted as missing; those in no split are named."""
    root = tmp_path / "set"
    for name in ("train/a.png", "train/unlisted.png", "test/c.png", "extra/d.png"):
        save(root / name)
    lines(root / "train" / "metadata.jsonl", {"file_name": "a.png", "objects": BOTH})
    lines(root / "test" / "metadata.jsonl", {"file_name": "c.png", "objects": BOTH})
    data = read_imagefolder(root, classes=None, splits=["train"], box_format="xywh")
    assert [image.path.name for image in data.splits["train"]] == ["a.png"]
    assert data.tallies["train"].record()["image"]["skipped"] == {
        "without a row in the metadata": {"count": 1, "first": f"{root}/train/unlisted.png"}
    }
    assert data.notes == [f"1 image in no folder of a split, not read (first: {root}/extra/d.png)"]


@pytest.mark.parametrize("objects", [{}, {"bbox": None, "category": None}])
def test_null_is_no_empty_list(tmp_path: Path, objects: dict[str, Any]) -> None:
    root = tmp_path / "set"
    for name in ("a.png", "b.png"):
        save(root / name)
    lines(root / "metadata.jsonl", {"file_name": "a.png", "objects": BOTH}, {"file_name": "b.png", "objects": objects})
    assert main(line(root, tmp_path / "out", "--allow_loss", "true")) == 0
    assert by_name(read(tmp_path / "out")).keys() == {"a"}
    assert counted(tmp_path / "out")["image"]["skipped"].keys() == {"whose row has no objects, not even an empty list"}


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    """Polygons of many corners, in a table."""
    root = tmp_path / "set"
    save(root / "a.png")
    shape = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0] * 5000]
    row = {"file_name": "a.png", "objects": {"bbox": [CAT], "category": ["cat"], "segmentation": [shape]}}
    table(root / "metadata.csv", [row], json.dumps)
    limit = csv.field_size_limit()
    assert main(line(root, tmp_path / "out")) == 0
    assert csv.field_size_limit() == limit


def test_numbers_need_names_and_boxes_are_of_the_upright_image(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 20 wide and 40 high, shown 40 wide and 20 high
    save(root / "a.jpg", (20, 40), exif=exif)
    lines(root / "metadata.jsonl", {"file_name": "a.jpg", "objects": {"bbox": [DOG], "categories": [1]}})
    message = user_error(main, line(root, tmp_path / "out"))
    assert (
        "metadata.jsonl, line 1, object 1: the category 1 is a number without a class name; give --classes" in message
    )
    write(tmp_path / "names.txt", "cat\ndog\n")
    assert main(line(root, tmp_path / "out", "--classes", str(tmp_path / "names.txt"))) == 0
    (record,) = read(tmp_path / "out").images
    assert (record.width, record.height, record.labels_N.tolist()) == (40, 20, [1])
    assert record.file_boxes_N4.tolist() == [DOG]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "metadata.jsonl, line 1: is not JSON"),
        (["[1]"], "metadata.jsonl, line 1: expected an object with file_name and objects"),
        ([{"image": "a.png"}], "line 1: has no file_name (it has image)"),
        ([{"file_name": "gone.png", "objects": BOTH}], "line 1: file_name: there is no image "),
        ([{"file_name": "a.png", "text": "a cat"}], "line 1: has no column objects with bbox and category (it has file_name, text)"),
        ([{"file_name": "a.png", "objects": BOTH}] * 2, "line 2: a.png has a row already ("),
        ([{"file_name": "a.png", "objects": {"bbox": [CAT]}}], "line 1: objects: needs bbox and one of category"),
        ([{"file_name": "a.png", "objects": {"bbox": [CAT], "category": []}}], "line 1: objects: its lists are of unequal"),
        ([{"file_name": "a.png", "objects": "cat"}], "line 1: objects: is not JSON, such as {"),
        ([{"file_name": "a.png", "objects": 3}], "line 1: objects: expected bbox and category, as lists"),
        ([{"file_name": "a.png", "objects": [{"bbox": CAT, "label": None}]}], "line 1, object 1: category None, expected a name"),
        ([{"file_name": "a.png", "objects": [{"bbox": [1, 2, 3], "label": "cat"}]}], "line 1, object 1: bbox [1, 2, 3], expected four"),
        ([{"file_name": "a.png", "objects": [{"bbox": [9, 9, -3, 2], "label": "cat"}]}], "has a negative side as xywh; give another --box"),
        ([{"file_name": "a.png", "width": 7, "height": 7, "objects": BOTH}], "line 1: gives the size 7x7, but the image"),
    ],
)  # fmt: skip
def test_faults(tmp_path: Path, user_error: Callable[..., str], rows: list[Any], message: str) -> None:
    root = tmp_path / "set"
    save(root / "a.png")
    lines(root / "metadata.jsonl", *rows)
    assert message in user_error(main, line(root, tmp_path / "out"))


def test_faults_of_places(tmp_path: Path, user_error: Callable[..., str]) -> None:
    root = tmp_path / "set"
    for name in ("train/a.png", "b.png"):
        save(root / name)
    lines(root / "metadata.jsonl", *({"file_name": name, "objects": BOTH} for name in ("train/a.png", "b.png")))
    assert "b.png: is beside train, which look like splits" in user_error(main, line(root, tmp_path / "out"))
    write(root / "metadata.csv", "file_name,objects\n")
    assert "holds metadata.csv and metadata.jsonl; remove one of them" in user_error(main, line(root, tmp_path / "out"))
    with pytest.raises(
        Exception, match=r"metadata\.jsonl is of an image folder of Hugging Face; give its folder by --data"
    ):
        find_data(DetectionDataConfig(source=str(root / "metadata.jsonl")))
