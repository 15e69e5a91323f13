"""Cleaned copies of the data check: they can be trained on; what they keep and correct, and when none is written. The given files do not change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssld.shared.errors import UserError
from ssld.stage2_detect.check_data import main
from ssld.stage2_detect.data.coco import read_coco
from tests.stage2_detect.checked_data import Content, DataSet, data, texts

__all__ = ["data"]


@pytest.mark.parametrize(
    "damage", [lambda row: row.pop("id"), lambda row: row.update(id=[1]), lambda row: row.update(id=None)]
)
def test_no_cleaned_copy_without_ids_of_categories(
    data: DataSet, damage: Callable[[Content], None], capsys: pytest.CaptureFixture[str]
) -> None:
    content = data.read()
    damage(content["categories"][1])
    data.write(content)
    with pytest.raises(UserError):
        read_coco(data.folder / "train.json", data.folder / "train", training=True)
    places = ["--annotations", str(data.folder / "train.json"), "--images", str(data.folder / "train")]
    assert main([*places, "--fix", str(data.folder / "clean")]) == 2
    out, err = capsys.readouterr()
    assert "1 category without an id (number 2): training stops" in out
    assert err.startswith(
        f"error: no cleaned copy: {data.folder / 'train.json'}: number 2 of the categories has no unique id"
    )
    assert err.count("\n") == 1
    assert not (data.folder / "clean").exists()
    content["categories"][1]["id"] = 7
    data.write(content)
    data.write(data.read("val") | {"categories": [{"name": "wide"}, {"id": 7, "name": "tall"}]}, "val")
    val = ["--val_annotations", str(data.folder / "val.json"), "--val_images", str(data.folder / "val")]
    assert main([*places, *val, "--fix", str(data.folder / "clean")]) == 2
    assert not (data.folder / "clean").exists()  # neither of the two
    data.write(data.read("val") | {"categories": [{"id": 3, "name": ["wide"]}, {"id": 7, "name": "Tall"}]}, "val")
    assert main([*places, *val]) == 1  # a list as a name is a fault, not a traceback


def test_cleaned_copy_keeps_sound_rows(data: DataSet) -> None:
    content = data.read()
    rows, images = content["annotations"], content["images"]
    rows[3]["bbox"], rows[3]["area"] = [50.5, 40, 30, 5], 150
    rows.append({**rows[5], "id": 900})  # a duplicate
    images.append({**images[4], "id": "again"})  # the same image again, with another box
    rows.append({"id": 901, "image_id": "again", "category_id": 3, "bbox": [1, 2, 3, 4]})
    content["licenses"] = [{"id": 1}]
    data.write(content)
    _, findings, _ = data.check("--fix", str(data.folder / "clean"))
    assert any("1 image listed more than once, under other ids (4.png)" in text for text in texts(findings, "warning"))
    assert any("1 box given twice (id 900)" in text for text in texts(findings, "warning"))
    clean = json.loads((data.folder / "clean" / "train.json").read_text())
    assert clean["licenses"] == [{"id": 1}]
    assert clean["images"] == images[:-1]
    by_id = {row["id"]: row for row in clean["annotations"]}
    assert by_id[rows[3]["id"]]["bbox"] == [50.5, 40, 13.5, 5]
    assert by_id[rows[3]["id"]]["area"] == 67.5
    assert by_id[901]["image_id"] == images[4]["id"]
    assert by_id.keys() == {row["id"] for row in rows} - {900}


def test_missing_class_is_added(data: DataSet, tmp_path: Path) -> None:
    content = data.read("val")
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] == 3]
    content["categories"] = [{"id": 3, "name": "wide"}]
    data.write(content, "val")
    assert data.check("--fix", str(tmp_path / "clean"), val=True)[0] == 1
    clean = json.loads((tmp_path / "clean" / "val.json").read_text())
    assert clean["categories"] == [{"id": 3, "name": "wide"}, {"id": 7, "name": "tall"}]


def test_a_fix_never_overwrites(data: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    before = (data.folder / "train.json").read_bytes()
    places = ["--annotations", str(data.folder / "train.json"), "--images", str(data.folder / "train")]
    assert main([*places, "--fix", str(data.folder)]) == 2
    assert "exists already; give another folder to --fix" in capsys.readouterr().err
    assert main([*places, "--fix", str(data.folder / "val.json")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --fix {data.folder / 'val.json'}: is a file; give a folder for the cleaned copies\n"
    )
    assert (data.folder / "train.json").read_bytes() == before


def test_files_of_one_name_get_copies_of_two(data: DataSet, tmp_path: Path, files_below: Any) -> None:
    """Roboflow's exports give the files of all parts one name, each in the folder of its images."""
    line = ["--fix", str(tmp_path / "clean")]
    for part, flag in (("train", ""), ("val", "val_")):
        content = data.read(part)
        content["info"] = part
        (data.folder / part / "_annotations.coco.json").write_text(json.dumps(content))
        line += [f"--{flag}annotations", str(data.folder / part / "_annotations.coco.json")]
        line += [f"--{flag}images", str(data.folder / part)]
    assert main(line) == 0
    assert files_below(tmp_path / "clean") == {f"{part}__annotations.coco.json" for part in ("train", "val")}
    for part in ("train", "val"):
        assert json.loads((tmp_path / "clean" / f"{part}__annotations.coco.json").read_text())["info"] == part
    assert main(line) == 2


