"""The data check on deliberately damaged data: every fault is reported by name, dropped boxes are counted as in training, a cleaned copy can be
trained on, and the given files do not change."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from turned_images import coco_content, save_as, save_turned, scenes

from ssld.shared.errors import UserError
from ssld.stage2_detect.check_data import main
from ssld.stage2_detect.data.check.images import difference_hash, near_duplicates
from ssld.stage2_detect.data.coco import read_coco, require_masks

Content = dict[str, Any]


class DataSet:
    """A copy of the drawn scenes that a test may damage."""

    def __init__(self, folder: Path, source: Any) -> None:
        self.folder = folder
        for part in ("train", "val"):
            shutil.copytree(getattr(source, f"{part}_images"), folder / part)
            shutil.copy(getattr(source, f"{part}_annotations"), folder / f"{part}.json")

    def read(self, part: str = "train") -> Content:
        content: Content = json.loads((self.folder / f"{part}.json").read_text())
        return content

    def write(self, content: Content, part: str = "train") -> None:
        (self.folder / f"{part}.json").write_text(json.dumps(content))

    def check(self, *flags: str, val: bool = False) -> tuple[int, list[Content], Content]:
        """(exit code, findings, statistics of the files)."""
        report = self.folder / "report.json"
        places = ["--annotations", str(self.folder / "train.json"), "--images", str(self.folder / "train")]
        if val:
            places += ["--val_annotations", str(self.folder / "val.json"), "--val-images", str(self.folder / "val")]
        code = main([*places, "--report", str(report), *flags])
        record = json.loads(report.read_text())
        return code, record["findings"], record["files"]


@pytest.fixture
def data(tmp_path: Path, tiny_coco: Any) -> DataSet:
    return DataSet(tmp_path, tiny_coco)


def texts(findings: list[Content], level: str) -> list[str]:
    return [finding["text"] for finding in findings if finding["level"] == level]


def test_sound_data_has_no_faults(data: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    content = data.read()
    code, findings, facts = data.check(val=True)
    assert code == 0
    assert {finding["level"] for finding in findings} <= {"note"}
    assert any("1 image without objects (1.png)" in text for text in texts(findings, "note"))
    counts = {
        name: sum(row["category_id"] == key for row in content["annotations"])
        for key, name in ((3, "wide"), (7, "tall"))
    }
    assert facts["train"]["classes"] == counts
    sides = sorted((row["area"] ** 0.5) / 64 for row in content["annotations"])
    middle = len(sides) // 2
    median = sides[middle] if len(sides) % 2 else (sides[middle - 1] + sides[middle]) / 2
    assert facts["train"]["object_sizes"][2] == pytest.approx(median, abs=1e-4)
    assert facts["train"]["short_side"] == 64
    assert "12 images, 2 classes, " in capsys.readouterr().out


def test_counts_are_those_of_training(data: DataSet) -> None:
    content = data.read()
    rows = content["annotations"]
    rows[0]["bbox"][2] = 0  # degenerate
    rows[1]["bbox"] = [70, 0, 9, 9]  # outside
    rows[2]["bbox"] = [-9, -9, 9, 20]
    rows[3]["bbox"] = [50, 50, 30, 5]  # clipped
    rows[4]["bbox"], rows[4]["iscrowd"] = [0, 0, 0, 0], 1  # boxes of crowd regions are not checked
    data.write(content)
    code, findings, facts = data.check()
    trained = read_coco(data.folder / "train.json", data.folder / "train", training=True)
    assert (trained.counts["degenerate"], trained.counts["outside"], trained.counts["clipped"]) == (1, 2, 1)
    assert facts["train"]["boxes"] == trained.counts["boxes"] == len(rows) - 4
    assert facts["train"]["dropped"] == 4
    assert code == 0
    warnings = texts(findings, "warning")
    assert any(text.startswith(f"1 box without width or height (id {rows[0]['id']})") for text in warnings)
    assert any(text.startswith("2 boxes outside the image (first ids: ") for text in warnings)
    assert any(text.startswith("1 box reaching over the border") for text in texts(findings, "note"))


Damage = Callable[[Content], None]
FAULTS: list[tuple[str, Damage, str]] = [
    ("image gone from the list", lambda c: c["annotations"][0].update(image_id="unknown"), "of an image that is not in"),
    ("unknown category", lambda c: c["annotations"][0].update(category_id=99), "of a category that is not in the file"),
    ("NaN", lambda c: c["annotations"][0].update(bbox=[float("nan"), 1, 2, 3]), "without a bbox of four finite numbers"),
    ("no box", lambda c: c["annotations"][0].pop("bbox"), "without a bbox of four finite numbers"),
    ("same id", lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"]), "1 annotation with an id that is given before (id 1)"),
    ("crowd of 5", lambda c: c["annotations"][0].update(iscrowd=5), "an iscrowd that is neither 0 nor 1"),
    ("no width", lambda c: c["images"][0].pop("width"), "1 image without a width and height (0.png)"),
    ("image twice", lambda c: c["images"].append(c["images"][0]), "1 image with an id that is given before (0.png)"),
    ("no name", lambda c: c["images"][0].pop("file_name"), "1 image without a file_name"),
    ("wrong size", lambda c: c["images"][2].update(width=32), "1 image of another size than in the file (2.png is 64 x 64, not 32 x 64)"),
    ("file gone", lambda c: c["images"][2].update(file_name="gone.png"), "1 image of 12 not in"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_faults_are_reported_where_training_stops_and_repaired(data: DataSet, damage: Damage, message: str) -> None:
    content = data.read()
    damage(content)
    data.write(content)
    before = (data.folder / "train.json").read_bytes()
    with pytest.raises(UserError):
        read_coco(data.folder / "train.json", data.folder / "train", training=True)
    code, findings, _ = data.check("--fix", str(data.folder / "clean"))
    assert code == 1
    assert any(message in text for text in texts(findings, "fault")), findings
    assert (data.folder / "train.json").read_bytes() == before
    shutil.copy(data.folder / "clean" / "train.json", data.folder / "train.json")
    assert data.check()[0] == 0
    kept = read_coco(data.folder / "train.json", data.folder / "train", training=True)
    assert len(kept.images) >= 11


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


@pytest.mark.parametrize(
    "shape",
    [[[1, 2, float("nan"), 4, 5, 6]], "x", [], None, [[1, 2, 3]], {"size": [9, 9], "counts": [81]}, [["a"] * 6]],
)
def test_segmentations_are_checked_as_in_training_with_masks(data: DataSet, shape: Any) -> None:
    content = data.read()
    rows = content["annotations"]
    assert data.check()[0] == 0  # boxes alone: nothing to report
    for row in rows:
        x, y, width, height = row["bbox"]
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height]]
    data.write(content)
    for flags in ([], ["--masks"]):
        assert "segmentation" not in str(data.check(*flags)[1])
    rows[2]["segmentation"] = shape
    data.write(content)
    trained = read_coco(data.folder / "train.json", data.folder / "train", training=True, segmentations=True)
    with pytest.raises(UserError, match=f"1 of {len(rows)} objects have no usable segmentation"):
        require_masks(trained)
    message = f"1 box without a usable segmentation (id {rows[2]['id']}): training a detector with masks stops"
    code, findings, _ = data.check()
    assert code == 0
    assert f"{message}; other kinds do not read it" in texts(findings, "warning")
    code, findings, _ = data.check("--masks")
    assert code == 1
    assert message in texts(findings, "fault")


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


def test_unreadable_images_count_as_in_training(data: DataSet) -> None:
    first = data.folder / "train" / "0.png"
    first.write_bytes(first.read_bytes()[:100])
    code, findings, _ = data.check()
    assert code == 0  # training leaves out a single unreadable image
    assert any(text.startswith("1 image of 12 cannot be read (0.png;") for text in texts(findings, "warning"))
    (data.folder / "train" / "3.png").write_text("not a image")
    code, findings, _ = data.check()
    assert code == 1
    assert any("2 images of 12 cannot be read" in text for text in texts(findings, "fault"))


def test_leakage_and_unlisted_images(data: DataSet, tmp_path: Path) -> None:
    shutil.copy(data.folder / "val" / "2.png", data.folder / "train" / "5.png")
    shutil.copy(data.folder / "train" / "7.png", data.folder / "train" / "8.png")
    shutil.copy(data.folder / "train" / "7.png", data.folder / "train" / "stray.png")
    shutil.copy(data.folder / "train" / "7.png", data.folder / "train" / "._7.png")
    code, findings, facts = data.check("--fix", str(tmp_path / "clean"), val=True)
    assert code == 1
    assert any(
        "1 image also in val.json (5.png = 2.png): scores would be too good" in text
        for text in texts(findings, "fault")
    )
    assert any(
        "1 image stored more than once under other names (7.png = 8.png)" in text for text in texts(findings, "warning")
    )
    assert any("1 image in" in text and "without annotations (stray.png)" in text for text in texts(findings, "note"))
    assert facts["train"]["together"] == [["train-7", "train-8"]]
    clean = json.loads((tmp_path / "clean" / "train.json").read_text())
    assert [row["id"] for row in clean["images"]] == [f"train-{number}" for number in range(12) if number != 5]


def test_classes_of_both_files(data: DataSet, tmp_path: Path) -> None:
    content = data.read("val")
    content["categories"] = [{"id": 7, "name": "Tall"}, {"id": 3, "name": "wide"}, {"id": 8, "name": "other"}]
    data.write(content, "val")
    code, findings, _ = data.check("--fix", str(tmp_path / "clean"), val=True)
    assert code == 1
    assert any("'Tall' is 'tall' in train.json; unknown: other" in text for text in texts(findings, "fault"))
    clean = read_coco(
        tmp_path / "clean" / "val.json", data.folder / "val", training=False, class_names=("wide", "tall")
    )
    assert clean.category_ids == (3, 7)


def test_missing_class_is_added(data: DataSet, tmp_path: Path) -> None:
    content = data.read("val")
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] == 3]
    content["categories"] = [{"id": 3, "name": "wide"}]
    data.write(content, "val")
    assert data.check("--fix", str(tmp_path / "clean"), val=True)[0] == 1
    clean = json.loads((tmp_path / "clean" / "val.json").read_text())
    assert clean["categories"] == [{"id": 3, "name": "wide"}, {"id": 7, "name": "tall"}]


def test_near_duplicates() -> None:
    draw = np.random.default_rng(5)
    cells = draw.integers(0, 256, (2, 8, 9), dtype=np.uint8)
    one, other = (Image.fromarray(cell).resize((90, 80), Image.Resampling.NEAREST).convert("RGB") for cell in cells)
    buffer = io.BytesIO()
    one.resize((180, 160)).save(buffer, "JPEG", quality=60)
    hashes = [difference_hash(image) for image in (one, Image.open(buffer), other)]
    expected = "".join("1" if row[x + 1] > row[x] else "0" for row in cells[0].tolist() for x in range(8))
    assert hashes[0] == int(expected, 2)
    assert near_duplicates(hashes[:1], hashes[1:]) == [(0, 0)]
    assert difference_hash(Image.new("RGB", (64, 48), (9, 9, 9))) == 0
    assert near_duplicates([0], [0, 1]) == []  # images of one color are not compared
    ramp = Image.fromarray(np.tile(np.arange(0, 180, 2, dtype=np.uint8), (80, 1)))  # dark to light, left to right
    assert difference_hash(ramp) == 2**64 - 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--images", "nowhere"), "nowhere: no such folder"),
        (("--val_annotations", "val.json"), "give both --val_annotations and --val_images"),
        (("--fix", "x", "--quick"), "--fix needs to read the images"),
        (("--annotation", "y"), "--annotation: unknown flag; did you mean '--annotations'?"),
        (("--annotations", "broken.json"), "broken.json is not JSON"),
        (("--annotations", "other.json"), "other.json is not a COCO data set: expected an object, got a list"),
        (("--annotations", "gone.json"), "cannot read gone.json: No such file or directory"),
    ],
)
def test_mistakes(
    data: DataSet,
    flags: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(data.folder)
    Path("broken.json").write_text("{")
    Path("other.json").write_text("[]")
    assert main(["--annotations", "train.json", "--images", "train", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


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
    (data.folder / "val" / "2.png").rename(data.folder / "val" / "2.PNG")
    places = ["--annotations", str(data.folder / "train.json"), "--images", str(data.folder / "train")]
    places += ["--val_annotations", str(data.folder / "val.json"), "--val_images", str(data.folder / "val")]
    assert main([*places, "--fix", str(data.folder / "clean")]) == 2
    printed = capsys.readouterr()
    assert "1 image of 5 not in" in printed.out
    assert "did you mean '2.PNG'?" in printed.err
    assert not list(data.folder.glob("clean/*"))


def test_boxes_of_suspicious_format_are_left_unchanged(data: DataSet, tmp_path: Path) -> None:
    content = data.read()
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        row["bbox"] = [x, y, x + width, y + height]
    data.write(content)
    code, findings, _ = data.check("--fix", str(tmp_path / "clean"))
    assert code == 0
    assert any(
        text.endswith("corners (x1, y1, x2, y2) instead of x, y, width, height?") for text in texts(findings, "warning")
    )
    assert json.loads((tmp_path / "clean" / "train.json").read_text()) == content


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


def test_augmented_copies_on_both_sides(data: DataSet) -> None:
    for part, number in (("train", 3), ("train", 5), ("val", 2)):
        content = data.read(part)
        name = f"cat_jpg.rf.{number:032x}.png"
        (data.folder / part / f"{number}.png").rename(data.folder / part / name)
        content["images"][number]["file_name"] = name
        data.write(content, part)
    code, findings, facts = data.check(val=True)
    assert code == 0
    assert any(
        text.startswith("2 images of which val.json has an augmented copy by its name (cat_jpg.rf.0")
        for text in texts(findings, "warning")
    )
    assert any(text.startswith("2 images that are augmented copies of 1 photo") for text in texts(findings, "note"))
    assert facts["train"]["together"] == [["train-3", "train-5"]]


def test_quick_looks_at_names_only(data: DataSet) -> None:
    (data.folder / "train" / "0.png").write_text("not a image")
    shutil.rmtree(data.folder / "val")
    shutil.copytree(data.folder / "train", data.folder / "val")
    assert data.check("--quick", val=True)[0] == 0  # in two folders only the images' content could show it
    (data.folder / "val" / "2.png").unlink()
    code, findings, _ = data.check("--quick", val=True)
    assert code == 1
    assert any("1 image of 5 not in" in text for text in texts(findings, "fault"))


# ---- orientation of the images


def _orientation_finding(
    data: DataSet, values: list[int], sideways_stored: int, *flags: str
) -> tuple[list[Content], Content]:
    """Findings on squares that EXIF rotates by `values` beside three sideways images, `sideways_stored` of them with their stored size."""
    some = scenes(["landscape"] * 3 + ["square"] * len(values))
    shutil.rmtree(data.folder / "train")
    for number, (one, value) in enumerate(zip(some, [6] * 3 + values, strict=True)):
        (save_as if number < sideways_stored else save_turned)(data.folder / "train" / one.name, one.pixels, value)
    data.write(coco_content(some))
    code, findings, facts = data.check(*flags)
    assert code == 0
    return [one for one in findings if "sideways image" in one["text"]], facts["train"]["orientation"]


@pytest.mark.parametrize(
    ("stored", "level", "text"),
    [
        (0, "note", "3 sideways images turned upright by EXIF, by their sizes, 2 images that EXIF turns without a change of size read "
         "upright, like these"),
        (3, "note", "3 sideways images read as stored, by their sizes, 2 images that EXIF turns without a change of size read as stored, like "
         "these"),
        (1, "warning", "2 sideways images turned upright by EXIF, by their sizes, 1 sideways image read as stored, by its size, 2 images "
         "that EXIF turns without a change of size read upright, like most of these: look at some"),
    ],
)  # fmt: skip
def test_orientation_of_images(data: DataSet, stored: int, level: str, text: str) -> None:
    (finding,), facts = _orientation_finding(data, [3, 8, 1], stored, "--fix", str(data.folder / "clean"))
    assert (finding["level"], finding["text"]) == (level, text)
    convention = "stored" if stored == 3 else "upright"
    assert facts == {"convention": convention, "stated": False, "upright": 3 - stored, "stored": stored, "both": 2}
    # the copy may lack the images that decided it, so it states the orientation
    assert json.loads((data.folder / "clean" / "train.json").read_text())["info"] == {"image_orientation": convention}
    trained = read_coco(data.folder / "train.json", data.folder / "train", training=True)
    assert trained.orientation.record() == facts


def test_images_of_undecided_orientation_are_counted(data: DataSet) -> None:
    some = scenes(["landscape", "square", "portrait"])
    for one, value in zip(some, (3, 6, 1), strict=True):
        save_turned(data.folder / "train" / one.name, one.pixels, value)
    data.write(coco_content(some))
    text = "2 images that EXIF turns without a change of size read upright, although the form that the boxes refer to is unknown: look at some"
    assert texts(data.check()[1], "warning") == [text]
    data.write(coco_content(some) | {"info": {"image_orientation": "upright"}})
    assert not texts(data.check()[1], "warning")
    data.write(coco_content(some) | {"info": {"image_orientation": "up"}})
    code, findings, _ = data.check("--fix", str(data.folder / "clean"))
    assert code == 1
    assert texts(findings, "fault") == [
        "info.image_orientation is 'up', expected one of upright, stored: training stops"
    ]
    assert json.loads((data.folder / "clean" / "train.json").read_text())["info"] == {"image_orientation": "upright"}


def test_a_missing_size_follows_the_orientation_of_the_other_images(data: DataSet) -> None:
    some = scenes(["landscape"] * 4)
    for one in some:
        save_as(data.folder / "train" / one.name, one.pixels, 6)
    content = coco_content(some)
    del content["images"][2]["width"]
    data.write(content)
    assert data.check("--fix", str(data.folder / "clean"))[0] == 1
    images = json.loads((data.folder / "clean" / "train.json").read_text())["images"]
    assert [(row["width"], row["height"]) for row in images] == [(48, 32)] * 4