def test_two_images_with_one_id_are_left_out_with_their_boxes(data: DataSet) -> None:
    content = data.read()
    first, second = (content["images"][index]["id"] for index in (0, 2))
    expected = [row["id"] for row in content["annotations"] if row["image_id"] not in (first, second)]
    content["images"][2]["id"] = first
    for row in content["annotations"]:
        row["image_id"] = first if row["image_id"] == second else row["image_id"]
    content["images"].append(content["images"][3])
    data.write(content)
    places = ["--annotations", str(data.folder / "train.json"), "--images", str(data.folder / "train")]
    assert main([*places, "--fix", str(data.folder / "clean")]) == 1
    copy = json.loads((data.folder / "clean" / "train.json").read_text())
    assert [row["file_name"] for row in copy["images"]] == ["1.png", *(f"{number}.png" for number in range(3, 12))]
    assert [row["id"] for row in copy["annotations"]] == expected


def test_an_invalid_orientation_is_replaced_by_upright_if_no_image_is_rotated(data: DataSet) -> None:
    data.write(data.read() | {"info": {"image_orientation": "up"}})
    assert data.check("--fix", str(data.folder / "clean"))[0] == 1
    assert json.loads((data.folder / "clean" / "train.json").read_text())["info"] == {"image_orientation": "upright"}


def test_no_cleaned_copy_that_lost_its_boxes(data: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither of the two files is written; --allow_loss accepts the loss as training does."""
    content = data.read()
    for row in content["annotations"]:
        if row["category_id"] == 7:
            row["bbox"] = [1, 2, 3]
    first = next(row["id"] for row in content["annotations"] if row["category_id"] == 7)
    number = sum(row["category_id"] == 7 for row in content["annotations"])
    data.write(content)
    places = ["--annotations", str(data.folder / "train.json"), "--images", str(data.folder / "train")]
    places += ["--val_annotations", str(data.folder / "val.json"), "--val_images", str(data.folder / "val")]
    assert main([*places, "--fix", str(data.folder / "clean")]) == 2
    assert capsys.readouterr().err == (
        f"error: no cleaned copy: {data.folder / 'train.json'}: all boxes of class 'tall' would be left out: "
        f"{number} without a bbox of four finite numbers (first: annotation {first}); correct the file itself\n"
    )
    assert not list(data.folder.glob("clean/*"))
    assert main([*places, "--fix", str(data.folder / "clean"), "--allow_loss"]) == 1
    assert "2 classes without any box" not in capsys.readouterr().out
    assert {path.name for path in (data.folder / "clean").iterdir()} == {"train.json", "val.json"}


def test_no_cleaned_copy_if_category_ids_are_shifted(data: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    """All category ids of the boxes are one too low: leaving out those of the unknown id would leave the others with wrong names."""
    content = data.read()
    for row in content["annotations"]:
        row["category_id"] = {3: 2, 7: 3}[row["category_id"]]
    data.write(content)
    places = ["--annotations", str(data.folder / "train.json"), "--images", str(data.folder / "train")]
    assert main([*places, "--fix", str(data.folder / "clean")]) == 2
    assert "of class 'category_id 2' would be left out" in capsys.readouterr().err
    assert not list(data.folder.glob("clean/*"))


def test_no_copy_is_left_if_the_second_cannot_be_written(data: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (data.folder / "val" / f"{number}.png").unlink()
    places = ["--annotations", str(data.folder / "train.json"), "--images", str(data.folder / "train")]
    places += ["--val_annotations", str(data.folder / "val.json"), "--val_images", str(data.folder / "val")]
    assert main([*places, "--fix", str(data.folder / "clean")]) == 2
    printed = capsys.readouterr()
    assert "3 images of 5 not in" in printed.out
    assert "3 of the 5 images would be left out" in printed.err
    assert not list(data.folder.glob("clean/*"))


def test_a_cleaned_copy_has_the_names_of_the_files(data: DataSet, tmp_path: Path) -> None:
    given = read_coco(data.folder / "train.json", data.folder / "train", training=True)
    content = data.read()
    for row in content["images"]:
        row["file_name"] = f"..\\..\\media\\upload\\1\\{row['file_name']}"
    data.write(content)
    code, findings, _ = data.check("--fix", str(tmp_path / "clean"))
    assert code == 1
    (fault,) = [one for one in findings if one["level"] == "fault"]
    assert fault["fix"] == "writes the names of the files"
    assert not any("without annotations" in one["text"] for one in findings)
    clean = read_coco(tmp_path / "clean" / "train.json", data.folder / "train", training=True)
    assert [(one.path, one.annotation_ids) for one in clean.images] == [
        (one.path, one.annotation_ids) for one in given.images
    ]


def test_boxes_of_suspicious_format_are_left_unchanged(data: DataSet, tmp_path: Path) -> None:
    question = "corners (x1, y1, x2, y2) instead of x, y, width, height?"
    content = data.read()
    for row in content["annotations"][::3]:
        x, y, width, height = row["bbox"]
        row["bbox"] = [x, y, x + width, y + height]
    data.write(content)
    code, findings, _ = data.check("--fix", str(tmp_path / "clean"))
    assert code == 0
    assert any(text.endswith(question) for text in texts(findings, "warning"))
    assert json.loads((tmp_path / "clean" / "train.json").read_text()) == content
    for row in (row for index, row in enumerate(content["annotations"]) if index % 3):
        x, y, width, height = row["bbox"]
        row["bbox"] = [x, y, x + width, y + height]
    data.write(content)
    code, findings, _ = data.check("--fix", str(tmp_path / "none"))  # most of them: no copy that training would refuse
    assert code == 2
    assert any(text.endswith(f"{question}: training stops") for text in texts(findings, "fault"))
    assert not list(tmp_path.glob("none/*"))


def test_a_cleaned_copy_has_the_values_that_training_reads(data: DataSet, tmp_path: Path) -> None:
    content = data.read()
    for number, row in enumerate(content["annotations"]):
        x, y, width, height = row.pop("bbox")
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        row["id"], row["area"] = float(row["id"]), -1 if number else row["area"]
    content["categories"].insert(0, {"id": 0, "name": "wide\n"})
    data.write(content)
    given = read_coco(data.folder / "train.json", data.folder / "train", training=True)
    code, findings, _ = data.check("--fix", str(tmp_path / "clean"))
    assert (code, len(texts(findings, "warning"))) == (0, 5)
    clean = read_coco(tmp_path / "clean" / "train.json", data.folder / "train", training=True)
    assert not clean.tally.changed("box") + clean.tally.changed("class")
    assert (
        (clean.class_names, clean.category_ids) == (given.class_names, given.category_ids) == (("wide", "tall"), (3, 7))
    )
    for one, other in zip(clean.images, given.images, strict=True):
        assert one.annotation_ids == other.annotation_ids
        assert one.boxes_N4.tolist() == other.boxes_N4.tolist()
        assert one.areas_N.tolist() == other.areas_N.tolist()
